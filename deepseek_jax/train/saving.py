"""Checkpoints of a run while its steps go on: when one is due, and what a failed one leads to."""

from typing import Any

import jax

from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import CheckpointConfig
from deepseek_jax.errors import RunError, SaveFailed
from deepseek_jax.runtime.agreement import all_true
from deepseek_jax.train.report import Report

SLOW_SECONDS = 10.0  # that a save waits for the one before without a word


class Saving:
    """The saves of one run, under `checkpoint.on_failure`.

    A run that goes on after a failure needs its last checkpoint all the same.
    """

    def __init__(self, config: CheckpointConfig, store: Store, report: Report):
        self._config, self._store, self._report = config, store, report
        self._goes_on = config.on_failure == "continue"

    def is_due(self, step: int) -> bool:
        """Whether a step that is not the last is saved."""
        return step % self._config.every_steps == 0

    def save(self, step: int, values: dict[str, Any], meta: dict[str, Any], last: bool) -> None:
        """Saves a step as `Store.save`, in all processes.

        Raises:
          RunError: it cannot be written, or the one before could not, and the run stops.
          manifest.NotFiniteLeaves: a leaf holds NaN or infinite values.
        """
        slow = f"the checkpoint of step {self._store.writing} is still being written"
        if last or not self._goes_on:
            if not self._store.done(SLOW_SECONDS):
                self._report.say(f"{slow}; training waits for it")
        elif not all_true(self._store.done(0.0)):
            self._report.say(f"{slow}; step {step} is not saved")
            return
        try:
            self._store.save(step, values, meta)
        except SaveFailed as error:
            if last or not self._goes_on:
                raise
            self._tell(error)

    def failure(self) -> RunError | None:
        """The error of a save in the background that stops the run."""
        error = self._store.failure()
        if isinstance(error, SaveFailed) and self._goes_on:
            self._tell(error)
            return None
        return error

    def _tell(self, error: SaveFailed) -> None:
        every = self._config.every_steps
        if jax.process_index() == 0:
            self._report.warn(f"{error}. Training goes on; a checkpoint is due every {every} steps")
