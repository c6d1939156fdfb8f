"""`lmlight prepare`, and prepared stores as the corpus."""

import json
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lmlight.data import download, reading, token_writer
from lmlight.data.corpus import split
from lmlight.data.token_store import TokenStore
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.errors import UserError
from lmlight.training.cli import main
from lmlight.training.datamodule import TextDataModule

UNIGRAM = TokenizerConfig("unigram", 400)
FLAGS = ["--data.corpus=corpus.txt", "--data.tokenizer.vocab_size=400", "--data.block_size=16"]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(token_writer, "SHARD_CHARS", 1000)
    monkeypatch.setattr(reading, "CHUNK_SIZE", 500)
    monkeypatch.setattr(reading, "MAX_LINE", 200)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def data_of(corpus, **settings):
    return TextDataModule(
        str(corpus), **{"tokenizer": UNIGRAM, "block_size": 16, "batch_size": 8, "seed": 0} | settings
    )


def batches(data):
    """All training and validation batches."""
    data.prepare_data()
    data.setup("fit")
    return [
        [tensor.tolist() for tensor in batch]
        for loader in (data.train_dataloader(), data.val_dataloader())
        for batch in loader
    ]


# From the command line


def test_prepare_makes_the_store_that_fit_uses(corpus_file, capsys):
    assert main(["prepare", *FLAGS]) == 0
    said = capsys.readouterr().out
    (folder,) = Path("cache/tokens").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert f"Prepared: {folder}" in said
    data = data_of("corpus.txt")
    data.prepare_data()
    assert list(Path("cache/tokens").iterdir()) == [folder]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not Path("runs").exists()


def test_prepare_accepts_a_config_for_a_larger_machine(corpus_file):
    config = {
        "seed_everything": 3,
        "trainer": {"accelerator": "gpu", "devices": 8, "max_steps": 7},
        "model": {"net": {"class_path": "Bigram"}},
        "data": {"corpus": "corpus.txt", "tokenizer": {"vocab_size": 400}},
    }
    Path("run.yaml").write_text(json.dumps(config))
    assert main(["prepare", "--config=run.yaml"]) == 0
    (folder,) = Path("cache/tokens").iterdir()
    assert TokenStore(folder).tokenizer.vocab_size == 400


