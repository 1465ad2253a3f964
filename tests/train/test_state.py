"""A copy of a state in host memory, while steps move the state on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.train import state


def test_a_copy_in_host_memory_outlives_the_steps_that_are_given_the_state():
    mesh = small.mesh_of({"gpu": 8})
    place = NamedSharding(mesh, P("gpu"))
    weights = jax.device_put(jnp.arange(8 * 4096.0).reshape(8, 4096), place)
    whole = jax.device_put(jnp.int32(0), NamedSharding(mesh, P()))
    now = state.TrainState(whole, {"w": weights}, {}, (), {"w": np.ones(3)})
    start = np.asarray(weights)

    def add(old):
        return dataclasses.replace(old, step=old.step + 1, params={"w": old.params["w"] + 1})

    step, copies = jax.jit(add, donate_argnums=0), []
    for _ in range(20):  # none is waited for
        copies.append(state.copy_to_host(now))
        moved = step(dataclasses.replace(now, ema=None))
        now = dataclasses.replace(moved, ema=now.ema)
    for number, copy in enumerate(copies):
        assert int(copy.step) == number and copy.ema is now.ema
        np.testing.assert_array_equal(copy.params["w"], start + number)
        assert copy.params["w"].sharding.memory_kind == state.host_memory()
        assert copy.params["w"].sharding.is_equivalent_to(
            place.with_memory_kind(state.host_memory()), 2
        )
