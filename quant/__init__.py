"""Quant: GGUF reading and writing, block types, presets. The ground floor: leans on numpy and gguf alone."""

VERSION = "0.1.0"
"""That of pyproject.toml: asking the installed package takes as long as a twentieth of a small run."""