def test_ctrl_c_keeps_finished_shards_and_prints_no_traceback(corpus_file, small_shards, monkeypatch, capsys):
    save, saved = np.save, []

    def interrupted(file, ids):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(file, ids))

    monkeypatch.setattr(token_writer, "cpu_count", lambda: 1)
    monkeypatch.setattr(np, "save", interrupted)
    assert main(["prepare", *FLAGS]) == 130
    assert "Traceback" not in capsys.readouterr().err
    (folder,) = Path("cache/tokens").iterdir()
    assert sorted(contents(folder)) == ["tokenizer", "train-00000.npy", "train-00001.npy"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to=corpus.txt"], "exists"),
        (["--to=corpus.txt/below"], "cannot be written"),
        (["--format=litdata"], "pass --to FOLDER"),
        (["--format=parquet", "--to=x"], "format"),
        (["--init_from=nope.ckpt"], "no checkpoint at 'nope.ckpt'"),
    ],
)
def test_error_is_one_line(corpus_file, flags, message, capsys):
    assert main(["prepare", *FLAGS, *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("lmlight: warning")]
    assert len(lines) == 1 and lines[0].startswith("lmlight: error: ") and message in lines[0]
    assert {path.name for path in Path().iterdir()} <= {"corpus.txt", "cache"}


# A store as the corpus


@pytest.fixture
def copied(corpus_file):
    """A copy of the store of `corpus.txt`, whose cache is deleted."""
    data_of("corpus.txt").prepare().copy(Path("copy"))
    shutil.rmtree("cache")
    return Path("copy")


@pytest.fixture
def served(copied):
    """The URL of the same store in fsspec's memory file system."""
    memory = fsspec.filesystem("memory")
    memory.put(str(copied), "/lmlight-tests/copy", recursive=True)
    yield "memory://lmlight-tests/copy"
    if memory.exists("/lmlight-tests"):
        memory.rm("/lmlight-tests", recursive=True)


def test_copied_store_gives_the_same_batches_as_the_text(copied, corpus_file):
    there = TextDataModule("copy", block_size=16, batch_size=8, seed=0)
    assert batches(there) == batches(data_of("corpus.txt"))
    assert there.tokenizer.vocab_size == 400


def test_remote_store_is_copied_to_the_cache_once(served, copied):
    there = TextDataModule(served, block_size=16, batch_size=8, seed=0)
    first = batches(there)
    assert first == batches(TextDataModule("copy", block_size=16, batch_size=8, seed=0))
    (folder,) = Path("cache/downloads").iterdir()
    assert contents(folder) == contents(copied)
    fsspec.filesystem("memory").rm("/lmlight-tests", recursive=True)
    with pytest.warns(UserWarning, match="using the copy in the cache"):
        assert batches(TextDataModule(served, block_size=16, batch_size=8, seed=0)) == first


def test_fit_on_a_store(copied, capsys):
    flags = ["--data.block_size=16", "--model.net=Bigram", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    assert main(["fit", "--data.corpus=copy", *flags]) == 0
    assert "nats per character" in capsys.readouterr().out


def garble(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [(Path.unlink, "index.json", "incomplete"), (garble, "val-00000.npy", "damaged"), (garble, "tokenizer", "damaged")],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_incomplete_store_is_a_one_line_error(copied, damage, name, said, elsewhere, capsys):
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


def test_store_of_another_format_version_is_refused(copied):
    index = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps({**index, "format_version": index["format_version"] - 1}))
    with pytest.raises(UserError, match="another version"):
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
def test_settings_that_differ_from_the_store_are_refused(copied, settings, said):
    with pytest.raises(UserError, match=re.escape(said)):
        TextDataModule("copy", **settings).prepare()
    assert TextDataModule("copy", tokenizer=UNIGRAM).prepare().tokenizer.vocab_size == 400


def test_tokenizer_that_differs_from_the_checkpoint_is_refused(copied):
    data = TextDataModule("copy")
    data.tokenizer = TokenizerConfig("char").train("another text")
    with pytest.raises(UserError, match="not from this run's tokenizer"):
        data.prepare()


def test_files_are_looked_for_once(corpus_file, monkeypatch):
    find, looked = download._find, []
    monkeypatch.setattr(download, "_find", lambda source: looked.append(source) or find(source))
    TextDataModule(str(corpus_file), tokenizer=UNIGRAM).prepare()
    assert looked == [str(corpus_file)]


def test_folder_of_texts_with_an_index_file_is_not_a_store(corpus_text):
    Path("texts").mkdir()
    Path("texts/a.txt").write_text(corpus_text)
    Path("texts/index.json").write_text("{}")
    assert download.store_folder(download.find_files("texts")) is None
    assert data_of("texts").prepare().chars["train"] == int(0.9 * len(corpus_text))


@pytest.mark.parametrize("cache", ["mine", "mine/tokens", "."])
def test_failed_preparation_deletes_nothing_else_in_the_cache_folder(corpus_text, cache, tmp_path):
    Path("text.txt").write_text(corpus_text + "\u00e9\n")  # é is not in the training vocabulary
    Path("mine/tokens/0123456789abcdef").mkdir(parents=True)
    for name in ("mine/notes.txt", "mine/tokens/notes.txt", "mine/tokens/0123456789abcdef/train-00000.npy"):
        Path(name).write_text("mine")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main(["fit", "--data.corpus=text.txt", "--data.tokenizer.kind=char", f"--data.cache={cache}"]) == 2
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_unfinished_store_keeps_its_tokenizer(tmp_path, corpus_text):
    """Tokenizer training may round differently on another machine, and a store must have one tokenizer."""
    texts = {"train": [reading.TextChunk(corpus_text)], "val": [reading.TextChunk(corpus_text[:100])]}
    first, second = (TokenizerConfig("unigram", size).train(corpus_text) for size in (400, 390))
    token_writer.write_store(tmp_path / "store", "print", texts, first)
    (tmp_path / "store" / "index.json").unlink()
    token_writer.write_store(tmp_path / "store", "print", texts, second)
    store = TokenStore(tmp_path / "store", "print")
    assert store.tokenizer.fingerprint == first.fingerprint
    assert np.array_equal(store.ids["val"][:], first.encode(corpus_text[:100]))


@pytest.mark.parametrize("val_corpus", [None, "val.txt"])
def test_tuning_text_is_the_end_of_the_training_part(corpus_file, corpus_text, val_corpus):
    Path("val.txt").write_text(corpus_text[:2000])
    train = corpus_text if val_corpus else split(corpus_text, 0.2)[0]
    tuned, tune = split(train, 0.2)
    data = data_of("corpus.txt", val_fraction=0.2, val_corpus=val_corpus, validate_on="tune")
    data.prepare_data()
    data.setup("fit")
    store = data.store
    decoded = {part: store.tokenizer.decode(store.ids[part][:].tolist()) for part in store.ids}
    held_out = corpus_text[:2000] if val_corpus else split(corpus_text, 0.2)[1]
    assert decoded == {"train": tuned, "val": tune, "test": held_out}
    assert store.tokenizer.fingerprint == UNIGRAM.train([tuned], len(tuned)).fingerprint
