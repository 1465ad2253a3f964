"""Export and import of weights: bit-exact in each format, and no partial output left behind."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import small
from equations import checkpoints
from jax.sharding import SingleDeviceSharding

import deepseek_jax
from configs import moonlight_16b, v2_lite_16b, v3_671b, v3_671b_32k
from deepseek_jax import config as configs
from deepseek_jax.checkpoint import chunks, conversion, load, manifest, new_folder
from deepseek_jax.checkpoint.chunks import Leaves
from deepseek_jax.checkpoint.hf import config_json, fp8_blocks, names, reader, safetensors
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import ConfigError
from deepseek_jax.data import tokenizer
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.precision.fp8_tiles import spread

BF16 = ml_dtypes.bfloat16
ROOT = Path(__file__).parents[2]
SHARD = 200_000  # bytes


def stored(folder):
    return {name: t.array for name, t in safetensors.open_folder(folder).items()}


def same_bits(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert got[name].tobytes() == np.ascontiguousarray(value).tobytes(), name


def in_bfloat16(weights):
    bias = "e_score_correction_bias"
    return {n: w if n.endswith(bias) else w.astype(BF16) for n, w in weights.items()}


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
def test_by_way_of_a_workdir_every_tensor_comes_back(form, tmp_path):
    """Names, dtypes, scales and bits, the MTP layer's copies among them, in files with an index."""
    if form == "fp8":
        found, weights, _ = checkpoints.make_fp8(released=True)
    else:
        found, weights = checkpoints.make("mtp2")
        weights = weights if form == "float32" else in_bfloat16(weights)
    checkpoints.write(tmp_path / "in", found, weights)
    conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", small.config())
    conversion.to_published(open_checkpoint(tmp_path / "run"), tmp_path / "out", form, SHARD)
    same_bits(stored(tmp_path / "out"), weights)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):06}.safetensors"
    assert max(file.stat().st_size for file in files) < SHARD + 20_000  # and a header
    index = json.loads((tmp_path / "out" / safetensors.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in written) == (form == "fp8")
    same = {key: written.get(key) for key in found if key not in ("torch_dtype",)}
    same["rope_theta"] = found["rope_theta"]
    changed = {key for key in same if same[key] != found[key]}
    assert changed <= {"quantization_config"}
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 1
    )


def test_no_more_than_a_tensor_is_held_on_either_way(tmp_path, monkeypatch):
    found, weights = checkpoints.make("mtp")
    checkpoints.write(tmp_path / "in", found, weights)
    monkeypatch.setattr(reader, "load", None)
    monkeypatch.setattr(Store, "save", None)
    conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", small.config())
    read, sizes = Leaves.read, []

    def counted(self, name, index=()):
        value = read(self, name, index)
        sizes.append(value.nbytes)
        return value

    monkeypatch.setattr(Leaves, "read", counted)
    monkeypatch.setattr(Store, "restore", None)
    conversion.to_published(open_checkpoint(tmp_path / "run"), tmp_path / "out", "float32", SHARD)
    assert max(sizes) == max(value.nbytes for value in weights.values())
    same_bits(stored(tmp_path / "out"), weights)


def test_chunks_need_not_end_where_tensors_or_blocks_do(tmp_path, monkeypatch):
    found, weights, _ = checkpoints.make_fp8(released=True)
    checkpoints.write(tmp_path / "in", found, weights)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(chunks, "_ROW_BYTES", 1_000)
    conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", small.config())
    conversion.to_published(open_checkpoint(tmp_path / "run"), tmp_path / "out", "fp8", SHARD)
    same_bits(stored(tmp_path / "out"), weights)
    parts = chunks.Leaves(tmp_path / "run" / "checkpoints" / "0" / "state")
    shapes = {part.shape[1:] for part in parts.chunks("params.moe_layers.feed.experts.gate_up")}
    assert shapes == {(1, 34, 2, 24)}  # of 136 inputs


