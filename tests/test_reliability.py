"""Killed, resumed, moved, distributed and concurrent runs, in processes of their own."""

import math
import os
import random
import re
import shutil
import signal
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning.pytorch as pl
import processes
import pytest
import tiny
import torch
import yaml

from lmlight import LanguageModel, checkpoint
from lmlight.errors import UserError
from lmlight.models import Bigram
from lmlight.training.checkpointing import AtomicCheckpointIO, BestLastCheckpoint
from lmlight.training.cli import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL and limits on file sizes")

TINY = ["--data.corpus=../corpus.txt", *tiny.FLAGS]
# an epoch is 13 steps of two micro-batches
HARD = [
    *TINY,
    "--model.net.dropout=0.2",
    "--data.subword_sampling.alpha=0.3",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=14",
    "--trainer.max_steps=30",
]
# Runs the command line with a callback that acts at the start of a given step.
ACT_AT_STEP = """
import os, signal, sys
from lightning.pytorch import Callback
from lmlight.training import cli

class Act(Callback):
    def on_train_batch_start(self, trainer, model, batch, index):
        if trainer.global_step == {step} and index % trainer.accumulate_grad_batches == 0:
            {act}

instantiate = cli.LmlightCLI.instantiate_trainer
def instantiate_with_act(self):
    trainer = instantiate(self)
    trainer.callbacks.insert(0, Act())
    return trainer
cli.LmlightCLI.instantiate_trainer = instantiate_with_act
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus_text):
    """The parent folder of all runs, with the corpus and a shared cache."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "corpus.txt").write_bytes(corpus_text.encode())
    return folder


def options_in(folder):
    folder.mkdir(exist_ok=True)
    return {"cwd": folder, "env": processes.environment(LMLIGHT_CACHE=str(folder.parent / "cache"))}


def run(folder, *arguments, **options):
    """Runs `lmlight ARGUMENTS`, or `code`, in `folder` in a forked process."""
    return processes.run(*arguments, **options_in(folder), **options)


def run_afresh(folder, *arguments, **options):
    """The same in a new interpreter: strategy `ddp` repeats the command to start other processes."""
    return processes.run_afresh(*arguments, **options_in(folder), **options)


def last(folder):
    (path,) = folder.glob("runs/*/checkpoints/last.ckpt")
    return checkpoint.check(checkpoint.load(path), path)  # `read` adds the path


