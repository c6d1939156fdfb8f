"""ONNX and torch.export: the same logits at any size, and no local paths in the files."""

import json
import logging
import sys

import numpy as np
import processes
import pytest
import torch
from exporting import byte_level_bpe, documented, make, perturbed, save, shipped, shrunk

from lmlight import checkpoint
from lmlight.__main__ import main
from lmlight.data.hf_tokenizer import HFTokenizer
from lmlight.data.tokenizer import CharTokenizer, TokenizerConfig
from lmlight.export import graph
from lmlight.export.graph import metadata
from lmlight.export.model import Model
from lmlight.generation import Sampling, generate
from lmlight.models import GPT2, LLAMA, Bigram, Transformer

BLOCK = 16
NETS = {
    "default": {},
    "gpt2": GPT2,
    "llama": {**LLAMA, "n_kv_head": 2},
    "unusual": {"positions": "learned", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 1, "bias": True, "tie": True},
}
SIZES = [(1, 1), (2, 1), (1, BLOCK), (5, 7)]


@pytest.fixture(scope="module")
def tokenizer(corpus_text):
    return TokenizerConfig("unigram", 400).train(corpus_text)


def build(name, tokenizer, block_size=BLOCK):
    if name == "bigram":
        return Bigram(tokenizer.vocab_size, block_size)
    return make(tokenizer, {"n_layer": 1, **NETS[name]}, block_size)


@pytest.mark.filterwarnings("ignore:vocab_size")
def test_exported_program_runs_without_lmlight(tokenizer, tmp_path):
    code = """if True:
        import sys
        sys.modules["lmlight"] = None  # importing it is an error
        import torch
        torch.set_num_threads(1)
        for name in sys.argv[1:]:
            extra = {"block_size": "", "tokenizer.json": ""}
            module = torch.export.load(f"{name}.pt2", extra_files=extra).module()
            assert extra["block_size"] == "300" and '"Unigram"' in extra["tokenizer.json"]
            with torch.no_grad():
                torch.save([module(ids) for ids in torch.load("ids.pt")], f"{name}.logits")
        """
    # attention has another implementation beyond 256 positions
    nets = {name: build(name, tokenizer, 300) for name in ("default", "unusual", "bigram")}
    for name, net in nets.items():
        assert main(["export", "torch", save(tmp_path / f"{name}.ckpt", net, tokenizer), f"{name}.pt2"]) == 0
        assert has_no_source_paths(tmp_path / f"{name}.pt2")
    ids = [torch.randint(tokenizer.vocab_size, size) for size in (*SIZES, (2, 300))]
    torch.save(ids, "ids.pt")
    processes.run_afresh(*nets, code=code)
    with torch.no_grad():
        for name, net in nets.items():
            for one, logits in zip(ids, torch.load(f"{name}.logits"), strict=True):
                torch.testing.assert_close(logits, net(one), atol=1e-4, rtol=0)


def has_no_source_paths(path):
    """Whether a file contains no paths of source files."""
    data = path.read_bytes()
    return not any(word in data for word in (b"transformer.py", b"graph.py", b"site-packages"))


@pytest.mark.filterwarnings("ignore:vocab_size")
@pytest.mark.parametrize("name", [*NETS, "bigram"])
def test_onnxruntime_gives_the_same_logits(name, tokenizer, tmp_path, capfd):
    matches_in_onnxruntime(build(name, tokenizer), tokenizer, tmp_path, capfd)


@pytest.mark.filterwarnings("ignore:vocab_size")
@pytest.mark.parametrize("name", [*shipped("Transformer"), *shipped("Bigram")])
def test_each_shipped_network_matches_in_onnxruntime(name, tmp_path, corpus_text, capfd):
    matches_in_onnxruntime(*shrunk(name, corpus_text, BLOCK), tmp_path, capfd)


