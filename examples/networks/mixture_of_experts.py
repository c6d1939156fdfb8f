"""A transformer whose MLPs are mixtures of experts: more weights at the same cost per token.

- A router picks `top_k` of the experts for each token and weighs their outputs.
- It sees that token's vector only, and no expert has a limited capacity. So a token's experts do not depend on later tokens.
- The training loss has a term that is smallest if all experts are used equally. Validation leaves it out.

Axes: N = B T tokens, C = n_embd channels, E experts, K = top_k.

Papers: Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538); the balancing loss, Switch Transformer, Fedus et al. 2021
(https://arxiv.org/abs/2101.03961); weights from the chosen experts only, Mixtral, Jiang et al. 2024
(https://arxiv.org/abs/2401.04088).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlight import Transformer
from lmlight.errors import UserError
from lmlight.models.transformer import MLP


class Experts(nn.Module):
    """A router and E MLPs, of which each token passes through K.

    Attributes:
        balance_loss: of the last batch; 1 if experts are used equally, up to E / K if only K are used.
    """

    def __init__(self, experts: list[MLP], n_embd: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.router = top_k, nn.Linear(n_embd, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        self.balance_loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (N, C)
        shares = self.router(tokens).softmax(-1)  # (N, E)
        weights, chosen = shares.topk(self.top_k)  # (N, K)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, choice = (chosen == number).nonzero(as_tuple=True)  # (n,) each
            y = y.index_add(0, token, (expert(tokens[token]) * weights[token, choice, None]).to(y.dtype))
        used = F.one_hot(chosen, len(self.experts)).float().mean((0, 1))  # (E,) share of the choices
        self.balance_loss = len(self.experts) * (used * shares.mean(0)).sum()
        return y.view_as(x)


class MixtureOfExperts(Transformer):
    """A `Transformer` with a mixture of experts in place of each MLP.

    Args:
        vocab_size: V.
        block_size: the longest context, in tokens.
        num_experts: MLPs per block.
        top_k: MLPs that each token passes through.
        balance_weight: weight of the balancing loss.
        intermediate_size: hidden size of each expert. Null means that of `Transformer`'s MLP, divided by `top_k`.
        kwargs: arguments of `Transformer`.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        num_experts: int = 4,
        top_k: int = 2,
        balance_weight: float = 0.01,
        intermediate_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(vocab_size, block_size, **kwargs)
        if not 1 <= top_k <= num_experts:
            raise UserError(f"top_k must be from 1 to num_experts {num_experts}, got {top_k}")
        self.balance_weight = balance_weight
        for block in self.blocks:
            dense, n_embd = block.mlp, self.embedding.embedding_dim
            size, bias = intermediate_size or self.intermediate_size // top_k, dense.up.bias is not None
            experts = [MLP(n_embd, size, dense.kind, dense.dropout, bias) for _ in range(num_experts)]
            block.mlp = Experts(experts, n_embd, top_k)
            for name, parameter in block.mlp.named_parameters():  # as in Transformer
                nn.init.normal_(parameter, std=0.0 if name.endswith(("down.weight", "bias")) else 0.02)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        loss = super().loss(idx, targets)
        return loss + self.balance_weight * torch.stack([block.mlp.balance_loss for block in self.blocks]).mean()

    def flops_per_token(self) -> int:
        """Count the experts that a token passes through."""
        idle = [expert for block in self.blocks for expert in block.mlp.experts[block.mlp.top_k :]]
        return super().flops_per_token() - 2 * sum(p.numel() for mlp in idle for p in mlp.parameters() if p.dim() == 2)
