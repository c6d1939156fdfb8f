"""Export to Hugging Face, GGUF, ONNX, torch.export, a web page; import from Hugging Face. None of it imports Lightning."""
