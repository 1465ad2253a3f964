"""A training run from start to end.

One turn of the loop, in this order: stop, step, data, then check, watch, log and save of the step
before. A step is dispatched and not waited for. While the devices take it, the loop puts the next
batch beside it, reads the metrics of the step before, and writes its row and its checkpoint.
"""

import concurrent.futures
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from deepseek_jax import config as configs
from deepseek_jax.checkpoint import conversion, manifest
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import Config
from deepseek_jax.data import loader
from deepseek_jax.data.loader import TrainData
from deepseek_jax.errors import RunError
from deepseek_jax.hardware import xla_options
from deepseek_jax.model import execution, least_memory
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.parallel.pipeline import stage_assignment
from deepseek_jax.runtime import processes, progress
from deepseek_jax.runtime.agreement import raise_together
from deepseek_jax.train import (
    batches,
    last_score,
    lock,
    profiling,
    starting,
    state,
    survival,
    system_metrics,
    token_schedule,
    workdir,
)
from deepseek_jax.train.anomalies import Anomaly, NotFinite, Spike
from deepseek_jax.train.anomaly_rule import AnomalyRule
from deepseek_jax.train.batches import Inputs, Taken
from deepseek_jax.train.completions import Completions
from deepseek_jax.train.metrics import Row
from deepseek_jax.train.programs import RunPrograms
from deepseek_jax.train.report import Report
from deepseek_jax.train.saving import Saving
from deepseek_jax.train.step import tokens_spec

__all__ = ["NotFinite", "Run", "Spike", "Taken", "check_devices", "train"]


def train(
    config: Config, directory: Path, *, screen: bool = True, profile_steps: int | None = None
) -> dict[str, Any]:
    """Trains until `schedule.tokens` are consumed, from `directory`'s newest checkpoint if any.

    Args:
      screen: whether the run shows its progress; False writes the files only.
      profile_steps: number of steps to trace into `directory/profile`, after the first two steps
        of this process; None traces none.

    Returns:
      The summary that `summary.json` holds: step, tokens, the fields of `SystemMetrics`, the GPU
      kernels in use, held-out bits per byte and those of gzip. Where a signal ended the run early,
      `stopped` is true and there are no held-out scores.

    Raises:
      ConfigError: before the step is compiled or anything is written; another run has the workdir,
        for example.
      NotFinite, Spike: a loss, gradient norm or weight is NaN or infinite, or a loss or norm is far
        above those before, and `anomaly.rule` is "stop" or has been of no avail.
      RunError: the workdir is full or was removed, or another reason outside the config.
    """
    where = directory, directory / workdir.CHECKPOINTS
    with (
        survival.watched(config, directory),
        lock.held(directory) as own,
        survival.surviving(config, *where),
    ):
        config = check_devices(config)
        if profile_steps is not None:
            profiling.check(config, profile_steps)
        raise_together(lambda: workdir.check(directory, config))
        primary = processes.is_primary()
        report = Report(
            directory, total_tokens=config.schedule.tokens, screen=screen, primary=primary
        )
        traced = (profile_steps or 0) if primary else 0
        profiler = profiling.Profiler(directory, traced, report.say)
        with contextlib.closing(report):
            if obstacle := conversion.obstacle(directory, config):
                report.say(obstacle)
            return _train(config, own, report, profiler)


