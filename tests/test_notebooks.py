"""The notebooks run from top to bottom, and are stored without outputs."""

import ast
import importlib
import json
import os
import pkgutil
from pathlib import Path

import pytest

import lmlight

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path, kind="code"):
    """Cells of one kind, each with its source as one text."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def exported():
    """The public name of every class and function that a module of the package defines."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(lmlight.__path__, "lmlight.")
        if not found.name.endswith("__main__")
    ]
    defined = {name for module in modules for name, value in vars(module).items() if _home(value) == module.__name__}
    assert {"Transformer", "attention_weights", "LanguageModel"} <= defined
    return {name for name in defined if not name.startswith("_")}


def _home(value):
    return getattr(value, "__module__", None)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """One cache for all notebooks, so that the corpus is fetched once."""
    return tmp_path_factory.mktemp("notebooks") / "cache"


def test_series_is_complete():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07"]


@each_notebook
def test_has_no_outputs_and_no_metadata(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells_of(path))


@each_notebook
def test_installs_first(path):
    first, *others = cells_of(path)
    assert 'find_spec("lmlight") is None' in first["source"] and "%pip install" in first["source"]
    assert not any("%pip" in cell["source"] for cell in others)


@each_notebook
def test_bounds_spinning_before_torch_is_imported(path):
    lines = "".join(cell["source"] + "\n" for cell in cells_of(path)[1:]).splitlines()
    imports = [
        number for number, line in enumerate(lines) if line.startswith(("import", "from")) and line != "import os"
    ]
    assert any("GOMP_SPINCOUNT" in line for line in lines[: imports[0]])


@each_notebook
def test_does_not_redefine_the_package(path, exported):
    nodes = [node for cell in cells_of(path)[1:] for node in ast.parse(cell["source"]).body]
    defined = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert not defined & exported - {"encode", "decode"}  # defined with a dictionary, for teaching


@each_notebook
def test_links_point_to_existing_files(path):
    text = "\n".join(cell["source"] for cell in cells_of(path, "markdown"))
    targets = {part.split(")")[0] for part in text.split("](")[1:]}
    assert all(target.startswith("https://") or (path.parent / target).exists() for target in targets)


@pytest.mark.notebooks
@pytest.mark.timeout(600)
@each_notebook
def test_runs(path, shared_cache, tmp_path, monkeypatch):
    """Runs every cell with shorter training on the real text, which is downloaded.

    For the documentation (docs/build.py): leaves the executed copies in $LMLIGHT_NOTEBOOKS_EXECUTED, if that is set, and
    trains as long as a reader would where LMLIGHT_NOTEBOOKS_FULL is.
    """
    # nbclient rather than its pytest plugin nbmake, so that the test sets folder, cache and environment
    import nbclient
    import nbformat

    monkeypatch.setenv("LMLIGHT_CACHE", str(shared_cache))
    full = "LMLIGHT_NOTEBOOKS_FULL" in os.environ
    if not full:
        monkeypatch.setenv("LMLIGHT_NOTEBOOKS_FAST", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nobody's own profile
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    here = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", resources=here).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    if folder := os.environ.get("LMLIGHT_NOTEBOOKS_EXECUTED"):
        notebook.metadata["shortened"] = not full
        executed = path.parents[1] / folder
        executed.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, executed / path.name)
    assert any("image/png" in output.get("data", {}) for output in outputs)
