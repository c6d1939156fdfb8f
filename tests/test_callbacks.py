"""Callbacks against simple reference computations; how TensorBoard shows their output is in test_tensorboard.py."""

import csv
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmlight import Bigram, LanguageModel, Transformer, checkpoint
from lmlight.data.loader import Batch, make_batch
from lmlight.errors import UserError
from lmlight.generation import escape_control_characters
from lmlight.training.callbacks import (
    DEFAULT,
    HParamsLogger,
    LearningCurve,
    Pictures,
    RunLogger,
    RunProgress,
    SampleText,
    Throughput,
    TrainSubsetEval,
    UpdateRatio,
    scalars,
)
from lmlight.training.checkpointing import AtomicCheckpointIO, BestLastCheckpoint

STEPS, VALIDATIONS = 8, (4, 8)


class Recorder(Callback):
    """Records losses, embeddings and batches."""

    def __init__(self):
        self.losses, self.weights, self.batches = [], [], []

    def on_train_start(self, trainer, model):
        self.weights.append(model.net.embedding.weight.detach().clone())

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.on_train_start(trainer, model)
        self.batches.append(batch)


def fit(corpus_file, folder, callbacks, net, **options):
    data = tiny.data(corpus_file)
    model = LanguageModel(net=net)
    settings = {
        **tiny.QUIET,
        "max_steps": STEPS,
        "val_check_interval": VALIDATIONS[0],
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 2,
        "logger": RunLogger(str(folder)),
        "callbacks": callbacks,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(**settings | options)
    trainer.fit(model, datamodule=data)
    return trainer, model, data


@pytest.fixture(scope="module")
def logged_run(tmp_path_factory, corpus_text):
    """A run with all callbacks, and its TensorBoard events."""
    folder = tmp_path_factory.mktemp("logged_run")
    (folder / "corpus.txt").write_bytes(corpus_text.encode())
    recorder = Recorder()
    patch = pytest.MonkeyPatch()
    patch.setenv("LMLIGHT_CACHE", str(folder / "cache"))
    callbacks = [
        recorder,
        Throughput(),
        UpdateRatio(),
        TrainSubsetEval(windows=7),
        SampleText(prompts=["", "MIRA:\n"], max_new_tokens=12, temperature=0.7),
        Pictures(blocks=[2], heads=[1, 4, 9]),
        HParamsLogger(),
        LearningCurve(),
    ]

    def net(vocab_size, block_size):
        return Transformer(vocab_size, block_size, n_layer=2, n_head=4, n_embd=32, positions="learned")

    trainer, model, data = fit(folder / "corpus.txt", folder / "runs", callbacks, net)
    patch.undo()
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"images": 0, "tensors": 0}).Reload()
    return recorder, trainer, model, data, run, events


def values(events, tag):
    return [event.value for event in events.Scalars(tag)]


def test_update_ratio_is_norm_of_step_over_norm_of_weights(logged_run):
    recorder, *_, events = logged_run
    assert values(events, "train/loss") == pytest.approx(recorder.losses[1::2])
    expected = [
        float((recorder.weights[n] - recorder.weights[n - 1]).norm() / recorder.weights[n - 1].norm())
        for n in (2, 4, 6, 8)
    ]
    assert values(events, "update_ratio/embedding") == pytest.approx(expected, rel=1e-4)
    parts = {tag.partition("/")[2] for tag in events.Tags()["scalars"] if tag.startswith("update_ratio/")}
    assert parts == {"embedding", "positions", "block 1", "block 2", "norm", "head"}


def test_throughput_counts_tokens_and_characters_of_the_batches(logged_run):
    recorder, *_, events = logged_run
    tokens, characters = (np.array(values(events, f"throughput/{n}_per_second")) for n in ("tokens", "characters"))
    assert len(tokens) == STEPS / 2
    per_token = [
        sum(float(batch.target_chars.sum()) for batch in recorder.batches[n : n + 2]) / (2 * 8 * 16)
        for n in range(0, 8, 2)
    ]
    assert characters / tokens == pytest.approx(per_token, rel=1e-5)
    assert all(0 <= share < 1 for share in values(events, "throughput/waiting_for_data"))


