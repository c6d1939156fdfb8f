"""`lmlight sweep`: the study, its trials and what the report concludes."""

import csv
import itertools
import math
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import tiny
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileOpenLock
from optuna.trial import TrialState, create_trial
from scipy import stats

from lmlight import checkpoint
from lmlight.__main__ import main
from lmlight.command_line import program
from lmlight.errors import UserError
from lmlight.sweep import command, report, worker
from lmlight.sweep import study as studies
from lmlight.sweep import trial as trials
from lmlight.sweep.report import interval, settings_of
from lmlight.sweep.study import SEED, STALE_SECONDS, Plan, Study
from lmlight.sweep.trial import METRIC, TrialFailed
from lmlight.training.cli import check_fit

RATES = {"model.optimizer.lr": CategoricalDistribution(["0.1", "0.2", "5", "9"])}
SPACE = {**RATES, SEED: IntDistribution(0, 9)}
SETTINGS = {
    "fit": ["--config=a b.yaml"],
    "on": "val",
    "prune": False,
    "identity": "",
    "baseline": {"model.optimizer.lr": "0.1"},
}


PLAN = Plan(SPACE, None, 0, lambda params: True)


def params(rate, seed):
    return {"model.optimizer.lr": str(rate), SEED: seed}


def finished(rate, seed, value, characters=500, **options):
    attrs = {"seconds": 2.0, "parameters": 1000, "characters": characters}
    return create_trial(params=params(rate, seed), distributions=SPACE, value=value, user_attrs=attrs, **options)


@pytest.fixture
def compared():
    """A study of three rates with three seeds, of which the last rate failed."""
    study = Study(Path("study"), SETTINGS)
    for seed, (first, second) in enumerate([(1.50, 1.40), (1.52, 1.43), (1.48, 1.41)]):
        study.optuna.add_trial(finished(0.1, seed, first))
        study.optuna.add_trial(finished(0.2, seed, second))
        failed = create_trial(
            params=params(9, seed), distributions=SPACE, state=TrialState.FAIL, user_attrs={"reason": "out of memory"}
        )
        study.optuna.add_trial(failed)
    return study


def test_interval_by_hand():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.302653
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert interval([1.0]) == (1, -math.inf, math.inf)
    assert interval([1.0, 1.0]) == (1, 1, 1)


def test_difference_is_paired_by_seed(compared):
    best, baseline, _ = settings_of(compared)
    expected = stats.ttest_rel([1.40, 1.43, 1.41], [1.50, 1.52, 1.48]).confidence_interval(0.95)
    assert best.minus(baseline) == pytest.approx((-0.26 / 3, expected.low, expected.high))
    del baseline.values[2]  # its partner counts no longer
    assert best.minus(baseline) == pytest.approx(interval([-0.10, -0.09]))


