"""Names of layers and their parts in the compiled step, as a profile shows them."""

import re

import pytest
import small

from deepseek_jax.train.step import lower

PARTS = {
    "embedding", "layer", "norm", "attention", "dense_ffn", "router", "dispatch", "experts",
    "combine", "shared_experts", "mtp", "loss", "optimizer",
}  # fmt: skip


def lowered(**changes):
    config = small.config(**changes)
    sizes = {key.split("_", 1)[1]: n for key, n in changes.items() if key.startswith("mesh_")}
    return lower(config, small.mesh_of(sizes))


def scopes(op_names):
    """Every scope of operations, transforms like jvp(...) taken off."""
    return set(re.findall(r"[a-z_]+", " ".join(op_names)))


def test_the_compiled_step_names_every_part():
    text = lowered().compile().as_text()
    names = re.findall(r'op_name="([^"]*)"', text)
    assert scopes(names) >= PARTS
    backward = [name for name in names if "transpose(" in name]
    assert scopes(backward) >= {"layer", "attention", "experts", "shared_experts", "mtp"}


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"mesh_gpu": 2, "layout_micro_batches_in_flight": 2}, {"pass_a", "pass_b"}),
        ({"mesh_pipe": 2, "mesh_gpu": 2}, {"even", "odd", "forward", "backward", "last"}),
    ],
)
def test_overlapped_layers_and_stages_have_the_same_names(changes, more):
    text = lowered(**changes).as_text(debug_info=True)
    locations = re.findall(r'^#loc\d+ = loc\("([^"]*)"', text, re.M)
    assert scopes(locations) >= PARTS - {"dense_ffn"} | more
