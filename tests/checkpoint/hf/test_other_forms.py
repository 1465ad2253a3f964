"""Checkpoints in forms that others write: rotary rows in halves, tied tables, only dense layers."""

import json
import re
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small
from equations import checkpoints
from equations import model as equations
from same_bytes import assert_same_bytes, tensors_of

import deepseek_jax
from deepseek_jax.checkpoint import conversion, load
from deepseek_jax.checkpoint.hf import language_part, names, reader
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError
from deepseek_jax.model.execution import Execution
from deepseek_jax.precision.recipes import FP8

ANY = 10**9  # bytes of a file
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
TIED = {"tie_word_embeddings": True}


def to_halves(settings, weights):
    """The same model as `rope_interleave` false stores it: the first rows of pairs come first."""
    nope, rotary = settings["qk_nope_head_dim"], settings["qk_rope_head_dim"]
    heads = {"q_b_proj": nope + rotary, "q_proj": nope + rotary}
    heads["kv_a_proj_with_mqa"] = settings["kv_lora_rank"] + rotary
    out = {}
    for name, value in weights.items():
        kind = name.split(".")[-2]
        out[name] = value.copy()
        for start in range(0, len(value), heads[kind]) if kind in heads else ():
            end = start + heads[kind]
            first = end - rotary
            out[name][first:end] = np.concatenate([value[first:end:2], value[first + 1 : end : 2]])
    return out


@pytest.mark.parametrize("variant", ["mtp", "no_q_latent"])
def test_rotary_rows_in_halves_are_the_same_weights_in_another_order(variant, tmp_path):
    settings, weights = checkpoints.make(variant)
    halves = to_halves(settings, weights)
    assert sum(not np.array_equal(halves[name], weights[name]) for name in weights) == (
        2 * (settings["num_hidden_layers"] + settings["num_nextn_predict_layers"])
    )
    checkpoints.write(tmp_path / "pairs", settings, weights)
    checkpoints.write(tmp_path / "halves", settings | {"rope_interleave": False}, halves, shards=2)
    want = load.load(tmp_path / "pairs")
    jax.tree.map(np.testing.assert_array_equal, load.load(tmp_path / "halves"), want)
    sizes = dict(gpu=2, tensor=2)
    spread = load.load(
        tmp_path / "halves", layout=small.layout_of(sizes, 1), mesh=small.mesh_of(sizes)
    )
    jax.tree.map(np.testing.assert_array_equal, spread, want)

    conversion.to_run(open_checkpoint(tmp_path / "halves"), tmp_path / "run", small.config())
    jax.tree.map(np.testing.assert_array_equal, load.load(tmp_path / "run"), want)
    for source in ("run", "halves"):
        out = tmp_path / f"{source} out"
        conversion.to_published(open_checkpoint(tmp_path / source), out, "float32", ANY)
        assert_same_bytes(tensors_of(out), halves)
        assert json.loads((out / "config.json").read_text())["rope_interleave"] is False
    deepseek_jax.load(tmp_path / "run").save(tmp_path / "saved")
    assert_same_bytes(tensors_of(tmp_path / "saved"), halves)


def test_blocks_of_rows_in_halves_come_back_to_the_bit(tmp_path):
    """They are quantised again where matmuls take FP8, as the rows of a block change places."""
    settings, stored, exact = checkpoints.make_fp8(released=True)
    checkpoints.write(tmp_path / "in", settings | {"rope_interleave": False}, stored)
    conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", small.config())
    conversion.to_published(open_checkpoint(tmp_path / "run"), tmp_path / "out", "fp8", ANY)
    assert_same_bytes(tensors_of(tmp_path / "out"), stored)
    model = load.load(tmp_path / "in")
    found = names.to_published(model.config, model, names.TensorLayout(half_split=True))
    for name, value in found.items():
        np.testing.assert_array_equal(value, exact[name])
    with pytest.warns(UserWarning, match=r"kv_down are FP8, with rotary rows in halves; .* again"):
        kept = reader.blocks(open_checkpoint(tmp_path / "in").published, FP8)
    moved = {path for path in kept if path.endswith(("kv_down", "query_up"))}
    assert len(kept) > 15 and not moved


def test_halves_are_refused_where_other_readers_pass_them_over(tmp_path):
    for variant in ("v2", "v32"):
        checkpoints.write(tmp_path, *checkpoints.make(variant, rope_interleave=False))
        with pytest.raises(ConfigError, match="rope_interleave is False; expected True"):
            open_checkpoint(tmp_path)


def wrapped(settings, weights):
    """Around a text model whose own settings state nothing of ties, as `transformers` saves it."""
    text = {key: value for key, value in settings.items() if key != "architectures"}
    outer = {"model_type": "kimi_k25", "text_config": text | {"tie_word_embeddings": False}, **TIED}
    return outer, {language_part.PREFIX + name: value for name, value in weights.items()}


@pytest.mark.parametrize("left_out", [HEAD, TABLE, None])
@pytest.mark.parametrize("around", [lambda *given: given, wrapped], ids=["alone", "wrapped"])
def test_one_table_is_read_as_two_and_written_so(around, left_out, tmp_path):
    settings, weights = checkpoints.make("v3", **TIED)
    weights[HEAD] = weights[TABLE].copy()
    outer, stored = around(settings, weights)
    stored = {name: value for name, value in stored.items() if not name.endswith(str(left_out))}
    assert len(stored) == len(weights) - (left_out is not None)
    checkpoints.write(tmp_path / "in", outer, stored)
    with pytest.warns(UserWarning, match="tie_word_embeddings is true; embedding and head are two"):
        conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", small.config())
    for source in ("run", "in"):
        out = tmp_path / f"{source} out"
        conversion.to_published(open_checkpoint(tmp_path / source), out, "float32", ANY)
        assert_same_bytes(tensors_of(out), around(settings, weights)[1])
        written = json.loads((out / "config.json").read_text())
        assert not language_part.is_tied(written) and written["tie_word_embeddings"] is False


