"""A text prepared by several jobs is the one that a single job prepares, and may be copied to wherever it is trained on."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lmlight.data import corpus as corpora
from lmlight.data import reading
from lmlight.data import token_store as stores
from lmlight.data.token_store import TokenStore
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.errors import UserError
from lmlight.training.cli import main
from lmlight.training.datamodule import TextDataModule

UNIGRAM = TokenizerConfig("unigram", 400)
FLAGS = ["--data.corpus=verse.txt", "--data.tokenizer.vocab_size=400", "--data.block_size=16"]

# A job of its own, with shards so small that a little text has several.
JOB = """
import sys
from lmlight.training.cli import main
from lmlight.data import reading, token_store
token_store.SHARD_CHARS, reading.CHUNK_SIZE, reading.MAX_LINE = 1000, 500, 200
sys.exit(main(["prepare", *sys.argv[1:]]))
"""


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(stores, "SHARD_CHARS", 1000)
    monkeypatch.setattr(reading, "CHUNK_SIZE", 500)
    monkeypatch.setattr(reading, "MAX_LINE", 200)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def data_of(corpus, **settings):
    return TextDataModule(
        str(corpus), **{"tokenizer": UNIGRAM, "block_size": 16, "batch_size": 8, "seed": 0} | settings
    )


def batches(data):
    """All that training and validation see of a text."""
    data.prepare_data()
    data.setup("fit")
    return [
        [tensor.tolist() for tensor in batch]
        for loader in (data.train_dataloader(), data.val_dataloader())
        for batch in loader
    ]


# Several jobs


def test_jobs_that_run_at_once_write_the_store_of_one(verse_file, small_shards, tmp_path):
    whole = data_of("verse.txt", cache=str(tmp_path / "alone")).prepare()
    assert len(whole.ids["train"].parts) > 3
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, *FLAGS, f"--part={part}/2", "--data.cache=together"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in range(2)
    ]
    said = [job.communicate(timeout=100)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert any("Prepared: " in one for one in said)
    assert contents(tmp_path / "together" / "tokens" / whole.folder.name) == contents(whole.folder)


def test_a_part_is_each_nth_shard_and_the_last_one_completes_the_store(verse_file, small_shards):
    data = data_of("verse.txt")
    assert data.prepare((2, 3)) is None
    (folder,) = Path("cache/tokens").iterdir()
    assert not TokenStore.finished(folder)
    first = sorted(path.name for path in folder.glob("*.npy"))
    assert data.prepare((0, 3)) is None
    assert data.prepare((2, 3)) is None
    store = data.prepare((1, 3))
    names = [path.name for split in ("train", "val") for path in store.ids[split].parts]
    assert first == sorted(names[2::3])
    assert store.ids["train"][:].tolist() == store.tokenizer.encode(verse_file.read_text()[: store.chars["train"]])


def test_what_parts_have_left_undone_is_done_without_a_part(verse_file, small_shards, tmp_path):
    assert data_of("verse.txt").prepare((1, 2)) is None
    store = data_of("verse.txt").prepare()
    assert contents(store.folder) == contents(data_of("verse.txt", cache=str(tmp_path / "alone")).prepare().folder)


def test_a_mistake_in_one_part_deletes_nothing_of_the_others(verse, small_shards, tmp_path):
    """The character that training lacks is in the last shard; the job that meets it says so, and the others' shards stay."""
    Path("text.txt").write_text(verse + "\u00e9\n")
    data = data_of("text.txt", tokenizer=TokenizerConfig("char"))
    assert data.prepare((1, 2)) is None or pytest.fail("it has not met it")
    (folder,) = Path("cache/tokens").iterdir()
    before = contents(folder)
    with pytest.raises(UserError, match="not among the"):
        data.prepare((0, 2))
    assert before.items() <= contents(folder).items()


# From the command line


def test_prepare_is_what_fit_would_do(verse_file, capsys):
    assert main(["prepare", *FLAGS]) == 0
    said = capsys.readouterr().out
    (folder,) = Path("cache/tokens").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert f"Prepared: {folder}" in said
    data = data_of("verse.txt")
    data.prepare_data()
    assert list(Path("cache/tokens").iterdir()) == [folder]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not Path("runs").exists()


