"""Hugging Face import: our own exports and foreign models become checkpoints."""

import io
import json

import pytest
import sentencepiece as spm
import torch
from exporting import OPTIONS, make, save

from lmlight import checkpoint
from lmlight.__main__ import main
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.export.model import Model
from lmlight.generation import Sampling, generate
from lmlight.training import cli

transformers = pytest.importorskip("transformers", reason="needs the extra `engines`")
pytestmark = pytest.mark.filterwarnings("ignore:vocab_size")

SIZES = {
    "vocab_size": 448,
    "hidden_size": 48,
    "intermediate_size": 88,  # not our default
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def foreign_tokenizer(corpus_text):
    """Like that of Llama 2: BPE with byte fallback, `<s>` and `</s>`, a space before each text, no newline piece."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus_text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=440,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def foreign(tmp_path, foreign_tokenizer):
    """Returns a function that saves a model with transformers and returns its network."""

    def build(kind="llama", **options):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **{**SIZES, **options})
        net = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in net.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        net.save_pretrained(tmp_path / "theirs")
        (tmp_path / "theirs" / "tokenizer.model").write_bytes(foreign_tokenizer)
        return net

    return build


@pytest.mark.parametrize("name", [name for name in OPTIONS if not name.startswith("gpt2")])
def test_export_import_export_gives_the_same_bytes(name, tmp_path, corpus_text):
    tokenizer = TokenizerConfig("unigram", 400).train(corpus_text)
    net = make(tokenizer, OPTIONS[name])
    assert main(["export", "hf", save(tmp_path / "a.ckpt", net, tokenizer), "a"]) == 0
    assert main(["import", "hf", "a", "b.ckpt"]) == 0
    assert main(["export", "hf", "b.ckpt", "b"]) == 0
    for file in ("model.safetensors", "tokenizer.json", "tokenizer.model", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    again = Model.read(tmp_path / "b.ckpt")
    assert again.net.config == net.config
    assert again.tokenizer.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"rms_norm_eps": 1e-5}),
        ("llama", {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"rms_norm_eps": 1e-6, "sliding_window": 16}),
        ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        ("qwen3", {"rms_norm_eps": 1e-3, "head_dim": 12, "num_key_value_heads": 4}),
    ],
    ids=str,
)
def test_foreign_network_gives_the_same_logits(kind, options, foreign, tmp_path):
    theirs = foreign(kind, **options)
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    ours = Model.read(tmp_path / "ours.ckpt").net
    assert ours.block_size == options.get("sliding_window", 32)
    idx = torch.randint(440, (2, ours.block_size))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits[..., :440], atol=1e-4, rtol=0)
        cached = generate(ours, idx[:, :4], Sampling(max_new_tokens=8, temperature=0))
        assert cached[0, 4] == ours(idx[:1, :4])[0, -1].argmax()
        assert main(["export", "hf", "ours.ckpt", "again"]) == 0
        again = transformers.AutoModelForCausalLM.from_pretrained("again")
        torch.testing.assert_close(ours(idx), again(idx).logits, atol=1e-4, rtol=0)


def test_foreign_tokenizer_becomes_lossless_with_the_same_pieces(foreign, tmp_path, foreign_tokenizer, capsys):
    foreign()
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    out = capsys.readouterr().out
    assert "no longer adds a space in front of a text" in out
    assert "8 tokens that are not in tokenizer.model were left out" in out
    tokenizer = Model.read(tmp_path / "ours.ckpt").tokenizer
    assert tokenizer.lossless
    before = spm.SentencePieceProcessor(model_proto=foreign_tokenizer)
    assert tokenizer.pieces == [before.id_to_piece(i) for i in range(440)]
    for text in ("MIRA:\n  river stone\n\n", "<s> 日本 ▁", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(" river") == before.encode("river"), "the original adds a space"


def test_imported_checkpoint_predicts_and_finetunes(foreign, tmp_path, corpus_file, capsys):
    foreign()
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    prompts = ["--data.prompts=[MIRA]", "--model.sampling.max_new_tokens=5"]
    assert cli.main(["predict", "--ckpt_path=ours.ckpt", *prompts]) == 0
    few = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", f"--data.corpus={corpus_file}"]
    assert cli.main(["fit", "--init_from=ours.ckpt", *few]) == 0
    (best,) = tmp_path.glob("runs/*/checkpoints/best.ckpt")
    assert checkpoint.read(best)["global_step"] == 2
    capsys.readouterr()
    assert cli.main(["fit", "--ckpt_path=ours.ckpt"]) == 2
    assert "pass it as --init_from" in capsys.readouterr().err


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_unsupported_or_damaged_model_is_refused(foreign, tmp_path, capsys):
    foreign()
    capsys.readouterr()  # progress bars of transformers
    theirs = tmp_path / "theirs"
    config = (theirs / "config.json").read_text()

    def refused(message):
        assert main(["import", "hf", "theirs", "x.ckpt"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert message in err
        assert [path.name for path in tmp_path.iterdir()] == ["theirs"]

    for values, message in (
        ({"model_type": "gpt_neox"}, "expected a model_type of llama, mistral, qwen3, got gpt_neox"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "rope_type yarn"),
        ({"attention_bias": True}, "a bias in attention or MLP only"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"head_dim": 16}, "a head_dim other than hidden_size / heads"),
        ({"num_hidden_layers": 3}, "the weights lack model.layers.2."),
        ({"num_hidden_layers": 1}, "the weights include model.layers.1."),
        ({"intermediate_size": 96}, "expected 192 × 48 weights"),
    ):
        change(theirs / "config.json", **values)
        refused(message)
        (theirs / "config.json").write_text(config)
    for damaged, message in (('{"model_type": "llama"}', "config.json' lacks"), (config[:50], "cannot be read")):
        (theirs / "config.json").write_text(damaged)
        refused(message)
    (theirs / "config.json").unlink()
    refused("config.json' cannot be read")
    (theirs / "config.json").write_text(config)
    (theirs / "model.safetensors").rename(theirs / "model.bin")
    refused("has no .safetensors file")
    (theirs / "model.bin").rename(theirs / "model.safetensors")
    weights = (theirs / "model.safetensors").read_bytes()
    (theirs / "model.safetensors").write_bytes(weights[:1000])
    refused("model.safetensors' cannot be read")
    (theirs / "tokenizer.model").write_bytes(b"nothing")
    refused("only SentencePiece tokenizers can be imported")
    (theirs / "tokenizer.model").unlink()
    refused("only SentencePiece tokenizers can be imported")


def test_existing_checkpoint_is_replaced_only_with_force(foreign, tmp_path, capsys):
    foreign()
    (tmp_path / "x.ckpt").write_text("precious")
    assert main(["import", "hf", "theirs", "x.ckpt"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "x.ckpt").read_text() == "precious"
    assert main(["import", "hf", "theirs", "x.ckpt", "--force"]) == 0
    assert Model.read(tmp_path / "x.ckpt").step == 0
