"""The model that ships inside gguforge: its lessons, how it is trained, and the demo that runs it.

lessons.txt      all that it was taught, written for this project; lessons.py reads it
data.py          conversations drawn from the lessons, packed into batches
tokenizer.py     sentencepiece and ChatML, cut as llama.cpp cuts them
model.py         a Llama in torch        train.py   makes the checkpoint in ../demo_model
text.py          the course as conversations, for recipes     score.py        what a model learned of it
demonstration.py converts, quantizes and asks it: what `gguforge demo` shows
"""

from __future__ import annotations
