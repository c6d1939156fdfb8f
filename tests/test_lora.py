"""Finetuning with low-rank adapters, and gradient checkpointing."""

import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
import torch

from lmlight import LanguageModel, LoRAModel, checkpoint
from lmlight.__main__ import main
from lmlight.errors import UserError
from lmlight.generation.fast_decoder import FastDecoder
from lmlight.models import LLAMA, transformer
from lmlight.training.module import STATES

ADAPT = ["--model=lmlight.LoRAModel", "--model.rank=2", "--trainer.callbacks=null", "--trainer.val_check_interval=2"]
ADAPT += [flag for flag in tiny.FLAGS if not flag.startswith(("--model.net", "--data.tokenizer"))]


@pytest.fixture
def base(tmp_path, corpus_file, monkeypatch):
    """A trained model, in the current folder."""
    pytest.importorskip("peft", reason="needs the extra `lora`")
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.callbacks=null"]
    assert main(["fit", *tiny.FLAGS, *few, f"--data.corpus={corpus_file}", "--trainer.default_root_dir=base"]) == 0
    (best,) = Path("base").glob("*/checkpoints/best.ckpt")
    shutil.copy(best, "base.ckpt")
    shutil.rmtree("base")
    return tmp_path / "base.ckpt"


def finetune(corpus_file, *words, steps=4):
    return main(["fit", *ADAPT, f"--data.corpus={corpus_file}", f"--trainer.max_steps={steps}", *words])


def nats(capsys, *words):
    capsys.readouterr()
    assert main(["validate", *words]) == 0
    return next(float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if "nats_per_char" in line)


def test_only_adapters_are_trained_and_stored(base, corpus_file, capsys):
    assert finetune(corpus_file, "--init_from=base.ckpt") == 0
    weights = sum(value.numel() for value in checkpoint.read(base)["state_dict"].values())
    (best,) = Path("runs").glob("*/checkpoints/best.ckpt")
    stored = checkpoint.load(best)
    assert all("lora_" in name for name in stored["state_dict"])
    assert len(stored["state_dict"]) == 8  # two for each linear layer
    assert sum(len(group["params"]) for group in stored["optimizer_states"][0]["param_groups"]) == 8
    added = sum(value.numel() for value in stored["state_dict"].values())
    assert f"Training {added:,} of {weights + added:,} parameters" in capsys.readouterr().out
    before, after = checkpoint.read(base)["state_dict"], checkpoint.read(best)["state_dict"]
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"qkv", "output", "up", "down"}


def test_every_command_reads_the_merged_model(base, corpus_file, capsys):
    words = ["--init_from=base.ckpt", "--model.alpha=64.5", "--model.optimizer.lr=0.05"]
    assert finetune(corpus_file, *words) == 0
    out = capsys.readouterr().out
    (best,) = Path("runs").glob("*/checkpoints/best.ckpt")
    during = checkpoint.load(best)["lmlight"]["metrics"]["val/nats_per_char"]
    scores = {path: nats(capsys, f"--ckpt_path={path}", f"--data.corpus={corpus_file}") for path in (base, best)}
    assert scores[best] == pytest.approx(during, abs=2e-4) != pytest.approx(scores[base], abs=2e-4), out
    assert main(["export", "hf", str(best), "exported"]) == 0
    assert main(["import", "hf", "exported", "again.ckpt"]) == 0
    merged, again = (checkpoint.weights_of(checkpoint.read(path)) for path in (best, "again.ckpt"))
    assert all(torch.equal(merged[name], again[name]) for name in merged)


AVERAGE = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.8"]


@pytest.mark.parametrize("more", [[], AVERAGE], ids=["", "with averaged weights"])
def test_resumed_run_equals_an_uninterrupted_one(base, corpus_file, more):
    states = []
    for name, steps in (("whole", 4), ("parts", 2)):
        words = [
            "--init_from=base.ckpt",
            "--model.schedule.shape=constant",
            f"--trainer.default_root_dir={name}",
            *more,
        ]
        assert finetune(corpus_file, *words, steps=steps) == 0
        (last,) = Path(name).glob("*/checkpoints/last.ckpt")
        if name == "parts":
            root = "--trainer.default_root_dir=parts"
            assert main(["fit", f"--ckpt_path={last}", root, "--trainer.max_steps=4"]) == 0
        content = checkpoint.load(last)
        states.append([content[state] for state in STATES if state in content])
    assert len(states[0]) == (2 if more else 1)
    for whole, parts in zip(*states):
        assert len(whole) == 8, "the adapters only"
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_adapters_of_an_adapted_model(base, corpus_file):
    for root, start in (("first", "base.ckpt"), ("second", "first.ckpt")):
        assert finetune(corpus_file, f"--init_from={start}", f"--trainer.default_root_dir={root}") == 0
        (best,) = Path(root).glob("*/checkpoints/best.ckpt")
        shutil.copy(best, f"{root}.ckpt")
    assert LanguageModel.load_from_checkpoint("second.ckpt").generate("MIRA:", max_new_tokens=3).startswith("MIRA:")


