"""The page of `lmlight export web` in a real browser, compared with Python: `pytest -m browser`.

Needs `pip install -e '.[test,engines,browser]'`, npm, and Chromium with its driver.
"""

import functools
import re
import threading
import time
from dataclasses import asdict

import pytest
import torch
from exporting import UNUSUAL, make, random_texts
from torch import nn

from lmlight.data.tokenizer import CharTokenizer, TokenizerConfig
from lmlight.data.windows import eval_windows
from lmlight.errors import UserError
from lmlight.export import web
from lmlight.export.model import Model
from lmlight.generation import Sampling, generate_text, start_streams
from lmlight.generation.sampling import filter_logits
from lmlight.models import GPT2, Bigram, Net

pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
selenium = pytest.importorskip("selenium.webdriver", reason="needs the extra `browser`")
Keys = selenium.Keys
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore:vocab_size")]

BLOCK = 16
KINDS = ("unigram", "bpe", "char")
LONG = "MIRA:\n  the river under the sky, and a stone that nobody remembers; slow again, never again, "


class Smoothing(Net):
    """A network of a user's own: each position sees the mean of the embeddings so far."""

    def __init__(self, vocab_size, block_size):
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, block_size
        self.embedding, self.head = nn.Embedding(vocab_size, 16), nn.Linear(16, vocab_size)

    def forward(self, idx):
        x = self.embedding(idx).cumsum(1)
        return self.head(x / torch.arange(1, idx.size(1) + 1, device=idx.device)[:, None])


