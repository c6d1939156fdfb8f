"""The file that is a whole model, read with care.

A checkpoint of Lightning's carries one more entry, `lmlight`: the net's class and arguments, the tokenizer's own bytes,
and the settings of the run. With the weights that is all there is to know about a model. Every file is read with
`weights_only=True`, which refuses a pickle that would run code. Free of lightning.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmlight.data.tokenizer import Tokenizer, from_bytes
from lmlight.errors import UserError
from lmlight.models import NETS, Net

KEY = "lmlight"
LAYOUT = 1  # raised when a file of the older kind can no longer be read as it is
NET_PREFIX = "net."  # the net's part of the LightningModule's state_dict


def describe(net: Net, tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a checkpoint whole: the value of its entry `lmlight`.

    Args:
        net: its class must be one of `models.NETS`.
        tokenizer: kept as its own bytes.
        settings: plain values (text, numbers, lists, dicts) that the command line reads back as defaults.
    """
    return {
        "layout": LAYOUT,
        "net": {"class": type(net).__name__, "config": net.config},
        "tokenizer": torch.frombuffer(bytearray(tokenizer.to_bytes()), dtype=torch.uint8),
        "settings": settings,
    }


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU.

    Raises:
        UserError: no such file; damaged; not one of lmlight's, or of a later layout; a pickle that would run code.
    """
    try:
        content = torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"no checkpoint at '{path}': pass the path of a .ckpt file, as `lmlight fit` prints it"
        ) from None
    except OSError as error:
        raise UserError(
            f"checkpoint '{path}' cannot be read ({error.strerror}): pass the path of a .ckpt file"
        ) from None
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise UserError(
                f"checkpoint '{path}' is refused: it holds more than tensors and plain values, and loading it could run "
                "code; pass one that lmlight wrote"
            ) from None
        raise UserError(f"'{path}' is not a checkpoint, or a damaged one: pass another .ckpt file") from None
    except (RuntimeError, EOFError, ValueError, KeyError):
        raise UserError(f"checkpoint '{path}' is truncated or damaged: pass another .ckpt file") from None
    if not isinstance(content, dict) or KEY not in content:
        raise UserError(f"'{path}' is not a checkpoint of lmlight's: pass one that `lmlight fit` wrote")
    if content[KEY]["layout"] > LAYOUT:
        raise UserError(f"checkpoint '{path}' was written by a later lmlight: upgrade with pip install -U lmlight")
    return content


def tokenizer_of(checkpoint: dict[str, Any]) -> Tokenizer:
    """The tokenizer inside a checkpoint that `read` gave."""
    data: Tensor = checkpoint[KEY]["tokenizer"]
    return from_bytes(bytes(data.tolist()))


def net_of(checkpoint: dict[str, Any]) -> Net:
    """The net inside a checkpoint that `read` gave, with its weights."""
    described = checkpoint[KEY]["net"]
    net = NETS[described["class"]](**described["config"])
    state = {k.removeprefix(NET_PREFIX): v for k, v in checkpoint["state_dict"].items() if k.startswith(NET_PREFIX)}
    net.load_state_dict(state)
    return net
