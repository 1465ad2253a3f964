#!/usr/bin/env bash
# jax 0.10.2: a pullback of jax.vjp is a pytree, and jax.eval_shape finds the same structure in two of
# them; lax.scan stacks them, too. But lax.cond refuses to return one, even where both branches call
# the same function: "cond branch outputs must have the same pytree structure". Each branch is traced
# on its own, and the pullback's structure holds objects of its trace. A pipeline that skips idle
# chunks by lax.cond so has to return leaves and put the structure back outside.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.3.5"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp


def forward(weight, x):
    return jax.vjp(lambda weight, x: jnp.tanh(x @ weight), weight, x)


def skippable(on, weight, x):
    return jax.lax.cond(on, lambda: forward(weight, x), lambda: forward(weight, x))[0]


def stacked(weight, x):
    return jax.tree.leaves(jax.lax.scan(lambda x, _: forward(weight, x), x, None, length=3)[1])


weight, x = jnp.ones((4, 4)), jnp.ones((2, 4))
one, other = (jax.tree.structure(jax.eval_shape(forward, weight, x)) for _ in range(2))
equal, leaves = one == other, len(jax.jit(stacked)(weight, x))
try:
    jax.jit(skippable)(True, weight, x)
    said = "nothing"
except TypeError as error:
    said = str(error).splitlines()[0]
print(f"jax {jax.__version__}: equal by eval_shape: {equal}; leaves stacked by scan: {leaves}")
print(f"lax.cond said: {said}")
assert equal and leaves, "eval_shape or scan has changed"
assert "same pytree structure" in said, "lax.cond has changed"
PYTHON
