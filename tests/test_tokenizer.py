"""Tokenizers are lossless, and sampled segmentations follow their distribution."""

import hashlib
import itertools
import math
import warnings
import weakref
from collections import Counter

import numpy as np
import processes
import pytest
import sentencepiece as spm
from exporting import sentencepiece_model
from hypothesis import example, given
from hypothesis import strategies as st

from lmlight.data.subword_regularization import SubwordSampler, SubwordSampling, _decode_chunks
from lmlight.data.tokenizer import CharTokenizer, SentencePieceTokenizer, TokenizerConfig, deserialize, serialize
from lmlight.errors import UserError

SPACE = "\u2581"
AWKWARD = [
    "",
    " ",
    "   leading, inner    and trailing   ",
    "\t\ttabs\t and \t spaces",
    "CRLF\r\nlines\r\n\r\n",
    "\n",
    "\n\n\n",
    "\n \n",
    "<s>",
    "</s><unk><pad>",
    "<0x41><0x0A>",
    SPACE,
    f"{SPACE}{SPACE} {SPACE}a {SPACE}\n{SPACE}",
    "\0",
    "river\0stone\0",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈 and 👍🏽",
    "e\u0301 \u00e9 \ufb01 \uff21 \u3000 \u00a0 \u200b \ufeff",
    "\u0085 \u2028 \u2029 \x0b \x0c \x1c",
    "漢字かな交じり文",
    "\U0010ffff\ufffd\ufffe",
    "a" * 5000,
]


@pytest.fixture(scope="module")
def unigram(corpus_text):
    return TokenizerConfig("unigram", 400).train(corpus_text)


@pytest.fixture(scope="module")
def bpe(corpus_text):
    return TokenizerConfig("bpe", 400).train(corpus_text)


@pytest.fixture(scope="module")
def lossy(corpus_text):
    return TokenizerConfig("unigram", 120, lossless=False).train(corpus_text)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def subword(request):
    return request.getfixturevalue(request.param)


def with_examples(texts):
    def decorate(test):
        for text in texts:
            test = example(text=text)(test)
        return test

    return decorate


# Lossless encoding


# any Unicode, or the characters that pieces consist of
texts = st.text() | st.text(alphabet=f"aeinorst \n\t{SPACE}<>x0é漢", max_size=80)


@with_examples(AWKWARD)
@given(text=texts)
def test_encode_decode_round_trip_and_character_counts(subword, text):
    ids = subword.encode(text)
    assert subword.decode(ids) == text
    assert sum(int(subword.char_counts[index]) for index in ids) == len(text)
    assert all(0 <= index < subword.vocab_size for index in ids)


def test_training_text_is_compressed_line_by_line(subword, corpus_text):
    ids = subword.encode(corpus_text)
    assert subword.decode(ids) == corpus_text
    assert subword.char_counts[ids].sum() == len(corpus_text)
    assert len(ids) < len(corpus_text) / 2
    assert subword.vocab_size == len(subword.char_counts) == 400
    assert subword.lossless
    newline = subword.encode("\n")
    by_line = [subword.encode(line) for line in corpus_text.split("\n")]
    assert ids == subword.encode(corpus_text) == [*by_line[0], *(i for line in by_line[1:] for i in newline + line)]


@with_examples(AWKWARD)
@given(text=texts)
def test_character_counts_of_prefixes(subword, text):
    """The first byte piece of a character has its count, so a prefix counts the characters that it starts."""
    ids = subword.encode(text)
    seen = 0
    for end, index in enumerate(ids[:200], start=1):
        seen += int(subword.char_counts[index])
        decoded = subword.decode(ids[:end])
        assert len(decoded.rstrip("\ufffd")) <= seen
        if text.startswith(decoded) and "\ufffd" not in decoded:
            assert len(decoded) == seen


@with_examples([("", ""), (" a", " b"), ("a ", ""), ("\n", "\n"), (SPACE, SPACE)])
@given(text=st.tuples(texts, texts))
def test_lines_are_encoded_independently(subword, text):
    first, second = text
    newline = subword.encode("\n")
    assert len(newline) == 1
    assert subword.encode(first + "\n" + second) == subword.encode(first) + newline + subword.encode(second)


