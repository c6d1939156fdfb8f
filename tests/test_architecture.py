"""The house keeps its order: imports run one way, and the light parts stay light."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter import cli as importlinter

ROOT = Path(__file__).parents[1]


def test_imports_run_one_way(monkeypatch):
    """The layers of pyproject.toml; see docs/design.md."""
    monkeypatch.chdir(ROOT)
    assert importlinter.lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None) == 0


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lmlight", "torch"),
        ("lmlight.cache", "torch"),
        ("lmlight.data.corpus", "torch"),
        ("lmlight.data.tokenizer", "torch"),
        ("lmlight.data.store", "torch"),
        ("lmlight.generation", "lightning"),
        ("lmlight.checkpoint", "lightning"),
        ("lmlight.interchange.command", "lightning"),
        ("lmlight.interchange.command", "safetensors"),
        ("lmlight.interchange.command", "google.protobuf"),
    ],
)
def test_light_parts_do_not_wait_for_heavy_ones(module, absent):
    code = f"import {module}, sys; sys.exit('{absent}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_module_is_a_drawer_for_odds_and_ends():
    names = {path.stem for path in (ROOT / "lmlight").rglob("*.py")}
    assert not names & {"utils", "common", "helpers", "misc"}


def test_threads_wait_without_spinning_for_long():
    code = "import lmlight, os; print(os.environ['GOMP_SPINCOUNT'])"
    import os

    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1000"
