"""Export to ONNX and to `torch.export` archives: a network as a graph, with no branch that depends on a size.

Axes: B rows, T new positions, P past positions, S = P + T, L blocks, H query heads, H_kv key/value heads,
D channels per head, V vocabulary.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.export import Dim

from lmlight.errors import UserError, reason
from lmlight.export.model import Model, require_extra
from lmlight.export.tokenizer import tokenizer_json
from lmlight.models import Net, Transformer
from lmlight.models.kv_cache import Cache, KeyValueCache
from lmlight.models.rope import apply_rope

OPSET = 20
MAX_BYTES = 2**31 - 2**20  # of weights: a protobuf file must be smaller than 2 GiB
BATCH = Dim("batch")


class ConcatCache(Cache):
    """A cache without branches that depend on a size: concatenates new keys and values to a past that the caller holds.

    The past holds keys before RoPE; each call rotates them by their index in the window. So a caller slides the window by
    dropping the oldest past positions, and tracks no index.

    Args:
        past: (L, 2, B, H_kv, P, D) keys and values.
        rope: the network's RoPE table; None if it has learned positions.

    Attributes:
        present: (2, B, H_kv, S, D) keys and values of each layer so far.
    """

    attention_maps: list[Tensor]  # not None: selects the attention path that works for any number of keys

    def __init__(self, past: Tensor, rope: Tensor | None) -> None:
        super().__init__(is_causal=False, attention_maps=[])
        self.past, self.rope, self.present = past, rope, list[Tensor]()

    def advance(self, count: int) -> None:
        positions = torch.arange(self.past.size(4) + count, device=self.past.device)  # (S,)
        self.input_pos = torch.arange(count, device=self.past.device) + self.past.size(4)  # (T,)
        self.attn_mask = positions <= self.input_pos[:, None]  # (T, S)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past_k, past_v = self.past[layer]
        before_rope, rotated = k, past_k
        if self.rope is not None:
            cos, sin = self.rope[:, self.input_pos]
            before_rope = apply_rope(k, torch.stack((cos, -sin)))
            rotated = apply_rope(past_k, self.rope[:, torch.arange(past_k.size(2), device=k.device)])
        v = torch.cat((past_v, v), 2)
        self.present.append(torch.stack((torch.cat((past_k, before_rope), 2), v)))
        return torch.cat((rotated, k), 2), v


class TransformerGraph(nn.Module):
    """The forward pass and the cached step of a transformer in one."""

    def __init__(self, net: Transformer, attention: bool = False) -> None:
        super().__init__()
        self.net, self.attention = net, attention

    def forward(self, ids: Tensor, past: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Computes logits.

        Args:
            ids: (B, T) new tokens.
            past: (L, 2, B, H_kv, P, D) keys and values; P + T is at most `block_size`.

        Returns:
            (B, T, V) logits; with a `past`, also the (L, 2, B, H_kv, S, D) keys and values to pass with the next tokens, and
            the (L, B, H, T, S) attention weights if `attention` is set.
        """
        net = self.net
        empty = net.head.weight.new_zeros(len(net.blocks), 2, ids.size(0), net.n_kv_head, 0, net.head_size)
        cache = ConcatCache(empty if past is None else past, net.rope)
        logits = net(ids, cache)
        if past is None:
            return logits
        present = torch.stack(cache.present)
        return (logits, present, torch.stack(cache.attention_maps)) if self.attention else (logits, present)


def metadata(model: Model) -> dict[str, str]:
    """The metadata of a graph's file, as JSON; see docs/export.md."""
    cache = model.net.make_cache(1)
    found: dict[str, Any] = {
        "vocab_size": model.net.vocab_size,
        "block_size": model.net.block_size,
        "bos_id": model.bos_id,
        "eos_id": model.tokenizer.eos_id,
        "newline": model.tokenizer.newline,
        "supports_sliding_window": cache is None or cache.supports_sliding_window,
    }
    with contextlib.suppress(UserError):  # a lossy or user-defined tokenizer
        content = tokenizer_json(model.tokenizer)
        # without special tokens, which `tokenizers` would match in ordinary text, and steps that add or remove tokens
        literal = [token for token in content.get("added_tokens", []) if not token["special"]]
        unused = dict.fromkeys(("post_processor", "truncation", "padding"))
        found["tokenizer.json"] = {**content, **unused, "added_tokens": literal}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in found.items()}


