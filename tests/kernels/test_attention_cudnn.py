"""cuDNN's attention: the call, and what is left where cuDNN refuses it. No GPU is asked here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax._src.cudnn import fused_attention_stablehlo

from deepseek_jax.kernels import attention_cudnn, kernel_names
from deepseek_jax.kernels.attention_cudnn import PADDED, UNPADDED

DEFAULTS = ("", "0", 0, False, "PRIMITIVE_TYPE_INVALID", [], {}, 42)  # 42: a seed of dropout


def without_defaults(found):
    """JSON of a protocol buffer without the fields that have their default."""
    if not isinstance(found, dict):
        return found
    inner = {key: without_defaults(value) for key, value in found.items()}
    return {key: value for key, value in inner.items() if value not in DEFAULTS}


@pytest.mark.parametrize("backward", [False, True])
def test_the_call_is_the_one_that_jax_makes(backward, monkeypatch):
    """JAX's private functions make it too, once for each version."""
    private = fused_attention_stablehlo
    monkeypatch.setattr(private, "element_type_to_backend_config_type_mapping", lambda _: "BF16")
    want = private.create_dot_product_attention_backend_config(
        2, 3, 320, 320, None, 0.25, 42, 0.0, private.MaskType.CAUSAL,
        private.AttentionLayout.BTNH.value, None, 1, False, backward,
    )  # fmt: skip
    query = jax.ShapeDtypeStruct((2, 320, 3, 192), jnp.bfloat16)
    got = attention_cudnn.backend_config(query, 0.25, backward=backward)
    assert without_defaults(json.loads(got)) == without_defaults(json.loads(want))


@pytest.mark.parametrize(
    ("allowed", "kernel"),
    [
        ([kernel_names.ATTENTION, kernel_names.ATTENTION_PADDED], UNPADDED),
        ([kernel_names.ATTENTION_PADDED, kernel_names.PRODUCT], PADDED),
        ([kernel_names.PRODUCT], None),
    ],
)
def test_the_first_that_passed_its_check_is_chosen(allowed, kernel):
    assert attention_cudnn.chosen(frozenset(allowed)) is kernel


@pytest.mark.parametrize(
    ("width", "value", "dtype", "taken"),
    [
        (192, 128, jnp.bfloat16, True),
        (12, 8, jnp.bfloat16, False),
        (320, 256, jnp.bfloat16, False),
        (192, 128, jnp.float32, False),
    ],
)
def test_shapes_that_it_takes(width, value, dtype, taken):
    shapes = (jax.ShapeDtypeStruct((1, 16, 2, w), dtype) for w in (width, value))
    assert attention_cudnn.takes(*shapes) == taken


def test_padded_values_change_nothing(monkeypatch):
    """JAX's public function, by XLA in place of cuDNN: the output and sums of unpadded values."""
    public = jax.nn.dot_product_attention

    def by_xla(*parts, implementation, **rest):
        assert implementation == "cudnn" and len({part.shape for part in parts}) == 1
        return public(*parts, implementation="xla", **rest)

    random = np.random.default_rng(0)
    query, key, value, pull = (
        jnp.asarray(random.normal(size=(2, 24, 3, w)), jnp.float32) for w in (24, 24, 16, 16)
    )

    def plain(query, key, value):
        scores = 0.2 * jnp.einsum("BSHX,BTHX->BHST", query, key)
        scores = jnp.where(jnp.tri(24)[None, None] > 0, scores, -jnp.inf)
        out = jnp.einsum("BHST,BTHW->BSHW", jax.nn.softmax(scores), value)
        return out, jax.nn.logsumexp(scores, axis=-1)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)

    def both(query, key, value, pull):
        out, log_sums = PADDED.forward(query, key, value, 0.2)
        got = out, log_sums, PADDED.backward(query, key, value, out, log_sums, pull, 0.2)
        (out, log_sums), back = jax.vjp(plain, query, key, value)
        return got, (out, log_sums, back((pull, jnp.zeros_like(log_sums))))

    got, want = jax.jit(both)(query, key, value, pull)
    small.assert_close(got, want, 1e-5)
