"""Hugging Face export: transformers gives the same ids, logits and text."""

import dataclasses
import itertools
import json
import re
import shutil
import sys

import pytest
import torch
import yaml
from exporting import (
    BLOCK,
    OPTIONS,
    UNUSUAL,
    documented,
    make,
    random_texts,
    save,
    sentencepiece_model,
    shipped,
    shrunk,
)

from lmlight import checkpoint
from lmlight.__main__ import main
from lmlight.data import corpus
from lmlight.data.tokenizer import SentencePieceTokenizer, TokenizerConfig
from lmlight.errors import UserError
from lmlight.export import hf
from lmlight.export.architectures import match_architecture
from lmlight.export.model import Model
from lmlight.generation import Sampling, generate
from lmlight.models import Bigram, Transformer

transformers = pytest.importorskip("transformers", reason="needs the extra `engines`")
pytestmark = pytest.mark.filterwarnings("ignore:vocab_size")


@pytest.fixture(scope="module")
def tokenizers(corpus_text):
    return {kind: TokenizerConfig(kind, 500).train(corpus_text) for kind in ("unigram", "bpe", "char")}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "qwen2"])
def test_each_architecture_matches_in_transformers(name, tokenizers, tmp_path, corpus_text):
    net = make(tokenizers["unigram"], OPTIONS[name])
    assert match_architecture(net).model_type == name.split(",")[0]
    matches_in_transformers(net, tokenizers["unigram"], corpus_text, tmp_path)


@pytest.mark.parametrize("name", shipped("Transformer"))
def test_each_shipped_transformer_matches_in_transformers(name, tmp_path, corpus_text):
    matches_in_transformers(*shrunk(name, corpus_text), corpus_text, tmp_path)


