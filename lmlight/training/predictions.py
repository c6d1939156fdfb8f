"""The output of `predict`: texts as they are generated, or a JSON Lines file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from lmlight import files
from lmlight.command_line import counted
from lmlight.errors import UserError, reason
from lmlight.generation import TextStream, escape_control_characters
from lmlight.training.module import LanguageModel


class WritePredictions(Callback):
    """Prints the texts of `predict`, batch by batch and with a line between them; or writes them to a JSON Lines file.

    Texts are in the order of their prompts. With several processes, rank 0 prints or writes them at the end.

    Args:
        output: JSON Lines file, with `prompt`, `completion`, `tokens`, `logprobs`, `seed` and `finish_reason` of each text;
            None prints. The file must not exist, but its folder must.
    """

    def __init__(self, output: str | None = None) -> None:
        self._output = Path(output).expanduser() if output else None
        if self._output is not None and self._output.exists():
            raise UserError(f"output '{output}' already exists: pass another name, or remove it")
        if self._output is not None and not self._output.parent.is_dir():
            raise UserError(f"the folder of output '{output}' does not exist: create '{self._output.parent}' first")
        self._batches: list[tuple[int, list[TextStream]]] = []  # with their place in the order of the prompts
        self._separator = ""  # printed before each text but the first

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._prints_batches = self._output is None and trainer.world_size == 1
        pl_module.logprobs = self._output is not None
        # None hides the bar unless stderr is a terminal
        hidden = True if self._prints_batches or not trainer.is_global_zero else None
        self._bar = tqdm(total=sum(map(int, trainer.num_predict_batches)), unit="batch", disable=hidden)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._prints_batches:
            self._print(outputs)
        else:
            self._batches.append((batch_idx * trainer.world_size + trainer.global_rank, outputs))
            self._bar.update()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()
        gathered = [self._batches]
        if trainer.world_size > 1:
            gathered = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(gathered, self._batches)
        if trainer.is_global_zero:
            batches = sorted((batch for rank in gathered for batch in rank), key=lambda batch: batch[0])
            streams = [stream for _, batch in batches for stream in batch]
            if self._output is None:
                self._print(streams)
            else:
                self._write(streams, self._output)

    def _print(self, streams: Sequence[TextStream]) -> None:
        for stream in streams:
            print(self._separator + escape_control_characters(stream.prompt + stream.text), flush=True)
            self._separator = "-" * 40 + "\n"

    def _write(self, streams: Sequence[TextStream], output: Path) -> None:
        try:
            with files.whole(output) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
                for stream in streams:
                    record = {"prompt": stream.prompt, "completion": stream.text}
                    record |= {name: getattr(stream, name) for name in ("tokens", "logprobs", "seed", "finish_reason")}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"output '{output}' cannot be written ({reason(error)}): pass another path") from None
        print(f"Wrote {counted(len(streams), 'text')} to {output}")
