"""A user's machine: differences from a known one, and one line for each thing that is wrong."""

import dataclasses
from pathlib import Path

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.hardware import chips, machine_file, network

EXAMPLE = Path(__file__).parents[2] / "docs/data/my_cluster.toml"


def written(folder, text, name="mine.toml"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", chips.CHIPS)
def test_a_file_with_a_base_alone_is_that_machine(tmp_path, name):
    chip, links, efficiency = machine_file.load(written(tmp_path, f'base = "{name}"'))
    assert chip == dataclasses.replace(chips.CHIPS[name], name="mine")
    assert links == dataclasses.replace(network.NETWORKS[name], name="mine")
    assert efficiency == {}


def test_the_example_is_ten_lines_and_differs_where_it_says():
    assert len(EXAMPLE.read_text().splitlines()) <= 10
    chip, links, efficiency = machine_file.load(EXAMPLE)
    peaks = {**chips.H100.peak_flops_per_s, "bfloat16": 800e12, "float8": 1600e12}
    assert chip == dataclasses.replace(
        chips.H100, name="my_cluster", peak_flops_per_s=peaks, dollars_per_hour=1.9
    )
    assert links.infiniband_bytes_per_s == 25e9
    assert links.between_bytes_per_s == links.infiniband_effective_bytes_per_s == 21e9
    assert links.nvlink_bytes_per_s == network.H100.nvlink_bytes_per_s
    assert efficiency == {}


@pytest.mark.parametrize("name", chips.CHIPS)
def test_every_field_can_be_set_under_its_name(tmp_path, name):
    """The numbers of one machine, written over another base, give the first machine."""
    chip, links = chips.CHIPS[name], network.NETWORKS[name]
    lines = [f'base = "{"h800" if name == "h100" else "h100"}"', f'name = "{name}"']
    for facts in (chip, links):
        for field in dataclasses.fields(facts):
            value = getattr(facts, field.name)
            if field.name not in ("name", "peak_flops_per_s", "all_to_all") and value is not None:
                lines.append(f"{field.name} = {float(value)!r}")  # of an integer too: 8.0
    lines += ["[peak_flops_per_s]", *(f"{k} = {v}" for k, v in chip.peak_flops_per_s.items())]
    read = machine_file.load(written(tmp_path, "\n".join(lines)))
    assert read.network == dataclasses.replace(links, all_to_all=())
    assert {**chips.H100.peak_flops_per_s, **chip.peak_flops_per_s} == read.chip.peak_flops_per_s
    price = read.chip.dollars_per_hour if chip.dollars_per_hour is None else chip.dollars_per_hour
    same = {"peak_flops_per_s": {}, "dollars_per_hour": price}
    assert dataclasses.replace(read.chip, **same) == dataclasses.replace(chip, **same)
    assert isinstance(read.chip.sms, int) and isinstance(read.network.gpus_per_node, int)


def test_measurements_do_not_outlive_the_rated_bandwidth_that_they_are_of(tmp_path):
    links = machine_file.load(
        written(tmp_path, 'base = "h800"\ninfiniband_bytes_per_s = 100e9')
    ).network
    assert links.infiniband_effective_bytes_per_s is links.infiniband_small_bytes_per_s is None
    assert links.between_bytes_per_s == pytest.approx(2 * network.H800.between_bytes_per_s)
    assert links.nvlink_effective_bytes_per_s == network.H800.nvlink_effective_bytes_per_s
    assert links.all_to_all == ()


def test_the_table_of_efficiencies_is_handed_on(tmp_path):
    text = 'base = "h800"\n[efficiency]\nmatmul = "high"\n[efficiency.deep]\nx = 2'
    assert machine_file.load(written(tmp_path, text)).efficiency == {
        "matmul": "high",
        "deep": {"x": 2},
    }


H = 'base = "h100"\n'
WRONG = {
    "sms = 132": "base is missing; set base =",
    'base = "h10"': "base is 'h10', which is not a known machine; did you mean h100",
    'base = "abacus"': "base is 'abacus', .*known: h100, h800",
    "base = 3": "base is 3, which",
    H + "name = 3": "name is 3; expected a text",
    H + 'name = "\\u001b[31m"': "name is .*printable characters",
    H + "infinband_bytes_per_s = 5e10": "unknown key infinband_.*did you mean infiniband_bytes_",
    H + "all_to_all = 3": "unknown key all_to_all",
    H + '"a\\nb" = 3': r"unknown key 'a\\nb'",
    H + "[efficency]\na = 1": "unknown key efficency; did you mean efficiency",
    H + "efficiency = 3": "efficiency is 3; expected a table",
    H + "peak_flops_per_s = 989e12": "peak_flops_per_s is 9.*expected a table",
    H + "sms = true": "sms is True; expected a number",
    H + 'sms = "132"': "sms is '132'; expected a number",
    H + "sms = 131.5": "sms=131.5 is not a whole number",
    H + "gpus_per_node = 0": "gpus_per_node=0; expected a number above 0",
    H + "dollars_per_hour = -2": "dollars_per_hour=-2; expected a number above 0",
    H + "hbm_bytes = inf": "hbm_bytes=inf; expected a number above 0",
    H + "hbm_bytes = nan": "hbm_bytes=nan; expected a number above 0",
    H + "hbm_bytes = 80": "hbm_bytes=80 is below 1e.09; did you mean bytes, not GB",
    H + "nvlink_bytes_per_s = 450": "nvlink_bytes_per_s=450 is below .*bytes/s, not GB/s",
    H + "infiniband_latency_s = 2.8": "infiniband_latency_s=2.8 is above .*seconds, not us",
    H + "infiniband_bytes_per_s = 500e9": "infiniband_.*above nvlink_.*; 400 Gb/s are 50e9",
    H + "infiniband_effective_bytes_per_s = 60e9": "effective_bytes_per_s=6.* is above infiniband_",
    H + "[peak_flops_per_s]\nbfloat16 = 989": "bfloat16=989 is below .*FLOP/s, not TFLOP/s",
    H + "[peak_flops_per_s]\nfp8 = 2e15": "unknown key peak_flops_per_s.fp8",
    H + "[peak_flops_per_s]\nfloat9 = 2e15": "peak_flops_per_s.float9; did you mean float8",
    H + "[peak_flops_per_s]\nfloat8 = false": "peak_flops_per_s.float8 is False",
    H + "[peak_flops_per_s]\nsms = 132": "peak_flops_per_s.sms is no dtype; .*above all tables",
    "base = h100": "is not TOML",
    H + "sms = " + "[" * 5000: "is not TOML",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_lines_are_named_with_their_file(tmp_path, text):
    with pytest.raises(ConfigError, match=WRONG[text]) as caught:
        machine_file.load(written(tmp_path, text))
    message = str(caught.value)
    assert "mine.toml" in message and "\n" not in message and len(message) < 400


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name, why in (("none.toml", "cannot be read"), (".", "cannot"), ("binary.toml", "TOML")):
        with pytest.raises(ConfigError, match=why):
            machine_file.load(tmp_path / name)