def test_control_tokens_in_text_are_plain_text(subword):
    processor = spm.SentencePieceProcessor(model_proto=subword.to_bytes())
    special = {i for i in range(subword.vocab_size) if processor.is_control(i) or processor.is_unknown(i)}
    assert special.isdisjoint(subword.encode("<s></s><unk><pad>"))
    assert {"<s>", "</s>"}.isdisjoint(subword.pieces)
    assert len(subword.encode("<0x41>")) > 1


def test_pieces_do_not_cross_spaces_or_newlines(subword):
    assert not [piece for piece in subword.pieces if SPACE in piece[1:]]
    assert [piece for piece in subword.pieces if "\n" in piece] == ["\n"]


def test_invalid_utf8_decodes_to_replacement_characters(subword):
    assert subword.decode(subword.encode("漢")[-1:]) == "\ufffd"


# Characters


@given(st.text(min_size=1))
def test_char_tokenizer_round_trip(text):
    tokenizer = TokenizerConfig("char").train(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) == tokenizer.char_counts[ids].sum()
    assert tokenizer.vocab_size == len(set(text))
    assert deserialize(serialize(tokenizer)).encode(text) == ids


@pytest.mark.parametrize(("text", "name"), [("abž", "'ž'"), ("a\nb", r"'\\n'")])
def test_unseen_character_is_refused(text, name):
    with pytest.raises(UserError, match=name) as caught:
        CharTokenizer("abc").encode(text)
    assert "\n" not in str(caught.value)


# Serialization


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char", "lossy"])
def test_tokenizer_bytes_round_trip(kind, corpus_text, request):
    tokenizer = TokenizerConfig("char").train(corpus_text) if kind == "char" else request.getfixturevalue(kind)
    again = deserialize(serialize(tokenizer))
    assert again.encode(corpus_text) == tokenizer.encode(corpus_text)
    assert again.decode(tokenizer.encode(corpus_text)) == tokenizer.decode(tokenizer.encode(corpus_text))
    assert again.to_bytes() == tokenizer.to_bytes()
    assert again.fingerprint == tokenizer.fingerprint == hashlib.sha256(serialize(tokenizer)).hexdigest()
    assert (again.lossless, again.vocab_size) == (tokenizer.lossless, tokenizer.vocab_size)
    assert again.char_counts.tolist() == tokenizer.char_counts.tolist()


def test_fingerprints_differ_between_tokenizers(unigram, bpe, lossy):
    chars = [CharTokenizer("ab"), CharTokenizer("ba")]
    assert len({tokenizer.fingerprint for tokenizer in (unigram, bpe, lossy, *chars)}) == 5


def test_invalid_tokenizer_bytes_are_refused(unigram):
    for data in (b"garbage", b"{not json", b"", b"{}"):
        with pytest.raises(ValueError, match="tokenizer"):
            deserialize(data)
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        deserialize(serialize(unigram)[:-1])


# Training


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_training_is_deterministic(kind, corpus_text):
    def trained(sample_chars):
        config = TokenizerConfig(kind, 360, sample_chars=sample_chars)
        return config.train(corpus_text, len(corpus_text)).to_bytes()

    for sample_chars in (4000, len(corpus_text)):
        assert trained(sample_chars) == trained(sample_chars)
    assert (trained(4000) == trained(len(corpus_text))) == (kind == "char")


TRAIN_AND_SAMPLE = """
import hashlib, sys
from lmlight.data.subword_regularization import SubwordSampler, SubwordSampling
from lmlight.data.tokenizer import TokenizerConfig
text = open("corpus.txt", encoding="utf-8", newline="").read()
tokenizer = TokenizerConfig("unigram", 400).train(text)
print(tokenizer.fingerprint)
ids = SubwordSampler(tokenizer, SubwordSampling(0.2)).sample(text, 3, 5)
print(hashlib.sha256(ids.tobytes()).hexdigest())
assert "torch" not in sys.modules
"""


def test_training_and_sampling_repeat_in_a_fresh_process(unigram, corpus_text, corpus_file):
    out, err = processes.run_afresh(code=TRAIN_AND_SAMPLE, env=processes.environment(PYTHONHASHSEED="7"))
    ids = SubwordSampler(unigram, SubwordSampling(0.2)).sample(corpus_text, 3, 5)
    assert err == ""
    assert out.split() == [unigram.fingerprint, hashlib.sha256(ids.tobytes()).hexdigest()]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_too_large_vocab_size_is_lowered_with_a_warning(kind, corpus_text):
    with pytest.warns(UserWarning, match="vocab_size 30,000 is more than this text can fill") as warned:
        tokenizer = TokenizerConfig(kind, 30_000).train(corpus_text)
    assert len(warned) == 1
    assert f"training {tokenizer.vocab_size:,} pieces" in str(warned[0].message)
    assert 400 < tokenizer.vocab_size < 30_000
    assert tokenizer.decode(tokenizer.encode(corpus_text)) == corpus_text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TokenizerConfig(kind, tokenizer.vocab_size).train(corpus_text).vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize(("kind", "lossless"), list(itertools.product(["unigram", "bpe"], [True, False])))
