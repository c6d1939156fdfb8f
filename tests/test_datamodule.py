"""TextDataModule: training batches, evaluation windows, documents, the cache, and prompts."""

import itertools
import json
import mmap
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.trainer.states import TrainerFn

from lmlight.data import loader as loaders
from lmlight.data import reading, token_writer
from lmlight.data.cache import cache_dir
from lmlight.data.loader import IGNORE_INDEX
from lmlight.data.prompts import first_line
from lmlight.data.subword_regularization import SubwordSampler, SubwordSampling, _segment
from lmlight.data.tokenizer import CharTokenizer, TokenizerConfig
from lmlight.errors import UserError
from lmlight.training.datamodule import TextDataModule

UNIGRAM = TokenizerConfig("unigram", 400)


def ready(path, stage="fit", **settings):
    """Returns a data module that is prepared and set up."""
    merged = {"block_size": 16, "batch_size": 8, "tokenizer": UNIGRAM, "seed": 0} | settings
    data = TextDataModule(str(path), **merged)
    data.prepare_data()
    data.setup(stage)
    return data


def ready_on(text, **settings):
    """The same for a text, which is written to the working directory."""
    with open("text.txt", "wb") as file:  # noqa: PTH123
        file.write(text.encode())
    return ready("text.txt", **settings)


def parts(text):
    """nanoGPT's split."""
    return text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]


def rows(loader):
    """(inputs, targets) of every window in a loader, as lists."""
    return [row for batch in loader for row in zip(batch.inputs.tolist(), batch.targets.tolist())]


def scored(loader):
    return [target for _, targets in rows(loader) for target in targets if target != IGNORE_INDEX]


def characters(loader):
    return sum(batch.target_chars.sum().item() for batch in loader)


# Training


@pytest.mark.parametrize("windows", ["epoch", "random"])
def test_windows_are_slices_of_the_training_part(corpus_text, corpus_file, windows):
    data = ready(corpus_file, block_size=24, batch_size=1, windows=windows)
    ids = data.tokenizer.encode(parts(corpus_text)[0])
    slices = {tuple(ids[start : start + 25]) for start in range(len(ids) - 24)}
    assert len(slices) == len(ids) - 24, "this test needs a text without repeated windows"
    loader = data.train_dataloader()
    epochs = [[(*inputs, targets[-1]) for inputs, targets in rows(loader)] for _ in range(3)]
    for epoch in epochs:
        assert set(epoch) <= slices
        assert len(ids) - 24 * len(epoch) <= 2 * 24
        assert windows == "random" or len(set(epoch)) == len(epoch)
    assert len(set(map(tuple, epochs))) == 3


def test_training_batches_have_full_size_shifted_targets_and_character_counts(corpus_file):
    data = ready(corpus_file)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches)
    for batch in batches:
        assert batch.inputs.shape == batch.targets.shape == batch.target_chars.shape == (8, 16)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs[:, 1:].equal(batch.targets[:, :-1])
        assert batch.target_chars.tolist() == data.tokenizer.char_counts[batch.targets.numpy()].tolist()


def test_batches_depend_on_seed_and_epoch_only(corpus_file):
    def epoch_of(epoch, **settings):
        loader = ready(corpus_file, **settings).train_dataloader()
        return [rows(loader) for _ in range(epoch + 1)][-1]

    assert epoch_of(1) == epoch_of(1) == epoch_of(1, num_workers=2)
    assert epoch_of(1) != epoch_of(0)
    assert epoch_of(1) != epoch_of(1, seed=1)


@settings(max_examples=15)
@given(st.integers(0, 27), st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 2)]), st.sampled_from([(1, 1), (4, 2)]))
def test_resume_at_any_position_with_any_number_of_ranks(corpus_file, seen_steps, before, after):
    """A saved position is valid for another number of processes and of accumulated batches."""

    def loaders(world_size, accumulate):
        for rank in range(world_size):
            data = ready(corpus_file)
            data.trainer = trainer_of(rank, world_size, accumulate)
            yield data.train_dataloader()

    def batches_of(loader):
        for _ in range(4):
            yield from loader

    (straight,) = loaders(1, 1)
    per_step = [batch.inputs.tolist() for batch in itertools.islice(batches_of(straight), seen_steps + 25)]
    states = []
    for loader in loaders(*before):
        list(itertools.islice(batches_of(loader), seen_steps * before[1]))
        states.append(loader.state_dict())
    assert all(state == states[0] for state in states), "the ranks disagree"
    world_size, accumulate = after
    seen = []
    for loader in loaders(world_size, accumulate):
        if seen_steps:
            loader.load_state_dict(states[0])
        seen.append([batch.inputs.tolist() for batch in itertools.islice(batches_of(loader), 25 * accumulate)])
    for step, expected in enumerate(per_step[seen_steps:]):
        union = [
            row for m in range(accumulate) for rank in range(world_size) for row in seen[rank][step * accumulate + m]
        ]
        assert union == expected


