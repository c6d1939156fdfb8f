"""GGUF export: llama.cpp gives the same ids, text and probabilities."""

import json
import math
import urllib.request

import pytest
import torch
from exporting import OPTIONS, PRE_TOKENIZERS, UNUSUAL, byte_level_bpe, make, save, shipped, shrunk

from lmlight.__main__ import main
from lmlight.data.hf_tokenizer import HFTokenizer
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.generation import Sampling, generate
from lmlight.models import Bigram

xllamacpp = pytest.importorskip("xllamacpp", reason="needs the extra `engines`")
pytestmark = pytest.mark.filterwarnings("ignore:vocab_size")

BLOCK = 64


@pytest.fixture(scope="module")
def tokenizers(corpus_text):
    return {kind: TokenizerConfig(kind, 400).train(corpus_text) for kind in ("unigram", "bpe", "char")}


class Engine:
    """llama.cpp's server with a float32 cache and without flash attention, which round by 1e-2."""

    def __init__(self, path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = BLOCK, 1, 0
        params.warmup = params.fit_params = False
        params.verbosity = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def ask(self, route, **body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + route, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text):
        return self.ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]

    def greedy(self, ids, count):
        return self.ask("/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True)["tokens"]

    def logprobs(self, ids, vocab_size):
        """The log-probability of every token after `ids`, by id."""
        settings = {"n_predict": 1, "temperature": 0, "n_probs": vocab_size, "cache_prompt": False}
        # The server reports no probabilities for a token that is half a character, so force one of the prompt's tokens.
        # Probabilities are from before the bias.
        answer = self.ask("/completion", prompt=ids, logit_bias=[[ids[0], 1000.0]], **settings)
        return {one["id"]: one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]}


def nats(ids, rows):
    return -sum(rows[at][ids[at]] for at in range(1, len(ids))) / (len(ids) - 1)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_architecture_matches_in_llama_cpp(name, tokenizers, tmp_path, corpus_text):
    matches_in_llama_cpp(
        make(tokenizers["unigram"], OPTIONS[name], BLOCK), tokenizers["unigram"], corpus_text, tmp_path
    )


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_each_byte_level_bpe_matches_in_llama_cpp(kind, tmp_path, corpus_text):
    content = json.loads(byte_level_bpe(corpus_text, kind).to_str())
    tokenizer = HFTokenizer(json.dumps({**content, "lmlight_eos_id": 0}).encode())
    matches_in_llama_cpp(make(tokenizer, OPTIONS["llama"], BLOCK), tokenizer, corpus_text, tmp_path)
    engine = Engine(tmp_path / "x.gguf")
    for text in (corpus_text, "1234 567", *UNUSUAL):
        if "\0" not in text:
            assert engine.ids(text) == tokenizer.encode(text), text


def test_a_byte_level_bpe_without_eos_ends_no_text(tmp_path, corpus_text):
    """llama.cpp's default is id 11, which the network predicts here."""
    content = json.loads(byte_level_bpe(corpus_text).to_str())
    for token in content["added_tokens"]:
        content["model"]["vocab"].pop(token["content"])
    content["added_tokens"] = []
    content["model"]["vocab"] = {piece: at for at, piece in enumerate(content["model"]["vocab"])}
    del content["pre_tokenizer"]["use_regex"]  # as in files of old versions
    tokenizer = HFTokenizer(json.dumps(content).encode())
    assert tokenizer.eos_id is None
    net = make(tokenizer, OPTIONS["llama"], BLOCK)
    ids, sampling = tokenizer.encode(corpus_text)[:8], Sampling(max_new_tokens=24, temperature=0)
    likely = generate(net, torch.tensor([ids]), sampling)[0, 12].item()
    for weight in (net.embedding.weight, net.head.weight):  # exchange the ids
        weight.data[[11, likely]] = weight.data[[likely, 11]]
    ids = [{11: likely, likely: 11}.get(index, index) for index in ids]
    written = generate(net, torch.tensor([ids]), sampling)[0].tolist()
    assert written[12] == 11
    assert main(["export", "gguf", save(tmp_path / "x.ckpt", net, tokenizer), "x.gguf"]) == 0
    assert Engine(tmp_path / "x.gguf").greedy(ids, 24) == written[8:]


