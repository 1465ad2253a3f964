"""Fixture of the tests of commands."""

from typed import typed  # noqa: F401
