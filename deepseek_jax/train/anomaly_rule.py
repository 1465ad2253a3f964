"""Reaction of a run to an anomaly by `anomaly.rule`, the same in all processes.

All processes read the same loss and gradient norm, which are sums over all devices, and keep the
same history; so they decide alike without a word to one another.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import Config
from deepseek_jax.errors import RunError
from deepseek_jax.runtime.agreement import from_primary
from deepseek_jax.train.anomalies import Anomaly, History, Limits
from deepseek_jax.train.batches import Taken
from deepseek_jax.train.metrics import Row
from deepseek_jax.train.report import Report
from deepseek_jax.train.starting import Beginning


class AnomalyRule:
    """The rule of one run, with the history by which it decides.

    Attributes:
      undone: steps that rewinds have undone, over the whole process.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        report: Report,
        wait: Callable[[], None],
        history: dict[str, Any] | None = None,
    ):
        """A rule that begins at a checkpoint.

        Args:
          wait: waits for the steps in flight, before processes agree by programs of their devices.
          history: of the checkpoint; None for that of a fresh run.
        """
        self._config, self._store, self._report, self._wait = config, store, report, wait
        self._history = History(config.anomaly, history)
        self._rewound_to: int | None = None
        self.undone = 0

    @property
    def skips(self) -> bool:
        """Whether the compiled step decides, by `limits`, whether to skip its update."""
        return self._config.anomaly.rule == "skip"

    def limits(self, step: int) -> tuple[Limits, ...]:
        """Arguments of a step that decides; none for another."""
        if not self.skips:
            return ()
        found = self._history.limits(step)
        return (Limits(np.float32(found.loss), np.float32(found.grad_norm)),)

    def state(self) -> dict[str, Any]:
        """Content for a checkpoint."""
        return self._history.state()

    def counts(self) -> Row:
        """Fields of a row and of the summary."""
        return {"skipped_steps": self._history.skipped, "rewinds": self._history.rewinds}

    def look(self, taken: Taken) -> Anomaly | None:
        """Reads a step's loss and norm; the anomaly that it is, where the run has to go back.

        Raises:
          NotFinite, Spike: it is one, and the run stops.
        """
        loss, norm = _values(taken)
        skipped = taken.metrics.get("skipped")
        told = None if skipped is None else bool(np.asarray(skipped))
        kind, limits = self._history.judge(taken.number, loss, norm, told)
        if not kind:
            return None
        found = self._anomaly(taken, kind, limits)
        if told and not self._history.too_many():
            self._history.skipped += 1
            taken.anomaly = kind
            self._report.anomaly(found, "skipped")
            return None
        return self._go_back_or_stop(found)

    def not_finite(self, taken: Taken, leaves: str) -> Anomaly:
        """The anomaly of a step after which these leaves of the state are not finite.

        The loss of the step is that of the weights before it, so it has not shown this.

        Raises:
          NotFinite: the run stops.
        """
        self._history.count()
        limits = self._history.limits(taken.number)
        return self._go_back_or_stop(self._anomaly(taken, "weights not finite", limits, leaves))

    def choose_checkpoint(self) -> None:
        """Gives up the newest checkpoint if it led to an anomaly again, and another is there."""
        newest, several = self._store.newest, len(self._store.steps()) > 1
        if newest == self._rewound_to and from_primary(several):
            self._store.reject(newest)

    def rewound(self, found: Anomaly, begun: Beginning) -> None:
        """Notes that the run has gone back."""
        self._history = self._history.after_rewind(begun.history)
        self._rewound_to = self._store.newest
        self.undone += found.step - begun.steps
        self._report.anomaly(found, f"rewound to step {begun.steps}")
        self._report.rewind(begun.steps, begun.tokens)

    def _anomaly(self, taken: Taken, kind: str, limits: Limits, leaves: str = "") -> Anomaly:
        end = taken.inputs.position["consumed"]
        first = end - taken.inputs.count * self._config.batch.micro_sequences
        numbers = taken.number, taken.tokens, (first, end - 1)
        return Anomaly(*numbers, kind, *_values(taken), limits, leaves)

    def _go_back_or_stop(self, found: Anomaly) -> Anomaly:
        """The anomaly, if the run goes back; raises its error otherwise."""
        config, streak = self._config.anomaly, self._history.streak
        if config.rule == "rewind" and not self._history.too_many():
            return found
        self._wait()
        with contextlib.suppress(RunError):
            self._store.settle()
        newest = self._store.newest
        kept = f"the last good checkpoint is step {newest}" if newest else "there is no checkpoint"
        cure = "Lower schedule.learning_rate, look at the data of this step, or "
        if config.rule == "stop":
            cure += "set anomaly.rule=skip or anomaly.rule=rewind"
        else:
            cure = f"It is anomaly {streak} in a row (anomaly.most={config.most}). {cure}"
            cure += "raise anomaly.most"
        self._report.anomaly(found, "stopped")
        self._report.draw()
        raise found.error(kept, cure)


def _values(taken: Taken) -> tuple[float, float]:
    loss, norm = (np.asarray(taken.metrics[name]).item() for name in ("loss", "grad_norm"))
    return loss, norm