def _train(
    config: Config, own: lock.Lock, report: Report, profiler: profiling.Profiler
) -> dict[str, Any]:
    """Trains in a workdir that this run has to itself."""
    mesh, layout = meshes.build(config.mesh), meshes.layout(config)
    kernels = execution.kernels_of(config.precision)
    kept = config.checkpoint.keep
    checkpoints = own.directory / workdir.CHECKPOINTS
    with (
        Store(checkpoints, keep=kept, check=own.check) as store,
        survival.naming_the_lost(),
    ):
        meta = store.newest_meta()
        raise_together(lambda: workdir.check_library(config, meta))
        loader.import_reader()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            opening = pool.submit(_open_data, config, layout, mesh, report, meta)
            programs = RunPrograms(config, layout, mesh)
            fresh = starting.meanwhile(opening, config, programs, meta)
            data = raise_together(opening.result)
        with contextlib.closing(data), jax.set_mesh(mesh), programs:
            run = Run(config, programs, data, store, report, own, fresh)
            text = raise_together(lambda: last_score.text_of(config, data.corpus))
            # Checkpoints and data fit one another.
            raise_together(lambda: workdir.claim(own.directory, config, data.corpus))
            with contextlib.closing(profiler):
                summary = run.to_the_end(profiler)
            if not summary["stopped"] and text is not None:
                progress.current.enter("evaluation")
                report.say("scoring held-out text")
                report.load_plots()
                summary |= last_score.scores(programs.score.result, run.state, text)
    summary |= kernels.summary()
    if summary["stopped"]:
        report.say(f"stopped after step {summary['step']}; the same command goes on from there")
        report.settle()
    else:
        report.finish(summary)
    return summary


