"""Datasheet numbers agree with each other and with what the report derives from them."""

import dataclasses

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.hardware import chips, network, xla_options, xla_target


def test_every_number_is_positive():
    exchanges = [row for links in network.NETWORKS.values() for row in links.all_to_all]
    for facts in (*chips.CHIPS.values(), *network.NETWORKS.values(), *exchanges):
        for field in dataclasses.fields(facts):
            value = getattr(facts, field.name)
            for number in value.values() if field.name == "peak_flops_per_s" else [value]:
                assert number is None or isinstance(number, str | tuple) or number > 0, field.name


def test_halving_the_bits_doubles_the_peak():
    for chip in chips.CHIPS.values():
        peak = chip.peak_flops_per_s
        assert peak["bfloat16"] == peak["float16"] == pytest.approx(2 * peak["tf32"], rel=1e-3)
        if chip is not chips.A100:
            assert peak["float8"] == pytest.approx(2 * peak["bfloat16"], rel=1e-3)
    assert "float8" not in chips.A100.peak_flops_per_s


def test_every_chip_has_a_network():
    assert list(chips.CHIPS) == list(network.NETWORKS)
    for name in chips.CHIPS:
        assert chips.CHIPS[name].name == network.NETWORKS[name].name == name


def test_racks_and_nodes_add_up_to_the_datasheets():
    """GB200 NVL72 and HGX B200 as NVIDIA prints them: memory, its bandwidth, FP8 with sparsity."""
    rack, node = chips.GB200, chips.B200
    assert network.GB200.gpus_per_node == 72 and network.B200.gpus_per_node == 8
    assert 72 * rack.hbm_bytes == pytest.approx(13.4e12, rel=1e-3)
    assert 72 * rack.hbm_bytes_per_s == 576e12
    assert 2 * 72 * rack.peak_flops_per_s["float8"] == 720e15
    assert 72 * 2 * network.GB200.nvlink_bytes_per_s == pytest.approx(130e12, rel=0.01)
    assert 8 * node.hbm_bytes == 1440e9
    assert 2 * 8 * node.peak_flops_per_s["float8"] == 72e15
    assert 8 * 2 * network.B200.nvlink_bytes_per_s == 14.4e12


def test_the_h800_is_an_h100_with_weaker_links_and_less_float64():
    h100, h800 = chips.H100, chips.H800
    for dtype in ("tf32", "bfloat16", "float16", "float8"):
        assert h800.peak_flops_per_s[dtype] == h100.peak_flops_per_s[dtype]
    assert h800.peak_flops_per_s["float64"] < h100.peak_flops_per_s["float64"] / 10
    assert (h800.hbm_bytes, h800.hbm_bytes_per_s) == (h100.hbm_bytes, h100.hbm_bytes_per_s)
    # "NVLink bandwidth was cut from 900 to 400 GB/s": the two directions together.
    assert 2 * network.H800.nvlink_bytes_per_s == 400e9
    assert 2 * network.H100.nvlink_bytes_per_s == 900e9


def test_the_h200_differs_from_the_h100_in_memory_alone():
    h100, h200 = chips.H100, chips.H200
    same = {"name": "", "hbm_bytes": 0, "hbm_bytes_per_s": 0.0, "dollars_per_hour": 0.0}
    assert dataclasses.replace(h100, **same) == dataclasses.replace(h200, **same)
    assert h200.hbm_bytes > h100.hbm_bytes and h200.hbm_bytes_per_s > h100.hbm_bytes_per_s


def test_links_reach_less_than_they_are_rated():
    for links in network.NETWORKS.values():
        effective = links.nvlink_effective_bytes_per_s or links.inside_bytes_per_s
        assert links.inside_bytes_per_s == effective < links.nvlink_bytes_per_s
        effective = links.infiniband_effective_bytes_per_s or links.between_bytes_per_s
        assert links.between_bytes_per_s == effective < links.infiniband_bytes_per_s
        assert (links.infiniband_small_bytes_per_s or 0) <= effective
        assert links.infiniband_bytes_per_s < links.nvlink_bytes_per_s
        assert links.infiniband_latency_s < links.infiniband_far_latency_s