def test_loaders_leave_the_global_random_state_unchanged(corpus_file):
    data = ready(corpus_file)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def trainer_of(rank=0, world_size=1, accumulate=1, fn=None, max_steps=-1):
    """The part of a Trainer that a data module uses."""
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=accumulate,
        max_steps=max_steps,
        training=False,
        limit_train_batches=1.0,
        overfit_batches=0,
        state=SimpleNamespace(fn=fn),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


# Scoring

CASES = {
    "plain": (lambda text: text, UNIGRAM),
    "bpe": (lambda text: text, TokenizerConfig("bpe", 400)),
    "crlf": (lambda text: text.replace("\n", "\r\n"), UNIGRAM),
    "unseen characters": (lambda text: text + "Žluťoučký kůň, 漢字 👩‍👩‍👧!\r\n\r\n" * 30, UNIGRAM),
    "a split inside a joined emoji": (lambda text: "👩‍👩‍👧 " * 700 + text[:97], TokenizerConfig("unigram", 300)),
    "characters": (lambda text: text, TokenizerConfig("char")),
}


@pytest.mark.filterwarnings("ignore:vocab_size")
@pytest.mark.parametrize("case", CASES)
def test_every_validation_character_is_scored_once(corpus_text, case):
    make, tokenizer = CASES[case]
    text = make(corpus_text)
    train, val = parts(text)
    for block_size in (1, 2, 7, 16, 61):
        data = ready_on(text, block_size=block_size, tokenizer=tokenizer, stage="validate")
        expected = data.tokenizer.encode(val)
        for loader in (data.val_dataloader(), *data.test_dataloader()):
            assert scored(loader) == expected
            assert characters(loader) == len(val)
            inputs, targets = rows(loader)[0]
            assert inputs[0] == data.tokenizer.encode(train)[-1]
            assert targets[0] == expected[0]


@pytest.mark.parametrize("block_size", [7, 16])
def test_sliding_test_has_half_a_block_of_context(corpus_file, block_size):
    data = ready(corpus_file, block_size=block_size)
    plain, sliding = data.test_dataloader()
    for loader in (plain, data.val_dataloader()):
        assert IGNORE_INDEX not in [target for _, targets in rows(loader) for target in targets]
    contexts = [targets.count(IGNORE_INDEX) for _, targets in rows(sliding)]
    assert contexts[0] == 0
    assert set(contexts[1:]) == {block_size // 2}
    assert len(rows(sliding)) > len(rows(plain))


@pytest.mark.filterwarnings("ignore:this tokenizer is lossy")
def test_batches_hold_no_float64(corpus_file):
    """MPS does not support it."""
    data = ready(corpus_file, tokenizer=TokenizerConfig("unigram", 120, lossless=False))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert not any(tensor.dtype == torch.float64 for tensor in next(iter(loader)))


def test_evaluation_batches_limit_the_logits(corpus_file, monkeypatch):
    monkeypatch.setattr(loaders, "MAX_EVAL_LOGITS", 5 * 16 * 400)
    data = ready(corpus_file, tokenizer=UNIGRAM, block_size=16, batch_size=1000)
    batches = list(data.val_dataloader())
    assert max(len(batch.inputs) for batch in batches) == 5
    assert len(batches) == len(data.val_dataloader())
    assert sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches) == len(data.val_ids) - 1


def test_lossy_tokenizer_is_scored_per_original_character_with_a_warning(corpus_text, corpus_file):
    train, val = parts(corpus_text)
    with pytest.warns(UserWarning, match="lossy"):
        data = ready(corpus_file, tokenizer=TokenizerConfig("unigram", 120, lossless=False))
    for loader in (data.val_dataloader(), *data.test_dataloader()):
        assert characters(loader) == pytest.approx(len(val))
    ids = data.tokenizer.encode(train)
    assert data.store.char_counts["train"][ids].sum() == pytest.approx(len(train))


