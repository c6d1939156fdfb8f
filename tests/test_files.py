"""Files and folders are written atomically. Kills while writing checkpoints are in test_reliability.py."""

import errno
import ntpath
import os
import shutil
import stat
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import processes
import pytest

from lmlight import files


def test_file_replaces_the_previous_one(tmp_path):
    path = tmp_path / "x"
    for content in ("one", "two"):
        with files.whole(path) as beside:
            beside.write_text(content)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == content
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("shared", [False, True])
def test_failed_write_keeps_the_previous_file(tmp_path, shared):
    (tmp_path / "x").write_text("before")
    with pytest.raises(UnicodeEncodeError), files.whole(tmp_path / "x", shared) as beside:
        beside.write_text("half of it \ud800")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "before"


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_first_of_concurrent_writers_wins(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    path = tmp_path / "x"
    with files.whole(path, shared=True) as one, files.whole(path, shared=True) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "two", "the inner block ended first"
    assert os.listdir(tmp_path) == ["x"]


def test_folder_replaces_the_previous_one(tmp_path):
    path = tmp_path / "x"
    for content in ("one", "two"):
        with files.whole_folder(path) as beside:
            (beside / content).touch()
        assert os.listdir(path) == [content]
    with pytest.raises(KeyboardInterrupt), files.whole_folder(path):
        raise KeyboardInterrupt
    assert os.listdir(path) == ["two"]
    assert os.listdir(tmp_path) == ["x"]


def test_replacing_waits_until_a_file_is_closed(tmp_path, monkeypatch):
    """Windows lets no file be replaced that another process has open."""
    replace, attempts = Path.replace, []

    def busy(self, target):
        attempts.append(target)
        if len(attempts) <= still_open:
            raise PermissionError(errno.EACCES, "used by another process")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    (tmp_path / "x").write_text("before")
    for still_open, content in ((100, "before"), (2, "after")):  # noqa: B007  (read by `busy`)
        attempts.clear()
        with suppress(PermissionError), files.whole(tmp_path / "x") as beside:
            beside.write_text("after")
        assert (tmp_path / "x").read_text() == content and os.listdir(tmp_path) == ["x"]
        assert 1 < len(attempts) < 10


def test_old_folder_returns_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    def fails(source, target):
        if source.name == ".x.part":
            raise PermissionError(errno.EACCES, "used by another process")
        source.replace(target)

    with files.whole_folder(tmp_path / "x") as beside:
        (beside / "old").touch()
    monkeypatch.setattr(files, "_move", fails)
    with pytest.raises(PermissionError), files.whole_folder(tmp_path / "x") as beside:
        (beside / "new").touch()
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["old"]


def test_path_on_another_drive_is_shown_as_it_is(tmp_path, monkeypatch):
    assert files.shown(tmp_path / "a b") == "a b"
    monkeypatch.setattr(os.path, "relpath", lambda path: ntpath.relpath(path, "C:\\here"))
    assert files.shown("C:\\here\\a b") == "a b"
    assert files.shown("D:\\a b") == "D:\\a b"


# Replaces a folder in a process that kills itself before its n-th file system operation.
REPLACE = """
import os, signal
from pathlib import Path
from lmlight import files

left = {steps}
def counted(function):
    def call(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*arguments, **options)
    return call

os.fsync, os.rmdir = counted(os.fsync), counted(os.rmdir)
Path.replace, Path.mkdir = counted(Path.replace), counted(Path.mkdir)
with files.whole_folder(Path("x")) as beside:
    for name in "ab":
        (beside / name).write_text("new")
print("done", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kills processes")
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one(tmp_path):
    """Between the two renames, the old one is whole under its hidden name."""
    path, before, found = tmp_path / "x", tmp_path / ".x.before", []
    for steps in range(100):
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)
        path.mkdir()
        for name in "ab":
            (path / name).write_text("old")
        out, _ = processes.run(code=REPLACE.format(steps=steps), status=-9)
        whole = path if path.exists() else before
        found.append({name: (whole / name).read_text() for name in os.listdir(whole)})
        assert found[-1] in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
        if out:
            break
    assert found[0]["a"] == "old" and found[-1]["a"] == "new" and len(found) > 6
    assert os.listdir(tmp_path) == ["x"], "the last write deletes temporary files"


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be flushed")
@pytest.mark.parametrize(("code", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_drive_that_cannot_flush_folders_is_written(tmp_path, monkeypatch, code, fails):
    fsync = os.fsync

    def fsync_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_files)
    with (
        pytest.raises(OSError, match=os.strerror(code)) if fails else nullcontext(),
        files.whole(tmp_path / "x") as beside,
    ):
        beside.write_text("new")
    assert (tmp_path / "x").read_text() == "new"


def test_a_folder_s_files_are_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (calls.append(os.fstat(descriptor).st_ino), fsync(descriptor))[1]
    )
    monkeypatch.setattr(Path, "replace", lambda self, target: (calls.append("rename"), rename(self, target))[1])
    with files.whole_folder(tmp_path / "x") as beside:
        (beside / "a").touch()
        (beside / "inside").mkdir()
        (beside / "inside" / "b").touch()
        inodes = {path.stat().st_ino for path in (beside, *beside.rglob("*"))}
    at = calls.index("rename")
    if os.name != "posix":
        inodes = {path.stat().st_ino for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert set(calls[:at]) == inodes
    assert calls[at + 1 :] == [tmp_path.stat().st_ino] * (os.name == "posix")
