"""FP8 weights of a checkpoint keep their bits: loaded, multiplied with, placed and written."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from equations import checkpoints
from equations import tiles as equations
from jax.sharding import PartitionSpec as P

import deepseek_jax
from deepseek_jax.checkpoint import load
from deepseek_jax.checkpoint.hf import names, parts, safetensors
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError
from deepseek_jax.model import params
from deepseek_jax.model.execution import Execution
from deepseek_jax.parallel import axes
from deepseek_jax.precision import linear_input
from deepseek_jax.precision.einsum import exact_einsum
from deepseek_jax.precision.fp8_tiles import E4M3, dequantise_tiles, quantise_tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight
from deepseek_jax.precision.grouped import grouped_matmul
from deepseek_jax.precision.recipes import FLOAT32, FP8, Recipe, recipe
from deepseek_jax.train import evaluation

FREE = recipe("fp8", "free")
PROJECTION = "model.layers.3.eh_proj.weight"  # BF16 in the checkpoint, as in released ones
EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"

# Widths of 136, 200, 138 and 64, and heads of 24 and 28: ragged blocks, and parts that cut them.
LAYOUTS = {
    "ZeRO-3": (dict(replica=2, gpu=2), 3),
    "ZeRO-1, tensor, pipe": (dict(pipe=2, gpu=2, tensor=2), 1),
}


@pytest.fixture(scope="module")
def stored():
    """(settings, tensors, exact values), whose blocks have any scale."""
    return checkpoints.make_fp8()


@pytest.fixture(scope="module")
def folder(stored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    checkpoints.write(folder, *stored[:2], shards=2)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return deepseek_jax.load(folder, dtype="fp8")


def blocks(tensors):
    """Names of the FP8 tensors, and of their scales."""
    own = {name for name, value in tensors.items() if value.dtype == E4M3}
    return own | {name + names.SCALE for name in own}


def assert_same_bytes(got, want, names):
    for name in names:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(
            np.ascontiguousarray(got[name]).view(np.uint8),
            np.ascontiguousarray(want[name]).view(np.uint8),
            err_msg=name,
        )


def quantised_again(matrix):
    """E4M3 values of a matrix in the blocks that `prepare` would make of it."""
    values = np.empty(matrix.shape, E4M3)
    for corner in np.ndindex(tuple(-(-size // 128) for size in matrix.shape)):
        at = tuple(slice(128 * i, 128 * i + 128) for i in corner)
        values[at], _ = equations.quantise_tile(matrix[at], power_of_two=False)
    return values


def test_loading_keeps_every_byte(model, stored):
    tensors = stored[1]
    loaded = names.to_published(model.config, model.weights)
    assert blocks(loaded) == blocks(tensors) | {PROJECTION, PROJECTION + names.SCALE}
    assert_same_bytes(loaded, tensors, blocks(tensors))
    # Quantised again from the exact products, no matrix would have these bytes.
    for name in blocks(tensors) - {name for name in tensors if name.endswith(names.SCALE)}:
        again = quantised_again(stored[2][name])
        assert (tensors[name].view(np.uint8) != again.view(np.uint8)).any(), name


def test_a_weight_takes_one_byte(model):
    for weight, variable in zip(
        params.describe(model.weights),
        jax.tree.leaves(model.weights, is_leaf=params.is_variable),
        strict=True,
    ):
        arrays = jax.tree.leaves(variable[...])
        expected = 1 if weight.roles is not None else 4 if weight.sensitive else 2
        assert arrays[0].nbytes == expected * np.prod(weight.shape), weight.path
        if weight.roles is not None:
            assert arrays[1].shape == weight.scales.shape


def dense(x, subscripts, weight):
    return FREE.einsum(subscripts, x, weight)


def grouped(x, sizes, weight):
    joined = weight.reshape(*weight.shape[:-2], -1) if weight.ndim == 4 else weight
    return FREE.grouped(x, joined, jnp.asarray(sizes), x.shape[0])


SIZES = np.array([3, 0, 2, *[1] * 13], np.int32)  # rows of each of 16 experts
LINEAR = {
    "self_attn.q_a_proj": ("query_down", "MD,DQ->MQ"),
    "self_attn.q_b_proj": ("query_up", "MQ,QHX->MHX"),
    "self_attn.kv_a_proj_with_mqa": ("kv_down", "MD,DX->MX"),
    "self_attn.kv_b_proj": ("kv_up", "MC,CHX->MHX"),
    "self_attn.o_proj": ("out", "MHW,HWD->MD"),
}


def reference(x, loaded, exact):
    """float64 product of x in tiles and of the stored values times their scales; x whole."""
    tiles = equations.dequantise(*equations.quantise(x, power_of_two=False))
    return tiles @ exact[loaded].astype(np.float64).T


def assert_near(got, want):
    """Equal but for the order of sums and the result's rounding to bfloat16, 2^-9 of it."""
    got = np.asarray(got.astype(jnp.float32), np.float64).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-5 * np.abs(want).max())
    assert np.abs(want).max() > 0


