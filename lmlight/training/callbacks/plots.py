"""What a net looks like from inside, in TensorBoard: pictures at validations, and its embedding at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lmlight.data.loader import IGNORE_INDEX, Batch
from lmlight.data.tokenizer import Tokenizer
from lmlight.errors import UserError
from lmlight.models import Bigram, Net, Transformer
from lmlight.training.callbacks.base import validates_fit
from lmlight.training.datamodule import TextDataModule
from lmlight.training.metrics import SUM_DTYPE
from lmlight.training.module import LanguageModel

Picture = Literal["attention", "bigram", "positions", "loss_by_position", "surprise"]


class Pictures(Callback):
    """Draws the net for TensorBoard's Images, at validations.

    - `attention`: who looks at whom along a line, one picture a head, the tokens on the axes;
    - `bigram`: a bigram table's probabilities, for the most frequent tokens;
    - `positions`: learned positions, and how alike they are;
    - `loss_by_position`: the validation loss at each position of the block;
    - `surprise`: the beginning of the validation text, coloured by how surprising each token was.

    A net that is spread over devices (FSDP) is not drawn.

    Args:
        which: of the above; what the net does not have is passed over.
        line: the text for `attention`; null is the beginning of the validation text. The first `tokens` of it count.
        tokens: on each axis.
        blocks: for `attention`, counted from 1; null is the first and the last.
        heads: for `attention`, counted from 1.
        share: draw only as long as drawing has taken less than this share of the run's time; the last validation is always
            drawn.
    """

    def __init__(
        self,
        which: Sequence[Picture] = get_args(Picture),
        line: str | None = None,
        tokens: int = 20,
        blocks: list[int] | None = None,
        heads: Sequence[int] = (1,),
        share: float = 0.005,
    ) -> None:
        if tokens < 1:
            raise UserError(f"Pictures.tokens must be at least 1, got {tokens}")
        if not 0 <= share <= 1:
            raise UserError(f"Pictures.share must lie in [0, 1], got {share}")
        self.which, self.line, self.tokens = which, line, tokens
        self.blocks, self.heads, self.share = blocks, heads, share
        self._spent = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums: Tensor | None = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not validates_fit(trainer) or "loss_by_position" not in self.which:
            return
        assert isinstance(pl_module, LanguageModel) and pl_module.block_size is not None
        if self._sums is None:
            self._sums = torch.zeros(2, pl_module.block_size, dtype=SUM_DTYPE, device=pl_module.device)
        scored = batch.targets != IGNORE_INDEX
        self._sums[0, : scored.size(1)] += outputs.sum(0)
        self._sums[1, : scored.size(1)] += scored.sum(0)

    # not `on_validation_end`: a callback that averages the weights has taken the average away by then
    @torch.inference_mode()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not validates_fit(trainer) or not isinstance(data, TextDataModule):
            return
        assert isinstance(pl_module, LanguageModel) and pl_module.net is not None and pl_module.tokenizer is not None
        sums = None if self._sums is None else trainer.strategy.reduce(self._sums, reduce_op="sum")
        if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero or pl_module.device_mesh:
            return
        began = time.monotonic()
        last = trainer.should_stop or 0 < pl_module.total_steps <= trainer.global_step
        if self._spent > self.share * (began - self._began) and not last:
            return
        from lmlight import pictures  # Matplotlib takes a third of a second to import

        net, tokenizer = pl_module.net, pl_module.tokenizer
        figures: dict[str, Any] = {}
        if "attention" in self.which and isinstance(net, Transformer):
            for name, weights, labels in self._attention(net, tokenizer, data):
                figures[name] = pictures.attention_map(weights, labels)
        if "bigram" in self.which and isinstance(net, Bigram):
            figures["bigram"] = pictures.bigram_table(*_bigram(net, tokenizer, data))
        if "positions" in self.which and isinstance(net, Transformer) and net.positions is not None:
            figures["positions"] = pictures.positions(net.positions.weight.float().cpu().numpy())
        if isinstance(sums, Tensor):
            figures["loss by position"] = pictures.loss_by_position((sums[0] / sums[1].clamp(min=1)).cpu().numpy())
        if "surprise" in self.which:
            ids, nats = _surprise(net, data)
            figures["surprise"] = pictures.surprise([tokenizer.id_to_piece(index) for index in ids], nats)
        for name, figure in figures.items():
            trainer.logger.experiment.add_figure(name, figure, trainer.global_step)
        self._spent += time.monotonic() - began

    def _attention(self, net: Transformer, tokenizer: Tokenizer, data: TextDataModule) -> Any:
        """The name, the weights (T, T) and the labels of each picture."""
        from lmlight import pictures

        ids = data.val_ids[1 : self.tokens + 1].tolist() if self.line is None else tokenizer.encode_prompt(self.line)
        ids = ids[: min(self.tokens, net.block_size)]
        maps = net.attention_maps(torch.tensor([ids], device=net.head.weight.device))[:, 0].float().cpu().numpy()
        labels = [pictures.visible(tokenizer.id_to_piece(index)) for index in ids]
        for block in self.blocks or sorted({1, len(maps)}):
            for head in self.heads:
                if 1 <= block <= len(maps) and 1 <= head <= maps.shape[1]:
                    yield f"attention/block {block} head {head}", maps[block - 1, head - 1], labels


def _bigram(net: Bigram, tokenizer: Tokenizer, data: TextDataModule) -> tuple[Any, list[str]]:
    """Probabilities (K, K) among the most frequent tokens, and their labels."""
    from lmlight import pictures

    frequent = _by_frequency(data, net.vocab_size)[:40].copy()
    table = net.table.weight.float().softmax(-1).cpu().numpy()
    return table[np.ix_(frequent, frequent)], [
        pictures.visible(tokenizer.id_to_piece(int(index)), 8) for index in frequent
    ]


def _surprise(net: Net, data: TextDataModule, most: int = 256) -> tuple[list[int], Any]:
    """The first tokens of the validation text, in whole blocks, and the nats (N,) that each took."""
    T = min(net.block_size, len(data.val_ids) - 1)
    blocks = max(1, min(most, len(data.val_ids) - 1) // T)
    ids = torch.from_numpy(data.val_ids[: blocks * T + 1].astype(np.int64)).to(next(net.parameters()).device)
    inputs, targets = ids[:-1].view(blocks, T), ids[1:]
    nats = F.cross_entropy(net(inputs).flatten(0, 1).float(), targets, reduction="none")
    return targets.tolist(), nats.cpu().numpy()


def _by_frequency(data: TextDataModule, vocab_size: int) -> Any:
    """The ids, the most frequent in the validation text first."""
    return np.argsort(-data.val_ids.counts(vocab_size), kind="stable")


class TokenEmbedding(Callback):
    """The tokens' vectors for TensorBoard's Projector, with the pieces as labels, once, at the end.

    Args:
        most: so many of the most frequent tokens, for the files are text, 20 bytes a number.
    """

    def __init__(self, most: int = 2048) -> None:
        self.most = most

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(trainer.logger, TensorBoardLogger) or not isinstance(data, TextDataModule):
            return
        if not trainer.is_global_zero or pl_module.device_mesh:
            return
        assert isinstance(pl_module, LanguageModel) and pl_module.net is not None and pl_module.tokenizer is not None
        tables = (m for m in pl_module.net.modules() if isinstance(m, nn.Embedding))
        table = next((m for m in tables if m.num_embeddings == pl_module.net.vocab_size), None)
        if table is None:
            return
        from lmlight import pictures

        ids = _by_frequency(data, pl_module.net.vocab_size)[: self.most].copy()
        labels = [pictures.visible(pl_module.tokenizer.id_to_piece(int(index))) for index in ids]
        vectors = table.weight.detach().float().cpu()[ids]
        trainer.logger.experiment.add_embedding(vectors, labels, global_step=trainer.global_step, tag="tokens")
