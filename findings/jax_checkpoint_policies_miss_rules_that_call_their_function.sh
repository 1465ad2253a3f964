#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1 (PyPI, on a CPU): a jax.checkpoint policy that saves matmuls saves none of a jax.custom_vjp function
# whose forward rule calls the function itself, and all of them where the rule computes the product in its own lines.
#
# The forward rule is traced in place of the function, so that a policy sees the equations of the rule. `return f(x, w), (x, w)`,
# the usual way to write one, leaves a call of the custom_vjp function there, into which no policy looks: it is no matmul, and
# its result is computed again. Nothing says so; only memory and time tell.
#
# What it means for a program: write the primal computation out in the forward rule, or name its result with checkpoint_name
# outside of the function, where matmuls have gradients of their own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/run.py" <<'EOF'
import jax
import jax.numpy as jnp


def matmul(x, w):
    return x @ w


def backward(kept, pull):
    x, w = kept
    return pull @ w.T, x.T @ pull


calls, writes_out = jax.custom_vjp(matmul), jax.custom_vjp(matmul)
calls.defvjp(lambda x, w: (calls(x, w), (x, w)), backward)
writes_out.defvjp(lambda x, w: (x @ w, (x, w)), backward)


def saved(product):
    """Number of arrays of activations that two layers save: their input, and results of matmuls."""
    layers = jax.checkpoint(
        lambda x, w: jnp.tanh(product(jnp.tanh(product(x, w)), w)).sum(),
        policy=jax.checkpoint_policies.dots_saveable,
    )
    pull = jax.vjp(layers, jnp.ones((4, 8)), jnp.ones((8, 8)))[1]
    return sum(leaf.shape == (4, 8) for leaf in jax.tree.leaves(pull))


print("jax", jax.__version__)
found = {
    "no rule": saved(matmul),
    "the rule computes the product": saved(writes_out),
    "the rule calls the function": saved(calls),
}
for name, count in found.items():
    print(f"{name:30} {count} arrays saved")
assert list(found.values()) == [3, 3, 1], found
EOF

for versions in "python3.11 0.10.2" "python3.12 0.12.0.1"; do
  set -- $versions
  "$1" -m venv "$folder/$2"
  "$folder/$2/bin/pip" install -q "jax==$2" "jaxlib==$2"
  JAX_PLATFORMS=cpu "$folder/$2/bin/python" "$folder/run.py"
done
