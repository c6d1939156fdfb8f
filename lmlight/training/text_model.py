"""The part of `LanguageModel` that is not about training: its network and tokenizer, scoring and generation."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, overload

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from lmlight import checkpoint as checkpoints
from lmlight.data.loader import IGNORE_INDEX, Batch, as_batch
from lmlight.data.tokenizer import Tokenizer
from lmlight.errors import UserError
from lmlight.generation import Sampling, TextStream, generate, generate_text, start_streams
from lmlight.models import Net
from lmlight.training.checkpointing import EXTRA_STATE
from lmlight.training.metrics import TextLoss

NO_NETWORK = (
    "this model has no network and no tokenizer yet: train it with a Trainer, or use LanguageModel.load_from_checkpoint"
)


class TextModel(LightningModule):
    """Base class of `LanguageModel`."""

    def __init__(self, sampling: Sampling) -> None:
        super().__init__()
        self.sampling = sampling
        self.logprobs = False
        self.tokenizer: Tokenizer | None = None
        self.vocab_size: int | None = None
        self.block_size: int | None = None
        self.net: Net | None = None
        self.val_loss, self.test_loss, self.sliding_loss = TextLoss(), TextLoss(), TextLoss()
        self._validation: tuple[int, dict[str, Tensor]] | None = None  # step and metrics of the last one
        self.register_load_state_dict_pre_hook(_allow_missing_extra_state)  # type: ignore[no-untyped-call]  # torch's

    def forward(self, idx: Tensor) -> Tensor:
        """Map ids (B, T), T at most `block_size`, to logits (B, T, V)."""
        net = self._net()
        if idx.size(1) > net.block_size:
            raise UserError(
                f"forward takes at most block_size = {net.block_size} tokens, got {idx.size(1)}: pass idx[:, -block_size:]"
            )
        return net(idx)

    def score(self, batch: Batch, metric: TextLoss) -> Tensor:
        """Add a batch to a metric; returns (B, T) nats per token, 0 where not scored."""
        batch = self.check_batch(batch)
        logits = self(batch.inputs).flatten(0, 1).float()  # (B * T, V)
        losses = F.cross_entropy(logits, batch.targets.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
        losses = losses.view_as(batch.targets)
        metric.update(losses, batch.targets, batch.target_chars)
        return losses

    def check_batch(self, batch: Any) -> Batch:
        """Make a `Batch` from user-defined data (see `as_batch`), and check it.

        Raises:
            UserError: It is not a pair of id tensors, exceeds `block_size`, or, on a CPU, has ids outside the vocabulary.
        """
        batch, net = as_batch(batch), self._net()
        if (length := batch.inputs.size(1)) > net.block_size:
            raise UserError(f"a batch has windows of {length} tokens, but block_size is {net.block_size}: shorten them")
        if batch.inputs.device.type == "cpu":  # elsewhere, this would wait for the device
            ids = torch.cat((batch.inputs.flatten(), batch.targets[batch.targets != IGNORE_INDEX]))
            if len(wrong := ids[(ids < 0) | (ids >= net.vocab_size)]):
                raise UserError(
                    f"a batch has the id {wrong[0]}, but ids must be from 0 to vocab_size - 1 = {net.vocab_size - 1}"
                )
        return batch

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Score a batch; returns (B, T) nats per token, for callbacks."""
        return self.score(batch, self.val_loss)

    def on_validation_epoch_end(self) -> None:
        self._validation = self.global_step, self._report("val", self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.score(batch, self.sliding_loss if dataloader_idx else self.test_loss)

    def on_test_epoch_end(self) -> None:
        self._report("test", self.test_loss)
        if self.sliding_loss.update_called:  # False if there is only one loader
            self._report("test_sliding", self.sliding_loss)

    def _report(self, stage: str, metric: TextLoss) -> dict[str, Tensor]:
        metrics = {f"{stage}/{name}": value.float() for name, value in metric.compute().items()}
        self.log_dict(metrics)
        metric.reset()
        return metrics

    def stream(self, prompt: str = "", **changes: Any) -> Iterator[str]:
        """Continue a text, yielding pieces as they are generated; joined, they are the continuation that `generate` adds.

        Args and errors: see `generate`.
        """
        if changes.setdefault("num_samples", 1) != 1:
            raise UserError(f"num_samples={changes['num_samples']} needs a list of prompts: pass the prompt in a list")
        sampling = replace(self.sampling, **changes)
        streams = start_streams(self._tokenizer(), [prompt], sampling)
        return (piece for _, piece in self._generate(streams, sampling, logprobs=False))

    @overload
    def generate(self, prompt: str, **changes: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], **changes: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: Tensor, **changes: Any) -> Tensor: ...
    def generate(self, prompt: str | list[str] | Tensor = "", **changes: Any) -> str | list[str] | Tensor:
        """Continue a prompt.

        Args:
            prompt: A text; a list of texts of any lengths, continued independently; or (B, T) ids. For an empty text, see
                `TextStream`.
            changes: Fields of `self.sampling` to change for this call, such as `temperature`, `top_k` or `seed`.

        Returns:
            The prompt with its continuation, of the same type. For a list, `num_samples` texts per prompt.
            For ids, `num_samples`, `stop` and `end_at_line` are ignored.

        Raises:
            UserError: A value is out of range; the tokenizer has no piece for a character; `num_samples` with a single text.
        """
        if isinstance(prompt, str):
            return prompt + "".join(self.stream(prompt, **changes))
        sampling = replace(self.sampling, **changes)
        if isinstance(prompt, Tensor):
            with self._evaluating():
                return generate(self._net(), prompt.to(self.device), sampling)
        return [stream.prompt + stream.text for stream in self._complete(prompt, sampling)]

    def predict_step(self, batch: Sequence[str], batch_idx: int) -> list[TextStream]:
        """Continue a batch of prompts: `sampling.num_samples` texts per prompt, in the order of the prompts."""
        return self._complete(batch, self.sampling, self.logprobs)

    def get_extra_state(self) -> dict[str, Any]:
        """Metadata for loading a state dict into a model whose network has not been built.

        `ddp_spawn`, `ddp_fork` and `ddp_notebook` return the trained model to the calling process as a state dict.
        """
        return {} if self.net is None else checkpoints.model_metadata(self.net, self.tokenizer)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Build the network and tokenizer if there are none; torch loads the weights next."""
        if self.net is None and state:
            content = {checkpoints.METADATA_KEY: state}
            self.net, self.tokenizer = checkpoints.untrained_net_of(content), checkpoints.tokenizer_of(content)
            self.vocab_size, self.block_size = self.net.vocab_size, self.net.block_size

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:
            raise checkpoints.changed(type(self._net()), error) from error

    def _sizes(self) -> tuple[int, int]:
        """(vocab_size, block_size), from the data unless they are known."""
        if self.tokenizer is not None:
            self.vocab_size = self.tokenizer.vocab_size
        if self.vocab_size is None or self.block_size is None:
            try:
                data = getattr(self.trainer, "datamodule", None)
            except RuntimeError:  # there is no trainer
                raise UserError(NO_NETWORK) from None
            tokenizer = getattr(data, "tokenizer", None)
            if self.tokenizer is None and isinstance(tokenizer, Tokenizer):
                self.tokenizer = tokenizer
            self.vocab_size = getattr(self.tokenizer or data, "vocab_size", None)
            self.block_size = self.block_size or getattr(data, "block_size", None)
        if self.vocab_size is None or self.block_size is None:
            raise UserError(
                "the sizes of the network are not known: train with a data module that has block_size and tokenizer (or "
                "vocab_size), such as TextDataModule, or load a checkpoint (--ckpt_path) to predict"
            )
        return self.vocab_size, self.block_size

    def _complete(self, prompts: Sequence[str], sampling: Sampling, logprobs: bool = False) -> list[TextStream]:
        streams = start_streams(self._tokenizer(), prompts, sampling)
        deque(self._generate(streams, sampling, logprobs), maxlen=0)
        return streams

    def _generate(
        self, streams: list[TextStream], sampling: Sampling, logprobs: bool
    ) -> Iterator[tuple[TextStream, str]]:
        with self._evaluating():
            yield from generate_text(self._net(), streams, sampling, logprobs)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            self._net()  # before training, the network is missing too, and this raises first
            raise UserError("this model was trained without a tokenizer: call generate() in Python with token ids")
        return self.tokenizer

    def _net(self) -> Net:
        if self.net is None:
            raise UserError(NO_NETWORK)
        return self.net


def _allow_missing_extra_state(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """A checkpoint's `state_dict` holds weights only; its metadata is elsewhere in the file."""
    state_dict.setdefault(prefix + EXTRA_STATE, {})
