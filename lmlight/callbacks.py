"""What watches a run: its folder and TensorBoard files, its progress on the terminal, the verse it writes meanwhile."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from lmlight.errors import UserError
from lmlight.generation import TextStream, printable
from lmlight.module import LanguageModel


class RunLogger(TensorBoardLogger):
    """TensorBoard files in a folder that no other run has: `runs/2025-01-31_12-00-00`, with `-2` and so on if taken.

    Args:
        save_dir: the folder of all runs.
        version: the name of this run's; null makes one from the time.
        purge_step: hide what the folder's earlier files say of this step and later ones: a resumed run says it again.
    """

    def __init__(self, save_dir: str = "runs", version: str | None = None, purge_step: int | None = None) -> None:
        super().__init__(save_dir, name="", version=version, default_hp_metric=False, purge_step=purge_step)

    def _get_next_version(self) -> str:  # type: ignore[override]
        """Takes a name by making its folder, which only one of two processes can."""
        name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        if getattr(rank_zero_only, "rank", 0) != 0:
            return name  # rank 0's is what counts
        runs = Path(self.root_dir)
        runs.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            version = name if number == 1 else f"{name}-{number}"
            try:
                (runs / version).mkdir()
                return version
            except FileExistsError:
                number += 1

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status == "failed":  # a run that failed before it began leaves no folder: `rmdir` takes empty ones alone
            with suppress(OSError):
                Path(self.log_dir).rmdir()
                Path(self.root_dir).rmdir()


class RunProgress(ProgressBar):
    """One bar for the whole run, and one line for each validation; without a terminal, the lines alone."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """A line above the bar."""
        if self._enabled:
            with tqdm.external_write_mode(file=sys.stdout):
                print(*args, **kwargs, flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        weights = sum(p.numel() for p in pl_module.parameters())
        self.print(f"Training {weights:,} weights on {trainer.strategy.root_device} in {trainer.log_dir}")
        if self._enabled and sys.stderr.isatty():
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._bar = tqdm(total=total, initial=trainer.global_step, unit="step", dynamic_ncols=True, leave=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # `refresh` goes to the terminal; `n` is for free, and the bar need not move more often than the figures do
        if self._bar is not None and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._bar.set_postfix(_figures(trainer), refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        figures = "  ".join(f"{name} {value}" for name, value in _figures(trainer).items())
        seconds = time.monotonic() - self._began
        of = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        self.print(f"step {trainer.global_step:>5}{of}  {figures}  {seconds:.0f} s")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _figures(trainer: Trainer) -> dict[str, str]:
    return {
        name: f"{trainer.callback_metrics[name]:.4f}"
        for name in ("train/loss", "val/loss", "val/nats_per_char")
        if name in trainer.callback_metrics
    }


class SampleText(Callback):
    """Writes a text sample to TensorBoard at each validation, always from the same prompt and seed.

    Args:
        prompt: what it continues.
        max_new_tokens: how far.
    """

    def __init__(self, prompt: str = "", max_new_tokens: int = 100) -> None:
        self.prompt, self.max_new_tokens = prompt, max_new_tokens

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or not isinstance(trainer.logger, TensorBoardLogger):
            return
        assert isinstance(pl_module, LanguageModel)
        # on every rank, for the weights may be spread over them
        text = pl_module.generate(self.prompt, max_new_tokens=self.max_new_tokens)
        # four spaces: Markdown for "as it is", line breaks and all
        markdown = "\n".join("    " + line for line in text.split("\n"))
        trainer.logger.experiment.add_text("sample", markdown, trainer.global_step)


class WritePredictions(Callback):
    """Prints what `predict` writes, as it comes, with a line between one text and the next; or files it as JSON Lines.

    Texts are in the order of their prompts, whichever process wrote them. The file appears when all are there.

    Args:
        output: a JSON Lines file, with `prompt`, `completion`, `tokens`, `logprobs`, `seed` and `finished` of each text;
            None prints.

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
            self._live = stream
            print(printable(stream.prompt), end="")
        if stream is self._live:
            print(printable(piece), end="", flush=True)

    def _print(self, streams: list[TextStream], begun: bool) -> None:
        if begun:
            print(flush=True)
        for index, stream in enumerate(streams):
            if begun or index:
                print("-" * 40)
            print(printable(stream.prompt + stream.text), flush=True)

    def _publish(self, streams: list[TextStream]) -> None:
        if self._output is None:
            self._print(streams, begun=False)
            return
        beside = self._output.with_name(f".{self._output.name}.part")
        try:
            with beside.open("w", encoding="utf-8", newline="\n") as file:
                for stream in streams:
                    file.write(json.dumps(_record(stream), ensure_ascii=False) + "\n")
            beside.replace(self._output)
        except OSError as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise UserError(
                f"output '{self._output}' cannot be written ({error.strerror}): pass another place"
            ) from None
        print(f"{len(streams):,} texts in {self._output}")


def _record(stream: TextStream) -> dict[str, Any]:
    names = ("tokens", "logprobs", "seed", "finished")
    return {"prompt": stream.prompt, "completion": stream.text, **{name: getattr(stream, name) for name in names}}
