"""Training on the predictions of trained models."""

import shutil
from pathlib import Path

import lightning.pytorch as pl
import processes
import pytest
import tiny
import torch
import torch.nn.functional as F
import yaml

from lmlight import DistilledModel, LanguageModel, checkpoint
from lmlight.__main__ import main
from lmlight.errors import UserError
from lmlight.training.checkpointing import BestLastCheckpoint

STUDENT = "--model=lmlight.DistilledModel"
SHORT = [*tiny.FLAGS, "--trainer.callbacks=null", "--trainer.max_steps=4", "--trainer.val_check_interval=2"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, corpus_text):
    """The folders of two runs."""
    folder = tmp_path_factory.mktemp("teachers")
    corpus = folder / "corpus.txt"
    corpus.write_text(corpus_text, encoding="utf-8")
    runs = []
    for seed in (1, 2):
        root = folder / str(seed)
        words = [f"--data.corpus={corpus}", f"--trainer.default_root_dir={root}", f"--seed_everything={seed}"]
        assert main(["fit", *SHORT, *words]) == 0
        runs += [str(path) for path in root.iterdir()]
    return runs


def fit(corpus_file, *words):
    return main(["fit", *SHORT, f"--data.corpus={corpus_file}", STUDENT, *words])


def trained(corpus_file, **options):
    """A model after one step without learning."""
    torch.manual_seed(0)
    model = DistilledModel(net=tiny.net, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0), **options)
    data = tiny.data(corpus_file)
    pl.Trainer(**tiny.QUIET, max_steps=1, enable_checkpointing=False).fit(model, datamodule=data)
    return model, next(iter(data.train_dataloader()))


def test_target_is_the_mean_of_the_teachers_mixed_with_the_text(corpus_file, teachers):
    model, batch = trained(corpus_file, teachers=teachers, teacher_weight=0.7)
    logits = model(batch.inputs).log_softmax(-1)
    nets = [LanguageModel.load_from_checkpoint(f"{run}/checkpoints/best.ckpt").net for run in teachers]
    mean = torch.stack([net(batch.inputs).softmax(-1) for net in nets]).mean(0)
    from_text = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    from_teachers = -(mean * logits).sum(-1).mean()
    torch.testing.assert_close(model.training_loss(batch), 0.3 * from_text + 0.7 * from_teachers)


def test_weight_0_is_the_usual_loss(corpus_file, teachers):
    model, batch = trained(corpus_file, teachers=teachers, teacher_weight=0)
    torch.testing.assert_close(model.training_loss(batch), LanguageModel.training_loss(model, batch))