# Training and validation text


def test_tokenizer_is_trained_on_the_training_part_only(corpus_text):
    train = corpus_text[:4500]
    text = train + "ЖЩЮЯ" * 125
    assert parts(text) == (train, "ЖЩЮЯ" * 125)
    data = ready_on(text)
    assert data.tokenizer.fingerprint == UNIGRAM.train(train).fingerprint
    assert not set("ЖЩЮЯ") & set("".join(data.tokenizer.pieces))


def test_validation_character_unseen_in_training_is_refused(corpus_text):
    with pytest.raises(UserError, match="'Ж'"):
        ready_on(corpus_text + "Ж" * 10, tokenizer=TokenizerConfig("char"))
    assert not (cache_dir() / "tokens").exists() or not list((cache_dir() / "tokens").iterdir())


def test_only_training_text_is_sampled(corpus_text, corpus_file):
    train, val = parts(corpus_text)
    sampling = SubwordSampling(0.1)
    data = ready(corpus_file, batch_size=1, subword_sampling=sampling, seed=3)
    sampler = SubwordSampler(data.tokenizer, sampling)

    def windows_of(ids):
        return {tuple(ids[start : start + 16]) for start in range(len(ids))}

    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        if epoch < len(epochs) - 1:
            loader = data.train_dataloader()
        epochs.append([tuple(inputs) for inputs, _ in rows(loader)])
        assert all(data.tokenizer.decode(window) in train for window in epochs[-1])
        assert set(epochs[-1]) <= windows_of(sampler.sample(train, 3, epoch).tolist())
        assert not set(epochs[-1]) <= windows_of(data.tokenizer.encode(train))
        assert len(epochs[-1]) == len(loader)
    assert epochs[0] == epochs[2] != epochs[1]
    for scoring in (data.val_dataloader(), *data.test_dataloader()):
        assert scored(scoring) == data.tokenizer.encode(val)


def test_given_tokenizer_is_used(corpus_text, corpus_file):
    given = CharTokenizer(sorted(set(corpus_text), reverse=True))
    data = TextDataModule(str(corpus_file), block_size=16, tokenizer=TokenizerConfig("unigram", 1))
    data.tokenizer = given
    data.prepare_data()
    data.setup("fit")
    assert data.tokenizer.fingerprint == given.fingerprint
    assert scored(data.val_dataloader()) == given.encode(parts(corpus_text)[1])


# Documents and other corpora

STORIES = ["One story.\n", "Another, longer story.\nIt ends here.", "A third <|endoftext|> one.\n"] * 40


def stories_file(name="stories.jsonl", stories=STORIES):
    with open(name, "w") as file:  # noqa: PTH123  (no pathlib in this file)
        file.writelines(json.dumps({"text": story}) + "\n" for story in stories)
    return name


@pytest.mark.filterwarnings("ignore:vocab_size", "ignore:this tokenizer is lossy")
@pytest.mark.parametrize(
    "tokenizer",
    [UNIGRAM, TokenizerConfig("bpe", 300), TokenizerConfig("char"), TokenizerConfig("unigram", 60, lossless=False)],
)
def test_documents_end_with_eos(tokenizer):
    data = ready(stories_file(), tokenizer=tokenizer, val_fraction=0.5)
    encode, end = data.tokenizer.encode, data.tokenizer.eos_id
    assert end is not None and data.tokenizer.id_to_piece(end) == "<|endoftext|>"
    assert end not in encode("<|endoftext|>")
    assert data.tokenizer.decode([end]) == ""
    assert data.tokenizer.char_counts[end] == 0
    text, cut = "".join(STORIES), int(0.5 * sum(map(len, STORIES)))
    borders = [sum(map(len, STORIES[: n + 1])) for n in range(len(STORIES))]
    begins = [0, *borders]
    halves = ([], [])
    for first, last in zip(begins, borders):
        for half, (low, high) in zip(halves, ((0, cut), (cut, len(text)))):
            if low <= last and first < high and (part := text[max(first, low) : min(last, high)]):
                half += encode(part) + ([end] if last <= high else [])
    assert data.store.ids["train"][:].tolist() == halves[0]
    assert scored(data.val_dataloader()) == halves[1]
    assert characters(data.val_dataloader()) == pytest.approx(len(text) - cut)


