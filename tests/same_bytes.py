"""Tensors of published folders, compared byte by byte."""

import numpy as np

from deepseek_jax.checkpoint.hf import safetensors


def tensors_of(folder):
    return {name: tensor.array for name, tensor in safetensors.open_folder(folder).items()}


def assert_same_bytes(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].tobytes() == np.ascontiguousarray(value).tobytes(), name
