"""Package structure: imports follow the layers, and light modules do not import heavy packages."""

import ast
import importlib
import importlib.util
import mmap
import os
import platform
import re
from pathlib import Path

import processes
import pytest
from importlinter import cli as importlinter

ROOT = Path(__file__).parents[1]


def test_imports_run_one_way(monkeypatch):
    """The layers are in pyproject.toml; see docs/design.md."""
    monkeypatch.chdir(ROOT)
    assert importlinter.lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None) == 0


@pytest.mark.parametrize(
    ("absent", "modules"),
    {
        "torch": [
            "",
            ".__main__",
            ".commands.cache",
            ".commands.curves",
            ".data.corpus",
            ".data.tokenizer",
            ".data.token_store",
            ".data.windows",
        ],
        "lightning safetensors google.protobuf": [".generation", ".checkpoint", ".commands.chat", ".export.command"],
    }.items(),
)
def test_light_modules_do_not_import_heavy_packages(absent, modules):
    code = """if True:
        import importlib, sys
        absent, *modules = sys.argv[1:]
        for module in modules:
            importlib.import_module("lmlight" + module)
            found = set(absent.split()) & sys.modules.keys()
            assert not found, (module, found)
        """
    processes.run_afresh(absent, *modules, code=code)


def test_design_page_lists_every_module():
    tree = (ROOT / "docs" / "design.md").read_text("utf-8").split("```")[1]
    paths = [path for path in (ROOT / "lmlight").rglob("*.py") if path.parent.name != "callbacks"]
    assert set(re.findall(r"\w+\.py", tree)) == {path.name for path in paths} - {"__init__.py"}


def test_benchmarks_import_existing_names():
    """Including imports inside functions, which no test runs."""
    for path in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lmlight":
                module = importlib.import_module(node.module)
                for name in node.names:
                    submodule = f"{node.module}.{name.name}"
                    is_package = hasattr(module, "__path__")
                    assert hasattr(module, name.name) or (is_package and importlib.util.find_spec(submodule)), (
                        f"{path.name}: {submodule}"
                    )


def test_no_catch_all_modules():
    names = {path.stem for path in (ROOT / "lmlight").rglob("*.py")}
    assert not names & {"utils", "common", "helpers", "misc"}


def test_command_line_limits_spinning_threads_and_importing_does_not():
    code = """if True:
        import os, sys
        import lmlight.__main__
        print("GOMP_SPINCOUNT" in os.environ, "torch" in sys.modules)
        import importlib
        importlib.import_module = lambda name: sys.exit(os.environ["GOMP_SPINCOUNT"])
        lmlight.__main__.main(sys.argv[1:])
        """
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for command, spin_count in (("fit", "1000"), ("predict", "10000")):
        out, err = processes.run_afresh(command, code=code, env=environment, status=1)
        assert (out.strip(), err.strip()) == ("False False", spin_count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_command_line_keeps_freed_memory_unless_the_user_decides():
    code = """if True:
        import resource, sys
        from lmlight.__main__ import keep_freed_memory
        if sys.argv[1] == "keep":
            keep_freed_memory()
        for _ in range(10):
            buffer = bytearray(2**25)  # written once, since it is filled with zeros
            buffer[::4096] = b"x" * len(buffer[::4096])
            del buffer
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        """
    pages = 2**25 // mmap.PAGESIZE
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    faults = {
        (mode, user): int(processes.run_afresh(mode, code=code, env={**environment, **user_settings})[0])
        for mode, user, user_settings in (
            ("keep", "", {}),
            ("leave", "", {}),
            ("keep", "sets a threshold", {"MALLOC_TRIM_THRESHOLD_": "131072"}),
        )
    }
    assert faults["keep", ""] < 3 * pages
    assert faults["leave", ""] > 9 * pages
    assert faults["keep", "sets a threshold"] > 9 * pages
