"""docs/reference.md lists the complete public interface."""

import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import lmlight
from lmlight.command_line import COMMANDS
from lmlight.training.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"


def listed(section):
    """Names in the table of a section."""
    text = PAGE.read_text("utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def assert_same(patterns, names):
    assert [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)] == []


def test_python_names_and_commands():
    assert sorted(listed("Python")) == lmlight.__all__
    assert sorted(listed("Commands")) == sorted(COMMANDS)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot read TOML")
def test_extras():
    import tomllib

    project = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert sorted(listed("Optional dependencies")) == sorted(project["optional-dependencies"])


def test_run_folder_and_logged_metrics(corpus_file, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--data.tokenizer.vocab_size=400", "--data.batch_size=4", "--trainer.max_steps=2"]
    flags += ["--trainer.val_check_interval=1", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu"]
    assert main(["fit", f"--data.corpus={corpus_file}", *flags]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    files = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]
    assert_same(listed("A run's folder"), files)
    tags = EventAccumulator(str(run)).Reload().Tags()["scalars"]
    assert_same(listed("Logged metrics"), [tag for tag in tags if not tag.startswith("hp/")])
