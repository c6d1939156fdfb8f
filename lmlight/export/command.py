"""`lmlight export FORMAT CHECKPOINT TARGET`, `lmlight import hf DIR CHECKPOINT`. Do not wait for Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmlight import checkpoint as checkpoints
from lmlight.command_line import Parser
from lmlight.export import gguf_file, hf, hf_import, onnx_file, pt2
from lmlight.export.model import Model
from lmlight.export.publish import whole_file, whole_folder

FORMATS = {
    "gguf": ("FILE", "a .gguf file for llama.cpp, Ollama and LM Studio"),
    "hf": ("DIR", "a folder for Hugging Face's transformers (safetensors)"),
    "onnx": ("FILE", "an .onnx file for onnxruntime: the forward pass and the cached step"),
    "torch": ("FILE", "a .pt2 file for torch without lmlight (torch.export)"),
}


def export(args: Sequence[str]) -> None:
    """Runs `lmlight export`.

    Raises:
        UserError: no such checkpoint; a model that the format cannot hold; the target is there, or cannot be written.
    """
    parser = Parser("lmlight export", description="Writes a trained model for another engine.")
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, (target, what) in FORMATS.items():
        one = formats.add_parser(name, help=what, description=f"Writes {what}.")
        one.add_argument("checkpoint", help="a .ckpt file, a run's folder, or `best` or `last`")
        one.add_argument("target", metavar=target, type=Path, help="what to write")
        one.add_argument("--force", action="store_true", help="replace what is there")
        one.add_argument("--runs", default="runs", help="where `best` and `last` are looked for")
        if name == "gguf":
            one.add_argument("--precision", choices=("f32", "f16", "q8_0"), default="f32", help="of the matrices")
        if name == "hf":
            one.add_argument(
                "--licence", default="unknown", help="of the weights, for the model card: mit, cc0-1.0, ..."
            )
    options = parser.parse_args(args)
    source = checkpoints.find(options.checkpoint, options.runs, "best")
    if options.format == "hf":
        with whole_folder(options.target, options.force, hf.FILES.__contains__) as folder:
            hf.write(Model.read(source), folder, options.licence)
    else:
        with whole_file(options.target, options.force) as file:
            model = Model.read(source)
            if options.format == "gguf":
                gguf_file.write(model, file, options.precision)
            elif options.format == "onnx":
                onnx_file.write(model, file)
            else:
                pt2.write(model, file)
    print(f"Wrote {options.target}")


def import_(args: Sequence[str]) -> None:
    """Runs `lmlight import`.

    Raises:
        UserError: the folder holds no such model; the checkpoint is there, or cannot be written.
    """
    parser = Parser("lmlight import", description="Makes a checkpoint of a model from elsewhere.")
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    what = "a small Llama-shaped folder of Hugging Face's, with a SentencePiece tokenizer"
    one = formats.add_parser("hf", help=what, description=f"Reads {what}.")
    one.add_argument("source", metavar="DIR", type=Path, help="what to read")
    one.add_argument("checkpoint", type=Path, help="the .ckpt file to write")
    one.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args(args)
    with whole_file(options.checkpoint, options.force) as file:
        model, notes = hf_import.read(options.source)
        checkpoints.write(model.content(), file)
    for note in notes:
        print(f"Note: {note}")
    print(f"Wrote {options.checkpoint}: {model.net.num_parameters:,} weights.")
    print(f"Finetune with `lmlight fit --init_from {options.checkpoint}`")
