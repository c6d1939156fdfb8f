"""A `torch.export` archive: the forward pass as a graph that torch alone loads and runs, or compiles ahead of time."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.export import Dim

from lmlight.export.graph import Graph, labels
from lmlight.export.model import Model


def write(model: Model, path: Path) -> None:
    """Writes a `.pt2` file: (B, T) int64 ids to (B, T, V) logits, for any B, and T up to `block_size`.

    Its extra files are `graph.labels`.
    """
    net = model.net.float()
    example = torch.zeros(2, min(2, net.block_size), dtype=torch.int64)
    batch, time = Dim("batch"), Dim("time", max=net.block_size)
    dynamic = {"ids": {0: batch, 1: time} if net.block_size > 1 else {0: batch}}
    with torch.no_grad():
        program = torch.export.export(Graph(net).eval(), (example,), dynamic_shapes=dynamic, strict=False)
    for node in program.graph.nodes:  # where on this machine our code lies
        node.meta.pop("stack_trace", None)
    archive = io.BytesIO()  # on a disk that fills up, what writes archives to files ends the interpreter
    torch.export.save(program, archive, extra_files=labels(model))
    path.write_bytes(archive.getvalue())