def test_prepare_reads_the_config_of_a_run_on_a_larger_machine(verse_file):
    config = {
        "seed_everything": 3,
        "trainer": {"accelerator": "gpu", "devices": 8, "max_steps": 7},
        "model": {"net": {"class_path": "Bigram"}},
        "data": {"corpus": "verse.txt", "tokenizer": {"vocab_size": 400}},
    }
    Path("run.yaml").write_text(json.dumps(config))
    assert main(["prepare", "--config=run.yaml"]) == 0
    (folder,) = Path("cache/tokens").iterdir()
    assert TokenStore(folder).tokenizer.vocab_size == 400


def test_ctrl_c_leaves_what_is_done_and_no_traceback(verse_file, small_shards, monkeypatch, capsys):
    save, saved = np.save, []

    def interrupted(file, ids):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(file, ids))

    monkeypatch.setattr(stores, "_cores", lambda: 1)
    monkeypatch.setattr(np, "save", interrupted)
    assert main(["prepare", *FLAGS]) == 130
    assert "Traceback" not in capsys.readouterr().err
    (folder,) = Path("cache/tokens").iterdir()
    assert sorted(contents(folder)) == ["tokenizer", "train-00000.npy", "train-00001.npy"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--part=3"], "--part must be such as 0/16"),
        (["--part=2/2"], "--part must be such as 0/16"),
        (["--to=verse.txt"], "is there already"),
        (["--to=verse.txt/below"], "cannot be written"),
        (["--format=litdata"], "pass --to FOLDER"),
        (["--format=parquet", "--to=x"], "format"),
        (["--data.corpus=nope.txt"], "no corpus at 'nope.txt'"),
        (["--init_from=nope.ckpt"], "no checkpoint at 'nope.ckpt'"),
    ],
)
def test_a_mistake_is_one_line(verse_file, flags, said, capsys):
    assert main(["prepare", *FLAGS, *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("lmlight: warning")]
    assert len(lines) == 1 and lines[0].startswith("lmlight: error: ") and said in lines[0]
    assert {path.name for path in Path().iterdir()} <= {"verse.txt", "cache"}


# A store in place of a text


@pytest.fixture
def copied(verse_file):
    """A copy of the store of `verse.txt`; the cache that it was made in is gone."""
    data_of("verse.txt").prepare().copy(Path("copy"))
    shutil.rmtree("cache")
    return Path("copy")


@pytest.fixture
def served(copied):
    """The same in object storage, as fsspec's memory has it."""
    memory = fsspec.filesystem("memory")
    memory.put(str(copied), "/lmlight-tests/copy", recursive=True)
    yield "memory://lmlight-tests/copy"
    if memory.exists("/lmlight-tests"):
        memory.rm("/lmlight-tests", recursive=True)


def test_a_copy_of_a_store_trains_as_the_text_does(copied, verse_file):
    there = TextDataModule("copy", block_size=16, batch_size=8, seed=0)
    assert batches(there) == batches(data_of("verse.txt"))
    assert there.tokenizer.vocab_size == 400


def test_a_store_elsewhere_is_copied_to_the_cache_once(served, copied):
    there = TextDataModule(served, block_size=16, batch_size=8, seed=0)
    first = batches(there)
    assert first == batches(TextDataModule("copy", block_size=16, batch_size=8, seed=0))
    (folder,) = Path("cache/downloads").iterdir()
    assert contents(folder) == contents(copied)
    fsspec.filesystem("memory").rm("/lmlight-tests", recursive=True)
    with pytest.warns(UserWarning, match="cannot be reached"):
        assert batches(TextDataModule(served, block_size=16, batch_size=8, seed=0)) == first


def test_fit_takes_a_store(copied, capsys):
    flags = ["--data.block_size=16", "--model.net=Bigram", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    assert main(["fit", "--data.corpus=copy", *flags]) == 0
    assert "nats per character" in capsys.readouterr().out


def garble(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (Path.unlink, "index.json", "not finished"),
        (Path.unlink, "train-00000.npy", "damaged"),
        (garble, "val-00000.npy", "damaged"),
        (garble, "index.json", "damaged"),
        (garble, "tokenizer", "damaged"),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_store_that_is_not_whole_is_one_line(copied, damage, name, said, elsewhere, capsys):
    damage(copied / name)
    memory = fsspec.filesystem("memory")
    memory.put("copy", "/lmlight-tests/damaged", recursive=True)
    try:
        assert main(["fit", f"--data.corpus={'memory://lmlight-tests/damaged' if elsewhere else 'copy'}"]) == 2
    finally:
        memory.rm("/lmlight-tests", recursive=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lmlight: error: the tokens in ") and said in line and "copy it again" in line
    assert not Path("runs").exists()


def test_a_store_of_another_version_is_refused(copied):
    index = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps({**index, "layout": index["layout"] - 1}))
    with pytest.raises(UserError, match="another version's"):
        TextDataModule("copy").prepare()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"val_fraction": 0.2}, "data.val_fraction 0.1, not 0.2"),
        ({"tokenizer": TokenizerConfig(vocab_size=500)}, "data.tokenizer.vocab_size 400, not 500"),
        ({"tokenizer": TokenizerConfig("bpe", 400)}, 'data.tokenizer.kind "unigram", not "bpe"'),
        ({"test_corpus": "other.txt"}, 'data.test_corpus null, not "other.txt"'),
        ({"separator": "<end>"}, 'data.separator null, not "<end>"'),
    ],
)
def test_flags_that_ask_for_other_tokens_are_refused(copied, settings, said):
    with pytest.raises(UserError, match=re.escape(said)):
        TextDataModule("copy", **settings).prepare()