class Clock(Callback):
    """Replaces `time`: a batch takes 0.25 s to load and 0.25 s to train on, a validation takes a day."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def make_batch(self, rows, char_counts):
        self.now += 0.25
        return make_batch(rows, char_counts)

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.now += 0.25

    def on_validation_end(self, trainer, model):
        self.now += 86400


def test_throughput_excludes_validations_and_measures_waiting(corpus_file, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lmlight.training.callbacks.scalars.time", clock)
    monkeypatch.setattr("lmlight.data.loader.time", clock)
    monkeypatch.setattr("lmlight.data.loader.make_batch", clock.make_batch)
    fit(corpus_file, tmp_path / "runs", [Throughput(), clock], tiny.net)
    (run,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    first, second, third, fourth = values(events, "throughput/tokens_per_second")
    assert second == fourth == pytest.approx(2 * 8 * 16, rel=1e-3), "two steps a second"
    assert 2 * 8 * 16 <= third * 1.001 <= 3 * 8 * 16, "after a validation"
    assert values(events, "throughput/waiting_for_data")[1] == pytest.approx(0.5, rel=1e-3)


def test_throughput_sums_over_devices(monkeypatch):
    clock, model, logged = Clock(), LanguageModel(), {}
    monkeypatch.setattr("lmlight.training.callbacks.scalars.time", clock)
    monkeypatch.setattr(model, "log_dict", logged.update)
    monkeypatch.setattr(scalars, "get_available_flops", lambda device, dtype: {torch.bfloat16: 1e12}[dtype])
    model.net, model.step_loss, model.step_is_logged = tiny.net(400, 16), torch.zeros(()), True
    trainer = SimpleNamespace(
        world_size=3,
        global_step=2,
        log_every_n_steps=2,
        precision="bf16-mixed",
        train_dataloader=None,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        accumulate_grad_batches=1,
    )
    throughput = Throughput()
    throughput.on_train_start(trainer, model)
    clock.now += 2
    throughput.on_train_batch_end(trainer, model, None, Batch(*torch.full((3, 8, 16), 5)), 0)
    assert logged["throughput/tokens_per_second"] == pytest.approx(3 * 8 * 16 / 2, rel=1e-3)
    assert logged["throughput/characters_per_second"] == pytest.approx(5 * 3 * 8 * 16 / 2, rel=1e-3)
    share = 8 * 16 / 2 * 3 * model.net.flops_per_token() / 1e12
    assert logged["throughput/mfu"] == pytest.approx(share, rel=1e-3), "share of their joint peak"


def test_accumulated_batches_are_logged_once_per_step(corpus_file, tmp_path):
    """Five batches, accumulated two at a time: the last step of the epoch has one."""
    recorder = Recorder()
    options = {"accumulate_grad_batches": 2, "limit_train_batches": 5, "log_every_n_steps": 1, "max_steps": -1}
    callbacks = [recorder, Throughput(), UpdateRatio()]
    fit(corpus_file, tmp_path / "runs", callbacks, tiny.net, max_epochs=1, val_check_interval=None, **options)
    (run,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    expected = [
        float((recorder.weights[n] - recorder.weights[n - 2]).norm() / recorder.weights[n - 2].norm()) for n in (2, 4)
    ]
    expected.append(float((recorder.weights[5] - recorder.weights[4]).norm() / recorder.weights[4].norm()))
    assert values(events, "update_ratio/embedding") == pytest.approx(expected, rel=1e-4)
    assert len(values(events, "throughput/tokens_per_second")) == 3


@pytest.mark.parametrize(
    ("every", "expected"),
    [(2, [2, 4, 6, 8, 11, 12]), (4, [4, 8, 12]), (5, [6, 11, 12]), (10, [11, 12])],
)
def test_checkpoints_due_at_the_end_of_an_epoch_are_written_after_the_next_step(
    corpus_file, tmp_path, monkeypatch, every, expected
):
    """Epochs of five steps, without validation."""
    written, write = [], AtomicCheckpointIO.save_checkpoint

    def spy(self, checkpoint, path, storage_options=None):
        written.append(checkpoint["global_step"])
        write(self, checkpoint, path)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", spy)
    callbacks = [BestLastCheckpoint(every_n_steps=every)]
    options = {"limit_train_batches": 5, "limit_val_batches": 0, "max_steps": 12, "enable_checkpointing": True}
    options |= {"plugins": [AtomicCheckpointIO()]}
    fit(corpus_file, tmp_path, callbacks, tiny.net, **options)
    assert written == expected


@pytest.mark.skipif(os.name != "posix", reason="on Windows, os.kill ends the process without a signal")
def test_training_can_go_on_in_the_process_that_a_signal_stopped(corpus_file, tmp_path):
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    keeper, options = BestLastCheckpoint(), {"enable_checkpointing": True, "max_steps": 4, "val_check_interval": 4}
    options["plugins"] = [AtomicCheckpointIO()]
    with pytest.raises(SystemExit):
        fit(corpus_file, tmp_path, [keeper, Interrupt()], tiny.net, **options)
    trainer, *_ = fit(corpus_file, tmp_path, [keeper], tiny.net, **options)
    assert trainer.global_step == 4


def test_train_subset_is_scored_like_the_validation_text(logged_run):
    _, _, model, data, _, events = logged_run
    nats = chars = 0.0
    for batch in data.train_subset_dataloader(7):
        losses = F.cross_entropy(
            model.net.eval()(batch.inputs).flatten(0, 1), batch.targets.flatten(), reduction="none"
        )
        nats, chars = nats + float(losses.sum()), chars + int(batch.target_chars.sum())
    assert values(events, "train_subset/nats_per_char")[-1] == pytest.approx(nats / chars, rel=1e-5)
    gap = values(events, "val/nats_per_char")[-1] - nats / chars
    assert values(events, "gap/nats_per_char")[-1] == pytest.approx(gap, abs=1e-5)


def test_gap_is_measured_in_the_precision_of_the_run(corpus_file, monkeypatch):
    under_autocast, score = [], LanguageModel.score

    def spy(self, batch, metric):
        under_autocast.append((torch.is_autocast_enabled("cpu"), metric is self.val_loss))
        return score(self, batch, metric)

    monkeypatch.setattr(LanguageModel, "score", spy)
    options = {"precision": "bf16-mixed", "max_steps": 1, "val_check_interval": 1, "enable_checkpointing": False}
    trainer = pl.Trainer(**tiny.QUIET, **options, callbacks=[TrainSubsetEval(4)])
    trainer.fit(LanguageModel(net=tiny.net), datamodule=tiny.data(corpus_file))
    assert {(True, True), (True, False)} == set(under_autocast)


def test_samples_keep_line_breaks_and_list_their_settings(logged_run):
    _, _, model, _, _, events = logged_run
    samples = events.Tensors("samples/MIRA:/text_summary")
    assert [sample.step for sample in samples] == [step - 1 for step in VALIDATIONS]
    text = samples[-1].tensor_proto.string_val[0].decode()
    settings, _, sample = text.partition("\n\n")
    assert settings == "temperature 0.7, seed 1337, step 8"
    plain = model.generate("MIRA:\n", max_new_tokens=12, temperature=0.7)
    assert [line.removeprefix("    ") for line in sample.split("\n")] == escape_control_characters(plain).split("\n")
    assert "samples/empty prompt/text_summary" in events.Tags()["tensors"]


def test_pictures_draws_requested_heads_and_the_last_validation(logged_run):
    *_, events = logged_run
    expected = {"attention/block 2 head 1", "attention/block 2 head 4", "loss by position", "loss by token"}
    assert set(events.Tags()["images"]) == expected, "there is no head 9"
    for tag in expected:
        assert [image.step for image in events.Images(tag)][-1] == STEPS - 1, "the last validation is always drawn"


@pytest.fixture
def drawn(monkeypatch):
    """Arguments of the functions in `pictures`, by function name."""
    from lmlight import pictures

    seen = {}
    for name in ("token_matrix", "loss_by_token", "loss_by_position"):

        def draw(*arrays, name=name, function=getattr(pictures, name), **options):
            seen.setdefault(name, []).append(arrays)
            return function(*arrays, **options)

        monkeypatch.setattr(pictures, name, draw)
    return seen


def test_pictures_show_values_of_the_net(corpus_file, tmp_path, drawn):
    def net(vocab_size, block_size):
        return Transformer(vocab_size, block_size, n_layer=2, n_head=4, n_embd=32, n_kv_head=2)

    _, model, data = fit(
        corpus_file, tmp_path / "runs", [Pictures(line="MIRA:\nto")], net, max_steps=10, val_check_interval=2
    )
    weights, labels, _ = drawn["token_matrix"][-1]
    assert weights.sum(1) == pytest.approx(np.ones(len(labels)), abs=1e-5)
    assert not np.triu(weights, 1).any()
    assert "".join(labels).replace("↵", "\n").replace("▁", " ") == "MIRA:\nto"
    nats = np.zeros((2, 16))
    for batch in data.val_dataloader():
        losses = F.cross_entropy(model.net.eval()(batch.inputs).mT, batch.targets, reduction="none")
        nats[0, : losses.size(1)] += losses.sum(0).detach().numpy()
        nats[1, : losses.size(1)] += len(losses)
    assert drawn["loss_by_position"][-1][0] == pytest.approx(nats[0] / nats[1], rel=1e-5)
    pieces, loss = drawn["loss_by_token"][-1]
    first = next(iter(data.val_dataloader()))
    losses = F.cross_entropy(model.net(first.inputs[:1]).mT, first.targets[:1], reduction="none")[0]
    assert loss[:16] == pytest.approx(losses.detach().numpy(), rel=1e-5)
    assert pieces[:16] == [model.tokenizer.id_to_piece(index) for index in first.targets[0].tolist()]
    assert len(drawn["loss_by_token"]) == 4, "of five validations, the first, the second, the fourth and the last"


def test_bigram_table_shows_probabilities(corpus_file, tmp_path, drawn):
    _, model, data = fit(corpus_file, tmp_path / "runs", [Pictures()], Bigram)
    table, labels, caption = drawn["token_matrix"][-1]
    frequent = np.bincount(data.val_ids[:]).argsort()[::-1][0]
    assert labels[0] == model.tokenizer.id_to_piece(int(frequent)).replace("\n", "↵")
    assert table[0, 0] == pytest.approx(float(model.net.table.weight[frequent].softmax(-1)[frequent]))
    assert caption == "columns\nfollow rows"


def test_embedding_has_a_label_for_each_row(logged_run):
    _, _, model, _, run, _ = logged_run
    (labels,) = run.glob("**/metadata.tsv")
    (vectors,) = run.glob("**/tensors.tsv")
    labels, rows = labels.read_text("utf-8").rstrip("\n").split("\n"), vectors.read_text().strip().split("\n")
    assert len(labels) == len(rows) == 400
    place = labels.index("↵")
    newline = model.tokenizer.encode("\n")[0]
    assert [float(x) for x in rows[place].split("\t")] == pytest.approx(
        model.net.embedding.weight[newline].tolist(), rel=1e-4
    )


def hparams_of(run):
    """Settings and names of metrics, as TensorBoard's HParams page reads them."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    metadata = EventAccumulator(str(run)).Reload().summary_metadata
    settings, experiment = (
        HParamsPluginData.FromString(metadata[f"_hparams_/{name}"].plugin_data.content)
        for name in ("session_start_info", "experiment")
    )
    return settings.session_start_info.hparams, [metric.name.tag for metric in experiment.experiment.metric_infos]


