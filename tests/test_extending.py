"""Networks, objectives, tokenizers and data of users, and the examples in docs/extending.md."""

import json
import os
import pickle
import re
import shlex
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import processes
import pytest
import tiny
import torch
import yaml
from torch import nn

from lmlight import LanguageModel, TextDataModule, Transformer, checkpoint
from lmlight.__main__ import main
from lmlight.data.hf_tokenizer import HFTokenizer, read_pretrained
from lmlight.data.loader import Batch
from lmlight.data.tokenizer import Tokenizer, TokenizerConfig, deserialize, serialize
from lmlight.errors import UserError
from lmlight.models.check import check_net
from lmlight.training.callbacks import Throughput
from lmlight.training.checkpointing import AtomicCheckpointIO, BestLastCheckpoint
from lmlight.training.cli import check_fit

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHORT = ["--data.corpus=corpus.txt", "--data.block_size=16", "--data.batch_size=8", "--trainer.accelerator=cpu"]
SHORT += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
NETWORK = """
from abc import ABC, abstractmethod
import torch
from torch import nn
from lmlight.models import Net
from lmlight.models.kv_cache import Cache

class Mine(Net):
    def __init__(self, vocab_size: int, block_size: int, width: int = 16, p: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(vocab_size, width), nn.Dropout(p)
        self.mix, self.head = nn.Linear(2 * width, width), nn.Linear(width, vocab_size)

    def forward(self, idx):
        x = self.drop(self.embedding(idx))
        before = nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.head(torch.relu(self.mix(torch.cat((before, x), -1))))

class Future(Mine):
    def forward(self, idx):
        return super().forward(idx.flip(1)).flip(1)

class Shape(Mine):
    def forward(self, idx):
        return super().forward(idx)[:, -1]

class Order(Net):
    def __init__(self, block_size: int, vocab_size: int) -> None:
        super().__init__()

    def forward(self, idx):
        return idx

class Idle(Net):
    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__()

    def forward(self, idx):
        return torch.zeros(*idx.shape, self.vocab_size)

class Abstract(Mine, ABC):
    @abstractmethod
    def more(self):
        pass

class Plain(nn.Module):
    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__()

class Uninitialized(Mine):
    def __init__(self, vocab_size: int, block_size: int) -> None:
        pass

class Divided(Mine):
    def __init__(self, vocab_size: int, block_size: int, width: int = 16, heads: int = 3) -> None:
        super().__init__(vocab_size, block_size, width)
        assert width % heads == 0

class Configured(Mine):
    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__(vocab_size, block_size)
        self.config = {"width": 16}

class Broken(Mine):
    def forward(self, idx):
        return self.nothing(idx)

class Stateful(Mine):
    calls = 0

    def forward(self, idx):
        self.calls += 1
        return super().forward(idx) + self.calls

class Listed(Mine):
    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__(vocab_size, block_size)
        self.last = [nn.Linear(vocab_size, vocab_size)]

    def forward(self, idx):
        return self.last[0](super().forward(idx))

class Vector(Mine):
    def loss(self, idx, targets):
        return nn.functional.cross_entropy(self(idx).flatten(0, 1), targets.flatten(), reduction="none")

class Detached(Mine):
    def forward(self, idx):
        return super().forward(idx).detach()

class Flops(Mine):
    def flops_per_token(self):
        return None

class Cacheless(Mine):
    def make_cache(self, batch_size):
        return Cache()

class Recurrent(Net):
    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, 16), nn.Linear(16, vocab_size)

    def make_cache(self, batch_size):
        cache = Cache()
        cache.state = torch.zeros(batch_size, 1, 16)
        return cache

    def forward(self, idx, cache=None):
        x = self.embedding(idx)
        x = x.cumsum(1) if cache is None else self.states(x, idx, cache)
        return self.head(x)

class Forgetful(Recurrent):
    def states(self, x, idx, cache):
        return x.cumsum(1)

class Unpadded(Recurrent):
    def states(self, x, idx, cache):
        states = cache.state + x.cumsum(1)
        cache.state = states[:, -1:]
        return states

class Padded(Unpadded):
    def states(self, x, idx, cache):
        if idx.size(1) > 1:
            x = x * (torch.arange(idx.size(1)) >= torch.tensor(cache.padding)[:, None])[..., None]
        return super().states(x, idx, cache)
"""
exec(NETWORK, namespace := {"__name__": __name__})
Mine, Future, Shape = namespace["Mine"], namespace["Future"], namespace["Shape"]
CONTRACT = [
    ("Uninitialized", r"call super\(\).__init__\(\) in its constructor"),
    ("Divided", "model.net cannot be created: AssertionError"),
    ("Configured", "model.net cannot be created: AttributeError: .*config"),
    ("Broken", r"Broken.forward failed for ids of shape \(2, 8\): AttributeError: .*nothing"),
    ("Stateful", "different logits when it is called again with the same ids"),
    ("Listed", "weights that are not among its parameters"),
    ("Vector", r"Vector.loss must return a scalar tensor.*got shape \(16,\)"),
    ("Detached", "Detached.loss must return a scalar tensor.*detached"),
    ("Flops", "Flops.flops_per_token failed: TypeError"),
    ("Cacheless", r"Cacheless.forward\(idx, cache=cache\) failed: TypeError"),
    ("Forgetful", "different logits with its cache than without it"),
    ("Unpadded", "different logits for a row whose prompt is shorter"),
]


