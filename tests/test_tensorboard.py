"""A small run in TensorBoard, in a real browser: `pytest -m browser`.

Needs `pip install -e '.[test,browser]'` and Chromium with its driver (Debian: `apt-get install chromium chromium-driver`).
"""

import time

import pytest
from tensorboard import program

from lmlight.training.cli import main

pytestmark = pytest.mark.browser

# the visible text of the page, including shadow trees and frames, and the width of each image
VISIBLE_TEXT = """
const words = [];
function walk(node) {
  if (node.nodeType == Node.TEXT_NODE) {
    const text = node.textContent.trim();
    if (text && node.parentElement?.checkVisibility()) words.push(text);
  }
  if (node.nodeName == 'IMG' && node.complete) words.push(`image ${node.naturalWidth} wide`);
  if (node.nodeName == 'IFRAME' && node.contentDocument?.body) walk(node.contentDocument.body);
  if (node.shadowRoot) walk(node.shadowRoot);
  if (!['STYLE', 'SCRIPT', 'NOSCRIPT'].includes(node.nodeName)) node.childNodes.forEach(walk);
}
walk(document.body);
return words.join('\\n');
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory, corpus_text):
    """The address of a TensorBoard server with a run of ten steps and two validations."""
    folder = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("LMLIGHT_CACHE", str(folder / "cache"))
    (folder / "corpus.txt").write_bytes(corpus_text.encode())
    arguments = ["fit", "--data.corpus=corpus.txt", "--data.tokenizer.vocab_size=400", "--data.block_size=16"]
    arguments += [
        "--model.net.n_layer=1",
        "--model.net.n_embd=32",
        "--data.batch_size=8",
    ]
    arguments += ["--trainer.max_steps=10", "--trainer.val_check_interval=5", "--trainer.log_every_n_steps=1"]
    assert main([*arguments, "--trainer.accelerator=cpu"]) == 0
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", str(folder / "runs"), "--port", "0", "--load_fast", "false"])
    yield server.launch()
    patch.undo()


def shows(browser, address, page, *expected, seconds=40):
    """Opens a page of TensorBoard and waits for the expected texts."""
    browser.get("about:blank")
    browser.get(f"{address}#{page}")
    missing, end = list(expected), time.monotonic() + seconds
    while missing and time.monotonic() < end:
        time.sleep(0.25)
        text = browser.execute_script(VISIBLE_TEXT)
        missing = [words for words in expected if words not in text]
    assert not missing, f"{missing} not in: {text}"


def test_scalars(browser, address):
    groups = ("gap", "grad_norm", "lr-Muon", "throughput", "train", "train_subset")
    shows(browser, address, "scalars", *groups, "update_ratio", "val")
    shows(browser, address, "scalars&tagFilter=^val", "val/nats_per_char", "val/bpc", "val/perplexity", "val/loss")
    shows(browser, address, "scalars&tagFilter=^train/", "train/loss")
    speeds = [f"throughput/{name}" for name in ("tokens_per_second", "characters_per_second", "waiting_for_data")]
    shows(browser, address, "scalars&tagFilter=throughput", *speeds)


def test_text(browser, address, sample_prompt):
    shows(
        browser,
        address,
        "text",
        f"samples/{sample_prompt}/text_summary",
        "temperature 0.9, seed 1337, step 10",
        sample_prompt,
    )


def test_images(browser, address):
    shows(browser, address, "images", "attention/block 1 head 1", "image 350 wide")
    shows(browser, address, "images&tagFilter=^loss", "loss by position", "image 350 wide")
    shows(browser, address, "images&tagFilter=by.token", "loss by token", "image 346 wide")


def test_projector(browser, address):
    shows(browser, address, "projector", "Points:", "400", "Dimension:", "32", "Metadata:")


def test_hparams(browser, address):
    shows(
        browser, address, "hparams", "data.batch_size", "model.net.n_layer", "model.optimizer.lr", "val/nats_per_char"
    )
