"""What is wrong with a checkpoint is one line, on a mesh and by convert; nothing is left."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import small
from equations import checkpoints
from safetensors.numpy import load_file, save_file

from deepseek_jax.checkpoint import conversion, load
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError

HEAD, NORM = "lm_head.weight", "model.norm.weight"
UP = "model.layers.2.mlp.experts.7.up_proj.weight"
INDEX = "model.safetensors.index.json"
MESH = dict(node=2, gpu=2, tensor=2)


def onto_a_mesh(folder, target):
    load.load(folder, layout=small.layout_of(MESH), mesh=small.mesh_of(MESH))


def to_a_workdir(folder, target):
    conversion.to_run(open_checkpoint(folder), target, small.config())


def to_fp8(folder, target):
    conversion.to_published(open_checkpoint(folder), target, "fp8", 10**6)


def index_of(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def put(folder, name, value, *, file=None, indexed=True):
    """A tensor in the file where it is, or in another; None takes it out."""
    where = index_of(folder)
    path = folder / (file or where.get(name) or min(where.values()))
    tensors = {n: v for n, v in load_file(path).items() if n != name}
    save_file(tensors if value is None else {**tensors, name: value}, path)
    if indexed:
        where = {n: f for n, f in where.items() if n != name}
        where |= {} if value is None else {name: path.name}
        (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def value_of(folder, name):
    return load_file(folder / index_of(folder)[name])[name].copy()


def with_one(number):
    def change(folder):
        value = value_of(folder, UP)
        value[3, 5] = number
        put(folder, UP, value)

    return change


def filled(folder):
    put(folder, NORM, np.full_like(value_of(folder, NORM), np.nan))


def scale_of_infinity(folder):
    settings, stored, _ = checkpoints.make_fp8()
    stored[f"{UP}_scale_inv"][0, 0] = np.inf
    checkpoints.write(folder, settings, stored, shards=2)


def another_shape(folder):
    put(folder, HEAD, np.ascontiguousarray(value_of(folder, HEAD).T))


def truncated(folder):
    file = folder / index_of(folder)[HEAD]
    file.write_bytes(file.read_bytes()[:-100])


def outside(folder):
    where = index_of(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": where | {HEAD: "../in/other"}}))


def twice(folder):
    other = next(file for file in index_of(folder).values() if file != index_of(folder)[HEAD])
    put(folder, HEAD, value_of(folder, HEAD), file=other, indexed=False)


class Harmful:
    """Unpickling makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def pickled(folder):
    for file in folder.glob("*safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(folder / "made")))


def another_architecture(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(settings))


CASES = {
    "a NaN": (with_one(np.nan), (f"{UP} holds 1 values of", "not finite, expected none")),
    "an infinity": (with_one(-np.inf), (f"{UP} holds 1 values of", "not finite, expected none")),
    "NaN alone": (filled, (f"{NORM} holds 48 values of 48", "not finite, expected none")),
    "scale": (scale_of_infinity, (f"{UP} holds", "not finite, expected none")),
    "missing": (lambda f: put(f, UP, None), (f"{UP} (found nothing, expected a float", "[24, 48]")),
    "missing from its file": (
        lambda f: put(f, HEAD, None, indexed=False),
        ("safetensors does not hold lm_head.weight", f"which {INDEX} expects in it"),
    ),
    "extra": (
        lambda f: put(f, "more.weight", np.zeros((2, 3), np.float32)),
        ("more.weight (found float32[2, 3], expected nothing)",),
    ),
    "shape": (another_shape, (f"{HEAD} (found float32[48, 256], expected a float", "[256, 48])")),
    "integers": (
        lambda f: put(f, HEAD, np.zeros((256, 48), np.int32)),
        (f"{HEAD} is I32[256, 48]; expected one of F32, F16, BF16",),
    ),
    "FP8 where none belongs": (
        lambda f: put(f, NORM, np.zeros(48, ml_dtypes.float8_e4m3fn)),
        (f"{NORM} (found float8_e4m3fn[48], expected a float[48])",),
    ),
    "truncated": (truncated, ("model-00", "ends at byte", "found", "the file is truncated")),
    "outside": (outside, (f"{INDEX} puts {HEAD} in '../in/other'", "a file beside it")),
    "twice": (twice, (f"{HEAD} is in model-00001", "and in model-00002", "expected once")),
    "pickled": (pickled, ("holds neither model.safetensors nor", "pickled ones are never read")),
    "architecture": (another_architecture, ("model_type is 'llama'", "deepseek_v3, deepseek_v2")),
}


@pytest.fixture(scope="module")
def good():
    return checkpoints.make("v3", seed=1)


@pytest.mark.parametrize("way", [onto_a_mesh, to_a_workdir, to_fp8], ids=lambda way: way.__name__)
@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_left(case, way, good, tmp_path):
    damage, words = CASES[case]
    folder = tmp_path / "in"
    checkpoints.write(folder, *good, shards=2)
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError) as error:
        way(folder, tmp_path / "out" / "new")
    message = str(error.value)
    assert all(word in message for word in words), message
    assert str(folder) in message and "\n" not in message and len(message) < 800
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
