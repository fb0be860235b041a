"""Runtime: runs GGUF models on llama.cpp."""
