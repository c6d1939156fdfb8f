"""Each shipped config trains for a few steps."""

from pathlib import Path

import pytest
import torch
import yaml

from lmlight import checkpoint
from lmlight.training.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
# used on top of other configs; ddp and fsdp train in test_reliability.py with two processes
OVERLAYS = {CONFIGS / name for name in ("ddp.yaml", "fsdp.yaml", "mps.yaml")}
SHRINK = {
    "shakespeare-gpu.yaml": "data.block_size=32 data.batch_size=4 trainer.precision=32 model.net.n_embd=96",
    "gpt2-124m.yaml": "data.block_size=32 data.batch_size=8 trainer.accumulate_grad_batches=4 trainer.precision=32 "
    "model.net.n_layer=2 model.net.n_head=2 model.net.n_embd=32",
}


# flags that need a trained model
NEEDS = {
    "shakespeare-best.yaml": "--model.teachers=[{base}, {base}]",
    "finetune.yaml": "--init_from={base}",
    "finetune-lora.yaml": "--init_from={base}",
}


@pytest.mark.filterwarnings("ignore:vocab_size")
@pytest.mark.parametrize("path", sorted(set(CONFIGS.glob("*.yaml")) - OVERLAYS), ids=lambda path: path.name)
def test_config_trains(path, corpus_file, tmp_path, capsys):
    arguments = ["fit", f"--config={path}", f"--data.corpus={corpus_file}", "--data.tokenizer.vocab_size=400"]
    arguments += ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--trainer.limit_val_batches=2"]
    shrunk = SHRINK.get(path.name, "")
    if path.name in NEEDS:
        few = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.callbacks=null"]
        sizes = ["--data.block_size=256", "--data.batch_size=1", "--model.net.n_layer=1", "--model.net.n_embd=32"]
        data = [f"--data.corpus={corpus_file}", "--data.tokenizer.vocab_size=400"]
        assert main(["fit", *few, *sizes, *data, "--trainer.default_root_dir=base"]) == 0
        (base,) = tmp_path.glob("base/*/checkpoints/best.ckpt")
        arguments.append(NEEDS[path.name].format(base=base))
        if "finetune" in path.name:
            pytest.importorskip("peft", reason="needs the extra `lora`")
            arguments.remove("--data.tokenizer.vocab_size=400")  # the checkpoint's
    assert main([*arguments, *(f"--{flag}" for flag in shrunk.split())]) == 0, capsys.readouterr().err
    (best,) = tmp_path.glob("runs/*/checkpoints/best.ckpt")
    written = yaml.safe_load(path.read_text())["model"].get("net", {"class_path": "Transformer"})
    net = checkpoint.net_of(checkpoint.read(best))
    assert type(net).__name__ == written["class_path"]
    for name, value in written.get("init_args", {}).items():
        if f"net.{name}=" not in shrunk:
            assert net.config[name] == value


def test_shakespeare_config_spells_out_the_defaults(capsys):
    def config(*arguments):
        assert pytest.raises(SystemExit, main, ["fit", *arguments, "--print_config"]).value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        printed["model"]["net"]["class_path"] = printed["model"]["net"]["class_path"].split(".")[-1]
        return printed

    assert config(f"--config={CONFIGS / 'shakespeare.yaml'}") == config()


def test_mps_config_is_valid(capsys):
    """Other machines cannot run it."""
    with pytest.raises(SystemExit):
        main(["fit", f"--config={CONFIGS / 'mps.yaml'}", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["accelerator"] == "mps"
    if not torch.backends.mps.is_available():
        assert main(["fit", f"--config={CONFIGS / 'mps.yaml'}"]) == 2
        assert "MPSAccelerator" in capsys.readouterr().err


def test_gpt2_config_has_124m_parameters():
    from lmlight.models import GPT2, Transformer

    init_args = yaml.safe_load((CONFIGS / "gpt2-124m.yaml").read_text())["model"]["net"]["init_args"]
    assert GPT2.items() <= init_args.items()
    with torch.device("meta"):
        net = Transformer(50257, 1024, **init_args)
    assert sum(p.numel() for p in net.parameters()) == 124_439_808  # GPT-2's own count
