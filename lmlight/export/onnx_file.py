"""An ONNX file for onnxruntime, in Python, on a phone or in a browser.

One graph is both the forward pass (a past of no positions) and the cached step: (ids, past) to (logits, present).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from lmlight.export.graph import CachedGraph, Graph, labels
from lmlight.export.model import Model, need
from lmlight.models import Transformer

OPSET = 20


def write(model: Model, path: Path) -> None:
    """Writes an `.onnx` file, weights included.

    - `ids`: (B, T) int64; `past`: (L, 2, B, H_kv, P, D) float32, P + T up to `block_size`. A bigram table has no past.
    - `logits`: (B, T, V); `present`: (L, 2, B, H_kv, P + T, D).

    Its metadata are `graph.labels`.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    need("onnx", "onnx", "onnxscript")
    net = model.net.float()
    batch, time = Dim("batch"), Dim("time", max=net.block_size)
    ids = torch.zeros(2, 3, dtype=torch.int64)  # of at least 2: from 1 the exporter would conclude that it is always 1
    if isinstance(net, Transformer):
        graph: torch.nn.Module = CachedGraph(net)
        arguments: tuple[torch.Tensor, ...] = (ids, CachedGraph(net).no_past(2, 4))
        dynamic: tuple[dict[int, Any], ...] = ({0: batch, 1: time}, {2: batch, 4: Dim("past", max=net.block_size)})
    else:
        graph, arguments, dynamic = Graph(net), (ids,), ({0: batch, 1: time},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph.eval(),
            arguments,
            input_names=["ids", "past"][: len(arguments)],
            output_names=["logits", "present"][: len(arguments)],
            dynamic_shapes=dynamic,
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _forget_sources(proto)
    for name, value in labels(model).items():
        proto.metadata_props.add(key=name, value=value)
    path.write_bytes(proto.SerializeToString())


def _forget_sources(proto: Any) -> None:
    """Takes out where on this machine the code lay that each node came from."""
    graphs: Iterable[Any] = (proto.graph, *proto.functions)
    for graph in graphs:
        parts = [graph, *graph.node, *graph.value_info]
        if graph is proto.graph:
            parts += [*graph.initializer, *graph.input, *graph.output]
        for part in parts:
            del part.metadata_props[:]
            part.doc_string = ""
