"""A profile of a few steps of a run, for TensorBoard and Perfetto.

`workdir/profile/plugins/profile/TIME/` holds the trace as `HOST.xplane.pb` and
`HOST.trace.json.gz` (TensorBoard) and as `perfetto_trace.json.gz` (Perfetto). Of many processes,
process 0 alone writes one.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from deepseek_jax.config import BatchConfig, Config, ConfigError
from deepseek_jax.errors import reason
from deepseek_jax.train import token_schedule

PROFILE = "profile"
SKIPPED = 2  # steps before the profile: the first ones still allocate and warm caches


def check(config: Config, profile_steps: int) -> None:
    """Raises ConfigError where the run has not so many steps after the first two."""
    if profile_steps < 1:
        raise ConfigError(f"profile_steps={profile_steps}; expected at least 1 step")
    wanted = SKIPPED + profile_steps
    found = _steps(config.batch, config.schedule.tokens, wanted)
    if found < wanted:
        raise ConfigError(
            f"profile_steps={profile_steps} begins after {SKIPPED} steps, and the run has "
            f"{found} (schedule.tokens={config.schedule.tokens}); expected at most "
            f"{max(found - SKIPPED, 0)}"
        )


def _steps(batch: BatchConfig, tokens: int, most: int) -> int:
    """Steps of a run of so many tokens, counted up to `most`."""
    done = steps = 0
    while done < tokens and steps < most:
        micro_batches = token_schedule.micro_batches(batch, done)
        done += micro_batches * token_schedule.tokens_per_micro_batch(batch)
        steps += 1
    return steps


class Profiler:
    """Traces `steps` steps of this process after the first two; with steps=0 it does nothing."""

    def __init__(self, directory: Path, steps: int, say: Callable[[str], None]):
        self._directory, self._say = directory / PROFILE, say
        self._steps, self._begun, self._seen, self._tracing = steps, 0, 0, False

    def is_due(self) -> bool:
        """Whether the trace begins or ends before the next step: none may be in flight then."""
        return self._steps > 0 and self._begun in (SKIPPED, SKIPPED + self._steps)

    def before_step(self) -> None:
        """Starts the trace where this is the first of the steps to be traced."""
        if self._steps and self._begun == SKIPPED:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # the device and XLA's calls are enough, and small
            try:
                jax.profiler.start_trace(
                    self._directory, create_perfetto_trace=True, profiler_options=options
                )
                self._tracing = True
            except Exception as error:
                self._failed(error)

    def step(self, number: int) -> contextlib.AbstractContextManager[object]:
        """The span in which one step is dispatched, under the number of the step."""
        self._begun += 1
        if not self._tracing:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after_step(self) -> None:
        """Counts a step that is done; writes the trace after the last that is to be traced."""
        self._seen += 1
        if self._tracing and self._seen == SKIPPED + self._steps:
            self.close()

    def close(self) -> None:
        """Writes the trace that is under way, if any; may be called twice.

        A trace that cannot be written, as on a full disk, is no reason to end a run.
        """
        if self._steps and self._seen <= SKIPPED and not self._tracing:
            self._say(f"no profile: this process took {self._seen} step(s)")
            self._steps = 0
        if self._tracing:
            self._tracing = False
            try:
                jax.profiler.stop_trace()
            except Exception as error:  # JAX writes files, packs them and asks its plugins
                self._failed(error)
                return
            self._say(f"wrote the profile of {self._seen - SKIPPED} step(s) to {self._directory}")

    def _failed(self, error: Exception) -> None:
        self._steps = 0
        self._say(f"no profile: {self._directory} cannot be written ({reason(error)})")