@pytest.mark.parametrize("targets", [("qkv", "output", "up", "down"), ("head",)], ids=str)
def test_generation_and_loss_use_the_adapters(targets, base, monkeypatch):
    torch.manual_seed(0)
    model = LoRAModel(rank=2, targets=targets, init_from=checkpoint.read(base), net=tiny.net)
    model.configure_model()
    assert not FastDecoder.supports(model.net)
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        for name, parameter in model.net.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        expected = model.eval()(prompt)[0, -1].argmax()
    assert model.generate(prompt, max_new_tokens=1, temperature=0)[0, -1] == expected
    loss = model.net.loss(prompt, prompt)
    monkeypatch.setattr(transformer, "CHUNKED_LOSS_MIN_LOGITS", 0)
    torch.testing.assert_close(model.net.loss(prompt, prompt), loss)


def test_unusable_bases_and_arguments_are_one_line(base, corpus_file, capsys):
    assert finetune(corpus_file, "--init_from=base.ckpt") == 0
    (best,) = Path("runs").glob("*/checkpoints/best.ckpt")
    for words, message in {
        (): "LoRAModel finetunes a model: pass its checkpoint as --init_from",
        ("--init_from=base.ckpt", "--model.rank=0"): "expected model.rank of at least 1",
        ("--init_from=base.ckpt", "--model.targets=[nothing]"): "the network has no module 'nothing'",
        ("--init_from=base.ckpt", "--model.targets=[qkv,ouput]"): "the network has no module 'ouput'",
        ("--init_from=base.ckpt", "--model.targets=[embedding]"): "'embedding' is not a linear layer",
    }.items():
        capsys.readouterr()
        assert finetune(corpus_file, *words) == 2
        assert message in (error := capsys.readouterr().err) and "Traceback" not in error

    for words in (["--model.rank=3"], ["--model.targets=[qkv]"]):
        capsys.readouterr()
        assert main(["fit", f"--ckpt_path={best}", "--trainer.max_steps=6", *words]) == 2
        assert "a resumed run cannot change model.rank or model.targets" in (error := capsys.readouterr().err)
        assert "Traceback" not in error

    def damage():
        content = checkpoint.load(base)
        content["state_dict"] = {name: value + 1 for name, value in content["state_dict"].items()}
        checkpoint.write(content, base)

    for change in (damage, base.unlink):
        change()
        for words in (["predict"], ["fit", "--trainer.max_steps=6"]):
            capsys.readouterr()
            assert main([*words, f"--ckpt_path={best}"]) == 2
            error = capsys.readouterr().err
            assert (
                "which is missing or has changed since: put that checkpoint back" in error and "Traceback" not in error
            )


def test_python_gets_an_error_without_a_base(corpus_file):
    pytest.importorskip("peft", reason="needs the extra `lora`")
    trainer = pl.Trainer(**tiny.QUIET, max_steps=1, enable_checkpointing=False)
    with pytest.raises(UserError, match="pass its checkpoint as --init_from"):
        trainer.fit(LoRAModel(net=tiny.net), datamodule=tiny.data(corpus_file))


def test_trained_adapters_return_to_the_calling_process(base):
    """`ddp_spawn` loads the state dict of the trained model into one that has no network yet, without `strict`."""
    content = checkpoint.read(base)
    trained, ours = (LoRAModel(net=tiny.net, rank=2, init_from=content) for _ in range(2))
    trained.configure_model()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    assert ours.load_state_dict(trained.state_dict(), strict=False) == ([], [])
    idx = torch.arange(16)[None]
    assert torch.equal(trained.eval()(idx), ours.eval()(idx))


# Gradient checkpointing


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, LLAMA], ids=str)
def test_gradient_checkpointing_changes_no_weight(options, corpus_file):
    weights = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(lambda *sizes: tiny.net(*sizes, **options), gradient_checkpointing=recompute)
        trainer = pl.Trainer(**tiny.QUIET, max_steps=3, limit_val_batches=0, enable_checkpointing=False)
        trainer.fit(model, datamodule=tiny.data(corpus_file))
        assert model.net.recomputes_blocks == recompute
        weights.append(model.net.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name])


def test_gradient_checkpointing_needs_a_transformer(corpus_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [flag for flag in tiny.FLAGS if not flag.startswith("--model.net")]
    words += [f"--data.corpus={corpus_file}", "--model.net=Bigram", "--model.gradient_checkpointing=true"]
    assert main(["fit", *words]) == 2
    assert "gradient_checkpointing needs a Transformer, got a Bigram" in capsys.readouterr().err
