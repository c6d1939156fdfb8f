"""TensorBoard dashboards besides Scalars: text samples, figures of the net, token embeddings, and hyperparameters."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard.summary import hparams

from lmlight import pictures
from lmlight.data.loader import IGNORE_INDEX, Batch, as_batch
from lmlight.errors import UserError
from lmlight.generation import escape_control_characters
from lmlight.models import Bigram, Transformer
from lmlight.training.callbacks.base import FitCallback, summary_writer, text_data
from lmlight.training.datamodule import TextDataModule
from lmlight.training.metrics import SUM_DTYPE
from lmlight.training.module import LanguageModel
from lmlight.training.run_settings import flatten

AXIS_TOKENS = 20  # on each axis of an attention map
PROJECTOR_TOKENS = 2048  # the files for the Projector are text, 20 bytes a number


class SampleText(FitCallback):
    """Generates text for TensorBoard's Text dashboard at each validation, with the same prompts and seed each time.

    Args:
        prompts: the prompts; null uses an empty one and the data's `sample_prompt`.
        max_new_tokens: tokens to generate for each prompt.
        temperature: see `Sampling`; null uses the model's own.
    """

    def __init__(
        self, prompts: Sequence[str] | None = None, max_new_tokens: int = 64, temperature: float | None = None
    ) -> None:
        self.prompts, self.max_new_tokens, self.temperature = prompts, max_new_tokens, temperature

    def on_fit_validation_end(self, trainer: Trainer, model: LanguageModel) -> None:
        if (writer := summary_writer(trainer)) is None or model.tokenizer is None:
            return
        temperature = model.sampling.temperature if self.temperature is None else self.temperature
        options = {"max_new_tokens": self.max_new_tokens, "num_samples": 1, "temperature": temperature}
        data = text_data(trainer)
        prompts = ["", data.sample_prompt] if data and data.sample_prompt else [""]
        prompts = prompts if self.prompts is None else list(self.prompts)
        texts = model.generate(prompts, **options)  # on every rank, because weights may be sharded
        settings = f"temperature {temperature:g}, seed {model.sampling.seed}, step {trainer.global_step}"
        for prompt, text in zip(prompts, texts):
            # Markdown keeps line breaks and symbols in text that is indented by four spaces
            indented = "\n".join("    " + line for line in escape_control_characters(text).split("\n"))
            tag = f"samples/{' '.join(prompt.split()) or 'empty prompt'}"
            writer.add_text(tag, f"{settings}\n\n{indented}", trainer.global_step - 1)  # as Lightning numbers scalars


class Pictures(FitCallback):
    """Draws figures of the net for TensorBoard's Images dashboard at validations 1, 2, 4, 8, ... and the last one. At the
    end, puts the embeddings of the 2,048 most frequent tokens in its Projector.

    - `attention`: attention weights over a line of text, one figure per head, with the tokens on both axes;
    - `bigram`: the probabilities in a bigram table, for the most frequent tokens;
    - `loss by position`: the validation loss at each position of the block;
    - `loss by token`: the beginning of the validation text, each token colored by its loss.

    Skipped if the net is sharded over devices (FSDP).

    Args:
        line: text for `attention`, of which the first 20 tokens are used; null uses the beginning of the validation text.
        blocks: blocks for `attention`, counted from 1; null uses the first and the last.
        heads: heads for `attention`, counted from 1.
    """

    def __init__(self, line: str | None = None, blocks: list[int] | None = None, heads: Sequence[int] = (1,)) -> None:
        self.line, self.blocks, self.heads = line, blocks, heads
        self._validations = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel) and pl_module.block_size is not None
        # nats and tokens at each position
        self._sums = torch.zeros(2, pl_module.block_size, dtype=SUM_DTYPE, device=pl_module.device)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *_: Any
    ) -> None:
        if summary_writer(trainer) is None or text_data(trainer) is None:
            return
        targets = as_batch(batch).targets
        if not isinstance(outputs, Tensor) or outputs.shape != targets.shape:
            raise UserError(
                "the callback Pictures needs the loss of each token, which LanguageModel.validation_step returns: return "
                "that, or leave out the callback"
            )
        if batch_idx == 0:
            self._first_targets, self._first_nats = targets, outputs  # (B, T)
        T = targets.size(1)
        self._sums[0, :T] += outputs.sum(0)
        self._sums[1, :T] += (targets != IGNORE_INDEX).sum(0)

    def on_fit_validation_end(self, trainer: Trainer, model: LanguageModel) -> None:
        sums = cast(Tensor, trainer.strategy.reduce(self._sums, reduce_op="sum"))  # on every rank
        writer, data = summary_writer(trainer), text_data(trainer)
        if writer is None or data is None or not trainer.is_global_zero or model.device_mesh:
            return
        self._validations += 1
        last = trainer.should_stop or 0 < model.total_steps <= trainer.global_step
        if last or self._validations.bit_count() == 1:  # a power of two
            seen = sums[1] > 0  # not all, if the windows are shorter than the network's block size
            for name, figure in self._figures(model, data, (sums[0, seen] / sums[1, seen]).cpu().numpy()):
                writer.add_figure(name, figure, trainer.global_step - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel) and pl_module.net is not None
        writer, data, vocab_size = summary_writer(trainer), text_data(trainer), pl_module.net.vocab_size
        tables = [module.weight for module in pl_module.net.modules() if isinstance(module, nn.Embedding)]
        table = next((weight for weight in tables if len(weight) == vocab_size), None)
        if writer is None or data is None or table is None or not trainer.is_global_zero or pl_module.device_mesh:
            return
        assert pl_module.tokenizer is not None
        ids = ids_by_frequency(data, vocab_size)[:PROJECTOR_TOKENS]
        labels = [pictures.visible(pl_module.tokenizer.id_to_piece(index)) for index in ids]
        writer.add_embedding(table.detach().float().cpu()[ids], labels, global_step=trainer.global_step, tag="tokens")

    def _figures(
        self, model: LanguageModel, data: TextDataModule, loss_by_position: Any
    ) -> Iterator[tuple[str, Figure]]:
        net, tokenizer = model.net, model.tokenizer
        assert net is not None and tokenizer is not None
        if isinstance(net, Transformer):
            ids = self._first_targets[0].tolist() if self.line is None else tokenizer.encode_prompt(self.line)
            ids = ids[: min(AXIS_TOKENS, net.block_size)]
            labels = [pictures.visible(tokenizer.id_to_piece(index)) for index in ids]
            maps = net.attention_maps(torch.tensor([ids], device=model.device))[:, 0]  # (L, H, T, T)
            for block, head in itertools.product(self.blocks or sorted({1, len(maps)}), self.heads):
                if 1 <= block <= len(maps) and 1 <= head <= maps.shape[1]:
                    weights = maps[block - 1, head - 1].float().cpu().numpy()
                    figure = pictures.token_matrix(weights, labels, "rows attend\nto columns", vmax=1.0)
                    yield f"attention/block {block} head {head}", figure
        if isinstance(net, Bigram):
            ids = ids_by_frequency(data, net.vocab_size)[:40]
            labels = [pictures.visible(tokenizer.id_to_piece(index), 8) for index in ids]
            table = net.table.weight.float().softmax(-1)[ids][:, ids].cpu().numpy()
            vmax = float(np.quantile(table, 0.995))
            yield "bigram", pictures.token_matrix(table, labels, "columns\nfollow rows", inches=6.5, vmax=vmax)
        yield "loss by position", pictures.loss_by_position(loss_by_position)
        targets, nats = self._first_targets, self._first_nats
        rows = max(1, 256 // targets.size(1))  # whole windows: at most 256 tokens, but at least one window
        scored = targets[:rows] != IGNORE_INDEX
        pieces = [tokenizer.id_to_piece(index) for index in targets[:rows][scored].tolist()]
        yield "loss by token", pictures.loss_by_token(pieces, nats[:rows][scored].cpu().numpy())


def ids_by_frequency(data: TextDataModule, vocab_size: int) -> list[int]:
    """All ids, the most frequent in the validation text first."""
    return np.argsort(-data.val_ids.counts(vocab_size), kind="stable").tolist()


class HParamsLogger(Callback):
    """Lists the run in TensorBoard's HParams: a sortable table of runs, with settings and last metrics."""

    METRICS = ("val/nats_per_char", "val/bpc", "gap/nats_per_char")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (writer := summary_writer(trainer)) is None or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LanguageModel) and pl_module.net is not None
        settings = pl_module.settings or {"model": {"net": pl_module.net.config}}
        params = {
            "parameters": pl_module.net.num_parameters,
            "steps": pl_module.total_steps,
            "precision": str(trainer.precision),
            **flatten({section: settings.get(section, {}) for section in ("data", "model")}),
        }
        params = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in params.items()
        }
        # not logger.log_hyperparams, which also logs a first value of each metric, before there is one
        for summary in hparams(params, dict.fromkeys(self.METRICS, 0.0)):  # type: ignore[no-untyped-call]  # torch's
            writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]  # torch's