def scalars(folder):
    """All scalars of a run, or of the only run in `folder`, except throughput."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.glob("runs/*") if (folder / "runs").exists() else [folder]
    events = EventAccumulator(str(path)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("throughput/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def differences(a, b, path=""):
    """Returns all differences between two checkpoints, except times."""
    if path.endswith("seconds"):
        return []
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}.{key}" for key in a.keys() ^ b.keys()]
        return missing + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [f"{path}: {a} != {b}"]


@pytest.fixture(scope="module")
def straight(place):
    run(place / "straight", "fit", *HARD)
    return place / "straight"


def test_differences_helper_finds_differences(straight):
    content, other = last(straight), last(straight)
    assert differences(content, other) == []
    other["state_dict"]["net.embedding.weight"][0, 0] += 1e-7
    other["loops"]["fit_loop"]["epoch_progress"]["total"]["ready"] += 1
    assert len(differences(content, other)) == 2


@pytest.mark.parametrize(("step", "workers"), [(9, 2), (22, 0)], ids=["within an epoch", "in a later epoch"])
def test_resume_after_kill_is_exact(place, straight, step, workers):
    """With dropout, subword sampling, accumulation, workers, validations and samples."""
    folder = place / f"killed-{step}"
    flags = [*HARD, f"--data.num_workers={workers}"]
    run(
        folder, "fit", *flags, code=ACT_AT_STEP.format(step=step, act="os.kill(os.getpid(), signal.SIGKILL)"), status=-9
    )
    assert last(folder)["global_step"] < step
    run(folder, "fit", "--ckpt_path=last")  # without the flags of the run
    expected, content = last(straight), last(folder)
    expected["lmlight"]["settings"]["data"]["num_workers"] = workers
    assert differences(expected, content) == []
    assert scalars(folder) == scalars(straight), "steps or values differ"


def test_resume_keeps_the_samples_of_the_last_validation(trained, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.copytree(trained, run := tmp_path / "runs" / "run")
    monkeypatch.chdir(tmp_path)
    text = f"--data.corpus={trained.parents[2] / 'corpus.txt'}"
    tag = "samples/empty prompt/text_summary"
    before = [event.step for event in EventAccumulator(str(run)).Reload().Tensors(tag)]
    assert before
    steps = f"--trainer.max_steps={last(tmp_path)['global_step'] + 2}"
    assert main(["fit", "--ckpt_path=last", text, steps]) == 0
    assert [event.step for event in EventAccumulator(str(run)).Reload().Tensors(tag)][: len(before)] == before


def epochs(content):
    states = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return [(state["epoch"], state["windows"]) for state in states]


def test_resume_at_epoch_boundary_is_exact(place):
    """Checkpoints fall on epoch ends. The run is killed three times, also after a resume."""
    flags = [*HARD, "--trainer.val_check_interval=26", "--trainer.max_steps=60"]
    run(place / "straight-epochs", "fit", *flags)
    folder = place / "epochs"
    for step in (20, 35, 45):
        settings = ["--ckpt_path=last"] if step > 20 else flags
        act = "os.kill(os.getpid(), signal.SIGKILL)"
        run(folder, "fit", *settings, code=ACT_AT_STEP.format(step=step, act=act), status=-9)
        assert last(folder)["global_step"] == step // 13 * 13, "an epoch is 13 steps"
    run(folder, "fit", "--ckpt_path=last")
    found = differences(last(place / "straight-epochs"), last(folder))
    assert [difference for difference in found if "epoch_progress" not in difference] == []  # Lightning's own count
    expected = scalars(place / "straight-epochs")
    assert {**scalars(folder), "epoch": None} == {**expected, "epoch": None}


def test_signal_at_epoch_end_waits_for_the_next_step(place, straight):
    folder = place / "epoch-end"
    act = "os.kill(os.getpid(), signal.SIGTERM)"
    run(folder, "fit", *HARD, code=ACT_AT_STEP.format(step=12, act=act), status=143)
    assert last(folder)["global_step"] == 14
    assert epochs(last(folder)) == [(1, 8)]
    run(folder, "fit", "--ckpt_path=last")
    assert differences(last(straight), last(folder)) == []
    assert scalars(folder) == scalars(straight)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_resume_after_signal_is_exact(place, straight, number, status):
    folder = place / f"left-{status}"
    act = f"os.kill(os.getpid(), {int(number)})"
    _, err = run(folder, "fit", *HARD, code=ACT_AT_STEP.format(step=17, act=act), status=status)
    assert last(folder)["global_step"] == 18
    assert f"{number.name} at step 18" in err
    assert "Traceback" not in err
    where = err.split("--ckpt_path ")[1].strip()
    run(folder, "fit", f"--ckpt_path={where}")
    assert differences(last(straight), last(folder)) == []
    assert scalars(folder) == scalars(straight)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_resume_after_twenty_random_kills_is_exact(place):
    """SIGKILL at any moment, also while starting, validating or writing a checkpoint."""
    flags = [*HARD, "--trainer.max_steps=4000", "--trainer.val_check_interval=50", "--trainer.log_every_n_steps=10"]
    start = time.monotonic()
    run(place / "long", "fit", *flags, timeout=600)
    step_seconds = (time.monotonic() - start) / 4000
    folder, draw = place / "twenty", random.Random(0)
    kills = resumed = 0
    while True:
        resumes = bool(list(folder.glob("runs/*/checkpoints/last.ckpt")))
        settings = ["--ckpt_path=last"] if resumes else flags
        process = processes.start("fit", *settings, **options_in(folder))
        if kills == 20:
            _, err = process.communicate(timeout=600)
            assert process.returncode == 0, err
            break
        if kills % 4 and process.stdout.readline():  # "Training ...": most kills come after it
            time.sleep(draw.uniform(0, 200) * step_seconds)
        else:
            time.sleep(draw.uniform(0, 500) * step_seconds)
        process.kill()
        process.communicate()
        assert process.returncode == -9, "the run was over before it was killed"
        kills, resumed = kills + 1, resumed + resumes
        step = last(folder)["global_step"] if resumes else 0
        print(f"kill {kills}: the last checkpoint is of step {step}")
    print(f"{kills} kills, {resumed} of them in resumed runs")
    assert resumed > 10
    (path,) = [run for run in folder.glob("runs/*") if (run / "checkpoints").exists()]
    (straight_path,) = (place / "long").glob("runs/*")
    contents = [checkpoint.load(run / "checkpoints/last.ckpt") for run in (straight_path, path)]
    assert differences(*contents) == []
    assert scalars(path) == scalars(straight_path)


def test_resume_stops_at_max_epochs(trained, tmp_path, monkeypatch, capsys):
    """After several resumes, although Lightning's count of epochs falls behind. An epoch is 13 steps."""
    monkeypatch.chdir(tmp_path)
    flags = [f"--data.corpus={trained.parents[2] / 'corpus.txt'}", *tiny.FLAGS, "--trainer.max_steps=-1"]
    flags += ["--trainer.callbacks=UpdateRatio", "--data.batch_size=16", "--trainer.val_check_interval=5"]
    assert main(["fit", *flags, "--trainer.max_epochs=1"]) == 0
    steps = last(tmp_path)["global_step"]
    for epochs in (1, 2, 2, 3, 4, 4):
        assert main(["fit", "--ckpt_path=last", f"--trainer.max_epochs={epochs}"]) == 0, capsys.readouterr().err
        assert last(tmp_path)["global_step"] == epochs * steps
        assert last(tmp_path)["lr_schedulers"][0]["last_epoch"] == epochs * steps


