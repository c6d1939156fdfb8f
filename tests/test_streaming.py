"""What is streamed from litdata's chunks is the text; and how far resuming and the number of processes leave it alone."""

import shutil
import sys
from itertools import chain, islice

import numpy as np
import pytest
import torch

from lmlight.data import reading, streaming
from lmlight.data import token_store as stores
from lmlight.data.subword_regularization import SubwordSampling
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.errors import UserError
from lmlight.training.cli import main
from lmlight.training.datamodule import TextDataModule

pytest.importorskip("litdata", reason="needs the extra `streaming`")

T, BATCH = 16, 8


@pytest.fixture(scope="module")
def made(tmp_path_factory, verse):
    """A folder with `store` and, in chunks, `streamed`, both of the verse."""
    folder = tmp_path_factory.mktemp("streaming")
    (folder / "verse.txt").write_bytes(verse.encode())
    with pytest.MonkeyPatch.context() as patch:
        for module, name, size in (
            (stores, "SHARD_CHARS", 1000),
            (reading, "CHUNK_SIZE", 500),
            (reading, "MAX_LINE", 200),
            (streaming, "CHUNK_BYTES", 1500),
        ):
            patch.setattr(module, name, size)
        data = TextDataModule(
            str(folder / "verse.txt"),
            cache=str(folder / "cache"),
            tokenizer=TokenizerConfig(vocab_size=400),
            block_size=T,
        )
        store = data.prepare()
        streaming.write(store, folder / "streamed")
        store.copy(folder / "store")
    assert len(list((folder / "streamed" / "train").glob("*.bin"))) > 2
    return folder


def data_of(folder, **settings):
    data = TextDataModule(str(folder), **{"block_size": T, "batch_size": BATCH, "seed": 0} | settings)
    data.prepare_data()
    data.setup("fit")
    return data


def windows(batch):
    return [tuple(row) for row in batch.inputs.tolist()]


def test_each_window_of_the_text_is_seen_once_in_an_epoch(made):
    data = data_of(made / "streamed")
    text = stores.TokenStore(made / "store").ids["train"][:].tolist()
    there = {tuple(text[start : start + T]): start for start in range(len(text) - T)}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = data.train_dataloader()
    epochs = [list(loader) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before), "training's random numbers are its own"
    for batches in epochs:
        starts = [there[window] for batch in batches for window in windows(batch)]
        assert len(batches) == len(loader) and len(starts) == BATCH * len(loader)
        assert (np.diff(np.sort(starts)) > T).all(), "two overlap"
        assert len(starts) > 0.9 * len(text) / (T + 1) - BATCH
        for batch in batches:
            assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
            assert torch.equal(batch.target_chars, torch.from_numpy(data.tokenizer.char_counts)[batch.targets])
    assert [windows(batch) for batch in epochs[0]] != [windows(batch) for batch in epochs[1]]


def test_what_is_validated_on_is_the_stores(made):
    streamed, plain = (data_of(made / name).val_dataloader() for name in ("streamed", "store"))
    assert [[t.tolist() for t in batch] for batch in streamed] == [[t.tolist() for t in batch] for batch in plain]


def steps(made, monkeypatch, processes, workers, states=None, most=None, epochs=1):
    """The windows of each step over all ranks, and the state of the first rank behind the last one."""
    ranks = []
    for rank in range(processes):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("GLOBAL_RANK", str(rank))
        counts = stores.TokenStore(made / "streamed").tokenizer.char_counts
        loader = streaming.StreamedLoader(str(made / "streamed"), T, BATCH // processes, 1, counts, 0, workers)
        if states:
            loader.load_state_dict(states)
        # as Lightning does, which asks for as many batches as there are and not for one more
        ours = [windows(batch) for _ in range(epochs) for batch in islice(loader, most or len(loader))]
        ranks.append((ours, loader.state_dict()))
    return [list(chain(*step)) for step in zip(*(ours for ours, _ in ranks))], ranks[0][1]


LAYOUTS = [(1, 0), (1, 2), (2, 0)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_epoch_has_the_same_windows_for_any_number_of_processes_and_workers(made, monkeypatch, layout):
    """In another order for each, in which the last few do not fill a step."""
    one, other = (list(chain(*steps(made, monkeypatch, *which)[0])) for which in ((1, 0), layout))
    assert len(set(other)) == len(other) >= len(one) - 2 * BATCH
    assert len(set(other) - set(one)) <= 2 * BATCH
    assert (other == one) == (layout == (1, 0))


@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", LAYOUTS)
def test_resuming_goes_on_with_the_same_steps(made, monkeypatch, before, after):
    """With any number of processes and of workers, in the order that the run began with; two workers may leave out the
    last step of the epoch."""
    straight, _ = steps(made, monkeypatch, *before)
    seen, state = steps(made, monkeypatch, *before, most=5)
    assert seen == straight[:5]
    rest, _ = steps(made, monkeypatch, *after, states=state)
    assert rest == straight[5:][: len(rest)]
    assert len(rest) >= len(straight) - 5 - max(0, after[1] - 1)


def test_the_epoch_after_one_that_was_resumed_is_the_next(made, monkeypatch):
    straight, _ = steps(made, monkeypatch, 1, 0, epochs=2)
    length = len(straight) // 2
    for seen in (5, length):
        _, state = steps(made, monkeypatch, 1, 0, most=seen)
        counts = stores.TokenStore(made / "streamed").tokenizer.char_counts
        loader = streaming.StreamedLoader(str(made / "streamed"), T, BATCH, 1, counts, 0, 0)
        loader.load_state_dict(state)
        rest = [windows(batch) for batch in islice(loader, (length - seen) or length)]
        if seen < length:
            rest += [windows(batch) for batch in islice(loader, length)]
        assert rest == straight[seen:]


def test_a_run_is_resumed_after_its_store_has_moved(made, tmp_path, capsys):
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


def test_without_litdata_it_is_said_what_to_install(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(UserError, match=r"pip install 'lmlight\[streaming\]'"):
        data_of(made / "streamed")


@pytest.mark.parametrize("settings", [{"subword_sampling": SubwordSampling()}, {"windows": "random"}])
def test_an_order_of_our_own_is_refused(made, settings):
    with pytest.raises(UserError, match="litdata's order"):
        data_of(made / "streamed", **settings)


def test_chunks_that_are_not_there_are_one_line(made, capsys):
    shutil.copytree(made / "streamed", "cut", ignore=shutil.ignore_patterns("train"))
    assert main(["fit", "--data.corpus=cut", f"--data.block_size={T}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "chunks in" in line


def test_chunks_are_written_once_and_from_a_tokenizer_that_loses_nothing(made, verse_file):
    with pytest.raises(UserError, match="chunks already"):
        streaming.write(stores.TokenStore(made / "streamed"), made / "again")
    lossy = TextDataModule(
        "verse.txt", block_size=T, tokenizer=TokenizerConfig(vocab_size=200, lossless=False)
    ).prepare()
    with pytest.raises(UserError, match="loses nothing"):
        streaming.write(lossy, made / "again")
    assert not (made / "again").exists()
