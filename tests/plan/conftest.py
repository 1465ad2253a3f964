"""Commands of the plan in this process: the fixture `typed`."""

from typed import typed  # noqa: F401
