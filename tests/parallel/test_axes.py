"""Placement by logical axes, and the collectives `fan_out` and `fan_in` of a split contraction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec as P
from pieces import integers, mapped

from deepseek_jax.parallel import axes

ALL = {"replica": 2, "node": 2, "gpu": 2, "tensor": 2}
DATA = ("replica", "node", "gpu")


def two_layers(x, up, down, axis="dense_width"):
    hidden = jax.nn.relu(axes.fan_out(x, axis) @ up)
    return axes.fan_in(hidden @ down, axis)


@pytest.mark.parametrize("parts", [2, 4])
def test_split_contraction_is_the_whole_one(parts):
    x, up, down = integers(6, 8, seed=0), integers(8, 16, seed=1), integers(16, 8, seed=2)
    pull = integers(6, 8, seed=3)

    def run(x, up, down):
        out, back = jax.vjp(two_layers, x, up, down)
        d_x, d_up, d_down = back(jnp.asarray(pull))
        return out[None], d_x[None], d_up, d_down

    want = run(x, up, down)
    columns, rows, each = P(None, "tensor"), P("tensor", None), P("tensor")
    layout = small.layout_of({"tensor": parts})
    spread = mapped(run, layout, (P(), columns, rows), (each, each, columns, rows))
    got = spread(x, up, down)
    for every_rank, whole in zip(got[:2], want[:2], strict=True):
        np.testing.assert_array_equal(every_rank, np.repeat(whole, parts, axis=0))
    for part, whole in zip(got[2:], want[2:], strict=True):
        np.testing.assert_array_equal(part, whole)


def test_index_counts_outermost_first():
    layout = small.layout_of({"node": 2, "gpu": 2, "tensor": 2})

    def here():
        return jnp.stack([axes.index("experts"), axes.index("heads")])[None]

    got = mapped(here, layout, (), P(("node", "gpu", "tensor")))()
    np.testing.assert_array_equal(got, [(expert, head) for expert in range(4) for head in (0, 1)])


@pytest.mark.parametrize("zero", [0, 1])
def test_gather_undoes_the_zero_split_and_sums_its_gradient(zero):
    layout = small.layout_of({"replica": 2, "gpu": 2}, zero)
    names, weight = ("model", "heads"), integers(8, 3, seed=0)

    def run(part):
        rank = jax.lax.axis_index(("replica", "gpu")).astype(jnp.float32)
        whole, back = jax.vjp(lambda w: axes.gather(w, names, weight.shape, layout), part)
        return whole[None], back((rank + 1) * jnp.asarray(weight))[0]

    storage = layout.storage(names, weight.shape)
    whole, d_weight = mapped(run, layout, (storage,), (P(("replica", "gpu")), storage))(weight)
    np.testing.assert_array_equal(whole, np.repeat(weight[None], 4, axis=0))
    if zero:
        np.testing.assert_array_equal(d_weight, (1 + 2 + 3 + 4) * weight)
    else:
        np.testing.assert_array_equal(d_weight, weight)  # of rank 0, not yet summed


EMBEDDING = ("vocab", "model"), (64, 32)
EXPERTS = ("layer", "experts", "model", None, "expert_width"), (8, 8, 32, 2, 16)
NORM = ("layer", "model"), (8, 32)


@pytest.mark.parametrize(
    "weight, sizes, split, storage",
    [
        # gpu and tensor have the longer dimension.
        (EMBEDDING, ALL, (1, ("replica", "node")), P(("gpu", "tensor"), ("replica", "node"))),
        (EMBEDDING, {"gpu": 8}, (0, ()), P(("gpu",), None)),
        (EMBEDDING, {"node": 8}, (0, ("node",)), P(("node",), None)),
        (EMBEDDING, {"tensor": 8}, (0, ()), P(("tensor",), None)),
        (EMBEDDING, {}, (0, ()), P(None, None)),
        # Experts over node x gpu are held once per replica.
        (
            EXPERTS,
            ALL,
            (2, ("replica",)),
            P(None, ("node", "gpu"), ("replica",), None, ("tensor",)),
        ),
        (EXPERTS, {"node": 2, "gpu": 4}, (0, ()), P(None, ("node", "gpu"), None, None, None)),
        (EXPERTS, {"replica": 8}, (2, ("replica",)), P(None, None, ("replica",), None, None)),
        (NORM, ALL, (1, DATA), P(None, DATA)),  # never the layer axis, even if it divides
        ((("model",), (32,)), ALL, (0, DATA), P(DATA)),
        ((("model", "kv_latent"), (32, 32)), ALL, (0, DATA), P(DATA, None)),  # the first of equals
        # Fewer, inner ranks shard what all ranks cannot divide; else the weight stays whole.
        ((("model",), (36,)), ALL, (0, ("node", "gpu")), P(("node", "gpu"))),
        ((("layer", "model"), (8, 6)), ALL, (1, ("gpu",)), P(None, ("gpu",))),
        ((("model",), (35,)), ALL, (0, ()), P(None)),
        (((), ()), ALL, (0, ()), P()),
    ],
    ids=str,
)
def test_where_zero_keeps_a_weight(weight, sizes, split, storage):
    for zero in (1, 3):
        layout = small.layout_of(sizes, zero)
        assert layout.zero_split(*weight) == split
        assert layout.storage(*weight) == storage
    without = small.layout_of(sizes, 0)
    assert without.zero_split(*weight) == (0, ())
    assert without.storage(*weight) == without.spec(weight[0])


@pytest.mark.parametrize(
    "names, sizes, spec, summed",
    [
        (EMBEDDING[0], ALL, P(("gpu", "tensor"), None), ("replica", "node")),
        (EXPERTS[0], ALL, P(None, ("node", "gpu"), None, None, ("tensor",)), ("replica",)),
        (EXPERTS[0], {"node": 8}, P(None, ("node",), None, None, None), ()),
        (EXPERTS[0], {"replica": 2, "gpu": 4}, P(None, ("gpu",), None, None, None), ("replica",)),
        (NORM[0], {"node": 2, "tensor": 4}, P(None, None), ("node",)),
        (("model", "heads", None), {"tensor": 4}, P(None, ("tensor",), None), ()),
        ((), ALL, P(), DATA),
        (("batch",), ALL, P(DATA), ()),
    ],
    ids=str,
)
def test_where_compute_wants_a_weight_and_who_else_has_it(names, sizes, spec, summed):
    layout = small.layout_of(sizes)
    assert layout.spec(names) == spec
    assert layout.summed(names) == summed


def test_unknown_logical_axis():
    layout = small.layout_of(ALL, zero=1)
    for ask in (
        lambda: layout.spec(("model", "expert")),
        lambda: layout.storage(("expert",), (8,)),
        lambda: layout.summed(("expert",)),
        lambda: layout.mesh_axes("gpu"),
    ):
        with pytest.raises(ValueError, match=r"unknown logical axis '(expert|gpu)'; known: batch"):
            ask()
    with axes.active(layout), pytest.raises(ValueError, match="unknown logical axis"):
        axes.fan_in(jnp.ones(2), "expert")


def test_active_nests_and_resets():
    outer, inner = small.layout_of({"gpu": 4}), small.layout_of({"node": 2, "tensor": 2})
    assert axes.current() is None
    with axes.active(outer):
        with axes.active(inner):
            assert axes.current() is inner
            assert axes.names("experts") == ("node",) and axes.size("heads") == 2
        assert axes.current() is outer
        assert axes.names("experts") == ("gpu",) and axes.size("experts") == 4
        with axes.active(None):
            assert axes.size("experts") == 1
        with pytest.raises(KeyError), axes.active(inner):
            raise KeyError
        assert axes.current() is outer
    assert axes.current() is None


def test_alone_nothing_is_done():
    x = jnp.ones(3)
    assert axes.fan_in(x, "heads") is x and axes.fan_out(x, "heads") is x
    assert axes.names("heads") == () and axes.size("heads") == 1 and axes.index("heads") == 0
    with axes.active(small.layout_of({"gpu": 8})):
        assert axes.fan_in(x, "heads") is x and axes.fan_out(x, "heads") is x
