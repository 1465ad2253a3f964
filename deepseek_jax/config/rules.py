"""Rules between the values of one config; each message names the key and a value that fits."""

import math

from deepseek_jax.config.capacity import buffer_slots, most_nodes
from deepseek_jax.config.hints import did_you_mean, name_shown, need, shown
from deepseek_jax.config.schema import (
    DATA_AXES,
    LOGICAL_AXES,
    MESH_AXES,
    SPLITS,
    BatchConfig,
    Config,
    ConfigError,
)
from deepseek_jax.config.stages import layers_per_stage, stage_count

# Blocks of query rows are compiled one by one, forward and backward.
_MOST_BLOCKS = 1024

_TRIED = 10_000  # divisors that are tried for a hint


def check_model(config: Config) -> None:
    """Checks sizes, routing and YaRN of the model against each other."""
    model = config.model
    need(
        model.dense_layers <= model.layers,
        f"model.dense_layers={model.dense_layers} is more than model.layers={model.layers}; set "
        f"model.dense_layers={model.layers}",
    )
    need(
        model.d_rope % 2 == 0,
        f"model.d_rope={model.d_rope} is odd, and rotary embedding rotates pairs; set "
        f"model.d_rope={model.d_rope + 1}",
    )
    need(
        not model.index_heads or model.q_latent > 0,
        f"model.index_heads={model.index_heads} with model.q_latent=0: the indexer makes its "
        "queries from the query latent; set model.index_heads=0",
    )
    need(
        not model.index_heads or model.index_width >= model.d_rope,
        f"model.index_width={model.index_width} is less than model.d_rope={model.d_rope}, the "
        f"elements of it that are rotated; set model.index_width={model.d_rope}",
    )
    need(
        model.yarn_beta_fast >= model.yarn_beta_slow,
        f"model.yarn_beta_fast={model.yarn_beta_fast} must be at least "
        f"model.yarn_beta_slow={model.yarn_beta_slow}; the report has 32 and 1",
    )
    need(
        model.yarn_factor == 1 or model.rope_theta != 1,
        f"model.rope_theta=1.0 with model.yarn_factor={model.yarn_factor}: YaRN divides by the "
        "logarithm of theta; the report has model.rope_theta=10000",
    )
    need(
        model.experts % model.groups == 0,
        f"model.experts={model.experts} do not split into model.groups={model.groups} equal "
        f"groups; set model.groups={_divisor(model.experts, model.groups)}",
    )
    need(
        model.top_groups <= model.groups,
        f"model.top_groups={model.top_groups} is more than model.groups={model.groups}; set "
        f"model.top_groups={model.groups}",
    )
    per_group = model.experts // model.groups
    held = per_group * model.top_groups
    need(
        model.top_k <= held,
        f"model.top_k={model.top_k} is more than the {held} experts that model.top_groups="
        f"{model.top_groups} groups hold (model.experts={model.experts} / model.groups="
        f"{model.groups} = {per_group} each); raise model.top_groups, or set model.top_k={held}",
    )
    need(
        model.groups == 1 or model.group_score != "top2" or per_group >= 2,
        f"model.group_score='top2' adds the best two experts of a group, and model.experts="
        f"{model.experts} in model.groups={model.groups} leaves one in each; change model.groups, "
        "or set model.group_score=max",
    )


def check_indexer(config: Config) -> None:
    """Checks that a warm-up of the indexers has something to train."""
    model, schedule = config.model, config.schedule
    need(
        schedule.index_phase != "warm_up" or (model.index_heads > 0 and schedule.index_weight > 0),
        f"schedule.index_phase=warm_up trains the indexers alone, and model.index_heads="
        f"{model.index_heads} with schedule.index_weight={schedule.index_weight} leaves nothing to "
        "train; set schedule.index_phase=sparse",
    )


def check_optimizer(config: Config) -> None:
    """Checks that moments in bfloat16 can follow the gradients."""
    need(
        config.optimizer.moments == "float32" or config.optimizer.b2 <= 0.99,
        f"optimizer.b2={config.optimizer.b2} with optimizer.moments='bfloat16': each change of the "
        "second moment is below the resolution of bfloat16, so it would never change; use "
        "optimizer.moments='float32', or set optimizer.b2=0.99",
    )