@pytest.fixture
def folder(tmp_path, corpus_text, monkeypatch):
    """A folder of a user, with the files of docs/extending.md."""
    for name in ("corpus.txt", "my.txt"):
        (tmp_path / name).write_bytes(corpus_text.encode())
    (tmp_path / "mynet.py").write_text(NETWORK)
    for kind, code in BLOCKS:
        if kind == "python" and (name := re.match(r"# (\w+\.py)\n", code)):
            (tmp_path / name[1]).write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def error_of(capsys, *args):
    assert main(list(args)) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1
    return lines[0]


# The page


def commands():
    for kind, code in BLOCKS:
        if kind == "sh":
            for line in code.strip().split("\n"):
                yield shlex.split(line, comments=True)


def test_commands_of_the_page_run(folder, monkeypatch, capsys):
    byte_level = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    byte_level.train([str(folder / "corpus.txt")], vocab_size=300)
    byte_level.save(str(folder / "tokenizer.json"))
    for _, *words in commands():
        more = {"fit": SHORT, "predict": ["--model.sampling.max_new_tokens=4", "--trainer.accelerator=cpu"]}.get(
            words[0], []
        )
        if "--ckpt_path" in words and words[0] == "fit":
            more = ["--trainer.max_steps=3"]
        if "--data" in words:
            more = [flag for flag in SHORT if not flag.startswith("--data")]
        if words[0] == "chat":
            monkeypatch.setattr(
                "builtins.input", lambda _, lines=iter(["/max_new_tokens 4", "MIRA:", "/quit"]): next(lines)
            )
        assert main([*words, *more]) == 0, (words, capsys.readouterr().err)
    assert len(list(commands())) >= 11


def test_python_of_the_page_runs(folder, capsys):
    (code,) = (code for kind, code in BLOCKS if kind == "python" and not code.startswith("# my_"))
    exec(code.replace("max_steps=200", "max_steps=2").replace("val_check_interval=100", "val_check_interval=2"), {})
    assert "The " in capsys.readouterr().out


# Networks


