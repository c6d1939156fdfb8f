"""Every Trainer argument, callback, logger and profiler of Lightning, and every optimizer of torch.

Each row either works, in `fit` and on resume, or is refused with a one-line error. Python runs rows one by one, in a tenth
of a second each. The command line takes a second or two, so it gets several at a time.
"""

import inspect
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import tiny
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch import profilers as lightning_profilers
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

from lmlight import LanguageModel
from lmlight.errors import UserError
from lmlight.training.callbacks import DEFAULT, RunLogger
from lmlight.training.checkpointing import AtomicCheckpointIO, BestLastCheckpoint
from lmlight.training.cli import main
from lmlight.training.run_checks import check_run

# Values of Trainer arguments; each works alone, from Python.
ARGUMENTS = {
    "accelerator": ["auto", "cpu"],
    "strategy": ["auto", "ddp", "single device"],
    "devices": ["auto", 1, "1"],
    "num_nodes": [1],
    "precision": ["32-true", "64-true", "16-mixed", "bf16-mixed", "bf16-true", 32],
    "logger": [True, False, None, "csv", "tensorboard", "ours", "two"],
    "callbacks": [None, [], "all of lmlight's"],
    "max_epochs": [1, -1, None],
    "min_epochs": [1],
    "max_steps": [2],
    "min_steps": [1],
    "max_time": [{"minutes": 1}, "00:00:01:00"],
    "limit_train_batches": [3, 0.5, 1.0],
    "limit_val_batches": [0, 1, 0.5, 1.0],
    "limit_test_batches": [1],
    "limit_predict_batches": [1],
    "overfit_batches": [1, 0.5],
    "val_check_interval": [1, 2, 100_000, "00:00:00:01", {"seconds": 0}],
    "check_val_every_n_epoch": [None, 1],
    "num_sanity_val_steps": [0, 2, -1],
    "log_every_n_steps": [0, 1, 50],
    "enable_checkpointing": [True],
    "enable_progress_bar": [True, False],
    "enable_model_summary": [True, False],
    "accumulate_grad_batches": [1, 2],
    "gradient_clip_val": [None, 0, 0.5],
    "gradient_clip_algorithm": ["norm", "value"],
    "deterministic": [True, "warn"],
    "benchmark": [True, False],
    "inference_mode": [True, False],
    "use_distributed_sampler": [True, False],
    "profiler": ["simple", "advanced", "pytorch", lightning_profilers.PassThroughProfiler],
    "detect_anomaly": [True],
    "plugins": ["mixed precision", "environment"],
    "sync_batchnorm": [True],
    "reload_dataloaders_every_n_epochs": [1],
    "default_root_dir": ["elsewhere"],
    "enable_autolog_hparams": [True, False],
    "model_registry": ["x"],
}
# These runs keep no checkpoint to resume.
WITHOUT_CHECKPOINTS = [
    {"fast_dev_run": True},
    {"fast_dev_run": 2},
    {"barebones": True},
    {"enable_checkpointing": False},
    {"max_steps": 0},
    {"max_epochs": 0},
    {"limit_train_batches": 0},
]

CALLBACKS = {
    "BasePredictionWriter": {},
    "Callback": {},
    "Checkpoint": {},
    "DeviceStatsMonitor": {},
    "EMAWeightAveraging": {"decay": 0.9},
    "EarlyStopping": {"monitor": "val/nats_per_char"},
    "LambdaCallback": {},
    "LearningRateMonitor": {"logging_interval": "step"},
    "ModelCheckpoint": {"monitor": "val/nats_per_char", "save_top_k": 2},
    "ModelSummary": {"max_depth": 2},
    "OnExceptionCheckpoint": {"dirpath": "on-exception"},
    "ProgressBar": {},
    "RichModelSummary": {},
    "RichProgressBar": {},
    "TQDMProgressBar": {},
    "ThroughputMonitor": {"batch_size_fn": len, "window_size": 2},
    "Timer": {"duration": "00:00:05:00"},
    "WeightAveraging": {},
}
SLOW_CALLBACKS = {"BatchSizeFinder": {"max_trials": 2, "steps_per_trial": 1}}
REFUSED_CALLBACKS = {
    "BackboneFinetuning": {},
    "BaseFinetuning": {},
    "GradientAccumulationScheduler": {"scheduling": {0: 1, 1: 2}},
    "LearningRateFinder": {},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "SpikeDetection": {},
    "StochasticWeightAveraging": {"swa_lrs": 0.01},
}
PROGRESS_BARS = ("ProgressBar", "RichProgressBar", "TQDMProgressBar")

