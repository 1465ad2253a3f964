"""Mesh: one free axis, too few devices, and the layout that the model runs under."""

import jax
import pytest
import small
from jax.sharding import AxisType

from deepseek_jax.config import MESH_AXES, ConfigError, MeshConfig
from deepseek_jax.parallel import mesh


def sizes(**of):
    return MeshConfig(**{name: of.get(name, 1) for name in MESH_AXES})


@pytest.mark.parametrize(
    "asked, devices, want",
    [
        (sizes(), 1, sizes()),
        (sizes(node=2, gpu=4), 8, sizes(node=2, gpu=4)),
        (sizes(gpu=-1), 1, sizes(gpu=1)),
        (sizes(gpu=-1), 8, sizes(gpu=8)),
        (sizes(replica=-1, node=2, tensor=2), 8, sizes(replica=2, node=2, tensor=2)),
        (sizes(replica=2, node=8, gpu=8, pipe=-1), 2048, sizes(replica=2, node=8, gpu=8, pipe=16)),
        (sizes(gpu=-1, tensor=8), 8, sizes(gpu=1, tensor=8)),
    ],
)
def test_resolve(asked, devices, want):
    assert mesh.resolve(asked, devices) == want
    assert mesh.resolve(want, devices) == want


@pytest.mark.parametrize(
    "asked, devices, said",
    [
        (sizes(node=2, gpu=4), 4, r"node 2 x gpu 4.* needs 8 devices .* are 4.*emulate_devices=8"),
        (sizes(gpu=2), 8, r"needs 2 devices and there are 8; change mesh\.\*.*-1"),
        (sizes(gpu=-1, tensor=3), 8, r"mesh\.gpu=-1 .*tensor 3.* multiple of 3 .* are 8"),
        (sizes(node=-1, tensor=8), 4, r"mesh\.node=-1 .* multiple of 8 .* are 4"),
    ],
)
def test_what_does_not_fit_is_named(asked, devices, said):
    with pytest.raises(ConfigError, match=said):
        mesh.resolve(asked, devices)


def test_build():
    built = mesh.build(sizes(replica=2, gpu=2, tensor=2))
    assert built.axis_names == ("pipe", "replica", "node", "gpu", "tensor")
    assert built.devices.shape == (1, 2, 1, 2, 2)
    assert built.axis_types == (AxisType.Explicit,) * 5
    assert set(built.devices.flat) == set(jax.devices())


def test_innermost_axes_are_neighbours():
    ids = [device.id for device in mesh.build(sizes(node=2, gpu=2, tensor=2)).devices.flat]
    assert ids == sorted(ids)


def test_layout_of_a_config():
    config = small.config(mesh_node=2, mesh_gpu=4, layout_zero=3)
    layout = mesh.layout(config)
    assert layout.sizes == {"pipe": 1, "replica": 1, "node": 2, "gpu": 4, "tensor": 1}
    assert layout.rules == config.layout.rules and layout.rules is not config.layout.rules
    assert layout.zero == 3
    assert layout.mesh_axes("experts") == ("node", "gpu")