def test_too_small_vocab_size_is_refused_with_the_minimum(kind, lossless, corpus_text):
    with pytest.raises(UserError, match="too small") as caught:
        TokenizerConfig(kind, 10, lossless).train(corpus_text)
    message = str(caught.value)
    assert "\n" not in message
    minimum = int(message.split("at least ")[1].split(" ")[0].replace(",", ""))
    assert TokenizerConfig(kind, minimum, lossless).train(corpus_text).vocab_size == minimum
    with pytest.raises(UserError, match="too small"):
        TokenizerConfig(kind, minimum - 1, lossless).train(corpus_text)


@pytest.mark.filterwarnings("ignore:vocab_size")
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_rarest_characters_use_byte_fallback(kind):
    frequent = "".join(chr(0x4E00 + n % 100) for n in range(5000))
    text = "".join(chr(0x5E00 + n) + frequent[n * 5 : n * 5 + 5] for n in range(1000))
    with pytest.warns(
        UserWarning, match=r"1,100 different characters, too many for 600 pieces: the rarest, 15.5% of the text"
    ):
        tokenizer = TokenizerConfig(kind, 600).train(text)
    assert 256 < tokenizer.vocab_size <= 600
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert set(frequent) <= set("".join(tokenizer.pieces))


@pytest.mark.parametrize("text", ["", "\n\n\n", SPACE])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_text_without_pieces_is_refused(kind, text):
    with pytest.raises(UserError) as caught:
        TokenizerConfig(kind, 400).train(text)
    assert "\n" not in str(caught.value)


def test_long_lines_are_used_for_training():
    """SentencePiece alone skips lines of more than 4,192 bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = TokenizerConfig("unigram", 300).train("blue kettle " * 1500 + "iron lamp " * 1500)
    assert set("iron") <= set(tokenizer.pieces)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("text", ["漢字かな交じり文\n" * 50, "nospaces\nhere\n" * 50])
@pytest.mark.filterwarnings("ignore:vocab_size")
def test_tokenizer_of_a_text_without_spaces_is_lossless(kind, text):
    tokenizer = TokenizerConfig(kind, 400).train(text)
    assert tokenizer.lossless
    other = f"漢字 and  spaces\n\n{SPACE}"
    assert tokenizer.decode(tokenizer.encode(other)) == other


# Lossy tokenizers


def test_lossy_tokenizer_folds_newlines_and_spaces(lossy):
    assert not lossy.lossless
    assert lossy.decode(lossy.encode("river\n\nstone   lantern \n")) == "river stone lantern"


# Sampled segmentations


def segmentations(word, scores):
    """All segmentations of `word` into the pieces in `scores`."""
    if not word:
        return [()]
    return [
        (word[:end], *rest)
        for end in range(1, len(word) + 1)
        if word[:end] in scores
        for rest in segmentations(word[end:], scores)
    ]


def chi_square(observed, expected, draws):
    """The distance of Pearson's statistic from its mean in standard deviations; rare outcomes are merged."""
    assert set(observed) <= set(expected)
    cells, rare_observed, rare_expected = [], 0, 0.0
    for outcome, probability in expected.items():
        if probability * draws >= 10:
            cells.append((observed[outcome], probability * draws))
        else:
            rare_observed, rare_expected = rare_observed + observed[outcome], rare_expected + probability * draws
    if rare_expected >= 10:
        cells.append((rare_observed, rare_expected))
    freedom = len(cells) - 1
    assert freedom > 0
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("before", ["", " "])
@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.1, 0.2])
def test_segmentations_follow_their_probabilities(unigram, before, alpha):
    """Reference: all segmentations of a word, with weights exp(alpha × the sum of the scores)."""
    processor = spm.SentencePieceProcessor(model_proto=unigram.to_bytes())
    scores = {
        processor.id_to_piece(index): processor.get_score(index)
        for index in range(processor.vocab_size())
        if not (processor.is_byte(index) or processor.is_unknown(index))
    }
    word, draws = before + "gathernesslyinged", 8000
    by_score = sorted(
        ((sum(map(scores.get, parts)), parts) for parts in segmentations(word.replace(" ", SPACE), scores)),
        reverse=True,
    )
    assert len(by_score) > 10
    weights = {parts: math.exp(alpha * score) for score, parts in by_score}
    expected = {parts: weight / sum(weights.values()) for parts, weight in weights.items()}

    sampler = SubwordSampler(unigram, SubwordSampling(alpha))
    pieces = [unigram.pieces[index] for index in sampler.sample(f"{word}\n" * draws, seed=1, epoch=0)]
    observed, parts = Counter(), []
    for piece in pieces:
        if piece == "\n":
            observed[tuple(parts)] += 1
            parts = []
        else:
            parts.append(piece)
    assert observed.total() == draws
    assert abs(chi_square(observed, expected, draws)) < 4


