"""Streamed stores hold the text, in an order that depends on seed, epoch and position only."""

import inspect
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lmlight.data import reading, streaming, token_writer
from lmlight.data.subword_regularization import SubwordSampling
from lmlight.data.token_store import TokenStore
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.data.windows import epoch_starts
from lmlight.errors import UserError
from lmlight.training.cli import main
from lmlight.training.datamodule import TextDataModule

pytest.importorskip("litdata", reason="needs the extra `streaming`")

T, BATCH = 16, 8


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus_text):
    """A folder with the corpus as `store`, and in litdata's format as `streamed`."""
    folder = tmp_path_factory.mktemp("streaming")
    (folder / "corpus.txt").write_bytes(corpus_text.encode())
    with pytest.MonkeyPatch.context() as patch:
        for module, name, size in (
            (token_writer, "SHARD_CHARS", 1000),
            (reading, "CHUNK_SIZE", 500),
            (reading, "MAX_LINE", 200),
            (streaming, "CHUNK_BYTES", 1500),
            (streaming, "PAGE_TOKENS", 32),
        ):
            patch.setattr(module, name, size)
        data = TextDataModule(
            str(folder / "corpus.txt"),
            cache=str(folder / "cache"),
            tokenizer=TokenizerConfig(vocab_size=400),
            block_size=T,
        )
        store = data.prepare()
        streaming.write(store, folder / "streamed")
        store.copy(folder / "store")
    assert len(list((folder / "streamed" / "train").glob("*.bin"))) > 2
    return folder


def data_of(corpus, **settings):
    data = TextDataModule(str(corpus), **{"block_size": T, "batch_size": BATCH, "seed": 0} | settings)
    data.prepare_data()
    data.setup("fit")
    return data


def rows_of(data, epoch=0):
    return data._source.rows(epoch, np.arange(len(data._source)))


def test_chunks_hold_the_text_except_an_incomplete_page(made):
    text = TokenStore(made / "store").ids["train"][:]
    source = data_of(made / "streamed")._source
    chunks = [source._load(0, chunk) for chunk in range(len(source._per_shard))]
    ids = np.concatenate(chunks)
    assert ids.dtype == text.dtype and len(text) - len(ids) < 32
    assert np.array_equal(ids, text[: len(ids)])
    assert TokenStore(made / "streamed").tokens["train"] == len(ids)
    # windows have the order of all sharded sources
    order = np.random.default_rng((0, 1)).permutation(len(chunks))
    expected = [
        chunks[c][start : start + T + 1]
        for c in order
        for start in epoch_starts(len(chunks[c]), T, np.random.default_rng((0, 1, c)))
    ]
    assert rows_of(data_of(made / "streamed"), epoch=1).tolist() == [row.tolist() for row in expected]


def test_streamed_batches_are_deterministic_and_resume(made):
    data = data_of(made / "streamed", num_workers=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = data.train_dataloader()
    epochs = [list(loader) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before), "the global random state is unchanged"
    counts = torch.from_numpy(data.tokenizer.char_counts)
    for number, batches in enumerate(epochs):
        rows = torch.from_numpy(rows_of(data, number))
        assert torch.cat([batch.inputs for batch in batches]).equal(rows[: BATCH * len(loader), :-1])
        assert all(torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1]) for batch in batches)
        assert all(torch.equal(batch.target_chars, counts[batch.targets]) for batch in batches)
    loader.load_state_dict({**loader.state_dict(), "epoch": 1, "windows": 3 * BATCH})
    assert [batch.inputs.tolist() for batch in loader] == [batch.inputs.tolist() for batch in epochs[1][3:]]


def test_validation_text_is_the_same(made):
    streamed, plain = (data_of(made / name).val_dataloader() for name in ("streamed", "store"))
    assert [[t.tolist() for t in batch] for batch in streamed] == [[t.tolist() for t in batch] for batch in plain]


def test_chunks_are_read_from_a_remote_store(made):
    """litdata copies `local:` URLs to its cache, like those of object storage."""
    store = TokenStore(made / "streamed")
    remote = streaming.streamed_windows(store, f"local:{made / 'streamed'}", T, 0, "epoch")
    assert remote.rows(0, np.arange(len(remote))).tolist() == rows_of(data_of(made / "streamed")).tolist()
    remote.close()
    shutil.rmtree(Path(inspect.getclosurevars(remote._load).nonlocals["dataset"].input_dir.path).parent)


def test_run_is_resumed_after_its_store_was_moved(made, capsys):
    shutil.copytree(made / "streamed", "here")
    flags = [
        f"--data.block_size={T}",
        f"--data.batch_size={BATCH}",
        "--model.net=Bigram",
        "--trainer.val_check_interval=3",
    ]
    assert main(["fit", "--data.corpus=here", "--trainer.max_steps=6", *flags]) == 0
    shutil.move("here", "there")
    capsys.readouterr()
    assert main(["fit", "--data.corpus=there", "--ckpt_path=last", "--trainer.max_steps=9", *flags]) == 0
    assert "step 9" in capsys.readouterr().out.replace("step     9", "step 9")


def test_missing_litdata_is_named(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(UserError, match=r'pip install "lmlight\[streaming\]"'):
        data_of(made / "streamed")


def test_sampled_segmentations_are_refused(made):
    with pytest.raises(UserError, match="streamed: set --data.subword_sampling null"):
        data_of(made / "streamed", subword_sampling=SubwordSampling())


@pytest.mark.parametrize("missing", ["index.json", "chunk-0-1.bin"])
def test_missing_chunks_are_a_one_line_error(made, missing, capsys):
    shutil.copytree(made / "streamed", "cut")
    (Path("cut/train") / missing).unlink()
    assert main(["fit", "--data.corpus=cut", f"--data.block_size={T}", "--model.net=Bigram"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "chunks in" in lines[-1] and "Traceback" not in lines


def test_stores_that_cannot_be_streamed_are_refused(made, corpus_file):
    with pytest.raises(UserError, match="is already in litdata's format"):
        streaming.write(TokenStore(made / "streamed"), made / "again")
    with pytest.raises(UserError, match="needs 4,096 training tokens"):
        streaming.write(TokenStore(made / "store"), made / "again")
    lossy = TextDataModule(
        "corpus.txt", block_size=T, tokenizer=TokenizerConfig(vocab_size=200, lossless=False)
    ).prepare()
    with pytest.raises(UserError, match="lossless"):
        streaming.write(lossy, made / "again")
    assert not (made / "again").exists()
