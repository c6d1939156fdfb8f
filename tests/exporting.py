"""Helpers of the export tests: small networks, checkpoints and tokenizers, unusual texts, shrunk shipped configs, and code
blocks of docs/export.md. Needs no extra."""

import io
import random
import re
from pathlib import Path

import sentencepiece as spm
import torch
import yaml

from lmlight import checkpoint
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.models import GPT2, LLAMA, Bigram, Transformer

ROOT = Path(__file__).parents[1]
NETS = {"Bigram": Bigram, "Transformer": Transformer}
BLOCK = 32
SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32}
OPTIONS = {  # by model_type
    "qwen3": {},
    "qwen3, SwiGLU": {**LLAMA, "qk_norm": True, "tie": True},
    "qwen3, head size": {**LLAMA, "qk_norm": True, "head_size": 12, "n_kv_head": 2},
    "qwen2": {**LLAMA, "bias": "qkv", "n_kv_head": 2},
    "mistral": {**LLAMA, "n_kv_head": 2, "norm_eps": 1e-3, "rope_theta": 500.0},
    "llama": {**LLAMA, "bias": True, "n_kv_head": 2},
    "gpt2": GPT2,
    "gpt2, no bias": {**GPT2, "bias": False, "tie": False},
}
UNUSUAL = [
    "",
    "\n",
    "\n\n\n a\n",
    "  leading and  double  spaces ",
    "<s></s><unk><pad><0x41><0xE2><|endoftext|>",
    "\u2581\u2581 a\u2581b \u2581",
    "日本語 🙂 é n\u0303 \u200b\ufeff\ufffd",
    "\t\r\n\x00\x01\x7f\x85\u2028",
    "~@#{}[]^|\\`",
    " " * 30,
    "a" * 100 + "o" * 101,
]


def make(tokenizer, options, block_size=BLOCK):
    return perturbed(Transformer, tokenizer.vocab_size, block_size, **{**SIZES, **options})


def perturbed(kind, *sizes, **options):
    """Builds a network and adds noise to its weights: initial zeros and ones would hide mistakes."""
    torch.manual_seed(0)
    net = kind(*sizes, **options)
    for name, parameter in net.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.3 if "norm" in name or "bias" in name else 0.1))
    return net.eval()


VOCAB = 440
PRE_TOKENIZERS = ("gpt-2", "smollm", "qwen2", "llama-bpe")


def byte_level_bpe(text, kind="gpt-2"):
    """A tokenizer of `VOCAB` tokens, and the way in which it splits a text before its merges."""
    import tokenizers
    from tokenizers import Regex, pre_tokenizers

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*"
    words += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    by_kind = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": [pre_tokenizers.Split(Regex(words.replace("NUMBER", "")), "isolated")],
        "llama-bpe": [pre_tokenizers.Split(Regex(words.replace("NUMBER", "{1,3}")), "isolated")],
    }
    use_regex = kind in ("gpt-2", "smollm")
    steps = [*by_kind[kind], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def sentencepiece_model(text, **options):
    """The bytes of a SentencePiece model with 400 pieces that restores every text, unless `options` change that."""
    model = io.BytesIO()
    lossless = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    defaults = {**lossless, "vocab_size": 400, "byte_fallback": True, "user_defined_symbols": ["\n"], "minloglevel": 2}
    lines = iter(text.split("\n"))
    spm.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**defaults, **options})
    return model.getvalue()


def save(path, net, tokenizer, **more):
    settings, sampling = {"data": {"corpus": "somewhere/corpus.txt"}}, {"temperature": 0.8}
    state = {f"net.{k}": v for k, v in net.state_dict().items()}
    content = {
        "state_dict": state,
        checkpoint.METADATA_KEY: checkpoint.model_metadata(net, tokenizer, sampling, settings),
        **more,
    }
    checkpoint.write(content, path)
    return str(path)


def shipped(kind):
    """File names of the shipped configs with networks of this class: one for each architecture and kind of tokenizer."""
    names = {}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = yaml.safe_load(path.read_text("utf-8"))
        net = config.get("model", {}).get("net", {})
        if net.get("class_path") == kind:
            sizes = {**SIZES, "dropout": 0.0} if kind == "Transformer" else {}
            options = NETS[kind](9, 8, **{**net.get("init_args", {}), **sizes}).config
            tokenizer = TokenizerConfig(**{**config["data"].get("tokenizer", {}), "vocab_size": 400})
            names.setdefault(f"{options} {tokenizer}", path.name)
    return list(names.values())


def shrunk(name, text, block_size=BLOCK):
    """Builds a shipped config's network and tokenizer, with fewer and narrower layers and a small vocabulary."""
    config = yaml.safe_load((ROOT / "configs" / name).read_text("utf-8"))
    tokenizer = TokenizerConfig(**{**config.get("data", {}).get("tokenizer", {}), "vocab_size": 400}).train(text)
    net = config["model"]["net"]
    options = dict(net.get("init_args", {}))
    if net["class_path"] == "Transformer":
        options |= {"n_layer": 2, "n_embd": 8 * options.get("n_head", 4)}
    return perturbed(NETS[net["class_path"]], tokenizer.vocab_size, block_size, **options), tokenizer


def random_texts(count):
    """Short texts of letters, spaces, control tokens, byte pieces and characters outside the vocabulary."""
    draw = random.Random(0)
    alphabet = "etaoin shrdlu\n ,.<>s/unk0x41\u2581é日🙂~ST"
    return ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(count)]


def documented(word):
    """The first Python block of docs/export.md that contains `word`."""
    page = (ROOT / "docs" / "export.md").read_text("utf-8")
    return next(
        block for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if word in block
    )
