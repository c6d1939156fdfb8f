"""Checks of a network before it is trained: does it keep the contract of `Net`?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from lmlight.errors import UserError
from lmlight.models.base import Net

VOCAB_SIZE, MAX_TOKENS = 32, 8  # of the small input


def check_net(make_net: Callable[[int, int], Net], block_size: int, check_causality: bool = True) -> None:
    """Make a network with a small vocabulary and check its output on the CPU.

    Args:
        make_net: from (vocab_size, block_size).
        block_size: the longest context.
        check_causality: run it. False only makes it, without memory for its weights.

    Raises:
        UserError: it is not a `Net`, has no parameters, returns logits of the wrong shape, or looks at later tokens.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu" if check_causality else "meta"))
        stack.enter_context(torch.no_grad())
        net = make_net(VOCAB_SIZE, block_size)
        if not isinstance(net, Net):
            raise UserError(
                f"model.net must make a lmlight.models.Net, got {type(net).__name__}: derive the class from Net, and call "
                "super().__init__() in its constructor"
            )
        if not any(parameter.requires_grad for parameter in net.parameters()):
            raise UserError(
                f"{type(net).__name__} has no parameters to train: assign its layers to attributes in __init__"
            )
        if not check_causality:
            return
        for parameter in net.parameters():  # layers that start as zero would hide what they will depend on
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        T = min(MAX_TOKENS, block_size)
        idx, other = torch.randint(VOCAB_SIZE, (2, 2, T))
        logits = _run(net, idx)
        _run(net, idx[:, :1])  # generation starts with short contexts
        for t in range(1, T):  # all tokens from position t on are others
            changed = _run(net, torch.cat((idx[:, :t], other[:, t:]), 1))
            if not torch.allclose(logits[:, :t], changed[:, :t], rtol=1e-3, atol=1e-4):
                raise UserError(
                    f"{type(net).__name__} looks at the future: logits at positions before {t} changed with the tokens from "
                    f"position {t} on; mask later positions, or pass --model.check_causality false"
                )


def _run(net: Net, idx: Tensor) -> Tensor:
    torch.manual_seed(0)  # the same dropout in each call
    logits = net(idx)
    expected = (*idx.shape, VOCAB_SIZE)
    if not isinstance(logits, Tensor) or logits.shape != expected:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"{type(net).__name__}.forward must return logits (batch, time, vocab_size): expected shape {expected} for ids "
            f"of shape {tuple(idx.shape)}, got {found}"
        )
    return logits
