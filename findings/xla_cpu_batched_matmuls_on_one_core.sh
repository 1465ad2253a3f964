#!/usr/bin/env bash
# XLA for CPUs computes a batch of matmuls of attention's size, einsum "bhsd,bhtd->bhst" with 128
# positions, on one core, and one large matmul on all of them. In jax 0.10.2 that is the default,
# and the flag that leaves only reductions to YNNPACK (so that Eigen computes matmuls) spreads the
# batch over the cores. In jax 0.12.0.1 it is the reverse: the default spreads it, and the same flag
# puts it on one core. A flag that was tuned on one release so slows the next one, with no warning.
# Busy cores are processor time over elapsed time; the machine needs two idle cores or more.
# Seen on two cores: 0.10.2: 1.0 and 2.0 (2.1 and 1.6 ms); 0.12.0.1: 1.9 and 1.0 (1.0 and 2.1 ms).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/busy.py" <<'PYTHON'
import time

import jax
import jax.numpy as jnp

q = jnp.ones((16, 4, 128, 96))
scores = jax.jit(lambda q, k: jnp.einsum("bhsd,bhtd->bhst", q, k))
scores(q, q).block_until_ready()
elapsed, processor = time.perf_counter(), time.process_time()
for _ in range(300):
    scores(q, q).block_until_ready()
elapsed, processor = time.perf_counter() - elapsed, time.process_time() - processor
print(f"{processor / elapsed:.2f}")
PYTHON
FLAG=--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE
look() { # PYTHON JAX JAXLIB
  "$1" -m venv "$folder/$2"
  "$folder/$2/bin/pip" install -q "jax==$2" "jaxlib==$3" "numpy==2.3.5"
  default=$(JAX_PLATFORMS=cpu XLA_FLAGS= "$folder/$2/bin/python" "$folder/busy.py")
  flagged=$(JAX_PLATFORMS=cpu XLA_FLAGS=$FLAG "$folder/$2/bin/python" "$folder/busy.py")
  echo "jax $2: busy cores $default by default, $flagged with the flag"
}
look python3.11 0.10.2 0.10.2
awk -v a="$default" -v b="$flagged" 'BEGIN { exit !(a < 1.3 && b > 1.5) }'
look python3.12 0.12.0.1 0.12.0.1
awk -v a="$default" -v b="$flagged" 'BEGIN { exit !(a > 1.5 && b < 1.3) }'
