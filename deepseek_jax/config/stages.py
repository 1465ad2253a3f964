"""Stages of a pipeline, and the number of layers of each."""

from deepseek_jax.config.hints import need, shown


def stage_count(pipeline: str, pipe: int) -> int:
    """Stages of the schedule `pipeline` over `pipe` ranks; DualPipeV has two on each rank."""
    return 2 * pipe if pipeline == "dualpipev" and pipe > 1 else pipe


def layers_per_stage(layers: int, stages: int, given: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Number of layers of each stage: equal, but fewer in the last ones, which also run the head.

    Args:
      given: layout.stage_layers, used instead unless empty.

    Raises:
      ConfigError: `given` has not one number for each stage, or they do not add up to `layers`.
    """
    if not given:
        each = -(-layers // stages)
        return tuple(max(0, min(each, layers - each * stage)) for stage in range(stages))
    if len(given) != stages or sum(given) != layers or min(given) < 0:
        fitting = shown(layers_per_stage(layers, stages))
        numbers = f"{stages} numbers" if stages > 1 else "1 number"
        need(
            False,
            f"layout.stage_layers={shown(given)} must be {numbers}, one for each stage, that add "
            f"up to model.layers={layers}; set layout.stage_layers={fitting}, or () for these",
        )
    return given
