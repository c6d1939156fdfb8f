"""Samples of generated text at each validation of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning.pytorch import Trainer

from lmlight.generation import escape_control_characters
from lmlight.training.callbacks.base import FitCallback, summary_writer, text_data
from lmlight.training.module import LanguageModel


class SampleText(FitCallback):
    """Generates text for TensorBoard's Text page at each validation, with the same prompts and seed each time.

    Args:
        prompts: the prompts; null takes an empty one and a line of the validation text.
        max_new_tokens: tokens to generate for each prompt.
        temperature: see `Sampling`; null takes the model's own.
    """

    def __init__(
        self, prompts: Sequence[str] | None = None, max_new_tokens: int = 64, temperature: float | None = None
    ) -> None:
        self.prompts, self.max_new_tokens, self.temperature = prompts, max_new_tokens, temperature

    def on_fit_validation_end(self, trainer: Trainer, model: LanguageModel) -> None:
        if (writer := summary_writer(trainer)) is None:
            return
        sampling = replace(model.sampling, max_new_tokens=self.max_new_tokens, num_samples=1)
        if self.temperature is not None:
            sampling = replace(sampling, temperature=self.temperature)
        data = text_data(trainer)
        prompts = ["", data.sample_prompt] if data and data.sample_prompt else [""]
        prompts = prompts if self.prompts is None else list(self.prompts)
        texts = model.generate(prompts, **vars(sampling))  # on every rank, because weights may be sharded
        settings = f"temperature {sampling.temperature:g}, seed {sampling.seed}, step {trainer.global_step}"
        for prompt, text in zip(prompts, texts):
            # indented by four spaces, Markdown keeps line breaks and symbols
            indented = "\n".join("    " + line for line in escape_control_characters(text).split("\n"))
            tag = f"samples/{' '.join(prompt.split()) or 'empty prompt'}"
            writer.add_text(tag, f"{settings}\n\n{indented}", trainer.global_step)