OPTIMIZERS = "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD"
REFUSED_OPTIMIZERS = "LBFGS Muon SparseAdam"  # see test_module.py

# Trainer flags of the command line that work together in one run.
TOGETHER = [
    ["accelerator=cpu", "strategy=auto", "devices=1", "num_nodes=1", "precision=bf16-mixed", "num_sanity_val_steps=2"],
    ["max_epochs=1", "max_steps=-1", "limit_train_batches=3", "limit_val_batches=1", "log_every_n_steps=0"],
    ["min_epochs=1", "min_steps=3", "max_time=00:00:01:00", "overfit_batches=4", "val_check_interval=1"],
    ["accumulate_grad_batches=2", "gradient_clip_algorithm=value", "gradient_clip_val=0.5", "detect_anomaly=true"],
    ["check_val_every_n_epoch=1", "val_check_interval=0.5", "enable_model_summary=true", "limit_test_batches=1"],
    ["val_check_interval=00:00:00:01", "deterministic=warn", "benchmark=true", "inference_mode=false"],
    ["use_distributed_sampler=true", "sync_batchnorm=true", "reload_dataloaders_every_n_epochs=1", "profiler=simple"],
    ["enable_autolog_hparams=false", "model_registry=x", "limit_predict_batches=1", "enable_progress_bar=false"],
    ["enable_checkpointing=true", "strategy=ddp", "plugins=LightningEnvironment", "logger=true"],
    [
        "logger=CSVLogger",
        "logger.save_dir=logs",
        "callbacks+=Timer",
        "callbacks+=RichProgressBar",
        "callbacks+=ModelSummary",
    ],
    ["callbacks+=EarlyStopping", "callbacks.monitor=val/nats_per_char", "callbacks+=ModelCheckpoint", "logger=false"],
    [
        "callbacks+=EMAWeightAveraging",
        "callbacks+=DeviceStatsMonitor",
        "callbacks+=OnExceptionCheckpoint",
        "callbacks.dirpath=x",
    ],
    ["default_root_dir=runs/deeper", "logger=TensorBoardLogger", "logger.save_dir=logs", "callbacks=null"],
]
# Nothing is left of these: no run to resume.
ALONE = [
    ["fast_dev_run=true"],
    ["barebones=true"],
    ["enable_checkpointing=false"],
    ["max_steps=0"],
    ["limit_train_batches=0"],
]
REFUSED = {
    "accelerator=tpu": "torch_xla",
    "accelerator=abacus": "invalid accelerator name",
    "strategy=fsdp": "requires a GPU",
    "strategy=telepathy": "invalid strategy name",
    "devices=-1": "should be an int > 0",
    "devices=0": "not a valid input",
    "devices=3": "a multiple of 3 processes",
    "precision=7": "trainer.precision",
    "precision=transformer-engine": "transformer_engine",
    "max_steps=-1": "a linear schedule ends at the run's last step",
    "max_time=soon": "DD:HH:MM:SS",
    "num_nodes=0": "positive integer",
    "check_val_every_n_epoch=0": "must be at least 1, got 0",
    "check_val_every_n_epoch=1": "less than or equal to the number of the training batches",
    "profiler=xla": "torch_xla",
    "val_check_interval=0": "must be above 0, got 0",
    "accumulate_grad_batches=0": "must be at least 1, got 0",
    "default_root_dir=corpus.txt/x": "the run's folder cannot be made in 'corpus.txt/x'",
    "val_check_interval=0.5": "check_val_every_n_epoch",
    "accumulate_grad_batches=3": "batch_size 8",
    "gradient_clip_algorithm=scissors": "['value', 'norm']",
    "profiler=fbi": "can only be one of",
    "plugins=AsyncCheckpointIO": "CheckpointIO",
    "logger=WandbLogger": "wandb",
    "logger=MLFlowLogger": "mlflow",
    "logger=CometLogger": "comet",
    "logger=LitLogger": "trainer.logger",
    "callbacks+=EarlyStopping": "monitor",
    "callbacks+=NoSuchCallback": "trainer.callbacks",
    "callbacks+=OnExceptionCheckpoint": "trainer.callbacks",
    "callbacks+=ThroughputMonitor": "trainer.callbacks",
    "callbacks+=ModelPruning": "trainer.callbacks",
    "callbacks+=LearningRateFinder": "LearningRateFinder cannot be used",
    "callbacks+=BackboneFinetuning": "BackboneFinetuning cannot be used",
    "callbacks+=SpikeDetection": "SpikeDetection cannot be used",
    "callbacks+=StochasticWeightAveraging": "swa_lrs",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus_text):
    """The folder of the corpus, and of a cache that all rows share."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "corpus.txt").write_bytes(corpus_text.encode())
    return folder


@pytest.fixture(autouse=True)
def _share_the_cache(place, monkeypatch):
    monkeypatch.setenv("LMLIGHT_CACHE", str(place / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(name, value):
    """Makes the value of a row: some objects must be new for each trainer."""
    if name == "logger" and value in ("csv", "tensorboard", "ours", "two"):
        csv, ours = lightning_loggers.CSVLogger("logs"), RunLogger("runs")
        return {
            "csv": csv,
            "tensorboard": lightning_loggers.TensorBoardLogger("logs"),
            "ours": ours,
            "two": [csv, ours],
        }[value]
    if name == "callbacks" and value == "all of lmlight's":
        return [kind() for kind in DEFAULT]
    if value == "single device":
        return SingleDeviceStrategy("cpu")
    if name == "plugins":
        plugin = MixedPrecision("bf16-mixed", "cpu") if value == "mixed precision" else LightningEnvironment()
        return [plugin, AtomicCheckpointIO()]
    return value


def fit(place, options, ckpt_path=None, optimizer=None):
    """Runs `Trainer.fit`, with lmlight's checkpoints unless the row disables them."""
    settings = {**tiny.QUIET, "max_steps": 2, "check_val_every_n_epoch": None, "val_check_interval": 2, **options}
    if "barebones" in options:
        settings = {key: value for key, value in settings.items() if key not in tiny.QUIET or key == "accelerator"}
    keeps = not {"barebones", "fast_dev_run"} & options.keys() and options.get("enable_checkpointing") is not False
    settings["callbacks"] = [*(options.get("callbacks") or []), *([BestLastCheckpoint()] if keeps else [])]
    settings.setdefault("plugins", [AtomicCheckpointIO()])
    model = LanguageModel(net=tiny.net, **({"optimizer": optimizer} if optimizer else {}))
    trainer = pl.Trainer(**settings)
    trainer.fit(model, datamodule=tiny.data(place / "corpus.txt"), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def works(place, options, optimizer=None):
    """Checks that the row trains, and resumes for two more steps."""

    def make():
        return {name: made(name, value() if callable(value) else value) for name, value in options.items()}

    trainer = fit(place, make(), optimizer=optimizer)
    assert trainer.global_step > 0
    last, steps = trainer.checkpoint_callbacks[-1].last_model_path, trainer.global_step + 2
    resumed = {**make(), "max_epochs": -1, "max_steps": steps}
    assert fit(place, resumed, ckpt_path=last, optimizer=optimizer).global_step == steps


ROWS = [(name, value) for name, values in ARGUMENTS.items() for value in values]


def row_id(row):
    return f"{row[0]}={getattr(row[1], '__name__', row[1])}"


@pytest.mark.parametrize(("name", "value"), ROWS, ids=map(row_id, ROWS))
def test_trainer_argument_works(place, name, value):
    options = {name: value, "accelerator": "auto"} if value == "single device" else {name: value}
    if name == "check_val_every_n_epoch" and value:
        options["val_check_interval"] = 0.5
    works(place, options)


@pytest.mark.parametrize("options", WITHOUT_CHECKPOINTS, ids=str)
def test_run_without_checkpoints_works(place, options):
    fit(place, options)


@pytest.mark.parametrize("name", [*CALLBACKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CALLBACKS)])
def test_callback_works(place, name):
    options = {"callbacks": lambda: [getattr(lightning_callbacks, name)(**{**CALLBACKS, **SLOW_CALLBACKS}[name])]}
    if name in PROGRESS_BARS:
        options["enable_progress_bar"] = True
    if name in ("LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor"):
        options |= {"logger": "csv", "log_every_n_steps": 2}
    works(place, options)


