"""Export to Hugging Face, GGUF, ONNX and torch.export; import from Hugging Face. Does not import lightning."""
