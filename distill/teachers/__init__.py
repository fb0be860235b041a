"""Teachers: a GGUF file through llama.cpp, a checkpoint through torch, a server with an OpenAI-like interface."""
