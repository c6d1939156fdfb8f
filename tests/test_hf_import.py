"""Hugging Face import: our own exports and foreign models become checkpoints."""

import json
import sys
from functools import partial

import processes
import pytest
import torch
from exporting import OPTIONS, UNUSUAL, VOCAB, byte_level_bpe, make, save

from lmlight import checkpoint
from lmlight.__main__ import main
from lmlight.data.tokenizer import CharTokenizer, TokenizerConfig
from lmlight.export.model import Model
from lmlight.generation import Sampling, generate
from lmlight.training import cli

transformers = pytest.importorskip("transformers", reason="needs the extra `engines`")
safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra `hf`")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `hf`")
pytestmark = pytest.mark.filterwarnings("ignore:vocab_size")

BLOCK = 256
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": BLOCK}
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 88,  # not our default
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": BLOCK,
}
FAMILIES = {
    "GPT-2": ("gpt2", {}),
    "GPT-2, untied, other sizes": ("gpt2", {"tie_word_embeddings": False, "n_inner": 80, "layer_norm_epsilon": 1e-3}),
    "Llama": ("llama", {"rms_norm_eps": 1e-5}),
    "Llama, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "Llama, head size": ("llama", {"head_dim": 20}),
    "SmolLM2": ("llama", {"tie_word_embeddings": True, "rope_theta": 1e5}),
    "Mistral": ("mistral", {"rms_norm_eps": 1e-6, "sliding_window": 128}),
    "Qwen2": ("qwen2", {"rope_theta": 1e6}),
    "Qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "Qwen3": ("qwen3", {"head_dim": 12, "rms_norm_eps": 1e-3}),
    "Qwen3, head size": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def unigram(text):
    """As T5's: a space before each text, and no more than one."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    special = ["<unk>", "<|endoftext|>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=VOCAB, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    return tokenizer


@pytest.fixture
def foreign(tmp_path, corpus_text):
    """Returns a function that saves a model with transformers in `theirs` and returns it."""

    def build(kind="llama", make_tokenizer=byte_level_bpe, shard="1GB", **options):
        torch.manual_seed(0)
        tokenizer = make_tokenizer(corpus_text)
        sizes = {**(GPT2 if kind == "gpt2" else LLAMA), "vocab_size": tokenizer.get_vocab_size(), **options}
        net = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()
        for parameter in net.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        net.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
        wrapped.save_pretrained(tmp_path / "theirs")
        return net

    return build


def tensors(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in safetensors.load_file(path).items()}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "qwen2"])
def test_export_import_export_gives_the_same_bytes(name, tmp_path, corpus_text):
    tokenizer = TokenizerConfig("unigram", 400).train(corpus_text)
    net = make(tokenizer, OPTIONS[name])
    assert main(["export", "hf", save(tmp_path / "a.ckpt", net, tokenizer), "a"]) == 0
    assert main(["import", "hf", "a", "b.ckpt"]) == 0
    assert main(["export", "hf", "b.ckpt", "b"]) == 0
    for file in ("model.safetensors", "tokenizer.json", "tokenizer.model", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    again = Model.read(tmp_path / "b.ckpt")
    assert again.net.config == net.config | ({"bias": True} if name == "gpt2, no bias" else {})  # zeros
    assert again.tokenizer.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", FAMILIES)
def test_foreign_model_computes_the_same_and_travels_back(name, foreign, tmp_path, capsys):
    kind, options = FAMILIES[name]
    make_tokenizer = partial(byte_level_bpe, kind="qwen2") if kind == "qwen2" else byte_level_bpe
    theirs = foreign(kind, make_tokenizer, **options)
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    assert "Note" not in capsys.readouterr().out
    model = Model.read(tmp_path / "ours.ckpt")
    ours = model.net
    assert ours.block_size == options.get("sliding_window", BLOCK)
    idx = torch.randint(VOCAB, (2, ours.block_size))
    with torch.no_grad():
        expected = theirs(idx).logits
        torch.testing.assert_close(ours(idx), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    new = 200 if ours.block_size == BLOCK else 100
    greedy = generate(ours, idx[:1, :8], Sampling(max_new_tokens=new, temperature=0, end_at_line=False))
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    assert greedy.tolist() == theirs.generate(idx[:1, :8], attention_mask=torch.ones(1, 8), **options).tolist()

    assert main(["export", "hf", "ours.ckpt", "again"]) == 0
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained("again").eval()
    # a Llama without biases travels as a Mistral, which can attend to a sliding window of the block size
    assert type(again) is (
        transformers.MistralForCausalLM if kind == "llama" and not ours.config["bias"] else type(theirs)
    )
    with torch.no_grad():
        torch.testing.assert_close(again(idx).logits, expected)
    assert transformers.AutoTokenizer.from_pretrained("again").eos_token == "<|endoftext|>"


@pytest.mark.parametrize("make_tokenizer", [byte_level_bpe, unigram])
def test_foreign_tokenizer_gives_the_same_ids(make_tokenizer, foreign, tmp_path, corpus_text):
    foreign(make_tokenizer=make_tokenizer)
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    assert main(["export", "hf", "ours.ckpt", "again"]) == 0
    ours = Model.read(tmp_path / "ours.ckpt").tokenizer
    assert ours.id_to_piece(ours.eos_id) == "<|endoftext|>"
    for folder in ("theirs", "again"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
        for text in (corpus_text, *UNUSUAL):
            assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
    assert ours.lossless == (make_tokenizer is byte_level_bpe)


def test_rows_without_a_token_are_left_out(foreign, tmp_path, capsys):
    theirs = foreign("qwen2", vocab_size=VOCAB + 8)
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    assert "8 embedding rows without a token were left out" in capsys.readouterr().out
    idx = torch.randint(VOCAB, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(Model.read(tmp_path / "ours.ckpt").net(idx), theirs(idx).logits[..., :VOCAB])


def test_weights_in_several_files(foreign, tmp_path, capsys):
    theirs = foreign(shard="20KB")
    folder = tmp_path / "theirs"
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    idx = torch.randint(VOCAB, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(Model.read(tmp_path / "ours.ckpt").net(idx), theirs(idx).logits)
    capsys.readouterr()
    min(folder.glob("*.safetensors")).unlink()
    assert main(["import", "hf", "theirs", "x.ckpt"]) == 2
    assert "the weights lack model." in capsys.readouterr().err


def test_names_and_buffers_of_gpt2_on_the_hub(foreign, tmp_path):
    theirs = foreign("gpt2")
    path = tmp_path / "theirs" / "model.safetensors"
    old = {name.removeprefix("transformer."): value for name, value in safetensors.load_file(path).items()}
    safetensors.save_file({**old, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, path)
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    idx = torch.randint(VOCAB, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(Model.read(tmp_path / "ours.ckpt").net(idx), theirs(idx).logits)


@pytest.mark.skipif(sys.platform != "linux", reason="measures peak memory as Linux reports it")
def test_import_takes_little_more_memory_than_the_weights(foreign, tmp_path):
    """130 MB in float32, half of that in the file."""
    foreign(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, torch_dtype="bfloat16")
    path = tmp_path / "theirs" / "model.safetensors"
    safetensors.save_file({name: value.bfloat16() for name, value in safetensors.load_file(path).items()}, path)
    out, _ = processes.run_afresh(
        code="""if True:
        import resource, sys
        from pathlib import Path
        import safetensors.torch, tokenizers
        from lmlight import checkpoint
        from lmlight.export import hf_import
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        model, _ = hf_import.read(Path("theirs"))
        checkpoint.write(model.to_checkpoint(), "ours.ckpt")
        size = sum(parameter.nbytes for parameter in model.net.parameters())
        print(size, (peak() - before) / size)
        """,
        cwd=tmp_path,
    )
    size, ratio = map(float, out.split())
    assert size > 100e6 and ratio < 1.2


@pytest.mark.parametrize(("kind", "sizes"), [("gpt2", GPT2), ("llama", LLAMA)])
def test_options_that_a_config_leaves_out_have_the_defaults_of_transformers(kind, sizes, foreign, tmp_path):
    foreign(kind)
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: config[name] for name in ("model_type", "vocab_size", *sizes)}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained("theirs").eval()
    assert main(["import", "hf", "theirs", "ours.ckpt"]) == 0
    idx = torch.randint(VOCAB, (2, BLOCK))
    with torch.no_grad():
        expected = theirs(idx).logits
        difference = (Model.read(tmp_path / "ours.ckpt").net(idx) - expected).abs().max()
    assert difference < 1e-5 * expected.abs().max()


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
        (
            {"model_type": "gpt_neox"},
            "expected model_type to be one of gpt2, llama, mistral, qwen2, qwen3, got gpt_neox",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "rope_type yarn"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "rope_type linear"),
        ({"attention_bias": True}, "biases in only one of attention and MLP"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"hidden_act": "relu"}, "hidden_act relu"),
        ({"num_hidden_layers": 3}, "the weights lack model.layers.2."),
        ({"num_hidden_layers": 1}, "the weights include model.layers.1."),
        ({"num_hidden_layers": "2"}, "needs an integer of at least 1 as num_hidden_layers, got '2'"),
        ({"intermediate_size": 96}, "expected 192 × 48 weights"),
        ({"hidden_size": 10**12}, "is not a valid model configuration"),
        ({"rms_norm_eps": "small"}, "is not a valid model configuration"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "different rope_parameters in some layers"),
        (
            {"tie_word_embeddings": True},
            "config.json has tie_word_embeddings true, but lm_head.weight differs",
        ),
        ({"model_type": "mistral", "sliding_window": 1.5}, "needs an integer of at least 1 as sliding_window, got 1.5"),
        ({"rope_parameters": ["yarn"]}, "is not a valid model configuration"),
        ({"num_key_value_heads": 3}, "n_head must be a multiple of n_kv_head"),
    ):
        change(theirs / "config.json", **values)
        refused(message)
        (theirs / "config.json").write_text(config)
    for damaged, message in (
        ('{"model_type": "llama"}', "needs an integer of at least 1 as hidden_size, got None"),
        (config[:50], "cannot be read"),
        ("[]", "not an object"),
    ):
        (theirs / "config.json").write_text(damaged)
        refused(message)
    (theirs / "config.json").unlink()
    refused("config.json' cannot be read")
    (theirs / "config.json").write_text(config)

    path = theirs / "model.safetensors"
    weights = path.read_bytes()
    path.rename(theirs / "pytorch_model.bin")
    refused("has no model.safetensors")
    (theirs / "pytorch_model.bin").unlink()
    for content, message in (
        (weights[:1000], "model.safetensors' cannot be read"),
        (weights[:-1000], "model.safetensors' cannot be read"),
        (b"\xff" * 8 + weights[8:], "model.safetensors' cannot be read"),
        (b"", "model.safetensors' cannot be read"),
    ):
        path.write_bytes(content)
        refused(message)
    path.write_bytes(weights)
    whole = safetensors.load_file(path)
    safetensors.save_file({**whole, "model.norm.weight": torch.ones(48, dtype=torch.int32)}, path)
    refused("expected floating-point weights in model.norm.weight, got torch.int32")
    safetensors.save_file({**whole, "model.norm.weight": torch.full((48,), torch.nan)}, path)
    refused("weights in model.norm.weight are not finite numbers")
    safetensors.save_file({**whole, "model.embed_tokens.weight": torch.ones(VOCAB - 8, 48)}, path)
    refused(f"expected {VOCAB} × 48 weights in model.embed_tokens.weight, got {VOCAB - 8} × 48")
    path.write_bytes(weights)

    tokenizer = (theirs / "tokenizer.json").read_text()
    (theirs / "tokenizer.json").write_text(tokenizer[:100])
    refused("tokenizer.json' cannot be read")
    (theirs / "tokenizer.json").unlink()
    refused("has no tokenizer.json")
    (theirs / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's, as Llama 3 has
    refused("has no tokenizer.json")
    (theirs / "tokenizer.json").write_text(tokenizer)
    assert main(["import", "hf", "theirs", "x.ckpt"]) == 0
    assert "lmlight fit --init_from=x.ckpt --data.corpus=my.txt" in capsys.readouterr().out


def test_existing_checkpoint_is_replaced_only_with_force(foreign, tmp_path, capsys):
    foreign()
    (tmp_path / "x.ckpt").write_text("precious")
    assert main(["import", "hf", "theirs", "x.ckpt"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "x.ckpt").read_text() == "precious"
    assert main(["import", "hf", "theirs", "x.ckpt", "--force"]) == 0
    assert Model.read(tmp_path / "x.ckpt").step == 0


@pytest.mark.parametrize("add_eos", [False, True])
def test_a_character_model_travels_back(add_eos, tmp_path, corpus_text):
    tokenizer = CharTokenizer(sorted(set(corpus_text)), add_eos)
    net = make(tokenizer, {})
    assert main(["export", "hf", save(tmp_path / "x.ckpt", net, tokenizer), "out"]) == 0
    assert main(["import", "hf", "out", "back.ckpt"]) == 0
    content = checkpoint.read(tmp_path / "back.ckpt")
    back = checkpoint.tokenizer_of(content)
    assert (back.encode(corpus_text), back.eos_id) == (tokenizer.encode(corpus_text), tokenizer.eos_id)
    assert all(torch.equal(content["state_dict"][f"net.{name}"], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("model", ["x", {"type": "Unigram"}, {"type": "Unigram", "vocab": [1, 2]}, {"vocab": []}])
def test_damaged_tokenizer_is_refused(model, tmp_path, corpus_text, capsys):
    tokenizer = CharTokenizer(sorted(set(corpus_text)))
    assert main(["export", "hf", save(tmp_path / "x.ckpt", make(tokenizer, {}), tokenizer), "out"]) == 0
    change(tmp_path / "out" / "tokenizer.json", model=model)
    assert main(["import", "hf", "out", "back.ckpt"]) == 2
    assert "tokenizer.json' cannot be read" in capsys.readouterr().err