def test_fp8_of_any_scale_keeps_every_value(tmp_path):
    """Copied from one directory to the other, and found again from float32 masters."""
    found, weights, exact = checkpoints.make_fp8()
    checkpoints.write(tmp_path / "in", found, weights)
    conversion.to_published(open_checkpoint(tmp_path / "in"), tmp_path / "copy", "fp8", SHARD)
    copied = stored(tmp_path / "copy")
    quantised = [name for name in weights if name + names.SCALE in weights]
    for name in quantised:
        assert copied[name].tobytes() == weights[name].tobytes()
        assert copied[name + names.SCALE].tobytes() == weights[name + names.SCALE].tobytes()
    conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", small.config())
    conversion.to_published(open_checkpoint(tmp_path / "run"), tmp_path / "out", "fp8", SHARD)
    again = open_checkpoint(tmp_path / "out").published
    assert {n for n, t in again.tensors.items() if t.dtype == safetensors.E4M3} == set(quantised)
    for name in quantised:
        np.testing.assert_array_equal(again.read(name), exact[name])
    jax.tree.map(
        np.testing.assert_array_equal, load.load(tmp_path / "copy"), load.load(tmp_path / "in")
    )


def test_a_run_in_fp8_exports_the_blocks_that_it_computes_with(tmp_path):
    checkpoints.write(tmp_path / "in", *checkpoints.make("v3"))
    config = small.config(precision_recipe="fp8", precision_scales="power_of_two")
    conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", config)
    conversion.to_published(open_checkpoint(tmp_path / "run"), tmp_path / "out", "fp8", SHARD)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["scale_fmt"] == "ue8m0"
    ours, theirs = (deepseek_jax.load(tmp_path / each, dtype="fp8") for each in ("out", "run"))
    jax.tree.map(np.testing.assert_array_equal, ours.weights, theirs.weights)


def test_blocks():
    """What is no product of E4M3 values is rounded to one; that, done again, changes nothing."""
    random = np.random.default_rng(0)
    for power_of_two in (False, True):
        matrix = random.standard_normal((200, 300)).astype(np.float32)
        matrix[:128, :128] = 0
        values, scales = fp8_blocks.quantise_blocks(matrix)
        if power_of_two:
            scales = np.exp2(np.ceil(np.log2(scales)))
            values = (matrix / spread(scales, matrix.shape)).astype(values.dtype)
        known = values.astype(np.float32) * spread(scales, matrix.shape)
        assert (np.abs(known - matrix) <= np.abs(matrix) / 16 + spread(scales, matrix.shape)).all()
        values, scales = fp8_blocks.quantise_blocks(known)
        assert (values.astype(np.float32) * spread(scales, matrix.shape) == known).all()


