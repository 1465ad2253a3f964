"""Reading published checkpoints: every name, FP8 blocks, converted runs, and refused files."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from equations import checkpoints
from safetensors.numpy import save_file

import deepseek_jax
from configs import v3_671b, v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.checkpoint import load
from deepseek_jax.checkpoint.hf import names, parts, reader, safetensors
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import ConfigError
from deepseek_jax.model import params
from deepseek_jax.model.transformer import build_model

HEAD = "lm_head.weight"


@pytest.fixture
def made():
    return checkpoints.make("mtp", seed=1)


def assert_refused(folder, *words):
    """Checks that loading raises one short line with all these words, and returns it."""
    with pytest.raises(ConfigError) as error:
        deepseek_jax.load(folder)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert len(str(error.value)) < 800
    return str(error.value)


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_names_go_both_ways(variant, tmp_path):
    settings, weights = checkpoints.make(variant)
    checkpoints.write(tmp_path, settings, weights, shards=2)
    model = load.load(tmp_path)
    back = names.to_published(model.config, model)
    copies = ("shared_head.head.weight", "embed_tokens.weight")
    for name, want in weights.items():
        if not (name.startswith("model.layers.") and name.endswith(copies)):
            np.testing.assert_array_equal(back.pop(name), want)
    # The rest are the router biases, which V2 does not have.
    assert all(name.endswith("e_score_correction_bias") and not x.any() for name, x in back.items())


def test_table_of_the_published_model():
    """Section 8.1 of the file format's description: shapes, and 91,991 tensors with scales."""
    config = configs.parse(v3_671b.get_config()).model
    table = {piece.name: piece.shape for piece in names.pieces(config)}
    assert table["model.layers.0.self_attn.kv_b_proj.weight"] == (32768, 512)
    assert table["model.layers.60.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert table["model.layers.61.eh_proj.weight"] == (7168, 14336)
    plain = ("norm.weight", "gate.weight", "bias", "eh_proj.weight", "embed_tokens.weight", HEAD)
    scales = sum(len(shape) == 2 and not name.endswith(plain) for name, shape in table.items())
    copies = 2
    assert len(table) + scales + copies == 91_991


def test_lower_precision_and_ragged_fp8_blocks(tmp_path):
    """FP8 matrices of 200 x 136 and the like: the last block of a row or column is short."""
    settings, stored, exact = checkpoints.make_fp8()
    checkpoints.write(tmp_path, settings, stored, shards=2)
    model = load.load(tmp_path)
    for name, got in names.to_published(model.config, model).items():
        np.testing.assert_array_equal(got, exact[name])

    del stored["model.layers.0.mlp.up_proj.weight_scale_inv"]
    checkpoints.write(tmp_path / "lost", settings, stored)
    assert_refused(
        tmp_path / "lost", "layers.0.mlp.up_proj.weight_scale_inv (found nothing", "[2, 2]"
    )


def test_a_file_without_the_mtp_layer_has_no_mtp(tmp_path):
    settings, weights = checkpoints.make("v3")
    checkpoints.write(tmp_path, settings | {"num_nextn_predict_layers": 1}, weights)
    assert load.load(tmp_path).config.mtp_depth == 0


def test_a_training_run_is_loaded(tmp_path):
    config = v3_tiny.get_config()
    config.model.update(layers=2, d_model=32, vocab=64, d_dense=32, heads=2, experts=4, groups=1)
    config.model.update(top_groups=1, top_k=2, d_expert=16)
    config = configs.parse(config)
    model = build_model(config.model, jax.random.key(3))
    named = zip(params.describe(model), jax.tree.leaves(model), strict=True)
    state = {"params": {}, "bias": {}, "step": jnp.int32(7)}
    for weight, leaf in named:
        state["params" if weight.trained else "bias"][weight.path] = leaf
    (tmp_path / "config.json").write_text(config.to_json())
    assert_refused(tmp_path, "holds no checkpoint")
    store = Store(tmp_path / "checkpoints", keep=1)
    store.save(7, state, {})
    store.close()
    loaded = deepseek_jax.load(tmp_path)
    assert loaded.config == config.model
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, model)
    half = deepseek_jax.load(tmp_path, dtype="bfloat16").weights
    assert half.head.table[...].dtype == jnp.bfloat16
    assert half.moe_layers.feed.router.centroids[...].dtype == jnp.float32