@pytest.mark.parametrize(
    "change", [{"pre_tokenizer": {"add_prefix_space": True}}, {"normalizer": {"type": "Lowercase"}}]
)
def test_unknown_pre_tokenizer_is_refused(tmp_path, corpus_text, capsys, change):
    content = json.loads(byte_level_bpe(corpus_text).to_str())
    content |= {name: {**(content[name] or {}), **value} for name, value in change.items()}
    tokenizer = HFTokenizer(json.dumps(content).encode())
    checkpoint = save(tmp_path / "x.ckpt", make(tokenizer, OPTIONS["llama"], BLOCK), tokenizer)
    assert main(["export", "gguf", checkpoint, "x.gguf"]) == 2
    assert "has a different one, or a normalizer: export to hf or onnx" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("name", shipped("Transformer"))
def test_each_shipped_transformer_matches_in_llama_cpp(name, tmp_path, corpus_text):
    matches_in_llama_cpp(*shrunk(name, corpus_text, BLOCK), corpus_text, tmp_path)


def matches_in_llama_cpp(net, tokenizer, text, tmp_path):
    assert main(["export", "gguf", save(tmp_path / "x.ckpt", net, tokenizer), "x.gguf"]) == 0
    engine, ids = Engine(tmp_path / "x.gguf"), tokenizer.encode(text)[:24]
    written = generate(net, torch.tensor([ids]), Sampling(max_new_tokens=BLOCK - len(ids), temperature=0))[0].tolist()
    theirs = ids + engine.greedy(ids, BLOCK - len(ids))
    with torch.no_grad():
        logits = net(torch.tensor([written]))[0]
    if theirs != written:  # only where two tokens are equally likely
        first = next(at for at, pair in enumerate(zip(theirs, written)) if pair[0] != pair[1])
        best = logits[first - 1].topk(2).values
        assert best[0] - best[1] < 1e-3
    ours = {at + 1: row for at, row in enumerate(logits.log_softmax(-1).tolist())}
    found = {at: engine.logprobs(ids[:at], net.vocab_size) for at in range(1, len(ids))}
    assert math.exp(nats(ids, found)) == pytest.approx(math.exp(nats(ids, ours)), rel=1e-3)
    largest = max(abs(found[at][token] - ours[at][token]) for at in found for token in found[at])
    assert largest < 1e-2


@pytest.mark.parametrize(("precision", "tolerance"), [("f16", 0.005), ("q8_0", 0.05)])
def test_quantized_files_are_smaller_and_nearly_as_good(precision, tolerance, tokenizers, tmp_path, corpus_text):
    tokenizer = tokenizers["unigram"]
    net = make(tokenizer, {}, BLOCK)
    path = save(tmp_path / "x.ckpt", net, tokenizer)
    assert main(["export", "gguf", path, "full.gguf"]) == 0
    assert main(["export", "gguf", path, "x.gguf", "--precision", precision]) == 0
    assert (tmp_path / "x.gguf").stat().st_size < (tmp_path / "full.gguf").stat().st_size * 0.7
    engine, ids = Engine(tmp_path / "x.gguf"), tokenizer.encode(corpus_text)[:24]
    with torch.no_grad():
        ours = {at + 1: row for at, row in enumerate(net(torch.tensor([ids]))[0].log_softmax(-1).tolist())}
    found = {at: engine.logprobs(ids[:at], net.vocab_size) for at in range(1, len(ids))}
    assert nats(ids, found) == pytest.approx(nats(ids, ours), rel=tolerance)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_are_the_same(kind, tokenizers, tmp_path, corpus_text):
    ours = tokenizers[kind]
    assert main(["export", "gguf", save(tmp_path / "x.ckpt", make(ours, {}, BLOCK), ours), "x.gguf"]) == 0
    engine = Engine(tmp_path / "x.gguf")
    for text in (corpus_text, *UNUSUAL):
        # llama.cpp takes ▁ for a space, and has no byte fallback for unigram models
        if "\u2581" in text or "\0" in text or (kind == "unigram" and not text.isascii()):
            continue
        assert engine.ids(text) == ours.encode(text), text


def test_unsupported_model_error_names_the_reason(tokenizers, tmp_path, capsys):
    unigram, char = tokenizers["unigram"], tokenizers["char"]
    for message, net, tokenizer in (
        ("cannot use a CharTokenizer", make(char, {}), char),
        ("--model.net.mlp=relu2", make(unigram, {"mlp": "gelu"}), unigram),
        ("a Bigram cannot be exported", Bigram(unigram.vocab_size, 8), unigram),
    ):
        assert main(["export", "gguf", save(tmp_path / "x.ckpt", net, tokenizer), "x.gguf"]) == 2
        assert message in capsys.readouterr().err
        assert [entry.name for entry in tmp_path.iterdir()] == ["x.ckpt"]
