"""Reading checkpoints that are missing, damaged, foreign or hostile."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from lmlight import checkpoint
from lmlight.data.tokenizer import CharTokenizer
from lmlight.errors import UserError
from lmlight.models import Bigram, Transformer


def save(path, net):
    content = {
        "state_dict": {f"net.{k}": v for k, v in net.state_dict().items()},
        checkpoint.METADATA_KEY: checkpoint.model_metadata(net, CharTokenizer("abc"), {}, {"data": {"corpus": "x"}}),
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("net", [Bigram(3, 8), Transformer(3, 8, n_layer=1, n_head=2, n_embd=16)], ids=["bigram", "t"])
def test_checkpoint_round_trip(net, tmp_path):
    content = checkpoint.read(save(tmp_path / "x.ckpt", net))
    again = checkpoint.net_of(content)
    idx = torch.tensor([[0, 1, 2]])
    assert torch.equal(net(idx), again(idx))
    assert checkpoint.tokenizer_of(content).decode([2, 0]) == "ca"


class Wide(Bigram):
    def __init__(self, vocab_size, block_size, widths=(8, 9)):
        super().__init__(vocab_size, block_size)


def test_list_from_the_command_line_equals_a_tuple_from_python(tmp_path):
    content = checkpoint.read(save(tmp_path / "x.ckpt", Wide(3, 8)))
    checkpoint.check_compatible(content, Wide(3, 8, [8, 9]))
    with pytest.raises(UserError, match=r"widths \[8, 9\] in the checkpoint, \[8\] here"):
        checkpoint.check_compatible(content, Wide(3, 8, [8]))


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("force", ["0", "1"])
def test_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, force):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    harm = tmp_path / "harm"
    torch.save({"state_dict": {}, checkpoint.METADATA_KEY: Exploit(harm)}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="run code"):
        checkpoint.read(tmp_path / "x.ckpt")
    (tmp_path / "y.ckpt").write_bytes(pickle.dumps(Exploit(harm)))
    with pytest.raises(UserError):
        checkpoint.read(tmp_path / "y.ckpt")
    assert not harm.exists()


def test_truncated_file_is_refused(tmp_path):
    path = save(tmp_path / "x.ckpt", Bigram(3, 8))
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 503), 10, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            checkpoint.read(path)


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.read(tmp_path / "missing.ckpt")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="not an lmlight checkpoint"):
        checkpoint.read(tmp_path / "foreign.ckpt")
    (tmp_path / "text.ckpt").write_text("First Citizen")
    with pytest.raises(UserError, match="text.ckpt"):
        checkpoint.read(tmp_path / "text.ckpt")


def test_another_format_version_is_refused_with_the_version_that_wrote_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", checkpoint.FORMAT_VERSION + 1)
    path = save(tmp_path / "x.ckpt", Bigram(3, 8))
    monkeypatch.undo()
    os.chdir(tmp_path)
    with pytest.raises(UserError, match=r"written by lmlight 0\.1\.0 in format \d.*install the version"):
        checkpoint.read(path)
