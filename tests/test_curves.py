"""A run's table, and `lmlight curves`."""

import pytest

from lmlight import curves
from lmlight.__main__ import main

ROWS = [{"step": 1.0, "val/nats_per_char": 2.5}, {"step": 2.0, "val/nats_per_char": 2.0, "gap/nats_per_char": 0.5}]


def test_a_table_is_read_as_it_was_written(tmp_path):
    curves.write(ROWS, tmp_path)
    first, second = curves.read(tmp_path)
    assert first == {**ROWS[0], "gap/nats_per_char": None}
    assert second == ROWS[1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_curves_draws_runs_in_one_picture(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        curves.write(ROWS, tmp_path / name)
    assert main(["curves", "one", "two", "--output=both.png"]) == 0
    out = capsys.readouterr().out
    assert "one: best 2.0000 nats per character, 2 validations" in out
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


UNUSABLE = {  # what the folder of runs may also hold, and why it is left out
    "bare": (None, "No such file"),
    "words": ("step\nx\n", "not a table of numbers"),
    "early": ("step,val/nats_per_char\n1,\n", "holds no validation"),
    "diverged": ("step,val/nats_per_char\n1,nan\n", "no validation with a finite score"),
    "endless": ("step,val/nats_per_char\n" + "1" * 200_000, "not a table of numbers"),
    "ragged": ("step,val/nats_per_char\n1,2,3\n", "not a table of numbers"),
}


def runs_of(folder):
    """Two runs, and what is none."""
    for name in ("one", "two", *UNUSABLE):
        (folder / name).mkdir()
        if name not in UNUSABLE:
            curves.write(ROWS, folder / name)
        elif UNUSABLE[name][0] is not None:
            (folder / name / "metrics.csv").write_text(UNUSABLE[name][0])
    (folder / "notes.txt").write_text("seed 3 was the best\n")


def test_entries_that_are_not_usable_runs_are_left_out(tmp_path, capsys):
    runs_of(tmp_path)
    assert main(["curves", *sorted(path.name for path in tmp_path.iterdir()), "--output=all.png"]) == 0
    out, err = capsys.readouterr()
    assert [line.partition(":")[0] for line in out.splitlines()] == ["one", "two", "Picture"]
    lines = {line.split("'")[1].split("/")[0]: line for line in err.splitlines()}
    assert lines.keys() == {*UNUSABLE, "notes.txt"}
    assert len(lines) == len(err.splitlines())
    for name, (_, says) in UNUSABLE.items():
        assert lines[name].startswith("lmlight: left out: ") and says in lines[name]


def test_nothing_usable_is_one_error(tmp_path, capsys):
    runs_of(tmp_path)
    assert main(["curves", "bare", "words", "notes.txt"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("lmlight: error: 'bare/metrics.csv' cannot be read")
    assert "(2 more cannot be drawn either)" in err
    assert main(["curves", "one", "--x=characters"]) == 2
    assert "has no validation with a finite score and characters" in capsys.readouterr().err


def test_runs_of_one_name_in_different_folders_are_told_apart(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder / "run").mkdir(parents=True)
        curves.write(ROWS, tmp_path / folder / "run")
    assert main(["curves", "a/run", "b/run"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["a/run", "b/run", "Picture"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "'nowhere' cannot be read (No such file or directory): pass the folders of runs"),
        (["empty"], "metrics.csv' cannot be read"),
        (["words"], "not a table of numbers"),
        (["early"], "holds no validation"),
        (["good", "--output=nowhere/picture.png"], "cannot be written (No such file or directory)"),
        (["good", "--output=picture.doc"], "is not supported"),
    ],
)
def test_a_mistake_is_one_line(arguments, says, tmp_path, capsys):
    for name, table in {
        "empty": None,
        "words": "step\nx\n",
        "early": "step\n",
        "good": "step,val/nats_per_char\n1,2\n",
    }.items():
        (tmp_path / name).mkdir()
        if table is not None:
            (tmp_path / name / "metrics.csv").write_text(table)
    assert main(["curves", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