class Previous(Transformer):
    """Also reads the token before each position, so it has no use for cached keys and values."""

    def forward(self, idx, cache=None):
        before = torch.cat((idx[:, :1], idx[:, :-1]), 1)
        return super().forward(idx, cache) + self.embedding(before) @ self.head.weight.T

    def make_cache(self, batch_size):
        return None


class Halved(Transformer):
    def forward(self, idx):
        return super().forward(idx) / 2

    def make_cache(self, batch_size):
        return None


@pytest.mark.filterwarnings("ignore:vocab_size")
@pytest.mark.parametrize("kind", [Previous, Halved])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_transformer_without_a_cache_matches_in_onnxruntime(kind, positions, tokenizer, tmp_path, capfd):
    net = perturbed(kind, tokenizer.vocab_size, BLOCK, n_layer=1, n_head=2, n_embd=32, positions=positions)
    matches_in_onnxruntime(net, tokenizer, tmp_path, capfd)
    assert json.loads(metadata(Model(net, tokenizer, {}, {}, {}, 0))["supports_sliding_window"])


@pytest.mark.filterwarnings("ignore:vocab_size")
@pytest.mark.parametrize(("kind", "code"), [(Halved, 0), (Previous, 2)])
def test_transformer_without_a_cache_is_exported_to_torch_or_refused(kind, code, tokenizer, tmp_path, capsys):
    """torch.export rejects `Previous`, because one of its guards excludes a length."""
    net = perturbed(kind, tokenizer.vocab_size, BLOCK, n_layer=1, n_head=2, n_embd=32, positions="learned")
    assert main(["export", "torch", save(tmp_path / "x.ckpt", net, tokenizer), "x.pt2"]) == code
    if code == 0:
        module = torch.export.load("x.pt2").module()
        for ids in (torch.randint(tokenizer.vocab_size, size) for size in SIZES):
            torch.testing.assert_close(module(ids), net(ids), atol=1e-4, rtol=0)
    else:
        assert "Previous cannot be exported, because torch.export cannot trace" in capsys.readouterr().err


@pytest.mark.parametrize("block_size", [2, 3])
def test_short_blocks_can_be_exported(block_size, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra `engines`")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `engines`")
    tokenizer = CharTokenizer("abc")
    for net in (make(tokenizer, {}, block_size), Bigram(3, block_size)):
        save(tmp_path / "x.ckpt", net.eval(), tokenizer)
        assert main(["export", "onnx", "x.ckpt", "x.onnx", "--force"]) == 0
        session = onnxruntime.InferenceSession("x.onnx", providers=["CPUExecutionProvider"])
        shapes = {
            one.name: [size if isinstance(size, int) else 0 for size in one.shape] for one in session.get_inputs()
        }
        ids = torch.arange(block_size)[None]
        given = {"ids": ids.numpy()}
        if "past" in shapes:
            given["past"] = np.zeros([*shapes["past"][:2], 1, *shapes["past"][3:]], np.float32)
        np.testing.assert_allclose(session.run(None, given)[0], net(ids).detach(), atol=1e-5)


def test_export_restores_the_level_of_the_logger(tmp_path, caplog):
    pytest.importorskip("onnxscript", reason="needs the extra `engines`")
    caplog.set_level(logging.INFO, "torch.onnx")
    model = Model(Bigram(3, BLOCK).eval(), CharTokenizer("abc"), {}, {}, {}, 0)
    graph.write_onnx(model, tmp_path / "x.onnx")
    assert logging.getLogger("torch.onnx").level == logging.INFO


