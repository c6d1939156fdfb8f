"""Text streams: text that can be shown while it is generated.

- A stream holds back incomplete characters, and text that may be the start of a stop string. Its pieces, joined, are the
  text.
- Streams generated together give the same texts as when they are generated one by one.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from lmlight.data.tokenizer import CONTROL_CHARACTERS, Tokenizer
from lmlight.generation.decoder import generate_ids
from lmlight.generation.sampling import Sampling
from lmlight.models import Net

LINE_END = re.compile(r"(?<=[^:\s])\r?\n")  # a colon introduces the next line


class StreamingDecoder:
    """Decodes ids one by one. Joined, the texts that it returns are `tokenizer.decode` of all ids.

    The bytes of a character are held back until it is complete or known to be invalid.

    Args:
        tokenizer: decodes.
        prefix: the ids before the first one. A lossy tokenizer drops a space at the beginning of a text.
    """

    def __init__(self, tokenizer: Tokenizer, prefix: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = list(prefix)  # the last ids that gave text
        self._pending: list[int] = []

    def push(self, index: int) -> str:
        """Add an id; return the text that it completes."""
        self._pending.append(index)
        text = self._text()
        return "" if text.endswith("\ufffd") else self._release(text)

    def flush(self) -> str:
        """The text that was held back."""
        return self._release(self._text())

    def _release(self, text: str) -> str:
        # as the only context, ids without text would make the tokenizer drop the next space
        alone = self._tokenizer.decode(self._pending)
        self._context = self._pending if text and alone else self._context + self._pending
        self._pending = []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]


class TextStream:
    """A text that is being generated.

    Args:
        tokenizer: encodes the prompt and decodes the new tokens.
        prompt: text to continue, encoded with the line endings of the training text (`Tokenizer.encode_prompt`). An empty
            one starts a document if the tokenizer has an EOS token, else a line.
        sampling: says where the text ends.
        seed: random seed of this text.

    Attributes:
        prompt: as given.
        seed: as given.
        ids: token ids of the prompt.
        text: the generated text, without the prompt and without the stop string or line break that ended it.
        tokens: the generated ids, up to the one that ended the text.
        logprobs: log-probability of each token, in nats, before any logits processor; empty unless requested.
        finish_reason: `length`, or `stop` at a stop string, a line break or the end of a document; None while generating.

    Raises:
        UserError: the prompt has a character that the tokenizer does not know.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, sampling: Sampling, seed: int) -> None:
        self.prompt, self.seed = prompt, seed
        self._eos_id = tokenizer.eos_id
        self.ids = tokenizer.encode_prompt(prompt) or tokenizer.bos_ids
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: Literal["length", "stop"] | None = None
        self._stop = [re.sub("\r?\n", newline, text) for text in sampling.stop for newline in ("\n", "\r\n")]
        self._last_lines_from = math.ceil(0.8 * sampling.max_new_tokens) if sampling.end_at_line else math.inf
        self._held = ""  # may be the start of a stop string
        self._n_early = 0  # line breaks within the first `_n_early` characters of `text` + `_held` do not end the text
        self._decoder = StreamingDecoder(tokenizer, self.ids if prompt else ())

    def push(self, index: int) -> str:
        """Add a token; return the text that is now final."""
        self.tokens.append(index)
        text = self._release(self._decoder.push(index))
        if index == self._eos_id and self.finish_reason is None:
            text += self.end("stop")
        return text

    def end(self, reason: Literal["length", "stop"] = "length") -> str:
        """Finish without further tokens; return the rest of the text."""
        text = self._release(self._decoder.flush())
        if self.finish_reason is None:  # no stop string in the rest
            self.finish_reason = reason
            self.text += self._held
            text += self._held
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        in_last_lines = len(self.tokens) > self._last_lines_from
        if not in_last_lines:
            self._n_early = len(self.text) + len(text)
        before = self.text[-1:]
        start = len(before) + max(0, self._n_early - len(self.text))
        if in_last_lines and (line_end := LINE_END.search(before + text, start)):
            found.append(line_end.start() - len(before))
        if found:
            text, self.finish_reason = text[: min(found)], "stop"
        else:
            held = max((_overlap(text, stop) for stop in self._stop), default=0)
            held = max(held, in_last_lines and text.endswith("\r"))
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of `text` that may be the start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def start_streams(tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling) -> list[TextStream]:
    """Create the streams for `generate_text`: `sampling.num_samples` for each prompt, in the order of the prompts."""
    return [
        TextStream(tokenizer, prompt, sampling, sampling.seed + sample)
        for prompt in prompts
        for sample in range(sampling.num_samples)
    ]


def generate_text(
    net: Net, streams: Sequence[TextStream], sampling: Sampling, logprobs: bool = False
) -> Iterator[tuple[TextStream, str]]:
    """Generate the texts of all streams side by side.

    Args:
        net: used in its current mode: call `eval()` first, or dropout is active.
        streams: from `start_streams`; all are finished at the end.
        sampling: filters and lengths.
        logprobs: record the log-probability of each token.

    Yields:
        a stream and its next piece of text; the pieces of a stream, joined, are its `text`.
    """
    if not streams:
        return
    seeds = [stream.seed for stream in streams]
    for step in generate_ids(net, [stream.ids for stream in streams], sampling, seeds):
        if logprobs:
            ids = torch.tensor(step.ids, device=step.logits.device)[:, None]
            scores: list[float] = step.logits.log_softmax(-1).gather(1, ids)[:, 0].tolist()
        for row, stream in enumerate(streams):
            if stream.finish_reason is None:
                if logprobs:
                    stream.logprobs.append(scores[row])
                if piece := stream.push(step.ids[row]):
                    yield stream, piece
        if all(stream.finish_reason for stream in streams):
            return
    for stream in streams:
        if stream.finish_reason is None and (piece := stream.end()):
            yield stream, piece


def escape_control_characters(text: str, after: str = "") -> str:
    """Make text safe to print: control characters, which could move the cursor, become escapes such as `\\x1b`.

    Args:
        text: line endings become `\\n`; tabs are kept.
        after: the text printed before, if text comes in pieces: a `\\r\\n` split between two is one line break.
    """
    if after.endswith("\r"):
        text = text.removeprefix("\n")
    lines = re.sub("\r\n?", "\n", text)
    return CONTROL_CHARACTERS.sub(lambda match: ascii(match[0])[1:-1], lines)
