"""What a run is: one ConfigDict in, frozen dataclasses checked as a whole out.

`parse` is the only way in. It names the key to change in every message, and runs before anything
is compiled or written. Numbers and their sources are in `configs/v3_671b.py`; nothing here has a
default.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """The config cannot work; the message names the key and what would."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and rules of the model, section 2 of the report; widths in numbers, not bytes."""

    vocab: int
    layers: int
    dense_layers: int
    d_model: int
    d_dense: int
    heads: int
    q_latent: int
    kv_latent: int
    d_nope: int
    d_rope: int
    d_value: int
    rope_theta: float
    yarn_factor: float
    yarn_original: int
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_mscale: float
    yarn_mscale_all_dim: float
    experts: int
    shared_experts: int
    top_k: int
    groups: int
    top_groups: int
    d_expert: int
    score: str
    group_score: str
    normalise_weights: bool
    routed_scale: float
    mtp_depth: int
    norm_eps: float
    init_std: float

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def d_shared(self) -> int:
        """Width of the shared experts, which are one feed-forward network."""
        return self.shared_experts * self.d_expert


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, outermost first; at most one may be -1: all that are left."""

    pipe: int
    replica: int
    node: int
    gpu: int
    tensor: int


MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))  # outermost first
DATA_AXES = ("replica", "node", "gpu")  # along these, devices see different tokens

# The logical axes that a parameter or an activation may carry, each with the mesh axes that a rule
# may split it over: those for which the model has the collectives that give the same result.
SPLITS: dict[str, tuple[str, ...]] = {
    "batch": DATA_AXES,
    "layer": (),
    "model": (),
    "vocab": ("gpu", "tensor"),
    "heads": ("tensor",),
    "q_latent": (),
    "kv_latent": (),
    "head_width": (),
    "dense_width": ("gpu", "tensor"),
    "expert_width": ("tensor",),
    "experts": DATA_AXES,
}
LOGICAL_AXES = tuple(SPLITS)


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """Where things live and what is kept: results never depend on it."""

    zero: int
    dispatch: str
    buffer: float
    micro_batches_in_flight: int
    pipeline: str
    stage_layers: tuple[int, ...]
    ramps: str
    defer_weight_gradients: bool
    cost_profile: str
    recompute: str
    attention_block: int
    unroll: int
    loss_chunk: int
    rules: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    recipe: str
    dispatch: str


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    b1: float
    b2: float
    eps: float
    weight_decay: float
    decayed: str
    clip: float
    moments: str
    ema_decay: float


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Every boundary is a number of consumed tokens, except `warmup_steps`."""

    tokens: int
    learning_rate: float
    warmup_steps: int
    decay_start: int
    decay_end: int
    decayed_learning_rate: float
    final_start: int
    final_learning_rate: float
    bias_speed: float
    bias_stop: int
    balance_alpha: float
    mtp_weight: float
    late_mtp_weight: float
    mtp_switch: int


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Sequences of `length` tokens per optimiser step, in micro-batches, over all devices."""

    length: int
    sequences: int
    ramp_sequences: int
    ramp_tokens: int
    micro_sequences: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str
    tokenizer: str
    text_key: str
    cache: str
    fim_rate: float
    held_out: float


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int
    keep: int


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every_steps: int


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    tokens: int


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    model: ModelConfig
    mesh: MeshConfig
    layout: LayoutConfig
    precision: PrecisionConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    batch: BatchConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    evaluation: EvaluationConfig

    def to_json(self) -> str:
        """The resolved config, as `config.json` keeps it; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def parse(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Turns a ConfigDict (or the dictionary in a `config.json`) into a checked `Config`.

    Raises:
      ConfigError: an unknown or missing key, a value of the wrong type, or values that cannot work
        together; every message names the key.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    parsed = _build(Config, values, "")
    check(parsed)
    return parsed


def from_json(text: str) -> Config:
    return parse(json.loads(text))


def check(config: Config) -> None:
    """Every rule between the values of one config.

    How many devices there are is not known here: a mesh axis of -1 leaves out the rules that need
    its size, so check again once `parallel/mesh.py` has resolved it.

    Raises:
      ConfigError: the first rule that fails. Where a message ends in "set key=value", that is the
        nearest value that this rule accepts.
    """
    _check_values(config)
    _check_model(config)
    _check_optimizer(config)
    _check_schedule(config)
    _check_layout(config)
    _check_batch(config)
    _check_splits(config)
    _check_dispatch(config)
    _check_pipeline(config)


_Range = tuple[str, Callable[[float], bool]]
_COUNT: _Range = ("at least 1", lambda x: x >= 1)
_POSITIVE: _Range = ("above 0", lambda x: x > 0)
_DEVICES: _Range = ("at least 1, or -1 for all that are left", lambda x: x == -1 or x >= 1)

# Every integer must be at least 1 and every other number above 0, except these.
_RANGES: dict[str, _Range] = {
    **dict.fromkeys((f"mesh.{axis}" for axis in MESH_AXES), _DEVICES),
    **dict.fromkeys(
        (
            "model.dense_layers", "model.q_latent", "model.shared_experts", "model.yarn_mscale",
            "model.yarn_mscale_all_dim", "optimizer.weight_decay", "schedule.warmup_steps",
            "schedule.decay_start", "schedule.decay_end", "schedule.final_start",
            "schedule.bias_speed", "schedule.bias_stop", "schedule.balance_alpha",
            "schedule.mtp_weight", "schedule.late_mtp_weight", "schedule.mtp_switch",
            "batch.ramp_tokens", "evaluation.tokens",
        ),
        ("at least 0", lambda x: x >= 0),
    ),
    "seed": ("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
    "model.yarn_factor": ("at least 1, where 1 is off", lambda x: x >= 1),
    "model.mtp_depth": ("from 0 to 4", lambda x: 0 <= x <= 4),
    "optimizer.b1": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "optimizer.b2": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "optimizer.ema_decay": ("at least 0 and below 1, where 0 is off", lambda x: 0 <= x < 1),
    "batch.length": ("at least 2: a token and the one after it", lambda x: x >= 2),
    "data.fim_rate": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "data.held_out": ("above 0 and below 1", lambda x: 0 < x < 1),
}  # fmt: skip

_CHOICES: dict[str, tuple[Any, ...]] = {
    "model.score": ("sigmoid", "softmax"),
    "model.group_score": ("top2", "max"),
    "layout.zero": (0, 1, 3),
    "layout.dispatch": ("two_hop", "flat", "reference"),
    "layout.micro_batches_in_flight": (1, 2),
    "layout.pipeline": ("dualpipe", "dualpipev", "1f1b"),
    "layout.ramps": ("mask", "skip"),
    "layout.recompute": ("none", "full", "report"),
    "precision.recipe": ("float32", "bfloat16"),
    "precision.dispatch": ("compute", "fp8"),
    "optimizer.decayed": ("matrices", "all"),
    "optimizer.moments": ("float32", "bfloat16"),
}


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _check_values(config: Config) -> None:
    """Each value alone: its range, or the names it may have."""
    for key, value in _leaves(config):
        if key in _CHOICES:
            choices = ", ".join(map(str, _CHOICES[key]))
            hint = _hint(str(value), map(str, _CHOICES[key]))
            _need(value in _CHOICES[key], f"{key} is {value!r}; it must be one of {choices}{hint}")
        elif type(value) in (int, float):
            words, holds = _RANGES.get(key, _COUNT if type(value) is int else _POSITIVE)
            finite = abs(value) < 2**63  # and no NaN, for which every comparison is false
            _need(finite and holds(value), f"{key} is {value}; it must be {words}")


def _check_model(config: Config) -> None:
    model = config.model
    _need(
        model.dense_layers <= model.layers,
        f"model.dense_layers={model.dense_layers} is more than model.layers={model.layers}; set "
        f"model.dense_layers={model.layers}",
    )
    _need(
        model.d_rope % 2 == 0,
        f"model.d_rope={model.d_rope} is odd, and rotary embeddings turn pairs; set "
        f"model.d_rope={model.d_rope + 1}",
    )
    _need(
        model.yarn_beta_fast > model.yarn_beta_slow,
        f"model.yarn_beta_fast={model.yarn_beta_fast} must be above "
        f"model.yarn_beta_slow={model.yarn_beta_slow}; the report has 32 and 1",
    )
    _need(
        model.experts % model.groups == 0,
        f"model.experts={model.experts} do not split into model.groups={model.groups} equal "
        f"groups; set model.groups={_divisor(model.experts, model.groups)}",
    )
    _need(
        model.top_groups <= model.groups,
        f"model.top_groups={model.top_groups} is more than model.groups={model.groups}; set "
        f"model.top_groups={model.groups}",
    )
    per_group = model.experts // model.groups
    held = per_group * model.top_groups
    _need(
        model.top_k <= held,
        f"model.top_k={model.top_k} is more than the {held} experts that model.top_groups="
        f"{model.top_groups} groups hold (model.experts={model.experts} / model.groups="
        f"{model.groups} = {per_group} each); raise model.top_groups, or set model.top_k={held}",
    )
    _need(
        model.groups == 1 or model.group_score != "top2" or per_group >= 2,
        f"model.group_score='top2' adds the best two experts of a group, and model.experts="
        f"{model.experts} in model.groups={model.groups} leaves one in each; change model.groups, "
        "or set model.group_score=max",
    )


def _check_optimizer(config: Config) -> None:
    _need(
        config.optimizer.moments == "float32" or config.optimizer.b2 <= 0.99,
        f"optimizer.b2={config.optimizer.b2} with optimizer.moments='bfloat16': each change of the "
        "second moment is below bfloat16's resolution, so it would never move; use "
        "optimizer.moments='float32', or set optimizer.b2=0.99",
    )


def _check_schedule(config: Config) -> None:
    """The phases follow each other. A run may end before it reaches the later ones."""
    schedule, batch = config.schedule, config.batch
    for early, late in (("decay_start", "decay_end"), ("decay_end", "final_start")):
        start, end = getattr(schedule, early), getattr(schedule, late)
        _need(
            start <= end,
            f"schedule.{early}={start} comes after schedule.{late}={end} (both count consumed "
            f"tokens); set schedule.{late}={start}",
        )
    # The ramp only adds sequences, so this is the least that the warm-up can consume.
    per_step = min(batch.sequences, batch.ramp_sequences) * batch.length
    steps = schedule.decay_start // per_step
    _need(
        schedule.warmup_steps <= steps,
        f"schedule.warmup_steps={schedule.warmup_steps} of at least {per_step} tokens each end "
        f"after schedule.decay_start={schedule.decay_start}; set schedule.warmup_steps={steps}",
    )


def _check_layout(config: Config) -> None:
    """The mesh, and layout.rules: names that exist, splits that the model's collectives undo."""
    free = [f"mesh.{axis}" for axis in MESH_AXES if getattr(config.mesh, axis) == -1]
    _need(
        len(free) <= 1,
        f"{' and '.join(free)} are both -1; only one axis can take all devices that are left",
    )
    for axis, over in config.layout.rules.items():
        key, shown = f"layout.rules.{axis}", f"({', '.join(over)})"
        _need(
            axis in LOGICAL_AXES,
            f"{key}: there is no logical axis {axis!r}"
            + (_hint(axis, LOGICAL_AXES) or f"; known: {', '.join(LOGICAL_AXES)}"),
        )
        for name in over:
            _need(
                name in MESH_AXES,
                f"{key}: there is no mesh axis {name!r}"
                + (_hint(name, MESH_AXES) or f"; known: {', '.join(MESH_AXES)}"),
            )
            allowed = SPLITS[axis]
            _need(
                name in allowed,
                f"{key}={shown}: {axis} can only be split over "
                f"({', '.join(allowed)}), not over {name}; "
                "take it out (layout.zero=3 spreads any weight over the data axes)"
                if allowed
                else f"{key}={shown}: {axis} cannot be split; take the rule out (layout.zero=3 "
                "spreads any weight over the data axes)",
            )
        ordered = tuple(name for name in MESH_AXES if name in over)
        _need(
            tuple(over) == ordered,
            f"{key}={shown}: name each mesh axis once, outermost first: ({', '.join(ordered)})",
        )
    # Gradients are summed over every data axis, so tokens along each of them have to differ.
    over = config.layout.rules.get("batch", ())
    for axis in DATA_AXES:
        size = getattr(config.mesh, axis)
        _need(
            axis in over or size in (1, -1),
            f"layout.rules.batch=({', '.join(over)}) leaves out {axis}, so the mesh.{axis}={size} "
            f"devices along it would see the same tokens; add it, or set mesh.{axis}=1",
        )


def _check_batch(config: Config) -> None:
    model, batch = config.model, config.batch
    _need(
        model.mtp_depth < batch.length,
        f"model.mtp_depth={model.mtp_depth} looks past batch.length={batch.length} tokens; set "
        f"model.mtp_depth={batch.length - 1}",
    )
    reach = model.yarn_original * model.yarn_factor
    if model.yarn_factor > 1 and batch.length > reach:
        raise ConfigError(
            f"batch.length={batch.length} is past what YaRN reaches, model.yarn_original="
            f"{model.yarn_original} x model.yarn_factor={model.yarn_factor}; raise "
            f"model.yarn_factor, or set batch.length={int(reach)}"
        )
    parts = _parts(config, "batch") or 1
    fit = _fitting_batch(batch, parts)
    _need(
        batch.micro_sequences % parts == 0,
        f"batch.micro_sequences={batch.micro_sequences} do not divide among the {parts} devices of "
        f"layout.rules.batch ({_shape(config, 'batch')}); change the mesh, or set {fit}",
    )
    for key in ("sequences", "ramp_sequences"):
        _need(
            getattr(batch, key) % batch.micro_sequences == 0,
            f"batch.{key}={getattr(batch, key)} is no multiple of batch.micro_sequences="
            f"{batch.micro_sequences}, so a step would have a broken micro-batch; set {fit}",
        )
    _need(
        batch.ramp_sequences <= batch.sequences,
        f"batch.ramp_sequences={batch.ramp_sequences} is more than batch.sequences="
        f"{batch.sequences}, where the ramp ends; set batch.ramp_sequences={batch.sequences}",
    )


def _check_splits(config: Config) -> None:
    """Sizes against the devices they are split over, as far as those are known."""
    model, layout = config.model, config.layout
    for axis, key, step in (
        ("experts", "experts", model.groups),
        ("heads", "heads", 1),
        ("vocab", "vocab", 1),
        ("dense_width", "d_dense", 1),
        ("expert_width", "d_expert", 1),  # the shared expert's width is a multiple of this one
    ):
        parts, size = _parts(config, axis) or 1, getattr(model, key)
        _need(
            size % parts == 0,
            f"model.{key}={size} does not divide among the {parts} devices of layout.rules.{axis} "
            f"({_shape(config, axis)}); change the mesh or the rule, or set "
            f"model.{key}={_round_up(size, math.lcm(parts, step))}",
        )
    _need(
        layout.dispatch != "reference" or _parts(config, "experts") in (1, None),
        f"layout.dispatch='reference' computes every expert on every device, but "
        f"layout.rules.experts splits them ({_shape(config, 'experts')}); set layout.dispatch=flat",
    )


def _check_dispatch(config: Config) -> None:
    """Groups against nodes, micro-batches against those in flight, buffers against no slot."""
    model, layout = config.model, config.layout
    over = layout.rules.get("experts", ())
    sizes = {name: getattr(config.mesh, name) for name in over}
    slow = math.prod(size for name, size in sizes.items() if name != "gpu")
    known = -1 not in sizes.values()
    _need(
        layout.dispatch != "two_hop" or not known or slow < 2 or model.groups % slow == 0,
        f"model.groups={model.groups} do not map to the {slow} nodes of layout.rules.experts "
        f"({_shape(config, 'experts')}), and layout.dispatch='two_hop' sends a token to few nodes "
        "because its experts are in few groups; give a model that is not trained yet "
        f"model.groups={_round_up(model.groups, slow)}, or set layout.dispatch=flat",
    )
    flights = layout.micro_batches_in_flight
    _need(
        flights == 1 or layout.dispatch != "reference",
        f"layout.micro_batches_in_flight={flights} puts one micro-batch's work under the messages "
        "of another, and layout.dispatch=reference has none; set layout.dispatch=flat",
    )
    _need(
        flights == 1 or config.batch.sequences >= flights * config.batch.micro_sequences,
        f"layout.micro_batches_in_flight={flights}, but batch.sequences={config.batch.sequences} "
        f"make one micro-batch of batch.micro_sequences={config.batch.micro_sequences} a step; set "
        f"batch.sequences={flights * config.batch.micro_sequences}",
    )
    parts = tuple(
        math.prod(sizes[name] for name in over if (name == "gpu") == fast) for fast in (0, 1)
    )
    if layout.dispatch != "two_hop":
        parts = (math.prod(parts),)
    rows = config.batch.micro_sequences // (_parts(config, "batch") or 1)
    if not known or layout.dispatch == "reference" or not model.moe_layers or not rows:
        return
    parts = tuple(count for count in parts if count > 1)
    tokens, nodes = rows * config.batch.length, most_nodes(model)
    buffer_slots(layout.buffer, tokens, model.top_k, model.experts, parts, nodes)


def _check_pipeline(config: Config) -> None:
    """What a pipeline asks of the layout; `parallel/stages.py` checks how layers are split."""
    pipe, layout, model = config.mesh.pipe, config.layout, config.model
    if pipe in (1, -1):
        return
    _need(
        layout.pipeline != "dualpipe" or pipe % 2 == 0,
        f"mesh.pipe={pipe}: layout.pipeline=dualpipe pairs ranks r and {pipe - 1} - r; set "
        f"mesh.pipe={pipe + 1}, or layout.pipeline=dualpipev or layout.pipeline=1f1b",
    )
    _need(
        layout.zero < 3,
        f"layout.zero=3 with mesh.pipe={pipe} would gather every layer for every micro-batch; set "
        "layout.zero=1, which splits the masters over the pipeline too",
    )
    _need(
        layout.dispatch != "reference",
        f"mesh.pipe={pipe} runs a layer in steps, which layout.dispatch=reference has not; set "
        "layout.dispatch=flat",
    )
    _need(
        layout.micro_batches_in_flight == 1,
        f"layout.micro_batches_in_flight={layout.micro_batches_in_flight} with mesh.pipe={pipe}: "
        "which micro-batches run side by side is for layout.pipeline to say; set "
        "layout.micro_batches_in_flight=1",
    )
    _need(
        not (layout.defer_weight_gradients and layout.pipeline == "1f1b"),
        "layout.defer_weight_gradients fills the waits of DualPipe's schedule, and "
        "layout.pipeline=1f1b has none for it; set layout.defer_weight_gradients=False",
    )
    _need(
        model.moe_layers > 0,
        f"model.dense_layers={model.dense_layers} are all of model.layers, and stages of "
        f"mesh.pipe={pipe} are made of MoE layers; set model.dense_layers={model.layers - 1}",
    )


def most_nodes(model: ModelConfig) -> int:
    """Nodes that one token may visit (section 2.1.2), each group of experts being on one node."""
    return min(model.top_groups, model.top_k) if model.groups > 1 else model.top_k


def buffer_slots(
    buffer: float, tokens: int, top_k: int, experts: int, parts: tuple[int, ...], nodes: int
) -> tuple[int, ...]:
    """How many copies fit into the buffers of an exchange, `buffer` times a balanced router's load.

    Args:
      buffer: `layout.buffer`.
      tokens: of one device.
      parts: devices along each hop, outermost first.
      nodes: the most destinations of one token on the first hop, if a second one follows.

    Returns:
      Slots for each destination of each hop, then those of a device's experts. None is larger than
      the worst router could fill.

    Raises:
      ConfigError: a buffer has no slot at all, so that no round would move a token.
    """
    slots, rows, crossed, least = [], tokens, 1, 1.25
    for number, count in enumerate(parts):
        crossed *= count
        copies = min(top_k, crossed)
        if number == 0 and len(parts) > 1:
            copies = min(copies, nodes)
        slots.append(int(min(rows, buffer * tokens * copies / count)))
        least = max(least, math.ceil(100 * count / (tokens * copies)) / 100)
        rows = count * slots[-1]
    slots.append(int(min(rows * min(top_k, experts // crossed), buffer * tokens * top_k)))
    _need(
        min(slots) >= 1,
        f"layout.buffer={buffer} times the mean load of {tokens} tokens a device leaves a buffer "
        f"without a single slot, and no token would ever move; set layout.buffer={least}",
    )
    return tuple(slots)


def _parts(config: Config, axis: str) -> int | None:
    """Devices that a logical axis is split over; None while a mesh axis of it is -1."""
    sizes = [getattr(config.mesh, name) for name in config.layout.rules.get(axis, ())]
    return None if -1 in sizes else math.prod(sizes)


def _shape(config: Config, axis: str) -> str:
    """The mesh axes behind `_parts`, as "mesh.node=2 x mesh.gpu=4"."""
    return " x ".join(
        f"mesh.{name}={getattr(config.mesh, name)}" for name in config.layout.rules.get(axis, ())
    )


def _fitting_batch(batch: BatchConfig, parts: int) -> str:
    """The batch keys to change, so that micro-batches divide among `parts` and steps into them."""
    micro = _round_up(batch.micro_sequences, parts)
    sequences = _round_up(batch.sequences, micro)
    ramp = min(_round_up(batch.ramp_sequences, micro), sequences)
    want = {"micro_sequences": micro, "sequences": sequences, "ramp_sequences": ramp}
    return ", ".join(f"batch.{k}={v}" for k, v in want.items() if v != getattr(batch, k))


def _leaves(section: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted key and value of every plain setting."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{path}{field.name}.")
        else:
            yield path + field.name, value


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _divisor(value: int, near: int) -> int:
    """The largest divisor of `value` that is not above `near`."""
    return next(d for d in range(min(value, near), 0, -1) if value % d == 0)


def _build(cls: type, values: Any, path: str) -> Any:
    """A frozen dataclass from a dictionary with exactly its keys."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'config'} is {values!r}; expected a section with keys")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    dot = f"{path}." if path else ""
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {dot}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown key {dot}{key}; {hint}")
    if missing := [key for key in fields if key not in values]:
        raise ConfigError(f"missing key {dot}{missing[0]}; configs/v3_671b.py has every key")
    return cls(**{key: _value(fields[key].type, values[key], dot + key) for key in fields})


def _value(kind: Any, value: Any, key: str) -> Any:
    """`value` as the type a field asks for, without a silent change of meaning."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key)  # type: ignore[arg-type]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, str, bool):
        if type(value) is not kind:
            raise ConfigError(f"{key} is {value!r}; expected {kind.__name__}")
        return value
    if kind == tuple[int, ...]:
        numbers = tuple(value) if isinstance(value, tuple | list) else None
        if numbers is None or not all(type(number) is int for number in numbers):
            raise ConfigError(f"{key} is {value!r}; expected integers, such as (4, 4, 3)")
        return numbers
    # The one field that is a table: layout.rules.
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {value!r}; expected logical axis -> mesh axes")
    return {axis: _mesh_axes(over, f"{key}.{axis}") for axis, over in value.items()}


def _mesh_axes(value: Any, key: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{key} is {value!r}; expected names of mesh axes, such as ('node', 'gpu')"
        )
    return tuple(names)
