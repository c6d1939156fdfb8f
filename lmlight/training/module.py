"""LanguageModel: a net as Lightning trains it, and as it speaks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lmlight import checkpoint as checkpoints
from lmlight.data.loader import IGNORE_INDEX, Batch
from lmlight.data.tokenizer import Tokenizer
from lmlight.errors import UserError
from lmlight.generation import Sampling, TextStream, generate, generate_text, start_streams
from lmlight.models import Net, Transformer, architecture_kwargs
from lmlight.optim import HIDDEN, Muon, Schedule, label_in_order, parameter_groups
from lmlight.training.checkpointing import EXTRA_STATE, non_finite_error
from lmlight.training.metrics import TextLoss

NO_NETWORK = (
    "this model has no network and no tokenizer yet: train it with a Trainer, or use LanguageModel.load_from_checkpoint"
)
NOT_BUILT_YET = "before the network is built, whose size depends on the data"
UNSUPPORTED: dict[type[Callback], str] = {
    BaseFinetuning: f"it freezes modules {NOT_BUILT_YET}; freeze them in configure_model of a subclass of LanguageModel",
    LearningRateFinder: "it sets model.lr, but the learning rate is the optimizer's: compare values of --model.optimizer.lr",
    ModelPruning: f"it looks for parameters {NOT_BUILT_YET}",
    StochasticWeightAveraging: "it replaces the schedule, so the run could not be resumed; use WeightAveraging or "
    "EMAWeightAveraging",
    SpikeDetection: "it cannot load its own state, so the run could not be resumed; a loss that is not finite stops any run",
}
"""Lightning's callbacks that would end in an error of their own, and why."""
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
        net: NetCallable = Transformer,
        optimizer: OptimizerCallable = Muon,
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
        self._hyperparameters: list[dict[str, Any]] = []  # of each group of the optimizer, as it was made
        self._resumed_hyperparameters: list[dict[str, Any]] = []  # the same, of the run that is resumed
        self.init_from: dict[str, Any] | None = None
        self.on_text: Callable[[TextStream, str], None] | None = None
        self.logprobs = False
        self._validation: tuple[int, dict[str, Tensor]] | None = None  # the step of the last one, and its metrics
        self.val_loss, self.test_loss, self.sliding_loss = TextLoss(), TextLoss(), TextLoss()
        self.register_load_state_dict_pre_hook(_allow_missing_extra_state)  # type: ignore[no-untyped-call]  # torch's

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> LanguageModel:
        """The model in a checkpoint file, ready to `generate`, with the run's own sampling; only the file is needed.

        Takes the arguments of Lightning's method of this name, which instantiates classes that the file names and so can run
        code.

        Args:
            checkpoint_path: the file.
            map_location: the device for the weights, such as `"cuda"`. None, a function or a dict is the CPU, which is where
                weights are always read to.
            hparams_file: ignored; the checkpoint has the settings.
            strict: ignored; the checkpoint defines the network, so the weights always match.
            weights_only: ignored; only weights and plain values are ever read.
            kwargs: arguments of the constructor that replace the checkpoint's, such as `sampling` or `optimizer`; not `net`.

        Raises:
            UserError: see `checkpoint.read`; there is no such device; `net` is given.
        """
        if "net" in kwargs:
            raise UserError("load_from_checkpoint builds the network that the checkpoint describes: leave out net")
        content = checkpoints.read(checkpoint_path)
        net = checkpoints.net_of(content)
        arguments = {
            "net": partial(type(net), **architecture_kwargs(net.config)),
            "sampling": Sampling(**content[checkpoints.METADATA_KEY]["sampling"]),
        }
        model = cls(**{**arguments, **kwargs})
        model.net, model.tokenizer, model.block_size = net, checkpoints.tokenizer_of(content), net.block_size
        model.settings = content[checkpoints.METADATA_KEY]["settings"]
        if isinstance(map_location, (str, int, torch.device)):
            try:
                model.to(map_location)
            except (RuntimeError, AssertionError, TypeError, AttributeError) as error:  # torch raises any of them
                raise UserError(
                    f"map_location {map_location!r} is not a device that can be used here ({str(error).splitlines()[0]})"
                ) from None
        return model.eval()

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict needs besides weights to be loaded into a model that has no network yet.

        So strategies that launch processes of their own (`ddp_spawn`, `ddp_fork`, `ddp_notebook`) can hand a trained model
        back to the process that called `fit`, which has never seen the data.
        """
        if self.net is None or self.tokenizer is None:
            return {}
        with suppress(UserError):  # a network that no checkpoint can hold still has a state dict
            return checkpoints.model_metadata(self.net, self.tokenizer)
        return {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Builds the network and the tokenizer unless they are there; torch loads the weights next."""
        if self.net is None and state:
            content = {checkpoints.METADATA_KEY: state}
            self.net, self.tokenizer = checkpoints.untrained_net_of(content), checkpoints.tokenizer_of(content)
            self.block_size = self.net.block_size

    def configure_callbacks(self) -> list[Callback]:
        """Called by Lightning before any other hook.

        Raises:
            UserError: see `check_run`.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.check_run(self.trainer)
        return [_MatmulPrecision()]

    def check_net(self, block_size: int) -> None:
        """Whether the net's sizes fit each other, before anything is fetched or written.

        Raises:
            UserError: they do not.
        """
        with torch.device("meta"):  # shapes without numbers: no time, no memory
            net = self._make_net(1, block_size)
        checkpoints.net_name(net)

    def check_run(self, trainer: Trainer) -> None:
        """Whether callbacks, optimizer and schedule suit the run, before anything is fetched or written.

        Raises:
            UserError: one of the trainer's callbacks cannot work with this model; validations come after no batches at all;
                the optimizer cannot be made from groups of parameters, or cannot take a step with plain gradients; the
                schedule needs the run's last step, which is not known.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set late
            for kind, reason in UNSUPPORTED.items():
                if isinstance(callback, kind):
                    raise UserError(f"{type(callback).__name__} cannot be used: {reason}")
        # there is no interval where validations go by the clock
        if (interval := getattr(trainer, "val_check_interval", None)) is not None and interval <= 0:
            raise UserError(f"trainer.val_check_interval must be above 0, got {interval}")
        if (epochs := trainer.check_val_every_n_epoch) is not None and epochs < 1:
            raise UserError(f"trainer.check_val_every_n_epoch must be at least 1, got {epochs}")
        groups = _small_groups()
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        try:
            self._optimizer(groups).step()
        except (TypeError, RuntimeError) as error:
            raise _unusable(error) from None
        self._check_schedule(max(trainer.max_steps, -1 if trainer.max_epochs is None else trainer.max_epochs) >= 0)

    # Lightning's hooks, in the order in which they are called

    def setup(self, stage: str) -> None:
        _, block_size = self._take_sizes()
        if stage == "predict":
            return
        data = getattr(self.trainer, "datamodule", None)
        if (longer := getattr(data, "block_size", 0)) > block_size:
            raise UserError(
                f"data.block_size {longer} is longer than the {block_size} tokens that this model takes: lower it"
            )
        theirs = getattr(data, "tokenizer", None)
        if theirs is not None and theirs.fingerprint != self._tokenizer().fingerprint:
            raise UserError(
                "the datamodule and the model use different tokenizers: set datamodule.tokenizer = model.tokenizer before "
                "the trainer prepares the data"
            )

    def _take_sizes(self) -> tuple[int, int]:
        """The vocabulary's size and the block's, from the data unless they are known."""
        if self.tokenizer is None or self.block_size is None:
            try:
                data = getattr(self.trainer, "datamodule", None)
            except RuntimeError:  # Lightning's way to say that there is no trainer
                raise UserError(NO_NETWORK) from None
            self.tokenizer = self.tokenizer or getattr(data, "tokenizer", None)
            self.block_size = self.block_size or getattr(data, "block_size", None)
        if self.tokenizer is None or self.block_size is None:
            raise UserError(
                "the model has no tokenizer: train with a TextDataModule, or load a checkpoint (--ckpt_path) to predict"
            )
        return self.tokenizer.vocab_size, self.block_size

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self._make_net(*self._take_sizes())
            if self.init_from is not None:
                checkpoints.check_compatible(self.init_from, self.net)
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
        optimizer = self._optimizer(parameter_groups(self._net()))
        self._hyperparameters = _hyperparameters(optimizer)
        # the first call, for step 0, comes before the data; the factor of that step does not depend on the end
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.schedule.factor(step, self.total_steps or step + 1)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        self._check_schedule(self.total_steps > 0)
        if self._resumed_hyperparameters:
            self._apply_changed_hyperparameters()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        if micro_batch == 0:
            # Lightning's count of epochs falls behind when a run is resumed from the end of one: it would train another
            if 0 < self.total_steps <= self.global_step:
                self.trainer.should_stop = True
                return -1  # leaves the epoch
            self.step_loss = torch.zeros((), device=self.device)
            # `self.log` on every step would cost 1 ms, a fifth of a small step
            every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set late
            self.step_is_logged = every > 0 and (self.global_step + 1) % every == 0
        # every random number of a step follows from these: no generator's state needs to survive an interruption
        position = (self.seed, self.global_step, micro_batch, self.global_rank)
        seed = int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0] >> np.uint64(1))
        # not torch.manual_seed: it notes a whole traceback for each kind of device that is not in use, 1 ms a step
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)
        return None

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
            raise non_finite_error("the loss" if not self.step_loss.isfinite() else "a gradient", self.trainer)
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
        metrics = self._report("val", self.val_loss)
        self._validation = (self.global_step, metrics)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.score(batch, self.sliding_loss if dataloader_idx else self.test_loss)

    def on_test_epoch_end(self) -> None:
        self._report("test", self.test_loss)
        self._report("test_sliding", self.sliding_loss)

    def predict_step(self, batch: Sequence[str], batch_idx: int) -> list[TextStream]:
        """Continues the prompts of a batch: `sampling.num_samples` texts for each, one after the other.

        What comes is handed to `on_text`, if that is set, as it comes.
        """
        streams = start_streams(self._tokenizer(), batch, self.sampling)
        for stream, piece in self._write(streams, self.sampling, logprobs=self.logprobs):
            if self.on_text is not None:
                self.on_text(stream, piece)
        return streams

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.device_mesh is None:  # sharded strategies have done it
            for state, optimizer in zip(checkpoint.get("optimizer_states", []), self.trainer.optimizers):
                label_in_order(state, optimizer, self.parameters())
        trained_by = None
        if self.trainer.optimizers:
            kind = _class_name(self.trainer.optimizers[0])
            trained_by = {"class": kind, "hyperparameters": self._hyperparameters}
        for name in ("state_dict", "current_model_state"):  # the latter is WeightAveraging's
            checkpoint.get(name, {}).pop(EXTRA_STATE, None)  # the same is in the entry that follows
        checkpoint[checkpoints.METADATA_KEY] = checkpoints.model_metadata(
            self._net(), self._tokenizer(), vars(self.sampling), self.settings, trained_by
        )
        if self._validation is not None and self._validation[0] == self.global_step:
            checkpoint[checkpoints.METADATA_KEY]["metrics"] = {k: v.item() for k, v in self._validation[1].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoints.check_compatible(checkpoint, self._net())
        described = checkpoint[checkpoints.METADATA_KEY]["optimizer"]
        if self.trainer.state.fn == TrainerFn.FITTING and described is not None:
            ours, trained_by = _class_name(self._optimizer(_small_groups())), described["class"]
            self._resumed_hyperparameters = described["hyperparameters"]
            if ours != trained_by:
                raise UserError(
                    f"the checkpoint holds the state of {trained_by}, which {ours} cannot use: leave out "
                    "--model.optimizer, or start a new run from the checkpoint's weights with --init_from"
                )

    # Using it

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) ids to (B, T, V) logits.

        Raises:
            UserError: T is larger than the net's `block_size`; there is no net yet.
        """
        net = self._net()
        if idx.size(1) > net.block_size:
            raise UserError(
                f"forward takes at most block_size = {net.block_size} tokens, got {idx.size(1)}: pass the last of them, "
                "idx[:, -block_size:], or call generate, which does"
            )
        return net(idx)

    def stream(self, prompt: str = "", **changes: Any) -> Iterator[str]:
        """Continues a text, piece by piece as it comes; joined, the pieces are what `generate` adds.

        Args:
            prompt: see `generate`.
            changes: see `generate`.

        Raises:
            UserError: see `generate`.
        """
        sampling = self._sampling_of_one(changes)
        streams = start_streams(self._tokenizer(), [prompt], sampling)
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
            what `prompt` is, with its continuation; of a list, `num_samples` texts for each, one after the other.

        Raises:
            UserError: a value out of range; a prompt with a character that the tokenizer does not know; several
                `num_samples` of a text that is not in a list.
        """
        if isinstance(prompt, str):
            return prompt + "".join(self.stream(prompt, **changes))
        sampling = replace(self.sampling, **changes)
        if isinstance(prompt, Tensor):
            with self._evaluating():
                return generate(self._net(), prompt.to(self.device), sampling)
        streams = start_streams(self._tokenizer(), prompt, sampling)
        deque(self._write(streams, sampling), maxlen=0)
        return [stream.prompt + stream.text for stream in streams]

    def score(self, batch: Batch, metric: TextLoss) -> Tensor:
        """Adds a batch to a metric; (B, T) nats of each token, 0 where unscored."""
        logits = self(batch.inputs).flatten(0, 1).float()  # (B * T, V)
        losses = F.cross_entropy(logits, batch.targets.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
        losses = losses.view_as(batch.targets)
        metric.update(losses, batch.targets, batch.target_chars)
        return losses

    # Details

    @property
    def total_steps(self) -> int:
        """The optimizer step at which training ends; 0 where that is not known, as before it begins."""
        # not `trainer.estimated_stepping_batches`, which makes Lightning forget a restored position in the data
        trainer, ends = self.trainer, list[int]()
        if trainer.max_steps >= 0:
            ends.append(trainer.max_steps)
        batches = trainer.num_training_batches  # infinite where the loader does not tell
        if (epochs := trainer.max_epochs or -1) > 0 and math.isfinite(batches):
            callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set late
            growing = next((one for one in callbacks if isinstance(one, GradientAccumulationScheduler)), None)
            if growing is None:
                ends.append(epochs * math.ceil(batches / trainer.accumulate_grad_batches))
            else:
                accumulated = map(growing.get_accumulate_grad_batches, range(epochs))
                ends.append(sum(math.ceil(batches / count) for count in accumulated))
        return min(ends, default=0)

    def _apply_changed_hyperparameters(self) -> None:
        """Lets a resumed run have the optimizer's arguments that it is given, where they are not those it began with.

        torch and Lightning restore the arguments with the optimizer's state, and with the scheduler's the learning rate.
        """
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        groups = zip(optimizer.param_groups, self._hyperparameters, self._resumed_hyperparameters)
        for number, (group, now, before) in enumerate(groups):
            changed = {name: value for name, value in now.items() if before.get(name) != value}
            if "lr" in changed:
                scheduler.base_lrs[number] = group["initial_lr"] = changed["lr"]
                changed["lr"] *= self.schedule.factor(scheduler.last_epoch, self.total_steps)
            group.update(changed)

    def _check_schedule(self, has_end: bool) -> None:
        if self.schedule.shape != "constant" and not has_end:
            raise UserError(
                f"a {self.schedule.shape} schedule ends at the run's last step, which is not known: set --trainer.max_steps "
                "or --trainer.max_epochs, or --model.schedule.shape constant"
            )

    def _sampling_of_one(self, changes: dict[str, Any]) -> Sampling:
        if changes.get("num_samples", 1) != 1:
            raise UserError(
                f"one text was asked for and {changes['num_samples']} samples of it: pass the prompt in a list"
            )
        return replace(self.sampling, **{**changes, "num_samples": 1})

    def _write(
        self, streams: list[TextStream], sampling: Sampling, logprobs: bool = False
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
            raise UserError(NO_NETWORK)
        return self.tokenizer

    def _net(self) -> Net:
        if self.net is None:
            raise UserError(NO_NETWORK)
        return self.net

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        try:
            return self._make_optimizer(groups)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _unusable(error) from None

    def _report(self, stage: str, metric: TextLoss) -> dict[str, Tensor]:
        metrics = {f"{stage}/{name}": value.float() for name, value in metric.compute().items()}
        self.log_dict(metrics)
        metric.reset()
        return metrics


class _MatmulPrecision(Callback):
    """Sets the precision of float32 products for `fit`, and sets it back however that ends."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._before: str | None = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(pl_module.matmul_precision)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        if before := getattr(self, "_before", None):
            torch.set_float32_matmul_precision(before)
            self._before = None


def _small_groups() -> list[dict[str, Any]]:
    """Groups like those of `parameter_groups`, of a few numbers each."""
    return [
        {"name": name, "params": [torch.nn.Parameter(torch.ones(shape))], **options}
        for name, shape, options in (
            (HIDDEN, (2, 2), {}),
            ("embeddings", (2, 2), {}),
            ("vectors", (2,), {"weight_decay": 0.0}),
        )
    ]


def _allow_missing_extra_state(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Lets a strict `load_state_dict` take weights alone, which are all that a checkpoint's `state_dict` has."""
    state_dict.setdefault(prefix + EXTRA_STATE, {})


def _unusable(error: Exception) -> UserError:
    return UserError(
        f"model.optimizer cannot train this model ({str(error).strip().splitlines()[0]}): choose another, such as "
        "torch.optim.AdamW"
    )


def _hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _class_name(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"