def test_custom_network_resumes_exactly_after_a_kill(folder, capsys):
    flags = ["fit", "--model.net=mynet.Mine", "--model.net.p=0.2", *SHORT, "--trainer.max_steps=8"]
    flags += [
        "--data.tokenizer.vocab_size=400",
        "--trainer.callbacks+=lmlight.training.checkpointing.BestLastCheckpoint",
    ]
    flags += ["--trainer.callbacks.every_n_steps=1"]
    processes.run(*flags, "--trainer.default_root_dir=whole", cwd=folder)
    with processes.start(*flags, cwd=folder) as process:
        while not (found := list(folder.glob("runs/*/checkpoints/last.ckpt"))) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert checkpoint.read(found[0])["global_step"] < 8 or process.returncode == 0
    processes.run("fit", "--ckpt_path=last", cwd=folder, status=0)
    (whole,), (resumed,) = (list(folder.glob(f"{root}/*/checkpoints/last.ckpt")) for root in ("whole", "runs"))
    weights = [checkpoint.read(path)["state_dict"] for path in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    out, _ = processes.run("predict", "--ckpt_path=best", "--model.net=mynet.Mine", cwd=folder)
    assert out
    _, err = processes.run("predict", "--ckpt_path=best", cwd=folder, status=2)
    assert "pass --model.net mynet.Mine" in err and err.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes, which Windows cannot")
def test_custom_network_trains_the_same_with_two_processes(folder):
    flags = ["fit", "--model.net=mynet.Mine", *SHORT, "--data.tokenizer.vocab_size=400", "--trainer.precision=64"]
    processes.run(*flags, "--trainer.default_root_dir=one", cwd=folder)
    processes.run(
        *flags, "--trainer.default_root_dir=two", "--trainer.devices=2", "--trainer.strategy=ddp_fork", cwd=folder
    )
    (one,), (two,) = (list(folder.glob(f"{root}/*/checkpoints/last.ckpt")) for root in ("one", "two"))
    a, b = (checkpoint.read(path)["state_dict"] for path in (one, two))
    assert all(torch.allclose(a[name].double(), b[name].double(), rtol=0, atol=1e-6) for name in a)


@pytest.mark.parametrize(
    ("net", "says"),
    [
        ("mynet.Future", "is not causal"),
        ("mynet.Shape", "expected shape (2, 8, 32)"),
        ("mynet.Plain", "Plain is not derived from Net"),
        ("mynet.Idle", "has no parameters to train"),
        ("mynet.Abstract", "abstract class Abstract"),
        ("mynet.Order", "must take vocab_size and block_size as its first two arguments"),
        ("mynet.Missing", "Missing is not in mynet; it has Abstract, Broken, "),
        ("nowhere.Mine", "there is no module nowhere"),
        ("nowhere.net.Mine", "there is no module nowhere"),
        ("Mein", "Bigram or"),
        ("broken.Mine", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_unusable_network_is_refused_before_the_corpus_is_read(folder, net, says, capsys):
    (folder / "broken.py").write_text("1 / 0\n")
    assert says in error_of(capsys, "fit", f"--model.net={net}", *SHORT)
    assert not (folder / "cache" / "tokens").exists()
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(("net", "says"), CONTRACT)
def test_network_that_breaks_its_contract_is_refused(net, says):
    with pytest.raises(UserError, match=says):
        check_net(namespace[net], 16)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_check_accepts_a_state_as_the_cache(block_size):
    check_net(namespace["Padded"], block_size)


def test_exception_in_a_network_names_the_line(folder, capsys):
    error = error_of(capsys, "fit", "--model.net=mynet.Divided", *SHORT)
    assert re.search(r"AssertionError: assert width % heads == 0 \(.*mynet.py, line \d+\)", error)


def test_causality_check_can_be_disabled(folder):
    assert main(["fit", "--model.net=mynet.Future", "--model.check_causality=false", *SHORT]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes, which Windows cannot")
def test_network_is_not_run_before_processes_are_forked():
    """torch's threads do not survive a fork: the forked processes would wait for them forever."""

    class Loud(Mine):
        def forward(self, idx):
            raise RuntimeError("ran")

    forked = pl.Trainer(**tiny.QUIET, max_steps=1, strategy="ddp_fork", devices=2)
    LanguageModel(net=Loud).check(16, forked)
    with pytest.raises(UserError, match="ran"):
        LanguageModel(net=Loud).check(16, pl.Trainer(**tiny.QUIET, max_steps=1))


@pytest.mark.parametrize("block_size", [1, 2, 64])
def test_check_accepts_causal_networks_and_keeps_the_random_state(block_size):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for make in (
        lambda v, b: Mine(v, b, p=0.5),
        lambda v, b: Transformer(v, b, n_layer=1, n_head=2, n_embd=16, dropout=0.3),
    ):
        check_net(make, block_size)
    assert torch.equal(torch.rand(3), expected)


def test_check_accepts_a_loss_with_inner_gradients():
    class Penalized(Mine):
        def loss(self, idx, targets):
            logits = self(idx)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
            return loss + gradient.square().sum()

    check_net(Penalized, 16)


def test_check_detects_layers_initialized_to_zero():
    class Zero(Future):
        def forward(self, idx):
            return Mine.forward(self, idx) + self.gate * super().forward(idx)

        def __init__(self, vocab_size: int, block_size: int) -> None:
            super().__init__(vocab_size, block_size)
            self.gate = nn.Parameter(torch.zeros(vocab_size))

    with pytest.raises(UserError, match="not causal"):
        check_net(Zero, 16)


def test_network_arguments_must_be_plain_values():
    with pytest.raises(UserError, match="its argument width is a Tensor"):
        Mine(3, 4, width=torch.tensor(3))
    assert Mine(3, 4, 8).config == {"vocab_size": 3, "block_size": 4, "width": 8, "p": 0.0}


def test_config_keeps_the_arguments_as_they_were_given():
    class Emptying(Mine):
        def __init__(self, vocab_size: int, block_size: int, widths: list[int]) -> None:
            super().__init__(vocab_size, block_size, widths.pop())

    assert Emptying(3, 4, [8, 16]).config["widths"] == [8, 16]


def test_class_may_move_to_another_module_but_not_change(folder, capsys):
    assert main(["fit", "--model.net=mynet.Mine", *SHORT]) == 0
    (folder / "mynet.py").unlink()
    del sys.modules["mynet"]
    (folder / "moved.py").write_text(NETWORK)
    (folder / "changed.py").write_text(NETWORK.replace("self.mix", "self.blend"))
    (folder / "fewer.py").write_text(NETWORK.replace(", p: float = 0.0", "").replace("(p)", "(0.0)"))
    assert main(["fit", "--ckpt_path=last", "--model.net=moved.Mine", "--trainer.max_steps=3"]) == 0
    capsys.readouterr()
    (path,) = folder.glob("runs/*/checkpoints/best.ckpt")
    assert "blend.weight" in error_of(capsys, "predict", f"--ckpt_path={path}", "--model.net=changed.Mine")
    assert "argument 'p'" in error_of(capsys, "chat", "best", "--model.net=fewer.Mine")
    resume = error_of(capsys, "fit", "--ckpt_path=last", "--model.net=changed.Mine", "--trainer.max_steps=4")
    assert "Mine has changed since this checkpoint was written" in resume


def test_checkpoint_does_not_import_the_module_that_it_names(folder, capsys):
    assert main(["fit", "--model.net=mynet.Mine", *SHORT]) == 0
    del sys.modules["mynet"]
    (path,) = folder.glob("runs/*/checkpoints/best.ckpt")
    code = f"""if True:
        import sys
        from lmlight import LanguageModel
        from lmlight.errors import UserError
        try:
            LanguageModel.load_from_checkpoint({str(path)!r})
        except UserError as error:
            print(error)
        assert "mynet" not in sys.modules
        import mynet
        print(type(LanguageModel.load_from_checkpoint({str(path)!r}).net).__name__)
        print(type(LanguageModel.load_from_checkpoint({str(path)!r}, net=mynet.Mine).net).__name__)
        """
    out, _ = processes.run_afresh(
        code=code, cwd=folder, env=processes.environment(PYTHONPATH=f"{folder}{os.pathsep}{os.pathsep.join(sys.path)}")
    )
    error, *loaded = out.strip().split("\n")
    assert "pass --model.net mynet.Mine, or net=Mine in Python" in error
    assert loaded == ["Mine", "Mine"]


def test_several_custom_networks_in_one_process(corpus_file):
    data = tiny.data(corpus_file)
    for width in (8, 16):
        model = LanguageModel(net=lambda v, b, width=width: Mine(v, b, width))
        pl.Trainer(**tiny.QUIET, max_steps=2, enable_checkpointing=False).fit(model, datamodule=data)
        assert model.net.config["width"] == width
        assert model.generate("MIRA:", max_new_tokens=2).startswith("MIRA:")


# Objectives, optimizers, schedules


def test_objective_changes_training_and_not_validation(corpus_file):
    class Half(LanguageModel):
        def training_loss(self, batch):
            return super().training_loss(batch) / 2

    runs = {}
    for kind in (LanguageModel, Half):
        torch.manual_seed(0)
        trainer = pl.Trainer(
            **tiny.QUIET, max_steps=1, val_check_interval=1, check_val_every_n_epoch=None, enable_checkpointing=False
        )
        model = kind(net=tiny.net, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
        trainer.fit(model, datamodule=tiny.data(corpus_file))
        runs[kind] = float(model.step_loss), float(trainer.callback_metrics["val/nats_per_char"])
    assert runs[Half][0] == pytest.approx(runs[LanguageModel][0] / 2)
    assert runs[Half][1] == runs[LanguageModel][1]


def test_torch_scheduler_sets_the_learning_rate(corpus_file):
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = LanguageModel(
        net=tiny.net,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1),
    )
    pl.Trainer(**tiny.QUIET, max_steps=4, callbacks=[Watch()], enable_checkpointing=False).fit(
        model, datamodule=tiny.data(corpus_file)
    )
    assert rates == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_class_that_is_named_has_its_own_defaults(folder, capsys):
    """Not those of arguments with the same names of `Transformer` and `Muon`."""
    (folder / "layers.py").write_text(
        NETWORK.replace("width: int = 16", "n_layer: int = 3, n_embd: int = 16").replace("width", "n_embd")
    )
    (folder / "named.yaml").write_text("model: {net: {class_path: layers.Mine}, optimizer: torch.optim.SGD}")
    for words in (["--model.net=layers.Mine", "--model.optimizer=torch.optim.SGD"], ["--config=named.yaml"]):
        with pytest.raises(SystemExit):
            main(["fit", *words, "--print_config"])
        model = yaml.safe_load(capsys.readouterr().out)["model"]
        assert model["net"]["init_args"] == {"n_layer": 3, "n_embd": 16, "p": 0.0}
        made_with = model["optimizer"]["init_args"]
        assert {name: made_with[name] for name in ("lr", "momentum", "weight_decay")} == {
            "lr": 1e-3,
            "momentum": 0.0,
            "weight_decay": 0.0,
        }


class Careless(torch.optim.SGD):
    def step(self, closure=None):
        return super().step()


def test_optimizer_must_call_its_closure(corpus_file):
    model = LanguageModel(net=tiny.net, optimizer=lambda groups: Careless(groups, lr=1.0))
    with pytest.raises(UserError, match="Careless.step must call its argument `closure`"):
        pl.Trainer(**tiny.QUIET, max_steps=1, enable_checkpointing=False).fit(model, datamodule=tiny.data(corpus_file))


OBJECTIVES = """
from lmlight import LanguageModel

class Closed(LanguageModel):
    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()

class Raising(LanguageModel):
    def training_loss(self, batch):
        return self(batch.nothing).mean()

class Nothing(LanguageModel):
    def training_loss(self, batch):
        super().training_loss(batch)
"""


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("Closed", r"objectives.Closed.__init__ must take \*\*kwargs"),
        ("Raising", r"an exception in your code: AttributeError: .*nothing.* \(.*objectives.py, line 10\)"),
        ("Nothing", "Nothing.training_loss must return a scalar tensor.*got a NoneType"),
    ],
)
def test_mistakes_in_an_objective_are_one_line(folder, model, says, capsys):
    (folder / "objectives.py").write_text(OBJECTIVES)
    assert main(["fit", f"--model=objectives.{model}", *SHORT]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"lmlight: error: {says}", line)


TWINS = """
import lmlight
from mynet import Mine

class LanguageModel(lmlight.LanguageModel):
    def __init__(self, extra: float, kind: int = 0, **kwargs) -> None:
        super().__init__(**kwargs)
        print("the user's model,", extra, kind)

class TextDataModule(lmlight.TextDataModule):
    def __init__(self, corpus: str) -> None:
        raise RuntimeError("the user's data")
"""


def test_classes_with_the_names_of_our_own_are_used_only_if_they_are_named(folder, capsys):
    (folder / "twins.py").write_text(TWINS)
    assert main(["fit", "--model.net=twins.Mine", *SHORT]) == 0
    assert "the user's" not in capsys.readouterr().out
    arguments = ["--model.extra=0.5", "--model.kind=3"]  # names that functions of the command line might have
    assert main(["fit", "--model=twins.LanguageModel", *arguments, *SHORT]) == 0
    assert "the user's model, 0.5 3" in capsys.readouterr().out


def test_model_class_with_an_empty_section(folder, capsys):
    (folder / "twins.py").write_text(TWINS)
    (folder / "empty.yaml").write_text("model_class: twins.LanguageModel\nmodel:\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config=empty.yaml", "--model.extra=0.5", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["extra"] == 0.5


def test_scheduler_that_divides_by_zero_is_refused(folder, capsys):
    step = ["--model.lr_scheduler=torch.optim.lr_scheduler.StepLR", "--model.lr_scheduler.step_size=0"]
    assert "zero" in error_of(capsys, "fit", *SHORT, *step)


def test_scheduler_cannot_change_on_resume(folder, capsys):
    step = ["--model.lr_scheduler=torch.optim.lr_scheduler.StepLR", "--model.lr_scheduler.step_size=2"]
    assert main(["fit", *SHORT, *step]) == 0
    capsys.readouterr()
    error = error_of(capsys, "fit", "--ckpt_path=last", "--trainer.max_steps=3", "--model.lr_scheduler.gamma=0.5")
    assert "a resumed run cannot change model.lr_scheduler" in error


# Tokenizers


class Bytes(Tokenizer):
    def __init__(self):
        self.char_counts = np.array([int(byte & 0xC0 != 0x80) for byte in range(256)])

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def to_bytes(self):
        return b"x"

    @classmethod
    def from_bytes(cls, data):
        assert data == b"x"
        return cls()


class Lowering(Bytes):
    def decode(self, ids):
        return super().decode(ids).lower()


class Miscounting(Bytes):
    def __init__(self):
        self.char_counts = np.full(256, 2)


def test_custom_tokenizer_trains_and_loads(corpus_text, corpus_file, tmp_path):
    data = TextDataModule(str(corpus_file), block_size=16, batch_size=8)
    data.tokenizer = Bytes()
    model = LanguageModel(net=tiny.net)
    trainer = pl.Trainer(
        **{**tiny.QUIET, "default_root_dir": str(tmp_path)},
        max_steps=1,
        callbacks=[BestLastCheckpoint()],
        plugins=[AtomicCheckpointIO()],
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    trainer.fit(model, datamodule=data)
    assert data.store.chars["train"] == int(0.9 * len(corpus_text))
    assert float(trainer.callback_metrics["val/characters"]) == len(corpus_text) - int(0.9 * len(corpus_text))
    again = LanguageModel.load_from_checkpoint(trainer.checkpoint_callback.last_model_path)
    assert type(again.tokenizer) is Bytes
    assert again.generate("é", max_new_tokens=3) == model.generate("é", max_new_tokens=3)


class Uncounted(Bytes):
    def __init__(self):
        self.char_counts = [1] * 256


class Endless(Bytes):
    eos_id = 256


class Unrestored(Bytes):
    @classmethod
    def from_bytes(cls, data):
        raise KeyError("merges")


class Beyond(Bytes):
    def encode(self, text):
        return [300] * len(text)


class Strings(Bytes):
    def encode(self, text):
        return list(text)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Uncounted, "Uncounted.char_counts must be a NumPy array of integers"),
        (Endless, "Endless.eos_id must be None or an id below 256, got 256"),
        (Unrestored, "Unrestored cannot be stored: .*KeyError: 'merges'"),
        (Lowering, "Lowering.decode does not restore"),
        (Miscounting, "Miscounting.char_counts"),
        (Beyond, "Beyond.encode must return integers below the length of char_counts, 256"),
        (Strings, "Strings.encode must return integers"),
    ],
)
def test_tokenizer_that_breaks_its_contract_is_refused(kind, says, corpus_file):
    data = tiny.data(corpus_file)
    data.tokenizer = kind()
    with pytest.raises(UserError, match=says):
        data.prepare_data()


def test_encode_may_return_an_array(corpus_file):
    class Arrays(Bytes):
        def encode(self, text):
            return np.frombuffer(text.encode(), dtype=np.uint8)

    data = tiny.data(corpus_file)
    data.tokenizer = Arrays()
    assert data.prepare().tokens["train"] > 0


def test_tokenizer_whose_constructor_needs_arguments_is_refused(folder, capsys):
    (folder / "needy.py").write_text(
        (folder / "my_tokenizer.py").read_text().replace("__init__(self)", "__init__(self, n)")
    )
    assert "needy.Bytes cannot be created: TypeError" in error_of(capsys, "fit", "--data.tokenizer=needy.Bytes", *SHORT)


@pytest.mark.parametrize("flag", ["--model", "--model.net", "--data", "--data.tokenizer"])
def test_file_in_place_of_a_class_is_refused(flag, folder, capsys):
    assert "mynet.py: expected a class in the file, such as mynet.MyClass" in error_of(
        capsys, "fit", f"{flag}=mynet.py", *SHORT
    )


def test_tokenizer_object_as_an_argument_is_refused():
    with pytest.raises(UserError, match="got a Bytes: set the attribute tokenizer"):
        TextDataModule(tokenizer=Bytes())


def test_tokenizer_may_move_to_another_module():
    class Moved(Bytes):
        pass

    assert type(deserialize(b"elsewhere.Moved\n" + Moved().to_bytes())) is Moved


def test_serialized_tokenizer_does_not_import_the_module_that_it_names():
    data = serialize(Bytes()).replace(b"Bytes", b"Other")
    with pytest.raises(UserError, match="whose module is not imported"):
        deserialize(data)


def make_hf(kind, text):
    tokenizers = pytest.importorskip("tokenizers")
    if kind == "byte-level":
        made = tokenizers.ByteLevelBPETokenizer()
        made.train_from_iterator([text], vocab_size=400, special_tokens=["<|endoftext|>"])
    else:
        made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        made.normalizer = tokenizers.normalizers.Lowercase()
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.decoder = tokenizers.decoders.WordPiece()
        made.train_from_iterator([text], tokenizers.trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"]))
    return made


@pytest.mark.parametrize(("kind", "lossless"), [("byte-level", True), ("word-piece", False)])
def test_tokenizer_json_gives_the_same_ids_and_counts_characters(kind, lossless, corpus_text, tmp_path):
    made = make_hf(kind, corpus_text)
    made.enable_truncation(8)  # for a network with short inputs
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    made.no_truncation()
    made.no_padding()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    tokenizer = read_pretrained(tmp_path / "tokenizer.json")
    assert tokenizer.lossless is lossless
    for text in (corpus_text, "naïve 日本 🙂 \r\n\t<s>"):
        assert tokenizer.encode(text) == made.encode(text).ids
        if lossless:
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert tokenizer.char_counts[tokenizer.encode(text)].sum() == len(text)
    again = deserialize(serialize(tokenizer))
    assert isinstance(again, HFTokenizer)
    assert again.encode("To be") == tokenizer.encode("To be")
    assert (again.eos_id, tokenizer.eos_id) == ((0, 0) if lossless else (None, None))
    if lossless:
        assert 0 not in tokenizer.encode("a<|endoftext|>b"), "special tokens in a text are text"
    else:
        assert tokenizer.char_counts[tokenizer.encode("日")].tolist() == [1], "the unknown token stands for text"


def test_hf_tokenizer_is_the_same_in_another_process(corpus_text, tmp_path):
    """The library does not pickle the setting by which special tokens in a text are text."""
    make_hf("byte-level", corpus_text).save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_pretrained(tmp_path / "tokenizer.json")
    text = "a<|endoftext|>b"
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)


def test_ids_may_have_gaps(corpus_text, tmp_path):
    made = make_hf("byte-level", corpus_text)
    content = json.loads(made.to_str())
    content["model"]["vocab"]["a"] = made.get_vocab_size() + 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_pretrained(tmp_path / "tokenizer.json")
    (index,) = tokenizer.encode("a")
    assert index == tokenizer.vocab_size - 1 == made.get_vocab_size() + 5
    assert (tokenizer.decode([index]), tokenizer.char_counts[index]) == ("a", 1)


def test_added_tokens_count_their_characters(corpus_text, tmp_path):
    """Runs of spaces, as in the tokenizers of GPT-NeoX and Phi, are literal text in `added_tokens`."""
    made = make_hf("byte-level", corpus_text)
    made.add_tokens(["  ", "   "])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_pretrained(tmp_path / "tokenizer.json")
    assert tokenizer.lossless
    assert tokenizer.char_counts[tokenizer.encode("a   b")].tolist() == [1, 3, 1]


def test_sentencepiece_model_file_can_be_used(unigram_file, corpus_file):
    tokenizer = TokenizerConfig(vocab_size=400).train("to be or not to be " * 99)
    unigram_file.write_bytes(tokenizer.to_bytes())
    assert read_pretrained(unigram_file).fingerprint == tokenizer.fingerprint


@pytest.fixture
def unigram_file(tmp_path):
    return tmp_path / "unigram.model"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("no.json", None),
        ("bad.json", b"{}"),
        ("bad.json", b"[]"),
        ("deep.json", b"[" * 100_000),
        ("no.model", b"x"),
        ("no.model", b""),
    ],
)
def test_invalid_tokenizer_file_is_refused(name, content, tmp_path):
    pytest.importorskip("tokenizers")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read \(.*\): pass a Hugging Face tokenizer.json"):
        read_pretrained(tmp_path / name)