def test_scales_that_are_powers_of_two_stay_so():
    """The values of blocks that are no such products are rounded by the least scale that fits."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((200, 300)).astype(np.float32)
    matrix[:128, :128] = 0
    matrix[128:, 256:] = 2.0**-6  # a product of many scales
    values, scales = fp8_blocks.quantise_blocks(matrix, powers_of_two=True)
    assert (np.frexp(scales)[0] == 0.5).all()
    assert scales[0, 1] == 2.0 ** np.ceil(np.log2(np.abs(matrix[:128, 128:256]).max() / 448))
    known = values.astype(np.float32) * spread(scales, matrix.shape)
    assert (np.abs(known - matrix) <= np.abs(matrix) / 16 + spread(scales, matrix.shape)).all()
    again = fp8_blocks.quantise_blocks(known, powers_of_two=True)
    np.testing.assert_array_equal(again[0].astype(np.float32), values.astype(np.float32))
    np.testing.assert_array_equal(again[1], scales)


def convert_both_ways(folder, form):
    """Folders that a published checkpoint becomes, directly and by way of a workdir."""
    source, parent = open_checkpoint(folder), folder.parent
    conversion.to_published(source, parent / "direct", form, 10**9)
    conversion.to_run(source, parent / "run", small.config())
    conversion.to_published(open_checkpoint(parent / "run"), parent / "back", form, 10**9)
    return parent / "direct", parent / "back"


def test_settings_and_files_are_kept_both_ways(tmp_path):
    """Also unknown keys, the format of scales, and modules that are not quantised."""
    found, weights, exact = checkpoints.make_fp8(released=True)
    plain = "model.layers.0.mlp.up_proj"
    found["quantization_config"] |= {"scale_fmt": "float", "modules_to_not_convert": [plain]}
    found |= {"auto_map": {"AutoConfig": "code.Config", "AutoModel": "gone.Model"}, "new": [1]}
    del weights[f"{plain}.weight_scale_inv"]
    weights[f"{plain}.weight"] = exact[f"{plain}.weight"].astype(BF16)
    checkpoints.write(tmp_path / "in", found, weights)
    for name in ("tiktoken.model", "code.py", "LICENSE", "config.py"):
        (tmp_path / "in" / name).write_text(name)
    for folder in convert_both_ways(tmp_path / "in", "fp8"):
        same_bits(stored(folder), weights)
        written = json.loads((folder / "config.json").read_text())
        assert written["quantization_config"] == found["quantization_config"] | {
            "activation_scheme": "dynamic", "fmt": "e4m3",
        }  # fmt: skip
        assert (written["new"], written["auto_map"]) == ([1], {"AutoConfig": "code.Config"})
        for name in ("tiktoken.model", "code.py", "LICENSE", "config.py"):
            assert (folder / name).read_text() == name
    assert "get_config" in (tmp_path / "run" / "config.py").read_text()
    assert not (tmp_path / "run" / "code.py").exists()  # nothing that `main` could import


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder with a checkpoint that has a tokenizer, `in`, and the workdir of it, `run`."""
    folder = tmp_path_factory.mktemp("converted")
    checkpoints.write(folder / "in", *checkpoints.make("v3"))
    tokenizer.make("byte", vocab=262, texts=()).save(folder / "in" / "tokenizer.json")
    conversion.to_run(open_checkpoint(folder / "in"), folder / "run", small.config())
    return folder


def exported(run):
    conversion.to_published(open_checkpoint(run), run.with_name("out"), "float32", 10**9)
    return run.with_name("out")


def test_a_published_tokenizer_comes_back_as_it_was(converted, tmp_path):
    run = shutil.copytree(converted / "run", tmp_path / "run")
    config = configs.from_json((run / "config.json").read_text())
    assert config.data.tokenizer == f"{converted}/run/tokenizer.json"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (run / name).write_text("what a run wrote")
    out, before = exported(run), (converted / "in" / "tokenizer.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == before
    assert not (out / "tokenizer_config.json").exists()


def test_the_tokenizer_of_a_run_is_told_to_other_readers(converted, tmp_path):
    run = shutil.copytree(converted / "run", tmp_path / "run")
    shutil.rmtree(run / "published")
    written = json.loads((exported(run) / "tokenizer_config.json").read_text())
    assert (written["bos_token"], written["eos_token"]) == (tokenizer.BOS, tokenizer.EOS)


def never(*_):
    raise AssertionError("a value was read before the check")


@pytest.mark.parametrize("way", ["to a workdir", "to a folder", "back"])
def test_what_can_be_refused_is_refused_before_a_value_is_read(
    way, converted, tmp_path, monkeypatch
):
    """No room on the disk, a target that is taken, and one among the saved steps."""
    source = open_checkpoint(converted / ("run" if way == "back" else "in"))
    monkeypatch.setattr(reader.Published, "read", never)
    monkeypatch.setattr(reader.Published, "compare_copies", never)
    monkeypatch.setattr(Leaves, "read", never)
    monkeypatch.setattr(load, "open_run", never)

    def convert(target):
        if way == "to a workdir":
            conversion.to_run(source, target, small.config())
        else:
            conversion.to_published(source, target, "bfloat16", SHARD)

    usage = new_folder.shutil._ntuple_diskusage(10**9, 0, 10**5)
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="100,000 free; make"):
        patched.setattr(new_folder.shutil, "disk_usage", lambda folder: usage)
        convert(tmp_path / "out")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        convert(converted / "in")
    with pytest.raises(ConfigError, match=r"lies among the checkpoints of .*; give another one"):
        convert(source.directory / "checkpoints" / "7")
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_told_in_one_line(converted, tmp_path, monkeypatch):
    """The writer of a workdir's arrays raises a ValueError of several lines."""

    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing\n  No space left on device")

    monkeypatch.setattr(chunks, "write", full)
    words = r"out cannot be written \(No space left on device\)"
    with pytest.raises(ConfigError, match=words):
        conversion.to_run(open_checkpoint(converted / "in"), tmp_path / "out", small.config())
    assert not any(tmp_path.iterdir())


