"""Texts that a model writes: samples at each validation of a run, and what `predict` was asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from lmlight import files
from lmlight.errors import UserError
from lmlight.generation import TextStream, escape_control_characters
from lmlight.training.callbacks.base import validates_fit
from lmlight.training.datamodule import TextDataModule
from lmlight.training.module import LanguageModel


class SampleText(Callback):
    """Writes texts to TensorBoard at each validation, always from the same prompts and seed: noise that turns into a play.

    Args:
        prompts: what they continue; an empty one starts from nothing. Null is that, and a line of the text's own.
        max_new_tokens: how far.
        temperature: see `Sampling`; null is the model's own.
    """

    def __init__(
        self, prompts: Sequence[str] | None = None, max_new_tokens: int = 64, temperature: float | None = None
    ) -> None:
        self.prompts, self.max_new_tokens, self.temperature = prompts, max_new_tokens, temperature

    # not `on_validation_end`: a callback that averages the weights has taken the average away by then
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not validates_fit(trainer) or not isinstance(trainer.logger, TensorBoardLogger):
            return
        assert isinstance(pl_module, LanguageModel)
        sampling = replace(pl_module.sampling, max_new_tokens=self.max_new_tokens, num_samples=1)
        if self.temperature is not None:
            sampling = replace(sampling, temperature=self.temperature)
        data = getattr(trainer, "datamodule", None)
        own = ["", data.sample_prompt] if isinstance(data, TextDataModule) and data.sample_prompt else [""]
        prompts = own if self.prompts is None else list(self.prompts)
        # on every rank, for the weights may be spread over them
        texts = pl_module.generate(prompts, **vars(sampling))
        for prompt, text in zip(prompts, texts):
            settings = f"temperature {sampling.temperature:g}, seed {sampling.seed}, step {trainer.global_step}"
            # four spaces: Markdown for "as it is", line breaks and all
            verse = "\n".join("    " + line for line in escape_control_characters(text).split("\n"))
            tag = f"verse/{' '.join(prompt.split()) or 'from nothing'}"
            trainer.logger.experiment.add_text(tag, f"{settings}\n\n{verse}", trainer.global_step)


class WritePredictions(Callback):
    """Prints what `predict` writes, as it comes, with a line between one text and the next; or files it as JSON Lines.

    Texts are in the order of their prompts, whichever process wrote them. The file appears when all are there.

    Args:
        output: a JSON Lines file with the `prompt`, `completion`, `tokens`, `logprobs`, `seed` and `finish_reason` of each
            text; None prints the texts.

    Raises:
        UserError: the file exists, or its folder does not.
    """

    def __init__(self, output: str | None = None) -> None:
        self._output = Path(output).expanduser() if output else None
        if self._output is not None and self._output.exists():
            raise UserError(f"output '{output}' exists already: pass another name, or remove it")
        if self._output is not None and not self._output.parent.is_dir():
            raise UserError(
                f"output '{output}' lies in a folder that does not exist: make '{self._output.parent}' first"
            )
        self._texts: list[tuple[int, list[TextStream]]] = []
        self._bar: tqdm[Any] | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._alone = self._output is None and trainer.world_size == 1
        pl_module.logprobs = self._output is not None
        if self._alone:
            pl_module.on_text = self._show
        elif trainer.is_global_zero:
            self._bar = tqdm(total=sum(map(int, trainer.num_predict_batches)), unit="batch", disable=None)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._live: TextStream | None = None
        if self._alone and batch_idx:
            print("-" * 40)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._alone:
            self._print([stream for stream in outputs if stream is not self._live], begun=self._live is not None)
        else:  # batches go round the processes
            self._texts.append((batch_idx * trainer.world_size + trainer.global_rank, outputs))
            if self._bar is not None:
                self._bar.update()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._alone:
            return
        gathered = [self._texts]
        if trainer.world_size > 1:
            gathered = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(gathered, self._texts)
        if self._bar is not None:
            self._bar.close()
        if trainer.is_global_zero:
            in_order = sorted((batch for part in gathered for batch in part), key=lambda batch: batch[0])
            self._publish([stream for _, streams in in_order for stream in streams])

    def _show(self, stream: TextStream, piece: str) -> None:
        """The first stream of a batch as it comes; the others, which are written beside it, follow."""
        if self._live is None:
            self._live, self._shown = stream, stream.prompt
            print(escape_control_characters(stream.prompt), end="")
        if stream is self._live:
            print(escape_control_characters(piece, after=self._shown), end="", flush=True)
            self._shown = piece

    def _print(self, streams: list[TextStream], begun: bool) -> None:
        if begun:
            print(flush=True)
        for index, stream in enumerate(streams):
            if begun or index:
                print("-" * 40)
            print(escape_control_characters(stream.prompt + stream.text), flush=True)

    def _publish(self, streams: list[TextStream]) -> None:
        if self._output is None:
            self._print(streams, begun=False)
            return
        try:
            with files.whole(self._output) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
                for stream in streams:
                    file.write(json.dumps(_record(stream), ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"output '{self._output}' cannot be written ({error.strerror}): pass another place"
            ) from None
        print(f"{len(streams):,} texts in {self._output}")


def _record(stream: TextStream) -> dict[str, Any]:
    names = ("tokens", "logprobs", "seed", "finish_reason")
    return {"prompt": stream.prompt, "completion": stream.text, **{name: getattr(stream, name) for name in names}}
