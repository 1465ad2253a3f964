"""Eight emulated CPU devices, and no silent broadcasting of ranks."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes():
    """No silent mixing of dtypes, for model and precision code."""
    with jax.numpy_dtype_promotion("strict"):
        yield
