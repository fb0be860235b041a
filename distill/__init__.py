"""Distill: soft targets from teachers, students trained on them and on the blocks they ship in, the demo model."""
