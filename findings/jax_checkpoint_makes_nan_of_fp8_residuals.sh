#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1 (PyPI, on a CPU): a float8_e4m3fn residual that a jax.checkpoint policy saves becomes NaN where its
# magnitude is 256 or more, and so does the output of forward.
#
# jax.checkpoint puts a reduce_precision with the exponent and mantissa bits of the residual's dtype on what it saves, so that
# XLA's excess precision cannot make forward and backward differ. reduce_precision follows IEEE, where a number with all
# exponent bits set is infinite or NaN. float8_e4m3fn has no infinity and gives these bits to 256 ... 448. A quantiser that
# scales each tile to 448, as FP8 training does, makes such numbers in most tiles. float8_e5m2, which has infinities, and
# bfloat16 are not affected. Without jax.checkpoint, or with a policy that does not save the residual, nothing is lost.
#
# What it means for a program: save the bytes, bitcast to uint8, under the checkpoint name, and bitcast them back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/run.py" <<'EOF'
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name


def forward(x, dtype, as_bytes):
    small = x.astype(dtype)
    if as_bytes:
        bits = checkpoint_name(lax.bitcast_convert_type(small, jnp.uint8), "kept")
        small = lax.bitcast_convert_type(bits, dtype)
    else:
        small = checkpoint_name(small, "kept")
    return jnp.sin(x) * small.astype(jnp.float32)


def output(dtype, saved, as_bytes=False):
    names = ("kept",) if saved else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    run = jax.checkpoint(lambda x: forward(x, dtype, as_bytes), policy=policy)
    x = jnp.asarray([1.0, 240.0, 256.0, 448.0])
    out = jax.jit(lambda x: jax.vjp(run, x)[0])(x)
    return [bool(finite) for finite in jnp.isfinite(out)]


print("jax", jax.__version__)
e4m3, e5m2 = jnp.float8_e4m3fn, jnp.float8_e5m2
print("inputs 1, 240, 256, 448; is the output of forward finite?")
found = {
    "e4m3 saved": output(e4m3, True),
    "e4m3 not saved": output(e4m3, False),
    "e4m3 saved as bytes": output(e4m3, True, as_bytes=True),
    "e5m2 saved": output(e5m2, True),
}
for name, finite in found.items():
    print(f"{name:22}", finite)
whole = [True] * 4
assert found["e4m3 saved"] == [True, True, False, False], found
assert all(finite == whole for name, finite in found.items() if name != "e4m3 saved"), found
EOF

for versions in "python3.11 0.10.2" "python3.12 0.12.0.1"; do
  set -- $versions
  "$1" -m venv "$folder/$2"
  "$folder/$2/bin/pip" install -q "jax==$2" "jaxlib==$2"
  JAX_PLATFORMS=cpu "$folder/$2/bin/python" "$folder/run.py"
done
