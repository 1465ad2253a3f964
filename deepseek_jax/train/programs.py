"""Compiled programs of a run: the step, the update of the average, and the score of weights.

A run of one process on a CPU compiles them in threads, beside one another and beside the
preparation of its text: XLA works without Python's lock, and its serial passes leave cores idle.
Several processes compile in the order in which they ask. So does a GPU, on which the compiler
measures kernels, which other work would disturb.
"""

import dataclasses
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import Config
from deepseek_jax.hardware import xla_options
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.runtime.background import in_background
from deepseek_jax.train import evaluation, optimizer, state
from deepseek_jax.train.step import abstract_arguments, make_ema, make_step, tokens_spec

T = TypeVar("T")


class OnDemand(Generic[T]):
    """A value that is made when it is asked for, or before that in a thread."""

    def __init__(self, make: Callable[[], T], name: str):
        """Makes nothing yet.

        Args:
          name: of the thread.
        """
        self._make, self._name = make, name
        self._future: Future[T] | None = None

    def begin(self) -> None:
        """Makes the value in a thread from now on."""
        self._future = self._future or in_background(self._make, self._name)

    def result(self) -> T:
        """The value, or the error of making it; made in this thread unless `begin` was called."""
        return self._make() if self._future is None else self._future.result()

    def wait(self) -> None:
        """Waits for the thread, if there is one."""
        futures.wait([self._future] if self._future else [])


class RunPrograms:
    """The programs of a run, each compiled once.

    Leaving its context waits for their threads, unless an error is on its way.

    Attributes:
      mesh, adam: the mesh and the optimizer.
      places, tokens_place: placement of the state, and of a step's tokens.
      step: the compiled step of `make_step`, which donates the state; the state has no average.
      average: the compiled update of `make_ema`.
      score: `evaluation.make_score` for the weights of a state.
    """

    def __init__(self, config: Config, layout: Layout, mesh: Mesh):
        """Compiles nothing yet."""
        self._config, self._layout, self.mesh = config, layout, mesh
        self.tokens_place = NamedSharding(mesh, tokens_spec(layout))
        self.adam = optimizer.build(config.optimizer)
        with jax.set_mesh(mesh):
            self.places = state.shardings(config, layout, mesh, self.adam)
        self._others_begin = False
        self.step: OnDemand[Any] = OnDemand(self._make_step, "compile the step")
        self.average: OnDemand[Any] = OnDemand(self._make_average, "compile the average")
        self.score: OnDemand[evaluation.ScoreFn] = OnDemand(self._make_score, "compile the score")

    def __enter__(self) -> "RunPrograms":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            for program in (self.step, self.average, self.score):  # the step begins the others
                program.wait()

    def begin(self, *, steps: bool) -> None:
        """Compiles in threads from now on, in a run of one process on a CPU.

        Args:
          steps: whether the run takes steps; one that is at its end only scores its weights.
        """
        if jax.process_count() > 1 or jax.default_backend() != "cpu":
            return
        self._others_begin = True
        if steps:
            self.step.begin()
        else:
            self._begin_score()

    def _begin_score(self) -> None:
        if self._config.evaluation.tokens:
            self.score.begin()

    def _make_step(self) -> Any:
        config, layout, mesh = self._config, self._layout, self.mesh
        options = xla_options.options(jax.default_backend(), config.layout.cost_profile)
        with self._context():
            made = jax.jit(
                make_step(config, layout, mesh, self.adam),
                donate_argnums=0,
                out_shardings=(dataclasses.replace(self.places, ema=None), None),
            )
            like = dataclasses.replace(self._like(), ema=None)
            lowered = made.lower(like, *abstract_arguments(config, layout, mesh))
            if self._others_begin:  # not before: tracing holds Python's lock
                if self.places.ema is not None:
                    self.average.begin()
                self._begin_score()
            return lowered.compile(compiler_options=options)

    def _make_average(self) -> Any:
        with self._context():
            like, update = self._like(), make_ema(self._config, self.places)
            may_skip = self._config.anomaly.rule == "skip"
            whole = NamedSharding(self.mesh, PartitionSpec())
            skipped = jax.ShapeDtypeStruct((), bool, sharding=whole)
            arguments = (like.ema, like.params, *([skipped] if may_skip else []))
            return update.lower(*arguments).compile()

    def _make_score(self) -> evaluation.ScoreFn:
        with self._context():
            like = self._like()
            return evaluation.make_score(
                self._config, self._layout, self.mesh, compiled_for=(like.params, like.bias)
            )

    def _like(self) -> state.TrainState:
        return state.abstract(self._config, self.places, self.adam)

    def _context(self) -> Any:
        """The mesh and Flax's mode, both of which belong to a thread."""
        nnx.set_graph_mode(False)
        nnx.set_graph_updates(False)
        return jax.set_mesh(self.mesh)
