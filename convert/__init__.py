"""Convert: from a Hugging Face checkpoint to a plan of GGUF tensors."""