class Run:
    """A run from its newest checkpoint to its last step: `to_the_end` takes the turns.

    Attributes:
      state: the training state after the last step that was dispatched.
      steps, tokens: dispatched and consumed since the start of the run, in earlier processes too.
    """

    def __init__(
        self,
        config: Config,
        programs: RunPrograms,
        data: TrainData,
        store: Store,
        report: Report,
        own: lock.Lock,
        fresh: state.TrainState | None = None,
    ):
        """Restores the newest checkpoint of `store` and the data's position, or starts afresh.

        Args:
          fresh: the state of a fresh start, where it was built before.
        """
        self._config, self._data, self._store, self._report = config, data, store, report
        self._own = own
        self._programs, self._tokens_place = programs, programs.tokens_place
        self._saving = Saving(config.checkpoint, store, report)
        begun = self._take_up(fresh=fresh)
        self._rule = AnomalyRule(config, store, report, self._wait_among_several, begun.history)
        self._compiled_step: Any = None
        self._move_ema: Any = None
        self._stop = processes.StopSignal()
        self._problem: RunError | None = None  # of this process, which the others may not have
        self._system, self._completions = system_metrics.of(config), Completions()

    def _take_up(self, **how: Any) -> starting.Beginning:
        programs = self._programs
        places, adam = programs.places, programs.adam
        begun = starting.start(
            self._config, places, adam, self._store, self._data, self._report, **how
        )
        self.state, self.steps, self.tokens = begun.state, begun.steps, begun.tokens
        return begun

    def to_the_end(self, profiler: profiling.Profiler) -> dict[str, Any]:
        """Takes the steps that are left; SIGTERM ends the run early, after a checkpoint.

        Raises:
          RunError: in all processes, after the same step.

        Returns:
          step, tokens, stopped, and the system's fields over all steps of this process.
        """
        consumed = self._data.state()["consumed"]
        raise_together(lambda: self._report.begin(self.steps, self.tokens, consumed))
        self._report.say(_headline(self._config, self._data))
        self._system.start()
        taken: Taken | None = None  # the step in flight
        inputs, stopped = self.data(), False
        while inputs or taken:  # stop, step, data; then check, watch, log, save of the step before
            if taken and self._stop.reached(self._rule.undone + taken.number):
                inputs, stopped = None, True
            following = None
            if inputs and not (taken and profiler.is_due()):
                following = self.step(inputs, taken, profiler)
                inputs = self.data()
            if taken:
                last = not (following or inputs)
                found = self.check(taken)
                with self._system.excluded():
                    profiler.after_step()
                self.watch(taken)
                if stopped:
                    raise_together(self._raise_problem)
                if not found:
                    self.log(taken, last)
                    found = self.save(taken, last)
                if found:
                    self.rewind(found, taken, following)
                    following, inputs = None, None if stopped else self.data()
            taken = following
        summary = self._system.summary()
        with progress.current.inside("save"):
            self._store.settle()
        stopped = stopped and self.tokens < self._config.schedule.tokens
        self._stop.steps_are_over(stopped)
        ended = {"step": self.steps, "tokens": self.tokens, "stopped": stopped}
        return {**ended, **self._rule.counts(), **summary}

    def data(self) -> Inputs | None:
        """The micro-batches and the schedule's numbers of the next step; None after the last."""
        config = self._config
        if self.tokens >= config.schedule.tokens:
            return None
        count = token_schedule.micro_batches(config.batch, self.tokens)
        hyper = token_schedule.hyper(config.schedule, step=self.steps, tokens=self.tokens)
        with self._system.waiting_for_data():
            tokens = batches.take(self._data, config, self._tokens_place, count)
        return Inputs(tokens, count, hyper, self._data.state())

    def step(self, inputs: Inputs, before: Taken | None, profiler: profiling.Profiler) -> Taken:
        """Dispatches a step, which moves the state, and does not wait for its end.

        On a CPU it waits for the step before.

        Args:
          before: the step in flight, of which this one takes the state.
        """
        with self._system.excluded():
            profiler.before_step()
        arguments: tuple[Any, ...] = (
            dataclasses.replace(self.state, ema=None),
            inputs.tokens,
            np.int32(inputs.count),
            jax.tree.map(np.float32, inputs.hyper),
            *self._rule.limits(self.steps + 1),
        )
        if self._compiled_step is None:
            self._report.say("compiling the training step")
            with self._system.compiling(), progress.current.inside("compile"):
                self._compile()
            self._stop.install()  # before this step there is nothing to save
        if before and jax.default_backend() == "cpu":
            # With two steps in flight XLA would hold the temporaries of both in turn.
            jax.block_until_ready(before.metrics)
        if before and self._saving.is_due(before.number):
            before.copy = state.copy_to_host(self.state)
        with profiler.step(self.steps + 1), self._system.calling():
            moved, metrics = self._compiled_step(*arguments)  # which donates the state
            skipped = [metrics["skipped"]] if self._rule.skips else []
            ema = self.state.ema
            ema = None if ema is None else self._move_ema(ema, moved.params, *skipped)
        self.state = dataclasses.replace(moved, ema=ema)
        tokens = inputs.count * token_schedule.tokens_per_micro_batch(self._config.batch)
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        progress.current.dispatched(self.steps)
        within = jax.default_backend() == "cpu"
        self._system.dispatched(tokens, self._completions.expect(metrics), within=within)
        return Taken(self.steps, self.tokens, inputs, metrics)

    def check(self, taken: Taken) -> Anomaly | None:
        """Waits for the step; the anomaly that it is, where the run has to go back.

        Raises:
          NotFinite, Spike: it is one, and the run stops.
        """
        np.asarray(taken.metrics["loss"])  # waits
        self._system.done()
        progress.current.done()
        return self._rule.look(taken)

    def rewind(self, found: Anomaly, taken: Taken, following: Taken | None) -> None:
        """Goes back to the newest checkpoint, and in the data on to what follows the anomaly.

        The checkpoint before that one is taken where the newest has led to an anomaly again: its
        weights may be at fault. Without a checkpoint the run begins anew.
        """
        if following:
            self._system.done()
        with progress.current.inside("start"):
            self._wait_among_several()
            self._store.settle()
            self._rule.choose_checkpoint()
            self.state = None  # type: ignore[assignment]  # its memory is needed
            self._rule.rewound(found, self._take_up(position=taken.inputs.position))

    def watch(self, taken: Taken) -> None:
        """Looks for a save that failed, and for a workdir that is gone where a row is due.

        One process may see what the others do not, so it asks all of them to stop, as a signal
        would: after the same step all of them raise its error. A process alone raises it here.
        """
        try:
            if failed := self._saving.failure():
                raise failed
            if processes.is_primary() and self._row_is_due(taken.number):
                workdir.watch(self._own, self._store.newest, self._config, self._data.corpus)
        except RunError as error:
            if jax.process_count() == 1:
                raise
            self._problem = self._problem or error
            self._stop.request()

    def _raise_problem(self) -> None:
        if self._problem:
            raise self._problem

    def _row_is_due(self, step: int) -> bool:
        return step == 1 or step % self._config.log.every_steps == 0

    def log(self, taken: Taken, last: bool) -> None:
        """Reports the first step, every `log.every_steps`-th, the skipped ones and the last."""
        if self._row_is_due(taken.number) or last or taken.anomaly:
            self._report.step({**self._row(taken), **self._system.row()})

    def save(self, taken: Taken, last: bool) -> Anomaly | None:
        """Saves every `checkpoint.every_steps`-th step and the last.

        Returns:
          The anomaly of a step after which a weight, moment or average is no number, where the run
          has to go back.

        Raises:
          NotFinite: the same, and the run stops.
          RunError: it cannot be written, or the one before could not.
        """
        if not self._saving.is_due(taken.number) and not last:
            return None
        meta = {"tokens": taken.tokens, "data": taken.inputs.position, **self._rule.state()}
        meta |= workdir.of_this_python(self._config)
        self._wait_among_several()
        try:
            with progress.current.inside("save"):
                self._saving.save(taken.number, state.to_dict(taken.copy or self.state), meta, last)
        except manifest.NotFiniteLeaves as error:
            return self._rule.not_finite(taken, str(error))
        return None

    def _wait_among_several(self) -> None:
        """Waits for the steps in flight, before processes agree by programs on their devices."""
        if jax.process_count() > 1:
            jax.block_until_ready(self.state.step)

    def _compile(self) -> None:
        """Takes all that a turn of the loop runs, so that no later step compiles in its time."""
        compiled = self._programs.step.result()
        raise_together(lambda: least_memory.check_compiled(compiled, self._config))
        self._compiled_step = compiled
        if self.state.ema is not None:
            self._move_ema = self._programs.average.result()

    def _row(self, taken: Taken) -> Row:
        values = {name: np.asarray(value).tolist() for name, value in taken.metrics.items()}
        violations = values.pop("max_violation")
        values.pop("skipped", None)
        return {
            "step": taken.number,
            "tokens": taken.tokens,
            **values,
            "max_violation": max(violations, default=0.0),
            "layer_max_violation": violations,
            **dataclasses.asdict(taken.inputs.hyper),
            "sequences": taken.inputs.count * self._config.batch.micro_sequences,
            **self._rule.counts(),
            **({"anomaly": taken.anomaly} if taken.anomaly else {}),
        }


