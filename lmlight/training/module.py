"""LanguageModel: the LightningModule that trains, evaluates and generates."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lmlight import checkpoint as checkpoints
from lmlight.data.loader import Batch
from lmlight.errors import UserError, check_literals
from lmlight.generation import Sampling
from lmlight.models import Net, Transformer, architecture_kwargs
from lmlight.models.check import MAX_TOKENS, check_loss, check_net
from lmlight.optim import Muon, Schedule, apply_changes, hyperparameters, label_in_order, make_optimizer
from lmlight.training.checkpointing import EXTRA_STATE, non_finite_error, reseed, total_norm
from lmlight.training.datamodule import TextDataModule
from lmlight.training.precision import MatmulPrecision
from lmlight.training.run_checks import check_run, check_strategy
from lmlight.training.text_model import TextModel
from lmlight.user_code import full_name

PYTHON_ONLY = {"init_from", "settings"}  # arguments that are not flags
# keys of a checkpoint's weights; with WeightAveraging, the averaged and the raw ones
STATES = ("state_dict", "current_model_state")
NetCallable = Callable[[int, int], Net]
"""Makes a network from (vocab_size, block_size), which depend on the data."""
SchedulerCallable = Callable[[Optimizer], LRScheduler]
"""Makes a scheduler for an optimizer."""


class LanguageModel(TextModel):
    """Trains a network to predict the next token, evaluates its loss per character, and generates text.

    The network is built once the vocabulary and block size are known, from the trainer's datamodule or a checkpoint.

    Args:
        net: A class or function that builds the network, called as `net(vocab_size, block_size)`. The attribute `net` is
            the network itself; None until built.
        optimizer: The optimizer. Weight decay applies to parameters of two or more dimensions.
        schedule: Learning-rate schedule.
        lr_scheduler: A torch scheduler, such as `torch.optim.lr_scheduler.StepLR`, called after each optimizer step.
            Null means `schedule`.
        sampling: Defaults for `predict` and `generate`.
        matmul_precision: Precision of float32 matrix products during training, see `torch.set_float32_matmul_precision`.
            `medium` allows bfloat16 internally, up to twice as fast (tensor cores on GPUs, oneDNN on CPUs); `highest` is
            torch's default.
        compile_net: Compile the network with `torch.compile`. The first steps take a minute or more and need a C++ compiler
            (CPU) or Triton (GPU). Pays off in long runs on GPUs.
        gradient_checkpointing: Recompute the activations of each block of a `Transformer` in the backward pass instead of
            keeping them: less memory, a third more time.
        check_causality: Before training, run the network on a small input and check that its logits have the right shape and
            do not depend on later tokens.
        seed: Seed for dropout. The masks depend only on the seed, the step, the micro-batch and the rank, so a resumed run
            draws the same ones.
        init_from: A checkpoint, from `checkpoint.read`, that provides the initial weights and the tokenizer.
        settings: Plain values to log as hyperparameters; `data` is also stored in checkpoints.

    Attributes:
        tokenizer: Encodes prompts and decodes generated ids; None until known.
        logprobs: Whether `predict_step` records the log-probability of each token.
        step_loss: Training loss of the current optimizer step, on this device.
        step_is_logged: Whether the current optimizer step is logged.
    """

    def __init__(
        self,
        net: NetCallable = Transformer,
        optimizer: OptimizerCallable = Muon,
        schedule: Schedule = Schedule(),
        lr_scheduler: SchedulerCallable | None = None,
        sampling: Sampling = Sampling(),
        matmul_precision: Literal["highest", "high", "medium"] = "medium",
        compile_net: bool = False,
        gradient_checkpointing: bool = False,
        check_causality: bool = True,
        seed: int = 1337,
        init_from: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        check_literals(LanguageModel.__init__, locals(), "model.")
        super().__init__(sampling)
        self.seed, self.matmul_precision = seed, matmul_precision
        self.compile_net, self.gradient_checkpointing = compile_net, gradient_checkpointing
        self._make_net, self._make_optimizer = net, optimizer
        self._check_causality, self._is_checked = check_causality, False
        self.schedule, self._make_scheduler, self.settings = schedule, lr_scheduler, settings or {}
        self._init_from: dict[str, Any] | None = None
        if init_from is not None:
            self._init_from = {key: init_from[key] for key in (checkpoints.METADATA_KEY, "state_dict")}
            self.tokenizer = checkpoints.tokenizer_of(init_from)
            self.vocab_size = init_from[checkpoints.METADATA_KEY]["net"]["config"]["vocab_size"]
            self.block_size = init_from[checkpoints.METADATA_KEY]["net"]["config"]["block_size"]
        self._hyperparameters: list[dict[str, Any]] = []  # of the optimizer as it was made
        self._resumed_hyperparameters: list[dict[str, Any]] = []  # those in the checkpoint that the run resumes from

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: str | torch.device = "cpu", **kwargs: Any
    ) -> LanguageModel:
        """Load a model from a checkpoint file alone, ready to `generate`.

        Overrides Lightning's method, which instantiates classes that the file names. No code in the file is ever run.

        Args:
            checkpoint_path: The file.
            map_location: Device for the weights, such as `"cuda"`.
            kwargs: Constructor arguments that replace the checkpoint's, such as `sampling`. `net` is the class of your own
                network, needed only if it is not imported under the name that the checkpoint gives.

        Raises:
            UserError: See `checkpoint.read` and `checkpoint.net_class`.
        """
        content = checkpoints.read(checkpoint_path)
        metadata = content[checkpoints.METADATA_KEY]
        net = checkpoints.net_class(content, kwargs.pop("net", None))
        stored = {
            "net": partial(net, **architecture_kwargs(metadata["net"]["config"])),
            "sampling": Sampling(**metadata["sampling"]),
            "settings": metadata["settings"],
        }
        model = cls(**{**stored, **kwargs}, init_from=content)
        model.configure_model()
        return model.to(map_location).eval()

    def check(self, block_size: int | None, trainer: Trainer | None = None) -> None:
        """Check the network's arguments and, given a `trainer`, its callbacks, strategy and intervals, and the optimizer.

        `block_size` is the longest context; None if it is not known yet.

        Raises:
            UserError: See `models.check.check_net`, `optim.make_optimizer` and `run_checks.check_run`.
        """
        runs = False
        if trainer is not None:
            make_optimizer(self._make_optimizer)
            check_run(trainer, None if self._make_scheduler else self.schedule)
            # torch's threads do not survive a fork, so `setup` runs the network instead, in the forked processes
            runs = not getattr(trainer.strategy.launcher, "is_interactive_compatible", False)
        self._check_net(block_size or MAX_TOKENS, runs)

    def _check_net(self, block_size: int, run: bool) -> None:
        if self.net is None and not self._is_checked:
            self._is_checked = run
            check_net(self._make_net, block_size, run and self._check_causality)

    # Lightning's hooks, in the order in which they are called

    def configure_callbacks(self) -> list[Callback]:
        if self.trainer.state.fn == TrainerFn.FITTING:
            data = getattr(self.trainer, "datamodule", None)
            self.check(getattr(data, "block_size", self.block_size), self.trainer)
        return [MatmulPrecision(self.matmul_precision)]

    def setup(self, stage: str) -> None:
        _, block_size = self._sizes()
        if stage == "predict":
            # processes generate from different prompts, so they would wait for each other's shards forever
            if isinstance(self.trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
                raise UserError("predict needs the whole model on each device: drop the sharded strategy (fsdp.yaml)")
            return
        check_strategy(self.trainer)
        if stage == "fit":
            self._check_net(block_size, run=True)
            make_optimizer(self._make_optimizer, try_step=True)
        data = getattr(self.trainer, "datamodule", None)
        if (longer := getattr(data, "block_size", 0)) > block_size:
            raise UserError(f"data.block_size {longer} exceeds this model's block_size {block_size}: lower it")
        if isinstance(data, TextDataModule):
            if self.tokenizer is None:
                raise UserError("the model was trained on data without a tokenizer: pass its --data my.module.MyData")
            if data.tokenizer is not None and data.tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise UserError("the data module's tokenizer differs: set datamodule.tokenizer = model.tokenizer")
        elif stage == "fit":
            rank_zero_warn(
                f"{type(data).__name__} is not a TextDataModule: a resumed run may see different batches, and losses are "
                "per character only if its batches have character counts"
            )

    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("cpu"):  # the same seed gives the same initial weights on any device
                self.net = self._make_net(*self._sizes())
            if self._init_from is not None:
                checkpoints.check_compatible(self._init_from, self.net)
                checkpoints.load_weights(self.net, self._init_from)
                self._init_from = None
        if self.gradient_checkpointing:
            if not isinstance(self.net, Transformer):
                raise UserError(f"model.gradient_checkpointing needs a Transformer, got a {type(self.net).__name__}")
            self.net.recomputes_blocks = True
        # FSDP2 with ModelParallelStrategy: shard the weights block by block. Lightning calls this again for `validate`.
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
            for part in (*getattr(self.net, "blocks", ()), self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
            register_fsdp_forward_method(self.net, "loss")
        if self.compile_net:
            self.net.compile()  # in place: the weights keep their names
            # `net.compile()` covers only `forward`
            self.net.loss = torch.compile(self.net.loss)  # type: ignore[method-assign]

    def on_fit_start(self) -> None:
        if not self.training:  # as `load_from_checkpoint` returns it; Lightning would train without dropout
            self.train()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        def factor(step: int) -> float:
            # the first call, for step 0, comes before the end is known; the factor of step 0 does not depend on it
            return self.schedule.factor(step, self.total_steps or step + 1)

        optimizer = make_optimizer(self._make_optimizer, self._net())
        self._hyperparameters = hyperparameters(optimizer)
        scheduler = self._make_scheduler(optimizer) if self._make_scheduler else LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        self.step_loss, self.step_is_logged = torch.zeros((), device=self.device), False
        if self._make_scheduler is None:
            self.schedule.check_end(self.total_steps)
        if self._resumed_hyperparameters:
            scheduler = self.trainer.lr_scheduler_configs[0].scheduler
            apply_changes(scheduler, self._hyperparameters, self._resumed_hyperparameters)
            if self._make_scheduler is None:  # the number of steps may have changed since
                for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs):
                    group["lr"] = rate * self.schedule.factor(self.global_step, self.total_steps)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        if micro_batch == 0:
            # Lightning's epoch count is one short after resuming from the end of an epoch: it would train another
            if 0 < self.total_steps <= self.global_step:
                self.trainer.should_stop = True
                return -1  # leaves the epoch
            self.step_loss = torch.zeros((), device=self.device)
            # `self.log` on every step would cost 1 ms, a fifth of a small model's step
            every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside __init__
            self.step_is_logged = every > 0 and (self.global_step + 1) % every == 0
        reseed(self.device, self.seed, self.global_step, micro_batch, self.global_rank)
        return None

    def training_loss(self, batch: Batch) -> Tensor:
        """Compute the loss to minimize. Override this to train with another objective; validation does not change.

        Args:
            batch: Token ids, target ids, and the number of characters of each target.

        Returns:
            A scalar, by default the mean cross-entropy in nats per token.
        """
        return self._net().loss(batch.inputs, batch.targets)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.training_loss(self.check_batch(batch))
        check_loss(loss, f"{type(self).__name__}.training_loss")
        micro_batches = 1 + batch_idx % self.trainer.accumulate_grad_batches
        self.step_loss += (loss.detach() - self.step_loss) / micro_batches  # the mean so far: an epoch may end here
        return loss

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip gradients as Lightning does, and use their norm for logging and to detect non-finite values.

        With mixed precision, Lightning refuses to clip for fused optimizers. This is necessary only in fp16, where such an
        optimizer unscales the gradients itself, after clipping.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        still_scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        if gradient_clip_val and still_scaled:
            raise UserError(
                "a fused optimizer cannot clip gradients in 16-mixed: use --trainer.precision bf16-mixed, or fused: false"
            )
        # on a GPU, reading a number waits for all work, so only on steps that are logged anyway
        is_checked = scaler is None and (self.step_is_logged or self.device.type == "cpu")
        if not (gradient_clip_val or self.step_is_logged or is_checked):
            return
        grouped = (parameter for group in optimizer.param_groups for parameter in group["params"])
        parameters = [parameter for parameter in grouped if parameter.grad is not None]
        norm = total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
        if is_checked and not (norm + self.step_loss).isfinite():
            raise non_finite_error("the loss" if not self.step_loss.isfinite() else "a gradient", self.trainer)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        if self.step_is_logged:
            self.log("grad_norm", norm / scaler.get_scale() if scaler is not None and still_scaled else norm)
            self.log("train/loss", self.step_loss, prog_bar=True, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.device_mesh is None:  # sharded strategies do it themselves
            for state, optimizer in zip(checkpoint.get("optimizer_states", []), self.trainer.optimizers):
                label_in_order(state, optimizer, self.parameters())
        trained_by = None
        if self.trainer.optimizers:
            kind = full_name(type(self.trainer.optimizers[0]))
            trained_by = {"class": kind, "hyperparameters": self._hyperparameters}
        for name in STATES:
            checkpoint.get(name, {}).pop(EXTRA_STATE, None)  # part of the metadata
        settings = {} if self.settings.get("data_class") else {"data": self.settings.get("data", {})}
        metadata = checkpoints.model_metadata(self._net(), self.tokenizer, vars(self.sampling), settings, trained_by)
        if self._validation is not None and self._validation[0] == self.global_step:
            metadata["metrics"] = {k: v.item() for k, v in self._validation[1].items()}
        metadata["accumulate_grad_batches"] = self.trainer.accumulate_grad_batches
        checkpoint[checkpoints.METADATA_KEY] = metadata

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoints.check_compatible(checkpoint, self._net())
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        metadata = checkpoint[checkpoints.METADATA_KEY]
        before, now = metadata.get("accumulate_grad_batches"), self.trainer.accumulate_grad_batches
        if before is not None and before != now:  # Lightning counts micro-batches
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                behind = counts["processed"] - counts["completed"]  # 1 at the end of a batch, as Lightning expects
                counts.update({name: count * now // before for name, count in counts.items()})
                counts["completed"] = counts["processed"] - behind
        if (trained_by := metadata["optimizer"]) is not None:
            self._resumed_hyperparameters = trained_by["hyperparameters"]
            if (ours := full_name(type(make_optimizer(self._make_optimizer)))) != trained_by["class"]:
                raise UserError(
                    f"the checkpoint holds the state of {trained_by['class']}, which {ours} cannot use: leave out "
                    "--model.optimizer, or start a new run from the checkpoint's weights with --init_from"
                )

    @property
    def total_steps(self) -> int:
        """The optimizer step at which training ends; 0 while unknown, for example before training begins."""
        # not `trainer.estimated_stepping_batches`, which makes Lightning forget a restored position in the data
        ends = [self.trainer.max_steps] if self.trainer.max_steps >= 0 else []
        batches = self.trainer.num_training_batches  # infinite if the loader has no length
        if (epochs := self.trainer.max_epochs or -1) > 0 and math.isfinite(batches):
            ends.append(epochs * math.ceil(batches / self.trainer.accumulate_grad_batches))
        return min(ends, default=0)
