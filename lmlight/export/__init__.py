"""Export to Hugging Face, GGUF, ONNX, torch.export and a web page; import from Hugging Face. None of it needs Lightning."""