@pytest.mark.parametrize(
    "change, words",
    [
        ({"attention_bias": True}, ("attention_bias is True", "expected False")),
        ({"tie_word_embeddings": 1}, ("tie_word_embeddings is 1", "true or false")),
        ({"hidden_act": "gelu"}, ("hidden_act is 'gelu'", "'silu'")),
        ({"moe_layer_freq": 2}, ("moe_layer_freq is 2", "expected 1")),
        ({"rope_interleave": None}, ("rope_interleave is None", "true or false")),
        ({"model_type": "llama"}, ("model_type is 'llama'", "deepseek_v3")),
        ({"architectures": ["LlamaForCausalLM"]}, ("architectures", "DeepseekV3ForCausalLM")),
        ({"topk_method": "random"}, ("topk_method is 'random'", "noaux_tc")),
        ({"scoring_func": "tanh"}, ("scoring_func is 'tanh'", "sigmoid")),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ("rope_scaling.type is 'linear'",)),
        ({"n_group": 3}, ("n_group is 3", "divisor of n_routed_experts=16")),
        ({"topk_group": 5}, ("topk_group is 5", "at most n_group=4")),
        ({"num_experts_per_tok": 9}, ("num_experts_per_tok is 9", "at most the 8")),
        ({"hidden_size": "48"}, ("hidden_size is '48'", "whole number")),
        ({"vocab_size": None}, ("vocab_size is None",)),
        ({"rms_norm_eps": float("nan")}, ("rms_norm_eps is nan",)),
        ({"first_k_dense_replace": 9}, ("first_k_dense_replace is 9", "num_hidden_layers=3")),
        ({"num_key_value_heads": 1}, ("num_key_value_heads is 1", "expected 4")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quant_method is 'gptq'",)),
        ({"hidden_size": 64}, ("found float32[48, 24]", "expected")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_settings_that_are_refused(change, words, made, tmp_path):
    settings, weights = made
    checkpoints.write(tmp_path, {**settings, **change}, weights)
    if words[0].startswith("found"):
        words = ("does not hold the model of its config.json", "found float32", "and ")
    assert_refused(tmp_path, *words)


def test_sizes_beyond_the_files_are_refused_before_a_table_is_made(made, tmp_path, monkeypatch):
    settings, weights = made
    monkeypatch.setattr(reader, "pieces", None)
    for change in ({"num_hidden_layers": 2**31}, {"n_routed_experts": 2**40, "n_group": 4}):
        checkpoints.write(tmp_path, settings | change, weights)
        key, value = next(iter(change.items()))
        assert_refused(tmp_path, f"{key}={value}", "tensors or more", f"(found {len(weights)})")


def test_mtp_layers_that_the_settings_do_not_count_are_left_out(made, tmp_path):
    settings, weights = made
    checkpoints.write(tmp_path, settings | {"num_nextn_predict_layers": 0}, weights)
    with pytest.warns(UserWarning, match=r"1 more MTP layers than config.json counts \(num_nextn"):
        found = load.open_checkpoint(tmp_path)
    assert found.model.mtp_depth == 0
    assert not any(name.startswith("model.layers.3.") for name in found.published.tensors)
    forget_projection(weights)  # then it is a layer that num_hidden_layers leaves out
    checkpoints.write(tmp_path, settings | {"num_nextn_predict_layers": 0}, weights)
    assert_refused(tmp_path, "model.layers.3.", "expected nothing")


@pytest.mark.parametrize("copy", reader.COPIES)
def test_an_mtp_table_of_its_own_is_refused(copy, made, tmp_path):
    settings, weights = made
    name = f"model.layers.3.{copy}"
    weights[name] = weights[name].astype(ml_dtypes.bfloat16)
    checkpoints.write(tmp_path, settings, weights)
    words = (name, f"differs from {reader.COPIES[copy]}", "set num_nextn_predict_layers=0")
    assert_refused(tmp_path, *words)
    with pytest.raises(ConfigError, match="differs from"):
        load.open_checkpoint(tmp_path).published.compare_copies()


def test_scales_of_exponents_alone_are_read(tmp_path):
    settings, stored, _ = checkpoints.make_fp8()
    powers = {
        name: np.exp2(np.round(np.log2(value))).astype(ml_dtypes.float8_e8m0fnu)
        for name, value in stored.items()
        if name.endswith(names.SCALE)
    }
    wide = {name: value.astype(np.float32) for name, value in powers.items()}
    checkpoints.write(tmp_path, settings, {})
    narrow = {**stored, **powers}
    expected = {name: (value.dtype, value.shape) for name, value in narrow.items()}
    safetensors.write(tmp_path / "model.safetensors", expected, narrow.items())
    checkpoints.write(tmp_path / "wide", settings, {**stored, **wide})
    found, want = (load.open_checkpoint(f).published for f in (tmp_path, tmp_path / "wide"))
    for name in powers:
        assert found.tensors[name].dtype == safetensors.E8M0
        own = name.removesuffix(names.SCALE)
        np.testing.assert_array_equal(found.read(own), want.read(own))


@pytest.mark.parametrize(
    "text, words",
    [
        ("1" * 5000, "config.json is not readable JSON (Exceeds the limit"),
        ('{"a": ' * 100_000, "config.json is not readable JSON"),
        ('{"a\\nb": 1, "a\\nb": 2}', "config.json names 'a\\nb' twice"),
        ("[1]", "config.json is '[1]'; expected a JSON object"),
    ],
    ids=["digits", "nested", "twice", "list"],
)
def test_settings_that_are_no_json(text, words, made, tmp_path):
    checkpoints.write(tmp_path, *made)
    (tmp_path / "config.json").write_text(text)
    assert "\n" not in assert_refused(tmp_path, words)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_pipe_is_no_file(file, made, tmp_path):
    checkpoints.write(tmp_path, *made)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    assert_refused(tmp_path, f"{file} cannot be read: it is no regular file")


def test_names_are_told_in_one_line(made, tmp_path):
    settings, weights = made
    for name in ("a\nb", "n" * 10_000):
        checkpoints.write(tmp_path, settings, {**weights, name: weights[HEAD]})
        assert "\n" not in assert_refused(tmp_path, "model.safetensors names a tensor", "printable")


def rename(weights):
    weights["lm_head.wieght"] = weights.pop(HEAD)


def transpose(weights):
    weights[HEAD] = np.ascontiguousarray(weights[HEAD].T)


def poison(weights):
    weights[HEAD] = np.full_like(weights[HEAD], np.nan)


def forget_projection(weights):
    del weights["model.layers.3.eh_proj.weight"]


@pytest.mark.parametrize(
    "change, words",
    [
        (rename, (f"{HEAD} (found nothing", "lm_head.wieght (found float32", "expected nothing")),
        (transpose, (f"{HEAD} (found float32[48, 256]", "[256, 48]")),
        (poison, (HEAD, "12288 values of 12288", "not finite")),
        (forget_projection, ("layers.3.eh_proj.weight (found nothing", "[48, 96]")),
    ],
)
def test_tensors_that_are_refused(change, words, made, tmp_path):
    settings, weights = made
    change(weights)
    checkpoints.write(tmp_path, settings, weights)
    assert_refused(tmp_path, *words)


def test_other_dtypes_are_refused(made, tmp_path):
    settings, weights = made
    checkpoints.write(tmp_path, settings, weights | {HEAD: weights[HEAD].astype(np.int32)})
    assert_refused(tmp_path, HEAD, "I32", "BF16")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: data[:-4], ("ends at byte", "truncated")),
        (lambda data: data[:100], ("truncated",)),
        (lambda data: b"", ("has 0 bytes",)),
        (lambda data: data + b"more", ("4 bytes after the last tensor",)),
        (lambda data: b"\xff" * len(data), ("not a safetensors file",)),
        (lambda data: data[:8] + b"\xff" * (len(data) - 8), ("header", "JSON")),
        (lambda data: data.replace(b'"F32"', b'"F99"', 1), ("F99", "F32")),
        (lambda data: data.replace(b"data_offsets", b"data_0ffsets", 1), ("data_offsets",)),
    ],
)
def test_files_that_are_refused(damage, words, made, tmp_path):
    checkpoints.write(tmp_path, *made)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(tmp_path, "model.safetensors", *words)