def test_unusable_tokenizer_json_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.Unigram([("a", -1.0), ("b", -2.0)], byte_fallback=False)  # no id for unknown characters
    tokenizers.Tokenizer(model).save(str(tmp_path / "unigram.json"))
    model = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    content = json.loads(tokenizers.Tokenizer(model).to_str())
    content["added_tokens"] = [{"id": 9, "content": "<eos>", "special": True}]
    (tmp_path / "words.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    for name in ("unigram.json", "words.json"):
        with pytest.raises(UserError, match=r"cannot be read \(.*\): pass a Hugging Face tokenizer.json"):
            read_pretrained(tmp_path / name)


# Data


class Counting(pl.LightningDataModule):
    vocab_size, block_size = 10, 8

    def __init__(self, ids=None):
        super().__init__()
        self.ids = (torch.arange(9) + torch.arange(32)[:, None]) % 10 if ids is None else ids

    def train_dataloader(self):
        pairs = torch.utils.data.TensorDataset(self.ids[:, :-1], self.ids[:, 1:])
        return torch.utils.data.DataLoader(pairs, batch_size=4)

    val_dataloader = train_dataloader


def test_custom_data_trains_with_losses_per_token(tmp_path):
    keeper = BestLastCheckpoint()
    settings = {
        **tiny.QUIET,
        "default_root_dir": str(tmp_path),
        "max_steps": 8,
        "callbacks": [keeper],
        "check_val_every_n_epoch": 1,
    }
    trainer = pl.Trainer(**settings, plugins=[AtomicCheckpointIO()])
    model = LanguageModel(net=tiny.net)
    with pytest.warns(UserWarning, match="Counting is not a TextDataModule: a resumed run may see different batches"):
        trainer.fit(model, datamodule=Counting())
    assert {"val/loss", "val/perplexity"} == {name for name in trainer.callback_metrics if name.startswith("val/")}
    assert keeper.best_score == pytest.approx(float(trainer.callback_metrics["val/loss"]))
    data = Counting()
    data.test_dataloader = data.train_dataloader
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    assert set(metrics) == {"test/loss", "test/perplexity"}
    again = LanguageModel.load_from_checkpoint(keeper.last_model_path)
    assert torch.equal(again.generate(torch.tensor([[1, 2]])), model.generate(torch.tensor([[1, 2]])))
    with pytest.raises(UserError, match="without a tokenizer"):
        again.generate("a")


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(8, 9, 2, dtype=torch.long),
        torch.zeros(8, 1, dtype=torch.long),
        (torch.zeros(8, 9), torch.zeros(8, 9)),
        Batch(*[torch.zeros(9, dtype=torch.long)] * 3),
        Batch(*[torch.zeros(8, 9, dtype=torch.long)] * 2, torch.zeros(8)),
    ],
)
def test_batches_of_another_shape_are_refused(ids):
    data = Counting()
    data.train_dataloader = lambda: torch.utils.data.DataLoader([ids], batch_size=None)
    with pytest.raises(UserError, match="a batch must be a pair"):
        pl.Trainer(**tiny.QUIET, max_steps=1, enable_checkpointing=False).fit(LanguageModel(net=tiny.net), data)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (torch.zeros(8, 10, dtype=torch.long), "windows of 9 tokens, but block_size is 8"),
        (torch.full((8, 9), 10), "has the id 10, but ids must be from 0 to vocab_size - 1 = 9"),
        (torch.full((8, 9), -1), "has the id -1"),
    ],
)
def test_batches_that_the_network_cannot_take_are_refused(ids, says):
    with pytest.raises(UserError, match=says):
        pl.Trainer(**tiny.QUIET, max_steps=1, enable_checkpointing=False).fit(
            LanguageModel(net=tiny.net), Counting(ids)
        )


