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