def rows(count, width):
    x = np.random.default_rng(width).standard_normal((count, width)).astype(jnp.bfloat16)
    return jnp.asarray(x), x.astype(np.float32)


@pytest.mark.parametrize("name", LINEAR)
def test_attention_multiplies_with_the_stored_values(name, model, stored):
    path, subscripts = LINEAR[name]
    weight = jax.tree.map(lambda x: x[1], getattr(model.weights.moe_layers.attention, path)[...])
    published = f"model.layers.2.{name}.weight"
    depth = stored[2][published].shape[1]
    x, wide = rows(5, depth)
    inner = weight.shape[: len(subscripts.split(",")[0]) - 1]
    got = jax.jit(dense, static_argnums=1)(x.reshape(5, *inner), subscripts, weight)
    assert_near(got, reference(wide, published, stored[2]))


@pytest.mark.parametrize("half", ["gate_up", "down"])
def test_experts_multiply_with_the_stored_values(half, model, stored):
    experts = model.weights.moe_layers.feed.experts
    weight = jax.tree.map(lambda x: x[1], getattr(experts, half)[...])
    x, wide = rows(SIZES.sum(), weight.shape[1])
    got = jax.jit(grouped)(x, SIZES, weight)
    ends, parts = np.cumsum(SIZES), []
    for expert, (start, end) in enumerate(zip(ends - SIZES, ends, strict=True)):
        matrices = ("gate_proj", "up_proj") if half == "gate_up" else ("down_proj",)
        own = [f"model.layers.2.mlp.experts.{expert}.{matrix}.weight" for matrix in matrices]
        parts.append(
            np.concatenate([reference(wide[start:end], name, stored[2]) for name in own], 1)
        )
    assert_near(got, np.concatenate(parts))


def test_writing_gives_the_same_bytes_and_outputs(model, stored, tmp_path):
    model.save(tmp_path / "out")
    written = {n: t.array for n, t in safetensors.open_folder(tmp_path / "out").items()}
    assert_same_bytes(written, stored[1], blocks(stored[1]))
    for name in stored[1].keys() - blocks(stored[1]) - {PROJECTION}:
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert_same_bytes(written, stored[1], [name])
        np.testing.assert_array_equal(written[name].astype(np.float32), stored[2][name])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["quantization_config"]["weight_block_size"] == [128, 128]
    tokens = checkpoints.tokens(stored[0], length=24)
    again = deepseek_jax.load(tmp_path / "out", dtype="fp8")
    assert again.loss(tokens) == model.loss(tokens)


class ExactWeights(Recipe):
    """FREE with weights of linear layers in float32: the exact products of the file's blocks."""

    def prepare(self, weight, *, sensitive, linear=None):
        return weight if linear else super().prepare(weight, sensitive=sensitive)

    def tiles(self, x):
        return dequantise_tiles(quantise_tiles(x, power_of_two=False), jnp.float32)

    def einsum(self, subscripts, x, weight):
        of_x, of_weight, _ = subscripts.replace("->", ",").split(",")
        inner = sum(letter in of_x for letter in of_weight)
        assert of_x.endswith(of_weight[:inner]), subscripts
        x = linear_input.numbers(x).astype(jnp.bfloat16)
        tiles = self.tiles(x.reshape(*x.shape[: x.ndim - inner], -1)).reshape(x.shape)
        return exact_einsum(subscripts, tiles, weight).astype(x.dtype)

    def grouped(self, rows, weight, sizes, likely):
        rows = linear_input.numbers(rows)
        product = grouped_matmul(self.tiles(rows), weight, sizes, likely=likely)
        return product.astype(rows.dtype)


def test_a_forward_pass_computes_with_the_stored_values(model, stored, folder):
    exact = ExactWeights("exact", jnp.dtype(jnp.bfloat16))
    weights = params.prepare(deepseek_jax.load(folder).weights, exact)
    reference = dataclasses.replace(model, weights=weights, how=Execution(recipe=exact))
    tokens = checkpoints.tokens(stored[0], length=24)
    got, want = (one.loss(tokens) for one in (model, reference))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.isfinite(got)