def check_devices(config: Config) -> Config:
    """The config with its mesh filled in, checked against the devices of this machine."""
    mesh = meshes.resolve(config.mesh, jax.device_count())
    config = dataclasses.replace(config, mesh=mesh)
    configs.check(config)
    configs.check_blocks(config)
    raise_together(lambda: least_memory.check_training(config))
    if mesh.pipe > 1:
        stage_assignment.assign_layers(config)
    xla_options.options(jax.default_backend(), config.layout.cost_profile)
    return config


def _open_data(
    config: Config, layout: Layout, mesh: Mesh, report: Report, meta: dict[str, Any] | None
) -> TrainData:
    """The training data of this process, made as for the checkpoint of `meta`, if there is one."""
    row, readers = batches.share(NamedSharding(mesh, tokens_spec(layout)), config)
    return TrainData(
        config.data,
        vocab=config.model.vocab,
        length=config.batch.length,
        micro_sequences=config.batch.micro_sequences,
        seed=config.seed,
        process_index=row,
        process_count=readers,
        say=report.say,
        resumes=(meta or {}).get("data"),
    )


def _headline(config: Config, data: TrainData) -> str:
    mesh = ", ".join(f"{name} {n}" for name, n in dataclasses.asdict(config.mesh).items() if n > 1)
    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    return f"{devices}{': ' + mesh if mesh else ''}; {data.facts.tokens:,} tokens of text"