@pytest.mark.parametrize("name", REFUSED_CALLBACKS)
def test_unsuitable_callback_is_refused(place, name):
    callback = getattr(lightning_callbacks, name)(**REFUSED_CALLBACKS[name])
    with pytest.raises(UserError, match=r"^\w+ cannot be used: "):
        fit(place, {"callbacks": [callback]})


def test_fsdp1_is_refused():
    trainer = SimpleNamespace(callbacks=[], strategy=FSDPStrategy())  # a `Trainer` would need a GPU
    with pytest.raises(UserError, match="use ModelParallelStrategy"):
        check_run(trainer, None)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_fsdp1_is_refused_without_training(place, stage):
    model = LanguageModel(net=tiny.net)
    data = tiny.data(place / "corpus.txt")
    data.prepare_data()
    data.setup(stage)
    model.trainer = SimpleNamespace(datamodule=data, strategy=FSDPStrategy())  # a `Trainer` would need a GPU
    with pytest.raises(UserError, match="use ModelParallelStrategy"):
        model.setup(stage)


@pytest.mark.parametrize("name", OPTIMIZERS.split())
def test_optimizer_works(place, name):
    works(place, {}, optimizer=lambda params: getattr(torch.optim, name)(params, lr=1e-3))


def test_tables_are_complete():
    """New releases of Lightning and torch may add arguments and classes."""
    arguments = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert arguments == ARGUMENTS.keys() | {name for row in WITHOUT_CHECKPOINTS for name in row}
    flags = {flag.partition("=")[0].rstrip("+").partition(".")[0] for row in (*TOGETHER, *ALONE) for flag in row}
    refused = {flag.partition("=")[0].partition(".")[0] for flag in REFUSED}
    assert arguments == flags | (refused & arguments)
    assert set(lightning_callbacks.__all__) == CALLBACKS.keys() | SLOW_CALLBACKS.keys() | REFUSED_CALLBACKS.keys()
    tried = ("CSVLogger", "TensorBoardLogger", *(row.removeprefix("logger=") for row in REFUSED))
    assert set(lightning_loggers.__all__) - {"Logger"} <= set(tried)
    optimizers = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    assert optimizers == {*OPTIMIZERS.split(), *REFUSED_OPTIMIZERS.split()}


