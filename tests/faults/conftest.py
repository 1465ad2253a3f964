"""Fixtures: commands in this process."""

from typed import typed  # noqa: F401