def test_text_without_documents_has_no_eos(corpus_file):
    tokenizer = ready(corpus_file).tokenizer
    assert tokenizer.eos_id is None
    assert "<|endoftext|>" not in tokenizer.pieces


def test_validation_documents_without_eos_warn(corpus_file):
    data = TextDataModule(corpus_file, val_corpus=stories_file(), block_size=16)
    with pytest.warns(UserWarning, match="no EOS token"):
        data.prepare_data()


def test_given_tokenizer_without_eos_warns():
    data = TextDataModule(stories_file(), block_size=16)
    data.tokenizer = CharTokenizer(sorted(set("".join(STORIES))))
    with pytest.warns(UserWarning, match="no EOS token"):
        data.prepare_data()
    data.setup("fit")
    assert (
        data.tokenizer.decode(scored(data.val_dataloader())) == "".join(STORIES)[-len(scored(data.val_dataloader())) :]
    )


def test_sampled_segmentations_keep_documents():
    data = ready(stories_file(), subword_sampling=SubwordSampling(0.1), tokenizer=TokenizerConfig("unigram", 280))
    end = data.tokenizer.eos_id
    data._source.rows(0, np.array([0]))
    drawn = data._source._ids
    plain = data.store.ids["train"][:]
    assert not np.array_equal(drawn, plain)

    def documents(ids):
        return [data.tokenizer.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == end))]

    assert documents(drawn) == documents(plain)


def test_separate_validation_and_test_corpora(corpus_text, corpus_file, tmp_path):
    (tmp_path / "val.txt").write_text("river stone\n" * 20)
    (tmp_path / "test.txt").write_text("lantern market\n" * 20)
    data = ready(corpus_file, val_corpus="val.txt", test_corpus="test.txt", stage="test")
    assert data.tokenizer.decode(data.store.ids["train"][:].tolist()) == corpus_text
    assert data.tokenizer.fingerprint == UNIGRAM.train(corpus_text).fingerprint
    assert data.tokenizer.decode(scored(data.val_dataloader())) == "river stone\n" * 20
    for loader in data.test_dataloader():
        assert data.tokenizer.decode(scored(loader)) == "lantern market\n" * 20
        assert characters(loader) == 300
    before = len(stores())
    (tmp_path / "test.txt").write_text("lantern market!\n" * 20)
    ready(corpus_file, val_corpus="val.txt", test_corpus="test.txt")
    assert len(stores()) == before + 1


def test_cache_folder_can_be_set(corpus_file, tmp_path):
    ready(corpus_file, cache=str(tmp_path / "here"))
    assert len(list((tmp_path / "here/tokens").iterdir())) == 1
    assert not cache_dir().exists()


# The cache


def stores():
    return {path.name: path.stat().st_mtime_ns for path in (cache_dir() / "tokens").iterdir()}


def test_store_is_prepared_once(corpus_file):
    first = ready(corpus_file)
    before = stores()
    first.prepare_data()
    first.setup("validate")
    second = ready(corpus_file)
    assert stores() == before
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint


@pytest.mark.filterwarnings("ignore:this tokenizer is lossy")
def test_settings_that_change_the_tokens_make_another_store(corpus_text, corpus_file):
    changes = [
        {},
        {"val_fraction": 0.2},
        {"tokenizer": TokenizerConfig("unigram", 390)},
        {"tokenizer": TokenizerConfig("bpe", 400)},
        {"tokenizer": TokenizerConfig("char")},
        {"tokenizer": TokenizerConfig("unigram", 120, lossless=False)},
    ]
    for count, change in enumerate(changes, start=1):
        ready(corpus_file, **change)
        assert len(stores()) == count
    corpus_file.write_bytes((edited := corpus_text[:-1] + "!").encode())
    data = ready(corpus_file)
    assert len(stores()) == len(changes) + 1
    assert data.tokenizer.decode(scored(data.val_dataloader())) == parts(edited)[1]


def test_settings_that_keep_the_tokens_share_the_store(corpus_file):
    for change in ({}, {"block_size": 8}, {"batch_size": 4}, {"seed": 5}, {"windows": "random"}, {"num_workers": 2}):
        ready(corpus_file, **change)
    ready(corpus_file, subword_sampling=SubwordSampling())
    assert len(stores()) == 1


