"""Stage assignment: cases by hand, and every layer on all ranks that hold its stage."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import ConfigError, layers_per_stage
from deepseek_jax.parallel.pipeline import stage_assignment
from deepseek_jax.parallel.pipeline.lockstep import BidirectionalStages
from deepseek_jax.parallel.pipeline.one_f_one_b import LinearStages
from deepseek_jax.parallel.pipeline.stage_assignment import NOTHING


@pytest.mark.parametrize(
    ("layers", "count", "want"),
    [
        (61, 16, (4,) * 15 + (1,)),  # the published model: the last has the head and MTP
        (61, 8, (8,) * 7 + (5,)),
        (61, 32, (2,) * 30 + (1, 0)),
        (8, 4, (2, 2, 2, 2)),
        (3, 4, (1, 1, 1, 0)),
    ],
)
def test_layers_per_stage(layers, count, want):
    assert layers_per_stage(layers, count) == want
    assert sum(want) == layers


def test_given_layers_are_taken():
    assert layers_per_stage(5, 4, (2, 0, 1, 2)) == (2, 0, 1, 2)


@pytest.mark.parametrize("given", [(2, 2), (2, 2, 2, 0), (3, 3, -1, 0), (1,) * 5])
def test_given_layers_that_do_not_fit(given):
    with pytest.raises(ConfigError, match=r"layout\.stage_layers=") as error:
        layers_per_stage(5, 4, given)
    assert "must be 4 numbers" in str(error.value) and "model.layers=5" in str(error.value)
    assert "set layout.stage_layers=(2, 2, 1, 0), or ()" in str(error.value)
    assert "\n" not in str(error.value)


def test_places_by_hand():
    """Five layers in four stages. Ranks 1 and 2 are one step in, so their chunks are turned."""
    where = stage_assignment.spread(BidirectionalStages(4, 4), (2, 2, 1, 0))
    first, second, third, last = [0, 1], [2, 3], [4, NOTHING], [NOTHING, NOTHING]
    assert where.layers.tolist() == [
        [first, last], [third, second], [third, second], [first, last]
    ]  # fmt: skip
    assert where.slots == 2
    # Rows of a stack of layers 1 to 3; and of one that has them all.
    assert where.rows(1, 3).tolist() == [
        [-1, 0, -1, -1], [-1, -1, 1, 2], [-1, -1, 1, 2], [-1, 0, -1, -1]
    ]  # fmt: skip
    np.testing.assert_array_equal(where.rows(0, 5), where.layers.reshape(4, 4))
    v = stage_assignment.spread(BidirectionalStages(2, 4), (2, 2, 1, 0))
    assert v.layers.tolist() == [[first, last], [third, second]]
    line = stage_assignment.spread(LinearStages(4), (2, 2, 1, 0))
    assert line.layers.tolist() == [[first], [second], [third], [last]]
    np.testing.assert_array_equal(line.rows(0, 5), line.layers.reshape(4, 2))


@pytest.mark.parametrize(
    ("pipeline", "pipe", "layers"),
    [
        ("dualpipe", 16, 61),
        ("dualpipe", 2, 3),
        ("dualpipev", 8, 61),
        ("dualpipev", 3, 7),
        ("1f1b", 3, 7),
    ],
)
def test_every_layer_is_where_its_stage_is(pipeline, pipe, layers):
    config = small.config(model_layers=layers, layout_pipeline=pipeline)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, pipe=pipe))
    wall, where = stage_assignment.stage_map(config), stage_assignment.assign_layers(config)
    copies = 2 if pipeline == "dualpipe" else 1
    assert wall == (
        LinearStages(pipe) if pipeline == "1f1b" else BidirectionalStages(pipe, 2 * pipe // copies)
    )
    found = where.layers[where.layers != NOTHING]
    assert sorted(found.tolist()) == sorted(list(range(layers)) * copies)
    per_stage = np.cumsum(layers_per_stage(layers, wall.stages))
    for rank in range(pipe):
        for chunk in range(wall.chunks):
            here = where.layers[rank, chunk]
            held = here[here != NOTHING]
            want = np.flatnonzero(
                np.searchsorted(per_stage, np.arange(layers), "right") == wall.stage(rank, chunk)
            )
            assert held.tolist() == want.tolist()
            assert (here[len(held) :] == NOTHING).all(), "slots without a layer are the last"


def test_the_config_s_own_layers():
    config = small.config(model_layers=5)
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, pipe=4),
        layout=dataclasses.replace(config.layout, stage_layers=(2, 0, 1, 2)),
    )
    assert stage_assignment.assign_layers(config).layers[1].tolist() == [
        [2, NOTHING],
        [NOTHING, NOTHING],
    ]


@pytest.mark.parametrize("pipe", [3, 7])
def test_dualpipe_pairs_its_ranks(pipe):
    config = small.config(model_layers=8)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, pipe=pipe))
    with pytest.raises(ConfigError, match=f"mesh.pipe={pipe}"):
        stage_assignment.stage_map(config)


def test_places_of_each_layer():
    """Layer 0 is first on rank 0 and second on rank 1; an empty slot is nobody's."""
    rows = np.array([[0, 1, NOTHING], [2, 0, NOTHING], [1, NOTHING, 2]])
    assert stage_assignment._places(rows, 3).tolist() == [[0, 1, 3], [4, 6, 8]]
    assert stage_assignment._places(rows[:1], 2).tolist() == [[0, 1]]


@pytest.mark.parametrize("over", [("pipe",), ()], ids=["sharded", "whole"])
def test_gradients_of_a_layer_are_summed_over_its_ranks(over):
    """Layers 0 to 2, two of them in each of two directions; [rank, slot] holds its own number."""
    rows = np.array([[0, 1, 2, NOTHING], [2, NOTHING, 0, 1]])
    values = np.array([[1.0, 2.0, 4.0, 0.0], [8.0, 0.0, 16.0, 32.0]], np.float32)
    values = np.stack([values, 64 * values], -1).reshape(8, 2)  # (ranks * slots)D

    def local(value):
        return stage_assignment.return_gradients(value, rows, 3, 1, over, ("pipe",))

    mesh, want = small.mesh_of({"pipe": 2}), np.array([[17, 1088], [34, 2176], [12, 768]])
    run = jax.shard_map(
        local, mesh=mesh, in_specs=P("pipe"), out_specs=P(None, over or None), check_vma=False
    )
    with jax.set_mesh(mesh):
        placed = jax.device_put(values, NamedSharding(mesh, P("pipe")))
        np.testing.assert_array_equal(jax.jit(run)(placed), want)
