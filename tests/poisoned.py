"""Runs of `tiny.py` with batches that make an anomaly wherever they are trained on."""

from collections.abc import Collection

import jax
import numpy as np
import pytest

from deepseek_jax.train import loop

Inputs = loop.Inputs


def poison(
    patch: pytest.MonkeyPatch, *, nan: Collection[int] = (), noise: Collection[int] = ()
) -> None:
    """Spoils the batches after which so many sequences of the data are consumed.

    Args:
      nan: their gradients are NaN.
      noise: their tokens are drawn at random, so that their loss is high.
    """

    def inputs(tokens, count, hyper, position):
        if position["consumed"] in nan:
            hyper = loop.dataclasses.replace(hyper, mtp_weight=float("nan"))
        if position["consumed"] in noise:
            drawn = np.random.default_rng(0).integers(0, 256, tokens.shape, np.int32)
            tokens = jax.make_array_from_callback(
                tokens.shape, tokens.sharding, lambda index: drawn[index]
            )
        return Inputs(tokens, count, hyper, position)

    patch.setattr(loop, "Inputs", inputs)
