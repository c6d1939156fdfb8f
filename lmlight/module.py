"""LanguageModel: a net as Lightning trains it, and as it speaks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lmlight import checkpoint as checkpoints
from lmlight.data.tokenizer import Tokenizer
from lmlight.data.tokens import UNSCORED, Batch
from lmlight.errors import UserError
from lmlight.generation import Sampling, TextStream, begin, generate, write
from lmlight.metrics import TextLoss
from lmlight.models import Net, Transformer, chosen
from lmlight.optim import Muon, Schedule, label_in_order, parameter_groups
from lmlight.reliability import not_finite

NetCallable = Callable[[int, int], Net]
"""Makes a net from (vocab_size, block_size), the two sizes that the data decides."""


class LanguageModel(LightningModule):
    """Trains a net to predict the next token, evaluates it per character, and generates text with it.

    The net is made when the sizes that depend on the data are known: from the trainer's datamodule, or from a checkpoint.

    Args:
        net: what is trained; every size but the vocabulary's and the block's, which the data decides. As an attribute, None
            until it is made.
        optimizer: of the weights; its weight decay is applied to matrices only.
        schedule: the learning rate over the run.
        sampling: how `predict` and `generate` sample, where a call does not say otherwise.
        matmul_precision: of float32 matrix products while training, see `torch.set_float32_matmul_precision`. `medium` lets
            GPUs use their tensor cores, and CPUs oneDNN, which on some is twice as fast; `highest` is torch's own default.
        compile_net: `torch.compile` the net: its first steps take a minute or more, and a C++ compiler (on CPUs) or Triton
            must be there. It pays on GPUs, and not in a run of minutes.
        seed: with the step, all that dropout's random numbers depend on, so that a resumed run draws the same ones.

    Attributes:
        tokenizer: encodes prompts and decodes what comes; None until known.
        settings: plain values that travel in the checkpoint; the command line keeps its own here.
        init_from: what `checkpoint.read` gave: the net begins with its weights instead of random ones (finetuning).
        on_text: called by `predict_step` with a stream and its next piece of text.
        logprobs: whether `predict_step` notes each token's log-probability.
        step_loss: the training loss of the optimizer step, on this device.
        step_is_logged: whether the figures of the optimizer step reach the logs.
    """

    def __init__(
        self,
        net: NetCallable = lambda vocab_size, block_size: Transformer(vocab_size, block_size),
        optimizer: OptimizerCallable = lambda params: Muon(params, lr=6e-3, weight_decay=0.2),
        schedule: Schedule = Schedule(),
        sampling: Sampling = Sampling(),
        matmul_precision: Literal["highest", "high", "medium"] = "medium",
        compile_net: bool = False,
        seed: int = 1337,
    ) -> None:
        super().__init__()
        self.seed, self.matmul_precision, self.compile_net = seed, matmul_precision, compile_net
        self._make_net, self._make_optimizer = net, optimizer
        self.schedule, self.sampling = schedule, sampling
        self.tokenizer: Tokenizer | None = None
        self.block_size: int | None = None
        self.net: Net | None = None
        self.settings: dict[str, Any] = {}
        self.init_from: dict[str, Any] | None = None
        self.on_text: Callable[[TextStream, str], None] | None = None
        self.logprobs = False
        self.val_loss, self.test_loss, self.sliding_loss = TextLoss(), TextLoss(), TextLoss()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path) -> LanguageModel:  # type: ignore[override]
        """The model in a checkpoint file, on the CPU, ready to `generate`; nothing but the file is needed.

        Replaces Lightning's method of this name, which calls what the file names and can be talked into running code.

        Raises:
            UserError: see `checkpoint.read`.
        """
        content = checkpoints.read(checkpoint_path)
        net = checkpoints.net_of(content)
        model = cls(net=partial(type(net), **chosen(net.config)))
        model.net, model.tokenizer, model.block_size = net, checkpoints.tokenizer_of(content), net.block_size
        model.settings = content[checkpoints.KEY]["settings"]
        return model.eval()

    def check_net(self, block_size: int) -> None:
        """Whether the net's sizes fit each other, before anything is fetched or written.

        Raises:
            UserError: they do not.
        """
        with torch.device("meta"):  # shapes without numbers: no time, no memory
            self._make_net(1, block_size)

    # Lightning's hooks, in the order in which they are called

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if self.tokenizer is None:
            self.tokenizer = getattr(data, "tokenizer", None)
        if self.block_size is None:
            self.block_size = getattr(data, "block_size", None)
        if self.tokenizer is None or self.block_size is None:
            raise UserError(
                "the model has no tokenizer: train with a TextDataModule, or load a checkpoint (--ckpt_path) to predict"
            )
        if stage != "predict" and data is not None and data.block_size > self.block_size:
            raise UserError(
                f"data.block_size {data.block_size} is longer than the {self.block_size} tokens that this model takes: "
                "lower it"
            )

    def configure_model(self) -> None:
        if self.net is None:
            assert self.tokenizer is not None and self.block_size is not None
            self.net = self._make_net(self.tokenizer.vocab_size, self.block_size)
            if self.init_from is not None:
                checkpoints.check_same_net(self.init_from, self.net)
                self.net.load_state_dict(checkpoints.weights_of(self.init_from))
                self.init_from = None
        if self.device_mesh is not None:  # ModelParallelStrategy: shard the weights, block by block (FSDP2)
            for part in (*getattr(self.net, "blocks", ()), self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
            register_fsdp_forward_method(self.net, "loss")
        if self.compile_net:
            self.net.compile()  # in place: the weights keep their names
            # `compile` covers calls of the net alone; hiding the method on this one object is what mypy minds
            self.net.loss = torch.compile(self.net.loss)  # type: ignore[method-assign]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._make_optimizer(parameter_groups(self._net()))
        total_steps = self.trainer.max_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        self._precision_before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul_precision)

    def on_fit_end(self) -> None:
        torch.set_float32_matmul_precision(self._precision_before)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        if micro_batch == 0:
            self.step_loss = torch.zeros((), device=self.device)
            # `self.log` on every step would cost 1 ms, a fifth of a small step
            every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set late
            self.step_is_logged = (self.global_step + 1) % every == 0
        # every random number of a step follows from these: no generator's state needs to survive an interruption
        position = (self.seed, self.global_step, micro_batch, self.global_rank)
        seed = int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0] >> np.uint64(1))
        # not torch.manual_seed: it notes a whole traceback for each kind of device that is not in use, 1 ms a step
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._net().loss(batch.inputs, batch.targets)
        self.step_loss += loss.detach() / self.trainer.accumulate_grad_batches
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, as Lightning would, and while the gradients' norm is at hand, logs it and looks whether it is finite.

        Lightning refuses to clip for fused optimizers under any mixed precision; only with a gradient scaler (fp16) is
        there a reason, for such an optimizer undoes the scaling itself, after the clipping.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if gradient_clip_val and scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UserError(
                "16-mixed scales the gradients, and a fused optimizer undoes that after they are clipped: "
                "use --trainer.precision bf16-mixed, or fused: false"
            )
        grouped = (parameter for group in optimizer.param_groups for parameter in group["params"])
        parameters = [parameter for parameter in grouped if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        # asking a GPU for a number makes it wait, so there only where the logs ask anyway
        if (
            scaler is None
            and (self.step_is_logged or self.device.type == "cpu")
            and not (norm + self.step_loss).isfinite()
        ):
            raise not_finite("the loss" if not self.step_loss.isfinite() else "a gradient", self.trainer)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        if self.step_is_logged:
            self.log("grad_norm", norm)
            self.log("train/loss", self.step_loss, prog_bar=True, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Scores a batch; (B, T) nats of each token, for callbacks."""
        return self.score(batch, self.val_loss)

    def on_validation_epoch_end(self) -> None:
        self._report("val", self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.score(batch, self.sliding_loss if dataloader_idx else self.test_loss)

    def on_test_epoch_end(self) -> None:
        self._report("test", self.test_loss)
        self._report("test_sliding", self.sliding_loss)

    def predict_step(self, batch: Sequence[str], batch_idx: int) -> list[TextStream]:
        """Continues the prompts of a batch: `sampling.samples` texts for each, one after the other.

        What comes is handed to `on_text`, if that is set, as it comes.
        """
        streams = begin(self._tokenizer(), batch, self.sampling)
        for stream, piece in self._write(streams, self.sampling, logprobs=self.logprobs):
            if self.on_text is not None:
                self.on_text(stream, piece)
        return streams

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.tokenizer is not None
        if self.device_mesh is None:  # sharded strategies have done it
            for state, optimizer in zip(checkpoint.get("optimizer_states", []), self.trainer.optimizers):
                label_in_order(state, optimizer, self.parameters())
        checkpoint[checkpoints.KEY] = checkpoints.describe(self._net(), self.tokenizer, self.settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoints.check_same_net(checkpoint, self._net())

    # Using it

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) ids to (B, T, V) logits."""
        return self._net()(idx)

    def stream(self, prompt: str = "", **changes: Any) -> Iterator[str]:
        """Continues a text, piece by piece as it comes; joined, the pieces are what `generate` adds.

        Args:
            prompt: see `generate`.
            changes: see `generate`.

        Raises:
            UserError: see `generate`.
        """
        sampling = self._sampling_of_one(changes)
        streams = begin(self._tokenizer(), [prompt], sampling)
        return (piece for _, piece in self._write(streams, sampling))

    @overload
    def generate(self, prompt: str, **changes: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], **changes: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: Tensor, **changes: Any) -> Tensor: ...
    def generate(self, prompt: str | list[str] | Tensor = "", **changes: Any) -> str | list[str] | Tensor:
        """Continues a prompt.

        Args:
            prompt: a text; a list of texts, of any lengths, each continued as if it were alone; or (B, T) ids. An empty
                text starts from nothing, see `TextStream`.
            changes: of `self.sampling` for this call: `temperature`, `top_k`, `seed` and so on.

        Returns:
            what `prompt` is, with its continuation; of a list, `samples` texts for each, one after the other.

        Raises:
            UserError: a value out of range; a prompt with a character that the tokenizer does not know; several
                `samples` of a text that is not in a list.
        """
        if isinstance(prompt, str):
            return prompt + "".join(self.stream(prompt, **changes))
        sampling = replace(self.sampling, **changes)
        if isinstance(prompt, Tensor):
            with self._evaluating():
                return generate(self._net(), prompt.to(self.device), sampling)
        streams = begin(self._tokenizer(), prompt, sampling)
        deque(self._write(streams, sampling), maxlen=0)
        return [stream.prompt + stream.text for stream in streams]

    def score(self, batch: Batch, metric: TextLoss) -> Tensor:
        """Adds a batch to a metric; (B, T) nats of each token, 0 where unscored."""
        logits = self(batch.inputs).flatten(0, 1).float()  # (B * T, V)
        losses = F.cross_entropy(logits, batch.targets.flatten(), reduction="none", ignore_index=UNSCORED)
        losses = losses.view_as(batch.targets)
        metric.update(losses, batch.targets, batch.target_chars)
        return losses

    # Details

    def _sampling_of_one(self, changes: dict[str, Any]) -> Sampling:
        if changes.get("samples", 1) != 1:
            raise UserError(f"one text was asked for and {changes['samples']} samples of it: pass the prompt in a list")
        return replace(self.sampling, **{**changes, "samples": 1})

    def _write(
        self, streams: list[TextStream], sampling: Sampling, logprobs: bool = False
    ) -> Iterator[tuple[TextStream, str]]:
        with self._evaluating():
            yield from write(self._net(), streams, sampling, logprobs)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def _tokenizer(self) -> Tokenizer:
        assert self.tokenizer is not None, "the tokenizer comes from the data or a checkpoint: see setup"
        return self.tokenizer

    def _net(self) -> Net:
        assert self.net is not None, "the net is made when the data's sizes are known: see configure_model"
        return self.net

    def _report(self, stage: str, metric: TextLoss) -> None:
        self.log_dict({f"{stage}/{name}": value.float() for name, value in metric.compute().items()})
        metric.reset()
