"""`lmlight export FORMAT CHECKPOINT TARGET` and `lmlight import hf DIR CHECKPOINT`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lmlight import checkpoint as checkpoints
from lmlight import files
from lmlight.command_line import Parser
from lmlight.errors import UserError
from lmlight.export import gguf_file, graph, hf, hf_import, web
from lmlight.export.model import Model

FORMATS = {
    "gguf": ("FILE", "a .gguf file for llama.cpp, Ollama and LM Studio"),
    "hf": ("DIR", "a folder for Hugging Face transformers (safetensors)"),
    "onnx": ("FILE", "an .onnx file for onnxruntime: forward pass and cached step"),
    "torch": ("FILE", "a .pt2 file for torch without lmlight (torch.export)"),
    "web": ("DIR", "a folder with a web page that runs the model, for any web server"),
}


def export(args: Sequence[str]) -> None:
    """Runs `lmlight export`.

    Raises:
        UserError: there is no such checkpoint; the format cannot hold the model; the target cannot be written.
    """
    parser = Parser("lmlight export", description="Convert a trained model for another engine.")
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, (target, description) in FORMATS.items():
        subparser = formats.add_parser(name, help=description, description=f"Write {description}.")
        subparser.add_argument("checkpoint", help="a .ckpt file, a run's folder, or `best` or `last`")
        subparser.add_argument("target", metavar=target, type=Path, help="the path to write")
        subparser.add_argument("--force", action="store_true", help="replace an existing target")
        checkpoints.add_arguments(subparser)
        if name == "gguf":
            precisions = ("f32", "f16", "q8_0")
            subparser.add_argument("--precision", choices=precisions, default="f32", help="precision of the matrices")
        if name == "hf":
            subparser.add_argument(
                "--licence", default="unknown", help="licence of the weights, such as mit or cc0-1.0"
            )
    options = parser.parse_args(args)
    source = checkpoints.find(options.checkpoint, options.runs, "best")
    known = {"hf": hf.FILES, "web": web.FILES}.get(options.format)
    with _new(options.target, options.force, known) as path:
        trusted, _ = checkpoints.import_classes(options.net, options.tokenizer)
        model = Model.read(source, trusted)
        if options.format == "hf":
            hf.write(model, path, options.licence)
        elif options.format == "gguf":
            gguf_file.write(model, path, options.precision)
        elif options.format == "onnx":
            graph.write_onnx(model, path)
        elif options.format == "web":
            web.write(model, path)
        else:
            graph.write_torch(model, path)
    print(f"Wrote {options.target}")


def import_(args: Sequence[str]) -> None:
    """Runs `lmlight import`.

    Raises:
        UserError: the model cannot be imported; the checkpoint cannot be written.
    """
    parser = Parser("lmlight import", description="Convert a model to a checkpoint.")
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    description = "a Hugging Face folder with a GPT-2, Llama, Mistral or Qwen model"
    subparser = formats.add_parser("hf", help=description, description=f"Read {description}.")
    subparser.add_argument("source", metavar="DIR", type=Path, help="the folder to read")
    subparser.add_argument("checkpoint", type=Path, help="the .ckpt file to write")
    subparser.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    options = parser.parse_args(args)
    with _new(options.checkpoint, options.force) as path:
        model, notes = hf_import.read(options.source)
        checkpoints.write(model.to_checkpoint(), path)
    for note in notes:
        print(f"Note: {note}")
    print(f"Wrote {options.checkpoint}: {model.net.num_parameters:,} parameters.")
    print(f"Finetune: lmlight fit --init_from {options.checkpoint} --config configs/finetune.yaml --data.corpus my.txt")


@contextmanager
def _new(path: Path, force: bool, known: Collection[str] | None = None) -> Iterator[Path]:
    """Yields a temporary path, which becomes `path` when the block ends without an exception.

    Args:
        path: A file, or a folder if there are names of its files.
        force: Replace what is there.
        known: The files that a folder with an earlier export has.

    Raises:
        UserError: `path` may not be replaced, or cannot be written.
    """
    path, is_folder = path.expanduser().resolve(), known is not None
    try:
        if path.exists() and path.is_dir() != is_folder:
            found, expected = ("file", "folder") if is_folder else ("folder", "file")
            raise UserError(f"'{path}' is a {found}: pass the path of a {expected}")
        inside = sorted(entry.name for entry in path.iterdir()) if is_folder and path.exists() else []
        if unknown := [name for name in inside if name not in (known or ())]:
            raise UserError(
                f"folder '{path}' contains '{unknown[0]}', which is not part of an export: pass another folder"
            )
        if not force and (inside if is_folder else path.exists()):
            raise UserError(f"'{path}' already exists: pass another path, or --force to replace it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with (files.whole_folder if is_folder else files.whole)(path) as temporary:
            yield temporary
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"'{path}' cannot be written ({reason}): pass another path, or free some space") from None
