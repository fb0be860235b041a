"""Students that read a whole text at once: masked words, attention relations, sentence embeddings."""
