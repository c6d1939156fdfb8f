"""Generation against simpler references: cached and uncached, batched and unbatched, streamed and decoded at once."""

import itertools
import math
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from decoding import assert_batched_equals_alone
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmlight.data.tokenizer import CharTokenizer, Tokenizer, TokenizerConfig
from lmlight.errors import UserError
from lmlight.generation import (
    Decoder,
    Sampling,
    TextStream,
    apply_repetition_penalty,
    escape_control_characters,
    filter_logits,
    generate,
    generate_ids,
    generate_text,
    sample_one_token,
    start_streams,
)
from lmlight.generation.cuda_graph import CudaGraphDecoder, StaticCache
from lmlight.generation.fast_decoder import FastDecoder, pack_linear
from lmlight.generation.text import StreamingDecoder
from lmlight.models import GPT2, LLAMA, Bigram, Transformer
from lmlight.models.attention import attention_weights, repeat_kv
from lmlight.models.rope import rope_cache


def net_of(vocab_size=11, block_size=8, **options):
    torch.manual_seed(0)
    net = Transformer(vocab_size, block_size, n_layer=2, n_head=4, n_embd=32, **options).eval()
    for parameter in net.parameters():  # the initial zeros would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return net


class Uncached(Transformer):
    """A network without a cache."""

    def make_cache(self, batch_size):
        return None


def static_step(decoder, tokens, cache, fast):
    """The step of a CUDA graph, without the graph."""
    if decoder._graph is None:
        decoder._graph = StaticCache(cache, fast.net.rope)
    decoder._graph.follow()
    return fast(tokens, decoder._graph)


@contextmanager
def decoding(fast):
    """Decodes with or without `FastDecoder`; `static`: as in a CUDA graph."""
    with (
        patch.object(FastDecoder, "supports", FastDecoder.supports if fast else lambda net: False),
        patch.object(Decoder, "_fast_step", static_step if fast == "static" else Decoder._fast_step),
    ):
        yield


FAST = [True, False, "static"]
TRANSFORMERS = [
    {},
    GPT2,
    LLAMA,
    {"n_kv_head": 2},
    {"n_kv_head": 1, "positions": "learned", "bias": True},
    {"mlp": "gelu", "norm": "layernorm"},
    {"tie": True, "dropout": 0.5},
    {"norm_eps": 0.1, "rope_theta": 100.0},
]
NETS = [*(lambda options=options: net_of(**options) for options in TRANSFORMERS), lambda: Bigram(11, 8)]


@pytest.mark.parametrize("temperature", [0, 1e-38])  # dividing by the latter overflows
def test_greedy_takes_the_most_likely_token(temperature):
    net = Bigram(5, 4)
    out = generate(net, torch.tensor([[3]]), Sampling(max_new_tokens=6, temperature=temperature))
    token, expected = 3, [3]
    for _ in range(6):
        token = int(net.table.weight[token].argmax())
        expected.append(token)
    assert out.tolist() == [expected]


def test_seed_is_deterministic_and_leaves_the_global_random_state_unchanged():
    net = Bigram(50, 4)
    start = torch.tensor([[3]])
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = generate(net, start, Sampling(max_new_tokens=20, seed=5))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, generate(net, start, Sampling(max_new_tokens=20, seed=5)))
    assert not torch.equal(first, generate(net, start, Sampling(max_new_tokens=20, seed=6)))


def test_prompt_is_cropped_to_block_size():
    net = net_of(block_size=4)
    long, short = torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), torch.tensor([[4, 5, 6, 7]])
    sampling = Sampling(max_new_tokens=5, temperature=0)
    assert torch.equal(generate(net, long, sampling)[:, 7:], generate(net, short, sampling)[:, 4:])


