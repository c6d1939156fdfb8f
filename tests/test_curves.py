"""`lmlight curves`."""

import pytest

from lmlight.__main__ import main

TABLE = "step,val/nats_per_char,gap/nats_per_char\n1,2.5,\n2,2.0,0.5\n3,2.1,\n"
UNUSABLE = {  # contents of metrics.csv
    "bare": None,
    "words": "step\nx\n",
    "early": "step,val/nats_per_char\n1,\n",
    "diverged": "step,val/nats_per_char\n1,nan\n",
    "endless": "step,val/nats_per_char\n" + "1" * 200_000,
    "ragged": "step,val/nats_per_char\n1,2,3\n",
}


def add_run(folder, table=TABLE):
    folder.mkdir(parents=True)
    if table is not None:
        (folder / "metrics.csv").write_text(table)


@pytest.fixture
def runs(tmp_path):
    """Two runs, and entries that are not."""
    for name, table in {"one": TABLE, "two": TABLE, **UNUSABLE}.items():
        add_run(tmp_path / name, table)
    (tmp_path / "notes.txt").write_text("seed 3 was the best\n")
    return sorted(path.name for path in tmp_path.iterdir())


def test_unusable_entries_are_skipped(runs, tmp_path, capsys):
    assert main(["curves", *runs, "--output=all.png"]) == 0
    out, err = capsys.readouterr()
    assert "one: last 2.1000, best 2.0000 nats per character; 3 validations" in out
    assert [line.partition(":")[0] for line in out.splitlines()] == ["one", "two", "Figure"]
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.split("'")[1].split("/")[0]: line for line in err.splitlines()}
    assert lines.keys() == {*UNUSABLE, "notes.txt"}
    assert len(lines) == len(err.splitlines())
    for line in lines.values():
        assert line.startswith("lmlight: skipped: ") and line.endswith("has no metrics.csv with a finite loss and step")


@pytest.mark.parametrize("output", [".", "..", "", "/"])
def test_output_must_be_a_file(runs, capsys, output):
    assert main(["curves", "one", f"--output={output}"]) == 2
    assert "--output must be a file" in capsys.readouterr().err


def test_runs_are_named_by_their_paths(tmp_path, capsys):
    for folder in ("a", "b"):
        add_run(tmp_path / folder / "run")
    assert main(["curves", "a/run", "b/run"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["a/run", "b/run", "Figure"]


@pytest.mark.parametrize(("characters", "warns"), [(700, False), (800, True)])
def test_runs_scored_on_different_texts_warn(tmp_path, capsys, characters, warns):
    for name, count in (("one", 700), ("two", characters)):
        add_run(tmp_path / name, f"step,val/nats_per_char,val/characters\n1,2.5,{count}\n2,2.4,{count}\n")
    assert main(["curves", "one", "two"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("lmlight: warning: these runs are scored on different texts") if warns else not err


def test_patterns_are_expanded(runs, capsys):
    """The shell of Windows does not."""
    assert main(["curves", "[ot]*o", "one", "no*thing"]) == 0
    out, err = capsys.readouterr()
    assert [line.partition(":")[0] for line in out.splitlines()] == ["two", "one", "Figure"]
    assert err == "lmlight: skipped: 'no*thing' has no metrics.csv with a finite loss and step\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "none of these can be plotted: pass the folders of runs"),
        (["bare", "words", "notes.txt"], "none of these can be plotted"),
        (["one", "--x=characters"], "none of these can be plotted"),
        (["one", "--output=nowhere/figure.png"], "cannot be written (No such file or directory)"),
        (["one", "--output=figure.doc"], "is not supported"),
    ],
)
def test_error_is_one_line(runs, arguments, message, capsys):
    assert main(["curves", *arguments]) == 2
    out, err = capsys.readouterr()
    *skipped, error = err.splitlines()
    assert out == "" and all(line.startswith("lmlight: skipped: ") for line in skipped)
    assert error.startswith("lmlight: error: ") and message in error


def test_runs_with_unusual_names_and_a_figure_without_suffix(tmp_path, capsys, recwarn):
    for name in ("_run", "a$x^$b"):
        add_run(tmp_path / name, TABLE)
    assert main(["curves", "_run", "a$x^$b", "--output=figure"]) == 0
    assert capsys.readouterr().out.endswith("Figure: figure.png\n") and (tmp_path / "figure.png").exists()
    assert not [one for one in recwarn if "legend" in str(one.message)]


def test_rows_without_characters_do_not_warn(tmp_path, capsys):
    add_run(tmp_path / "one", "step,val/nats_per_char,val/characters\n1,2.5,\n2,2.4,\n3,2.3,700\n")
    assert main(["curves", "one"]) == 0
    assert not capsys.readouterr().err
