"""`lmlight sweep`: the study, its trials and what the report concludes."""

import csv
import itertools
import math
import signal
import time
from contextlib import suppress
from pathlib import Path

import processes
import pytest
import tiny
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from scipy import stats

from lmlight.__main__ import main
from lmlight.errors import UserError
from lmlight.sweep import command, report
from lmlight.sweep import study as studies
from lmlight.sweep.report import interval, settings_of
from lmlight.sweep.study import SEED, STALE_SECONDS, Study
from lmlight.sweep.trial import METRIC, TrialFailed
from lmlight.training.cli import check_fit

RATES = {"model.optimizer.lr": CategoricalDistribution([0.1, 0.2, 9])}
SPACE = {**RATES, SEED: IntDistribution(0, 9)}
SETTINGS = {
    "fit": ["--config=a b.yaml"],
    "on": "val",
    "prune": False,
    "identity": "",
    "baseline": {"model.optimizer.lr": 0.1},
}


def params(rate, seed):
    return {"model.optimizer.lr": rate, SEED: seed}


def finished(rate, seed, value, **options):
    attrs = {"seconds": 2.0, "parameters": 1000}
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
        ["9", "failed", "–", "0", "–", "–"],
    ]
    assert [row[-1] for row in rows[2:]] == ["baseline", "–"]
    assert rows[1][-1].startswith("-0.0867 (-0.1246 to -0.0487)") and "no difference" not in rows[1][-1]
    assert "Failed: model.optimizer.lr=9, seed_everything=1: out of memory" in out
    assert "lmlight fit '--config=a b.yaml' --model.optimizer.lr=0.2 --seed_everything=0" in out
    with Path("study/trials.csv").open(newline="", encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE", "FAIL"] * 3
    assert trials[2]["reason"] == "out of memory"
    for name in ("comparison", "curves"):
        assert Path(f"study/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_report_says_that_no_difference_is_shown(compared, capsys):
    compared.optuna.add_trial(finished(0.2, 3, 1.60))
    compared.optuna.add_trial(finished(0.1, 3, 1.40))
    report.write(compared)
    assert "no difference shown" in capsys.readouterr().out


def test_report_without_a_success_has_status_1(capsys):
    study = Study(Path("study"), SETTINGS)
    study.enqueue([params(0.1, 1)])
    assert report.write(study) == 1
    assert "Not finished: 1 of 1 trials" in capsys.readouterr().out


def test_values_and_ranges():
    assert command.parse_values("f", "0.01,1e-3,my.module.Net,null,[1, 2]") == [
        0.01,
        "1e-3",
        "my.module.Net",
        None,
        "[1, 2]",
    ]
    assert command.parse_range("f", "1..6") == IntDistribution(1, 6)
    assert command.parse_range("f", "log:1e-3..3e-2") == FloatDistribution(1e-3, 3e-2, log=True)
    assert command.parse_range("f", "0.0..1") == FloatDistribution(0, 1)
    assert command.parse_range("f", "A,B") == CategoricalDistribution(["A", "B"])
    assert studies.flags({"a": 0.1, "b": True, "c": None, "d": "x"}) == ["--a=0.1", "--b=true", "--c=null", "--d=x"]


def test_each_trial_is_claimed_once():
    grid = [params(rate, seed) for rate, seed in itertools.product((0.1, 0.2), range(3))]
    workers = [Study(Path("study"), SETTINGS) for _ in range(2)]
    for worker in workers:
        worker.enqueue(grid)
    claimed = [workers[turn % 2].claim(SPACE, None, 0) for turn in range(7)]
    assert claimed.pop() is None
    assert [trial.params for trial in claimed] == grid
    workers[0].enqueue([*grid, params(0.1, 3)])  # one more seed
    assert workers[1].claim(SPACE, None, 0).params == params(0.1, 3)


def test_search_has_the_number_of_trials_asked_for_and_different_values():
    workers = [Study(Path("study"), {**SETTINGS, "baseline": None}) for _ in range(2)]
    space = {"lr": FloatDistribution(0, 1)}
    claimed = [workers[turn % 2].claim(space, 5, 0) for turn in range(6)]
    assert claimed.pop() is None
    assert len({trial.params["lr"] for trial in claimed}) == 5


@pytest.mark.parametrize("interrupted", ["released", "killed", "elsewhere"])
def test_interrupted_trial_is_run_again_in_its_folder(interrupted, monkeypatch):
    study = Study(Path("study"), SETTINGS)
    study.enqueue([params(0.1, 1)])
    trial = study.claim(SPACE, None, 0)
    assert study.claim(SPACE, None, 0) is None
    if interrupted == "released":
        study.release(trial)
    elif interrupted == "killed":
        heartbeat = study.trial_folder(trial) / "heartbeat"
        host, *_ = heartbeat.read_text().split()
        heartbeat.write_text(f"{host} {2**30} {2**30}")
    else:
        monkeypatch.setattr(studies.socket, "gethostname", lambda: "another machine")
        assert study.claim(SPACE, None, 0) is None
        monkeypatch.setattr(studies, "STALE_SECONDS", -STALE_SECONDS)
    again = study.claim(SPACE, None, 0)
    assert again.number != trial.number and again.params == trial.params
    assert study.trial_folder(again) == study.trial_folder(trial)
    assert [one.state for one in study.trials()] == [TrialState.RUNNING]


@pytest.mark.parametrize(("value", "pruned"), [(2.0, True), (1.0, False)])
def test_pruning_stops_a_trial_above_the_median(value, pruned, monkeypatch):
    study = Study(Path("study"), {**SETTINGS, "prune": True})
    for seed in range(5):
        study.optuna.add_trial(finished(0.1, seed, 1.4, intermediate_values={10: 1.5}))
    study.enqueue([params(0.2, 0)])

    def train(folder, args, watch):
        row = {"step": 10.0, METRIC: value}
        return {METRIC: value, "seconds": 1.0, "parameters": 1} if watch(1, [row]) else None

    monkeypatch.setattr(command, "train", train)
    trial = study.claim(SPACE, None, 0)
    assert command.run_trial(study, trial) == ("pruned at step 10" if pruned else f"{METRIC} 1.0000")
    state = TrialState.PRUNED if pruned else TrialState.COMPLETE
    assert [one.state for one in study.trials()][-1] == state


def test_failed_trial_keeps_its_reason(monkeypatch):
    def train(*_):
        raise TrialFailed("out of memory")

    study = Study(Path("study"), SETTINGS)
    study.enqueue([params(0.1, 0)])
    monkeypatch.setattr(command, "train", train)
    assert command.run_trial(study, study.claim(SPACE, None, 0)) == "failed: out of memory"
    (trial,) = study.trials()
    assert trial.state == TrialState.FAIL and trial.user_attrs["reason"] == "out of memory"


def test_check_fit_returns_the_settings_and_writes_nothing(tmp_path):
    settings = check_fit([*tiny.FLAGS, "--model.optimizer.lr=0.5", "--data.validate_on=tune"])
    assert settings["model"]["optimizer"]["init_args"]["lr"] == 0.5
    assert settings["data"]["validate_on"] == "tune"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vary", "model.optimizer.lr=0.1,0.1"], "different values"),
        (["--vary", "model.optimizer.lr"], "expected each flag once"),
        (["--vary=model.net.n_head=2,3"], "n_embd must be a multiple of n_head"),
        (["--vary=model.net=Transformer,nowhere.Net"], "there is no module nowhere"),
        (["--vary=model.optimizer.lrr=1,2"], "no option lrr"),
        (["--search=model.optimizer.lr=3..1"], "expected a range such as"),
        (["--search=model.optimizer.lr=1..3", "--seeds=2"], "--search uses one seed"),
        (["--trials=2"], "belong to --search"),
        (["--seeds=0"], "--seeds must be at least 1, got 0"),
        (["--ckpt_path=best"], "--ckpt_path cannot be used in a sweep"),
        (["--trainer.callbacks=null"], "needs the callback LearningCurve"),
        (["--report=nowhere"], "there is no sweep in 'nowhere'"),
    ],
)
def test_wrong_flags_fail_before_the_first_trial(flags, message, capsys, tmp_path):
    assert main(["sweep", *tiny.FLAGS, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lmlight: error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folder_of_another_sweep_is_refused(compared):
    with pytest.raises(UserError, match="a sweep of other settings"):
        Study(Path("study"), {**SETTINGS, "identity": "another"})


def test_damaged_journal_is_one_line(compared, capsys):
    Path("study/journal.log").write_text("{")
    assert main(["sweep", "--report", "study"]) == 2
    assert "cannot be used" in capsys.readouterr().err


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
    trials = study.trials()
    assert sorted((one.params["model.optimizer.lr"], one.params[SEED]) for one in trials) == sorted(
        itertools.product((0.001, 0.01), (1337, 1338, 1339))
    )
    for trial in trials:
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