def test_unfinished_store_is_completed_with_its_own_tokenizer(corpus_text, corpus_file, monkeypatch):
    ready(corpus_file)
    (name,) = stores()
    (cache_dir() / "tokens" / name / "index.json").unlink()
    monkeypatch.setattr(TokenizerConfig, "train", None)
    data = ready(corpus_file)
    assert data.tokenizer.decode(scored(data.val_dataloader())) == parts(corpus_text)[1]


# Errors


@pytest.mark.parametrize(("setting", "name"), [({"field": "story"}, "a.json"), ({"separator": "<|x|>"}, "a.jsonl")])
def test_settings_of_other_kinds_of_files_warn(tmp_path, setting, name):
    (tmp_path / name).write_text('{"text": "a b c"}\n' * 9)
    with pytest.warns(UserWarning, match=f"data.{next(iter(setting))} is ignored"):
        TextDataModule(name, block_size=4, tokenizer=TokenizerConfig("char"), **setting).prepare_data()


@pytest.mark.parametrize("block_size", [16, 100])
@pytest.mark.parametrize("n_chars", [1, 2, 9, 10, 17])
def test_a_text_that_is_too_short_is_refused(n_chars, block_size):
    with pytest.raises(UserError, match="lower --data.block_size|has no text") as caught:
        ready_on("a" * n_chars, tokenizer=TokenizerConfig("char"), block_size=block_size)
    assert "\n" not in str(caught.value)


def test_the_shortest_text_that_fits_trains_and_scores():
    settings = {"tokenizer": TokenizerConfig("char"), "batch_size": 2}
    data = ready_on("ab" * 10, block_size=17, **settings)
    assert {len(inputs) for inputs, _ in rows(data.train_dataloader())} == {17}
    assert characters(data.val_dataloader()) == 2
    with pytest.raises(UserError, match=r"has 18 tokens in 18 characters, fewer than a window of 18 \+ 1"):
        ready_on("ab" * 10, block_size=18, **settings)


@pytest.mark.filterwarnings("ignore:vocab_size")
@pytest.mark.parametrize("text", ["river stone lantern\n" * 50, "a" * 1000, " \n" * 500, "\u6f22\u5b57" * 500])
def test_repetitive_texts_train_with_the_default_tokenizer(text):
    data = ready_on(text, block_size=8, tokenizer=TokenizerConfig())
    assert len(rows(data.train_dataloader())) > 0
    assert characters(data.val_dataloader()) == len(text) // 10


@pytest.mark.parametrize(
    ("setting", "value"),
    [("block_size", 0), ("batch_size", 0), ("batch_size", -4), ("val_fraction", 0), ("val_fraction", 1)],
)
def test_invalid_sizes_are_refused(setting, value):
    with pytest.raises(UserError, match=f"data.{setting} must.*{value}"):
        TextDataModule("text.txt", **{setting: value})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: TextDataModule("text.txt", validate_on="tuning"),
            "data.validate_on must be one of val, tune, got 'tuning'",
        ),
        (
            lambda: TextDataModule("text.txt", errors="ignore"),
            "data.errors must be one of strict, replace, got 'ignore'",
        ),
        (lambda: TextDataModule("text.txt", windows="shuffled"), "data.windows must be one of epoch, random"),
        (lambda: TokenizerConfig("word"), "tokenizer.kind must be one of unigram, bpe, char, got 'word'"),
    ],
)
def test_options_with_unknown_words_are_refused(make, says):
    """jsonargparse checks those of the command line."""
    with pytest.raises(UserError, match=re.escape(says)):
        make()


# Prompts


def prompts_of(prompts):
    return list(TextDataModule("absent.txt", prompts=prompts).predict_dataloader())


def test_prompts_from_a_list():
    assert prompts_of(["MIRA:\n", "", " "]) == [["MIRA:\n", "", " "]]
    assert list(TextDataModule("absent.txt").predict_dataloader()) == [[""]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("MIRA:\n\n  Žluť 漢 \n", ["MIRA:", "", "  Žluť 漢 "]),
        ("MIRA:\r\n\r\n  Žluť 漢 \r\nend\r\n", ["MIRA:", "", "  Žluť 漢 ", "end"]),
        ("one\ntwo", ["one", "two"]),
        ("\ufeffMIRA:\r\n", ["MIRA:"]),
    ],
)
def test_prompts_file_has_one_prompt_per_line(tmp_path, content, expected):
    (tmp_path / "prompts.txt").write_bytes(content.encode())
    assert prompts_of("prompts.txt") == [expected]