def test_a_copy_of_the_only_teacher_has_no_gradient(corpus_file, teachers):
    model, batch = trained(corpus_file, teachers=teachers[:1], teacher_weight=1)
    teacher = LanguageModel.load_from_checkpoint(f"{teachers[0]}/checkpoints/best.ckpt").net
    model.net.load_state_dict(teacher.state_dict())
    model.zero_grad()
    model.training_loss(batch).backward()
    assert all(parameter.grad.abs().max() < 1e-6 for parameter in model.net.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_checkpoint_needs_no_teachers(corpus_file, teachers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, run in enumerate(teachers):
        shutil.copytree(run, f"teacher-{number}")
    assert fit(corpus_file, "--model.teachers=[teacher-0, teacher-1]") == 0
    for number in range(2):
        shutil.rmtree(f"teacher-{number}")
    (best,) = Path("runs").glob("*/checkpoints/best.ckpt")
    assert all(name.startswith("net.") for name in checkpoint.read(best)["state_dict"])
    assert main(["predict", "--ckpt_path=best", "--model.sampling.max_new_tokens=4"]) == 0
    capsys.readouterr()
    assert main(["fit", "--ckpt_path=last", "--trainer.max_steps=6"]) == 2
    missing = Path("teacher-0", "checkpoints", "best.ckpt").absolute()
    assert f"--model.teachers: no checkpoint at '{missing}': pass" in capsys.readouterr().err


def test_resumed_run_equals_an_uninterrupted_one(corpus_file, teachers, tmp_path):
    words = [f"--model.teachers=[{', '.join(teachers)}]", "--model.schedule.shape=constant"]
    runs = {}
    for name, steps in (("whole", 4), ("parts", 2)):
        root = f"--trainer.default_root_dir={tmp_path / name}"
        assert fit(corpus_file, *words, root, f"--trainer.max_steps={steps}") == 0
        (runs[name],) = (tmp_path / name).glob("*/checkpoints/last.ckpt")
    words = [f"--ckpt_path={runs['parts']}", f"--trainer.default_root_dir={tmp_path / 'parts'}"]
    assert main(["fit", *words, "--trainer.max_steps=4"]) == 0
    whole, parts = (checkpoint.read(path)["state_dict"] for path in runs.values())
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_resumed_run_keeps_its_teachers(corpus_file, teachers, tmp_path, monkeypatch, capsys):
    """`best` is a path from then on: the newest checkpoint is the run's own when it is resumed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teachers[0], "elsewhere/teacher")
    root = "--trainer.default_root_dir=elsewhere"
    assert fit(corpus_file, "--model.teachers=best", root) == 0
    (run,) = (path for path in Path("elsewhere").iterdir() if path.name != "teacher")
    teacher = Path("elsewhere", "teacher", "checkpoints", "best.ckpt").absolute()
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["teachers"] == [str(teacher)]
    assert main(["fit", f"--ckpt_path={run}", root, "--trainer.max_steps=5"]) == 0
    moved = shutil.copy(teacher, tmp_path / "moved.ckpt")
    assert main(["fit", f"--ckpt_path={run}", root, "--trainer.max_steps=6", f"--model.teachers={moved}"]) == 0
    capsys.readouterr()
    words = ["--trainer.max_steps=7", f"--model.teachers={teachers[1]}"]
    assert main(["fit", f"--ckpt_path={run}", root, *words]) == 2
    assert "best.ckpt are not the checkpoints that the run began with" in capsys.readouterr().err


def test_teacher_of_the_users_own_class(corpus_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_teacher.py").write_text("from lmlight.models import Bigram\n\n\nclass Own(Bigram):\n    pass\n")
    words = ["--trainer.default_root_dir=first", f"--data.corpus={corpus_file}", "--model.net=my_teacher.Own"]
    short = [flag for flag in SHORT if not flag.startswith("--model.net")]
    processes.run("fit", *short, *words, cwd=tmp_path)
    (teacher,) = Path("first").glob("*/checkpoints/best.ckpt")
    assert fit(corpus_file, f"--model.teachers={teacher}") == 2
    assert "pass --model.teacher_net my_teacher.Own, or teacher_net=Own in Python" in capsys.readouterr().err
    assert fit(corpus_file, f"--model.teachers={teacher}", "--model.teacher_net=my_teacher.Own") == 0
    assert main(["fit", "--ckpt_path=last", "--trainer.max_steps=6"]) == 0
    assert fit(corpus_file, f"--model.teachers={teacher}", "--model.teacher_net=my_teecher.Own") == 2
    assert "--model.teacher_net: there is no module my_teecher" in capsys.readouterr().err


def test_unusable_teachers_are_one_line(corpus_file, teachers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    both = f"--model.teachers=[{', '.join(teachers)}]"
    for words, message in {
        (): "DistilledModel needs trained models: pass --model.teachers",
        ("--model.teachers=[missing.ckpt]",): "--model.teachers: no checkpoint at",
        ("--model.teachers=.",): "folder '.' has no checkpoint 'best.ckpt'",
        (both, "--data.block_size=32"): "takes at most 16 tokens, got data.block_size 32: lower it",
        (both, "--data.tokenizer.vocab_size=350"): "has a different tokenizer from this run",
        (both, "--model.teacher_weight=1.5"): "model.teacher_weight must lie in [0, 1], got 1.5",
    }.items():
        capsys.readouterr()
        assert fit(corpus_file, *words) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        assert not list(Path("runs").glob("*/checkpoints/*"))


def test_teacher_that_has_read_the_scored_text_is_refused(corpus_file, tmp_path, monkeypatch, capsys):
    """The characters of both texts are the same, so both tokenizers are."""
    monkeypatch.chdir(tmp_path)
    short = [
        *(flag for flag in SHORT if "tokenizer" not in flag),
        "--data.tokenizer.kind=char",
        f"--data.corpus={corpus_file}",
    ]
    for root, *words in ("all",), ("tune", "--data.validate_on=tune"):
        assert main(["fit", *short, *words, f"--trainer.default_root_dir={root}"]) == 0
    (whole,), (part,) = (list(Path(root).glob("*/checkpoints/best.ckpt")) for root in ("all", "tune"))
    capsys.readouterr()
    assert main(["fit", *short, STUDENT, f"--model.teachers={whole}", "--data.validate_on=tune"]) == 2
    assert "was trained on text that this run scores: train both with the same" in capsys.readouterr().err
    assert main(["fit", *short, STUDENT, f"--model.teachers={part}", "--data.validate_on=tune"]) == 0
    assert main(["fit", *short, STUDENT, f"--model.teachers={part}"]) == 0  # it has read less


def test_python_gets_an_error_without_teachers(corpus_file):
    trainer = pl.Trainer(**tiny.QUIET, max_steps=1, callbacks=[BestLastCheckpoint()])
    with pytest.raises(UserError, match="needs trained models"):
        trainer.fit(DistilledModel(net=tiny.net), datamodule=tiny.data(corpus_file))
