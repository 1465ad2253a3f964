"""Chunked cross entropy against float64: values, gradients, a split vocabulary, large logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.model.loss import head_loss
from deepseek_jax.parallel import axes

ROWS, WIDTH, VOCAB = 23, 8, 40


def drawn(scale=1.0, dtype=np.float32):
    """hidden MD, head DV, targets M, weights M of which some are zero."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(scale * rng.normal(size=(ROWS, WIDTH)), dtype)
    head = jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), dtype)
    weights = rng.uniform(0.01, 0.1, ROWS) * (np.arange(ROWS) % 4 > 0)
    targets = rng.integers(0, VOCAB, ROWS)
    return hidden, head, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)


def expected(hidden, head, targets, weights):
    """(total, entropies, d_hidden, d_head) in float64."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = hidden @ head
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    hit = np.eye(VOCAB)[np.asarray(targets)]
    entropies = -(hit * log_p).sum(-1)
    d_logits = (np.exp(log_p) - hit) * weights[:, None]
    return (weights * entropies).sum(), entropies, d_logits @ head.T, hidden.T @ d_logits


def computed(hidden, head, targets, weights, chunk):
    run = jax.value_and_grad(head_loss, (0, 1), has_aux=True)
    (total, entropies), (d_hidden, d_head) = run(hidden, head, targets, weights, chunk)
    return total, entropies, d_hidden, d_head


run = jax.jit(computed, static_argnums=4)


@pytest.mark.parametrize("chunk", [1, 7, 23, 64])
def test_follows_float64_in_any_chunks(chunk):
    data = drawn()
    got = run(*data, chunk)
    small.assert_close(got, expected(*data), rtol=2e-6)
    total, entropies = jax.jit(head_loss, static_argnums=4)(*data, chunk)  # not differentiated
    small.assert_close((total, entropies), expected(*data)[:2], rtol=2e-6)


def test_rows_that_count_nothing_get_no_gradient_but_an_entropy():
    data = drawn()
    _, entropies, d_hidden, _ = run(*data, 7)
    none = np.asarray(data[3]) == 0
    assert none.any()
    np.testing.assert_array_equal(np.asarray(d_hidden)[none], 0)
    assert (np.asarray(entropies)[none] > 0).all()


def test_large_logits_stay_finite():
    data = drawn(scale=1e3)  # exp of these overflows float32
    assert float(jnp.abs(data[0] @ data[1]).max()) > 1e3
    small.assert_close(run(*data, 7), expected(*data), rtol=2e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_split_vocabulary_gives_the_same(parts):
    data = drawn(scale=3.0)
    mesh, layout = small.mesh_of({"tensor": parts}), small.layout_of({"tensor": parts})

    def local(*data):
        with axes.active(layout):
            return computed(*data, 7)

    split = P(None, "tensor")
    data = jax.device_put(data, tuple(NamedSharding(mesh, s) for s in (P(), split, P(), P())))
    whole = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), split, P(), P()), out_specs=(P(), P(), P(), split),
        check_vma=False,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        got = jax.device_get(jax.jit(whole)(*data))
    small.assert_close(got, expected(*data), rtol=2e-6)


def test_vocabulary_over_devices_with_rows_of_their_own():
    """Two pairs of devices with different rows; each pair splits the vocabulary."""
    hidden, head, targets, weights = drawn(scale=3.0)
    data = hidden[:22], head, targets[:22], weights[:22]
    sizes = {"gpu": 2, "tensor": 2}
    mesh = small.mesh_of(sizes)
    layout = small.layout_of(sizes)

    def local(*data):
        with axes.active(layout):
            total, *rest = computed(*data, 4)
            return jax.lax.psum(total, "gpu"), *rest

    rows, split = P("gpu"), P(None, ("gpu", "tensor"))
    given = rows, split, rows, rows
    whole = jax.shard_map(
        local, mesh=mesh, in_specs=given, out_specs=(P(), rows, rows, split), check_vma=False
    )
    with jax.set_mesh(mesh):
        placed = jax.device_put(data, tuple(NamedSharding(mesh, s) for s in given))
        got = jax.device_get(jax.jit(whole)(*placed))
    small.assert_close(got, expected(*data), rtol=2e-6)


def test_bfloat16_rounds_operands_and_gradients_only():
    """Products of bfloat16 numbers are exact in float32, so the value keeps float32's digits."""
    data = drawn(dtype=jnp.bfloat16)
    got, want = run(*data, 7), expected(*data)
    assert [part.dtype for part in got] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    small.assert_close(got[:2], want[:2], rtol=2e-6)
    small.assert_close(got[2:], want[2:], rtol=2**-8)


def test_cotangent_scales_the_gradient():
    data = drawn()
    scaled = jax.grad(lambda h, w: 3 * head_loss(h, w, *data[2:], 7)[0], (0, 1))(*data[:2])
    small.assert_close(scaled, tuple(3 * d for d in expected(*data)[2:]), rtol=2e-6)


def test_no_gradient_flows_through_the_entropies():
    data = drawn()
    recorded = jax.grad(lambda h, w: head_loss(h, w, *data[2:], 7)[1].sum(), (0, 1))
    for gradient in recorded(*data[:2]):
        np.testing.assert_array_equal(gradient, 0)
