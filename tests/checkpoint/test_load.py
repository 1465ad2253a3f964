"""Loading onto a mesh: the same weights as on one device, each part read once."""

import json

import chex
import jax
import numpy as np
import pytest
import small
from equations import checkpoints
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.checkpoint import conversion, load
from deepseek_jax.checkpoint.hf import names, parts, reader
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError
from deepseek_jax.data import tokenizer
from deepseek_jax.model import params
from deepseek_jax.precision.recipes import BFLOAT16

LAYOUTS = {
    "experts over 8": (dict(gpu=8), 0),
    "nodes, tensor": (dict(node=2, gpu=2, tensor=2), 0),
    "ZeRO-3": (dict(replica=2, gpu=4), 3),
    "ZeRO-1, tensor, pipe": (dict(pipe=2, gpu=2, tensor=2), 1),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """FP8 with ragged blocks, in two files."""
    folder = tmp_path_factory.mktemp("fp8")
    settings, stored, _ = checkpoints.make_fp8()
    checkpoints.write(folder, settings, stored, shards=2)
    return folder


@pytest.fixture(scope="module")
def run(published, tmp_path_factory):
    target = tmp_path_factory.mktemp("runs") / "run"
    conversion.to_run(open_checkpoint(published), target, small.config())
    return target


@pytest.fixture(scope="module")
def whole(published):
    return load.load(published)


@pytest.mark.parametrize("sizes, zero", LAYOUTS.values(), ids=LAYOUTS)
def test_a_mesh_gets_the_same_weights(sizes, zero, published, run, whole):
    layout, mesh = small.layout_of(sizes, zero), small.mesh_of(sizes)
    for folder in (published, run):
        model = load.load(folder, layout=layout, mesh=mesh)
        leaves = zip(
            params.describe(whole), jax.tree.leaves(model), jax.tree.leaves(whole), strict=True
        )
        for weight, got, want in leaves:
            spec = layout.storage(weight.axes, weight.shape) if weight.trained else P()
            assert got.sharding == NamedSharding(mesh, spec), weight.path
            np.testing.assert_array_equal(got, want, err_msg=weight.path)


def test_a_part_is_read_once_by_the_device_that_holds_it(published, monkeypatch):
    read, values = reader.Published.read, {}

    def counted(self, name, index=None):
        value = read(self, name, index)
        values[name] = values.get(name, 0) + value.size
        return value

    monkeypatch.setattr(reader.Published, "read", counted)
    sizes = dict(gpu=4, tensor=2)
    load.load(published, layout=small.layout_of(sizes), mesh=small.mesh_of(sizes))
    found = open_checkpoint(published).published
    assert values == {p.name: int(np.prod(p.shape)) for p in names.pieces(found.config)}


def test_devices_with_memory_of_their_own_are_filled_layer_by_layer(published, whole, monkeypatch):
    monkeypatch.setattr(parts, "HOST", ())
    sizes = dict(gpu=2)
    model = load.load(published, BFLOAT16, small.layout_of(sizes), small.mesh_of(sizes))
    half = params.stored(whole, BFLOAT16)
    chex.assert_trees_all_equal(model, half)


def test_what_is_not_finite_is_named_on_a_mesh_too(tmp_path):
    settings, stored = checkpoints.make("v3")
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    stored[name][3, 5] = np.inf
    checkpoints.write(tmp_path, settings, stored)
    sizes = dict(gpu=2)
    with pytest.raises(ConfigError, match=f"{name} holds 1 values .* not finite"):
        load.load(tmp_path, layout=small.layout_of(sizes), mesh=small.mesh_of(sizes))


def test_a_run_of_absurd_sizes_is_not_loaded(run, tmp_path):
    settings = json.loads((run / "config.json").read_text())
    settings["model"]["layers"] = 2**31
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"^model\.layers=2147483648, .* for weights\), and ther"):
        load.load(tmp_path)


def test_a_tokenizer_has_the_marks_that_the_settings_beside_it_state(tmp_path):
    settings, weights = checkpoints.make("v3")
    checkpoints.write(tmp_path, settings | {"bos_token_id": 6, "eos_token_id": 7}, weights)
    tokenizer.make("byte", vocab=262, texts=()).save(tmp_path / "tokenizer.json")
    found = open_checkpoint(tmp_path)
    assert (found.tokenizer.marks.bos, found.tokenizer.marks.eos) == (6, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    found = open_checkpoint(tmp_path)
    assert (found.tokenizer.marks.eos, found.stop_tokens) == (8, (8, 9))
    for bad in ('"8"', str(2**31), str(-(2**40))):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {bad}}}')
        with pytest.raises(ConfigError, match=r"_config\.json: eos_token_id is .*expected ids"):
            open_checkpoint(tmp_path).stop_tokens  # noqa: B018
