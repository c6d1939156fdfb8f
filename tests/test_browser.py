"""examples/browser in a real browser, from a static file server: `pytest -m browser`.

Needs `pip install -e '.[test,engines,browser]'`, `npm install --prefix examples/browser` and Chromium with its driver.
"""

import functools
import http.server
import re
import threading
import time

import pytest
from exporting import ROOT, UNUSUAL, make, random_texts, save

from lmlight.__main__ import main
from lmlight.data.tokenizer import CharTokenizer, TokenizerConfig
from lmlight.errors import UserError
from lmlight.generation import Sampling, generate_text, start_streams
from lmlight.models import GPT2, Bigram

pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore:vocab_size")]

PAGE = ROOT / "examples" / "browser"
BLOCK = 16
KINDS = ("unigram", "bpe", "char")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def tokenizers(corpus_text):
    return {kind: TokenizerConfig(kind, 400).train(corpus_text) for kind in KINDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the page's folder for models."""
    if not (PAGE / "node_modules" / "onnxruntime-web").is_dir():
        pytest.skip("needs onnxruntime-web: npm install --prefix examples/browser")
    folder = tmp_path_factory.mktemp("page")
    for path in PAGE.iterdir():
        if path.suffix != ".onnx":
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def site(folder):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def export(folder, name, net, tokenizer):
    path = save(folder / f"{name}.ckpt", net.eval(), tokenizer)
    assert main(["export", "onnx", path, str(folder / f"{name}.onnx"), "--force"]) == 0


def status(browser, *beginnings, seconds=30):
    """Waits until the status line starts with one of `beginnings`, and returns it."""
    end = time.monotonic() + seconds
    script = "return document.getElementById('status').textContent"
    while not (text := browser.execute_script(script)).startswith(beginnings):
        assert time.monotonic() < end, f"still: {text}"
        time.sleep(0.02)
    return text


def opened(browser, site, name):
    browser.get(f"{site}/index.html?model={name}.onnx")
    assert status(browser, f"{name}.onnx is open", f"{name}.onnx:") == f"{name}.onnx is open."


def generated(browser, **fields):
    """Fills in the page's fields, clicks Generate, and returns the text after the prompt."""
    for name, value in fields.items():
        browser.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)
    browser.execute_script("document.getElementById('status').textContent = 'Generating'")
    browser.find_element("id", "generate").click()
    assert status(browser, "Done", "the model does not").startswith("Done: ")
    shown = browser.execute_script("return document.getElementById('text').textContent")
    assert shown.startswith(fields["prompt"])
    return shown.removeprefix(fields["prompt"])


def from_module(browser, body, *arguments):
    """Runs the body of a function with model.js as `lmlight` and the arguments as `given`, and returns its result."""
    code = f"""const [given, done] = [[...arguments].slice(0, -1), arguments[arguments.length - 1]];
        import(new URL("model.js", location)).then(async (lmlight) => {{ {body} }})
        .then(done, (error) => done("Error: " + error.message));"""
    return browser.execute_async_script(code, *arguments)


NETS = {
    "rotary": ("unigram", {}),
    "learned": ("bpe", GPT2),
    "grouped": ("char", {"n_kv_head": 2}),
    "table": ("unigram", None),
}