def test_second_signal_ends_at_once(place):
    act = "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM); print('still here')"
    folder = place / "twice"
    out, _ = run(folder, "fit", *HARD, code=ACT_AT_STEP.format(step=17, act=act), status=143)
    assert "still here" not in out
    assert last(folder)["global_step"] == 14


def test_exception_keeps_the_last_checkpoint(place):
    folder = place / "exception"
    _, err = run(folder, "fit", *HARD, code=ACT_AT_STEP.format(step=17, act="raise KeyError('oops')"), status=1)
    assert "oops" in err
    assert last(folder)["global_step"] == 14


def test_max_time_leaves_a_checkpoint(place):
    folder = place / "time"
    out, _ = run(folder, "fit", *HARD, "--trainer.max_steps=100000", "--trainer.max_time=00:00:00:01")
    step = last(folder)["global_step"]
    assert re.search(rf"Stopped at step {step} of 100000; to resume: .* fit --ckpt_path runs/.*/last\.ckpt\n", out)
    assert 0 < step < 100_000
    # the limit is not resumed: neither from the config nor, as used up, from the checkpoint
    out, _ = run(folder, "fit", f"--trainer.max_steps={step + 3}", "--ckpt_path=last")
    assert f"at step {step}, with trainer.max_steps: 100000 -> {step + 3}\n" in out
    assert last(folder)["global_step"] == step + 3
    run(folder, "fit", f"--trainer.max_steps={step + 5}", "--trainer.max_time=00:00:01:00", "--ckpt_path=last")
    assert last(folder)["global_step"] == step + 5


DDP = ["--trainer.max_steps=14", "--trainer.val_check_interval=7"]


@pytest.fixture(scope="module")
def alone(place):
    run(place / "alone", "fit", *TINY, *DDP, "--trainer.precision=64-true")
    return place / "alone"


@pytest.mark.parametrize(("strategy", "devices"), [("ddp", 2), ("ddp_fork", 4)])
def test_ddp_run_equals_a_single_process_run(place, alone, strategy, devices):
    folder = place / f"ddp-{devices}"
    flags = [f"--trainer.strategy={strategy}", "--trainer.precision=64-true", f"--trainer.devices={devices}"]
    (run_afresh if strategy == "ddp" else run)(folder, "fit", *TINY, *DDP, *flags)
    assert len(list(folder.glob("runs/*"))) == 1
    expected, found = scalars(alone), scalars(folder)
    assert expected.keys() == found.keys()
    for tag in expected:
        for (step, value), (step_too, value_too) in zip(expected[tag], found[tag], strict=True):
            assert step == step_too
            assert value_too == pytest.approx(value, rel=1e-6), tag  # TensorBoard keeps float32
    for name, weight in last(alone)["state_dict"].items():
        torch.testing.assert_close(last(folder)["state_dict"][name], weight, rtol=0, atol=1e-10)
    keeper = next(key for key in last(alone)["callbacks"] if "BestLastCheckpoint" in key)
    assert last(folder)["callbacks"][keeper]["best_score"] == pytest.approx(
        last(alone)["callbacks"][keeper]["best_score"], abs=1e-7
    )


def test_ddp_validation_scores_every_character_once(alone, place, corpus_text):
    def metrics(devices):
        flags = [f"--trainer.devices={devices}", "--trainer.strategy=ddp_fork", "--trainer.precision=64-true"]
        out, _ = run(alone, "validate", "--ckpt_path=last", "--trainer.accelerator=cpu", *flags)
        return dict(line.split() for line in out.strip().split("\n"))

    expected = metrics(devices=1)
    assert int(expected["val/characters"]) == len(corpus_text) - int(0.9 * len(corpus_text))
    assert metrics(devices=3) == expected