@with_examples([(text, 0.1) for text in AWKWARD])
@given(text=st.tuples(texts, st.sampled_from([0.0, 0.1, 1.0])))
def test_sampled_segmentation_decodes_to_the_text(unigram, text):
    text, alpha = text
    ids = SubwordSampler(unigram, SubwordSampling(alpha)).sample(text, 0, 0)
    assert unigram.decode(ids.tolist()) == text
    assert unigram.char_counts[ids].sum() == len(text)


def test_a_huge_alpha_gives_the_best_segmentation(unigram, corpus_text):
    text = corpus_text + f"\n{SPACE} 漢字 \t\r\n"
    sampler = SubwordSampler(unigram, SubwordSampling(1e6))
    assert sampler.sample(text, 0, 0).tolist() == unigram.encode(text)


def test_sampling_depends_on_seed_and_epoch_only(unigram, corpus_text):
    sampling = SubwordSampling(0.1)
    sampler, other = (SubwordSampler(unigram, sampling) for _ in range(2))
    drawn = {
        (seed, epoch): sampler.sample(corpus_text, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 10)
    }
    assert len(set(map(tuple, drawn.values()))) == len(drawn)
    assert {key: other.sample(corpus_text, *key).tolist() for key in reversed(drawn)} == drawn


def test_two_words_alike_are_drawn_apart(unigram):
    draws = SubwordSampler(unigram, SubwordSampling(0.1)).sample("gathernesslyinged\n" * 50, 0, 0).tolist()
    newline = unigram.encode("\n")[0]
    words = [tuple(word) for is_end, word in itertools.groupby(draws, lambda index: index == newline) if not is_end]
    assert len(words) == 50
    assert len(set(words)) > 10


def test_a_literal_space_mark_and_newlines_survive_sampling(unigram):
    text = f"river{SPACE}stone\n\n{SPACE}\n lantern\r\n"
    sampler = SubwordSampler(unigram, SubwordSampling(0.1))
    assert {unigram.decode(sampler.sample(text, 0, epoch).tolist()) for epoch in range(20)} == {text}


def test_a_word_of_thousands_of_characters_can_be_sampled(unigram):
    text = "wondering" * 300
    ids = SubwordSampler(unigram, SubwordSampling(0.1)).sample(text, 0, 0)
    assert unigram.decode(ids.tolist()) == text


LOSSY_TEXTS = [
    "river stone\n\n  lantern   morning \n",
    f"a{SPACE}river  {SPACE} stone",
    "漢 river 漢",
    "\ufb01ve \uff21\u3000river\u00a0\u200bstone",
    "river 漢字 stone",
    "\n",
]


@pytest.mark.parametrize("text", LOSSY_TEXTS)
def test_a_lossy_draw_decodes_to_what_its_encode_does(lossy, text):
    sampler = SubwordSampler(lossy, SubwordSampling(0.1))
    for epoch in range(5):
        assert lossy.decode(sampler.sample(text, 0, epoch).tolist()) == lossy.decode(lossy.encode(text))


def test_a_lossy_draw_keeps_unknown_characters_unknown(corpus_text):
    """Stored ids are decoded before they are segmented anew; `decode` writes ⁇ for characters without a piece."""
    tokenizer = TokenizerConfig("unigram", 200, lossless=False).train(corpus_text + "\ue000 icon " * 50)
    ids = np.array(tokenizer.encode("river漢字stone 漢 \ue000 morning"))
    assert ids.tolist().count(tokenizer.unknown_id) == 2
    sampler = SubwordSampler(tokenizer, SubwordSampling(1e3))
    assert sampler.sample(_decode_chunks(tokenizer, ids), 0, 0).tolist() == ids.tolist()


