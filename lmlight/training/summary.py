"""What `lmlight fit` prints at its end."""

from __future__ import annotations

import json
import math
import os
import shlex

from lmlight import checkpoint as checkpoints
from lmlight.generation import escape_control_characters
from lmlight.training.callbacks import RunLogger
from lmlight.training.checkpointing import BestLastCheckpoint
from lmlight.training.datamodule import TextDataModule
from lmlight.training.module import LanguageModel
from lmlight.training.run_settings import resume_command
from lmlight.training.run_trainer import RunTrainer


def print_summary(
    trainer: RunTrainer, model: LanguageModel, datamodule: TextDataModule, resumed_step: int | None
) -> None:
    """Print where the best checkpoint is, its score, a sample of text, and what to type next."""
    keeper = next((one for one in trainer.checkpoint_callbacks if isinstance(one, BestLastCheckpoint)), None)
    step = trainer.global_step
    if trainer.fast_dev_run or keeper is None:  # type: ignore[attr-defined]  # set late
        print("Nothing was saved")
        return
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
    print(f"  {nats:.4f} nats per character, {nats / math.log(2):.4f} bits per character on the validation text")
    if (final := trainer.callback_metrics.get("val/nats_per_char")) is not None:
        print(f"  {final:.4f} nats per character at the last validation")
    if datamodule.trainer is None:  # another process trained, as with `ddp_spawn`
        datamodule.prepare_data()
        datamodule.setup("fit")
    elif step < model.total_steps:
        print(f"  Stopped at step {step} of {model.total_steps}; to resume: {resume_command(keeper.last_model_path)}")
    prompt = datamodule.sample_prompt
    text = LanguageModel.load_from_checkpoint(path).generate(prompt, max_new_tokens=150)
    print(f"\n{escape_control_characters(text)}\n")
    prompts = shlex.quote(json.dumps([prompt], ensure_ascii=False))
    print(f"Next:\n  lmlight predict --ckpt_path {path} --data.prompts {prompts}")
    if isinstance(trainer.logger, RunLogger):
        print(f"  tensorboard --logdir {os.path.relpath(trainer.logger.root_dir)}")
