"""Quant: GGUF reading and writing, block types, presets. The ground floor: leans on numpy and gguf alone."""
