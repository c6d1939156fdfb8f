"""Rotary position embeddings (RoPE), Su et al. 2021 (https://arxiv.org/abs/2104.09864)."""

import torch
from torch import Tensor


def rope_cache(length: int, head_size: int, theta: float = 10000.0) -> Tensor:
    """Compute the cosines and sines of the rotations at T = `length` positions: (2, T, D / 2) for heads of D channels."""
    # always on the CPU: the angles need float64, which MPS lacks
    channels = torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu")
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, theta ** (-channels / head_size))  # (T, D / 2)
    return torch.stack((angles.cos(), angles.sin())).float().to(torch.get_default_device())


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate channels i and i + D/2 of `x` (..., T, D) by the angles in `rope`, broadcast to (2, ..., T, D / 2)."""
    cos, sin = rope.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