@pytest.mark.parametrize("content", [None, "é".encode("latin-1")])
def test_unreadable_prompts_file_is_refused(tmp_path, content):
    if content:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"prompts\.txt.*cannot be read") as caught:
        prompts_of("prompts.txt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompts", [[], "prompts.txt"])
def test_no_prompts_are_refused(tmp_path, prompts):
    (tmp_path / "prompts.txt").touch()
    with pytest.raises(UserError, match="there are no prompts"):
        prompts_of(prompts)


def test_predict_needs_no_corpus():
    data = TextDataModule("absent.txt")
    data.trainer = trainer_of(fn=TrainerFn.PREDICTING)
    data.prepare_data()
    data.setup("predict")
    assert not cache_dir().exists()


def test_ids_are_read_from_disk_not_held_in_memory(corpus_file):
    assert isinstance(ready(corpus_file).store.ids["train"].shard(0).base.obj, mmap.mmap)


def test_used_twice_it_prepares_once(corpus_file, tmp_path):
    data = ready(corpus_file)
    data.prepare_data()
    data.setup("validate")
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_scoring_asks_nothing_of_the_batch_size(corpus_file):
    data = ready(corpus_file)
    data.trainer = trainer_of(1, 3)
    assert len(list(data.val_dataloader())) > 0


# Sampled segmentations of more than one shard


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(token_writer, "SHARD_CHARS", 1000)
    monkeypatch.setattr(reading, "CHUNK_SIZE", 500)
    monkeypatch.setattr(reading, "MAX_LINE", 200)


def sharded(path, **settings):
    return ready(path, subword_sampling=SubwordSampling(0.1), seed=3, **settings)


def test_shards_are_resegmented_each_epoch(corpus_text, corpus_file, small_shards):
    data = sharded(corpus_file, batch_size=1)
    assert len(data.store.ids["train"].shards) >= 4
    loader = data.train_dataloader()
    epochs = [[tuple(inputs) for inputs, _ in rows(loader)] for _ in range(2)]
    plain = data.store.ids["train"][:].tolist()
    for windows in epochs:
        texts = [data.tokenizer.decode(window) for window in windows]
        assert len(windows) == len(loader)
        assert all(text in parts(corpus_text)[0] for text in texts)
        seen = {corpus_text.index(text) + at for text in texts for at in range(len(text))}
        assert len(seen) > 0.7 * len(parts(corpus_text)[0])
        assert not set(windows) <= {tuple(plain[start : start + 16]) for start in range(len(plain))}
    assert epochs[0] != epochs[1]


def test_shards_with_the_same_text_are_segmented_apart(corpus_text, small_shards):
    data = ready_on((corpus_text[:999] + "\n") * 6, tokenizer=TokenizerConfig("unigram", 380))
    ids, tokenizer = data.store.ids["train"], data.tokenizer
    assert tokenizer.decode(ids.shard(0).tolist()) == tokenizer.decode(ids.shard(1).tolist())
    one, two = (_segment(ids, tokenizer.to_bytes(), SubwordSampling(0.1), 3, 0, shard).tolist() for shard in (0, 1))
    assert tokenizer.decode(one) == tokenizer.decode(two)
    assert one != two


def test_sharded_batches_depend_on_seed_and_position_only(corpus_file, small_shards):
    """They do not depend on worker processes, ranks, or interruptions."""
    loader = sharded(corpus_file).train_dataloader()
    straight = [rows([batch]) for _ in range(2) for batch in loader]
    data = sharded(corpus_file, num_workers=2)
    loader = data.train_dataloader()
    assert [rows([batch]) for _ in range(2) for batch in loader] == straight
    data.teardown("fit")
    for seen in (1, len(loader) - 1, len(loader) + 2):
        resumed = sharded(corpus_file).train_dataloader()
        epoch, position = divmod(seen, len(loader))
        resumed.load_state_dict({**loader.state_dict(), "epoch": epoch, "windows": position * 8})
        tail = [rows([batch]) for _ in range(2 - epoch) for batch in resumed]
        assert tail == straight[seen:]
    ranks = []
    for rank in range(2):
        data = sharded(corpus_file)
        data.trainer = trainer_of(rank, 2)
        ranks.append([rows([batch]) for batch in data.train_dataloader()])
    assert [one + two for one, two in zip(*ranks)] == straight[: len(loader)]