@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_resume_from_one_process_to_two_and_back(place, alone, overlay):
    """Each run ends with a signal, which one of two processes receives."""
    folder = place / f"there-and-back-{overlay}"
    config = Path(__file__).parents[1] / "configs" / f"{overlay}.yaml"
    # ModelParallelStrategy has no float64
    one = ["fit", *TINY, *DDP, f"--trainer.precision={'32' if overlay == 'fsdp' else '64'}-true"]
    straight, atol = alone, 1e-10
    if overlay == "fsdp":
        straight, atol = place / "alone-32", 1e-5
        run(straight, *one)
    kill = "os.kill(os.getpid(), signal.SIGTERM)"
    two = [f"--config={config}", "--trainer.devices=2", "--ckpt_path=last"]
    run(folder, "fit", *one[1:], code=ACT_AT_STEP.format(step=4, act=kill), status=143)
    assert last(folder)["global_step"] == 5
    (folder / "act.py").write_text(ACT_AT_STEP.format(step=9, act=f"if trainer.global_rank == 1: {kill}"))
    _, err = run_afresh(folder, "fit", *two, script="act.py", status=143)
    assert err.count("SIGTERM at step 10") == 1
    assert last(folder)["global_step"] == 10
    run(folder, "fit", "--ckpt_path=last", "--trainer.strategy=auto", "--trainer.devices=1")
    assert last(folder)["global_step"] == 14
    assert epochs(last(folder)) == epochs(last(straight))
    model, straight_model = last(folder)["state_dict"], last(straight)["state_dict"]
    assert model.keys() == straight_model.keys()
    for name, weight in straight_model.items():
        torch.testing.assert_close(model[name], weight, rtol=0, atol=atol)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_launched_processes_return_the_trained_model(place, alone, strategy):
    """The summary of the command line reads the model."""
    folder = place / strategy
    flags = [f"--trainer.strategy={strategy}", "--trainer.devices=2", "--trainer.precision=64-true"]
    out, err = run(folder, "fit", *TINY, *DDP, *flags)
    assert "Best checkpoint: " in out and "(step 14)" in out and "\nNext:\n" in out
    assert "lmlight: error" not in err
    for name, weight in last(alone)["state_dict"].items():
        torch.testing.assert_close(last(folder)["state_dict"][name], weight, rtol=0, atol=1e-10)
    if strategy == "ddp_fork":
        run(folder, "fit", "--ckpt_path=last", "--trainer.max_steps=16")
        assert last(folder)["global_step"] == 16


FORK = """
import sys
import lightning.pytorch as pl
sys.path.insert(0, {tests!r})
import tiny
import torch
from lmlight import LanguageModel, checkpoint
from lmlight.training.checkpointing import AtomicCheckpointIO, BestLastCheckpoint

model = LanguageModel(net=tiny.net)
options = {{**tiny.QUIET, "devices": 2, "strategy": "ddp_fork", "max_steps": 2, "default_root_dir": "runs/one"}}
trainer = pl.Trainer(**options, callbacks=[BestLastCheckpoint()], plugins=[AtomicCheckpointIO()])
trainer.fit(model, datamodule=tiny.data("../corpus.txt"))
trained = checkpoint.read("runs/one/checkpoints/last.ckpt")
assert trained["global_step"] == 2
print("same:", all(torch.equal(model.state_dict()[name], weight) for name, weight in trained["state_dict"].items()))
print(repr(model.generate("MIRA:", max_new_tokens=5)))
"""


def test_ddp_fork_returns_the_trained_model(place):
    out, _ = run(place / "fork", code=FORK.format(tests=str(Path(__file__).parent)))
    same, text = out.strip().split("\n")[-2:]
    assert same == "same: True"
    assert text.startswith("'MIRA:")