def test_lattices_of_long_words_are_not_kept(unigram):
    sampler = SubwordSampler(unigram, SubwordSampling(0.1))
    sampler.sample("river " + "x" * 100, 0, 0)
    assert sampler._cached_lattice.cache_info().currsize == 1


def test_characters_are_collected_one_chunk_at_a_time():
    class Chunk(str):
        """A string that can be referred to weakly."""

        __slots__ = ("__weakref__",)

    alive = weakref.WeakSet()

    def chunks():
        for character in "abcdef":
            chunk = Chunk(character)
            alive.add(chunk)
            yield chunk
            assert len(alive) <= 2

    assert TokenizerConfig("char").train(chunks()).characters == list("abcdef")


@pytest.mark.parametrize(
    ("change", "lossless"),
    [
        ({}, True),
        # as Llama 2's `tokenizer.model`: it restores a text as a whole, but lmlight encodes line by line
        ({"add_dummy_prefix": True}, False),
        ({"normalization_rule_name": "nfkc"}, False),
        ({"byte_fallback": False, "vocab_size": 100}, False),
    ],
)
def test_pretrained_model_that_changes_some_text_is_lossy(corpus_text, change, lossless):
    tokenizer = SentencePieceTokenizer(sentencepiece_model(corpus_text, model_type="bpe", **change))
    assert tokenizer.lossless is lossless
    if not change.get("add_dummy_prefix"):
        assert tokenizer.decode(tokenizer.encode("a  b\nc\n\nd")) == "a  b\nc\n\nd"
    assert tokenizer.char_counts[tokenizer.encode("日")].sum() <= 1 + change.get("add_dummy_prefix", False)


@pytest.mark.parametrize("pieces", [[], ["\n"]])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize("size", [{"byte_fallback": True}, {"byte_fallback": False, "vocab_size": 100}])
def test_lines_never_run_together(corpus_text, pieces, rule, prefix, strip, size):
    options = {"add_dummy_prefix": prefix, "remove_extra_whitespaces": strip, "normalization_rule_name": rule, **size}
    tokenizer = SentencePieceTokenizer(sentencepiece_model(corpus_text, user_defined_symbols=pieces, **options))
    text = "over the\nriver and\n\n in the"
    assert tokenizer.decode(tokenizer.encode(text)).split() == text.split()


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("lossless", [True, False])
def test_sampling_needs_a_unigram_tokenizer(kind, lossless, corpus_text):
    tokenizer = TokenizerConfig(kind, 320, lossless).train(corpus_text)
    with pytest.raises(UserError, match="unigram model: set --data.tokenizer.kind unigram") as caught:
        SubwordSampler(tokenizer, SubwordSampling())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("alpha", [-0.1, -math.inf, math.nan, math.inf])
def test_invalid_alpha_is_refused(alpha):
    with pytest.raises(UserError, match="alpha"):
        SubwordSampling(alpha)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_tokenizer_knows_the_line_endings_of_its_text(kind, newline, corpus_text):
    text = corpus_text.replace("\n", newline) + "\r\n\r\n\n\n\r"  # a few others do not matter
    trained = TokenizerConfig(kind, 400).train(text)
    assert TokenizerConfig(kind, 400).train(["A title", text]).newline == newline, "not of the first document only"
    for tokenizer in (trained, deserialize(serialize(trained))):
        assert tokenizer.newline == newline
        assert tokenizer.decode(tokenizer.encode(text)) == text
        for prompt in ("MIRA:\n\nriver", "MIRA:\r\n\r\nriver"):
            assert tokenizer.encode_prompt(prompt) == tokenizer.encode(f"MIRA:{newline}{newline}river")
        assert tokenizer.decode(tokenizer.bos_ids) == "\n", "one id, which other engines can be told"


def test_lossy_tokenizer_has_no_line_endings(corpus_text):
    tokenizer = TokenizerConfig("unigram", 200, lossless=False).train(corpus_text.replace("\n", "\r\n"))
    assert tokenizer.encode_prompt("river\r\nstone") == tokenizer.encode("river stone")