def test_sampled_frequencies_match_the_probabilities():
    """Chi-square of 20,000 draws with 5 degrees of freedom: above 20.5 with probability 0.001. The seed is fixed."""
    net = Bigram(6, 4)
    net.table.weight.data[:] = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -0.5])
    expected = (net.table.weight[0] / 0.8).softmax(-1) * 20_000
    drawn = generate(
        net, torch.zeros(200, 1, dtype=torch.long), Sampling(max_new_tokens=100, temperature=0.8, min_p=None)
    )
    counts = torch.bincount(drawn[:, 1:].flatten(), minlength=6)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.41}, {1, 2}),
        ({"top_p": 0.71}, {1, 2, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"min_p": 0.6}, {1, 2}),
        ({"min_p": 0.0}, {0, 1, 2, 3}),
        ({"min_p": 0.6, "temperature": 4.0}, {0, 1, 2, 3}),
        # temperature, top-k, top-p, min-p: each filters the renormalized distribution that the previous ones leave
        ({"top_k": 2, "top_p": 0.5}, {1}),  # 0.57 after top-k; 0.4 before
        ({"top_p": 0.5, "min_p": 0.6}, {1, 2}),  # 0.7 before min-p; the first alone is enough after it
        ({"temperature": 0.5, "top_p": 0.5}, {1}),  # 0.53 after the temperature
        ({"temperature": 0.5, "min_p": 0.6}, {1}),  # 0.56 times as likely after the temperature
    ],
    ids=str,
)
def test_filters(setting, kept):
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    finite = filter_logits(logits, Sampling(**{"temperature": 1.0, "min_p": None, **setting})).isfinite()[0]
    assert set(finite.nonzero().flatten().tolist()) == kept


