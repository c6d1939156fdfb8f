"""From text to batches of tokens. Only `loader` imports torch, so worker processes start quickly."""
