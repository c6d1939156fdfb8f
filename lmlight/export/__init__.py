"""Trained models for other engines, and back: Hugging Face, GGUF, ONNX and torch.export. Does not import lightning."""