def test_indices_that_are_refused(made, tmp_path):
    checkpoints.write(tmp_path, *made, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    whole = json.loads(path.read_text())
    files = sorted(set(whole["weight_map"].values()))

    def with_file(file):
        path.write_text(json.dumps({"weight_map": whole["weight_map"] | {HEAD: file}}))

    for outside in ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""):
        with_file(outside)
        assert_refused(tmp_path, HEAD, "expected the name of a file beside it")
    with_file("model-9.safetensors")
    assert_refused(tmp_path, "model-9.safetensors does not exist", HEAD)
    with_file(next(file for file in files if file != whole["weight_map"][HEAD]))
    assert_refused(tmp_path, HEAD)
    path.write_text(json.dumps({"weight_map": whole["weight_map"] | {"x": files[0]}}))
    assert_refused(tmp_path, "does not hold x")
    path.write_text("{}")
    assert_refused(tmp_path, "no weight_map")
    path.write_text("not json")
    assert_refused(tmp_path, "not readable JSON")


def test_a_tensor_is_found_once(made, tmp_path):
    settings, weights = made
    checkpoints.write(tmp_path, settings, weights, shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in sorted(set(index.values())) if file != index[HEAD])
    here = {name: weights[name] for name in weights if index[name] == other}
    save_file(here | {HEAD: weights[HEAD]}, tmp_path / other)
    assert_refused(tmp_path, HEAD, other)
    save_file(weights, tmp_path / "model.safetensors")
    assert_refused(tmp_path, "holds both")


