"""`plan --compare`: signs of effects, rows that cannot be run, text and picture."""

import matplotlib.image
import pytest
from all_configs import load

from deepseek_jax.config import ConfigError
from deepseek_jax.plan import ablations, ablations_plot, ablations_text, machine_lookup


@pytest.fixture(scope="module")
def compared():
    machines = [machine_lookup.find(name) for name in ("h800", "h100")]
    return ablations.compare(load("v3_671b"), machines)


def row(compared, instead, chip="h800"):
    return next(r for r in compared["rows"] if r["instead"] == instead)["chips"][chip]


def test_every_idea_has_a_row_on_each_machine(compared):
    assert len(compared["rows"]) == 1 + len(ablations.ABLATIONS)
    for each in compared["rows"]:
        for found in each["chips"].values():
            assert found["seconds"] > 0 and found["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("instead", "time", "memory", "exposed"),
    [
        ("MHA", 1, 1, 0), ("GQA, 8 key heads", -1, 1, 0), ("any node", 1, 1, 1),
        ("flat", 1, 1, 1), ("one node", None, 1, -1), ("4 ranks", None, -1, 1),
        ("1F1B", 1, -1, 1), ("zero bubble", 1, -1, 1), ("BF16", 1, 1, 1), ("none", -1, 1, 0),
        ("full", 1, -1, 1), ("FP32", 1, 1, 0), ("skewed 2 x", 1, 1, None), ("off", -1, -1, None),
    ],
)  # fmt: skip
def test_signs(compared, instead, time, memory, exposed):
    """Each change has the sign that its cause has.

    One node trades messages for weights; tensor parallelism trades gathers of sequences, which
    nothing hides, for those of the vocabulary. A skewed router leaves more work to hide messages
    under, and the heads of MTP gather the vocabulary again.
    """
    for chip in compared["machines"]:
        found, base = row(compared, instead, chip), compared["rows"][0]["chips"][chip]
        assert time is None or time * found["change"] > 0
        assert memory * found["peak_change"] > 0
        more = found["exposed"] - base["exposed"]
        assert exposed is None or (exposed * more > 0 if exposed else more == pytest.approx(0))


@pytest.mark.parametrize(("chip", "milliseconds"), [("h800", 1.376), ("h100", 0.612)])
def test_sequences_are_gathered_five_times_a_layer(chip, milliseconds):
    """Two gathers or scatters forward and three backward, of three other ranks' 1,024 tokens."""
    tensor = next(each for each in ablations.ABLATIONS if each.instead == "4 ranks")
    machine = machine_lookup.find(chip)
    layer = ablations._chunks(tensor, tensor.change(load("v3_671b")), machine).layer(dense=False)
    size = 5 * 3 * 1024 * 7168 * 2
    assert 1e3 * sum(layer.tensor.values()) == pytest.approx(milliseconds, abs=0.001)
    assert sum(layer.tensor.values()) == pytest.approx(size / machine.network.inside_bytes_per_s)


def test_tensor_parallelism_is_dearer_where_nvlink_is_cut(compared):
    """Its sums travel inside a node, at 160 GB/s on an H800 and 360 on an H100."""
    cut, whole = (row(compared, "4 ranks", chip)["change"] for chip in ("h800", "h100"))
    assert cut > 0.03 and cut > whole + 0.03


def test_narrow_nvlink_makes_tensor_parallelism_dearer(compared):
    """The H800 differs from the H100 by its NVLink alone."""
    assert row(compared, "4 ranks")["change"] > row(compared, "4 ranks", "h100")["change"]
    assert row(compared, "one node")["exposed"] > row(compared, "one node", "h100")["exposed"]
    same = row(compared, "off"), row(compared, "off", "h100")
    assert same[0]["peak_bytes"] == same[1]["peak_bytes"]


def test_cost_is_hours_times_price(compared):
    for chip, price in (("h800", 2.0), ("h100", 2.95)):
        found = row(compared, "flat", chip)
        assert found["dollars"] == pytest.approx(price * found["device_hours"])
        hours = 14.8e12 / found["tokens_per_device_second"] / 3600
        assert found["device_hours"] == pytest.approx(hours)


def test_zero_bubble_says_that_nothing_runs_it(compared):
    problems = {each["instead"]: each["problem"] for each in compared["rows"]}
    assert "ZB1P" in problems["zero bubble"] and problems["1F1B"] is None
    shown = ablations_text.text(compared)
    assert problems["zero bubble"] in shown and "GiB too much for h800 and h100" in shown
    assert max(map(len, shown.splitlines())) <= 118


def test_a_config_without_an_idea_leaves_its_row_out():
    compared = ablations.compare(load("v3_16b"), [machine_lookup.find("h100")])
    absent = {each["answer"] for each in compared["rows"] if not ablations_text.is_compared(each)}
    assert {"DualPipe", "FP8", "node-limited routing"} <= absent and "MLA" not in absent
    assert "Left out" in ablations_text.text(compared)


def test_picture(compared, tmp_path):
    path = ablations_plot.draw(compared, "DeepSeek-V3", tmp_path / "compare")
    assert path == tmp_path / "compare.png"
    height, width, _ = matplotlib.image.imread(path).shape
    assert width > 1000 and height > 700
    with pytest.raises(ConfigError, match="is a folder"):
        ablations_plot.draw(compared, "", tmp_path)
    with pytest.raises(ConfigError, match=r"compare\.nothing"):
        ablations_plot.draw(compared, "", tmp_path / "compare.nothing")
