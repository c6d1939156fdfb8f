"""LanguageModel and Lightning's Trainer, from Python."""

import csv
import itertools
import math
import pickle
from types import SimpleNamespace

import lightning.pytorch as pl
import processes
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder

from lmlight import Bigram, LanguageModel, Sampling, TextDataModule, checkpoint
from lmlight.data.tokenizer import TokenizerConfig
from lmlight.errors import UserError
from lmlight.export.model import Model
from lmlight.optim import Schedule
from lmlight.training.checkpointing import AtomicCheckpointIO, BestLastCheckpoint
from lmlight.training.cli import main


def small_net(vocab_size, block_size):
    return tiny.net(vocab_size, block_size, dropout=0.1)


@pytest.fixture
def data(corpus_file):
    return tiny.data(corpus_file)


def adamw(params):
    return torch.optim.AdamW(params, lr=2e-3, weight_decay=0.1, fused=True)


def trained(data, steps=5, net=small_net, optimizer=adamw, **options):
    pl.seed_everything(1, verbose=False)
    model = LanguageModel(net=net, optimizer=optimizer, schedule=Schedule("linear", 2))
    trainer = pl.Trainer(max_steps=steps, enable_checkpointing=False, **tiny.QUIET, **options)
    trainer.fit(model, datamodule=data)
    return trainer, model


