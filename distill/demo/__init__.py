"""The model that ships inside gguforge: its lessons, how it is trained, and where its checkpoint lies."""

from __future__ import annotations
