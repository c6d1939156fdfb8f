"""What a net has learned, in TensorBoard: figures at validations, and the token embedding at the end of training."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor, nn

from lmlight import pictures
from lmlight.data.loader import IGNORE_INDEX, Batch, as_batch
from lmlight.errors import UserError
from lmlight.models import Bigram, Transformer
from lmlight.training.callbacks.base import FitCallback, summary_writer, text_data
from lmlight.training.datamodule import TextDataModule
from lmlight.training.metrics import SUM_DTYPE
from lmlight.training.module import LanguageModel

AXIS_TOKENS = 20  # on each axis of an attention map
PROJECTOR_TOKENS = 2048  # the files for the Projector are text, 20 bytes a number


class Pictures(FitCallback):
    """Draws figures of the net for TensorBoard's Images page, at validations.

    - `attention`: attention weights over a line of text, one figure per head, with the tokens on both axes;
    - `bigram`: the probabilities in a bigram table, for the most frequent tokens;
    - `positions`: the learned position embeddings and their cosine similarities;
    - `loss by position`: the validation loss at each position of the block;
    - `surprise`: the beginning of the validation text, each token coloured by its loss.

    Skipped if the net is sharded over devices (FSDP).

    Args:
        line: text for `attention`, of which the first 20 tokens are used; null takes the beginning of the validation text.
        blocks: blocks for `attention`, counted from 1; null takes the first and the last.
        heads: heads for `attention`, counted from 1.
        share: draw only while drawing has taken less than this share of the run's time; the last validation is always
            drawn.
    """

    def __init__(
        self,
        line: str | None = None,
        blocks: list[int] | None = None,
        heads: Sequence[int] = (1,),
        share: float = 0.005,
    ) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"Pictures.share must be in [0, 1], got {share}")
        self.line, self.blocks, self.heads, self.share = line, blocks, heads, share

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._spent = time.monotonic(), 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel) and pl_module.block_size is not None
        # nats and tokens at each position
        self._sums = torch.zeros(2, pl_module.block_size, dtype=SUM_DTYPE, device=pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        targets = as_batch(batch).targets
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
        began = time.monotonic()
        last = trainer.should_stop or 0 < model.total_steps <= trainer.global_step
        if self._spent > self.share * (began - self._began) and not last:
            return
        for name, figure in self._figures(model, data, (sums[0] / sums[1].clamp(min=1)).cpu().numpy()):
            writer.add_figure(name, figure, trainer.global_step)
        self._spent += time.monotonic() - began

    def _figures(
        self, model: LanguageModel, data: TextDataModule, loss_by_position: Any
    ) -> Iterator[tuple[str, Figure]]:
        net, tokenizer = model.net, model.tokenizer
        assert net is not None and tokenizer is not None
        if isinstance(net, Transformer):
            ids = self._first_targets[0].tolist() if self.line is None else tokenizer.encode_prompt(self.line)
            ids = ids[: min(AXIS_TOKENS, net.block_size)]
            labels = [pictures.visible(tokenizer.id_to_piece(index)) for index in ids]
            maps = (
                net.attention_maps(torch.tensor([ids], device=model.device))[:, 0].float().cpu().numpy()
            )  # (L, H, T, T)
            for block, head in itertools.product(self.blocks or sorted({1, len(maps)}), self.heads):
                if 1 <= block <= len(maps) and 1 <= head <= maps.shape[1]:
                    figure = pictures.attention_map(maps[block - 1, head - 1], labels)
                    yield f"attention/block {block} head {head}", figure
            if net.positions is not None:
                yield "positions", pictures.positions(net.positions.weight.float().cpu().numpy())
        if isinstance(net, Bigram):
            ids = ids_by_frequency(data, net.vocab_size)[:40]
            labels = [pictures.visible(tokenizer.id_to_piece(index), 8) for index in ids]
            table = net.table.weight.float().softmax(-1)[ids][:, ids]
            yield "bigram", pictures.bigram_table(table.cpu().numpy(), labels)
        yield "loss by position", pictures.loss_by_position(loss_by_position)
        targets, nats = self._first_targets, self._first_nats
        rows = max(1, 256 // targets.size(1))  # whole windows, 256 tokens or one window
        scored = targets[:rows] != IGNORE_INDEX
        pieces = [tokenizer.id_to_piece(index) for index in targets[:rows][scored].tolist()]
        yield "surprise", pictures.surprise(pieces, nats[:rows][scored].cpu().numpy())


def ids_by_frequency(data: TextDataModule, vocab_size: int) -> list[int]:
    """All ids, the most frequent in the validation text first."""
    ids: list[int] = np.argsort(-data.val_ids.counts(vocab_size), kind="stable").tolist()
    return ids


class TokenEmbedding(Callback):
    """Writes the embeddings of the 2,048 most frequent tokens for TensorBoard's Projector, at the end of training."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer, data = summary_writer(trainer), text_data(trainer)
        if writer is None or data is None or not trainer.is_global_zero or pl_module.device_mesh:
            return
        assert isinstance(pl_module, LanguageModel) and pl_module.net is not None and pl_module.tokenizer is not None
        vocab_size, tokenizer = pl_module.net.vocab_size, pl_module.tokenizer
        tables = [m.weight for m in pl_module.net.modules() if isinstance(m, nn.Embedding)]
        table = next((weight for weight in tables if len(weight) == vocab_size), None)
        if table is not None:
            ids = ids_by_frequency(data, vocab_size)[:PROJECTOR_TOKENS]
            labels = [pictures.visible(tokenizer.id_to_piece(index)) for index in ids]
            writer.add_embedding(
                table.detach().float().cpu()[ids], labels, global_step=trainer.global_step, tag="tokens"
            )
