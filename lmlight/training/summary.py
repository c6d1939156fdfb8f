"""What `lmlight fit` prints at its end."""

from __future__ import annotations

import json
import math
import os
import shlex
from pathlib import Path

from lightning.pytorch import LightningDataModule

from lmlight import checkpoint as checkpoints
from lmlight.generation import escape_control_characters
from lmlight.training.callbacks import RunLogger
from lmlight.training.checkpointing import BestLastCheckpoint
from lmlight.training.datamodule import TextDataModule
from lmlight.training.module import LanguageModel
from lmlight.training.run_trainer import RunTrainer, command
from lmlight.user_code import full_name


def print_summary(
    trainer: RunTrainer, model: LanguageModel, datamodule: LightningDataModule, resumed_step: int | None
) -> None:
    """Print where the best checkpoint is, its score, a sample of text, and what to type next.

    Args:
        trainer: The trainer, after `fit`.
        model: The model.
        datamodule: The data.
        resumed_step: The step at which the run was resumed; None for a new run.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set late
        print("This was a trial run (trainer.fast_dev_run): nothing was saved")
        return
    keeper = next((one for one in trainer.checkpoint_callbacks if isinstance(one, BestLastCheckpoint)), None)
    if keeper is None:
        print("No checkpoints were kept")
        return
    step = trainer.global_step
    if step == resumed_step:
        print(f"The run had already reached step {step}: to train longer, pass a larger --trainer.max_steps")
        return
    if not keeper.best_model_path:
        where = f"; the weights are in {os.path.relpath(keeper.last_model_path)}" if keeper.last_model_path else ""
        print(f"No validation was run{where}")
        return
    path = os.path.relpath(keeper.best_model_path)
    best = checkpoints.read(path)
    # not `keeper.best_score`: with `ddp_spawn`, training had a keeper of its own
    nats = best["callbacks"][keeper.state_key]["best_score"]
    print(f"\nBest checkpoint: {path} (step {best['global_step']})")
    name, unit = "val/nats_per_char", "character"
    if name not in best[checkpoints.METADATA_KEY]["metrics"]:
        name, unit = "val/loss", "token"
    print(f"  {nats:.4f} nats per {unit}, {nats / math.log(2):.4f} bits per {unit} on the validation text")
    final = trainer.callback_metrics.get(name)
    if final is not None:
        print(f"  {final:.4f} nats per {unit} at the last validation")
    if not isinstance(datamodule, TextDataModule):
        return
    if datamodule.trainer is None:  # another process trained, as with `ddp_spawn`
        datamodule.prepare_data()
        datamodule.setup("fit")
    elif step < model.total_steps:
        resume = f"{command()} fit --ckpt_path {os.path.relpath(keeper.last_model_path)}"
        print(f"  Stopped at step {step} of {model.total_steps}; to resume: {resume}")
    prompt = datamodule.sample_prompt
    net = checkpoints.net_class(best)
    text = LanguageModel.load_from_checkpoint(path).generate(prompt, max_new_tokens=150)
    print(f"\n{escape_control_characters(text)}\n")
    prompts = shlex.quote(json.dumps([prompt], ensure_ascii=False))
    own = "" if net.__module__.startswith("lmlight.") else f" --model.net {full_name(net)}"
    print(f"Next:\n  {command()} predict --ckpt_path {path}{own} --data.prompts {prompts}")
    if isinstance(trainer.logger, RunLogger):
        tensorboard = Path(command()).with_name("tensorboard")  # beside lmlight
        print(f"  {tensorboard} --logdir {os.path.relpath(trainer.logger.root_dir)}")
