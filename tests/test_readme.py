"""Documentation: commands and Python blocks run, links are valid, and tables are complete.

The commands of README.md and the tutorial run in order, on small texts and with flags that shorten them. The commands of
other pages are parsed with every flag and value.
"""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lmlight.__main__ import main
from lmlight.command_line import COMMANDS, TRAINING
from lmlight.sweep.trial import METRIC
from lmlight.training.cli import TRAINER_DEFAULTS

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = [ROOT / "README.md", ROOT / "docs" / "tutorial.md"]
EXTENDING = ROOT / "docs" / "extending.md"  # run by test_extending.py
OTHER = [page for page in PAGES if page not in (*RUN, EXTENDING)]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(lmlight (?:fit|validate|test|predict) [^`…]+)`")

SHORT = {
    "fit": [
        "--data.tokenizer.vocab_size=400",
        "--data.batch_size=4",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
    ],
    "predict": ["--model.sampling.max_new_tokens=4", "--trainer.accelerator=cpu"],
    "test": ["--trainer.limit_test_batches=1", "--trainer.accelerator=cpu"],
    "validate": ["--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"],
}

PYTEST = "pytest -n 2 --dist loadscope"
OTHERS = ("python3 -m venv .venv", "source .venv/bin/activate", "mkdocs serve", "tensorboard --logdir runs", PYTEST)

pytestmark = pytest.mark.filterwarnings("ignore")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    return [text for found, text in BLOCK.findall(page.read_text("utf-8")) if found == language]


def commands(page):
    """The words of each command in the shell blocks of a page. Commands are split at `&&`; quotes may span lines."""
    for block in blocks(page, "sh"):
        typed = ""
        for line in block.replace("\\\n", " ").split("\n"):
            typed += line + "\n"
            try:
                words = shlex.split(typed, comments=True)
            except ValueError:
                continue
            typed = ""
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            if words:
                yield words
        assert not typed, "unclosed quote"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, corpus_text):
    """The folder of a clone, with texts and a finished run."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copyfile(ROOT / "README.md", folder / "README.md")
    for name in ("configs", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("my.txt", "more.txt", "prompts.txt"):
        (folder / name).write_bytes(corpus_text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LMLIGHT_CACHE", str(folder / "cache"))
        assert main(["fit", "--data.corpus=my.txt", *SHORT["fit"]]) == 0
    return folder


@pytest.fixture
def _in_workshop(workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("LMLIGHT_CACHE", str(workshop / "cache"))


def status_of(arguments):
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def lmlight(arguments, monkeypatch):
    """Runs a shortened command and returns its exit status."""
    command, *rest = arguments
    if command == "chat":
        monkeypatch.setattr("sys.stdin", io.StringIO("/max_new_tokens 4\nMIRA:\n/quit\n"))
        return main(arguments)
    if command == "cache":
        return main(arguments)
    if command in ("export", "import", "play"):
        print(f"{command} needs an extra: see test_hf.py, test_hf_import.py and test_web.py")
        return 0
    if command == "sweep":
        result = {METRIC: 1.5, "seconds": 1.0, "parameters": 1, "characters": 9.0}
        monkeypatch.setattr("lmlight.sweep.worker.run_fit", lambda *_: result)
        return main(arguments)
    if command == "curves":
        return main(["curves", *(path for word in rest for path in expanded(word))])
    more = list(SHORT[command])
    if command == "fit" and "--ckpt_path" in rest:
        more.append("--trainer.max_steps=3")  # more steps than the run has
    elif command == "fit" and "--data.corpus" not in rest:
        more.append("--data.corpus=my.txt")
    return status_of([*arguments, *more])


def expanded(word):
    """Expands a pattern as a shell does."""
    return [str(path) for path in sorted(Path().glob(word))] or [word]


def check_pip(arguments):
    """An install command names this checkout and existing extras."""
    command, *flags, what = arguments
    assert command == "install"
    assert {*flags} <= {"-q", "-e"}
    extra = re.fullmatch(r"\.(?:\[(\w+)\])?", what)[1]
    if extra and sys.version_info >= (3, 11):
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]


@pytest.mark.usefixtures("_in_workshop")
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_commands_run_as_typed(page, monkeypatch, capsys):
    ran = 0
    for words in commands(page):
        name, arguments = Path(words[0]).name, words[1:]
        if name == "lmlight":
            assert lmlight(arguments, monkeypatch) == 0, (shlex.join(words), capsys.readouterr().err)
            assert capsys.readouterr().out, shlex.join(words)
            ran += 1
        elif name == "pip":
            check_pip(arguments)
        elif name == "python3" and arguments[0] == "-c":  # writes a text
            subprocess.run([sys.executable, *arguments], check=True, timeout=60)
            text = Path("my.txt").read_text("utf-8")
            assert len(text) > 300_000
            Path("my.txt").write_text(text[:20_000], "utf-8")
        elif name == "cat":  # writes another
            assert arguments[-2:] == [">", "more.txt"]
            texts = [Path(path).read_text("utf-8") for word in arguments[:-2] for path in expanded(word)]
            assert len(texts) >= 10
            Path("more.txt").write_text("".join(texts)[:20_000], "utf-8")
        else:  # run by CI or by other tests
            assert shlex.join([name, *arguments]) in OTHERS
    assert ran >= 5


@pytest.mark.usefixtures("_in_workshop")
@pytest.mark.parametrize("page", OTHER, ids=name_of)
def test_commands_parse(page, capsys):
    typed = [*commands(page), *map(shlex.split, INLINE.findall(page.read_text("utf-8")))]
    newest = max(Path("runs").iterdir())
    for typed_words in typed:
        words = [re.sub(r"runs/20\d\d-[\d_-]+|(smollm2|model)\.ckpt", str(newest), word) for word in typed_words]
        if "lmlight" not in words or COMMANDS[words[words.index("lmlight") + 1]][1] != TRAINING:
            continue
        arguments = words[words.index("lmlight") + 1 :]  # after a pipe, torchrun or srun
        end = [at for at, word in enumerate(arguments) if word.startswith((">", "|", "$("))]
        arguments = arguments[: end[0]] if end else arguments
        if arguments[1:] != ["--help"]:
            assert status_of([*arguments, "--print_config"]) == 0, (shlex.join(words), capsys.readouterr().err)
            Path("mine.yaml").write_text(capsys.readouterr().out, "utf-8")  # a page uses this file
    for block in blocks(page, "yaml"):
        Path("block.yaml").write_text(block, "utf-8")
        assert status_of(["fit", "--config=block.yaml", "--print_config"]) == 0, capsys.readouterr().err


@pytest.mark.usefixtures("_in_workshop")
# what export.md and finetuning.md show needs extras, and is run by test_hf.py, test_graphs.py and test_finetuning.py
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if blocks(p, "python") and p.name not in ("export.md", "finetuning.md", "extending.md")],
    ids=name_of,
)
def test_python_runs_as_it_stands(page):
    newest = max(Path("runs").iterdir())
    for block in blocks(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(block.replace("runs/<run>", str(newest)).replace("max_steps=200", "max_steps=2"), {})
        assert printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_are_valid(page):
    text = BLOCK.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        assert target.startswith("https://") or (page.parent / path).exists(), target


def test_table_of_configs_is_complete():
    linked = re.findall(r"\[`([\w.-]+)`\]\(configs/([\w.-]+)\)", (ROOT / "README.md").read_text("utf-8"))
    assert all(name == target for name, target in linked)
    assert sorted(name for name, _ in linked) == sorted(path.name for path in (ROOT / "configs").iterdir())


def test_navigation_lists_every_page():
    def leaves(value):
        if isinstance(value, str):
            return [value]
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]

    navigation = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    made = ["index.md", "configs.md", *(f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb"))]
    assert sorted(navigation) == sorted([*made, *(name_of(page).removeprefix("docs/") for page in PAGES[1:])])


def test_command_line_page_lists_commands_and_defaults():
    text = (ROOT / "docs" / "command-line.md").read_text("utf-8")
    assert {*re.findall(r"^\| `lmlight (\w+)", text, re.MULTILINE)} == {*COMMANDS}
    defaults = re.findall(r"^\| `--trainer\.(\w+)` \| ([\d.]+|runs) \|", text, re.MULTILINE)
    assert len(defaults) == 5
    assert all(value == str(TRAINER_DEFAULTS[name]) for name, value in defaults)