def test_ids_may_be_of_any_integer_type():
    losses = []
    for dtype in (torch.uint8, torch.int32, torch.long):
        ids = Counting().ids.to(dtype)
        trainer = pl.Trainer(**{**tiny.QUIET, "max_steps": 2, "enable_checkpointing": False})
        torch.manual_seed(0)
        trainer.fit(LanguageModel(net=tiny.net), Counting(ids))
        losses.append(trainer.validate(trainer.lightning_module, Counting(ids), verbose=False))
    assert losses[0] == losses[1] == losses[2]


def test_data_module_whose_constructor_is_not_called_is_refused(folder, capsys):
    text = (folder / "my_data.py").read_text().replace("super().__init__()", "pass")
    (folder / "uninitialized.py").write_text(text)
    words = ["--data=uninitialized.Counting", *(word for word in SHORT if not word.startswith("--data"))]
    assert "Counting.__init__ must call super().__init__()" in error_of(capsys, "fit", *words)
    assert "prepare needs a TextDataModule, got a Counting" in error_of(capsys, "prepare", "--data=my_data.Counting")


def test_data_without_sizes_is_refused():
    class Sizeless(Counting):
        vocab_size = None

    with pytest.raises(UserError, match="the sizes of the network are not known"):
        pl.Trainer(**tiny.QUIET, max_steps=1, enable_checkpointing=False).fit(LanguageModel(net=tiny.net), Sizeless())