@settings(max_examples=40)
@given(options=st.sampled_from(TRANSFORMERS), double=st.booleans(), fast=st.booleans(), data=st.data())
@torch.no_grad()
def test_cached_logits_equal_uncached(options, double, fast, data):
    """For tokens appended in pieces of any size."""
    net = net_of(**options)
    net = net.double() if double else net
    idx = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    expected = net(idx)
    cache, step, pieces = net.make_cache(3), FastDecoder(net, 3), []
    while (seen := cache.length) < 8:
        piece = idx[:, seen : seen + data.draw(st.integers(1, 8 - seen))]
        pieces.append(step(piece, cache)[:, None] if fast and piece.size(1) == 1 else net(piece, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-10 if double else 1e-5)
    assert cache.length == 8


def test_dropout_acts_while_a_network_in_training_mode_generates():
    net, logits = net_of(dropout=0.5).train(), []
    for seed in (1, 2):
        decoder = Decoder(net, 1)
        torch.manual_seed(0)
        decoder.prefill([[1, 2]])
        torch.manual_seed(seed)
        logits.append(decoder.step(torch.tensor([[3]])))
    assert not torch.equal(*logits)


@settings(max_examples=40)
@example(make=NETS[1], fast="static", lengths=[1, 4])  # learned positions, which differ
@given(
    make=st.sampled_from(NETS), fast=st.sampled_from(FAST), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4)
)
def test_batched_logits_equal_unbatched(make, fast, lengths):
    with decoding(fast):
        assert_batched_equals_alone(make().double(), lengths)


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("options", [{}, LLAMA, {"n_kv_head": 2}, {"rope_theta": 100.0}], ids=str)
def test_sliding_window_attends_to_the_last_block_size_tokens(options, fast):
    """Reference: the whole sequence at once; each position attends to the last block_size positions."""
    net = net_of(**options).double()
    idx, near = torch.randint(11, (1, 30)), torch.ones(30, 30, dtype=torch.bool).tril().triu(1 - 8)
    x, rope = net.embedding(idx), rope_cache(30, 8, net.config["rope_theta"]).double()
    for block in net.blocks:
        q, k, v = block.attention.project(block.attention_norm(x), rope=rope)
        k, v = (repeat_kv(t, 4 // t.size(1)) for t in (k, v))
        y = attention_weights(q, k, causal=False, attn_mask=near) @ v
        x = x + block.attention.output(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.mlp_norm(x))
    with decoding(fast):
        decoder = Decoder(net, 1)
        logits = [decoder.prefill(idx[:, :1].tolist()), *(decoder.step(token) for token in idx[:, 1:].split(1, 1))]
    torch.testing.assert_close(torch.stack(logits, 1), net.head(net.norm(x)), rtol=0, atol=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("prompts", [[[1]], [[1], [2, 3, 4]]], ids=str)
@pytest.mark.parametrize("options", TRANSFORMERS, ids=str)
def test_cuda_graphs_generate_what_single_kernels_do(options, prompts, autocast, monkeypatch):
    net, texts = net_of(block_size=32, **options).cuda(), []  # with learned positions, a graph lasts for half a block
    replays, call = [], CudaGraphDecoder.__call__
    monkeypatch.setattr(CudaGraphDecoder, "__call__", lambda self, tokens: replays.append(self) or call(self, tokens))
    for step in (static_step, Decoder._fast_step):
        assert not replays
        with patch.object(Decoder, "_fast_step", step), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            steps = generate_ids(net, prompts, Sampling(max_new_tokens=50), [0, 1][: len(prompts)])
            texts.append([step.ids for step in steps])
    assert texts[0] == texts[1]
    assert replays


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize(("kind", "kept"), [(Transformer, "later half"), (Uncached, "all")])
def test_learned_positions_restart_and_uncached_networks_recompute_beyond_block_size(block_size, kind, kept, fast):
    torch.manual_seed(0)
    net = kind(11, block_size, n_layer=1, n_head=2, n_embd=16, positions="learned").double().eval()
    net.positions.weight.data.mul_(50)
    context = [1]
    with decoding(fast):
        steps = list(generate_ids(net, [context], Sampling(max_new_tokens=25), [5]))
    for step in steps:
        torch.testing.assert_close(step.logits[0], net(torch.tensor([context]))[0, -1], rtol=0, atol=1e-10)
        context = [*context, step.ids[0]]
        if len(context) > block_size:
            context = context[-block_size if kept == "all" else -max(1, block_size // 2) :]


@pytest.mark.parametrize(("options", "most"), [({}, 1.0), ({"positions": "learned"}, 2.0)], ids=str)
def test_cost_per_token_does_not_grow_beyond_block_size(monkeypatch, options, most):
    """Cost is the number of computed positions: one per token, plus half a block per restart of learned positions."""
    seen, embed = [], F.embedding
    monkeypatch.setattr(F, "embedding", lambda idx, *a, **k: seen.append(idx.numel()) or embed(idx, *a, **k))
    list(generate_ids(net_of(**options), [[1] * 5], Sampling(max_new_tokens=101), [1]))
    assert seen[0] == 5, "one pass over the prompt"
    assert sum(seen[1:]) / 100 <= most


@pytest.mark.parametrize(
    "make",
    [net_of, lambda: net_of(positions="learned"), lambda: Bigram(11, 8), lambda: Uncached(11, 8, n_layer=1).eval()],
    ids=["rotary", "learned", "bigram", "uncached"],
)
def test_batched_texts_equal_unbatched(make):
    tokenizer, net = CharTokenizer("\nabcdefghij"), make().double()
    sampling = Sampling(max_new_tokens=20, num_samples=2, seed=3, repetition_penalty=1.2, stop=["ab"])
    prompts = ["", "a", "cab", "bcd" * 9, "dd"]
    together = start_streams(tokenizer, prompts, sampling)
    list(generate_text(net, together, sampling))
    alone = []
    for prompt in prompts:
        alone += start_streams(tokenizer, [prompt], sampling)
        for stream in alone[-2:]:
            list(generate_text(net, [stream], sampling))

    def record(streams):
        return [(s.prompt, s.seed, s.text, s.tokens[: len(s.text)], s.finish_reason) for s in streams]

    assert record(together) == record(alone)
    assert together[0].text != together[1].text


@pytest.mark.parametrize("rows", [1, 2, 32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [66, 65, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_linear_equals_linear(rows, bias, out, dtype):
    """Sizes are on both sides of each threshold."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(48, out, bias=bias, dtype=dtype), torch.randn(rows, 48, dtype=dtype)
    atol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(pack_linear(linear, rows)(x), linear(x), rtol=0, atol=atol)


def test_packed_layer_takes_what_autocast_leaves_in_bfloat16():
    linear, x = torch.nn.Linear(512, 512), torch.randn(8, 512).bfloat16()
    torch.testing.assert_close(pack_linear(linear, 8)(x), linear(x.float()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_generates_in_bfloat16(batch_size, precision):
    net = net_of(vocab_size=64, block_size=8) if precision == "autocast" else net_of(64, 8).bfloat16()
    prompts = [[1] * (row + 1) for row in range(batch_size)]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        steps = list(generate_ids(net, prompts, Sampling(max_new_tokens=12), range(batch_size)))
    assert all(step.logits.isfinite().all() and step.logits.dtype == torch.float32 for step in steps)


def test_logprobs_are_taken_before_the_logits_processors():
    tokenizer, net = CharTokenizer("\nabcdefghij"), net_of(block_size=32).double()
    sampling = Sampling(max_new_tokens=12, temperature=0.5, top_k=3, repetition_penalty=1.5)
    (stream,) = start_streams(tokenizer, ["abc"], sampling)
    list(generate_text(net, [stream], sampling, logprobs=True))
    idx = torch.tensor([stream.ids + stream.tokens])
    plain = net(idx[:, :-1]).log_softmax(-1)[0, 2:].gather(1, idx[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(stream.logprobs, dtype=torch.float64), plain.detach())


def stream_of(text, stop):
    """Pushes a text character by character into a stream; returns the streamed pieces and the stream."""
    tokenizer = CharTokenizer("\nabcdefghij")
    stream, pieces = TextStream(tokenizer, "ab", Sampling(stop=stop), 0), []
    for index in tokenizer.encode(text):
        if stream.finish_reason is None:
            pieces.append(stream.push(index))
    if stream.finish_reason is None:
        pieces.append(stream.end())
    return pieces, stream


@settings(max_examples=300)
@given(text=st.text("abc", max_size=12), stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_at_the_first_complete_stop_text(text, stop):
    """Reference: the shortest prefix that contains a stop text is cut before it."""
    pieces, stream = stream_of(text, stop)
    expected, finished = text, "length"
    for end in range(1, len(text) + 1):
        found = [text[:end].find(s) for s in stop if s in text[:end]]
        if found:
            expected, finished = text[: min(found)], "stop"
            break
    assert (stream.text, stream.finish_reason) == (expected, finished)
    assert "".join(pieces) == stream.text


def test_text_is_streamed_unless_it_may_start_a_stop_text():
    pieces, _ = stream_of("cabca", ["acd"])
    assert pieces == ["c", "", "ab", "c", "", "a"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end_at_line", [True, False])
def test_a_line_break_in_the_last_fifth_ends_the_text(newline, end_at_line):
    class OneLetter:
        """Decodes ids of the letters of a text."""

        eos_id, bos_ids = None, [0]
        decode = staticmethod(lambda ids: "".join(map(chr, ids)))
        encode_prompt = staticmethod(lambda text: list(map(ord, text)))

    # the first line break ends the first four fifths; the second is in the last fifth, after a colon
    before = ("a" * 80)[len(newline) :] + newline + f"b:{newline}hi"
    text = (before + newline + "c" * 100)[:100]
    stream = TextStream(OneLetter(), f"a{newline}", Sampling(max_new_tokens=100, end_at_line=end_at_line), 0)
    pieces = []
    for letter in text:
        if stream.finish_reason is None:
            pieces.append(stream.push(ord(letter)))
    if stream.finish_reason is None:
        pieces.append(stream.end())
    assert "".join(pieces) == stream.text
    if end_at_line:
        assert (stream.text, stream.finish_reason) == (before, "stop")
    else:
        assert (stream.text, stream.finish_reason) == (text, "length")


@pytest.mark.parametrize("stop", [[], ["\n\n"], ["\niabc"]])
def test_stop_texts_do_not_change_where_a_line_ends_the_text(stop):
    """The break comes before the last fifth, but may be the start of a stop text until then."""
    stream = TextStream(CharTokenizer("\nabcdefghi"), "a", Sampling(max_new_tokens=10, stop=stop, end_at_line=True), 0)
    for letter in "bcdefgh\nia":
        stream.push("\nabcdefghi".index(letter))
    stream.end()
    assert (stream.text, stream.finish_reason) == ("bcdefgh\nia", "length")


def test_stop_texts_in_the_prompt_are_ignored():
    _, stream = stream_of("ba", ["abb", "bb"])
    assert (stream.text, stream.finish_reason) == ("ba", "length")


@pytest.mark.parametrize("stop", [[], ["abc"]])
def test_eos_ends_the_text(stop):
    tokenizer = CharTokenizer("abc", add_eos=True)
    stream = TextStream(tokenizer, "", Sampling(stop=stop), 0)
    assert stream.ids == [3], "an empty prompt starts a document"
    assert "".join(stream.push(index) for index in (0, 1, 3)) == stream.text == "ab"
    assert stream.finish_reason == "stop"
    assert TextStream(tokenizer, "ab", Sampling(), 0).ids == [0, 1]


def test_eos_after_an_incomplete_character_keeps_its_bytes(corpus_text):
    tokenizer = TokenizerConfig("unigram", 400).train(corpus_text, add_eos=True)
    pieces = [tokenizer.id_to_piece(index) for index in range(tokenizer.vocab_size)]
    stream = TextStream(tokenizer, "a", Sampling(), 0)
    ids = [pieces.index("<0xE2>"), tokenizer.eos_id]
    assert [stream.push(index) for index in ids] == ["", "\ufffd"]
    assert (stream.text, stream.finish_reason) == ("\ufffd", "stop")


def test_stop_text_may_span_tokens(corpus_text):
    tokenizer = TokenizerConfig(vocab_size=400).train(corpus_text)
    text = corpus_text[200:260]
    ids = tokenizer.encode(text)
    joint = len(tokenizer.decode(ids[:5]))
    stop = text[joint - 2 : joint + 2]
    assert text.find(stop) == joint - 2
    stream, given_text = TextStream(tokenizer, "", Sampling(stop=[stop]), 0), ""
    for index in ids:
        given_text += stream.push(index)
        if stream.finish_reason:
            break
    assert given_text == stream.text == text[: joint - 2]
    assert stream.tokens == ids[: len(stream.tokens)]


@pytest.fixture(scope="module")
def tokenizers(corpus_text):
    text = corpus_text + "\nnaïve café 日本 🙂\n"
    return [
        TokenizerConfig("unigram", 400).train(text),
        TokenizerConfig("bpe", 400).train(text),
        TokenizerConfig("unigram", 200, lossless=False).train(text),
        TokenizerConfig("char").train(text),
    ]


@settings(max_examples=150)
@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_text(tokenizers, data):
    """For any ids, including invalid bytes, control pieces and leading spaces."""
    tokenizer = data.draw(st.sampled_from(tokenizers))
    byte_pieces = [
        index for index in range(tokenizer.vocab_size) if tokenizer.id_to_piece(index).startswith("<0x")
    ] or [0]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(byte_pieces), max_size=12))
    detokenizer = StreamingDecoder(tokenizer)
    assert "".join([detokenizer.push(index) for index in ids]) + detokenizer.flush() == tokenizer.decode(ids)


def test_streaming_keeps_a_space_between_two_pieces_that_start_with_one(tokenizers):
    """Alone, a lossy tokenizer's space decodes to nothing."""
    lossy = tokenizers[2]
    pieces = [lossy.id_to_piece(index) for index in range(lossy.vocab_size)]
    ids = [
        0,
        pieces.index("\u2581"),
        next(i for i, piece in enumerate(pieces) if len(piece) > 2 and piece[0] == "\u2581"),
    ]
    decoder = StreamingDecoder(lossy)
    assert "".join([decoder.push(index) for index in ids]) + decoder.flush() == lossy.decode(ids)


@settings(max_examples=100)
@given(data=st.data())
def test_streamed_pieces_continue_the_prompt(tokenizers, corpus_text, data):
    """A lossy tokenizer drops a space at the start of a text, but not after a prompt."""
    tokenizer = data.draw(st.sampled_from(tokenizers))
    start = data.draw(st.integers(0, len(corpus_text) - 50))
    ids = tokenizer.encode(corpus_text[start : start + 50])
    cut = data.draw(st.integers(1, len(ids) - 1))
    detokenizer = StreamingDecoder(tokenizer, ids[:cut])
    joined = "".join([detokenizer.push(index) for index in ids[cut:]]) + detokenizer.flush()
    assert tokenizer.decode(ids[:cut]) + joined == tokenizer.decode(ids)


def test_multibyte_characters_are_streamed_whole(tokenizers):
    ids = tokenizers[0].encode("a☃b")
    detokenizer = StreamingDecoder(tokenizers[0])
    pieces = [detokenizer.push(index) for index in ids]
    assert "".join(pieces) == "a☃b"
    assert not any("\ufffd" in piece for piece in pieces)


class BytePieces(Tokenizer):
    """Ids of several bytes that need not end where a character does, as in GPT-2's vocabulary."""

    pieces = (b" \xe2\x80", b"\x9c", b"To", b"\xff")
    char_counts = np.array([2, 0, 2, 0])

    def encode(self, text):
        raise NotImplementedError  # these tests only decode

    def decode(self, ids):
        return b"".join(self.pieces[index] for index in ids).decode(errors="replace")

    def to_bytes(self):
        return b""

    @classmethod
    def from_bytes(cls, data):
        return cls()


def test_text_before_an_incomplete_character_is_held_back_with_it():
    decoder = StreamingDecoder(BytePieces())
    assert [decoder.push(index) for index in (0, 1, 2)] == ["", " \u201c", "To"]
    for ids in itertools.product(range(4), repeat=4):
        decoder = StreamingDecoder(BytePieces())
        assert "".join([decoder.push(index) for index in ids]) + decoder.flush() == BytePieces().decode(ids)


def test_repetition_penalty_lowers_present_tokens():
    logits = torch.tensor([[2.0, -2.0, 3.0, -1.0]])
    present = torch.tensor([[True, True, False, False]])
    assert apply_repetition_penalty(logits, present, 2.0).tolist() == [[1.0, -4.0, 3.0, -1.0]]
    net = Bigram(5, 4)
    net.table.weight.data[:] = torch.tensor([0.0, 0.0, 5.0, 4.9, 0.0])
    out = generate(net, torch.tensor([[1]]), Sampling(max_new_tokens=2, temperature=0, repetition_penalty=1.1))
    assert out.tolist() == [[1, 2, 3]], "2 is the most likely token until it is present"


def test_tokens_with_zero_probability_are_never_sampled():
    net = Bigram(6, 4)
    net.table.weight.data[:] = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, 0.5, -math.inf])
    drawn = generate(net, torch.zeros(100, 1, dtype=torch.long), Sampling(max_new_tokens=60, top_k=2))
    assert set(drawn[:, 1:].flatten().tolist()) == {3, 4}


def test_rounding_never_draws_a_token_of_zero_probability():
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = -math.inf
    totals = logits.softmax(-1).double().sum(-1)
    assert (totals < 1).any(), "float32 probabilities add up to less than 1 in some rows"
    ids = sample_one_token(
        logits, Sampling(temperature=1.0, min_p=None), torch.full((64, 1), 1 - 2**-53, dtype=torch.float64)
    )
    assert ids.max() == 98


def test_control_characters_are_escaped():
    assert escape_control_characters("a\x1b[2J\tb\nc\x07é🙂\x9b\0") == "a\\x1b[2J\tb\nc\\x07é🙂\\x9b\\x00"
    assert escape_control_characters("a\u2028b\u202ec") == "a\\u2028b\\u202ec"
    assert escape_control_characters("👩\u200d👧 \u200eא\u05b7\ufeff") == "👩\u200d👧 \u200eא\u05b7\ufeff"


def test_every_line_ending_prints_as_one_line_break():
    text, printed = "a\r\nb\rc\n\r\n\rd\r\n", "a\nb\nc\n\n\nd\n"
    assert escape_control_characters(text) == printed
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            pieces = [piece for piece in (text[:first], text[first:second], text[second:]) if piece]
            shown = [escape_control_characters(piece, after) for after, piece in zip(["", *pieces], pieces)]
            assert "".join(shown) == printed, pieces


@pytest.mark.parametrize(("characters", "newline"), [("\nab", "\n"), ("\r\nab", "\r\n"), ("ab", "\n")])
def test_a_prompt_takes_the_line_endings_of_the_training_text(characters, newline):
    tokenizer = CharTokenizer(characters, newline=newline)
    for prompt in ("a", "a\nb\n", "a\r\nb\r\n") if newline in characters else ("a",):
        (stream,) = start_streams(tokenizer, [prompt], Sampling())
        assert stream.prompt == prompt
        assert tokenizer.decode(stream.ids) == prompt.replace("\r\n", "\n").replace("\n", newline)


@pytest.mark.parametrize("stop", ["\n\n", "\r\n\r\n", "\nb"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_line_breaks_in_stop_texts_match_either_line_ending(stop, newline):
    tokenizer = CharTokenizer("\r\nabc")
    stream = TextStream(tokenizer, "a", Sampling(stop=[stop]), 0)
    text = "ab" + stop.replace("\r\n", "\n").replace("\n", newline)
    assert "".join([stream.push(index) for index in tokenizer.encode(text)]) == stream.text == "ab"
    assert stream.finish_reason == "stop"


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"num_samples": 0},
        {"stop": [""]},
        {"stop": "ROMEO"},
        {"max_new_tokens": -1},
        {"seed": 2**64},
        {"seed": 2**64 - 1, "num_samples": 2},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Sampling(**setting)


def test_empty_prompt_starts_after_eos_or_a_newline():
    for tokenizer, start in (
        (CharTokenizer("ab\n"), [2]),
        (CharTokenizer("ab"), [0]),
        (CharTokenizer("ab\n", add_eos=True), [3]),
    ):
        (stream,) = start_streams(tokenizer, [""], Sampling())
        assert stream.ids == start
        (stream,) = start_streams(tokenizer, ["ba"], Sampling())
        assert stream.ids == [1, 0]