def test_report_of_a_study_with_failed_trials(compared, capsys):
    assert report.write(compared) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    assert [row[:6] for row in rows[1:]] == [
        ["0.2", "1.4133", "0.0153", "3", "2.0 s", "1,000"],
        ["0.1", "1.5000", "0.0200", "3", "2.0 s", "1,000"],
        ["9", "failed", "–", "0 of 3", "–", "–"],
    ]
    assert [row[-1] for row in rows[2:]] == ["baseline", "–"]
    assert rows[1][-1].startswith("-0.0867 (-0.1246 to -0.0487)") and "no difference" not in rows[1][-1]
    assert "Failed: --model.optimizer.lr=9 --seed_everything=1: out of memory" in out
    assert f"{program()} fit '--config=a b.yaml' --model.optimizer.lr=0.2 --seed_everything=0" in out
    with Path("study/trials.csv").open(newline="", encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE", "FAIL"] * 3
    assert trials[2]["reason"] == "out of memory"
    for name in ("comparison", "curves"):
        assert Path(f"study/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_report_says_that_no_difference_is_shown_and_how_many_pairs_there_are(compared, capsys):
    compared.optuna.add_trial(finished(0.2, 3, 1.60))
    compared.optuna.add_trial(finished(0.1, 3, 1.40))
    compared.optuna.add_trial(finished(0.1, 4, 1.40))  # its partner is missing
    report.write(compared)
    assert ", 4 pairs: no significant difference" in capsys.readouterr().out


def test_setting_that_often_fails_is_not_the_best(compared, capsys):
    compared.optuna.add_trial(finished(9, 3, 1.1))
    report.write(compared)
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if line.startswith("| 9 "))
    assert row.split("|")[4].strip() == "1 of 4"
    assert f"best setting:\n  {program()} fit '--config=a b.yaml' --model.optimizer.lr=0.2" in out


def test_losses_of_different_texts_are_not_compared(compared, capsys):
    report.write(compared)
    assert "different texts" not in capsys.readouterr().out
    for seed in range(2):
        compared.optuna.add_trial(finished(5, seed, 1.2, characters=900))
    report.write(compared)
    out = capsys.readouterr().out
    assert "settings are scored on different texts (see the characters in trials.csv)" in out
    (row,) = (line for line in out.splitlines() if line.startswith("| 5 "))
    assert row.split("|")[-2].strip() == "scored on a different text"
    with Path("study/trials.csv").open(newline="", encoding="utf-8") as file:
        assert {trial["characters"] for trial in csv.DictReader(file)} == {"500", "900", ""}


def test_report_is_printed_where_nothing_can_be_written(compared, capsys, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report, "_write_files", full)
    before = Path("study/journal.log").read_bytes()
    assert report.write(Study(Path("study"))) == 0
    out, err = capsys.readouterr()
    assert "| 0.2 " in out
    assert err == "lmlight: warning: the report's files cannot be written to 'study' (disk full)\n"
    assert Path("study/journal.log").read_bytes() == before  # reading adds nothing


def test_progress_compares_settings_with_as_many_seeds_only():
    study = Study(Path("study"), SETTINGS)
    study.optuna.add_trial(finished(0.1, 0, 1.5))
    study.optuna.add_trial(finished(0.1, 1, 1.5))
    study.optuna.add_trial(finished(0.2, 0, 1.1))
    study.enqueue([params(0.2, 1)])
    trial = study.claim(PLAN)
    line = worker._progress(study, PLAN, trial, "lost", 3.0)
    assert line.startswith("[3/4] model.optimizer.lr=0.2 seed_everything=1: 3 s, lost; best 1.5000 with lr=0.1; about ")


def test_progress_when_the_first_trial_is_lost():
    study = Study(Path("study"), SETTINGS)
    study.enqueue([params(0.1, 0), params(0.1, 1)])
    trial = study.claim(PLAN)
    assert worker._progress(study, PLAN, trial, "lost", 3.0).endswith(": 3 s, lost")


def test_report_without_a_success_has_status_1(capsys):
    study = Study(Path("study"), SETTINGS)
    study.enqueue([params(0.1, 1)])
    assert report.write(study) == 1
    assert "Not finished: 1 of 1 trials" in capsys.readouterr().out


def test_values_and_ranges():
    text = """0.010, 1e-3,my.module.Net,null,yes,2024-01-01,[1, 2],{"a": "b,c"},'*.txt',"d, e" """
    expected = [
        "0.010",
        "1e-3",
        "my.module.Net",
        "null",
        "yes",
        "2024-01-01",
        "[1, 2]",
        '{"a": "b,c"}',
        "*.txt",
        "d, e",
    ]
    assert command.parse_values("f", text) == expected
    assert command.parse_range("f", "1..6") == IntDistribution(1, 6)
    assert command.parse_range("f", "log:1e-3..3e-2") == FloatDistribution(1e-3, 3e-2, log=True)
    assert command.parse_range("f", "0.0..1") == FloatDistribution(0, 1)
    assert command.parse_range("f", "A,B") == CategoricalDistribution(["A", "B"])
    assert command.parse_range("f", "a.txt,../b.txt") == CategoricalDistribution(["a.txt", "../b.txt"])
    assert studies.flags({"a": 0.1, "b": 3, "c": "x"}) == ["--a=0.1", "--b=3", "--c=x"]


def test_each_trial_is_claimed_once():
    grid = [params(rate, seed) for rate, seed in itertools.product((0.1, 0.2), range(3))]
    workers = [Study(Path("study"), SETTINGS) for _ in range(2)]
    for study in workers:
        study.enqueue(grid)
    claimed = [workers[turn % 2].claim(PLAN) for turn in range(7)]
    assert claimed.pop() is None
    assert [trial.params for trial in claimed] == grid
    workers[0].enqueue([*grid, params(0.1, 3)])  # one more seed
    assert workers[1].claim(PLAN).params == params(0.1, 3)


def test_search_has_the_number_of_trials_asked_for_and_different_values():
    workers = [Study(Path("study"), {**SETTINGS, "baseline": None}) for _ in range(2)]
    plan = PLAN._replace(space={"lr": FloatDistribution(0, 1)}, n_trials=5)
    claimed = [workers[turn % 2].claim(plan) for turn in range(6)]
    assert claimed.pop() is None
    assert len({trial.params["lr"] for trial in claimed}) == 5


@pytest.mark.parametrize("interrupted", ["released", "killed", "reused", "torn", "elsewhere"])
def test_interrupted_trial_is_run_again_in_its_folder(interrupted, monkeypatch):
    study = Study(Path("study"), SETTINGS)
    study.enqueue([params(0.1, 1)])
    trial = study.claim(PLAN)
    assert study.claim(PLAN) is None
    if interrupted == "released":
        study.release(trial)
    elif interrupted in ("killed", "reused", "torn"):
        heartbeat = study.trial_folder(trial) / "heartbeat"
        host, process, _ = heartbeat.read_text().split()
        ended = {"killed": f"{2**30}:1.5", "reused": f"{process.partition(':')[0]}:1.5"}.get(interrupted)
        heartbeat.write_text(f"{host} {ended} {ended}" if ended else "")
    else:
        monkeypatch.setattr(studies, "HOST", "another machine")
        assert study.claim(PLAN) is None
        monkeypatch.setattr(studies, "STALE_SECONDS", -STALE_SECONDS)
    again = study.claim(PLAN)
    assert again.number != trial.number and again.params == trial.params
    assert study.trial_folder(again) == study.trial_folder(trial)
    assert [one.state for one in study.trials()] == [TrialState.RUNNING]


@pytest.mark.parametrize(("value", "pruned"), [(2.0, True), (1.0, False)])
def test_pruning_stops_a_trial_above_the_median(value, pruned, monkeypatch):
    study = Study(Path("study"), {**SETTINGS, "prune": True})
    for seed in range(5):
        study.optuna.add_trial(finished(0.1, seed, 1.4, intermediate_values={10: 1.5}))
    study.enqueue([params(0.2, 0)])

    def run_fit(folder, args, watch):
        row = {"step": 10.0, METRIC: value}
        return {METRIC: value, "seconds": 1.0, "parameters": 1, "characters": 9.0} if watch(1, [row]) else None

    monkeypatch.setattr(worker, "run_fit", run_fit)
    trial = study.claim(PLAN)
    assert worker.run_trial(study, trial, PLAN) == ("pruned at step 10" if pruned else f"{METRIC} 1.0000")
    state = TrialState.PRUNED if pruned else TrialState.COMPLETE
    assert [one.state for one in study.trials()][-1] == state


def test_failed_trial_keeps_its_reason_and_can_be_retried(monkeypatch):
    def run_fit(*_):
        raise TrialFailed("out of memory")

    study = Study(Path("study"), SETTINGS)
    study.enqueue([params(0.1, 0)])
    monkeypatch.setattr(worker, "run_fit", run_fit)
    assert worker.run_trial(study, study.claim(PLAN), PLAN) == "failed: out of memory"
    (trial,) = study.trials()
    assert trial.state == TrialState.FAIL and trial.user_attrs["reason"] == "out of memory"
    study.enqueue([params(0.1, 0)])
    assert study.claim(PLAN) is None
    study.enqueue([params(0.1, 0)], retry=True)
    assert study.claim(PLAN).params == trial.params
    assert len(study.trials()) == 1


def test_settings_that_change_during_the_sweep_end_it():
    study = Study(Path("study"), SETTINGS)
    study.enqueue([params(0.1, 0)])
    with pytest.raises(UserError, match="a config file has changed"):
        worker.work(study, PLAN._replace(is_unchanged=lambda params: False))
    (trial,) = study.trials()
    assert trial.state == TrialState.WAITING


def test_heartbeat_is_never_empty(monkeypatch):
    """Another process may read it at any time, and would take the trial of a process that seems dead."""
    study, seen, replace = Study(Path("study"), SETTINGS), [], Path.replace
    study.enqueue([params(0.1, 0)])
    trial = study.claim(PLAN)
    heartbeat = study.trial_folder(trial) / "heartbeat"

    def spy(source, target):
        seen.append((Path(target).name, heartbeat.read_text()))
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", spy)
    before = heartbeat.read_text()
    study.beat(trial, os.getppid())
    assert seen == [("heartbeat", before)] and before
    assert str(os.getppid()) in heartbeat.read_text()


def test_trial_that_another_process_took_over_is_stopped(monkeypatch):
    study = Study(Path("study"), SETTINGS)
    study.enqueue([params(0.1, 0)])
    trial = study.claim(PLAN)
    study.release(trial)  # as another process does after two minutes

    def run_fit(folder, args, watch):
        assert not watch(1, [{"step": 2.0, METRIC: 3.0}])

    monkeypatch.setattr(worker, "run_fit", run_fit)
    assert worker.run_trial(study, trial, PLAN) == "another process has taken it over"
    study.release(trial)
    assert [one.state for one in study.trials()] == [TrialState.WAITING]


@pytest.mark.parametrize(
    ("output", "status", "reason"),
    [
        ("lmlight: error: too bad\n", 2, "too bad"),
        ("Traceback\ntorch.OutOfMemoryError: no memory\nCompile with X\n", 1, "torch.OutOfMemoryError: no memory"),
        ("a\nb\n", 1, "b"),
        ("", 3, "exit status 3"),
        ("", -9, "ended by SIGKILL (perhaps out of memory)"),
        ("", -40, "ended by signal 40"),
    ],
)
def test_reason_of_a_failure(output, status, reason):
    assert trials._reason(status, output) == reason


def test_value_of_a_trial_is_that_of_its_last_validation(tmp_path, monkeypatch):
    def train(*_, **__):
        (tmp_path / "2026").mkdir()
        (tmp_path / "2026/metrics.csv").write_text(f"step,seconds,{METRIC}\n1,1,3.0\n2,2,1.0\n3,3,2.0\n")
        return SimpleNamespace(pid=1, returncode=0, poll=lambda: 0)

    monkeypatch.setattr(trials.subprocess, "Popen", train)
    found = trials.run_fit(tmp_path, [], lambda process, rows: True)
    assert (found[METRIC], found["seconds"]) == (2.0, 3.0)


def test_check_fit_returns_the_settings_and_writes_nothing(tmp_path):
    settings = check_fit([*tiny.FLAGS, "--model.optimizer.lr=0.5", "--data.validate_on=tune"])
    assert settings["model"]["optimizer"]["init_args"]["lr"] == 0.5
    assert settings["data"]["validate_on"] == "tune"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vary", "model.optimizer.lr=0.1,0.1"], "different values"),
        (["--vary", "model.optimizer.lr"], "expected FLAG=..., each flag once"),
        (["--vary=data.corpus=*.txt,b.txt"], "put quotes around those with special characters"),
        (["--vary=seed_everything=1,2"], "the sweep itself sets seed_everything"),
        (["--vary=trainer.default_root_dir=a,b"], "the sweep itself sets trainer.default_root_dir"),
        (["--vary=model.net.dropout=0,0.0"], "give the same settings"),
        (["--seed_everything=4294967295"], "the last seed would be 4294967297"),
        (["--trainer.max_steps=5", "--trainer.val_check_interval=3"], "not a multiple of trainer.val_check_interval 3"),
        (["--vary=model.net.n_head=2,3"], "got n_embd 32 and n_head 3 (with --model.net.n_head=3)"),
        (["--vary=model.net=Transformer,nowhere.Net"], "there is no module nowhere"),
        (["--vary=model.optimizer.lrr=1,2"], "no option lrr"),
        (["--search=model.optimizer.lr=3..1"], "expected a range such as"),
        (["--search=model.optimizer.lr=1..3", "--seeds=2"], "--search uses one seed"),
        (
            ["--search=model.optimizer.lr=1..3", "--prune", "--trainer.max_steps=7", "--trainer.val_check_interval=7"],
            "--prune needs several validations in a run of 7 steps",
        ),
        (["--trials=2"], "belong to --search"),
        (["--seeds=0"], "--seeds must be at least 1, got 0"),
        (["--ckpt_path=best"], "--ckpt_path cannot be used in a sweep"),
        (["--init_from=best"], "no run in 'sweeps' has a checkpoint 'best' yet"),
        (["--model=lmlight.DistilledModel", "--model.teachers=best"], "no run in 'sweeps' has a checkpoint 'best' yet"),
        (["--trainer.callbacks=null"], "needs LearningCurve"),
        (["--trainer.barebones=true"], "needs LearningCurve"),
        (["--report=nowhere"], "there is no sweep in 'nowhere'"),
    ],
)
def test_wrong_flags_fail_before_the_first_trial(flags, message, capsys, tmp_path):
    assert main(["sweep", *tiny.FLAGS, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lmlight: error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flags", "scored"), [([], "tune"), (["--on=val"], "val")])
def test_on_overrides_a_config(flags, scored, corpus_file, monkeypatch):
    monkeypatch.setattr(worker, "work", lambda study, plan: False)
    Path("tune.yaml").write_text(f"data:\n  validate_on: tune\n  corpus: {corpus_file}\n")
    assert main(["sweep", *tiny.FLAGS, "--config=tune.yaml", "--study=study", *flags]) == 130
    assert Study(Path("study")).settings["on"] == scored


def test_equal_configs_are_told(capsys):
    for name in "ab":
        Path(f"{name}.yaml").write_text("trainer:\n  max_steps: 3\n")
    assert main(["sweep", *tiny.FLAGS, "--vary=config=a.yaml,b.yaml", "--trainer.max_steps=200"]) == 2
    assert "--config=a.yaml and --config=b.yaml give the same settings" in capsys.readouterr().err


def test_folder_of_another_sweep_is_refused(compared):
    with pytest.raises(UserError, match="a sweep of other settings"):
        Study(Path("study"), {**SETTINGS, "identity": "another"})


def test_torn_journal_is_repaired_and_a_damaged_one_is_one_line(compared, capsys):
    journal = Path("study/journal.log")
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "worker')  # as a full disk leaves it
    assert main(["sweep", "--report", "study"]) == 0
    assert len(Study(Path("study"), SETTINGS).trials()) == 9  # and repairs it
    Study(Path("study"), SETTINGS).enqueue([params(0.1, 9)])
    assert len(Study(Path("study")).trials()) == 10
    journal.write_bytes(b"{\n" + journal.read_bytes())
    capsys.readouterr()
    assert main(["sweep", "--report", "study"]) == 2
    assert "the sweep in 'study' cannot be used" in capsys.readouterr().err


def test_a_line_that_another_process_is_writing_is_not_cut_off(compared):
    journal = Path("study/journal.log")
    whole, lock = journal.read_bytes(), JournalFileOpenLock("study/journal.log")
    lock.acquire()
    journal.write_bytes(whole[:-9])
    opening = threading.Thread(target=Study, args=(Path("study"), SETTINGS))
    opening.start()
    time.sleep(0.2)
    assert journal.read_bytes() == whole[:-9]
    journal.write_bytes(whole)
    lock.release()
    opening.join()
    assert journal.read_bytes().startswith(whole)


@pytest.mark.slow
def test_two_processes_share_six_trials_through_a_kill_and_an_interrupt(corpus_file):
    flags = [
        "sweep",
        *tiny.FLAGS,
        f"--data.corpus={corpus_file}",
        "--trainer.max_steps=20",
        "--trainer.val_check_interval=2",
    ]
    flags += ["--seeds=3", "--vary=model.optimizer.lr=0.001,0.01", "--study=study"]
    killed, interrupted = processes.start(*flags), processes.start(*flags)
    runs = Path("study/trials")
    for process, number in ((killed, signal.SIGKILL), (interrupted, signal.SIGINT)):
        before = len(list(runs.glob("*/*/metrics.csv")))
        wait_for(lambda count=before: len(list(runs.glob("*/*/metrics.csv"))) > count or count)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert interrupted.returncode == 130
    processes.run_afresh(*flags)
    study = Study(Path("study"))
    found = study.trials()
    assert sorted((one.params["model.optimizer.lr"], one.params[SEED]) for one in found) == sorted(
        itertools.product(("0.001", "0.01"), (1337, 1338, 1339))
    )
    for trial in found:
        assert trial.state == TrialState.COMPLETE
        (table,) = study.trial_folder(trial).glob("*/metrics.csv")  # one run
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [float(row["step"]) for row in rows] == list(range(2, 21, 2))  # each step once
        assert trial.value == float(rows[-1][METRIC])


def wait_for(condition):
    for _ in range(600):
        with suppress(OSError):
            if condition():
                return
        time.sleep(0.1)
    raise AssertionError("waited for a minute")


def test_runs_that_end_by_the_clock_are_refused(capsys):
    assert main(["sweep", "--vary=model.optimizer.lr=0.1,0.2", "--trainer.max_time=00:00:01:00"]) == 2
    assert "trainer.max_time cannot be used in a sweep" in capsys.readouterr().err


def test_trial_whose_final_model_is_not_validated_fails(tmp_path, corpus_file):
    words = [*tiny.FLAGS, f"--data.corpus={corpus_file}", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"]
    with pytest.raises(TrialFailed, match="the final model, at step 3, was not validated"):
        trials.run_fit(tmp_path / "trial", [*words, "--trainer.val_check_interval=2"], lambda *_: True)


def test_parameters_are_counted_without_buffers_and_a_logger_may_have_a_folder(tmp_path, corpus_file, monkeypatch):
    code = """
import torch
from lmlight import Bigram

class Masked(Bigram):
    def __init__(self, vocab_size, block_size):
        super().__init__(vocab_size, block_size)
        self.register_buffer("mask", torch.ones(block_size, block_size))
"""
    (tmp_path / "masked.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    words = [word for word in tiny.FLAGS if not word.startswith("--model")] + [f"--data.corpus={corpus_file}"]
    words += ["--model.net=masked.Masked", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    found = trials.run_fit(tmp_path / "trial", [*words, "--trainer.logger=true"], lambda *_: True)
    vocab_size = checkpoint.tokenizer_of(
        checkpoint.read(trials.run_folder(tmp_path / "trial") / trials.LAST)
    ).vocab_size
    assert found["parameters"] == vocab_size**2