def check_schedule(config: Config) -> None:
    """Checks the order of the phases; a run may end before the later ones begin."""
    schedule, batch = config.schedule, config.batch
    for early, late in (("decay_start", "decay_end"), ("decay_end", "final_start")):
        start, end = getattr(schedule, early), getattr(schedule, late)
        need(
            start <= end,
            f"schedule.{early}={start} comes after schedule.{late}={end} (both count consumed "
            f"tokens); set schedule.{late}={start}",
        )
    # Steps only grow along the ramp, so this is the least that a step of the warm-up consumes.
    sequences = min(batch.sequences, batch.ramp_sequences)
    per_step = sequences * batch.length
    steps = schedule.decay_start // per_step
    need(
        schedule.warmup_steps <= steps,
        f"a first step has {sequences} sequences of batch.length={batch.length}, so that the "
        f"schedule.warmup_steps={schedule.warmup_steps} steps of at least {per_step} tokens end "
        f"after schedule.decay_start={schedule.decay_start}; set schedule.warmup_steps={steps}",
    )
    decay = config.optimizer.weight_decay
    for key in ("learning_rate", "decayed_learning_rate", "final_learning_rate"):
        rate = getattr(schedule, key)
        need(
            rate * decay < 1,
            f"schedule.{key}={rate} times optimizer.weight_decay={decay} is {rate * decay:.3g}, "
            "and a step with 1 or more leaves nothing of the weights before it; lower one of them",
        )


def check_layout(config: Config) -> None:
    """Checks the mesh and `layout.rules`: known names, and splits that the model supports."""
    free = [f"mesh.{axis}" for axis in MESH_AXES if getattr(config.mesh, axis) == -1]
    need(
        len(free) <= 1,
        f"{' and '.join(free)} are both -1; only one axis can take all remaining devices",
    )
    for axis, over in config.layout.rules.items():
        key = f"layout.rules.{name_shown(axis)}"
        if axis not in LOGICAL_AXES:
            hint = did_you_mean(str(axis), LOGICAL_AXES) or f"; known: {', '.join(LOGICAL_AXES)}"
            need(False, f"{key}: there is no logical axis {shown(axis)}{hint}")
        for name in over:
            if name not in MESH_AXES:
                hint = did_you_mean(name, MESH_AXES) or f"; known: {', '.join(MESH_AXES)}"
                need(False, f"{key}: there is no mesh axis {shown(name)}{hint}")
            allowed, given = SPLITS[axis], f"{key}={_listed(over)}"
            need(
                name in allowed,
                f"{given}: {axis} can only be split over "
                f"({', '.join(allowed)}), not over {name}; "
                "remove it (layout.zero=3 shards any weight over the data axes)"
                if allowed
                else f"{given}: {axis} cannot be split; remove the rule (layout.zero=3 "
                "shards any weight over the data axes)",
            )
        ordered = tuple(name for name in MESH_AXES if name in over)
        need(
            tuple(over) == ordered,
            f"{key}={_listed(over)}: name each mesh axis once, outermost first: {_listed(ordered)}",
        )
    # Gradients are summed over every data axis, so the batch has to be split over each of them.
    over = config.layout.rules.get("batch", ())
    for axis in DATA_AXES:
        size = getattr(config.mesh, axis)
        need(
            axis in over or size in (1, -1),
            f"layout.rules.batch=({', '.join(over)}) leaves out {axis}, so the mesh.{axis}={size} "
            f"devices along it would see the same tokens; add it, or set mesh.{axis}=1",
        )