def test_resume_with_averaged_weights_is_exact(place):
    """EMAWeightAveraging restores the averages and the current weights."""
    flags = [*HARD, "--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]
    run(place / "averaged", "fit", *flags)
    folder = place / "averaged-killed"
    act = "os.kill(os.getpid(), signal.SIGKILL)"
    run(folder, "fit", *flags, code=ACT_AT_STEP.format(step=17, act=act), status=-9)
    run(folder, "fit", "--ckpt_path=last")
    expected = last(place / "averaged")
    assert differences(expected, last(folder)) == []
    assert not torch.equal(
        expected["current_model_state"]["net.head.weight"], expected["state_dict"]["net.head.weight"]
    ), "the averages are not the last weights"
    assert scalars(folder) == scalars(place / "averaged")


def test_ddp_error_is_one_line(place):
    flags = [*TINY, "--data.batch_size=7", "--trainer.strategy=ddp", "--trainer.devices=2"]
    _, err = run_afresh(place / "mistake", "fit", *flags, status=2)
    assert err.count("lmlight: error: data.batch_size 7 counts the windows") == 1
    assert "Traceback" not in err


def test_resume_restores_settings_and_flags_override_them(place, capsys, monkeypatch):
    """Settings of trainer, model and data come from config.yaml, which a resumed run rewrites."""
    folder = place / "settings"
    flags = [*TINY, "--trainer.max_steps=20", "--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=0.3"]
    flags += ["--trainer.callbacks=lmlight.training.callbacks.TrainSubsetEval", "--trainer.callbacks.windows=3"]
    flags += ["--trainer.accumulate_grad_batches=2", "--model.schedule.shape=cosine", "--data.val_fraction=0.2"]
    act = "os.kill(os.getpid(), signal.SIGTERM)"
    run(folder, "fit", *flags, code=ACT_AT_STEP.format(step=3, act=act), status=143)
    (path,) = folder.glob("runs/*/config.yaml")
    before = yaml.safe_load(path.read_text())
    flags = ["--trainer.max_steps=6", "--model.sampling.temperature=0.5", "--trainer.callbacks+=Timer"]
    out, _ = run(folder, "fit", "--ckpt_path=last", *flags)
    (line,) = [line for line in out.split("\n") if line.startswith("Resuming")]
    changed = "trainer.max_steps: 20 -> 6", "trainer.callbacks: [TrainSubsetEval] -> [TrainSubsetEval, Timer]"
    assert line.startswith(f"Resuming {path.parent.relative_to(folder)} at step 4, with ")
    assert all(change in line for change in (*changed, "model.sampling.temperature: 0.9 -> 0.5"))
    assert line.count("->") == 3
    after = yaml.safe_load(path.read_text())
    assert after["trainer"].pop("max_steps") == 6
    names = [entry["class_path"].rpartition(".")[2] for entry in after["trainer"].pop("callbacks")]
    assert names == ["TrainSubsetEval", "Timer"]
    assert after["model"]["sampling"].pop("temperature") == 0.5
    assert after["ckpt_path"] is None, "passed as --config, it starts a new run"
    del before["trainer"]["max_steps"], before["trainer"]["callbacks"]
    del before["model"]["sampling"]["temperature"]
    assert after == before
    assert len(list(folder.glob("runs/*"))) == 1
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path=last", "--model.net.dropout=0.4", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["precision"] == "bf16-mixed"
    net = printed["model"]["net"]["init_args"]
    assert net["dropout"] == 0.4
    assert net["n_embd"] == 32


def test_resume_with_incompatible_settings_is_refused_and_keeps_the_config(trained, tmp_path, capsys, monkeypatch):
    shutil.copytree(trained, tmp_path / "runs" / "copy")
    config = tmp_path / "runs" / "copy" / "config.yaml"
    before = config.read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path.parent / "corpus.txt").write_bytes((trained.parents[2] / "corpus.txt").read_bytes())
    for flags, says in {
        "--data.block_size=32": "exceeds this model's block_size 16",
        "--model.net=Bigram": "a different network",
        "--data.corpus=nope.txt": "no corpus",
        "--data.tokenizer.vocab_size=300": (
            "a resumed run cannot change data.tokenizer (data.tokenizer.vocab_size: 400 -> 300)"
        ),
        "--trainer.accumulate_grad_batches=3": "multiple of",
        "--model.optimizer=torch.optim.AdamW": "the state of lmlight.optim.Muon",
    }.items():
        assert main(["fit", "--ckpt_path=last", flags]) == 2
        out, err = capsys.readouterr()
        assert says in err.strip().split("\n")[-1]
        assert out.count("\n") <= 1 and out.count("->") <= 1
        assert config.read_bytes() == before
    # refused after training has been set up
    flags = ["--trainer.max_steps=40", "--trainer.limit_train_batches=5", "--trainer.accumulate_grad_batches=2"]
    assert main(["fit", "--ckpt_path=last", *flags]) == 2
    assert "an epoch has 5 batches" in capsys.readouterr().err
    assert config.read_bytes() == before
    assert main(["fit", "--ckpt_path=last", "--trainer.max_steps=31"]) == 0
    assert config.read_bytes() != before


@pytest.mark.parametrize("damage", ["missing", "damaged", "empty"])
def test_resume_without_config_is_refused(trained, tmp_path, capsys, damage):
    shutil.copytree(trained, tmp_path / "runs" / "copy")
    config = tmp_path / "runs" / "copy" / "config.yaml"
    config.unlink() if damage == "missing" else config.write_text("data: {" if damage == "damaged" else "")
    assert main(["fit", "--ckpt_path=last", f"--trainer.default_root_dir={tmp_path / 'runs'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lmlight: error: ") and error.count("\n") == 1
    assert "config.yaml', are missing or damaged" in error


@pytest.mark.parametrize("section", ["trainer", "model", "data"])
def test_resume_with_a_broken_section_in_its_config_is_one_line(trained, tmp_path, capsys, section):
    shutil.copytree(trained, tmp_path / "runs" / "copy")
    config = tmp_path / "runs" / "copy" / "config.yaml"
    for value in (None, 5, [1]):
        config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), section: value}))
        flags = [f"--data.corpus={trained.parents[2] / 'corpus.txt'}", "--trainer.max_steps=31"]
        status = main(["fit", "--ckpt_path=last", f"--trainer.default_root_dir={tmp_path / 'runs'}", *flags])
        error = capsys.readouterr().err
        if (section, value) != ("trainer", None):  # which means the defaults
            assert status == 2 and error.startswith("lmlight: error: ") and error.count("\n") == 1
        if value is not None:
            assert f"config.yaml': expected settings in {section}, got {value}" in error


def test_a_run_from_elsewhere_cannot_name_code_to_import(trained, tmp_path, capsys, monkeypatch):
    """Its config.yaml is not a file that the user has passed, until `default_root_dir` names the folder of that run."""
    (tmp_path / "theirs.py").write_text(
        "import pathlib\nfrom lightning.pytorch import Callback\npathlib.Path('imported').touch()"
    )
    shutil.copytree(trained, tmp_path / "elsewhere" / "copy")
    config = tmp_path / "elsewhere" / "copy" / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["data"]["corpus"] = str(trained.parents[2] / "corpus.txt")
    settings["trainer"]["callbacks"] = ["theirs.Callback"]
    config.write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["fit", "--ckpt_path=elsewhere/copy", "--trainer.max_steps=31"]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "could name code to import" in error and error.count("\n") == 1
    assert not Path("imported").exists()
    assert main([*flags, "--trainer.default_root_dir=elsewhere"]) == 0, capsys.readouterr().err
    assert Path("imported").exists()
    sys.modules.pop("theirs", None)