def test_a_recipe_that_cannot_train_the_model_is_refused_first(tmp_path, monkeypatch):
    checkpoints.write(tmp_path / "in", *checkpoints.make("yarn"))
    source = open_checkpoint(tmp_path / "in")
    monkeypatch.setattr(reader.Published, "read", never)
    base = small.config(batch_length=512)
    with pytest.raises(ConfigError, match=r"batch.length=512 is beyond the context of YaRN"):
        conversion.to_run(source, tmp_path / "run", base)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_norms_that_bfloat16_cannot_hold_stay_float32(tmp_path):
    found, weights = checkpoints.make("v3")
    checkpoints.write(tmp_path / "in", found, weights)
    conversion.to_published(open_checkpoint(tmp_path / "in"), tmp_path / "out", "bfloat16", 10**9)
    out = stored(tmp_path / "out")
    assert (tmp_path / "out" / safetensors.SINGLE).exists()
    assert out["model.norm.weight"].dtype == np.float32
    assert out["lm_head.weight"].dtype == BF16
    half = [deepseek_jax.load(tmp_path / name, "bfloat16").weights for name in ("in", "out")]
    jax.tree.map(np.testing.assert_array_equal, *half)


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_settings_go_both_ways(variant):
    found, _ = checkpoints.make(variant)
    config = config_json.model_config(found, source="here")
    assert config_json.model_config(config_json.published(config), source="there") == config


@pytest.mark.parametrize("module", [v3_671b, v3_671b_32k, v2_lite_16b, moonlight_16b])
def test_our_own_configs_have_a_published_form(module):
    config = configs.parse(module.get_config()).model
    back = config_json.model_config(config_json.published(config), source="there")
    assert {k: v for k, v in vars(back).items() if "yarn" not in k and k != "group_score"} == {
        k: v for k, v in vars(config).items() if "yarn" not in k and k != "group_score"
    }


def test_nothing_partial_is_left(tmp_path):
    found, weights = checkpoints.make("v3")
    weights["lm_head.weight"][0, 0] = np.nan  # the last tensor written
    checkpoints.write(tmp_path / "in", found, weights)
    with pytest.raises(ConfigError, match=r"lm_head.weight holds 1 values"):
        conversion.to_published(open_checkpoint(tmp_path / "in"), tmp_path / "out", "fp8", SHARD)
    with pytest.raises(ConfigError, match=r"lm_head.weight holds 1 values"):
        conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", small.config())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    for name in ("in", "in/config.json"):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            conversion.to_published(open_checkpoint(tmp_path / "in"), tmp_path / name, "fp8", SHARD)


WRITER = """
import sys, time
from pathlib import Path
from deepseek_jax.checkpoint import new_folder

with new_folder.appearing(Path(sys.argv[1])) as folder:
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "half").write_text("a tens")
    print(folder.name, flush=True)
    time.sleep(100)
"""