@pytest.mark.parametrize("sizes, zero", LAYOUTS.values(), ids=LAYOUTS)
def test_devices_hold_the_same_bits(sizes, zero, folder, model):
    layout, mesh = small.layout_of(sizes, zero), small.mesh_of(sizes)
    _, weights, _ = params.split(load.load(folder, FREE, layout, mesh))

    def local(weights):
        with axes.active(layout):
            ready = params.gather(params.prepare(weights, FREE), layout)
            variables = jax.tree.leaves(ready, is_leaf=params.is_variable)
            return [small.whole_fp8(v, layout) for v in variables if is_fp8(v)]

    specs = params.storage(weights, layout)
    with jax.set_mesh(mesh):
        got = jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False)
        )(weights)
    single = jax.tree.leaves(params.split(model.weights)[1], is_leaf=params.is_variable)
    want = [small.whole_fp8(v, small.layout_of({})) for v in single if is_fp8(v)]
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_devices_with_memory_of_their_own_get_the_same_bits(folder, monkeypatch):
    want = load.load(folder, FREE)
    monkeypatch.setattr(parts, "HOST", ())
    chex.assert_trees_all_equal(load.load(folder, FREE), want)


def is_fp8(variable):
    return isinstance(variable[...], Fp8Weight)


def test_a_mesh_scores_as_one_device(stored, tmp_path):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 256, 33, np.uint16))
    tensors = {
        name: value * np.float32(136**-0.5) if name.endswith(names.SCALE) else value
        for name, value in stored[1].items()
    }  # so that products keep their size, and rounding does not choose other experts
    checkpoints.write(tmp_path / "calm", stored[0], tensors)
    checkpoint = open_checkpoint(tmp_path / "calm")

    def loss(**mesh):
        return evaluation.score_checkpoint(
            checkpoint, str(tmp_path / "tokens.npy"), checkpoint.config("fp8"), mesh=mesh,
            length=16, tokens=32,
        )["loss"]  # fmt: skip

    np.testing.assert_allclose(loss(gpu=8), loss(), rtol=0.01)


def changed(folder, stored, **tensors):
    checkpoints.write(folder, stored[0], {**stored[1], **tensors})
    return folder


def test_a_scale_that_is_no_power_of_two_is_refused_by_the_key(folder):
    with pytest.raises(ConfigError, match=r"scale_inv holds scales .* set precision\.scales=free"):
        load.load(folder, FP8)


def test_powers_of_two_run_with_either_key(stored, tmp_path):
    powers = {
        name: np.exp2(np.round(np.log2(value)))
        for name, value in stored[1].items()
        if name.endswith(names.SCALE)
    }
    quantised = {**stored[0]["quantization_config"], "scale_fmt": "ue8m0"}
    settings = {**stored[0], "quantization_config": quantised}
    checkpoints.write(tmp_path, settings, {**stored[1], **powers})
    model = deepseek_jax.load(tmp_path, dtype="fp8")
    kernels = model.how.recipe.kernels
    assert model.how.recipe == dataclasses.replace(FP8, kernels=kernels)
    for loaded in (model.weights, load.load(tmp_path, FREE)):
        found = names.to_published(model.config, loaded)
        assert_same_bytes(found, {**stored[1], **powers}, blocks(stored[1]))


@pytest.mark.parametrize("bad", ["value", "scale", "product"])
def test_blocks_that_are_not_finite_are_refused(bad, stored, tmp_path):
    name = EXPERT if bad == "value" else EXPERT + names.SCALE
    value = stored[1][name].copy()
    value[0, 0] = {"value": np.nan, "scale": np.inf, "product": 3e38}[bad]
    changed(tmp_path, stored, **{name: value})
    with pytest.raises(ConfigError, match=f"{name} holds 1 values .* not finite"):
        load.load(tmp_path, FREE)


def test_a_parameter_of_which_some_is_no_fp8_is_quantised(stored, tmp_path):
    tensors = {**stored[1], EXPERT: stored[2][EXPERT].astype(np.float32)}
    del tensors[EXPERT + names.SCALE]
    checkpoints.write(tmp_path, stored[0], tensors)
    path = "moe_layers.feed.experts.gate_up"
    with pytest.warns(UserWarning, match=rf"63 of the 64 tensors of {path} are FP8"):
        loaded = load.load(tmp_path, FREE)
    found = {weight.path: weight for weight in params.describe(loaded)}
    assert found[path].dtype == np.float32
    assert found["moe_layers.feed.experts.down"].dtype == E4M3


def test_other_recipes_read_the_products(folder, stored):
    loaded = load.load(folder, FLOAT32)
    found = names.to_published(loaded.config, loaded)
    np.testing.assert_array_equal(found[EXPERT], stored[2][EXPERT])