def test_two_tables_that_differ_stay_two_where_a_tie_is_stated(tmp_path):
    """As in `transformers`, which warns and does not tie them."""
    settings, weights = checkpoints.make("v3", **TIED)
    checkpoints.write(tmp_path, settings, weights)
    found = open_checkpoint(tmp_path).published
    for name in (HEAD, TABLE):
        np.testing.assert_array_equal(found.read(name), weights[name])
    checkpoints.write(tmp_path, settings | {"tie_word_embeddings": False},
                      {name: value for name, value in weights.items() if name != HEAD})  # fmt: skip
    with pytest.raises(ConfigError, match=rf"{HEAD} \(found nothing, expected a float"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("first", [3, 9])
def test_all_layers_dense(first, tmp_path):
    settings, weights = checkpoints.make("v3", first_k_dense_replace=first)
    assert not any("experts" in name for name in weights)
    checkpoints.write(tmp_path / "in", settings, weights)
    source = open_checkpoint(tmp_path / "in")
    assert (source.model.dense_layers, source.model.moe_layers) == (3, 0)
    conversion.to_run(source, tmp_path / "run", small.config())
    conversion.to_published(open_checkpoint(tmp_path / "run"), tmp_path / "out", "float32", ANY)
    assert_same_bytes(tensors_of(tmp_path / "out"), weights)
    if first == 9:
        tokens = checkpoints.tokens(settings, length=12)
        want = equations.forward(settings, weights, tokens).logits
        model = load.load(tmp_path / "run")
        got = jax.jit(lambda model, tokens: model(tokens, Execution())[0][0])(
            model, jnp.asarray(tokens)
        )
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_tensors_without_values_are_left_out(tmp_path):
    """`transformers` writes shared experts of no width where there are none."""
    settings, weights = checkpoints.make("v3", n_shared_experts=0)
    own = "model.layers.2.mlp.shared_experts."
    empty = {f"{own}{half}_proj.weight": np.zeros((0, 48), np.float32) for half in ("gate", "up")}
    empty[f"{own}down_proj.weight"] = np.zeros((48, 0), ml_dtypes.bfloat16)
    checkpoints.write(tmp_path / "in", settings, weights | empty)
    source = open_checkpoint(tmp_path / "in")
    assert source.model.shared_experts == 0
    conversion.to_published(source, tmp_path / "out", "float32", ANY)
    assert_same_bytes(tensors_of(tmp_path / "out"), weights)


def test_routers_without_any_bias_have_biases_of_zero(tmp_path):
    settings, weights = checkpoints.make("v3")
    plain = {name: value for name, value in weights.items() if not name.endswith(names.BIAS)}
    checkpoints.write(tmp_path / "in", settings, plain)
    with pytest.warns(UserWarning, match=r"holds no router biases \(e_score.* its 2 routers; they"):
        source = open_checkpoint(tmp_path / "in")
    assert not source.load().moe_layers.feed.router.bias[...].any()
    config = conversion.to_run(source, tmp_path / "run", small.config())
    assert config.schedule.bias_speed == small.config().schedule.bias_speed > 0
    zeros = {n: np.zeros_like(weights[n]) for n in weights if n.endswith(names.BIAS)}
    for folder, more in (("run", zeros), ("in", {})):
        conversion.to_published(
            open_checkpoint(tmp_path / folder), tmp_path / f"{folder} out", "float32", ANY
        )
        assert_same_bytes(tensors_of(tmp_path / f"{folder} out"), plain | more)
    del weights[f"model.layers.1.mlp.gate.{names.BIAS}"]  # some have one: this one is lost
    checkpoints.write(tmp_path / "lost", settings, weights)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.gate\.e_score.* \(found nothing, exp"):
        open_checkpoint(tmp_path / "lost")


def test_modules_of_others_are_named_without_those_of_the_text_model():
    """`transformers` saves a norm of the projector below `model.`, where all layers are, too."""
    tensors = (
        "model.mm_projector.pre_norm.weight",
        "vision_tower.x.bias",
        "mm_projector.proj.0.bias",
    )
    settings = {"model_type": "kimi_k25", "quantization_config": {"quant_method": "fp8"}}
    found = language_part.leaving_others(settings, tensors)["quantization_config"]
    modules = ["mm_projector", "model.mm_projector", "vision_tower"]
    assert found["modules_to_not_convert"] == modules


@pytest.mark.parametrize("wide", [{"intermediate_size": 200}, {"hidden_size": 136}, {}], ids=str)
def test_fp8_that_transformers_misreads_is_named(wide, tmp_path):
    """It takes a size divided by the number of blocks along it for the size of a block."""
    settings, weights = checkpoints.make("v3", **wide)
    checkpoints.write(tmp_path / "in", settings, weights)
    source = open_checkpoint(tmp_path / "in")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for form in ("bfloat16", "fp8"):
            conversion.to_published(source, tmp_path / form, form, ANY)
    found = [str(each.message) for each in said if "part of a block" in str(each.message)]
    assert len(found) == bool(wide)
    if "intermediate_size" in wide:
        name = r"model\.layers\.0\.mlp\.gate_proj\.weight \[200, 48\] the first: transformers"
        assert re.match(f"3 FP8 matrices end with a part of a block, {name}", found[0])
