"""Shared fixtures: one torch thread, a temporary working directory per test, a generated corpus, and a browser."""

import os

# Set before torch is imported: spinning threads would slow down other processes.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import atexit
import random
import shutil
import signal
import tempfile
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

torch.set_num_threads(1)

# A suite started in the background ignores SIGINT, and so would its child processes; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Keep Hypothesis's files out of the checkout.
HYPOTHESIS_HOME = tempfile.mkdtemp(prefix="lmlight-hypothesis-")
atexit.register(shutil.rmtree, HYPOTHESIS_HOME, ignore_errors=True)
set_hypothesis_home_dir(HYPOTHESIS_HOME)

settings.register_profile(
    "lmlight",
    max_examples=60,
    deadline=None,
    database=None,
    print_blob=True,
    # the autouse folder is function-scoped
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("lmlight")

STEMS = """
river stone lantern morning market friend nothing laugh under heavy sky winter bread copper wheel singer slow
never again orchard whisper harbour candle thunder pocket velvet ladder meadow button kettle signal feather
garden puzzle window ribbon shadow barrel mirror saddle gentle hollow bright clever narrow quiet silver sudden
tender wander gather listen follow borrow carry measure promise remember answer forget wonder
""".split()  # noqa: SIM905  (a list is harder to read)
ENDINGS = ["", "", "s", "ed", "ing", "er", "ly", "ness"]
SPEAKERS = ["MIRA", "TOBIAS", "OLD GARDENER", "PIP"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Runs each test in its own temporary folder, with its own cache and environment."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMLIGHT_CACHE", str(tmp_path / "cache"))
    yield
    os.environ.clear()  # DDP leaves its address, with which another run would wait for a process that has ended
    os.environ.update(before)


@pytest.fixture(scope="session")
def corpus_text():
    """About 6,000 characters laid out like a play, the same in every session."""
    draw = random.Random(0)
    speeches = []
    while sum(map(len, speeches)) < 6000:
        lines = [
            " ".join(draw.choice(STEMS) + draw.choice(ENDINGS) for _ in range(draw.randint(3, 8))).capitalize()
            + draw.choice(",.!?;")
            for _ in range(draw.randint(1, 4))
        ]
        speeches.append(f"{draw.choice(SPEAKERS)}:\n" + "\n".join(lines) + "\n")
    return "\n".join(speeches)


@pytest.fixture(scope="session")
def sample_prompt(corpus_text):
    """The prompt of samples: the first words, up to 20 characters, of the first whole validation line."""
    line = next(line for line in corpus_text[int(0.9 * len(corpus_text)) :].split("\n")[1:] if line)
    return textwrap.wrap(line, 20)[0]


@pytest.fixture
def corpus_file(tmp_path, corpus_text):
    path = tmp_path / "corpus.txt"
    path.write_bytes(corpus_text.encode())
    return path


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium for tests marked `browser`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "window-size=1400,1100"):
        options.add_argument(f"--{flag}")
    # load the requested page only
    for flag in ("disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"):
        options.add_argument(f"--{flag}")
    options.add_argument("--enable-unsafe-swiftshader")  # WebGL without a GPU, for the Projector
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()