def test_config_of_a_parent_folder_is_not_used(trained, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path / "models" / "last.ckpt")
    shutil.copy(trained / "config.yaml", tmp_path / "config.yaml")
    assert main(["fit", f"--ckpt_path={tmp_path / 'models' / 'last.ckpt'}"]) == 2
    assert "the run's settings" in capsys.readouterr().err


def test_optimizer_arguments_can_change_on_resume(trained, tmp_path, capsys, monkeypatch):
    """They override the values in the state of the optimizer and the scheduler. A flag may be specific to the optimizer."""
    monkeypatch.chdir(tmp_path)
    text, seen = trained.parents[2] / "corpus.txt", []
    flags = [f"--data.corpus={text}", *tiny.FLAGS, "--trainer.max_steps=4", "--trainer.val_check_interval=4"]
    flags += ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3", "--model.schedule.warmup_steps=0"]
    assert main(["fit", *flags]) == 0
    monkeypatch.setattr(
        LanguageModel,
        "on_before_optimizer_step",
        lambda self, optimizer: seen.append({k: v for k, v in optimizer.param_groups[0].items() if k != "params"}),
    )
    changed = ["--model.optimizer.lr=2e-3", "--model.optimizer.amsgrad=false", "--model.optimizer.betas=[0.8,0.9]"]
    assert main(["fit", "--ckpt_path=last", *changed, "--trainer.max_steps=8"]) == 0
    assert "model.optimizer.lr: 0.001 -> 0.002" in capsys.readouterr().out
    assert [group["lr"] for group in seen] == pytest.approx([2e-3 * left / 8 for left in (4, 3, 2, 1)])
    assert {tuple(group["betas"]) for group in seen} == {(0.8, 0.9)}
    seen.clear()
    assert main(["fit", "--ckpt_path=last", "--trainer.max_steps=16"]) == 0
    assert seen[0]["lr"] == pytest.approx(2e-3 * 8 / 16), "config.yaml has the new value"


def test_a_run_is_resumed_where_it_lies(trained, tmp_path, capsys, monkeypatch):
    """Whatever folder of runs it was started in or moved to."""
    monkeypatch.chdir(tmp_path)
    text = trained.parents[2] / "corpus.txt"
    flags = [f"--data.corpus={text}", *tiny.FLAGS, "--trainer.max_steps=2", "--trainer.val_check_interval=1"]
    assert main(["fit", *flags, "--trainer.default_root_dir=out"]) == 0
    (run,) = Path("out").iterdir()
    where = [f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", "--trainer.default_root_dir=out"]
    assert main(["fit", *where, "--trainer.max_steps=3"]) == 0
    for step, folder in ((4, "runs"), (5, "moved")):
        Path(folder).mkdir()
        run = run.rename(Path(folder) / "run")
        root = [] if folder == "runs" else ["--trainer.default_root_dir=moved"]
        assert main(["fit", f"--ckpt_path={run}", f"--trainer.max_steps={step}", *root]) == 0
        assert list(Path(folder).iterdir()) == [run], "no new folder beside it"
        assert checkpoint.read(run / "checkpoints" / "last.ckpt")["global_step"] == step
        assert len((run / "metrics.csv").read_text().splitlines()) == step + 1
    capsys.readouterr()
    assert main(["fit", "--ckpt_path=last", *root]) == 0
    assert "The run had already reached step 5: to train longer" in capsys.readouterr().out
    assert not any(Path("runs").iterdir()) and not any(Path("out").iterdir())


def test_two_runs_can_start_at_once(place):
    folder = place / "two"
    flags = [*TINY, "--trainer.max_steps=3", "--data.tokenizer.vocab_size=399"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: run(folder, "fit", *flags), range(2)))
    assert len(list(folder.glob("runs/*/checkpoints/last.ckpt"))) == 2
    assert len(list(folder.glob("runs/*/events*"))) == 2


# Within this process


@pytest.fixture
def trained(straight, monkeypatch):
    """Changes to the parent folder of a finished run; returns the folder of the run."""
    monkeypatch.chdir(straight)
    monkeypatch.setenv("LMLIGHT_CACHE", str(straight.parent / "cache"))
    (folder,) = straight.glob("runs/*")
    return folder


def test_run_folder_best_and_last_are_accepted_as_ckpt_path(trained, capsys):
    printed = []
    for name in ("best", str(trained), str(trained / "checkpoints"), str(trained / "checkpoints/best.ckpt")):
        assert main(["validate", f"--ckpt_path={name}"]) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1
    assert main(["validate", "--ckpt_path=last"]) == 0


