"""State with which a run starts: that of its newest checkpoint, or a fresh one."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from concurrent import futures
from typing import Any

import jax
import optax

from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data.loader import TrainData
from deepseek_jax.train import index_training, state
from deepseek_jax.train.programs import RunPrograms
from deepseek_jax.train.report import Report

UNIFORM = (
    "the indexers start beside random weights, whose attention is nearly uniform, and may learn to "
    "score all positions 0; V3.2 trains them after pre-training (docs/one_node.md)"
)
_GRACE = 0.3  # seconds in which most bad text is found


def meanwhile(
    opening: futures.Future[Any],
    config: Config,
    programs: RunPrograms,
    meta: Mapping[str, Any] | None,
) -> state.TrainState | None:
    """Begins to compile, and builds a fresh state, while another thread prepares the text.

    Nothing is begun for text that is found to be bad at once.

    Args:
      opening: the other thread's work.
      meta: of the newest checkpoint, if there is one.

    Returns:
      The state; None where a checkpoint has it, where the text is there by now, and in a run of
      several processes, which build theirs later, in the same order.
    """
    there, _ = futures.wait([opening], timeout=_GRACE)
    if there and opening.exception():
        return None
    done = meta["tokens"] if meta and not meta.get("weights_only") else 0
    programs.begin(steps=done < config.schedule.tokens)
    if there or meta or jax.process_count() > 1:
        return None
    with jax.set_mesh(programs.mesh):
        return state.initialise(config, programs.places, programs.adam)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Beginning of a run, or of the rest of it.

    Attributes:
      state: the training state.
      steps, tokens: taken and consumed before it.
      history: of the steps before it, for `anomalies.History`; None where there were none.
    """

    state: state.TrainState
    steps: int = 0
    tokens: int = 0
    history: dict[str, Any] | None = None


def start(
    config: Config,
    places: state.TrainState,
    adam: optax.GradientTransformation,
    store: Store,
    data: TrainData,
    report: Report,
    fresh: state.TrainState | None = None,
    position: dict[str, Any] | None = None,
) -> Beginning:
    """Beginning of a run at its newest checkpoint, or a fresh one.

    A checkpoint of weights alone is a fresh start from these weights.

    Args:
      position: of the data from which to go on; None for that of the checkpoint.
    """
    averaged = False  # whether the checkpoint holds an average

    @functools.cache
    def abstract() -> state.TrainState:
        return state.abstract(config, places, adam)

    def held(meta: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
        nonlocal averaged
        averaged = any(name.startswith("ema.") for name in names)
        if meta.get("weights_only"):
            return state.weights_only(abstract())
        wanted = state.to_dict(abstract())
        return wanted if averaged else {name: wanted[name] for name in wanted if name != "ema"}

    restored = store.restore(held, spare="ema")
    if position is not None:
        data.restore(position)
    if restored is None:
        if index_training.in_training(config).index_loss != "none":
            report.say(UNIFORM)
        return Beginning(fresh or state.initialise(config, places, adam))
    step, values, meta = restored
    if meta.get("weights_only"):
        report.say("starting from the weights of another checkpoint")
        return Beginning(state.begin(config, abstract(), adam, values))
    if position is None:
        restore_data(data, meta, config)
        report.say(f"resumed from step {step}, {meta['tokens']:,} tokens in")
    if places.ema is None and averaged:
        report.say("optimizer.ema_decay=0: the checkpoint's average of the weights is left out")
    if places.ema is not None and not averaged:
        report.say(f"the checkpoint has no average of the weights; it begins at step {step}")
        values = state.begin_average(abstract(), values)
    now = state.from_dict(abstract(), values)
    return Beginning(now, step, int(meta["tokens"]), meta.get("anomalies"))


def restore_data(data: TrainData, meta: dict[str, Any], config: Config) -> None:
    """Moves the data to the position of a checkpoint.

    Raises:
      ConfigError: the data is not that of the checkpoint.
    """
    try:
        data.restore(meta["data"])
    except ConfigError as error:
        if config.data.path:
            raise
        # Before checkpoints kept the version, nothing said which Python's library it was.
        raise ConfigError(
            f"{error}. data.path='' is the running Python's library: resume with the Python that "
            "made this run, or begin a new workdir with --config.data.path=FOLDER"
        ) from error