def test_validations_that_would_interrupt_a_step_are_refused():
    data = Counting((torch.arange(9) + torch.arange(20)[:, None]) % 10)  # five batches
    settings = {**tiny.QUIET, "check_val_every_n_epoch": None, "val_check_interval": 2, "accumulate_grad_batches": 2}

    def fit(steps):
        pl.Trainer(**settings, max_steps=steps, fast_dev_run=False, callbacks=[BestLastCheckpoint()]).fit(
            LanguageModel(net=tiny.net), data
        )

    with pytest.raises(UserError, match="an epoch has 5 batches, which is not a multiple of .* 2"):
        fit(4)
    fit(3)  # the first epoch
    settings["limit_val_batches"] = 0
    fit(4)


class Unsized(torch.utils.data.IterableDataset):
    """Twenty windows, without a length."""

    def __iter__(self):
        ids = (torch.arange(9) + torch.arange(20)[:, None]) % 10
        return iter(zip(ids[:, :-1], ids[:, 1:]))


def test_an_epoch_of_unknown_length_may_end_within_a_step(tmp_path):
    """Its last step has fewer micro-batches, the loss is their mean, and no checkpoint falls within a step."""

    class Constant(LanguageModel):
        def training_loss(self, batch):
            return 1 + 0 * super().training_loss(batch)

    class Recorder(pl.Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_end(self, trainer, *_):
            if "train/loss" in trainer.callback_metrics:
                self.losses.append(float(trainer.callback_metrics["train/loss"]))

    class Keeper(BestLastCheckpoint):
        def _save(self, trainer, name):
            saved.append(trainer.fit_loop.epoch_loop.batch_progress.current.processed)
            return super()._save(trainer, name)

    saved = []
    data, recorder = Counting(), Recorder()
    data.train_dataloader = lambda: torch.utils.data.DataLoader(Unsized(), batch_size=4)
    settings = {**tiny.QUIET, "check_val_every_n_epoch": None, "val_check_interval": 2, "accumulate_grad_batches": 2}
    settings |= {"max_steps": 9, "log_every_n_steps": 1, "default_root_dir": str(tmp_path)}
    trainer = pl.Trainer(**settings, callbacks=[recorder, Keeper()], plugins=[AtomicCheckpointIO()])
    trainer.fit(Constant(net=tiny.net), data)
    assert recorder.losses == pytest.approx([1.0] * len(recorder.losses)) and len(recorder.losses) > 9
    assert len(saved) > 3 and set(saved) <= {2, 4, 5}


def test_the_end_of_a_loader_without_a_length_is_saved(tmp_path):
    def fit(epochs, **resumed):
        data = Counting()
        data.train_dataloader = lambda: torch.utils.data.DataLoader(Unsized(), batch_size=4)
        settings = {**tiny.QUIET, "check_val_every_n_epoch": None, "val_check_interval": 3, "max_epochs": epochs}
        settings |= {"max_steps": -1, "default_root_dir": str(tmp_path)}
        keeper = BestLastCheckpoint()
        model = LanguageModel(net=tiny.net, lr_scheduler=torch.optim.lr_scheduler.ConstantLR)
        trainer = pl.Trainer(**settings, callbacks=[keeper], plugins=[AtomicCheckpointIO()])
        trainer.fit(model, data, **resumed)
        return trainer.global_step, checkpoint.read(keeper.last_model_path)

    steps, last = fit(2)
    assert steps == last["global_step"] == 10
    steps, last = fit(3, ckpt_path=last["path"], weights_only=True)
    assert steps == last["global_step"] == 15


def test_several_processes_divide_custom_data(folder):
    words = ["--data=my_data.Counting", "--data.length=64"]
    assert check_fit(words)["trainer"]["use_distributed_sampler"] is True
    assert check_fit([])["trainer"]["use_distributed_sampler"] is False, "TextDataModule does it itself"


def test_own_batch_objects_are_checked():
    class Longer(Counting):
        def train_dataloader(self):
            ids = torch.zeros(2, 99, dtype=torch.long)
            return torch.utils.data.DataLoader([Batch(ids, ids, ids)], batch_size=None)

    trainer = pl.Trainer(**{**tiny.QUIET, "max_steps": 1, "enable_checkpointing": False})
    with pytest.raises(UserError, match="windows of 99 tokens"):
        trainer.fit(LanguageModel(net=tiny.net), Longer())


def test_custom_data_has_no_invented_throughput():
    settings = {**tiny.QUIET, "max_steps": 2, "log_every_n_steps": 1, "enable_checkpointing": False}
    trainer = pl.Trainer(**settings, callbacks=[Throughput()])
    trainer.fit(LanguageModel(net=tiny.net), Counting())
    found = {name for name in trainer.callback_metrics if name.startswith("throughput/")}
    assert found - {"throughput/mfu"} == {"throughput/tokens_per_second"}


def test_own_validation_and_a_checkpoint_of_custom_data(folder, capsys):
    code = """
from lmlight import LanguageModel

class Own(LanguageModel):
    def validation_step(self, batch, batch_idx):
        nats = super().validation_step(batch, batch_idx)
        self.log("val/loss", nats.mean())
        return nats.mean()

    def on_validation_epoch_end(self):
        pass
"""
    (folder / "own_validation.py").write_text(code)
    words = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    words += ["--data=my_data.Counting", "--data.length=64"]
    assert main(["fit", "--model=own_validation.Own", *words]) == 0
    assert re.search(r"\d nats per token", capsys.readouterr().out)
    (checkpoint,) = folder.glob("runs/*/checkpoints/best.ckpt")
    for words in (
        ["validate", f"--ckpt_path={checkpoint}"],
        ["fit", f"--init_from={checkpoint}", *SHORT, "--data.block_size=8"],
    ):
        assert "data without a tokenizer: pass its --data" in error_of(capsys, *words)


@pytest.mark.parametrize(
    ("returned", "callback"),
    [("None", "Pictures"), ("batch.targets.new_zeros(batch.targets.shape).float()", "TrainSubsetEval")],
)
def test_own_validation_that_a_callback_cannot_use_is_a_one_line_error(folder, capsys, returned, callback):
    code = f"""
from lmlight import LanguageModel

class Own(LanguageModel):
    def validation_step(self, batch, batch_idx):
        return {returned}

    def on_validation_epoch_end(self):
        self.log("val/loss", 1.0)
"""
    name = f"own_for_{callback.lower()}"
    (folder / f"{name}.py").write_text(code)
    assert f"the callback {callback} needs" in error_of(capsys, "fit", f"--model={name}.Own", *SHORT)


def test_scheduler_that_ends_before_the_run_is_a_one_line_error(folder, capsys):
    words = ["--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR", "--model.lr_scheduler.max_lr=0.01"]
    words += ["--model.lr_scheduler.total_steps=3", *SHORT, "--trainer.max_steps=4", "--trainer.val_check_interval=4"]
    assert "Tried to step 4 times" in error_of(capsys, "fit", *words)