def test_folders_that_are_refused(made, tmp_path):
    assert_refused(tmp_path / "nothing", "config.json cannot be read")
    settings, _ = made
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert_refused(tmp_path, "neither model.safetensors nor", "pickled ones are never read")
    with pytest.raises(ConfigError, match="float8"):
        deepseek_jax.load(tmp_path, dtype="float8_e4m3fn")
    with pytest.raises(ConfigError, match="expected float32, bfloat16, fp8"):
        deepseek_jax.load(tmp_path, dtype="no such type")


def test_links_to_files_elsewhere_are_followed(made, tmp_path):
    """Links as in the hub's cache."""
    checkpoints.write(tmp_path / "blobs", *made)
    os.symlink(tmp_path / "blobs", tmp_path / "snapshot")
    assert load.load(tmp_path / "snapshot").config.mtp_depth == 1


@pytest.mark.parametrize("tokens", [[[256]], [[-1, 0]], [0, 1], [[0.5]], np.zeros((0, 4), int)])
def test_tokens_that_are_refused(tokens, made, tmp_path):
    checkpoints.write(tmp_path, *made)
    with pytest.raises(ValueError, match="tokens"):
        deepseek_jax.load(tmp_path)(tokens)


def test_weights_are_not_copied_on_the_cpu():
    """An array of the layout that is read into becomes the device's own buffer."""
    array = parts._aligned((3, 1000), np.dtype(np.float32))
    array[...] = 1
    device = jax.device_put(array, jax.devices("cpu")[0], may_alias=True)
    assert device.unsafe_buffer_pointer() == array.ctypes.data
