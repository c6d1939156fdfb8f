"""LanguageModel under Lightning's Trainer, from Python."""

import csv
import itertools
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import processes
import pytest
import tiny
import torch
import torch.nn.functional as F

from lmlight import Bigram, LanguageModel, TextDataModule
from lmlight.errors import UserError
from lmlight.optim import Schedule


def small_net(vocab_size, block_size):
    return tiny.net(vocab_size, block_size, dropout=0.1)


@pytest.fixture
def data(verse_file):
    return tiny.data(verse_file)


def adamw(params):
    return torch.optim.AdamW(params, lr=2e-3, weight_decay=0.1, fused=True)


def trained(data, steps=5, net=small_net, optimizer=adamw, **options):
    pl.seed_everything(1, verbose=False)
    model = LanguageModel(net=net, optimizer=optimizer, schedule=Schedule("linear", 2))
    trainer = pl.Trainer(max_steps=steps, enable_checkpointing=False, **tiny.QUIET, **options)
    trainer.fit(model, datamodule=data)
    return trainer, model


@pytest.mark.parametrize("net", [small_net, Bigram], ids=["transformer", "bigram"])
def test_validation_is_the_plain_sum_over_the_last_tenth(data, verse, net):
    trainer, model = trained(data, net=net)
    figures = trainer.validate(model, datamodule=data, verbose=False)[0]

    train, val = verse[: int(0.9 * len(verse))], verse[int(0.9 * len(verse)) :]
    stream = model.tokenizer.encode(train)[-1:] + model.tokenizer.encode(val)
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 16):
            window = torch.tensor(stream[start : start + 17])
            logits = model.eval().net(window[None, :-1])[0]
            nats -= logits.log_softmax(-1).gather(1, window[1:, None]).sum().item()
    assert figures["val/characters"] == len(val)
    assert figures["val/nats_per_char"] == pytest.approx(nats / len(val), rel=1e-5)
    assert figures["val/bpc"] == pytest.approx(nats / len(val) / math.log(2), rel=1e-5)
    assert figures["val/loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-5)
    assert figures["val/perplexity"] == pytest.approx(math.exp(nats / (len(stream) - 1)), rel=1e-4)


def test_test_adds_a_sliding_window_over_the_same_characters(data, verse):
    trainer, model = trained(data, steps=30)
    figures = {k: v for part in trainer.test(model, datamodule=data, verbose=False) for k, v in part.items()}
    plain = trainer.validate(model, datamodule=data, verbose=False)[0]
    names = {name.split("/dataloader")[0]: value for name, value in figures.items()}
    assert names["test/nats_per_char"] == plain["val/nats_per_char"]
    assert names["test_sliding/characters"] == names["test/characters"] == len(verse) - int(0.9 * len(verse))
    assert names["test_sliding/nats_per_char"] != names["test/nats_per_char"]


def test_training_is_plain_adamw_on_the_batches(data):
    """The same steps without Lightning: same order of windows, schedule, groups and clipping."""
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


def test_accumulated_batches_make_the_same_steps_and_figures(data, tmp_path):
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
    assert min(norm for _, _, norm in once) > 0.1, "as it was before clipping"
    assert logged(4) == [pytest.approx(row, rel=1e-4) for row in once]


def test_random_numbers_follow_from_seed_step_micro_batch_and_rank():
    """Which is why a run goes on exactly: no generator's state is kept."""
    drawn = {}
    places = list(itertools.product((1, 2), (0, 1, 7), (0, 1), (0, 1)))
    for seed, step, micro_batch, rank in [*places, *reversed(places)]:
        model = LanguageModel(seed=seed)
        model._trainer = SimpleNamespace(
            accumulate_grad_batches=2, log_every_n_steps=1, global_step=step, global_rank=rank
        )
        model.on_train_batch_start(None, 2 * step + micro_batch)
        numbers = tuple(torch.rand(4).tolist())
        assert drawn.setdefault((seed, step, micro_batch, rank), numbers) == numbers
    assert len(set(drawn.values())) == len(places)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_fused_optimizer_clips_under_bf16_mixed(data, algorithm):
    """Lightning itself refuses that. Clipped to next to nothing, far below AdamW's eps, a step is the weight decay alone."""
    trainer, model = trained(
        data, steps=1, precision="bf16-mixed", gradient_clip_val=1e-14, gradient_clip_algorithm=algorithm
    )
    assert trainer.precision == "bf16-mixed"
    pl.seed_everything(1, verbose=False)
    before = small_net(model.tokenizer.vocab_size, 16).head.weight
    torch.testing.assert_close(model.net.head.weight, before * (1 - 2e-3 / 3 * 0.1), rtol=0, atol=1e-7)


def test_the_precision_of_products_is_that_of_training_only(data):
    class Note(pl.Callback):
        def on_train_batch_start(self, *args):
            self.seen = torch.get_float32_matmul_precision()

    before, note = torch.get_float32_matmul_precision(), Note()
    trained(data, steps=1, callbacks=[note])
    assert (before, note.seen) == ("highest", "medium")
    assert torch.get_float32_matmul_precision() == before


def test_clipping_by_norm_is_torch_s_own(data):
    """On a gradient that is known: far above the limit, what is left has the limit's norm."""
    _, model = trained(data, steps=1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    model._step_loss = torch.zeros(())
    model.configure_gradient_clipping(torch.optim.SGD(model.parameters()), 0.5)
    norm = torch.sqrt(sum((parameter.grad**2).sum() for parameter in model.parameters()))
    assert norm.item() == pytest.approx(0.5, rel=1e-4)


def test_generate_takes_texts_lists_and_ids(data):
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
    assert model.generate(["MIRA:"], max_new_tokens=10, samples=2) == [
        one,
        model.generate("MIRA:", max_new_tokens=10, seed=1338),
    ]
    assert len(model.tokenizer.encode(model.generate("word " * 50, max_new_tokens=3))) > 50  # longer than a block
    with pytest.raises(UserError, match="temperature"):
        model.generate("MIRA:", temperature=-1)
    with pytest.raises(UserError, match="in a list"):
        model.generate("MIRA:", samples=2)


def test_generate_leaves_the_mode_and_the_random_numbers_alone(data):
    _, model = trained(data)
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    text = model.generate("a", max_new_tokens=5)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert text == model.generate("a", max_new_tokens=5), "dropout took part"


def test_an_empty_prompt_begins_as_if_a_line_had_just_ended(data):
    _, model = trained(data)
    sampling = {"max_new_tokens": 10, "temperature": 0}
    assert model.generate("", **sampling) == model.generate("\n", **sampling)[1:]


def test_a_checkpoint_alone_is_enough_in_a_fresh_process(data, tmp_path):
    trainer, model = trained(data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "elsewhere").mkdir()
    code = (
        "from lmlight import LanguageModel; m = LanguageModel.load_from_checkpoint('../x.ckpt'); "
        "print(repr(m.generate('MIRA:', max_new_tokens=10)), m.tokenizer.encode('MIRA:'), m.tokenizer.decode([70]))"
    )
    out, _ = processes.run_afresh(code=code, cwd=tmp_path / "elsewhere")
    expected = repr(model.generate("MIRA:", max_new_tokens=10)), model.tokenizer.encode("MIRA:")
    assert out.strip() == f"{expected[0]} {expected[1]} {model.tokenizer.decode([70])}"


def test_a_checkpoint_of_another_net_is_named(data, tmp_path):
    trainer, model = trained(data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="class Transformer in the checkpoint, Bigram here"):
        pl.Trainer(**tiny.QUIET).validate(
            LanguageModel(net=Bigram), datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True
        )


def test_without_a_tokenizer_it_says_what_to_do():
    with pytest.raises(UserError, match="ckpt_path"):
        pl.Trainer(**tiny.QUIET).predict(LanguageModel(), datamodule=TextDataModule(prompts=["a"]))


@pytest.mark.slow  # compiling takes a minute
@pytest.mark.timeout(600)
def test_a_compiled_net_learns_the_same_and_keeps_its_names(data):
    def weights(compile_net):
        pl.seed_everything(1, verbose=False)
        model = LanguageModel(net=tiny.net, compile_net=compile_net)
        pl.Trainer(max_steps=4, enable_checkpointing=False, **tiny.QUIET).fit(model, datamodule=data)
        return model.net.state_dict()

    plain, compiled = weights(False), weights(True)
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4, msg=name)