def test_last_is_the_newest_run(tmp_path):
    for age, name in ((30, "a"), (10, "b"), (20, "c")):
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    assert checkpoint.find("last", tmp_path, "last").parts[-3] == "b"
    with pytest.raises(UserError, match="'best' yet"):
        checkpoint.find("best", tmp_path, "last")


def test_resume_without_checkpoint_is_refused(capsys):
    assert main(["fit", "--ckpt_path=last"]) == 2
    assert "no run in 'runs' has a checkpoint 'last' yet" in capsys.readouterr().err
    Path("runs/x").mkdir(parents=True)
    assert main(["fit", "--ckpt_path=runs/x"]) == 2
    assert "has no checkpoint 'last.ckpt'" in capsys.readouterr().err


def test_init_from_takes_net_weights_and_tokenizer_only(trained, tmp_path, capsys):
    text = tmp_path / "other.txt"
    text.write_text("SHE:\nAnother text altogether, with words of its own.\n" * 60)
    flags = [f"--data.corpus={text}", "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--data.batch_size=4"]
    flags += ["--trainer.default_root_dir=" + str(tmp_path / "runs"), "--trainer.accelerator=cpu"]
    still = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0"]
    assert main(["fit", f"--init_from={trained}", *flags, *still]) == 0, capsys.readouterr().err
    source, content = checkpoint.read(trained / "checkpoints/best.ckpt"), last(tmp_path)
    assert content["global_step"] == 1
    assert torch.equal(content["lmlight"]["tokenizer"], source["lmlight"]["tokenizer"])
    assert content["lmlight"]["net"]["config"] == source["lmlight"]["net"]["config"]
    assert content["lmlight"]["settings"]["data"].get("subword_sampling") is None
    for name, weight in source["state_dict"].items():
        assert torch.equal(content["state_dict"][name], weight), name
    (config,) = tmp_path.glob("runs/*/config.yaml")
    for _ in range(2):
        started_from = yaml.safe_load(config.read_text())["init_from"]
        assert started_from == str(trained / "checkpoints" / "best.ckpt"), "as --config, it starts the same run"
        assert (
            main(["fit", "--ckpt_path=last", flags[-2], f"--trainer.max_steps={last(tmp_path)['global_step'] + 1}"])
            == 0
        )
    assert last(tmp_path)["global_step"] == 3
    assert main(["fit", f"--init_from={trained}", f"--ckpt_path={trained}"]) == 2
    capsys.readouterr()
    assert main(["fit", f"--init_from={trained}", *flags, "--model.net.n_embd=64"]) == 2
    assert "n_embd 32 in the checkpoint, 64 here" in capsys.readouterr().err


