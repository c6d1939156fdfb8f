"""Export to ONNX and to `torch.export` archives: a network as a graph, with no branch that depends on a size.

Axes: B rows, T new positions, P past positions, S = P + T, L blocks, H_kv key/value heads, D channels per head, V
vocabulary.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from lmlight.errors import UserError
from lmlight.export.model import Model, require_extra
from lmlight.export.tokenizer import tokenizer_json
from lmlight.models import Transformer
from lmlight.models.attention import attention_weights, repeat_heads, rotate
from lmlight.models.transformer import Block

OPSET = 20


class CachedGraph(nn.Module):
    """The forward pass and the cached step of a transformer in one.

    Keys are cached before RoPE and rotated by their position in the cache. So a caller gets a sliding window, as in
    lmlight's own cache, by dropping the oldest past positions; no position is counted.
    """

    def __init__(self, net: Transformer) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor, past: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Computes logits.

        Args:
            ids: (B, T) new tokens.
            past: (L, 2, B, H_kv, P, D) keys and values; P + T is at most `block_size`.

        Returns:
            (B, T, V) logits; with a `past`, also the (L, 2, B, H_kv, S, D) keys and values to pass with the next tokens.
        """
        net, cached = self.net, past is not None
        if past is None:
            past = net.head.weight.new_zeros(len(net.blocks), 2, ids.size(0), net.n_kv_head, 0, net.head_size)
        n_past, n_new = past.size(4), ids.size(1)
        positions = torch.arange(n_past + n_new, device=ids.device)  # (S,)
        new = torch.arange(n_new, device=ids.device) + n_past  # (T,)
        mask = positions <= new[:, None]  # (T, S)
        x = net.embedding(ids)  # (B, T, C)
        if net.positions is not None:
            x = x + net.positions(new)
        present = []
        for layer, block in enumerate(cast("list[Block]", net.blocks)):
            q, k, v = block.attention.project(block.attention_norm(x))
            k, v = torch.cat((past[layer, 0], k), 2), torch.cat((past[layer, 1], v), 2)  # (B, H_kv, S, D)
            present.append(torch.stack((k, v)))
            if net.rotary is not None:
                q, k = rotate(q, net.rotary[:, new]), rotate(k, net.rotary[:, positions])
            group = q.size(1) // k.size(1)
            weights = attention_weights(q, repeat_heads(k, group), False, mask)  # (B, H, T, S)
            y = weights @ repeat_heads(v, group)
            x = x + block.attention.output(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_norm(x))
        logits = net.head(net.norm(x))
        return (logits, torch.stack(present)) if cached else logits


def metadata(model: Model) -> dict[str, str]:
    """The metadata of a graph's file, as JSON; see docs/export.md."""
    found: dict[str, Any] = {
        "vocab_size": model.net.vocab_size,
        "block_size": model.net.block_size,
        "bos_id": model.bos_id,
        "eos_id": model.tokenizer.eos_id,
        "supports_sliding_window": model.net.slides,
    }
    with contextlib.suppress(UserError):  # a lossy tokenizer
        # without special tokens, whose names the library would find in a text
        found["tokenizer.json"] = {**tokenizer_json(model.tokenizer), "added_tokens": []}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in found.items()}


def write_onnx(model: Model, path: Path) -> None:
    """Writes an `.onnx` file with weights and `metadata`.

    - Inputs: `ids`, (B, T) int64; `past`, (L, 2, B, H_kv, P, D) float32, with P + T up to `block_size`.
    - Outputs: `logits`, (B, T, V); `present`, (L, 2, B, H_kv, P + T, D).

    A network that is not a `Transformer` has neither `past` nor `present`.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    *_, passes = require_extra("onnx", "onnx", "onnxscript", "onnx_ir.passes.common")
    net = model.net.float()
    batch, time, past = Dim("batch"), Dim("time", max=net.block_size), Dim("past", max=net.block_size)
    graph: nn.Module = net
    # Sizes of at least 2: the exporter takes a size of 1 for a constant.
    arguments, dynamic = [torch.zeros(2, 3, dtype=torch.int64)], [{0: batch, 1: time}]
    if isinstance(net, Transformer):
        graph = CachedGraph(net)
        arguments.append(torch.zeros(len(net.blocks), 2, 2, net.n_kv_head, 4, net.head_size))
        dynamic.append({2: batch, 4: past})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's warnings about its own code
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph.eval(),
            tuple(arguments),
            input_names=["ids", "past"][: len(arguments)],
            output_names=["logits", "present"][: len(arguments)],
            dynamic_shapes=tuple(dynamic),
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    passes.ClearMetadataAndDocStringPass()(program.model)  # local paths of source files
    program.model.metadata_props.update(metadata(model))
    path.write_bytes(program.model_proto.SerializeToString())


def write_torch(model: Model, path: Path) -> None:
    """Writes a `torch.export` archive (`.pt2`): (B, T) int64 ids to (B, T, V) logits, with T up to `block_size`.

    Its extra files are `metadata`.
    """
    net = model.net.float()
    graph = CachedGraph(net) if isinstance(net, Transformer) else net
    sizes: dict[int, Any] = {0: Dim("batch")}
    if net.block_size > 1:
        sizes[1] = Dim("time", max=net.block_size)
    ids = torch.zeros(2, min(2, net.block_size), dtype=torch.int64)
    with torch.no_grad():
        program = torch.export.export(graph.eval(), (ids,), dynamic_shapes=(sizes,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # local paths of source files
    archive = io.BytesIO()  # torch.export.save aborts the process when the disk is full
    torch.export.save(program, archive, extra_files=metadata(model))
    path.write_bytes(archive.getvalue())