def check_batch(config: Config) -> None:
    """Checks sequence length, and micro-batches against steps and devices."""
    model, batch = config.model, config.batch
    need(
        model.mtp_depth < batch.length,
        f"model.mtp_depth={model.mtp_depth} predicts past batch.length={batch.length} tokens; set "
        f"model.mtp_depth={batch.length - 1}",
    )
    reach = model.yarn_original * model.yarn_factor
    if model.yarn_factor > 1 and batch.length > reach:
        raise ConfigError(
            f"batch.length={batch.length} is beyond the context of YaRN, model.yarn_original="
            f"{model.yarn_original} x model.yarn_factor={model.yarn_factor}; raise "
            f"model.yarn_factor, or set batch.length={int(reach)}"
        )
    parts = _parts(config, "batch") or 1
    fit = _fitting_batch(batch, parts)
    need(
        batch.micro_sequences % parts == 0,
        f"batch.micro_sequences={batch.micro_sequences} do not divide among the {parts} devices of "
        f"layout.rules.batch ({_shape(config, 'batch')}); change the mesh, or set {fit}",
    )
    for key in ("sequences", "ramp_sequences"):
        need(
            getattr(batch, key) % batch.micro_sequences == 0,
            f"batch.{key}={getattr(batch, key)} is no multiple of batch.micro_sequences="
            f"{batch.micro_sequences}, so a step would have an incomplete micro-batch; set {fit}",
        )
    need(
        batch.ramp_sequences <= batch.sequences,
        f"batch.ramp_sequences={batch.ramp_sequences} is more than batch.sequences="
        f"{batch.sequences}, where the ramp ends; set batch.ramp_sequences={batch.sequences}",
    )


def check_splits(config: Config) -> None:
    """Checks sizes against the devices that split them, where no mesh axis of a split is -1."""
    model, layout = config.model, config.layout
    for axis, key, step in (
        ("experts", "experts", model.groups),
        ("heads", "heads", 1),
        ("vocab", "vocab", 1),
        ("dense_width", "d_dense", 1),
        ("expert_width", "d_expert", 1),  # d_shared is a multiple of d_expert
    ):
        parts, size = _parts(config, axis) or 1, getattr(model, key)
        need(
            size % parts == 0,
            f"model.{key}={size} does not divide among the {parts} devices of layout.rules.{axis} "
            f"({_shape(config, axis)}); change the mesh or the rule, or set "
            f"model.{key}={_round_up(size, math.lcm(parts, step))}",
        )
    need(
        layout.dispatch != "reference" or _parts(config, "experts") in (1, None),
        f"layout.dispatch='reference' computes every expert on every device, but "
        f"layout.rules.experts splits experts ({_shape(config, 'experts')}); "
        "set layout.dispatch=flat",
    )