def matches_in_transformers(net, tokenizer, text, tmp_path):
    assert main(["export", "hf", save(tmp_path / "x.ckpt", net, tokenizer), "out"]) == 0
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(loading.values()), "no missing, unexpected or mismatched weights"
    assert theirs.config.model_type == match_architecture(net).model_type
    assert type(theirs).__module__.startswith("transformers.")
    assert transformers.AutoTokenizer.from_pretrained("out")(text)["input_ids"] == tokenizer.encode(text)
    idx = torch.tensor(tokenizer.encode(text)[: 4 * BLOCK]).view(4, BLOCK)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, net(idx), atol=1e-4, rtol=0)
    written = generate(net, idx[:1, :7], Sampling(max_new_tokens=BLOCK - 7, temperature=0))
    assert torch.equal(written, theirs.generate(idx[:1, :7], do_sample=False, max_new_tokens=BLOCK - 7))


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_sliding_window_matches_beyond_block_size(architecture, tokenizers, tmp_path):
    net = make(tokenizers["unigram"], OPTIONS[architecture])
    assert main(["export", "hf", save(tmp_path / "x.ckpt", net, tokenizers["unigram"]), "out"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out")
    prompt = torch.arange(270, 280)[None]
    written = generate(net, prompt, Sampling(max_new_tokens=200, temperature=0))
    assert torch.equal(written, theirs.generate(prompt, do_sample=False, max_new_tokens=200))


def test_every_option_combination_is_exported_or_refused_with_advice(tokenizers):
    tokenizer, exported = tokenizers["char"], 0
    idx = torch.randint(tokenizer.vocab_size, (2, 9))
    choices = {
        "norm": ("rmsnorm", "layernorm"),
        "positions": ("rotary", "learned"),
        "mlp": ("gelu", "relu2", "swiglu"),
        "qk_norm": (True, False),
        "bias": (True, False),
        "tie": (True, False),
        "n_kv_head": (None, 2),
    }
    for values in itertools.product(*choices.values()):
        options = dict(zip(choices, values))
        net = make(tokenizer, {**options, "n_layer": 1})
        try:
            config = hf.config_json(Model(net, tokenizer, {}, {}, {}, 0))
        except UserError as error:
            advice = dict(re.findall(r"--model\.net\.(\w+)=(\w+)", str(error)))
            assert advice
            match_architecture(make(tokenizer, {**options, **{k: yaml.safe_load(v) for k, v in advice.items()}}))
            continue
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "torch_dtype"})
        ).eval()
        missing, unexpected = theirs.load_state_dict(hf.tensors(net), strict=False)
        assert not unexpected and set(missing) <= ({"lm_head.weight"} if options["tie"] else set())
        with torch.no_grad():
            torch.testing.assert_close(theirs(idx).logits, net(idx), atol=1e-4, rtol=0, msg=str(options))
        exported += 1
    assert exported == 20, "of 192"


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_ids_are_the_same_for_any_text(kind, tokenizers, tmp_path, corpus_text):
    ours = tokenizers[kind]
    assert main(["export", "hf", save(tmp_path / "x.ckpt", make(ours, {}), ours), "out"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained("out")
    assert len(theirs) == ours.vocab_size
    for text in (corpus_text, *UNUSUAL, *random_texts(300)):
        if kind == "char" and not set(text) <= set(ours.characters):
            with pytest.raises(UserError):
                ours.encode(text)
            with pytest.raises(Exception, match="unk"):
                theirs(text)
            continue
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text), text
        assert theirs.decode(ids) == text
        assert theirs.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_user_defined_pieces_have_the_same_ids(kind, tmp_path, corpus_text):
    pieces = ["\n", "<speaker>", "river", "a space", "\n\n", *(["\u2581\u2581"] if kind == "bpe" else [])]
    model = sentencepiece_model(corpus_text, model_type=kind, user_defined_symbols=pieces)
    ours = SentencePieceTokenizer(model)
    assert ours.lossless
    assert main(["export", "hf", save(tmp_path / "x.ckpt", make(ours, {}), ours), "out"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained("out")
    for text in ("<speaker>MIRA, the river<speaker>\n\nthe  rivers   rive", corpus_text, *UNUSUAL):
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text


@pytest.mark.network
def test_ids_are_the_same_for_all_of_shakespeare(tmp_path):
    text = corpus.load("tinyshakespeare").text
    for config in (TokenizerConfig(), TokenizerConfig("bpe"), TokenizerConfig("char")):
        ours = config.train(text[: len(text) * 9 // 10])
        assert main(["export", "hf", save(tmp_path / "x.ckpt", make(ours, {}), ours), "out", "--force"]) == 0
        assert transformers.AutoTokenizer.from_pretrained("out")(text)["input_ids"] == ours.encode(text)


def test_pipeline_generates_text(tokenizers, tmp_path, capsys):
    net = make(tokenizers["unigram"], {})
    assert main(["export", "hf", save(tmp_path / "x.ckpt", net, tokenizers["unigram"]), "out"]) == 0
    pipe = transformers.pipeline("text-generation", "out")
    (written,) = pipe("MIRA:\n  ", max_new_tokens=50)
    assert written["generated_text"].startswith("MIRA:\n  ")
    assert len(written["generated_text"]) > 20
    unprompted = pipe.model.generate(max_new_tokens=3)
    assert tokenizers["unigram"].decode(unprompted[0].tolist()).startswith("\n"), "starts after a newline, as ours"


def test_documented_code_runs(tokenizers, tmp_path, capsys):
    net = make(tokenizers["unigram"], {})
    assert main(["export", "hf", save(tmp_path / "x.ckpt", net, tokenizers["unigram"]), "hf-model"]) == 0
    capsys.readouterr()
    exec(documented("pipeline("), {})
    assert capsys.readouterr().out.startswith("ROMEO:")


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_end_of_text_is_the_only_special_token(kind, corpus_text, tmp_path):
    ours = TokenizerConfig(kind, 500).train(corpus_text + "<|endoftext|>", add_eos=True)
    end = ours.eos_id
    assert main(["export", "hf", save(tmp_path / "x.ckpt", make(ours, {}), ours), "out"]) == 0
    config = transformers.GenerationConfig.from_pretrained("out")
    assert (config.bos_token_id, config.eos_token_id) == (end, end)
    theirs, text = transformers.AutoTokenizer.from_pretrained("out"), "MIRA:<|endoftext|>\n"
    assert len(theirs) == ours.vocab_size
    assert theirs(text)["input_ids"] == ours.encode(text), "its name in a text is ordinary text"
    assert end not in ours.encode(text)
    assert theirs.decode([*ours.encode("MIRA:"), end], skip_special_tokens=True) == "MIRA:"


def test_model_card_and_files(tokenizers, tmp_path):
    path = save(tmp_path / "x.ckpt", make(tokenizers["bpe"], {}), tokenizers["bpe"], global_step=9)
    content = checkpoint.read(path)
    content[checkpoint.METADATA_KEY]["metrics"] = {"val/nats_per_char": 1.5, "val/bpc": 2.164}
    checkpoint.write(content, path)
    assert main(["export", "hf", path, "out", "--license", "cc0-1.0"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "license: cc0-1.0",
        "1.5000 nats per character, 2.1640 bits per character.",
        "for 9 steps",
        "model trained on corpus.txt",
        "qwen3",
    ):
        assert part in card
    assert "somewhere" not in card, "the folder of the corpus is private"
    assert {path.name for path in (tmp_path / "out").iterdir()} == hf.FILES
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["min_p"]) == (0.8, Sampling().min_p), "what predict would use"
    assert (generation["top_k"], generation["top_p"]) == (0, 1.0), "no filters, unlike the defaults of transformers"
    settings = {"data": {"corpus": "train.txt", "val_corpus": r"C:\Users\somebody\val.txt"}}
    model = Model(make(tokenizers["char"], {}), tokenizers["char"], {}, settings, {"val/nats_per_char": 1.5}, 9)
    assert "On a separate text, val.txt:" in hf.model_card(model, "mit")
    for url, name in {"https://u:pw@host/a/my.txt?token=pw": "my.txt", "https://u:pw@host/": "an unknown text"}.items():
        model = dataclasses.replace(model, settings={"data": {"corpus": url}})
        assert name in (card := hf.model_card(model, "mit")) and "pw" not in card
    assert "max_new_tokens" not in hf.generation_config_json(dataclasses.replace(model, sampling={"max_new_tokens": 0}))
    model = dataclasses.replace(model, settings={"data": {"corpus": "tinyshakespeare", "validate_on": "tune"}})
    assert "On a part of the text that was set aside for tuning:" in (card := hf.model_card(model, "mit"))
    assert '(".")("ROMEO:")' in card.replace('"text-generation", ', "")
    imported = hf.model_card(dataclasses.replace(model, settings={}, metrics={}, step=0), "mit")
    assert "imported and exported with lmlight" in imported
    assert "steps" not in imported
    assert "ROMEO" not in imported


class Capped(Transformer):
    def forward(self, idx, cache=None):
        return super().forward(idx, cache).tanh()


def test_failed_export_is_a_one_line_error_and_leaves_no_files(tokenizers, tmp_path, capsys, corpus_text):
    lossy = TokenizerConfig("unigram", 200, lossless=False).train(corpus_text)
    unigram = tokenizers["unigram"]
    cases = {
        "a Bigram cannot be exported": save(tmp_path / "1.ckpt", Bigram(unigram.vocab_size, 8), unigram),
        "a Capped cannot be exported": save(tmp_path / "4.ckpt", Capped(unigram.vocab_size, 8, n_layer=1), unigram),
        "--model.net.mlp=relu2": save(tmp_path / "2.ckpt", make(unigram, {"mlp": "gelu"}), unigram),
        "tokenizer is lossy": save(tmp_path / "3.ckpt", make(lossy, {}), lossy),
        "no checkpoint at": "nowhere.ckpt",
    }
    for message, path in cases.items():
        assert main(["export", "hf", path, "out"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert message in err
        assert {entry.suffix for entry in tmp_path.iterdir()} == {".ckpt"}


def test_existing_files_are_replaced_only_with_force(tokenizers, tmp_path, capsys):
    path = save(tmp_path / "x.ckpt", make(tokenizers["char"], {}), tokenizers["char"])
    (tmp_path / "out").mkdir()
    assert main(["export", "hf", path, "out"]) == 0, "an empty folder may be replaced"
    assert main(["export", "hf", path, "out"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", "hf", path, "out", "--force"]) == 0
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "own").mkdir()
    assert main(["export", "hf", path, "links", "--force"]) == 2
    shutil.rmtree(tmp_path / "links")
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert main(["export", "hf", path, "out", "--force"]) == 2
    assert "contains 'thesis.tex', which is not part of an export" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").exists()
    assert main(["export", "hf", path, "x.ckpt", "--force"]) == 2
    assert main(["export", "onnx", path, "./x.ckpt", "--force"]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "x.ckpt"]


def test_the_current_folder_is_no_target(tokenizers, tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "x.ckpt", make(tokenizers["char"], {}), tokenizers["char"])
    (tmp_path / "out" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "in")
    for target in (".", ".."):
        assert main(["export", "hf", path, target]) == 2
        assert "is the current folder or contains it" in capsys.readouterr().err
    assert list((tmp_path / "out" / "in").iterdir()) == []


def test_qwen2_needs_a_tokenizer_that_splits_as_its_own(tokenizers, tmp_path, capsys):
    path = save(tmp_path / "x.ckpt", make(tokenizers["unigram"], OPTIONS["qwen2"]), tokenizers["unigram"])
    assert main(["export", "hf", path, "out"]) == 2
    assert "transformers uses Qwen2's pre-tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_package_error_names_its_extra(tokenizers, tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "x.ckpt", make(tokenizers["char"], {}), tokenizers["char"])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["export", "hf", path, "out"]) == 2
    assert 'pip install "lmlight[hf]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