def test_what_a_killed_process_left_is_used_again(tmp_path):
    """A lock of a process that still runs is respected."""
    found, weights = checkpoints.make("v3")
    checkpoints.write(tmp_path / "in", found, weights)
    target = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, str(target)]
    writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        half = tmp_path / writer.stdout.readline().strip()
        with pytest.raises(ConfigError, match="another process is making target"):
            conversion.to_published(open_checkpoint(tmp_path / "in"), target, "float32", SHARD)
        assert (half / "checkpoints" / "half").exists() and not target.exists()
    finally:
        writer.kill()
        writer.communicate()
    assert half.is_dir()
    conversion.to_published(open_checkpoint(tmp_path / "in"), target, "float32", SHARD)
    same_bits(stored(target), weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert not (target / "checkpoints").exists()


def test_a_router_without_a_published_form_is_refused(tmp_path):
    found, weights = checkpoints.make("v2")
    checkpoints.write(tmp_path / "in", found, weights)
    config = config_json.model_config(found, source="here")
    model = dataclasses.replace(config, score="sigmoid")
    with pytest.raises(ConfigError, match=r"model.group_score='max'.*expected.*'top2'"):
        config_json.published(model)
    run = dataclasses.replace(small.config(), model=model)
    words = "no published form: model.group_score='max'"
    assert words in conversion.obstacle(tmp_path, run)
    assert conversion.obstacle(tmp_path, small.config()) is None


def save_changed(run, config, path, index, value):
    """Saves another step, in which one element of one parameter is changed, without a look."""
    one = SingleDeviceSharding(jax.devices()[0])
    store = Store(run / "checkpoints", keep=1)
    wanted = load._wanted(abstract_model(config.model), lambda _: one)
    step, state, meta = store.restore(wanted)
    part = next(part for part in state.values() if path in part)
    part[path] = part[path].at[index].set(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "require_finite", lambda *_: None)
        store.save(step + 1, state, meta)
    store.close()


def test_a_run_with_numbers_that_are_not_finite_is_refused(tmp_path):
    """Loading and exporting both refuse the run."""
    checkpoints.write(tmp_path / "in", *checkpoints.make("v3"))
    run, path = tmp_path / "run", "moe_layers.feed.experts.gate_up"
    config = conversion.to_run(open_checkpoint(tmp_path / "in"), run, small.config())
    save_changed(run, config, path, (1, 7, 3, 1, 5), np.nan)
    words = rf"{run}/checkpoints holds 1 .*newest holds NaN or infinite values: params\.{path}\)"
    with pytest.raises(ConfigError, match=words):
        load.load(run)
    with pytest.raises(ConfigError, match=words):
        conversion.to_published(open_checkpoint(run), tmp_path / "out", "float32", SHARD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "run"]


def test_router_biases_that_v2_has_no_place_for_are_refused(tmp_path):
    """A softmax router that was trained with balance by bias; without, the run is exported."""
    found, weights_of = checkpoints.make("v2")
    checkpoints.write(tmp_path / "in", found, weights_of)
    config = conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", small.config())
    assert small.config().schedule.bias_speed > 0 == config.schedule.bias_speed
    assert conversion.obstacle(tmp_path / "run", config) is None
    biased = dataclasses.replace(config, schedule=small.config().schedule)
    words = "deepseek_v2 has no router biases; schedule.bias_speed=0 keeps them at zero"
    assert words in conversion.obstacle(tmp_path / "run", biased)
    conversion.to_published(open_checkpoint(tmp_path / "run"), tmp_path / "out", "float32", SHARD)
    same_bits(stored(tmp_path / "out"), weights_of)

    path = "moe_layers.feed.router.bias"
    save_changed(tmp_path / "run", config, path, (1, 3), 0.001)
    words = rf"{path} is not zero, and deepseek_v2 has no router biases; train with schedule.bias"
    with pytest.raises(ConfigError, match=words):
        conversion.to_published(
            open_checkpoint(tmp_path / "run"), tmp_path / "biased", "float32", SHARD
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "run"]
