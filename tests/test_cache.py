"""`lmlight cache` lists cached data and deletes nothing else."""

import os

import processes
import pytest

from lmlight.__main__ import main
from lmlight.commands import cache
from lmlight.data.reading import TextChunk
from lmlight.data.token_writer import write_store
from lmlight.data.tokenizer import CharTokenizer


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """A cache with a corpus, a finished and an unfinished store, and files of the user."""
    folder = cache.cache_dir()
    write_store(
        folder / "tokens" / "abc",
        "print",
        {"train": [TextChunk("abc" * 1000)]},
        CharTokenizer("abc"),
        {"corpus": "my.txt", "vocab_size": 3},
    )
    (folder / "tokens" / "half").mkdir()
    (folder / "tokens" / "half" / "train.npy").write_bytes(b"0" * 10)
    (folder / "corpora").mkdir()
    (folder / "corpora" / "play.txt").write_bytes(b"x" * 2_345_678)
    (folder / "thesis.txt").write_text("years of work")
    (folder / "own").mkdir()
    return folder


def test_list_shows_names_sizes_and_sources(filled, capsys):
    assert main(["cache"]) == 0
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["2.3", "MB"] and "corpora/play.txt" in first
    assert "tokens/abc" in second and "my.txt, vocabulary of 3" in second
    assert "tokens/half" in third and "unfinished" in third
    assert last.split()[0] == "2.4" and str(filled) in last


def test_empty_or_missing_cache_is_listed(tmp_path, capsys):
    assert main(["cache"]) == 0
    assert main(["cache", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("0.0 MB  total") == 2


def test_clear_by_name_and_clear_all(filled, capsys):
    assert main(["cache", "--clear", "tokens/half"]) == 0
    assert cache.entries(filled).keys() == {"tokens/abc", "corpora/play.txt"}
    assert main(["cache", "--clear", "tokens/abc", "nothing"]) == 2
    assert "there is no cache entry 'nothing'" in capsys.readouterr().err
    assert len(cache.entries(filled)) == 2
    assert main(["cache", "--clear"]) == 0
    assert cache.entries(filled) == {}
    assert (filled / "thesis.txt").read_text() == "years of work"
    assert (filled / "own").is_dir()


def test_cache_command_does_not_import_torch(filled):
    code = (
        "import sys; sys.argv = ['lmlight', 'cache']; from lmlight.__main__ import main; main(); "
        "sys.exit('torch' in sys.modules)"
    )
    out, _ = processes.run_afresh(code=code)
    assert "tokens/abc" in out


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege")
def test_links_are_listed_and_cleared(filled, tmp_path, capsys):
    (tmp_path / "own").mkdir()
    (filled / "tokens" / "link").symlink_to(tmp_path / "own")
    (filled / "tokens" / "broken").symlink_to("nowhere")
    assert main(["cache"]) == 0
    assert main(["cache", "--clear", "tokens/link", "tokens/broken", "tokens/link"]) == 0
    assert "Deleted 2 of 5 entries" in capsys.readouterr().out
    assert (tmp_path / "own").is_dir() and not (filled / "tokens" / "broken").is_symlink()