def test_published_exchanges_fit_through_the_links():
    """Only without the copies that stay in the node: 90 GB/s is more than a NIC of 50 carries."""
    rows = [(links, row) for links in network.NETWORKS.values() for row in links.all_to_all]
    for links, row in rows:
        inside = row.nodes == 1
        rated = links.nvlink_bytes_per_s if inside else links.infiniband_bytes_per_s
        assert row.wire_bytes_per_s < rated
        assert row.nodes == -(-row.gpus // links.gpus_per_node)
    assert any(row.dispatch_bytes_per_s > links.infiniband_bytes_per_s for links, row in rows)


def test_effective_bandwidths_are_those_of_the_published_exchanges():
    h800, b200, gb200 = network.H800, network.B200, network.GB200
    (spread,) = [row for row in h800.all_to_all if row.gpus == 64]
    assert h800.infiniband_effective_bytes_per_s == spread.wire_bytes_per_s
    for links, row in ((b200, b200.all_to_all[0]), (gb200, gb200.all_to_all[-1])):
        want = pytest.approx(row.wire_bytes_per_s, rel=1e-3)
        assert links.nvlink_effective_bytes_per_s == want


def test_the_report_s_argument_for_four_nodes():
    """Section 3.2.2: NVLink is 3.2 times InfiniBand, so 4 nodes x 3.2 = 13 experts cost no more."""
    links = network.H800
    ratio = links.nvlink_effective_bytes_per_s / links.infiniband_bytes_per_s
    assert ratio == pytest.approx(3.2)
    assert round(ratio * 4) == 13


def test_the_paper_s_limit_on_decoding_speed():
    """[INS] 2.3.2: 32 tokens to 9 places, 1 byte out and 2 back, hidden 7000: 120.96 us a round."""
    sent = (1 + 2) * 32 * 9 * 7000
    assert sent / network.H800.infiniband_bytes_per_s == pytest.approx(120.96e-6)


@pytest.mark.parametrize("name", ["h800", "H800", "NVIDIA H800"])
def test_chips_are_found_by_any_spelling(name):
    assert chips.chip(name) is chips.H800
    assert network.network("H800") is network.H800


def test_a_device_s_own_name_is_enough():
    assert chips.chip("NVIDIA H100 80GB HBM3") is chips.H100
    assert chips.chip("NVIDIA-H200") is chips.H200
    assert chips.chip("NVIDIA A100-SXM4-80GB") is chips.A100
    assert chips.chip("NVIDIA GB200") is chips.GB200
    assert chips.chip("AMD Instinct MI300X") is chips.MI300X


def test_the_host_has_no_published_peak():
    assert chips.chip("cpu") is None


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5e12),
        ("NVIDIA H200", "bfloat16", 989.5e12),
        ("NVIDIA H200", "float32", None),  # not a product of the matrix units
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "float8", None),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", None),  # slower memory
        ("NVIDIA B200", "bfloat16", 2250e12),
        ("NVIDIA H100 PCIe", "bfloat16", None),  # slower than the SXM form
        ("NVIDIA H100 NVL", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peaks_by_device_and_dtype(kind, dtype, peak):
    assert chips.peak_flops_per_s(kind, dtype) == peak


@pytest.mark.parametrize("lookup", [chips.chip, network.network])
def test_unknown_names_get_the_closest(lookup):
    with pytest.raises(ValueError, match=r"'h80'; did you mean h800\?"):
        lookup("h80")
    with pytest.raises(ValueError, match="known: h100, h800, h200, b200"):
        lookup("abacus")


def test_the_compiler_is_told_of_the_same_h100():
    """XLA's own description of the device and the datasheet, which rounds."""
    told, chip = xla_target.H100_SXM["gpu_device_info"], chips.H100
    assert told["core_count"] == chip.sms
    assert told["memory_bandwidth"] == pytest.approx(chip.hbm_bytes_per_s, rel=1e-3)
    assert told["l2_cache_size"] == pytest.approx(chip.l2_bytes, rel=0.05)
    assert told["shared_memory_per_core"] == chip.shared_bytes_per_sm
    assert 0.95 * chip.hbm_bytes < told["device_memory_size"] < 1.07 * chip.hbm_bytes
    float32 = 2 * told["core_count"] * told["fpus_per_core"] * told["clock_rate_ghz"] * 1e9
    assert float32 == pytest.approx(67e12, rel=1e-2)


def test_the_text_form_of_a_device():
    config = {"name": 'a "b"', "on": True, "info": {"ghz": 1.5, "feature_extension": "FAST"}}
    lines = ['name: "a \\"b\\""', "on: true", "info { ghz: 1.5 feature_extension: FAST }"]
    assert xla_target.text(config) == "\n".join(lines)


def test_gpus_are_told_what_instructions_cost(tmp_path):
    costs = tmp_path / "costs.pbtxt"
    with pytest.raises(ConfigError, match=r"layout\.cost_profile=.*plan step"):
        xla_options.options("gpu", str(costs))
    costs.touch()
    assert xla_options.options("gpu", str(costs)) == xla_options.options("gpu") | {
        xla_options.PROFILE: str(costs)
    }
    assert xla_options.options("cpu", str(costs)) == xla_options.options("cpu")
    with pytest.raises(ConfigError, match=r"ends in \.pbtxt"):
        xla_options.options("gpu", str(costs.rename(tmp_path / "costs.txt")))
