#!/usr/bin/env bash
# jax 0.10.2 on a CPU: jnp.sum adds bfloat16 numbers in float32, but the gradient of a bfloat16 table
# lookup adds them in bfloat16. One row that 4,096 tokens read, each with a gradient of 1, gets 256
# and not 4,096: from 256 on, 256 + 1 rounds back to 256. A mixed-precision run that casts its weights
# first, as most do, so loses the gradient of its most frequent tokens, with no warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.3.5"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

COUNT = 4096
tokens = jnp.zeros((COUNT,), jnp.int32)  # one token, many times


def looked_up(table):
    return table[tokens].astype(jnp.float32).sum()


gradient = {
    dtype: float(jax.grad(looked_up)(jnp.ones((8, 4), dtype))[0, 0])
    for dtype in ("float32", "bfloat16")
}
plain = float(jnp.sum(jnp.ones((COUNT,), jnp.bfloat16)))
print(f"jax {jax.__version__}: jnp.sum of {COUNT} bfloat16 ones is {plain:.0f}")
print(f"gradient of one row read {COUNT} times: {gradient}")
assert plain == COUNT, "jnp.sum of bfloat16 no longer adds in float32"
assert gradient == {"float32": 4096.0, "bfloat16": 256.0}, "the lookup's gradient has changed"
PYTHON
