"""Rotary position embeddings (RoPE), Su et al. 2021 (https://arxiv.org/abs/2104.09864).

Axes: T positions, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_cache(length: int, head_size: int, theta: float = 10000.0) -> Tensor:
    """Compute the rotation of each pair of channels at each position.

    Args:
        length: T.
        head_size: D, even.
        theta: the base of the frequencies.

    Returns:
        (2, T, D / 2): cosines, then sines.
    """
    # float64 keeps late positions exact; MPS lacks it, and Lightning builds networks on the accelerator
    channels = torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu")
    frequencies = theta ** (-channels / head_size)  # (D / 2,)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)  # (T, D / 2)
    return torch.stack((angles.cos(), angles.sin())).float().to(torch.get_default_device())


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate channels i and i + D/2 by the angle of the position.

    Args:
        x: (..., T, D).
        rope: (2, T, D / 2), from `rope_cache`.

    Returns:
        (..., T, D), in the data type of `x`.
    """
    cos, sin = rope.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
