"""Folders of Hugging Face's, our own and foreign ones, become checkpoints of ours."""

import io
import json

import pytest
import sentencepiece as spm
import torch
from exporting import ONE_OF_EACH, make, save

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
    "intermediate_size": 88,  # not the width that ours would take
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def foreign_tokenizer(verse):
    """Laid out as Llama 2's: BPE with bytes, `<s>` and `</s>`, a space before each text, no piece for a newline."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(verse.split("\n")),
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
    """Makes a folder as transformers would save it; the net it holds."""

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


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "llama", "arcee"])
def test_export_import_export_gives_the_same_bytes(architecture, tmp_path, verse):
    tokenizer = TokenizerConfig("unigram", 400).train(verse)
    net = make(tokenizer, ONE_OF_EACH[architecture])
    assert main(["export", "hf", save(tmp_path / "a.ckpt", net, tokenizer), "a"]) == 0
    assert main(["import", "hf", "a", "b.ckpt"]) == 0
    assert main(["export", "hf", "b.ckpt", "b"]) == 0
    for name in ("model.safetensors", "tokenizer.json", "tokenizer.model", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
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
        ("arcee", {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "rms_norm_eps": 1e-4}),
    ],
    ids=str,
)
def test_a_foreign_net_says_the_same(kind, options, foreign, tmp_path):
    theirs = foreign(kind, **options)
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    ours = Model.read(tmp_path / "ours.ckpt").net
    assert ours.block_size == options.get("sliding_window", 32)
    idx = torch.randint(440, (2, ours.block_size))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits[..., :440], atol=1e-4, rtol=0)
        # and so does the path of one token, and what is exported again
        cached = generate(ours, idx[:, :4], Sampling(max_new_tokens=8, temperature=0))
        assert cached[0, 4] == ours(idx[:1, :4])[0, -1].argmax()
        assert main(["export", "hf", "ours.ckpt", "again"]) == 0
        again = transformers.AutoModelForCausalLM.from_pretrained("again")
        torch.testing.assert_close(ours(idx), again(idx).logits, atol=1e-4, rtol=0)


def test_a_foreign_tokenizer_becomes_lossless_with_the_same_pieces(foreign, tmp_path, foreign_tokenizer, capsys):
    foreign()
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    out = capsys.readouterr().out
    assert "no longer puts a space before a text" in out
    assert "8 of 448 tokens are not in tokenizer.model" in out
    tokenizer = Model.read(tmp_path / "ours.ckpt").tokenizer
    assert tokenizer.lossless
    before = spm.SentencePieceProcessor(model_proto=foreign_tokenizer)
    assert tokenizer.pieces == [before.id_to_piece(i) for i in range(440)]
    for text in ("MIRA:\n  river stone\n\n", "<s> 日本 ▁", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(" river") == before.encode("river"), "what followed the space that it put there"


def test_an_imported_net_is_one_to_go_on_with(foreign, tmp_path, verse_file, capsys):
    foreign()
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    prompts = ["--data.prompts=[MIRA]", "--model.sampling.max_new_tokens=5"]
    assert cli.main(["predict", "--ckpt_path=ours.ckpt", *prompts]) == 0
    few = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", f"--data.corpus={verse_file}"]
    assert cli.main(["fit", "--init_from=ours.ckpt", *few]) == 0
    (best,) = tmp_path.glob("runs/*/checkpoints/best.ckpt")
    assert checkpoint.read(best)["global_step"] == 2
    capsys.readouterr()
    assert cli.main(["fit", "--ckpt_path=ours.ckpt"]) == 2
    assert "pass it as --init_from" in capsys.readouterr().err


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_cannot_be_read_is_named(foreign, tmp_path, capsys):
    foreign()
    capsys.readouterr()  # transformers' progress
    theirs = tmp_path / "theirs"
    config = (theirs / "config.json").read_text()

    def refused(says):
        assert main(["import", "hf", "theirs", "x.ckpt"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert says in err
        assert [path.name for path in tmp_path.iterdir()] == ["theirs"]

    for values, says in (
        ({"model_type": "gpt_neox"}, "model_type gpt_neox is not Llama-shaped: llama, mistral, qwen3 and arcee"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "scaled rotary positions"),
        ({"attention_bias": True}, "a bias in the attention or the MLP alone"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"head_dim": 16}, "heads that are not hidden_size / heads wide"),
        ({"num_hidden_layers": 3}, "the weights lack model.layers.2."),
        ({"num_hidden_layers": 1}, "the weights hold model.layers.1."),
        ({"intermediate_size": 96}, "176 × 48, not 192 × 48"),
    ):
        change(theirs / "config.json", **values)
        refused(says)
        (theirs / "config.json").write_text(config)
    (theirs / "config.json").write_text('{"model_type": "llama"}')
    refused("config.json' lacks hidden_size")
    (theirs / "config.json").write_text(config[:50])
    refused("config.json' is damaged")
    (theirs / "config.json").unlink()
    refused("config.json' cannot be read")
    (theirs / "config.json").write_text(config)
    (theirs / "model.safetensors").rename(theirs / "model.bin")
    refused("holds no .safetensors file")
    (theirs / "model.bin").rename(theirs / "model.safetensors")
    weights = (theirs / "model.safetensors").read_bytes()
    (theirs / "model.safetensors").write_bytes(weights[:1000])
    refused("model.safetensors' cannot be read")
    (theirs / "tokenizer.model").write_bytes(b"nothing")
    refused("not a SentencePiece model")
    (theirs / "tokenizer.model").unlink()
    refused("is missing: only SentencePiece's")
    byte_level = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}
    (theirs / "tokenizer.json").write_text(json.dumps(byte_level))
    refused("is byte-level BPE: only SentencePiece's")


def test_a_checkpoint_is_not_overwritten_without_leave(foreign, tmp_path, capsys):
    foreign()
    (tmp_path / "x.ckpt").write_text("precious")
    assert main(["import", "hf", "theirs", "x.ckpt"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "x.ckpt").read_text() == "precious"
    assert main(["import", "hf", "theirs", "x.ckpt", "--force"]) == 0
    assert Model.read(tmp_path / "x.ckpt").step == 0