def test_model_above_the_limit_of_onnx_is_refused(tokenizer, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript", reason="needs the extra `engines`")
    monkeypatch.setattr(graph, "MAX_BYTES", 1000)
    path = save(tmp_path / "x.ckpt", build("default", tokenizer), tokenizer)
    assert main(["export", "onnx", str(path), "x.onnx"]) == 2
    assert "too many for one ONNX file" in capsys.readouterr().err


def test_block_of_one_token_is_refused(tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="needs the extra `engines`")
    tokenizer = CharTokenizer("abc")
    save(tmp_path / "x.ckpt", Bigram(3, 1), tokenizer)
    assert main(["export", "onnx", "x.ckpt", "x.onnx"]) == 2
    assert "block_size 1 cannot be exported to ONNX" in capsys.readouterr().err
    assert not (tmp_path / "x.onnx").exists()


def matches_in_onnxruntime(net, tokenizer, tmp_path, capfd):
    pytest.importorskip("onnxscript", reason="needs the extra `engines`")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `engines`")
    path = save(tmp_path / "x.ckpt", net, tokenizer)
    assert main(["export", "onnx", path, "x.onnx"]) == 0
    assert capfd.readouterr() == ("Wrote x.onnx from x.ckpt\n", "")
    assert {entry.name for entry in tmp_path.iterdir()} == {"x.ckpt", "x.onnx"}, "weights included"
    assert has_no_source_paths(tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession("x.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["block_size"] == str(BLOCK)
    cached = isinstance(net, Transformer) and net.make_cache(1) is not None
    assert len(session.get_inputs()) == 1 + cached

    def run(ids, past=None):
        if not cached:
            return session.run(None, {"ids": ids.numpy()})[0], None
        if past is None:
            fixed = [size if isinstance(size, int) else 0 for size in session.get_inputs()[1].shape]
            past = np.zeros([*fixed[:2], len(ids), *fixed[3:]], np.float32)
        return session.run(None, {"ids": ids.numpy(), "past": past})

    with torch.no_grad():
        for size in SIZES:
            ids = torch.randint(tokenizer.vocab_size, size)
            np.testing.assert_allclose(run(ids)[0], net(ids), atol=1e-4)
        ids, past, logits = torch.randint(tokenizer.vocab_size, (2, BLOCK)), None, []
        reads_all = isinstance(net, Transformer) and not cached
        for first, last in ((0, BLOCK),) if reads_all else ((0, 3), (3, 4), (4, 5), (5, 11), (11, BLOCK)):
            some, past = run(ids[:, first:last], past)
            logits.append(some)
        np.testing.assert_allclose(np.concatenate(logits, 1), net(ids), atol=1e-4)
    if cached and net.positions is None:  # a sliding window beyond block_size
        written = generate(net, ids[:1, :5], Sampling(max_new_tokens=2 * BLOCK, temperature=0))
        logits, past = run(ids[:1, :5])
        for token in written[0, 5:]:
            assert logits[0, -1].argmax() == token
            logits, past = run(token.view(1, 1), past[..., -(BLOCK - 1) :, :])


@pytest.mark.filterwarnings("ignore:vocab_size")
@pytest.mark.parametrize(
    ("word", "module", "words"),
    [("onnxruntime", "onnxruntime", ["onnx", "model.onnx"]), ("torch.export", "torch", ["torch", "model.pt2"])],
)
def test_documented_code_runs(word, module, words, tokenizer, tmp_path, capsys):
    pytest.importorskip(module, reason="needs the extra `engines`")
    net = build("default", tokenizer)
    assert main(["export", words[0], save(tmp_path / "x.ckpt", net, tokenizer), words[1]]) == 0
    capsys.readouterr()
    names = {}
    exec(documented(word), names)
    if word == "onnxruntime":
        sampling = Sampling(max_new_tokens=100, temperature=0)
        written = generate(net, torch.tensor([tokenizer.encode("ROMEO:")]), sampling)
        assert names["ids"] == written[0].tolist()
        assert capsys.readouterr().out.startswith("ROMEO:")
    else:
        assert names["logits"].shape == (1, 3, tokenizer.vocab_size)


def test_metadata(tokenizer):
    about = metadata(Model(Bigram(9, BLOCK), CharTokenizer("ab\n", add_eos=True), {}, {}, {}, 0))
    assert {name: json.loads(value) for name, value in about.items() if name != "tokenizer.json"} == {
        "vocab_size": 9,
        "block_size": BLOCK,
        "bos_id": 3,
        "eos_id": 3,
        "newline": "\n",
        "supports_sliding_window": True,
    }
    assert json.loads(about["tokenizer.json"])["added_tokens"] == [], "end of text is no token of a text"
    about = metadata(Model(build("gpt2", tokenizer), tokenizer, {}, {}, {}, 0))
    names = "bos_id", "eos_id", "supports_sliding_window"
    assert [json.loads(about[name]) for name in names] == [*tokenizer.encode("\n"), None, False]


def test_the_tokenizer_of_a_graph_encodes_as_lmlight_does(corpus_text):
    """Without what a tokenizer.json adds, cuts off and pads; literal added tokens stay."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `hf`")
    content = json.loads(byte_level_bpe(corpus_text).to_str())
    content["added_tokens"].append({**content["added_tokens"][0], "id": len(content["model"]["vocab"])})
    content["added_tokens"][-1] |= {"content": "    ", "special": False}
    start = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": start,
    }
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 24}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    content["padding"] |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    tokenizer = HFTokenizer(json.dumps(content).encode())
    about = metadata(Model(Bigram(tokenizer.vocab_size, BLOCK), tokenizer, {}, {}, {}, 0))
    theirs = tokenizers.Tokenizer.from_str(about["tokenizer.json"])
    text = "MIRA:\n    the    river flows, <|endoftext|> and flows"
    assert theirs.encode(text).ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


class Loop(Bigram):
    def forward(self, idx):
        logits = super().forward(idx).unbind(1)
        return torch.stack([sum(logits[: t + 1]) for t in range(idx.size(1))], 1)


@pytest.mark.parametrize(("format", "file"), [("onnx", "x.onnx"), ("torch", "x.pt2")])
def test_network_that_loops_over_tokens_is_refused(format, file, tokenizer, tmp_path, capsys):
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="needs the extra `engines`")
    path = save(tmp_path / "x.ckpt", Loop(tokenizer.vocab_size, BLOCK), tokenizer)
    assert main(["export", format, path, file]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Loop cannot be exported" in line and "must not loop over the batch or the tokens" in line
    assert not (tmp_path / file).exists(), "the exporter would write a file for one number of tokens"


class Bessel(Bigram):
    def forward(self, idx):
        return torch.special.bessel_j0(super().forward(idx))


def test_operation_without_an_onnx_equivalent_is_refused(tokenizer, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="needs the extra `engines`")
    path = save(tmp_path / "x.ckpt", Bessel(tokenizer.vocab_size, BLOCK), tokenizer)
    assert main(["export", "onnx", path, "x.onnx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Bessel cannot be exported" in line
    assert not (tmp_path / "x.onnx").exists()


def test_failed_export_leaves_no_files(tokenizer, tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "x.ckpt", build("bigram", tokenizer), tokenizer)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", "onnx", path, "x.onnx"]) == 2
    assert 'pip install "lmlight[onnx]"' in capsys.readouterr().err
    monkeypatch.setattr(
        torch.export, "save", lambda *args, **kwargs: exec("raise OSError(28, 'No space left on device')")
    )
    assert main(["export", "torch", path, "x.pt2"]) == 2
    assert "'" + str(tmp_path / "x.pt2") + "' cannot be written (No space left on device)" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.ckpt"]
    assert main(["export", "torch", path, "x.ckpt"]) == 2
    assert "--force" in capsys.readouterr().err
    checkpoint.read(tmp_path / "x.ckpt")


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
def test_full_disk_is_a_one_line_error(tokenizer, tmp_path):
    save(tmp_path / "x.ckpt", build("bigram", tokenizer), tokenizer)
    code = """if True:
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        from lmlight.__main__ import main
        sys.exit(main(["export", "torch", "x.ckpt", "x.pt2"]))
        """
    _, err = processes.run(code=code, status=2)
    assert err.count("\n") == 1, err
    assert "x.pt2' cannot be written (File too large)" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.ckpt"]
