"""Plot of a device's memory."""

import matplotlib.image
import pytest

from configs import v3_671b
from deepseek_jax import config as configs
from deepseek_jax.config import ConfigError
from deepseek_jax.hardware.chips import H100
from deepseek_jax.plan import memory_plot, memory_text
from deepseek_jax.plan.device_memory import by_recipe


@pytest.fixture(scope="module")
def found():
    return by_recipe(configs.parse(v3_671b.get_config()), policies=("attention", "full"))


@pytest.fixture(scope="module")
def memories(found):
    return {", ".join(key): memory for key, memory in found.items()}


def draw(memories, path):
    return memory_plot.draw(memories, H100.hbm_bytes, H100.name, "v3_671b", path)


def test_every_item_has_its_colour(memories, tmp_path):
    path = draw(memories, tmp_path / "figure")
    assert path == tmp_path / "figure.png"
    pixels = (255 * matplotlib.image.imread(path)[..., :3]).round().astype(int).reshape(-1, 3)
    shown = set(map(tuple, pixels))
    items = {name for each in memories.values() for name, size in each.items.items() if size}
    assert len(items) >= 6
    for name in items:
        assert tuple(bytes.fromhex(memory_plot.COLOURS[name][1:])) in shown, name


@pytest.mark.parametrize("name", ["", "no/such/folder.png", "figure.nothing"])
def test_pictures_that_cannot_be(name, memories, tmp_path):
    with pytest.raises(ConfigError, match="--picture=") as error:
        draw(memories, tmp_path / name)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_table_has_what_the_picture_has(found):
    """A line for each recipe and recomputation; its items add up, and the largest is marked."""
    *_, names, first, second, third, fourth = memory_text.by_recipe(found).splitlines()
    assert names.split()[-1] == "peak" and "deferred" not in names
    for line, ((recipe, policy), each) in zip(
        (first, second, third, fourth), found.items(), strict=True
    ):
        assert line.split()[:2] == [recipe, policy]
        *items, peak = line.split()[2:]
        sizes = [float(item.rstrip("*")) for item in items]
        assert sum(sizes) == pytest.approx(float(peak), abs=0.05)
        assert float(peak) == pytest.approx(each.peak / 2**30, abs=0.006)
        (marked,) = (item for item in items if item.endswith("*"))
        assert float(marked.rstrip("*")) == max(sizes)
