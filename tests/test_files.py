"""A file or a folder appears whole or not at all; a kill in between is in test_reliability.py."""

import os

import pytest

from lmlight import files


def test_a_file_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "x"
    for content in ("one", "two"):
        with files.whole(path) as beside:
            beside.write_text(content)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == content
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("shared", [False, True])
def test_what_fails_leaves_what_was_there(tmp_path, shared):
    (tmp_path / "x").write_text("before")
    with pytest.raises(UnicodeEncodeError), files.whole(tmp_path / "x", shared) as beside:
        beside.write_text("half of it \ud800")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "before"


@pytest.mark.parametrize("links", [True, False], ids=["links", "a disk without links"])
def test_of_those_that_write_one_file_the_first_wins(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    path = tmp_path / "x"
    with files.whole(path, shared=True) as one, files.whole(path, shared=True) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "two", "which was done first"
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "x"
    for content in ("one", "two"):
        with files.whole_folder(path) as beside:
            (beside / content).touch()
        assert os.listdir(path) == [content]
    with pytest.raises(KeyboardInterrupt), files.whole_folder(path):
        raise KeyboardInterrupt
    assert os.listdir(path) == ["two"]
    assert os.listdir(tmp_path) == ["x"]