@pytest.mark.parametrize("net", [small_net, Bigram], ids=["transformer", "bigram"])
def test_validation_metrics_equal_plain_sums(data, corpus_text, net):
    trainer, model = trained(data, net=net)
    metrics = trainer.validate(model, datamodule=data, verbose=False)[0]

    train, val = corpus_text[: int(0.9 * len(corpus_text))], corpus_text[int(0.9 * len(corpus_text)) :]
    stream = model.tokenizer.encode(train)[-1:] + model.tokenizer.encode(val)
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 16):
            window = torch.tensor(stream[start : start + 17])
            logits = model.eval().net(window[None, :-1])[0]
            nats -= logits.log_softmax(-1).gather(1, window[1:, None]).sum().item()
    assert metrics["val/characters"] == len(val)
    assert metrics["val/nats_per_char"] == pytest.approx(nats / len(val), rel=1e-5)
    assert metrics["val/bpc"] == pytest.approx(nats / len(val) / math.log(2), rel=1e-5)
    assert metrics["val/loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(nats / (len(stream) - 1)), rel=1e-4)


def test_sliding_window_test_scores_the_same_characters(data, corpus_text):
    trainer, model = trained(data, steps=30)
    metrics = {k: v for part in trainer.test(model, datamodule=data, verbose=False) for k, v in part.items()}
    plain = trainer.validate(model, datamodule=data, verbose=False)[0]
    names = {name.split("/dataloader")[0]: value for name, value in metrics.items()}
    assert names["test/nats_per_char"] == plain["val/nats_per_char"]
    assert (
        names["test_sliding/characters"] == names["test/characters"] == len(corpus_text) - int(0.9 * len(corpus_text))
    )
    assert names["test_sliding/nats_per_char"] != names["test/nats_per_char"]


def test_training_equals_a_plain_adamw_loop(data):
    """The reference has the same windows, schedule, groups and clipping, without Lightning."""
    _, model = trained(data, steps=4, net=tiny.net, gradient_clip_val=1.0)
    pl.seed_everything(1, verbose=False)
    plain = tiny.net(model.tokenizer.vocab_size, 16)
    matrices = [p for p in plain.parameters() if p.dim() == 2]
    vectors = [p for p in plain.parameters() if p.dim() < 2]
    optimizer = adamw([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    for step, batch in zip(range(4), data.train_dataloader()):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * [1 / 3, 2 / 3, 1.0, 0.5][step]
        loss = F.cross_entropy(plain(batch.inputs).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for (name, a), (_, b) in zip(model.net.named_parameters(), plain.named_parameters()):
        torch.testing.assert_close(a, b, msg=name)


def test_gradient_accumulation_gives_the_same_steps_and_metrics(data, tmp_path):
    def logged(accumulate):
        logger = pl.loggers.CSVLogger(tmp_path, name="", version=str(accumulate))
        options = {**tiny.QUIET, "logger": logger, "log_every_n_steps": 1, "gradient_clip_val": 1e-3}
        pl.seed_everything(1, verbose=False)
        model = LanguageModel(net=tiny.net, optimizer=adamw, schedule=Schedule("linear", 2))
        trainer = pl.Trainer(max_steps=3, enable_checkpointing=False, accumulate_grad_batches=accumulate, **options)
        trainer.fit(model, datamodule=data)
        with (tmp_path / str(accumulate) / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["train/loss"]]
        return [[float(row[name]) for name in ("step", "train/loss", "grad_norm")] for row in rows]

    once = logged(1)
    assert len(once) == 3
    assert min(norm for _, _, norm in once) > 0.1, "the norm before clipping"
    assert logged(4) == [pytest.approx(row, rel=1e-4) for row in once]


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 4), (4, 2)])
@pytest.mark.parametrize(("steps", "at"), [(9, "last step"), ("epoch", "last step"), (9, "end of fit")])
def test_resume_with_other_accumulated_batches_takes_the_same_steps(data, tmp_path, before, after, steps, at):
    """From within an epoch and from its end; Lightning's counts differ between a step and the end of `fit`."""

    def fit(steps, accumulate, ckpt_path=None):
        seen = []

        class Note(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                seen.extend((trainer.global_step, row) for row in batch.inputs.tolist())

        keeper = BestLastCheckpoint()
        options = {**tiny.QUIET, "plugins": [AtomicCheckpointIO()], "accumulate_grad_batches": accumulate}
        options |= {"callbacks": [Note(), keeper], "default_root_dir": tmp_path, "limit_val_batches": 0}
        trainer = pl.Trainer(max_steps=steps, **options)
        model = LanguageModel(net=Bigram, optimizer=adamw, schedule=Schedule("constant", 2))
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        assert trainer.global_step == steps
        return seen, trainer, keeper.last_model_path

    whole, trainer, _ = fit(40, 1)
    per_epoch = trainer.num_training_batches
    assert 10 < per_epoch < 38
    steps = per_epoch if steps == "epoch" else steps
    _, trainer, path = fit(steps, before)
    if at == "end of fit":
        trainer.save_checkpoint(path)
    seen, trainer, _ = fit(40, after, path)
    assert seen == [(step, row) for step, row in whole if step >= steps]


@pytest.mark.parametrize(
    "after", [{"val_check_interval": 7}, {"val_check_interval": "00:01:00:00"}, {"limit_val_batches": 0}, {}], ids=str
)
def test_resume_at_the_end_of_an_epoch_with_other_validations_skips_no_text(data, tmp_path, after):
    def fit(steps, ckpt_path=None, **options):
        seen = []

        class Note(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                seen.append((trainer.global_step, batch.inputs.tolist()))

        keeper = BestLastCheckpoint()
        options |= {"check_val_every_n_epoch": None, "callbacks": [Note(), keeper], "plugins": [AtomicCheckpointIO()]}
        trainer = pl.Trainer(max_steps=steps, default_root_dir=tmp_path, **options, **tiny.QUIET)
        model = LanguageModel(net=Bigram, optimizer=adamw, schedule=Schedule("constant", 2))
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return seen, trainer.num_training_batches, keeper.last_model_path

    whole, per_epoch, _ = fit(80, limit_val_batches=0)
    assert 10 < per_epoch < 38
    _, _, path = fit(per_epoch, val_check_interval=per_epoch)
    before = {"val_check_interval": per_epoch}
    assert fit(80, path, **{**before, **after})[0] == whole[per_epoch:]


def test_epochs_whose_loader_is_made_anew_differ(data):
    """`reload_dataloaders_every_n_epochs` changes nothing, and `overfit_batches` repeats the first batches."""

    def seen(**options):
        batches = []

        class Note(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                batches.append(batch.inputs.tolist())

        options = {"max_epochs": 2, "limit_train_batches": 3, **options}
        model = LanguageModel(net=Bigram, optimizer=adamw, schedule=Schedule("constant"))
        trainer = pl.Trainer(enable_checkpointing=False, callbacks=[Note()], **tiny.QUIET, **options)
        trainer.fit(model, datamodule=data)
        return batches

    plain = seen()
    assert len(plain) == 6 and plain[:3] != plain[3:]
    assert seen(reload_dataloaders_every_n_epochs=1) == plain
    assert seen(limit_train_batches=1.0, overfit_batches=3) == plain[:3] * 2


def test_loader_follows_a_batch_size_that_a_callback_changes(data):
    sizes = []

    class Note(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append(len(batch.inputs))

    finder = BatchSizeFinder(init_val=4, max_trials=2, steps_per_trial=1)
    trained(data, steps=1, net=Bigram, callbacks=[finder, Note()])
    assert sizes[-1] == data.batch_size != 4


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": "00:00:00:05", "check_val_every_n_epoch": None},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"val_check_interval": 0.15, "max_epochs": 1, "max_steps": -1},
    ],
)
def test_validation_between_micro_batches_is_refused(data, options):
    """Checkpoints are written at validations, and would lose the gradients so far."""
    trainer = pl.Trainer(
        **{"max_steps": 4, **tiny.QUIET, **options}, accumulate_grad_batches=2, callbacks=[BestLastCheckpoint()]
    )
    with pytest.raises(UserError, match="a multiple of trainer.accumulate_grad_batches 2"):
        trainer.fit(LanguageModel(net=tiny.net), datamodule=data)


def test_random_numbers_depend_on_seed_step_micro_batch_and_rank():
    """Checkpoints need no generator state for exact resume."""
    drawn = {}
    places = list(itertools.product((1, 2), (0, 1, 7), (0, 1), (0, 1)))
    for seed, step, micro_batch, rank in [*places, *reversed(places)]:
        model = LanguageModel(seed=seed)
        model._trainer = SimpleNamespace(
            accumulate_grad_batches=2,
            log_every_n_steps=1,
            global_step=step,
            global_rank=rank,
            max_steps=-1,
            max_epochs=-1,
            num_training_batches=math.inf,
        )
        model.on_train_batch_start(None, 2 * step + micro_batch)
        numbers = tuple(torch.rand(4).tolist())
        assert drawn.setdefault((seed, step, micro_batch, rank), numbers) == numbers
    assert len(set(drawn.values())) == len(places)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_fused_optimizer_clips_under_bf16_mixed(data, algorithm):
    """Lightning itself refuses it. Clipped far below AdamW's eps, a step is the weight decay only."""
    trainer, model = trained(
        data, steps=1, precision="bf16-mixed", gradient_clip_val=1e-14, gradient_clip_algorithm=algorithm
    )
    assert trainer.precision == "bf16-mixed"
    pl.seed_everything(1, verbose=False)
    before = small_net(model.tokenizer.vocab_size, 16).head.weight
    torch.testing.assert_close(model.net.head.weight, before * (1 - 2e-3 / 3 * 0.1), rtol=0, atol=1e-7)


def test_matmul_precision_is_set_during_training_only(data):
    seen = []

    class Observer(pl.Callback):
        def on_train_batch_end(self, *args):
            seen.append(torch.get_float32_matmul_precision())

    class Failing(pl.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("failed")

    trained(data, steps=1, callbacks=[Observer()])
    assert seen == ["medium"]
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(RuntimeError, match="failed"):
        trained(data, steps=1, callbacks=[Observer(), Failing()])
    assert seen == ["medium", "medium"]
    assert torch.get_float32_matmul_precision() == "highest"


def learning_rates(data, schedule, **options):
    """Returns the learning rate of each micro-batch and the number of steps."""
    rates = []

    class Note(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = LanguageModel(net=Bigram, optimizer=adamw, schedule=schedule)
    trainer = pl.Trainer(enable_checkpointing=False, callbacks=[Note()], **tiny.QUIET, **options)
    trainer.fit(model, datamodule=data)
    return rates, trainer.global_step


@pytest.mark.parametrize("shape", ["linear", "decay"])
@pytest.mark.parametrize("limit", [1.0, 5])
def test_schedule_ends_with_the_epochs(data, shape, limit):
    schedule, options = Schedule(shape, warmup_steps=0), {"limit_train_batches": limit, "accumulate_grad_batches": 2}
    rates, steps = learning_rates(data, schedule, max_epochs=2, **options)
    assert steps > 5
    assert (rates, steps) == learning_rates(data, schedule, max_steps=steps, **options)
    assert rates[-1] == pytest.approx(2e-3 * schedule.factor(steps - 1, steps))
    both = learning_rates(data, schedule, max_epochs=2, max_steps=3, **options)
    assert both == learning_rates(data, schedule, max_steps=3, **options)


def test_schedule_without_an_end_is_refused(data):
    with pytest.raises(UserError, match=r"a linear schedule ends at the run's last step.*constant"):
        learning_rates(data, Schedule("linear"), max_time="00:00:00:05", max_epochs=-1)
    rates, _ = learning_rates(
        data, Schedule("constant", 2), max_time="00:00:00:01", max_epochs=-1, limit_train_batches=5
    )
    assert rates[-1] == 2e-3


def test_clipping_by_norm_limits_the_norm(data):
    """A gradient far above the limit is scaled to the norm of the limit."""
    _, model = trained(data, steps=1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    model._step_loss = torch.zeros(())
    model.configure_gradient_clipping(torch.optim.SGD(model.parameters()), 0.5)
    norm = torch.sqrt(sum((parameter.grad**2).sum() for parameter in model.parameters()))
    assert norm.item() == pytest.approx(0.5, rel=1e-4)


def test_generate_accepts_text_lists_and_ids(data):
    _, model = trained(data)
    one, two = model.generate("MIRA:", max_new_tokens=10), model.generate("", max_new_tokens=10)
    assert one.startswith("MIRA:")
    assert len(one) > len("MIRA:")
    assert model.generate(["MIRA:", ""], max_new_tokens=10) == [one, two]
    ids = torch.tensor([model.tokenizer.encode("MIRA:")])
    assert model.tokenizer.decode(model.generate(ids, max_new_tokens=10)[0].tolist()) == one
    assert model.generate("MIRA:", max_new_tokens=10, seed=2) != one
    assert model.generate("MIRA:", max_new_tokens=0) == "MIRA:"
    assert "MIRA:" + "".join(model.stream("MIRA:", max_new_tokens=10)) == one
    assert model.generate(["MIRA:"], max_new_tokens=10, num_samples=2) == [
        one,
        model.generate("MIRA:", max_new_tokens=10, seed=1338),
    ]
    assert len(model.tokenizer.encode(model.generate("word " * 50, max_new_tokens=3))) > 50  # longer than a block
    with pytest.raises(UserError, match="temperature"):
        model.generate("MIRA:", temperature=-1)
    with pytest.raises(UserError, match="in a list"):
        model.generate("MIRA:", num_samples=2)


def test_generate_keeps_training_mode_and_random_state(data):
    _, model = trained(data)
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    text = model.generate("a", max_new_tokens=5)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert text == model.generate("a", max_new_tokens=5), "dropout is off"
    model.eval()
    model.generate("a", max_new_tokens=5)
    assert not model.training


def test_checkpoint_is_self_contained(data, tmp_path):
    trainer, model = trained(data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "elsewhere").mkdir()
    code = (
        "from lmlight import LanguageModel; m = LanguageModel.load_from_checkpoint('../x.ckpt'); "
        "print(repr(m.generate('MIRA:', max_new_tokens=10)), m.tokenizer.encode('MIRA:'), m.tokenizer.decode([70]))"
    )
    out, _ = processes.run(code=code, cwd=tmp_path / "elsewhere")
    expected = repr(model.generate("MIRA:", max_new_tokens=10)), model.tokenizer.encode("MIRA:")
    assert out.strip() == f"{expected[0]} {expected[1]} {model.tokenizer.decode([70])}"


def test_command_line_validates_a_checkpoint_from_python(data, corpus_file, capsys):
    trainer, model = trained(data)
    trainer.save_checkpoint("x.ckpt")
    expected = trainer.validate(model, datamodule=data, verbose=False)[0]["val/nats_per_char"]
    capsys.readouterr()
    assert main(["validate", "--ckpt_path=x.ckpt", f"--data.corpus={corpus_file}", "--trainer.accelerator=cpu"]) == 0
    metrics = dict(line.split() for line in capsys.readouterr().out.strip().split("\n"))
    assert float(metrics["val/nats_per_char"]) == pytest.approx(expected, abs=1e-4)


def test_checkpoint_of_another_net_is_refused(data, tmp_path):
    trainer, model = trained(data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="class Transformer in the checkpoint, Bigram here"):
        pl.Trainer(**tiny.QUIET).validate(
            LanguageModel(net=Bigram), datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True
        )


def test_fit_validate_and_test_in_any_order(data):
    """Lightning validates in inference mode outside `fit`; the state of metrics must not depend on it."""
    trainer, model = trained(data, steps=2, val_check_interval=1, check_val_every_n_epoch=None)
    before = trainer.validate(model, datamodule=data, verbose=False)[0]["val/nats_per_char"]
    trainer.test(model, datamodule=data, verbose=False)
    again = pl.Trainer(
        max_steps=2, val_check_interval=1, check_val_every_n_epoch=None, enable_checkpointing=False, **tiny.QUIET
    )
    again.fit(model, datamodule=data)
    after = again.validate(model, datamodule=data, verbose=False)[0]["val/nats_per_char"]
    assert after == float(again.callback_metrics["val/nats_per_char"]) < before


def test_corpus_must_be_a_path(corpus_file):
    assert TextDataModule(corpus_file).corpus == str(corpus_file)
    for odd in ([corpus_file], 3, None):
        with pytest.raises(UserError, match=r"data\.corpus must be a path"):
            TextDataModule(odd)


def test_data_with_another_tokenizer_is_refused(data, corpus_file):
    """Its ids have another meaning, so training and metrics would be wrong."""
    _, model = trained(data, steps=1)
    other = TextDataModule(str(corpus_file), block_size=16, batch_size=8, tokenizer=TokenizerConfig(vocab_size=390))
    for run in (pl.Trainer(max_steps=1, **tiny.QUIET).fit, pl.Trainer(**tiny.QUIET).validate):
        with pytest.raises(UserError, match=r"datamodule\.tokenizer = model\.tokenizer"):
            run(model, datamodule=other)
    other = TextDataModule(str(corpus_file), block_size=16, batch_size=8, tokenizer=TokenizerConfig(vocab_size=390))
    other.tokenizer = model.tokenizer
    pl.Trainer(max_steps=1, **tiny.QUIET, enable_checkpointing=False).fit(model, datamodule=other)


def test_network_that_is_not_a_net_is_refused(data):
    class Mine(torch.nn.Module):
        def __init__(self, vocab_size, block_size):
            super().__init__()

    with pytest.raises(UserError, match=r"must make an lmlight.models.Net, got Mine"):
        pl.Trainer(max_steps=2, enable_checkpointing=False, **tiny.QUIET).fit(LanguageModel(net=Mine), datamodule=data)


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (torch.optim.LBFGS, "per-parameter options"),
        (torch.optim.SparseAdam, "does not support dense gradients"),
        (torch.optim.Muon, "2D parameters"),
        (lambda groups: torch.optim.SGD(groups, lr=-1.0), "Invalid learning rate"),
    ],
)
def test_unsuitable_optimizer_is_refused(data, optimizer, says):
    with pytest.raises(UserError, match=f"model.optimizer cannot train this model .*{says}"):
        trained(data, optimizer=optimizer)


def test_resuming_with_another_optimizer_is_refused(data, tmp_path):
    trainer, _ = trained(data, steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(
        UserError, match=r"the state of torch\.optim\.adamw\.AdamW, which lmlight\.optim\.Muon cannot use"
    ):
        pl.Trainer(max_steps=4, **tiny.QUIET).fit(
            LanguageModel(net=small_net), datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True
        )
    # the weights can still be validated
    pl.Trainer(**tiny.QUIET).validate(
        LanguageModel(net=small_net), datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True, verbose=False
    )


def test_request_to_stop_between_micro_batches_waits_for_the_step(data, tmp_path):
    """The run stops at the end of the step, so that the checkpoint is of a complete step."""

    class StopOnce(pl.Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if batch_idx == 4:  # the first of the third step's two
                trainer.should_stop = True

    options = {"accumulate_grad_batches": 2, "max_steps": 9, "default_root_dir": tmp_path, **tiny.QUIET}
    trainer = pl.Trainer(callbacks=[StopOnce(), BestLastCheckpoint()], plugins=[AtomicCheckpointIO()], **options)
    trainer.fit(LanguageModel(net=Bigram), datamodule=data)
    assert trainer.global_step == 3
    assert checkpoint.read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_load_from_checkpoint_arguments(data, tmp_path):
    pl.seed_everything(1, verbose=False)
    model = LanguageModel(net=small_net, sampling=Sampling(temperature=0.1, max_new_tokens=7, stop=["x"]))
    trainer = pl.Trainer(max_steps=2, enable_checkpointing=False, **tiny.QUIET)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = LanguageModel.load_from_checkpoint(tmp_path / "x.ckpt", map_location="cpu")
    assert loaded.sampling == model.sampling
    assert loaded.generate("MIRA:") == model.generate("MIRA:")
    changed = LanguageModel.load_from_checkpoint(str(tmp_path / "x.ckpt"), sampling=Sampling(top_k=3), seed=5)
    assert (changed.sampling, changed.seed) == (Sampling(top_k=3), 5)
    with pytest.raises(UserError, match="is a lmlight.models.transformer.Transformer, not a Bigram"):
        LanguageModel.load_from_checkpoint(tmp_path / "x.ckpt", net=Bigram)


def test_loaded_model_trains_with_dropout(data, tmp_path):
    """`load_from_checkpoint` returns it in evaluation mode, which Lightning would keep."""
    settings = {**tiny.QUIET, "max_steps": 2, "enable_checkpointing": False}
    trainer = pl.Trainer(**settings)
    trainer.fit(LanguageModel(net=lambda *sizes: tiny.net(*sizes, dropout=0.5)), data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    seen = []

    class Twice(LanguageModel):
        def training_loss(self, batch):
            loss = super().training_loss(batch)
            seen.append(bool(loss == super().training_loss(batch)))
            return loss

    loaded = Twice.load_from_checkpoint(tmp_path / "x.ckpt")
    assert not loaded.training
    pl.Trainer(**settings).fit(loaded, data)
    assert seen == [False, False]


def test_model_and_data_can_be_pickled(data):
    again = pickle.loads(pickle.dumps((LanguageModel(), data)))
    assert again[0].net is None and again[1].block_size == 16
    _, model = trained(data, steps=1)
    other, other_data = pickle.loads(pickle.dumps((model, data)))
    assert other.generate("MIRA:", max_new_tokens=5) == model.generate("MIRA:", max_new_tokens=5)
    assert torch.equal(next(iter(other_data.val_dataloader())).inputs, next(iter(data.val_dataloader())).inputs)


def test_state_dict_can_be_loaded_into_an_empty_model(data):
    """Strategies that launch processes return the trained model this way."""
    _, model = trained(data, steps=1)
    other = LanguageModel()
    other.load_state_dict(model.state_dict())
    assert other.generate("MIRA:", max_new_tokens=5) == model.generate("MIRA:", max_new_tokens=5)
    other.load_state_dict({f"net.{name}": weight for name, weight in model.net.state_dict().items()})


def test_network_can_be_built_without_a_trainer(data):
    _, model = trained(data, steps=1)
    other = LanguageModel(net=tiny.net)
    other.tokenizer, other.block_size = model.tokenizer, 16
    other.configure_model()
    assert other.generate("MIRA:", max_new_tokens=3).startswith("MIRA:")


def test_misuse_error_says_what_to_call_first(data):
    model, built = LanguageModel(), trained(data, steps=1)[1]
    for use in (
        model.configure_model,
        lambda: model.generate("a"),
        lambda: model(torch.zeros(1, 1, dtype=torch.long)),
        lambda: model.stream("a"),
    ):
        with pytest.raises(UserError, match=r"no network and no tokenizer yet.*Trainer.*load_from_checkpoint"):
            use()
    with pytest.raises(UserError, match="at most block_size = 16 tokens, got 17"):
        built(torch.zeros(1, 17, dtype=torch.long))
    fresh = TextDataModule("corpus.txt")
    uses = [
        fresh.train_dataloader,
        fresh.val_dataloader,
        fresh.test_dataloader,
        lambda: fresh.val_ids,
        lambda: fresh.sample_prompt,
    ]
    for use in [*uses, lambda: fresh.train_subset_dataloader(2), lambda: fresh.characters_seen(1)]:
        with pytest.raises(UserError, match=r"prepare_data\(\) and setup"):
            use()
    with pytest.raises(UserError, match=r"prepare_data\(\) before setup"):
        fresh.setup("fit")


def test_predict_without_checkpoint_is_refused():
    with pytest.raises(UserError, match="ckpt_path"):
        pl.Trainer(**tiny.QUIET).predict(LanguageModel(), datamodule=TextDataModule(prompts=["a"]))


@pytest.mark.slow  # compiling takes a minute
@pytest.mark.timeout(600)
def test_compiled_net_trains_the_same(data):
    def weights(compile_net):
        pl.seed_everything(1, verbose=False)
        model = LanguageModel(net=tiny.net, compile_net=compile_net)
        pl.Trainer(max_steps=4, enable_checkpointing=False, **tiny.QUIET).fit(model, datamodule=data)
        return model.net.state_dict()

    plain, compiled = weights(False), weights(True)
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_checkpoint_has_the_metrics_of_its_own_weights(data, tmp_path):
    model = LanguageModel(net=small_net, optimizer=adamw, schedule=Schedule("linear", 1))
    keeper = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {**tiny.QUIET, "num_sanity_val_steps": 1}
    trainer = pl.Trainer(max_steps=4, val_check_interval=2, limit_val_batches=2, callbacks=[keeper], **options)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert Model.read(tmp_path / "step=3.ckpt").metrics == {}, "validated one step earlier"
    metrics = Model.read(tmp_path / "end.ckpt").metrics
    assert metrics["val/nats_per_char"] == trainer.callback_metrics["val/nats_per_char"].item()
    assert {"val/bpc", "val/perplexity"} < metrics.keys()


def test_options_with_unknown_words_are_refused():
    with pytest.raises(UserError, match="model.matmul_precision must be one of highest, high, medium, got 'low'"):
        LanguageModel(matmul_precision="low")
    with pytest.raises(UserError, match="schedule.shape must be one of linear, cosine, decay, constant, got 'cosin'"):
        Schedule("cosin")