def write_onnx(model: Model, path: Path, attention: bool = False) -> None:
    """Writes an `.onnx` file with weights and `metadata`.

    - Inputs: `ids`, (B, T) int64; `past`, (L, 2, B, H_kv, P, D) float32, with P + T up to `block_size`.
    - Outputs: `logits`, (B, T, V); `present`, (L, 2, B, H_kv, P + T, D); `attention`, (L, B, H, T, P + T), if requested.

    A network without a key-value cache has `ids` and `logits` only.

    Raises:
        UserError: onnx or onnxscript is not installed; `block_size` is 1; the weights take 2 GiB or more; the network cannot
            be traced.
    """
    *_, passes = require_extra("onnx", "onnx", "onnxscript", "onnx_ir.passes.common")
    net, size = model.net.float(), model.net.block_size
    if size < 2:
        raise UserError(
            "a network with block_size 1 cannot be exported to ONNX: train one with a larger --data.block_size"
        )
    if 4 * net.num_parameters > MAX_BYTES:
        raise UserError(
            f"the model has {net.num_parameters:,} parameters, too many for one ONNX file (2 GiB in float32): export it as "
            "gguf, hf or torch"
        )
    graph: nn.Module = net
    inputs, outputs = ["ids"], ["logits"]
    # Sizes of at least 2: the exporter treats a size of 1 as a constant.
    arguments, dynamic = [torch.zeros(2, min(3, size), dtype=torch.int64)], [{0: BATCH, 1: Dim("time", max=size)}]
    if _has_cache(net):
        graph = TransformerGraph(net, attention)
        inputs += ["past"]
        outputs += ["present", "attention"] if attention else ["present"]
        arguments.append(torch.zeros(len(net.blocks), 2, 2, net.n_kv_head, min(4, size), net.head_size))
        dynamic.append({2: BATCH, 4: Dim("past", max=size)})
    options: dict[str, Any] = {"input_names": inputs, "output_names": outputs, "dynamic_shapes": tuple(dynamic)}
    options |= {"opset_version": OPSET, "external_data": False, "dynamo": True, "verbose": False}
    with _tracing(net), torch.no_grad():
        program = torch.onnx.export(graph.eval(), tuple(arguments), **options)
        assert program is not None
        # if torch.export rejects a constant size, the exporter's fallbacks may accept it
        shapes = [value.shape for value in program.model.graph.inputs]
        if any(shape is None or shape.is_static(axis) for shape, axes in zip(shapes, dynamic) for axis in axes):
            raise ValueError("a size that should be dynamic is a constant")
    passes.ClearMetadataAndDocStringPass()(program.model)  # local paths of source files
    program.model.metadata_props.update(metadata(model))
    path.write_bytes(program.model_proto.SerializeToString())


def write_torch(model: Model, path: Path) -> None:
    """Writes a `torch.export` archive (`.pt2`): (B, T) int64 ids to (B, T, V) logits, with T up to `block_size`.

    Its extra files are `metadata`.

    Raises:
        UserError: the network cannot be traced.
    """
    net = model.net.float()
    graph = TransformerGraph(net) if _has_cache(net) else net
    sizes: dict[int, Any] = {0: BATCH} | ({1: Dim("time", max=net.block_size)} if net.block_size > 1 else {})
    ids = torch.zeros(2, min(2, net.block_size), dtype=torch.int64)
    with _tracing(net), torch.no_grad():
        program = torch.export.export(graph.eval(), (ids,), dynamic_shapes=(sizes,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # local paths of source files
    archive = io.BytesIO()  # torch.export.save aborts the process when the disk is full
    torch.export.save(program, archive, extra_files=metadata(model))
    path.write_bytes(archive.getvalue())


def _has_cache(net: Net) -> TypeGuard[Transformer]:
    """Whether `net` has a key-value cache; a subclass turns it off if its `forward` reads the whole context."""
    return isinstance(net, Transformer) and isinstance(net.make_cache(1), KeyValueCache)


@contextlib.contextmanager
def _tracing(net: Net) -> Iterator[None]:
    """Raise any exception as a `UserError` that says what a user-defined network must not do, and hide warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's own code, and attributes that forward sets
            yield
    except Exception as error:
        if type(net) is Transformer:
            raise
        raise UserError(
            f"{type(net).__name__} cannot be exported, because torch.export cannot trace its forward ({reason(error)}): "
            "it must not loop over the batch or the tokens in Python, or branch on their sizes or values"
        ) from error
    finally:
        logger.setLevel(level)
