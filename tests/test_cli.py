"""The command line."""

import inspect
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import tiny
import torch
import yaml
from lightning.pytorch import Callback

import lmlight
from lmlight import Bigram, LanguageModel, Sampling, TextDataModule, Transformer, checkpoint
from lmlight.__main__ import main as typed
from lmlight.command_line import join, program
from lmlight.commands import chat
from lmlight.data.tokenizer import CharTokenizer, TokenizerConfig
from lmlight.export.model import Model
from lmlight.files import shown
from lmlight.generation import escape_control_characters
from lmlight.optim import Muon, Schedule
from lmlight.training.cli import _mistake, main

TINY = [*tiny.FLAGS, "--trainer.max_steps=6", "--trainer.val_check_interval=3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus_text):
    """The folder of a finished run, its output, and the path of its best checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "corpus.txt").write_bytes(corpus_text.encode())
    env = processes.environment(LMLIGHT_CACHE=str(folder / "cache"))
    printed = processes.run("fit", "--data.corpus=corpus.txt", *TINY, cwd=folder, env=env)
    (best,) = folder.glob("runs/*/checkpoints/best.ckpt")
    return folder, printed, best


def test_fit_summary(finished, sample_prompt):
    folder, (out, err), best = finished
    assert "\r" not in out + err
    assert "\x1b" not in out + err
    lines = out.split("\n")
    validations = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in validations] == ["3/6", "6/6"]
    assert all("val/nats_per_char" in line for line in validations)
    where = best.relative_to(folder)
    assert any(line.startswith(f"Best checkpoint: {where}") for line in lines)
    summary = next(line for line in lines if "bits per character" in line).split()
    nats, bits = float(summary[0]), float(summary[4])
    assert bits == pytest.approx(nats / 0.693147, rel=1e-3)
    assert f"val/nats_per_char {nats:.4f}" in out
    assert f"\n{sample_prompt}" in out
    command, tensorboard = out.split("Next:\n")[1].strip().split("\n")
    python, m, name, *words = shlex.split(command)
    assert (python, m, name) == (sys.executable, "-m", "lmlight")
    assert processes.run_afresh(*words, cwd=folder)[0].startswith(sample_prompt)
    assert tensorboard.strip() == f"{sys.executable} -m tensorboard.main --logdir runs"


def test_summary_names_the_tuning_text(corpus_file, capsys):
    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, "--data.validate_on=tune"]) == 0
    assert "bits per character on the tuning text\n" in capsys.readouterr().out


def test_suggested_command_can_be_run_from_here(tmp_path, monkeypatch):
    script = tmp_path / "environment" / "bin" / "lmlight"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(program()) == Path("environment/bin/lmlight")
    assert Path(program("tensorboard")) == Path("environment/bin/tensorboard")
    monkeypatch.setenv("PATH", str(script.parent))
    assert (program(), program("tensorboard")) == ("lmlight", "tensorboard")
    script.with_name("lmlight.exe").touch(mode=0o755)
    for started in ("lmlight", "lmlight.exe"):  # pip's launcher of Windows removes the suffix
        monkeypatch.setattr(sys, "argv", [str(script.with_name(started))])
        monkeypatch.setattr(shutil, "which", lambda name: str(script.with_name("lmlight.exe")))
        assert program() == "lmlight"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "__main__.py")])
    assert program() == f"{sys.executable} -m lmlight"
    assert program("tensorboard") == f"{sys.executable} -m tensorboard.main"
    launcher = script.with_name("lmlight.EXE")
    monkeypatch.setattr("shutil.which", lambda name: str(launcher))
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert program() == "lmlight", "on Windows, argv has no suffix"


def test_run_folder_has_config_metrics_and_best_checkpoint(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, best = finished
    (run,) = folder.glob("runs/*")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["block_size"] == 16
    assert config["model"]["net"]["init_args"]["n_embd"] == 32
    assert len((run / "metrics.csv").read_text().splitlines()) == 3
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Tensors("samples/empty prompt/text_summary")] == [2, 5]
    validations = events.Scalars("val/nats_per_char")
    assert len(validations) == 2
    # Lightning logs with the number of the last step, counted from 0
    lowest = min(validations, key=lambda event: event.value)
    assert checkpoint.read(best)["global_step"] == lowest.step + 1


def test_predict_is_deterministic_for_a_seed(finished, capsys, tmp_path):
    _, _, best = finished
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("MIRA:\n\nOLD GARDENER:\n")
    arguments = ["predict", f"--ckpt_path={best}", "--model.sampling.max_new_tokens=8"]

    def predict(*more):
        assert main([*arguments, *more]) == 0
        return capsys.readouterr().out

    one = predict('--data.prompts=["MIRA:"]')
    assert one.startswith("MIRA:")
    assert one == predict('--data.prompts=["MIRA:"]')
    assert one != predict('--data.prompts=["MIRA:"]', "--seed_everything=2")
    many = predict(f"--data.prompts={prompts}")
    assert many.startswith(one)
    assert many.count("-" * 40) == 2
    assert not (tmp_path / "runs").exists()


def test_predict_prints_the_same_texts_as_its_output_file(finished, capsys, tmp_path):
    """Samples are the same on the terminal and as JSON Lines, batched or not, with log-probabilities of the network."""
    _, _, best = finished
    arguments = [
        "predict",
        f"--ckpt_path={best}",
        "--model.sampling.max_new_tokens=8",
        "--model.sampling.num_samples=2",
    ]
    arguments += ["--model.sampling.stop=[ee]", '--data.prompts=["MIRA:", "", "OLD"]']
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for name, more in (("batch.jsonl", []), ("alone.jsonl", ["--data.prompt_batch_size=1"])):
        assert main([*arguments, f"--output={name}", *more]) == 0
        out, err = capsys.readouterr()
        assert out == f"Wrote 6 texts to {name}\n"
        assert err == ""
    texts = [json.loads(line) for line in Path("batch.jsonl").read_text("utf-8").split("\n")[:-1]]
    alone = [json.loads(line) for line in Path("alone.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [text["prompt"] for text in texts] == ["MIRA:"] * 2 + [""] * 2 + ["OLD"] * 2
    assert [text["seed"] for text in texts] == [1337, 1338] * 3
    assert (
        printed
        == f"\n{'-' * 40}\n".join(escape_control_characters(t["prompt"] + t["completion"]) for t in texts) + "\n"
    )
    model = LanguageModel.load_from_checkpoint(best)
    for text, single in zip(texts, alone):
        assert text["logprobs"] == pytest.approx(single.pop("logprobs"), abs=1e-4)
        assert {**text, "logprobs": None} == {**single, "logprobs": None}
        assert text["finish_reason"] in ("length", "stop")
        assert "ee" not in text["completion"]
        begin = model.tokenizer.encode(text["prompt"] or "\n")
        logits = model(torch.tensor([(begin + text["tokens"])[:-1]]))[0, len(begin) - 1 :]
        plain = logits.log_softmax(-1)[torch.arange(len(text["tokens"])), torch.tensor(text["tokens"])]
        assert text["logprobs"] == pytest.approx(plain.tolist(), abs=1e-4)
    assert main([*arguments, "--output=batch.jsonl"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*arguments, "--output=nowhere/batch.jsonl"]) == 2
    assert "output 'nowhere/batch.jsonl' does not exist" in capsys.readouterr().err


def test_predict_reads_prompts_from_the_standard_input(finished, capsys, monkeypatch):
    _, _, best = finished
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("MIRA:\nPIP é".encode())))
    assert main(["predict", f"--ckpt_path={best}", "--model.sampling.max_new_tokens=2", "--data.prompts=-"]) == 0
    first, second = capsys.readouterr().out.split("-" * 40 + "\n")
    assert first.startswith("MIRA:")
    assert second.startswith("PIP é")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes, which Windows cannot")
def test_predict_with_two_processes_keeps_prompt_order(finished, tmp_path):
    _, _, best = finished
    (tmp_path / "prompts.txt").write_text("\n".join(f"{speaker}:" for speaker in "ABCDE"))
    command = ["predict", f"--ckpt_path={best}", "--data.prompts=prompts.txt", "--model.sampling.max_new_tokens=3"]
    command += ["--trainer.accelerator=cpu", "--data.prompt_batch_size=1"]
    assert main([*command, "--output=one.jsonl"]) == 0
    processes.run(*command, "--output=two.jsonl", "--trainer.devices=2", "--trainer.strategy=ddp_fork")

    def texts(name):
        lines = [json.loads(line) for line in Path(name).read_text().split("\n")[:-1]]
        return [(line["prompt"], line["tokens"], line["seed"]) for line in lines]

    assert texts("one.jsonl") == texts("two.jsonl")
    assert [prompt for prompt, _, _ in texts("two.jsonl")] == ["A:", "B:", "C:", "D:", "E:"]


@pytest.mark.parametrize("command", ["validate", "predict", "fit"])
def test_command_prints_which_file_best_is(finished, command, capsys, monkeypatch):
    folder, _, best = finished
    monkeypatch.chdir(folder)
    flag = "init_from" if command == "fit" else "ckpt_path"
    few = ["--trainer.max_steps=1", "--trainer.fast_dev_run=true"] if command == "fit" else []
    more = ["--data.prompts=[A]"] if command == "predict" else ["--data.corpus=corpus.txt"]
    for name, printed in (("best", f"Checkpoint: {best.relative_to(folder)}\n"), (str(best), "")):
        assert main([command, f"--{flag}={name}", *more, *few]) == 0
        assert capsys.readouterr().err == printed


def test_chat_streams_text_and_takes_settings(finished, capsys, monkeypatch):
    folder, _, best = finished

    def chat(name, text, status=0):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert typed(["chat", name]) == status
        return capsys.readouterr()

    settings = '/temperature 0\n/temperature x\n/colour 1\n/stop ["a"]\n'
    out, err = chat(str(best), f"/max_new_tokens 5\nMIRA:\n/seed 1337\nMIRA:\nMIRA:\n{settings}MIRA:\n/quit\n")
    first, again, other = (part.split("\n\n")[0] for part in out.split("MIRA:")[1:4])
    text = LanguageModel.load_from_checkpoint(best).generate("MIRA:", max_new_tokens=5, seed=1337)
    assert first == again == escape_control_characters(text.removeprefix("MIRA:"))
    assert other != first, "the same line again gives another text"
    assert "Expected a <class 'float'>. Got value: x" in out
    assert "/repetition_penalty 1.0" in out, "of an unknown name, all that there are"
    assert err == ""
    _, err = chat("nope.ckpt", "", status=2)
    assert err.startswith("lmlight: error: no checkpoint at 'nope.ckpt'")
    assert err.count("\n") == 1
    monkeypatch.chdir(folder)
    out, _ = chat("best", "")  # end of input
    assert out.startswith(f"{best.relative_to(folder)}: "), "which file it is"


@pytest.fixture
def crlf(tmp_path):
    """The path of a checkpoint whose model writes `a`, CR, LF, `a` and so on."""
    tokenizer, net = CharTokenizer("\n\ra", newline="\r\n"), Bigram(3, 8)
    net.table.weight.data = 9 * torch.eye(3)[[2, 0, 1]]  # what follows LF, CR, `a`
    model = Model(net, tokenizer, {"temperature": 0.0, "max_new_tokens": 7}, {}, {}, 0)
    checkpoint.write(model.to_checkpoint(), tmp_path / "crlf.ckpt")
    return tmp_path / "crlf.ckpt"


def test_chat_goes_on_after_the_largest_seed(crlf, monkeypatch, capsys):
    lines = iter([f"/seed {2**64 - 1}", "a", "a", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.main([str(crlf), "--device=cpu"])
    assert "seed" not in capsys.readouterr().out


def test_chat_prints_crlf_as_line_breaks(crlf, monkeypatch, capsys):
    lines = iter(["a", "a\\n", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.main([str(crlf), "--device=cpu"])
    assert capsys.readouterr().out.partition("\n")[2] == "a\na\na\n\n\n" + "a\na\na\na\n\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
def test_chat_reads_bytes_that_are_not_text(finished):
    folder, _, best = finished
    with processes.start("chat", best, cwd=folder, stdin=subprocess.PIPE, encoding=None) as process:
        out, err = process.communicate(b"A \xff B\n/max_new_tokens 2\nMIRA:\n", timeout=60)
    assert process.returncode == 0, err
    assert out.count(b"> ") == 4
    assert b"Traceback" not in err


def test_chat_on_missing_device_is_a_one_line_error(crlf, capsys):
    assert typed(["chat", str(crlf), "--device=cuda"]) == 2
    assert "device 'cuda' cannot be used" in capsys.readouterr().err


def test_predict_refuses_sharded_strategy(crlf):
    config = Path(__file__).parents[1] / "configs" / "fsdp.yaml"
    words = ["predict", f"--ckpt_path={crlf}", "--trainer.accelerator=cpu", f"--config={config}"]
    words += ["--trainer.devices=1", "--trainer.strategy.data_parallel_size=1"]
    # the strategy leaves its rank and port in the environment
    _, err = processes.run(*words, status=2)
    assert "predict needs the whole model on each device" in err


def test_predict_prints_crlf_as_line_breaks_and_keeps_it_in_the_output_file(crlf, capsys):
    prompts = ["predict", f"--ckpt_path={crlf}", '--data.prompts=["a", "a\\n"]', "--trainer.accelerator=cpu"]
    prompts += [
        "--model.sampling.temperature=0",
        "--model.sampling.max_new_tokens=6",
        "--model.sampling.end_at_line=false",
    ]
    assert main(prompts) == 0
    assert capsys.readouterr().out == "a\na\na\n" + "-" * 40 + "\n" + "a\na\na\n\n"
    assert main([*prompts, "--output=texts.jsonl"]) == 0
    texts = [json.loads(line) for line in Path("texts.jsonl").read_text().splitlines()]
    assert [(text["prompt"], text["completion"]) for text in texts] == [("a", "\r\na\r\na"), ("a\n", "a\r\na\r\n")]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_the_text_and_not_the_chat(finished):
    _, _, best = finished
    env = processes.environment(PYTHONUNBUFFERED="1")
    with processes.start("chat", best, stdin=subprocess.PIPE, env=env) as process:
        process.stdin.write("/max_new_tokens 1000000\nMIRA:\n")
        process.stdin.flush()
        seen = ""
        while "MIRA:" not in seen:
            seen += process.stdout.read(1)
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate("/quit\n", timeout=30)
    assert process.returncode == 0, errors
    assert rest.rstrip().endswith(">")


def test_validate_and_test_need_only_the_checkpoint(finished, capsys, monkeypatch):
    folder, (printed, _), best = finished
    monkeypatch.chdir(folder)
    assert main(["validate", f"--ckpt_path={best}"]) == 0
    out = capsys.readouterr().out
    metrics = {line.split()[0]: float(line.split()[1]) for line in out.strip().split("\n")}
    assert f"{metrics['val/nats_per_char']:.4f}" in printed
    assert main(["test", f"--ckpt_path={best}"]) == 0
    assert "test_sliding/nats_per_char" in capsys.readouterr().out
    assert len(list(folder.glob("runs/*"))) == 1
    for command, limit in (("validate", "val"), ("test", "test")):
        assert main([command, f"--ckpt_path={best}", f"--trainer.limit_{limit}_batches=0"]) == 0
        assert capsys.readouterr().out == "Nothing was scored\n"


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        (("validate", "--data.validate_on=tune"), True),
        (("validate", "--data.val_fraction=0.2"), True),
        (("validate", "--data.val_fraction=0.05"), False),
        (("test", "--data.validate_on=tune"), False),  # which scores the validation text
        (("test", "--data.val_corpus=corpus.txt"), True),
        (("test", "--data.test_corpus=corpus.txt"), True),
        (("test", "--data.test_corpus=other.txt", "--data.val_fraction=0.2"), False),  # no text of the corpus is scored
        (("validate", "--data.test_corpus=corpus.txt"), False),
    ],
)
def test_scoring_text_that_the_model_has_read_warns(finished, capsys, monkeypatch, recwarn, words, warns):
    folder, _, best = finished
    monkeypatch.chdir(folder)
    Path("other.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 50)
    command, *flags = words
    assert main([command, f"--ckpt_path={best}", *flags]) == 0
    assert any("was trained on some of the text to be scored" in str(warning.message) for warning in recwarn) == warns


def test_finetuning_on_another_split_warns(finished, monkeypatch, tmp_path):
    folder, _, best = finished
    monkeypatch.chdir(folder)
    words = ["--data.corpus=corpus.txt", "--data.validate_on=tune", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.warns(UserWarning, match="was trained on some of the text to be scored"):
        assert main(["fit", f"--init_from={best}", *words, "--trainer.fast_dev_run=true"]) == 0


def test_flags_override_the_checkpoint(finished, capsys, monkeypatch):
    folder, _, best = finished
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        main(["validate", f"--ckpt_path={best}", "--data.batch_size=3", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["data"]["batch_size"] == 3


def test_callbacks_and_logger_can_be_disabled(corpus_file, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, "--trainer.callbacks=null"]) == 0
    (run,) = tmp_path.glob("runs/*")
    tags = EventAccumulator(str(run)).Reload().Tags()
    assert not tags["images"] and not tags["tensors"]
    assert {tag.partition("/")[0] for tag in tags["scalars"]} == {"train", "val", "grad_norm", "epoch"}
    assert not (run / "metrics.csv").exists()
    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, "--trainer.logger=false"]) == 0, capsys.readouterr().err
    assert not list(tmp_path.glob("runs/events*"))


def test_print_config_round_trip(capsys, tmp_path):
    for command in ("fit", "validate", "test", "predict"):
        with pytest.raises(SystemExit):
            main([command, "--model.net.n_layer=3", "--print_config"])
        first = capsys.readouterr().out
        (tmp_path / "config.yaml").write_text(first)
        with pytest.raises(SystemExit):
            main([command, "--config=config.yaml", "--print_config"])
        assert capsys.readouterr().out == first
        assert yaml.safe_load(first)["model"]["net"]["init_args"]["n_layer"] == 3


def test_same_seed_gives_the_same_run(corpus_file, capsys):
    def losses(seed):
        assert main(["fit", f"--data.corpus={corpus_file}", f"--seed_everything={seed}", *TINY]) == 0
        return [line.split("  ")[1:-1] for line in capsys.readouterr().out.split("\n") if line.startswith("step")]

    first = losses(1)
    assert len(first) == 2
    assert first == losses(1)
    assert first != losses(2)
    assert len(list(Path("runs").iterdir())) == 3


@pytest.mark.parametrize(("given", "expected"), [("7", {7}), ("true", {0})], ids=["given", "Lightning's"])
def test_seed_is_shared_by_model_data_and_sampling(corpus_file, monkeypatch, given, expected):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of an earlier test
    seeds = []

    def note(model):
        data, kept = model.trainer.datamodule, model.settings["seed_everything"]
        seeds.extend((model.seed, model.sampling.seed, data.seed, kept))

    monkeypatch.setattr(LanguageModel, "on_train_start", note)
    assert (
        main(["fit", f"--data.corpus={corpus_file}", *TINY, f"--seed_everything={given}", "--trainer.max_steps=1"]) == 0
    )
    assert len(seeds) == 4 and len(set(seeds)) == 1
    assert type(seeds[3]) is int and seeds[3] in expected, "a resumed run restores it"


MISTAKES = {
    "no such corpus": (["fit", "--data.corpus=nope.txt"], "no corpus at 'nope.txt'"),
    "empty corpus": (["fit", "--data.corpus=empty.txt"], "is empty"),
    "binary corpus": (["fit", "--data.corpus=binary.txt"], "binary"),
    "not UTF-8": (["fit", "--data.corpus=latin.txt"], "not utf-8 (byte 0xe9 at offset 3, line 1)"),
    "no such encoding": (["fit", "--data.encoding=rot13"], "data.encoding must be a text encoding"),
    "short text": (["fit", "--data.corpus=short.txt", "--data.tokenizer.kind=char"], "lower --data.block_size"),
    "empty path": (["fit", "--ckpt_path="], "need a checkpoint, but got an empty string"),
    "workers": (["fit", "--data.num_workers=-1"], "num_workers must be at least 0, got -1"),
    "seed": (["fit", "--seed_everything=-1"], "-1 is not in bounds"),
    "large seed": (["fit", "--seed_everything=99999999999"], "99999999999 is not in bounds"),
    "block": (["fit", "--data.block_size=0"], "block_size must be at least 1, got 0"),
    "heads": (
        ["fit", "--data.corpus=corpus.txt", "--model.net.n_head=3", "--data.tokenizer.vocab_size=400"],
        "n_head 3",
    ),
    "layers": (
        ["fit", "--data.corpus=corpus.txt", "--model.net.n_layer=-1", "--data.tokenizer.vocab_size=400"],
        "got -1",
    ),
    "vocabulary": (["fit", "--data.corpus=corpus.txt", "--data.tokenizer.vocab_size=30"], "vocab_size 30 is too small"),
    "temperature": (["fit", "--model.sampling.temperature=-1"], "temperature must be 0 (greedy) or more"),
    "schedule": (["fit", "--model.schedule.warmup_steps=-1"], "warmup_steps must be"),
    "sampling bpe": (
        [
            "fit",
            "--data.corpus=corpus.txt",
            "--data.tokenizer={kind: bpe, vocab_size: 400}",
            "--data.subword_sampling={}",
        ],
        "subword_sampling needs data.tokenizer.kind unigram, got bpe",
    ),
    "batch": (
        ["fit", "--data.corpus=corpus.txt", "--trainer.accumulate_grad_batches=3"],
        "batch_size 16 counts the windows",
    ),
    "unknown flag": (["fit", "--data.blok_size=3"], "data.blok_size"),
    "unknown net setting": (["fit", "--model.net.n_layers=3"], "n_layers"),
    "unknown key in a config": (["fit", "--config=wrong.yaml"], "blok_size"),
    "number for a checkpoint": (["fit", "--config=number.yaml"], "--ckpt_path: expected str or null, got 3"),
    "flags for a tokenizer.json": (
        ["fit", "--data.tokenizer=x/tokenizer.json", "--data.tokenizer.vocab_size=400"],
        "x/tokenizer.json is used as it is: leave out --data.tokenizer.vocab_size",
    ),
    "flags for a tokenizer's class": (
        ["fit", "--data.tokenizer.kind", "bpe", "--config=tokenizer.yaml"],
        "my.Tokens is used as it is: leave out --data.tokenizer.kind",
    ),
    "class of the model": (["fit", "--model_class=my.Model"], "on the command line, pass --model my.module.MyClass"),
    "class of the data": (["fit", "--data_class", "my.Data"], "on the command line, pass --data my.module.MyClass"),
    "empty config": (["fit", "--config=empty.txt"], "'empty.txt': expected settings, got nothing"),
    "words in a config": (["fit", "--config=short.txt"], "'short.txt': expected settings, got a str"),
    "clipping": (["fit", "--trainer.gradient_clip_val=-1"], "gradient_clip_val must be 0 or more, got -1"),
    "no such config": (["fit", "--config=nope.yaml"], "nope.yaml"),
    "not a number": (["fit", "--trainer.max_steps=many"], "--trainer.max_steps: expected int, got many;"),
    "not a number of a class": (["fit", "--model.net.n_layer=x"], "--model.net.n_layer: expected int, got x;"),
    "no such kind": (
        ["fit", "--data.tokenizer.kind=x"],
        "--data.tokenizer.kind: expected 'unigram', 'bpe', 'char', got x;",
    ),
    "no such optimizer": (["fit", "--model.optimizer=AdamX"], "--model.optimizer: there is no class AdamX;"),
    "missing option": (["fit", "--trainer.callbacks=EarlyStopping"], "--trainer.callbacks needs monitor"),
    "no checkpoint": (["predict"], "--ckpt_path"),
    "missing checkpoint": (["predict", "--ckpt_path=nope.ckpt"], "no checkpoint at 'nope.ckpt'"),
    "not a checkpoint": (["fit", "--ckpt_path=short.txt"], "short.txt"),
    "foreign checkpoint": (["validate", "--ckpt_path=foreign.ckpt"], "not an lmlight checkpoint"),
    "no prompts file": (["predict", "--ckpt_path=good.ckpt", "--data.prompts=nope.txt"], "prompts file 'nope.txt'"),
    "another net": (
        ["validate", "--ckpt_path=good.ckpt", "--model.net.n_embd=64"],
        "n_embd 32 in the checkpoint, 64 here",
    ),
}


@pytest.mark.parametrize(("args", "message"), MISTAKES.values(), ids=MISTAKES)
def test_error_is_one_line_and_leaves_no_files(args, message, finished, corpus_text, tmp_path, capsys):
    (tmp_path / "corpus.txt").write_bytes(corpus_text.encode())
    (tmp_path / "short.txt").write_text("To be, or not to be")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("caf\xe9 noir".encode("latin-1"))
    (tmp_path / "wrong.yaml").write_text("data:\n  blok_size: 3\n")
    (tmp_path / "number.yaml").write_text("ckpt_path: 3\n")
    (tmp_path / "tokenizer.yaml").write_text("data:\n  tokenizer: my.Tokens\n")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    content = checkpoint.read(finished[2])
    torch.save(content, tmp_path / "good.ckpt")
    before = set(tmp_path.iterdir())

    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error = [line for line in err.split("\n") if line and not line.startswith("lmlight: warning")]
    assert len(error) == 1, err
    assert error[0].startswith("lmlight: error: ")
    assert message in error[0]
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"cache"}
    assert not list(tmp_path.glob("cache/tokens/.*")), "no unfinished store"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGKILL")
def test_killed_loader_process_is_a_one_line_error(corpus_file, monkeypatch, capsys):
    def kill(model, batch, batch_idx):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(LanguageModel, "on_train_batch_start", kill)
    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, "--data.num_workers=1", "--trainer.max_steps=50"]) == 2
    assert "Memory may have run out: lower --data.num_workers" in capsys.readouterr().err


def test_lost_connection_to_a_killed_process_is_a_one_line_error():
    """As if a loader process were killed while it sends a batch."""
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises((EOFError, ConnectionError)) as caught:
        ours.recv()
    # without this test's frame, which would count as user code
    error = caught.value.with_traceback(caught.value.__traceback__.tb_next)
    assert "a worker process was killed. Memory may have run out: lower" in str(_mistake(error))


def test_section_of_a_config_is_settings_or_a_file(corpus_text, capsys):
    Path("corpus.txt").write_bytes(corpus_text.encode())
    Path("data.yaml").write_text("corpus: corpus.txt\nbatch_size: 7\n")
    Path("config.yaml").write_text("data: data.yaml\n")
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config=config.yaml", "--print_config"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert (data["corpus"], data["batch_size"]) == ("corpus.txt", 7)
    for section in ("trainer: 5", "model: [1]", "data: 0.5"):
        Path("config.yaml").write_text(section)
        assert main(["fit", "--config=config.yaml"]) == 2
        name, _, value = section.partition(": ")
        error = capsys.readouterr().err
        assert error == f"lmlight: error: 'config.yaml': expected settings in {name}, got {value}\n"


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe as POSIX does")
def test_a_reader_that_has_had_enough_is_no_error(tmp_path):
    for number in range(3000):
        (tmp_path / "cache" / "corpora" / f"{number}.txt").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / "corpora" / f"{number}.txt").touch()
    with processes.start("cache") as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_characters_that_the_output_cannot_encode_are_escaped(monkeypatch):
    """Redirected on Windows, it is in the code page of the locale."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="\n")
    monkeypatch.setattr(sys, "stdout", out)
    assert typed(["--version"]) == 0
    print("é日", flush=True)
    assert out.buffer.getvalue().endswith(b"\n\xe9\\u65e5\n")


def test_config_of_a_run_is_ascii(corpus_text, tmp_path):
    """jsonargparse reads it in the encoding of the locale."""
    (tmp_path / "日.txt").write_bytes(corpus_text.encode())
    assert main(["fit", "--data.corpus=日.txt", *TINY, "--trainer.callbacks=null", "--trainer.max_steps=1"]) == 0
    (config,) = tmp_path.glob("runs/*/config.yaml")
    assert config.read_bytes().isascii()
    assert yaml.safe_load(config.read_text("ascii"))["data"]["corpus"] == "日.txt"
    with pytest.raises(SystemExit, match="0"):
        main(["fit", f"--config={config}", "--print_config"])


def test_version(capsys):
    assert typed(["--version"]) == 0
    assert capsys.readouterr().out == f"lmlight {lmlight.__version__}\n"


ALL_COMMANDS = ["fit", "prepare", "validate", "test", "predict", "play", "chat", "sweep", "curves"]
ALL_COMMANDS += ["export", "import", "cache"]


def test_help_lists_every_command_without_importing_torch():
    code = (
        "import sys; from lmlight.__main__ import main; print(main({}), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    for words, status in (["--help"], 0), (["-h"], 0), ([], 2):
        out, _ = processes.run_afresh(code=code.format(words))
        assert [line.split()[0] for line in out.split("commands:\n")[1].split("\n\n")[0].split("\n")] == ALL_COMMANDS
        assert out.split("\n")[-2] == f"{status} False False"


def test_every_command_has_help(capsys):
    for command in ALL_COMMANDS:
        with pytest.raises(SystemExit) as ended:
            typed([command, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: lmlight {command} ")


@pytest.mark.parametrize(
    "words", [["curves"], ["export"], ["export", "hf"], ["import"], ["cache", "--x"]], ids=" ".join
)
def test_missing_arguments_are_a_one_line_error(capsys, words):
    assert typed(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lmlight: error: ") and err.endswith(" --help`\n") and err.count("\n") == 1


def test_an_unknown_command_is_told_all_that_there_are(capsys):
    assert typed(["fitt"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    expected = f"unknown command 'fitt': expected one of {', '.join(ALL_COMMANDS)}"
    assert err == f"lmlight: error: {expected}\n"


def test_fit_help_shows_data_and_model_first_and_the_flags_of_the_net(capsys):
    with pytest.raises(SystemExit):
        typed(["fit", "--help"])
    out = capsys.readouterr().out
    flags = re.findall(r"^  (--[\w.]+)", out, re.MULTILINE)
    first = [flags.index(f"--{name}") for name in ("data.corpus", "model.net", "model.net.n_layer", "trainer.devices")]
    assert first == sorted(first)
    assert {"--model.net.intermediate_size", "--model.optimizer.lr", "--data.tokenizer.vocab_size"} <= set(flags)
    assert len(out.split("options:")[0].split("\n")) < 8, "no long usage"
    assert flags.count("--model.net") == flags.count("--model.optimizer") == 1


def test_runs_without_a_logger_have_their_own_folders(corpus_file, tmp_path, capsys):
    for _ in range(2):
        assert main(["fit", f"--data.corpus={corpus_file}", *TINY, "--trainer.logger=false"]) == 0
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
        assert f"in {run.relative_to(tmp_path)}" in capsys.readouterr().out or run is runs[1]


CSV = "{class_path: CSVLogger, init_args: {save_dir: logs}}"


@pytest.mark.parametrize("logger", [CSV, f"[{CSV}, {{class_path: lmlight.training.callbacks.RunLogger}}]", "true"])
def test_runs_with_other_loggers_have_their_own_folder(corpus_file, tmp_path, capsys, logger):
    """It has config, checkpoints and curve, and the run is resumed in it."""
    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, f"--trainer.logger={logger}"]) == 0, (
        capsys.readouterr().err
    )
    (run,) = (tmp_path / "runs").glob("20*")  # Lightning's default logger adds "lightning_logs"
    assert {"config.yaml", "checkpoints", "metrics.csv", "curve.png"} <= {path.name for path in run.iterdir()}
    assert main(["fit", "--ckpt_path=last", "--trainer.max_steps=9"]) == 0, capsys.readouterr().err
    assert list((tmp_path / "runs").glob("20*")) == [run]
    assert checkpoint.read(run / "checkpoints/last.ckpt")["global_step"] == 9
    assert len((run / "metrics.csv").read_text().splitlines()) == 4


def test_fast_dev_run_saves_nothing(corpus_file, tmp_path, capsys):
    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, "--trainer.fast_dev_run=true"]) == 0
    out = capsys.readouterr().out
    assert "Nothing was saved" in out
    assert "ckpt" not in out
    assert not (tmp_path / "runs").exists()


def test_model_checkpoint_callback_works_beside_ours(corpus_file, tmp_path, capsys):
    flags = [f"--data.corpus={corpus_file}", *TINY, "--trainer.callbacks+=ModelCheckpoint"]
    flags += ["--trainer.callbacks.monitor=val/nats_per_char", "--trainer.callbacks.filename=theirs"]
    assert main(["fit", *flags]) == 0
    out = capsys.readouterr().out
    (run,) = (tmp_path / "runs").iterdir()
    assert f"Best checkpoint: {(run / 'checkpoints/best.ckpt').relative_to(tmp_path)}" in out and "\nNext:\n" in out
    assert {"best.ckpt", "last.ckpt", "theirs.ckpt"} <= {path.name for path in run.rglob("*.ckpt")}


def test_checkpoint_keeps_the_sampling_settings_of_the_run(corpus_file, tmp_path, capsys, monkeypatch):
    """They are used by the summary of fit, from Python, in chat and in predict."""
    flags = [f"--data.corpus={corpus_file}", *TINY, "--model.sampling={temperature: 0, repetition_penalty: 1.3}"]
    assert main(["fit", *flags]) == 0
    out = capsys.readouterr().out
    (best,) = tmp_path.glob("runs/*/checkpoints/best.ckpt")
    model = LanguageModel.load_from_checkpoint(best)
    assert (model.sampling.temperature, model.sampling.repetition_penalty) == (0, 1.3)
    sample = out.split("Best checkpoint: ")[1].split("\n\n", 1)[1].split("\n\nNext:\n")[0]
    (prompt,) = json.loads(shlex.split(out.split("Next:\n")[1].split("\n")[0])[-1])
    assert sample == escape_control_characters(model.generate(prompt, max_new_tokens=150))
    plain = LanguageModel.load_from_checkpoint(best, sampling=Sampling(temperature=0))
    assert plain.generate("MIRA:", max_new_tokens=40) != model.generate("MIRA:", max_new_tokens=40)
    assert (
        main(["predict", f"--ckpt_path={best}", '--data.prompts=["MIRA:"]', "--model.sampling.max_new_tokens=40"]) == 0
    )
    assert capsys.readouterr().out == escape_control_characters(model.generate("MIRA:", max_new_tokens=40)) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("/max_new_tokens 40\nMIRA:\n"))
    assert typed(["chat", str(best)]) == 0
    text = escape_control_characters(model.generate("MIRA:", max_new_tokens=40)).removeprefix("MIRA:")
    assert text in capsys.readouterr().out


def test_run_without_validation_prints_where_its_weights_are(corpus_file, tmp_path, capsys):
    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, "--trainer.val_check_interval=100"]) == 0
    (last,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    where = f"No validation was run; the weights are in {last.relative_to(tmp_path)}\n"
    hint = "  To validate during a short run, lower --trainer.val_check_interval\n"
    assert capsys.readouterr().out.endswith(where + hint)
    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, "--trainer.limit_val_batches=0"]) == 0
    assert "No validation was run" in (out := capsys.readouterr().out) and hint not in out


@pytest.mark.parametrize("falls", [True, False])
def test_last_validation_is_printed_unless_it_is_the_best(corpus_file, capsys, falls):
    flags = ["--trainer.callbacks=null"]
    if not falls:
        flags += ["--model.optimizer.lr=10", "--model.schedule.warmup_steps=6", "--model.schedule.shape=constant"]
    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, *flags]) == 0
    out = capsys.readouterr().out
    first, last = re.findall(r"val/nats_per_char (\S+)", out)
    assert (float(last) < float(first)) == falls
    assert (f"  {last} nats per character at the last validation\n" in out) != falls


def test_checkpoint_interval_can_be_set(corpus_file, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoint, "write", lambda content, path: written.append((path.name, content["global_step"])))
    keeper = [
        "--trainer.callbacks=lmlight.training.checkpointing.BestLastCheckpoint",
        "--trainer.callbacks.every_n_steps=2",
    ]
    flags = ["--trainer.limit_val_batches=0", "--trainer.max_steps=5"]
    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, *keeper, *flags]) == 0
    assert written == [("last.ckpt", 2), ("last.ckpt", 4), ("last.ckpt", 5)]


def test_simple_profiler_prints_its_report(corpus_file):
    printed = processes.run("fit", f"--data.corpus={corpus_file}", *TINY, "--trainer.profiler=simple")
    assert "FIT Profiler Report" in "".join(printed)


def test_docstrings_document_every_argument():
    """The parser would show the text of an attribute instead of that of an argument with the same name."""
    for kind in (LanguageModel, TextDataModule, Transformer, Muon, Schedule, Sampling, TokenizerConfig):
        sections = re.split(r"\n(Args|Attributes|Raises):\n", inspect.getdoc(kind))
        names = {
            title: set(re.findall(r"^    (\w+):", text, re.MULTILINE))
            for title, text in zip(sections[1::2], sections[2::2])
        }
        assert names["Args"] == set(inspect.signature(kind).parameters)
        assert not names["Args"] & names.get("Attributes", set())


def test_arguments_of_the_run_logger_are_refused(corpus_file, capsys):
    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, "--trainer.logger.version=baseline"]) == 2
    assert "--trainer.logger.version cannot be set" in capsys.readouterr().err


def test_a_resumed_run_with_another_validation_text_selects_the_best_from_scratch(corpus_file, tmp_path):
    Path("easy.txt").write_bytes(Path(corpus_file).read_bytes()[:2000])
    Path("hard.txt").write_text("".join(chr(33 + n * n % 89) for n in range(1500)))
    words = [f"--data.corpus={corpus_file}", *TINY, "--trainer.val_check_interval=2"]
    assert main(["fit", *words, "--trainer.max_steps=4", "--data.val_corpus=easy.txt"]) == 0
    (best,) = tmp_path.glob("runs/*/checkpoints/best.ckpt")
    resumed = ["fit", f"--ckpt_path={best.with_name('last.ckpt')}", "--data.val_corpus=hard.txt"]
    with pytest.warns(UserWarning, match="the validation text has changed: best.ckpt is selected from scratch"):
        assert main([*resumed, "--trainer.max_steps=8"]) == 0
    assert checkpoint.read(best)["global_step"] > 4


def test_a_resumed_run_with_another_interval_logs_the_right_steps(corpus_file, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [f"--data.corpus={corpus_file}", *TINY, "--trainer.max_steps=4", "--trainer.val_check_interval=2"]
    assert main(["fit", *words]) == 0
    (last,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    assert main(["fit", f"--ckpt_path={last}", "--trainer.max_steps=8", "--trainer.val_check_interval=8"]) == 0
    events = EventAccumulator(str(last.parents[1])).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [1, 3, 7]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(8))


@pytest.mark.parametrize(("interval", "later"), [(2, "1 step"), (5, "")])
def test_summary_says_if_the_final_model_is_not_scored(corpus_file, tmp_path, capsys, interval, later):
    found = "  last.ckpt, the final model, was not scored: it is (.*) past the last validation"
    words = [f"--data.corpus={corpus_file}", *TINY, "--trainer.max_steps=5", "--trainer.callbacks=null"]
    words += ["--trainer.accumulate_grad_batches=2", f"--trainer.val_check_interval={2 * interval}"]
    assert main(["fit", *words]) == 0
    assert re.findall(found, capsys.readouterr().out) == ([later] if later else [])
    (last,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    resumed = ["fit", f"--ckpt_path={last}", "--trainer.max_steps=6", "--trainer.val_check_interval=14"]
    assert main(resumed) == 0
    assert re.findall(found, capsys.readouterr().out) == ["2 steps" if later else "1 step"]


def test_folder_of_runs_may_start_with_a_tilde(corpus_file, tmp_path, capsys, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    assert main(["fit", f"--data.corpus={corpus_file}", *TINY, "--trainer.default_root_dir=~/runs"]) == 0
    (run,) = (tmp_path / "home" / "runs").iterdir()
    assert not Path("~").exists()
    assert join(["--logdir", shown(run.parent)]) in capsys.readouterr().out
    assert checkpoint.find("best", "~/runs", "best") == run / "checkpoints" / "best.ckpt"


class StopAtStep3(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 3


def test_a_run_that_stops_early_is_scored_at_its_last_step(corpus_file, capsys):
    words = [f"--data.corpus={corpus_file}", *TINY, "--trainer.max_steps=9", "--trainer.val_check_interval=2"]
    assert main(["fit", *words, "--trainer.callbacks=test_cli.StopAtStep3"]) == 0
    out = capsys.readouterr().out
    assert "Stopped at step 3 of 9" in out and "not scored" not in out
