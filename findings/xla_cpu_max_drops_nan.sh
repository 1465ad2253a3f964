#!/usr/bin/env bash
# On a CPU, the maximum of a large float32 array that holds a NaN is the largest of the other values:
# jnp.max, compiled, returns a finite number from 4,096 elements on, and NaN below. Documentation of
# NumPy and jax.numpy promises NaN, bfloat16 gives it, and so does the flag that takes reductions
# away from the library YNNPACK, to which XLA gives large reductions. A scale of a tile or a check
# for overflow that is made of a maximum so misses a NaN, in silence, on the machine where tests run.
# Workaround: take the maximum of the bits as integers (floats >= 0 have the order of their bits).
# Seen: jax 0.10.2 and 0.12.0.1: "1024 nan, 4096 1.0, bfloat16 nan, as integers nan"; with the flag
# "4096 nan".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/largest.py" <<'PYTHON'
import jax
import jax.numpy as jnp


def largest(size, dtype="float32"):
    x = jnp.ones(size, dtype).at[size // 3].set(jnp.nan)
    return float(jax.jit(jnp.max)(x))


def as_integers(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.int32).max()
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


x = jnp.ones(4096).at[7].set(jnp.nan)
print(
    f"1024 {largest(1024)}, 4096 {largest(4096)}, bfloat16 {largest(4096, 'bfloat16')}, "
    f"as integers {float(jax.jit(as_integers)(x))}"
)
PYTHON
FLAG=--xla_cpu_experimental_ynn_fusion_type=
look() { # PYTHON JAX JAXLIB
  "$1" -m venv "$folder/$2"
  "$folder/$2/bin/pip" install -q "jax==$2" "jaxlib==$3" "numpy==2.3.5"
  seen=$(JAX_PLATFORMS=cpu XLA_FLAGS= "$folder/$2/bin/python" "$folder/largest.py")
  flagged=$(JAX_PLATFORMS=cpu XLA_FLAGS=$FLAG "$folder/$2/bin/python" "$folder/largest.py")
  echo "jax $2: $seen; with the flag: $flagged"
  [[ $seen == "1024 nan, 4096 1.0, bfloat16 nan, as integers nan" ]]
  [[ $flagged == "1024 nan, 4096 nan, bfloat16 nan, as integers nan" ]]
}
look python3.11 0.10.2 0.10.2
look python3.12 0.12.0.1 0.12.0.1