def check_blocks(config: Config) -> None:
    """Checks that a training step has few blocks of attention, each of which is compiled."""
    length, rows = config.batch.length, config.layout.attention_block
    blocks = -(-length // rows)
    need(
        blocks <= _MOST_BLOCKS,
        f"batch.length={length} in blocks of layout.attention_block={rows} rows makes {blocks} "
        f"blocks, each compiled by itself, and {_MOST_BLOCKS} are the most; set "
        f"layout.attention_block={-(-length // _MOST_BLOCKS)}",
    )


def check_dispatch(config: Config) -> None:
    """Checks expert groups against nodes, micro-batches in flight, and buffers for a slot each."""
    model, layout = config.model, config.layout
    over = layout.rules.get("experts", ())
    sizes = {name: getattr(config.mesh, name) for name in over}
    nodes = math.prod(size for name, size in sizes.items() if name != "gpu")
    known = -1 not in sizes.values()
    need(
        layout.dispatch != "two_hop" or not known or nodes < 2 or model.groups % nodes == 0,
        f"model.groups={model.groups} do not map to the {nodes} nodes of layout.rules.experts "
        f"({_shape(config, 'experts')}), and layout.dispatch='two_hop' sends a token to few nodes "
        "because its experts are in few groups; for a model that is not trained yet, use "
        f"model.groups={_round_up(model.groups, nodes)}, or set layout.dispatch=flat",
    )
    in_flight = layout.micro_batches_in_flight
    need(
        in_flight == 1 or layout.dispatch != "reference",
        f"layout.micro_batches_in_flight={in_flight} overlaps the work of one micro-batch with the "
        "messages of another, and layout.dispatch=reference has none; set layout.dispatch=flat",
    )
    need(
        in_flight == 1 or config.batch.sequences >= in_flight * config.batch.micro_sequences,
        f"layout.micro_batches_in_flight={in_flight}, but batch.sequences={config.batch.sequences} "
        f"make one micro-batch of batch.micro_sequences={config.batch.micro_sequences} a step; set "
        f"batch.sequences={in_flight * config.batch.micro_sequences}",
    )
    parts = tuple(
        math.prod(sizes[name] for name in over if (name == "gpu") == inside_node)
        for inside_node in (False, True)
    )
    if layout.dispatch != "two_hop":
        parts = (math.prod(parts),)
    rows = config.batch.micro_sequences // (_parts(config, "batch") or 1)
    if not known or layout.dispatch == "reference" or not model.moe_layers or not rows:
        return
    parts = tuple(count for count in parts if count > 1)
    tokens, visited = rows * config.batch.length, most_nodes(model)
    buffer_slots(layout.capacity_factor, tokens, model.top_k, model.experts, parts, visited)


def check_pipeline(config: Config) -> None:
    """Checks the layout for a pipeline, and `layout.stage_layers` for any number of ranks."""
    pipe, layout, model = config.mesh.pipe, config.layout, config.model
    if pipe == -1:
        return
    if layout.stage_layers:
        stages = stage_count(layout.pipeline, pipe)
        layers_per_stage(model.layers, stages, layout.stage_layers)
    if pipe == 1:
        return
    need(
        layout.pipeline != "dualpipe" or pipe % 2 == 0,
        f"mesh.pipe={pipe}: layout.pipeline=dualpipe pairs ranks r and {pipe - 1} - r; set "
        f"mesh.pipe={pipe + 1}, or layout.pipeline=dualpipev or layout.pipeline=1f1b",
    )
    need(
        layout.zero < 3,
        f"layout.zero=3 with mesh.pipe={pipe} would gather every layer for every micro-batch; set "
        "layout.zero=1, which splits the masters over the pipeline too",
    )
    need(
        layout.dispatch != "reference",
        f"mesh.pipe={pipe} runs a layer in steps, and layout.dispatch=reference has none; set "
        "layout.dispatch=flat",
    )
    need(
        layout.micro_batches_in_flight == 1,
        f"layout.micro_batches_in_flight={layout.micro_batches_in_flight} with mesh.pipe={pipe}: "
        "layout.pipeline decides which micro-batches overlap; set "
        "layout.micro_batches_in_flight=1",
    )
    need(
        not (layout.defer_weight_gradients and layout.pipeline == "1f1b"),
        "layout.defer_weight_gradients fills the bubbles of DualPipe's schedule, and "
        "layout.pipeline=1f1b has none for it; set layout.defer_weight_gradients=False",
    )
    need(
        model.moe_layers > 0,
        f"model.dense_layers={model.dense_layers} leaves no MoE layer, and the stages of "
        f"mesh.pipe={pipe} consist of MoE layers; set model.dense_layers={model.layers - 1}",
    )


def _parts(config: Config, axis: str) -> int | None:
    """Devices that a logical axis is split over; None if one of its mesh axes is -1."""
    sizes = [getattr(config.mesh, name) for name in config.layout.rules.get(axis, ())]
    return None if -1 in sizes else math.prod(sizes)


def _shape(config: Config, axis: str) -> str:
    """Mesh axes that a logical axis is split over, such as "mesh.node=2 x mesh.gpu=4"."""
    return " x ".join(
        f"mesh.{name}={getattr(config.mesh, name)}" for name in config.layout.rules.get(axis, ())
    )


def _fitting_batch(batch: BatchConfig, parts: int) -> str:
    """Changes to batch keys that make `parts` divide micro-batches, and those divide steps."""
    micro = _round_up(batch.micro_sequences, parts)
    sequences = _round_up(batch.sequences, micro)
    ramp = min(_round_up(batch.ramp_sequences, micro), sequences)
    want = {"micro_sequences": micro, "sequences": sequences, "ramp_sequences": ramp}
    return ", ".join(f"batch.{k}={v}" for k, v in want.items() if v != getattr(batch, k))


def _listed(names: tuple[str, ...]) -> str:
    """Mesh axes as a message shows them, such as "(node, gpu)"."""
    return f"({', '.join(names)})" if len(names) <= len(MESH_AXES) else shown(names)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _divisor(value: int, near: int) -> int:
    """Largest divisor of `value` that is at most `near`, or one that both share if that is far."""
    first = min(value, near)
    close = (d for d in range(first, max(first - _TRIED, 0), -1) if value % d == 0)
    return next(close, math.gcd(value, near))
