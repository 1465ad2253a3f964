#!/usr/bin/env bash
# jax 0.10.2: attention by cuDNN cannot be traced on a machine without a GPU, even for another one.
# jax.export for "cuda" lowers a matmul or a softmax on any machine, but
# jax.nn.dot_product_attention(implementation="cudnn") asks for this process's cuDNN and GPU while it
# is traced. So it can neither be exported, nor compiled for a cluster that is not there, nor be the
# CUDA branch of lax.platform_dependent in a program that is to run on the CPU, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.3.5"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import functools

import jax
import jax.numpy as jnp

array = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
attention = functools.partial(jax.nn.dot_product_attention, is_causal=True)
cudnn = functools.partial(attention, implementation="cudnn")
plain = functools.partial(attention, implementation="xla")


def by_platform(query, key, value):
    return jax.lax.platform_dependent(query, key, value, cuda=cudnn, default=plain)


def outcome(function, platform):
    try:
        jax.export.export(jax.jit(function), platforms=[platform])(array, array, array)
    except RuntimeError as error:
        return str(error)
    return "exported"


found = {
    "plain attention, for cuda": outcome(plain, "cuda"),
    "cuDNN's, for cuda": outcome(cudnn, "cuda"),
    "by platform, for cuda": outcome(by_platform, "cuda"),
    "by platform, for cpu": outcome(by_platform, "cpu"),
}
print(f"jax {jax.__version__}, no GPU")
for name, said in found.items():
    print(f"{name}: {said}")
assert found.pop("plain attention, for cuda") == "exported", "plain attention is not exported"
assert all("cuDNN" in said for said in found.values()), "cuDNN's attention can now be traced"
PYTHON
