"""Distill: soft targets from teachers, students trained from them or on the blocks that ship, and the demo model."""