def test_flags_that_the_store_was_made_with_may_stay(copied):
    assert TextDataModule("copy", tokenizer=UNIGRAM).prepare().tokenizer.vocab_size == 400


def test_another_tokenizer_than_a_checkpoints_is_refused(copied):
    data = TextDataModule("copy")
    data.tokenizer = TokenizerConfig("char").train("another text")
    with pytest.raises(UserError, match="than the checkpoint's"):
        data.prepare()


def test_a_folder_of_texts_that_has_an_index_of_its_own_is_text(verse):
    Path("texts").mkdir()
    Path("texts/a.txt").write_text(verse)
    Path("texts/index.json").write_text("{}")
    assert corpora.find_store("texts") is None
    assert data_of("texts").prepare().chars["train"] == int(0.9 * len(verse))


# What is deleted


def test_a_store_that_fails_deletes_only_what_it_has_made(verse, tmp_path):
    """Even in a folder of the user's own, which no setting leads to."""
    mine = tmp_path / "mine"
    (mine / "deeper").mkdir(parents=True)
    for name in ("notes.txt", "index.json.bak", "weights.npy", ".hidden", "tokenizer.model", "deeper/train-00000.npy"):
        (mine / name).write_text("mine")
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    tokenizer = TokenizerConfig("char").train("abc")
    with pytest.raises(UserError, match="not among the"):
        TokenStore.write(
            mine, "print", {"train": [reading.TextChunk("abcabc")], "val": [reading.TextChunk("d")]}, tokenizer
        )
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("cache", ["mine", "mine/tokens", "."])
def test_a_cache_among_other_files_loses_none_of_them(verse, cache, tmp_path):
    """Whatever `--data.cache` points at."""
    Path("text.txt").write_text(verse + "\u00e9\n")  # a character that the vocabulary of training lacks
    Path("mine/tokens/0123456789abcdef").mkdir(parents=True)
    for name in ("mine/notes.txt", "mine/tokens/notes.txt", "mine/tokens/0123456789abcdef/train-00000.npy"):
        Path(name).write_text("mine")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main(["fit", "--data.corpus=text.txt", "--data.tokenizer.kind=char", f"--data.cache={cache}"]) == 2
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_the_first_tokenizer_there_is_everyones(tmp_path, verse):
    """Training may round otherwise on another kind of machine, and one store has one tokenizer."""
    texts = {"train": [reading.TextChunk(verse)], "val": [reading.TextChunk(verse[:100])]}
    first, second = (TokenizerConfig("unigram", size).train(verse) for size in (400, 390))
    assert not TokenStore.write(tmp_path / "store", "print", texts, first, part=(0, 2))
    assert TokenStore.write(tmp_path / "store", "print", texts, second, part=(1, 2))
    store = TokenStore(tmp_path / "store", "print")
    assert store.tokenizer.fingerprint == first.fingerprint
    assert np.array_equal(store.ids["val"][:], first.encode(verse[:100]))