def test_hparams_list_settings_and_metrics(logged_run):
    *_, run, _ = logged_run
    events = EventAccumulator(str(run)).Reload()
    found, metrics = hparams_of(run)
    assert found["model.net.n_layer"].number_value == 2
    assert found["model.net.positions"].string_value == "learned"
    assert "val/nats_per_char" in metrics
    assert len(values(events, "val/nats_per_char")) == len(VALIDATIONS), "no placeholder values"


def test_hparams_are_named_after_their_flags(corpus_file, tmp_path):
    from lmlight.training.cli import main

    flags = [f"--data.corpus={corpus_file}", *tiny.FLAGS, "--trainer.max_steps=2", "--seed_everything=7"]
    assert main(["fit", *flags, "--trainer.callbacks=HParamsLogger"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    found, _ = hparams_of(run)
    assert found["model.seed"].number_value == 7
    assert found["steps"].number_value == 2
    assert found["model.net.n_layer"].number_value == 1
    assert found["model.net"].string_value == "lmlight.Transformer"
    assert found["data.tokenizer.vocab_size"].number_value == 400
    assert found["data.subword_sampling"].string_value == "None"


class Average(Callback):
    """A reference implementation of the exponential moving average."""

    def __init__(self, decay):
        self.decay, self.weights = decay, None

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        now = {name: weight.clone() for name, weight in model.net.state_dict().items()}
        before = self.weights or now
        self.weights = {name: self.decay * before[name] + (1 - self.decay) * now[name] for name in now}


def test_averaged_weights_are_scored_and_saved(corpus_file, tmp_path):
    plain, keeper = Average(0.8), BestLastCheckpoint()
    model = LanguageModel(net=tiny.net)
    trainer = pl.Trainer(
        max_steps=8,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        callbacks=[EMAWeightAveraging(decay=0.8), plain, keeper],
        plugins=[AtomicCheckpointIO()],
        **tiny.QUIET,
    )
    pl.seed_everything(1, verbose=False)
    trainer.fit(model, datamodule=tiny.data(corpus_file))
    best = LanguageModel.load_from_checkpoint(keeper.best_model_path)
    assert checkpoint.read(keeper.best_model_path)["global_step"] == 8
    for name, weight in best.net.state_dict().items():
        torch.testing.assert_close(weight, plain.weights[name], rtol=0, atol=1e-6)
        assert torch.equal(model.net.state_dict()[name], weight), "the model has them when fit returns"
    metrics = pl.Trainer(**tiny.QUIET).validate(best, datamodule=tiny.data(corpus_file), verbose=False)[0]
    assert metrics["val/nats_per_char"] == pytest.approx(keeper.best_score, rel=1e-6)


def test_averaged_weights_generate_the_samples(corpus_file, tmp_path):
    """Even if the averaging callback comes first in the list."""
    from lmlight.training.cli import main

    sample = "{class_path: lmlight.training.callbacks.SampleText, init_args: {prompts: ['MIRA:'], max_new_tokens: 20}}"
    averaging = "{class_path: EMAWeightAveraging, init_args: {decay: 0.8}}"
    flags = [f"--data.corpus={corpus_file}", *tiny.FLAGS, "--trainer.max_steps=8", "--trainer.val_check_interval=8"]
    assert main(["fit", *flags, f"--trainer.callbacks=[{averaging}, {sample}]"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    text = (
        EventAccumulator(str(run))
        .Reload()
        .Tensors("samples/MIRA:/text_summary")[-1]
        .tensor_proto.string_val[0]
        .decode()
    )
    best = LanguageModel.load_from_checkpoint(run / "checkpoints/best.ckpt")
    expected = escape_control_characters(best.generate("MIRA:", max_new_tokens=20)).split("\n")
    assert [line.removeprefix("    ") for line in text.partition("\n\n")[2].split("\n")] == expected


def test_default_callbacks_skip_the_sanity_check(corpus_file, tmp_path):
    callbacks = [kind() for kind in DEFAULT]
    fit(corpus_file, tmp_path / "runs", callbacks, tiny.net, num_sanity_val_steps=2, max_steps=4)
    (run,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("samples/empty prompt/text_summary")] == [3]
    assert [image.step for image in events.Images("loss by token")] == [3]
    assert len((run / "metrics.csv").read_text().splitlines()) == 2


def test_learning_curve_writes_table_and_figure(logged_run):
    _, _, _, data, run, events = logged_run
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["step"]) for row in rows] == list(VALIDATIONS)
    assert [float(row["val/nats_per_char"]) for row in rows] == pytest.approx(values(events, "val/nats_per_char"))
    assert float(rows[1]["characters"]) == data.characters_seen(8)
    assert float(rows[1]["seconds"]) > float(rows[0]["seconds"]) > 0
    assert {"train/loss", "val/bpc", "train_subset/nats_per_char", "gap/nats_per_char"} < rows[0].keys()
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_learning_curve_in_the_folder_of_any_logger(corpus_file, tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")  # writes into `default_root_dir` itself
    fit(corpus_file, tmp_path, [LearningCurve()], tiny.net, logger=logger, default_root_dir=tmp_path)
    assert "val/nats_per_char" in (tmp_path / "metrics.csv").read_text()
    assert (tmp_path / "curve.png").is_file()


def test_learning_curve_that_cannot_be_written_is_a_warning(corpus_file, tmp_path):
    """On Windows, a spreadsheet may have it open. Here, a folder is in its place."""

    class Occupy(Callback):
        def on_train_start(self, trainer, model):
            for name in ("metrics.csv", "curve.png"):
                (Path(trainer.log_dir) / name).mkdir()

    with pytest.warns(UserWarning, match="cannot be written") as warned:
        trainer, *_ = fit(corpus_file, tmp_path / "runs", [Occupy(), LearningCurve()], tiny.net)
    assert trainer.global_step == STEPS
    for name in ("metrics.csv", "curve.png"):
        assert any(f"{name}' cannot be written (" in str(warning.message) for warning in warned)


def test_learning_curve_counts_seconds_without_validation_and_continues_them(monkeypatch):
    now = iter([50.0, 57.0, 80.0, 81.0])
    monkeypatch.setattr("lmlight.training.callbacks.run.time", SimpleNamespace(monotonic=lambda: next(now)))
    curve = LearningCurve()
    curve.load_state_dict({"rows": [], "seconds": 100.0})
    curve.on_train_batch_start(None, None)
    curve.on_train_batch_start(None, None)
    curve.on_validation_start(None, None)
    assert curve.state_dict()["seconds"] == 107.0
    curve.on_train_batch_start(None, None)  # after a validation of 23 seconds
    assert curve.state_dict()["seconds"] == 108.0


def test_characters_seen_match_the_batches_of_an_epoch(logged_run):
    _, _, _, data, *_ = logged_run
    loader = data.train_dataloader()
    chars = sum(int(batch.target_chars.sum()) for batch in loader)
    assert data.characters_seen(len(loader)) == pytest.approx(chars, rel=0.03)


def test_options_out_of_range_raise():
    with pytest.raises(UserError, match="must"):
        TrainSubsetEval(windows=0)


def test_attention_maps_applied_to_values_give_the_output_of_attention():
    torch.manual_seed(0)
    net = Transformer(11, 8, n_layer=2, n_head=4, n_embd=32, n_kv_head=2).double().eval()
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    idx = torch.randint(11, (3, 8))
    maps = net.attention_maps(idx).detach()
    assert maps.shape == (2, 3, 4, 8, 8)
    block, x = net.blocks[0], net.embedding(idx)
    rope = net.rope
    h = block.attention_norm(x)
    _, _, v = block.attention.project(h, rope=rope)
    gathered = (maps[0] @ v.repeat_interleave(2, dim=1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block.attention.output(gathered), block.attention(h, rope=rope), rtol=0, atol=1e-12)
    assert math.isclose(maps.sum().item(), 2 * 3 * 4 * 8)


def test_training_without_a_logger_names_no_folder(corpus_file, tmp_path, capsys):
    trainer, model, _ = fit(corpus_file, tmp_path, [RunProgress()], tiny.net, max_steps=1, logger=False)
    assert f"Training {model.net.num_parameters:,} parameters on cpu\n" in capsys.readouterr().out
    fit(corpus_file, tmp_path / "runs", [RunProgress()], tiny.net, max_steps=1, default_root_dir=tmp_path)
    assert re.search(r" parameters on cpu in \S*runs\S+\n", capsys.readouterr().out)


def test_learning_curve_has_only_training_losses_of_its_own_steps(corpus_file, tmp_path):
    curve = LearningCurve()
    options = {"max_steps": 15, "val_check_interval": 3, "log_every_n_steps": 10}
    fit(corpus_file, tmp_path / "runs", [curve], tiny.net, **options)
    assert [row["step"] for row in curve.state_dict()["rows"] if "train/loss" in row] == [12]
