"""Distill: small students from large teachers; for now, the demo model and the script that trains it."""