def test_subword_sampling_warns_in_a_run_shorter_than_an_epoch(corpus_file):
    data = ready(corpus_file, subword_sampling=SubwordSampling())
    data.trainer = trainer_of(fn=TrainerFn.FITTING, max_steps=2)
    with pytest.warns(UserWarning, match=r"sees \d+% of the training text"):
        data.train_dataloader()


def test_resume_position_of_another_text_is_refused(corpus_text):
    loader = ready_on(corpus_text).train_dataloader()
    next(iter(loader))
    state = loader.state_dict()
    ready_on(corpus_text).train_dataloader().load_state_dict(state)
    with pytest.raises(UserError, match="not the one that this run has read"):
        ready_on(corpus_text.replace("river", "rivet", 1)).train_dataloader().load_state_dict(state)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_prompts_in_turn(world_size):
    data = TextDataModule("absent.txt", prompts=list("abcdefg"), prompt_batch_size=2)
    ranks = []
    for rank in range(world_size):
        data.trainer = trainer_of(rank, world_size)
        ranks.append(list(data.predict_dataloader()))
    assert len(set(map(len, ranks))) == 1
    assert [prompt for turn in zip(*ranks) for batch in turn for prompt in batch] == list("abcdefg")


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_together_score_every_character_once(corpus_text, corpus_file, world_size):
    data, total = ready(corpus_file, batch_size=4), 0
    for rank in range(world_size):
        data.trainer = trainer_of(rank, world_size)
        total += characters(data.val_dataloader())
    assert total == len(parts(corpus_text)[1])


def test_sample_prompt_is_the_start_of_a_validation_line(corpus_text, corpus_file):
    beginning = ready(corpus_file).sample_prompt
    assert 10 < len(beginning) <= 20
    assert any(f"{line} ".startswith(f"{beginning} ") for line in parts(corpus_text)[1].split("\n")[1:])
    for text in ("ab" * 1000, "x\n" * 1000, "x" + "\n" * 2000, "文字" * 1000):  # no usable line
        for kind in ("unigram", "char"):
            data = ready_on(text, tokenizer=TokenizerConfig(kind, 400), block_size=8)
            assert data.tokenizer.decode(data.tokenizer.encode(data.sample_prompt)) == data.sample_prompt


@pytest.mark.parametrize("kind", ["unigram", "char"])
@pytest.mark.parametrize("letters", ["ACGT", "天地玄黄宇宙洪荒"])
def test_sample_prompt_without_spaces_has_20_characters(letters, kind):
    text = "".join(letters[n * n % 7919 % len(letters)] for n in range(4000))
    assert len(ready_on(text, tokenizer=TokenizerConfig(kind, 400), block_size=8).sample_prompt) == 20


@pytest.mark.parametrize(
    ("line", "beginning"),
    [
        ("But soft, what light through yonder window", "But soft, what light"),
        ("But soft, what lights", "But soft, what"),
        ("But soft", "But soft"),
        ("漢" * 30, "漢" * 20),
        ("吾輩！\u3000猫である", "吾輩！\u3000猫である"),  # a space would be unknown to a character tokenizer
        (" a\tb" * 9, "a\tb" + " a\tb" * 4),
    ],
)
def test_the_beginning_of_a_line_ends_between_words(line, beginning):
    assert first_line(line) == beginning


def test_sample_prompt_has_no_control_characters(corpus_text):
    prompt = ready_on(corpus_text.replace("\n", "\r\n\x1b[0m\u202e")).sample_prompt
    assert "\x1b" not in prompt and "\u202e" not in prompt


def test_encoding_does_not_change_the_tokens(corpus_text, corpus_file, tmp_path):
    (tmp_path / "wide.txt").write_bytes(corpus_text.encode("utf-16"))
    wide, plain = ready("wide.txt", encoding="utf-16"), ready(corpus_file)
    assert np.array_equal(wide.store.ids["train"][:], plain.store.ids["train"][:])
    assert wide._spec.settings()["encoding"] == "utf-16"
