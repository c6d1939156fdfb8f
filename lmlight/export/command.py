"""`lmlight export FORMAT CHECKPOINT TARGET` and `lmlight import hf DIR CHECKPOINT`."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from lmlight import checkpoint as checkpoints
from lmlight import files
from lmlight.command_line import Parser, join, program
from lmlight.errors import UserError, reason
from lmlight.export import gguf_file, graph, hf, hf_import, web
from lmlight.export.model import Model


class Format(NamedTuple):
    """An export format."""

    target: str
    description: str
    write: Callable[..., None]  # takes the model, the path and the format's options
    files: Collection[str] | None = None  # patterns of the files of a folder


FORMATS = {
    "gguf": Format("FILE", "a .gguf file for llama.cpp, Ollama and LM Studio", gguf_file.write),
    "hf": Format("DIR", "a folder for Hugging Face transformers (safetensors)", hf.write, hf.FILES),
    "onnx": Format("FILE", "an .onnx file for onnxruntime: forward pass and cached step", graph.write_onnx),
    "torch": Format("FILE", "a .pt2 file for torch without lmlight (torch.export)", graph.write_torch),
    "web": Format("DIR", "a folder with a web page that runs the model, for any web server", web.write, web.FILES),
}


def export(args: Sequence[str]) -> None:
    """Runs `lmlight export`."""
    parser = Parser("lmlight export", description="Convert a trained model for another engine.")
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, (target, description, *_) in FORMATS.items():
        subparser = formats.add_parser(name, help=description, description=f"Write {description}.")
        subparser.add_argument("checkpoint", help="a .ckpt file, a run's folder, or `best` or `last`")
        subparser.add_argument("target", metavar=target, type=Path, help="the path to write")
        subparser.add_argument("--force", action="store_true", help="replace an existing target")
        subparser.add_checkpoint_flags()
        if name == "gguf":
            help_ = "precision of the matrices"
            subparser.add_argument("--precision", choices=("f32", "f16", "q8_0"), default="f32", help=help_)
        if name == "hf":
            help_ = "license of the weights, such as mit or cc0-1.0"
            subparser.add_argument("--license", default="unknown", help=help_)
    options = parser.parse_args(args)
    source, chosen = checkpoints.find(options.checkpoint, options.runs, "best"), FORMATS[options.format]
    if options.force and options.target.expanduser().resolve() == source.resolve():
        raise UserError(f"'{options.target}' is the checkpoint itself: pass another path")
    with _new(options.target, options.force, chosen.files) as path:
        trusted, _ = checkpoints.import_classes(options.net, options.tokenizer)
        own = {name: value for name, value in vars(options).items() if name in ("precision", "license")}
        chosen.write(Model.read(source, trusted), path, **own)
    print(f"Wrote {options.target} from {files.shown(source)}")


def import_(args: Sequence[str]) -> None:
    """Runs `lmlight import`."""
    parser = Parser("lmlight import", description="Convert a model to a checkpoint.")
    parser.add_argument("format", choices=["hf"], help="Hugging Face: GPT-2, Llama, Mistral and Qwen models")
    parser.add_argument("source", metavar="DIR", type=Path, help="the folder to read")
    parser.add_argument("checkpoint", type=Path, help="the .ckpt file to write")
    parser.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    options = parser.parse_args(args)
    with _new(options.checkpoint, options.force) as path:
        model, notes = hf_import.read(options.source)
        checkpoints.write(model.to_checkpoint(), path)
    for note in notes:
        print(f"Note: {note}")
    print(f"Wrote {options.checkpoint}: {model.net.num_parameters:,} parameters.")
    optimizer = "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=5e-5"  # as in configs/finetune.yaml
    sizes = "--trainer.max_steps=60", f"--data.block_size={min(256, model.net.block_size)}", "--data.batch_size=8"
    flags = f"--init_from={options.checkpoint}", "--data.corpus=my.txt", *optimizer, *sizes
    print(f"Finetune: {program()} {join(['fit', *flags])}")


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")


@contextmanager
def _new(path: Path, force: bool, known: Collection[str] | None = None) -> Iterator[Path]:
    """Yields a temporary path, which becomes `path` when the block ends without an exception.

    If `known` is given, `path` is a folder, which is never replaced if it holds a file of any other name.
    """
    path = path.expanduser().resolve()
    try:
        if path.exists() and path.is_dir() == (known is None):
            raise UserError(f"'{path}' is a {'folder' if path.is_dir() else 'file'}: pass another path")
        if known is not None and path in (Path.cwd(), *Path.cwd().parents):
            raise UserError(f"'{path}' is the current folder or contains it: pass a new folder")
        inside = {entry.relative_to(path).as_posix() for entry in path.rglob("*")} if path.is_dir() else set()
        folders = {
            pattern.rpartition("/")[0] for pattern in known or () if (path / pattern.rpartition("/")[0]).is_dir()
        }
        patterns = [*(known or ()), *folders]
        if unknown := [name for name in inside if not any(_matches(name, pattern) for pattern in patterns)]:
            raise UserError(
                f"folder '{path}' contains '{min(unknown)}', which is not part of an export: pass another folder"
            )
        if not force and (inside or (path.exists() and not known)):
            raise UserError(f"'{path}' already exists: pass another path, or --force to replace it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with (files.whole if known is None else files.whole_folder)(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written ({reason(error)}): pass another path, or free some space"
        ) from None
