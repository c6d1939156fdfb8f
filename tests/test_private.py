"""lmlight uses private attributes only if they are listed, and the listed ones exist."""

import ast
import importlib
import inspect
import pkgutil

import torch

import lmlight.training

PRIVATE = {  # docs/design.md gives the reasons
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._should_check_val_fx",
    "lightning.pytorch.loggers.tensorboard.TensorBoardLogger._get_next_version",
    "torch.utils.tensorboard.writer.SummaryWriter._get_file_writer",
    "torch.optim.adamw.AdamW._step_supports_amp_scaling",
}
FOREIGN = ("lightning.", "jsonargparse.", "torch.")


def test_listed_private_attributes_exist():
    for name in PRIVATE:
        module, kind, attribute = name.rsplit(".", 2)
        kind = getattr(importlib.import_module(module), kind)
        if issubclass(kind, torch.optim.Optimizer):  # an attribute of fused ones
            kind = kind([torch.zeros(1)], fused=True)
        assert hasattr(kind, attribute), name


def modules():
    return [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(lmlight.training.__path__, "lmlight.training.")
    ]


def test_no_unlisted_private_attribute_is_used():
    listed = {name.rpartition(".")[2] for name in PRIVATE}
    for module in modules():
        found = {
            node.attr
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os"))
        }
        assert found <= listed, module.__name__


def test_no_unlisted_private_method_is_overridden_or_called():
    listed = {name.rpartition(".")[2] for name in PRIVATE}
    for module in modules():
        for kind in vars(module).values():
            if not isinstance(kind, type) or kind.__module__ != module.__name__:
                continue
            theirs = {
                name
                for base in kind.__mro__
                if base.__module__.startswith(FOREIGN)
                for name in vars(base)
                if name.startswith("_") and not name.startswith(("__", "_abc_"))
            }
            used = {
                node.attr
                for node in ast.walk(ast.parse(inspect.getsource(module)))
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            }
            assert theirs & (used | vars(kind).keys()) <= listed, kind