# The command line


def lmlight(place, *flags):
    return main(["fit", f"--data.corpus={place / 'corpus.txt'}", *tiny.FLAGS, "--trainer.max_steps=4", *flags])


@pytest.mark.parametrize("flags", TOGETHER)
def test_trainer_flags_work_and_are_resumed(place, capsys, flags):
    given = [
        "--trainer.val_check_interval=2",
        "--trainer.callbacks=UpdateRatio",
        *(f"--trainer.{flag}" for flag in flags),
    ]
    assert lmlight(place, *given) == 0, capsys.readouterr().err
    root = [f"--trainer.{flag}" for flag in flags if flag.startswith("default_root_dir")]
    assert main(["fit", "--ckpt_path=last", "--trainer.max_steps=14", *root]) == 0, capsys.readouterr().err
    assert "Resuming runs/" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ALONE)
def test_trainer_flags_without_checkpoints_work(place, capsys, flags, tmp_path):
    assert lmlight(place, *(f"--trainer.{flag}" for flag in flags)) == 0, capsys.readouterr().err
    assert not list(tmp_path.glob("runs/**/*.ckpt"))
    assert not (tmp_path / "runs").exists() or flags[0] not in ("fast_dev_run=true", "barebones=true")


@pytest.mark.parametrize("flag", REFUSED)
def test_invalid_trainer_flag_is_a_one_line_error(place, capsys, flag, tmp_path):
    (tmp_path / "corpus.txt").touch()
    assert lmlight(place, f"--trainer.{flag}") == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.split("\n") if line and not line.startswith("lmlight: warning: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("lmlight: error: ")
    assert REFUSED[flag] in lines[0]
    # this error is raised after the loggers have made their folders
    assert not (tmp_path / "runs").exists() or flag == "check_val_every_n_epoch=1"
