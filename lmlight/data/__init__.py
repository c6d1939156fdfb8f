"""From text to batches of tokens. Only `loader` and `streaming` import torch, so worker processes start quickly."""