@pytest.fixture(scope="module")
def tokenizers(corpus_text):
    return {kind: TokenizerConfig(kind, 400).train(corpus_text) for kind in KINDS}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def site(root):
    with web._Server(("127.0.0.1", 0), functools.partial(web._Handler, directory=root)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def opened(root, site, browser, monkeypatch):
    """Exports a model, once for each name, and opens its page."""

    def open_page(name, net, tokenizer, **sampling):
        monkeypatch.setenv("LMLIGHT_CACHE", str(root / "cache"))  # of the libraries
        if not (root / name).is_dir():
            (root / name).mkdir()
            web.write(Model(net.eval(), tokenizer, asdict(Sampling(**sampling)), {}, {}, 0), root / name)
        browser.get(f"{site}/{name}/index.html")
        assert status(browser, "Ready", "The model") == "Ready."
        return net, tokenizer

    return open_page


def status(browser, *beginnings, seconds=30):
    """Waits until the status line starts with one of `beginnings`, and returns it."""
    end = time.monotonic() + seconds
    while not (text := js(browser, "return document.getElementById('status').textContent")).startswith(beginnings):
        assert time.monotonic() < end, f"still: {text}"
        time.sleep(0.02)
    return text


def js(browser, body, *arguments):
    return browser.execute_script(body, *arguments)


def from_module(browser, body, *arguments):
    """Runs the body of a function with model.js as `lmlight` and the arguments as `given`, and returns its result."""
    code = f"""const [given, done] = [[...arguments].slice(0, -1), arguments[arguments.length - 1]];
        import(new URL("model.js", location)).then(async (lmlight) => {{ {body} }})
        .then(done, (error) => done("Error: " + error.message));"""
    return browser.execute_async_script(code, *arguments)


def change(browser, **fields):
    """Sets sliders and fields as a user would."""
    code = """const field = document.getElementById(arguments[0]);
        field.value = arguments[1];
        for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind, { bubbles: true }));"""
    for name, value in fields.items():
        js(browser, code, name, str(value))


def typed(browser, text):
    js(browser, "document.getElementById('status').textContent = 'Typing'")
    change(browser, text=text)
    return status(browser, "Ready", "the model")


def generated(browser, prompt, button="generate", **fields):
    """Types a prompt, clicks a button and returns the text after the prompt."""
    change(browser, **fields)
    assert typed(browser, prompt) == "Ready."
    return clicked(browser, button).removeprefix(prompt)


def clicked(browser, button):
    js(browser, "document.getElementById('status').textContent = 'Clicked'")
    browser.find_element("id", button).click()
    assert status(browser, "Done", "Stopped", "the model").startswith(("Done", "Stopped"))
    return js(browser, "return document.getElementById('text').value")


def chips(browser):
    """Text and nats of each token."""
    code = """return [...document.querySelectorAll(".chip")].map((chip) => [chip.shown, chip.nats ?? null])"""
    return js(browser, code)


def bars(browser, name):
    """Id and probabilities before and after the settings of each row."""
    code = """return [...document.querySelectorAll(`#${arguments[0]} li`)]
        .map(({ dataset }) => [dataset.id, dataset.before, dataset.after].map(Number))"""
    return js(browser, code, name)


def logits_of(net, ids):
    """The logits of each token after the first and of the next one, in windows that overlap by half."""
    rows = []
    with torch.no_grad():
        for start, length, scored_from in eval_windows(len(ids) + 1, net.block_size, -(-net.block_size // 2)):
            rows += net(torch.tensor([ids[start : start + length]]))[0, scored_from:]
    return torch.stack(rows)


NETS = {
    "rotary": ("unigram", {}),
    "learned": ("bpe", GPT2),
    "grouped": ("char", {"n_kv_head": 2}),
    "table": ("unigram", Bigram),
    "own": ("bpe", Smoothing),
}


def network(name, tokenizers):
    kind, options = NETS[name]
    tokenizer = tokenizers[kind]
    if isinstance(options, dict):
        return make(tokenizer, options, BLOCK), tokenizer
    torch.manual_seed(0)
    return options(tokenizer.vocab_size, BLOCK), tokenizer


@pytest.mark.parametrize("name", NETS)
def test_greedy_text_is_the_same_beyond_block_size(name, tokenizers, opened, browser):
    net, tokenizer = opened(name, *network(name, tokenizers))
    sampling = Sampling(max_new_tokens=4 * BLOCK, temperature=0)
    for prompt in ("MIRA:\n  river", "", LONG):
        (stream,) = start_streams(tokenizer, [prompt], sampling)
        ours = "".join(piece for _, piece in generate_text(net, [stream], sampling))
        theirs = generated(browser, prompt, temperature=0, tokens=4 * BLOCK)
        # decoders differ in the number of U+FFFD for invalid bytes, which the page hides at the end; text boxes have no \r
        assert re.sub("\ufffd+", "\ufffd", theirs) == re.sub("\r\n?", "\n", re.sub("\ufffd+", "\ufffd", ours)).rstrip(
            "\ufffd"
        )


@pytest.mark.parametrize("name", NETS)
def test_tokens_show_the_loss_of_typed_text(name, tokenizers, opened, browser):
    net, tokenizer = opened(name, *network(name, tokenizers))
    assert typed(browser, LONG) == "Ready."
    ids = tokenizer.encode(LONG)
    expected = -logits_of(net, ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    (_, first), *others = chips(browser)
    assert first is None  # nothing is before it
    assert [nats for _, nats in others] == pytest.approx(expected.tolist(), abs=1e-4)
    assert "".join(text for text, _ in chips(browser)) == LONG
    check_total(browser, tokenizer, LONG, expected)


def check_total(browser, tokenizer, text, nats):
    ids, total = tokenizer.encode(text), float(nats.sum())
    per_char = total / (len(text) - len(tokenizer.decode(ids[:1])))
    shown = browser.find_element("id", "total").text
    assert shown.startswith(f"{len(ids)} tokens, ") and shown.endswith(" nats per character, without the first token")
    assert [float(number) for number in re.findall(r"\d+\.\d+", shown)] == pytest.approx([total, per_char], abs=2e-3)


def test_characters_of_several_bytes_count_once(tokenizers, opened, browser):
    net, tokenizer = opened("rotary", *network("rotary", tokenizers))
    text = "ab \N{GRINNING FACE}\N{GRINNING FACE} é"
    assert typed(browser, text) == "Ready."
    ids = tokenizer.encode(text)
    nats = -logits_of(net, ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    check_total(browser, tokenizer, text, nats)
    assert "‹F0›" in [text for text, _ in chips(browser)]


@pytest.mark.parametrize("name", ["rotary", "table"])
def test_alternatives_and_next_token_before_and_after_the_sliders(name, tokenizers, opened, browser):
    net, tokenizer = opened(name, *network(name, tokenizers))
    settings = {"temperature": 0.7, "top_k": 8, "top_p": 0.9, "min_p": 0.02}
    change(browser, **settings)
    assert typed(browser, LONG) == "Ready."
    ids = tokenizer.encode(LONG)
    logits = logits_of(net, ids)
    with torch.no_grad():
        logits[-1] = net(torch.tensor([ids[-BLOCK:]]))[0, -1]  # what the next token is drawn from
    chip = browser.find_elements("css selector", ".chip")[10]
    js(browser, "arguments[0].scrollIntoView({block: 'center'})", chip)
    selenium.ActionChains(browser).move_to_element(chip).perform()  # hovering selects
    wait_for(lambda: len(bars(browser, "instead-bars")) == 10)
    for list_, row in (("instead-bars", 9), ("next-bars", -1)):
        before, after = logits[row].softmax(-1), filter_logits(logits[row][None], Sampling(**settings))[0].softmax(-1)
        shown = bars(browser, list_)
        likeliest = before.topk(10).indices.tolist()
        assert [int(index) for index, _, _ in shown][:9] == likeliest[:9]
        for index, theirs, theirs_after in shown:
            assert (theirs, theirs_after) == pytest.approx(
                (before[int(index)].item(), after[int(index)].item()), abs=1e-4
            )
    change(browser, temperature=0)
    assert [after for _, _, after in bars(browser, "next-bars")] == [1] + [0] * 9


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_probabilities_are_those_of_lmlight_for_any_settings(tokenizers, opened, browser):
    opened("table", *network("table", tokenizers))
    torch.manual_seed(0)
    settings = [
        {"temperature": t, "top_k": k, "top_p": p, "min_p": m}
        for t in (0.3, 1.0, 1.7) for k in (0, 1, 7) for p in (0.2, 0.95, 1.0) for m in (0.0, 0.1)
    ]  # fmt: skip
    logits = 3 * torch.randn(len(settings), 50)
    theirs = from_module(
        browser,
        "return given[0].map((settings, at) => [...lmlight.probabilities(Float32Array.from(given[1][at]), settings)])",
        settings,
        logits.tolist(),
    )
    for setting, row, found in zip(settings, logits, theirs):
        sampling = Sampling(**{name: value or None if name == "top_k" else value for name, value in setting.items()})
        assert found == pytest.approx(filter_logits(row[None], sampling)[0].softmax(-1).tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["rotary", "learned", "grouped"])
def test_attention_of_every_layer_and_head(name, tokenizers, opened, browser):
    net, tokenizer = opened(name, *network(name, tokenizers))
    text = LONG[: LONG.index("sky") + 3]
    ids = tokenizer.encode(text)[-BLOCK:]
    assert typed(browser, tokenizer.decode(ids)) == "Ready."
    ids = tokenizer.encode(tokenizer.decode(ids))
    with torch.no_grad():
        maps = net.attention_maps(torch.tensor([ids]))[:, 0]  # (L, H, T, T)
    browser.find_element("id", "view").send_keys(Keys.END)
    query = len(ids) - 1
    lines = """return [...document.querySelectorAll("#lines path")]
        .map(({ dataset }) => [dataset.key, dataset.weight].map(Number))"""
    for layer in range(maps.size(0)):
        for head in ("mean", *range(maps.size(1))):
            change(browser, layer=layer, head=head)
            row = maps[layer, :, query].mean(0) if head == "mean" else maps[layer, head, query]
            expected = {key: float(row[key]) for key in range(query + 1) if row[key] >= 0.0101}
            time.sleep(0.05)
            assert expected.keys() <= {int(key) for key, _ in js(browser, lines)}
            for key, weight in js(browser, lines):
                assert weight == pytest.approx(float(row[int(key)]), abs=1e-4)
    found = from_module(
        browser,
        """const file = await (await fetch("model.onnx")).arrayBuffer();
        const model = await lmlight.Model.open(new Uint8Array(file), ["wasm"]);
        return [...(await model.attention(given[0])).weights];""",
        ids,
    )
    assert found == pytest.approx(maps.flatten().tolist(), abs=1e-4)
    browser.find_element("id", "map").click()
    assert "attends to" in browser.find_element("id", "weight").text


@pytest.mark.parametrize("name", ["table", "own"])
def test_networks_without_attention_have_no_attention_view(name, tokenizers, opened, browser):
    opened(name, *network(name, tokenizers))
    assert not browser.find_element("id", "attention").is_displayed()
    assert bars(browser, "next-bars")


def test_one_token_at_a_time_writes_the_same_text(tokenizers, opened, browser):
    opened("rotary", *network("rotary", tokenizers))
    whole = generated(browser, "MIRA:", temperature=1, tokens=6, seed=3)
    assert typed(browser, "MIRA:") == "Ready."
    for _ in range(6):
        text = clicked(browser, "one")
    assert text == f"MIRA:{whole}"
    assert len(chips(browser)) > 6 and all(nats is not None for _, nats in chips(browser)[1:])


def test_seed_and_temperature_are_used(tokenizers, opened, browser):
    opened("rotary", *network("rotary", tokenizers))
    one, again, other, colder = (
        generated(browser, "MIRA:", tokens=20, seed=seed, temperature=temperature)
        for seed, temperature in ((1, 1), (1, 1), (2, 1), (1, 0.05))
    )
    assert one == again
    assert len({one, other, colder}) == 3
    counts = from_module(
        browser,
        """const random = lmlight.randomNumbers(7), counts = [0, 0, 0, 0];
        const weights = lmlight.probabilities(new Float32Array([0, 2, -99, 1]), { temperature: 2 });
        for (let n = 0; n < 20000; n++) counts[lmlight.draw(weights, random())]++;
        return counts;""",
    )
    weights = [1, 2.718282, 0, 1.648721]  # exp(logit / 2)
    assert counts[2] == 0
    assert [n / 20000 for n in counts] == pytest.approx([w / sum(weights) for w in weights], abs=0.015)


def test_text_that_was_just_typed_is_continued(tokenizers, opened, browser):
    opened("rotary", *network("rotary", tokenizers))
    expected = generated(browser, "river", temperature=0, tokens=5)
    generated(browser, "MIRA:", temperature=0, tokens=5)
    js(
        browser,
        """const text = document.getElementById("text");
        text.value = "river";
        text.dispatchEvent(new Event("input"));
        document.getElementById("status").textContent = "Clicked";
        document.getElementById("generate").click();""",
    )
    status(browser, "Done")
    assert js(browser, "return document.getElementById('text').value") == f"river{expected}"


def test_tokens_can_be_selected_while_text_is_generated(tokenizers, opened, browser):
    opened("rotary", *network("rotary", tokenizers))
    expected = generated(browser, "MIRA:", temperature=0, tokens=60)
    assert typed(browser, "MIRA:") == "Ready."
    js(
        browser,
        """document.getElementById("status").textContent = "Clicked";
        document.getElementById("generate").click();
        window.selecting = setInterval(() => {
          const chips = document.querySelectorAll(".chip");
          chips[Math.floor(Math.random() * chips.length)].click();
        }, 5);""",
    )
    status(browser, "Done")
    js(browser, "clearInterval(selecting)")
    assert js(browser, "return document.getElementById('text').value") == f"MIRA:{expected}"


def test_settings_of_the_model_are_the_first_ones(tokenizers, opened, browser):
    net, tokenizer = network("rotary", tokenizers)
    settings = {"temperature": 0.87, "top_k": 120, "top_p": 0.995, "min_p": 0.005}
    opened("settings", net, tokenizer, max_new_tokens=37, **settings)
    logits = logits_of(net, tokenizer.bos_ids)[-1:]
    expected = filter_logits(logits, Sampling(**settings))[0].softmax(-1)
    for index, _, after in bars(browser, "next-bars"):
        assert after == pytest.approx(expected[int(index)].item(), abs=1e-5)
    assert js(browser, "return document.getElementById('tokens').value") == "37"
    assert browser.find_element("css selector", "output[for=temperature]").text == "0.87"


def test_seed_cannot_change_while_text_is_generated(tokenizers, opened, browser):
    opened("rotary", *network("rotary", tokenizers))
    change(browser, tokens=100_000, temperature=1)
    browser.find_element("id", "generate").click()
    wait_for(lambda: len(chips(browser)) > 5)
    assert not browser.find_element("id", "seed").is_enabled()
    assert js(browser, "return document.activeElement.id") == "stop"
    browser.find_element("id", "stop").click()
    status(browser, "Stopped")
    assert js(browser, "return document.activeElement.id") == "generate"


def test_click_keeps_a_token_selected(tokenizers, opened, browser):
    opened("rotary", *network("rotary", tokenizers))
    assert typed(browser, "MIRA:\nriver stone") == "Ready."
    chip = browser.find_elements("css selector", ".chip")
    selected = "return document.getElementById('view').getAttribute('aria-activedescendant')"
    chip[2].click()
    selenium.ActionChains(browser).move_to_element(chip[4]).perform()
    assert js(browser, selected) == "token-2"
    chip[2].click()
    assert js(browser, selected) is None


def test_line_endings_are_those_of_the_training_text(corpus_text, opened, browser):
    tokenizer = TokenizerConfig("unigram", 400).train(corpus_text.replace("\n", "\r\n"))
    assert tokenizer.newline == "\r\n"
    net, _ = opened("crlf", make(tokenizer, {}, BLOCK), tokenizer)
    prompt, sampling = "MIRA: the\nriver", Sampling(max_new_tokens=10, temperature=0)
    (stream,) = start_streams(tokenizer, [prompt], sampling)
    ours = "".join(piece for _, piece in generate_text(net, [stream], sampling))
    assert generated(browser, prompt, temperature=0, tokens=10) == ours.replace("\r\n", "\n").rstrip("\ufffd")
    assert len(chips(browser)) == len(stream.ids) + len(stream.tokens)
    ids = tokenizer.encode(text := "MIRA: the\r\nriver\r\nflows")
    assert typed(browser, text.replace("\r\n", "\n")) == "Ready."
    nats = -logits_of(net, ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    check_total(browser, tokenizer, text, nats)


def test_a_line_break_in_the_last_fifth_ends_the_text(opened, browser):
    tokenizer = CharTokenizer("abcdef\n")
    net = Bigram(tokenizer.vocab_size, BLOCK)
    net.table.weight.data = 9 * torch.eye(7).roll(1, 1)  # the letters in order, and again
    opened("lines", net, tokenizer, end_at_line=True)
    for tokens in (10, 30, 40, 41, 42):
        (stream,) = start_streams(
            tokenizer, ["ab"], sampling := Sampling(max_new_tokens=tokens, temperature=0, end_at_line=True)
        )
        ours = "".join(piece for _, piece in generate_text(net, [stream], sampling))
        assert generated(browser, "ab", temperature=0, tokens=tokens) == ours


def test_stop_keeps_what_is_written(tokenizers, opened, browser):
    opened("rotary", *network("rotary", tokenizers))
    change(browser, tokens=100_000, temperature=1)
    assert typed(browser, "MIRA:") == "Ready."
    browser.find_element("id", "generate").click()
    wait_for(lambda: len(chips(browser)) > 20)
    browser.find_element("id", "stop").click()
    assert re.fullmatch(r"Stopped: \d+ tokens, \d+ per second", status(browser, "Stopped"))
    written = js(browser, "return document.getElementById('text').value")
    assert written.startswith("MIRA:") and len(written) > 20
    assert browser.find_element("id", "generate").is_enabled()


def test_undo_brings_earlier_texts_back(tokenizers, opened, browser):
    opened("rotary", *network("rotary", tokenizers))
    text, undo = "return document.getElementById('text').value", browser.find_element("id", "undo")
    assert not undo.is_enabled()
    assert typed(browser, "MIRA:") == "Ready."
    written = clicked(browser, "one")
    change(browser, text="not read yet")
    for expected in (written, "MIRA:", ""):
        js(browser, "document.getElementById('status').textContent = 'Clicked'")
        undo.click()
        assert status(browser, "Ready") == "Ready."
        assert js(browser, text) == expected
    assert not undo.is_enabled()
    assert chips(browser) == []


def test_nothing_moves_while_text_is_generated(tokenizers, opened, browser):
    opened("rotary", *network("rotary", tokenizers))
    js(
        browser,
        """window.shifts = [];
        new PerformanceObserver((list) => shifts.push(...list.getEntries().map((entry) => entry.value)))
        .observe({ type: "layout-shift", buffered: false });""",
    )
    generated(browser, "MIRA:", tokens=150, temperature=1)
    assert sum(js(browser, "return shifts")) < 0.001


def test_keyboard_selects_tokens(tokenizers, opened, browser):
    opened("rotary", *network("rotary", tokenizers))
    assert typed(browser, "MIRA:\nriver stone") == "Ready."
    view, title = browser.find_element("id", "view"), browser.find_element("id", "instead-title")
    view.send_keys(Keys.HOME)
    wait_for(lambda: "not scored" in title.text)
    view.send_keys(Keys.ARROW_RIGHT)
    wait_for(lambda: "nats" in title.text)
    assert view.get_attribute("aria-activedescendant") == "token-1"
    view.send_keys(Keys.ESCAPE)
    wait_for(lambda: title.text == "Selected token")
    browser.find_element("id", "text").send_keys(Keys.CONTROL, Keys.ENTER)
    status(browser, "Done")


def test_text_fits_on_a_phone_and_in_the_dark(tokenizers, opened, browser):
    opened("rotary", *network("rotary", tokenizers))
    light = js(browser, "return getComputedStyle(document.body).backgroundColor")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    try:
        assert js(browser, "return document.documentElement.scrollWidth") == 360
        assert js(browser, "return getComputedStyle(document.body).backgroundColor") != light
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_same_for_any_text(kind, tokenizers, corpus_text, opened, browser):
    _, tokenizer = opened(f"ids-{kind}", Bigram(tokenizers[kind].vocab_size, BLOCK), tokenizers[kind])
    texts = [corpus_text, *UNUSUAL, *random_texts(200)]
    found = from_module(
        browser,
        """const file = await (await fetch("model.onnx")).arrayBuffer();
        const model = await lmlight.Model.open(new Uint8Array(file), ["wasm"]);
        return given[0].map((text) => {
          try { const ids = model.encode(text); return [ids, model.decode(ids)]; } catch (error) { return error.message; }
        });""",
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


def test_unknown_character_is_named(tokenizers, opened, browser):
    opened("ids-char", Bigram(tokenizers["char"].vocab_size, BLOCK), tokenizers["char"])
    assert typed(browser, "日") == "the model does not know '日'"
    assert typed(browser, "MIRA") == "Ready."


def test_end_of_text_ends_the_text(opened, browser):
    tokenizer = CharTokenizer("abc", add_eos=True)
    net = Bigram(tokenizer.vocab_size, BLOCK)
    net.table.weight.data.zero_()
    for index, follows in ((3, 0), (0, 1), (1, 2), (2, 3)):
        net.table.weight.data[index, follows] = 9.0
    opened("document", net, tokenizer)
    assert generated(browser, "", temperature=0, tokens=50) == "abc"


def test_page_uses_its_own_server_only(tokenizers, opened, site, browser):
    opened("rotary", *network("rotary", tokenizers))
    names = js(browser, "return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(names) >= 6
    assert all(name.startswith(site) for name in names), names
    blocked = """const done = arguments[0];
        document.addEventListener("securitypolicyviolation", (event) => done(event.violatedDirective));
        fetch("https://example.com").then(() => done("fetched"), () => setTimeout(() => done("failed"), 500));"""
    assert browser.execute_async_script(blocked) == "connect-src"
    links = js(browser, "return [...document.querySelectorAll('a')].map((link) => link.href)")
    for link in links:
        assert (
            js(
                browser,
                "const r = new XMLHttpRequest(); r.open('HEAD', arguments[0], false); r.send(); return r.status",
                link,
            )
            == 200
        )
