"""Operations of a profile, and the part of the model to which each belongs."""

import jax
import jax.numpy as jnp

from deepseek_jax.bench import profile


def test_operations_of_a_trace_belong_to_their_parts(tmp_path):
    def step(x):
        with jax.named_scope("attention"):
            product = x @ x
        with jax.named_scope("router"):
            return jnp.sort(product, axis=-1)

    x = jnp.ones((256, 256))
    compiled = jax.jit(step).lower(x).compile()
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(compiled(x))
    (file,) = tmp_path.rglob("*.xplane.pb")
    spent = profile.by_part(profile.operations(file), profile.scopes(compiled.as_text()))
    assert spent["attention"][0] > 0
    assert spent["router"][0] == 0 and spent["router"][1] > 0


def test_a_loop_is_not_counted_beside_the_operations_in_it():
    spent = [("dot.1", 3.0), ("while.2", 10.0), ("fusion.3", 4.0), ("copy", 5.0)]
    scope = {
        "dot.1": "jit(step)/jvp(loss)/while/body/dot_general",
        "fusion.3": "jit(step)/transpose(jvp())/closed_call/layer/attention/norm/mul",
    }
    parts = profile.by_part(iter(spent), scope)
    assert parts == {"loss": (3.0, 0.0), "norm": (0.0, 4.0), "rest": (0.0, 5.0)}