@pytest.mark.parametrize("name", NETS)
def test_greedy_text_is_the_same_beyond_block_size(name, tokenizers, folder, site, browser):
    kind, options = NETS[name]
    tokenizer = tokenizers[kind]
    net = Bigram(tokenizer.vocab_size, BLOCK) if options is None else make(tokenizer, options, BLOCK)
    export(folder, name, net, tokenizer)
    opened(browser, site, name)
    sampling = Sampling(max_new_tokens=4 * BLOCK, temperature=0)
    for prompt in ("MIRA:\n  river", "", "a much longer prompt than the block of this small net has room for, by far "):
        (stream,) = start_streams(tokenizer, [prompt], sampling)
        ours = "".join(piece for _, piece in generate_text(net, [stream], sampling))
        theirs = generated(browser, prompt=prompt, temperature=0, tokens=4 * BLOCK)
        # decoders differ in the number of U+FFFD for invalid bytes
        assert re.sub("\ufffd+", "\ufffd", theirs) == re.sub("\ufffd+", "\ufffd", ours)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_same_for_any_text(kind, tokenizers, corpus_text, folder, site, browser):
    tokenizer = tokenizers[kind]
    export(folder, kind, Bigram(tokenizer.vocab_size, BLOCK), tokenizer)
    browser.get(f"{site}/index.html?model=none")
    texts = [corpus_text, *UNUSUAL, *random_texts(200)]
    found = from_module(
        browser,
        """const file = await (await fetch(given[0])).arrayBuffer();
        const model = await lmlight.Model.open(new Uint8Array(file));
        return given[1].map((text) => {
          try { const ids = model.encode(text); return [ids, model.decode(ids)]; } catch (error) { return error.message; }
        });""",
        f"{kind}.onnx",
        texts,
    )
    refused = 0
    for text, theirs in zip(texts, found, strict=True):
        try:
            assert theirs == [tokenizer.encode(text), text]
        except UserError:
            refused += 1
            assert theirs.startswith("the model does not know")
    assert (refused > 100) == (kind == "char")


def test_seed_and_temperature_are_used(tokenizers, folder, site, browser):
    export(folder, "sampled", make(tokenizers["unigram"], {}, BLOCK), tokenizers["unigram"])
    opened(browser, site, "sampled")
    one, again, other, colder = (
        generated(browser, prompt="MIRA:", tokens=20, seed=seed, temperature=temperature)
        for seed, temperature in ((1, 1), (1, 1), (2, 1), (1, 0.01))
    )
    assert one == again
    assert len({one, other, colder}) == 3
    counts = from_module(
        browser,
        """const random = lmlight.randomNumbers(7), counts = [0, 0, 0, 0];
        for (let n = 0; n < 20000; n++) counts[lmlight.sample(new Float32Array([0, 2, -99, 1]), 2, random)]++;
        return counts;""",
    )
    weights = [1, 2.718282, 0, 1.648721]  # exp(logit / 2)
    assert counts[2] == 0
    assert [n / 20000 for n in counts] == pytest.approx([w / sum(weights) for w in weights], abs=0.015)


def test_end_of_text_ends_the_text(folder, site, browser):
    tokenizer = CharTokenizer("abc", add_eos=True)
    net = Bigram(tokenizer.vocab_size, BLOCK)
    net.table.weight.data.zero_()
    for index, follows in ((3, 0), (0, 1), (1, 2), (2, 3)):
        net.table.weight.data[index, follows] = 9.0
    export(folder, "document", net, tokenizer)
    opened(browser, site, "document")
    assert generated(browser, prompt="", temperature=0, tokens=50) == "abc"


def test_status_line_names_files_that_cannot_be_opened(tokenizers, corpus_text, folder, site, browser):
    browser.get(f"{site}/index.html?model=nowhere.onnx")
    status(browser, "There is no nowhere.onnx next to this page: choose a file")
    (folder / "text.onnx").write_text(corpus_text)
    browser.find_element("id", "file").send_keys(str(folder / "text.onnx"))
    status(browser, "text.onnx: not a file of lmlight export onnx")
    lossy = TokenizerConfig("unigram", 200, lossless=False).train(corpus_text)
    export(folder, "lossy", Bigram(lossy.vocab_size, BLOCK), lossy)
    browser.find_element("id", "file").send_keys(str(folder / "lossy.onnx"))
    status(browser, "lossy.onnx: the model's tokenizer is lossy")
    assert not browser.find_element("id", "generate").is_enabled()
    char = tokenizers["char"]
    export(folder, "file", Bigram(char.vocab_size, BLOCK), char)
    browser.find_element("id", "file").send_keys(str(folder / "file.onnx"))
    status(browser, "file.onnx is open")
    browser.execute_script("document.getElementById('prompt').value = '日'")
    browser.find_element("id", "generate").click()
    status(browser, "the model does not know '日'")


def test_page_loads_from_its_own_server_only(tokenizers, folder, site, browser):
    export(folder, "here", Bigram(tokenizers["char"].vocab_size, BLOCK), tokenizers["char"])
    opened(browser, site, "here")
    names = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(names) >= 4
    assert all(name.startswith(site) for name in names), names