def test_folder_of_runs_may_be_in_an_earlier_config(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(f"trainer:\n  default_root_dir: {trained.parent}\n")
    Path("b.yaml").write_text("trainer:\n  accelerator: cpu\n")
    text = f"--data.corpus={trained.parents[2] / 'corpus.txt'}"
    assert main(["validate", "--ckpt_path=best", "--config=a.yaml", "--config=b.yaml", text]) == 0
    assert "best.ckpt" in capsys.readouterr().err
    for content in ("", "# nothing", "[]"):
        Path("b.yaml").write_text(content)
        assert main(["validate", "--ckpt_path=best", "--config=a.yaml", "--config=b.yaml"]) == 2
        assert capsys.readouterr().err.startswith("lmlight: error: ")


def test_best_and_last_checkpoints(corpus_file, monkeypatch):
    scores, saved = iter([math.nan, 2.0, 1.0, 3.0]), []

    def note(content, path):
        saved.append((path.stem, content["global_step"], content["callbacks"]["BestLastCheckpoint"]["best_score"]))

    monkeypatch.setattr(checkpoint, "write", note)
    monkeypatch.setattr(
        LanguageModel,
        "on_validation_epoch_end",
        lambda self: self.log_dict({"val/nats_per_char": (score := next(scores)), "val/loss": -score}),
    )
    trainer = pl.Trainer(
        max_steps=12,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[BestLastCheckpoint(every_n_steps=2)],
        plugins=[AtomicCheckpointIO()],
        **tiny.QUIET,
    )
    trainer.fit(LanguageModel(net=Bigram), datamodule=tiny.data(corpus_file))
    assert saved == [
        ("last", 2, None),
        ("last", 3, None),  # after a loss that is not a number
        ("last", 4, None),
        ("best", 6, 2.0),  # saved once, after the validation
        ("last", 6, 2.0),
        ("last", 8, 2.0),
        ("best", 9, 1.0),
        ("last", 9, 1.0),
        ("last", 10, 1.0),
        ("last", 12, 1.0),
    ]


def test_best_checkpoint_is_found_after_a_move(tmp_path):
    """The best checkpoint of a moved run is found; one in another folder is not reported."""
    keeper = BestLastCheckpoint()
    keeper._folder = tmp_path
    state = {"best_score": 1.0, "best_model_path": "elsewhere/best.ckpt", "validated_step": 3}
    keeper.load_state_dict(state)
    assert (keeper.best_score, keeper.best_model_path) == (None, "")
    (tmp_path / "best.ckpt").touch()
    keeper.load_state_dict(state)
    assert (keeper.best_score, keeper.best_model_path) == (1.0, str(tmp_path / "best.ckpt"))


@pytest.mark.parametrize("when", ["loss", "gradient"])
def test_non_finite_loss_or_gradient_stops_and_is_not_saved(trained, tmp_path, capsys, monkeypatch, when):
    step = LanguageModel.training_step

    def poisoned(self, batch, index):
        loss = step(self, batch, index)
        if self.global_step == 17:
            if when == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(LanguageModel, "training_step", poisoned)
    assert (
        main(["fit", *HARD, f"--trainer.default_root_dir={tmp_path / 'runs'}", "--trainer.log_every_n_steps=50"]) == 2
    )
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert "not a finite number at step 17 (learning rate" in error
    (path,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    assert str(path) in error
    content = checkpoint.read(path)
    assert content["global_step"] == 14
    assert all(weight.isfinite().all() for weight in content["state_dict"].values())
    # a resumed run that has saved nothing names the checkpoint that it resumed
    assert main(["fit", f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path / 'runs'}"]) == 2
    assert str(path) in capsys.readouterr().err.strip().split("\n")[-1]


def test_non_finite_weights_are_not_saved(trained, tmp_path, capsys, monkeypatch):
    def poison(self):
        next(self.net.parameters()).data[0, 0] = float("nan")

    monkeypatch.setattr(LanguageModel, "on_validation_epoch_start", poison)
    assert main(["fit", *HARD, f"--trainer.default_root_dir={tmp_path / 'runs'}"]) == 2
    assert "a weight is not a finite number at step 7" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/checkpoints/*.ckpt"))


# Checkpoint files


def content_of(net):
    from lmlight.data.tokenizer import CharTokenizer

    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    return {"state_dict": state, checkpoint.METADATA_KEY: checkpoint.model_metadata(net, CharTokenizer("abc"), {}, {})}


def test_flipped_bit_is_refused_or_harmless(tmp_path):
    """Unused bits, such as dates and padding of the archive, may flip; see `checkpoint._is_intact`."""
    path, good, content = tmp_path / "last.ckpt", tmp_path / "best.ckpt", content_of(Bigram(3, 8))
    checkpoint.write(content, good)
    checkpoint.write(content, path)
    whole, refused = path.read_bytes(), []
    assert differences(torch.load(path, weights_only=True), content) == [], "torch can read it"
    directory = whole.index(b"PK\x01\x02")  # of the archive: test all of it, and a sample of the rest
    for position in [*range(0, directory, 13), *range(directory, len(whole))]:
        for bit in (4, 16):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            try:
                found = checkpoint.read(path)
            except UserError as error:
                refused.append(str(error))
            else:
                assert differences(found, {**content, "path": str(path)}) == []
    assert len(refused) > 1000
    assert all(f"the newest intact one is '{good}'" in message for message in refused)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """A limit on the file size simulates it."""
    code = """if True:
        import resource, signal
        from test_reliability import content_of
        from lmlight import checkpoint
        from lmlight.errors import UserError
        from lmlight.models import Bigram
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoint.write(content_of(Bigram(3, 8)), "x.ckpt")
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            checkpoint.write(content_of(Bigram(100, 8)), "x.ckpt")
        except UserError as error:
            print(error)
        """
    out, _ = processes.run(code=code)
    assert "cannot be written" in out
    assert "the previous file is unchanged" in out
    assert os.listdir(tmp_path) == ["x.ckpt"]
    assert checkpoint.net_of(checkpoint.read(tmp_path / "x.ckpt")).vocab_size == 3


def test_kill_while_writing_keeps_the_previous_checkpoint(tmp_path):
    """The process is killed before the rename; the next write overwrites what it leaves."""
    code = """if True:
        import os, signal
        from test_reliability import content_of
        from lmlight import checkpoint
        from lmlight.models import Bigram
        checkpoint.write(content_of(Bigram(3, 8)), "x.ckpt")
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.write(content_of(Bigram(5, 8)), "x.ckpt")
        """
    processes.run(code=code, status=-9)
    assert len(os.listdir(tmp_path)) == 2
    assert checkpoint.net_of(checkpoint.read(tmp_path / "x.ckpt")).vocab_size == 3
    checkpoint.write(content_of(Bigram(7, 8)), tmp_path / "x.ckpt")
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_checkpoint_is_flushed_before_the_rename(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "x.ckpt"
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", lambda self, target: (calls.append("replace"), replace(self, target))[1])
    checkpoint.write(content_of(Bigram(3, 8)), path)
    assert calls == [path.stat().st_size, "replace", "folder"]
