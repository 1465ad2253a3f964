"""Costs and replay against times computed by hand."""

import dataclasses

import pytest
from snippets import MESH, STEP

from deepseek_jax.aot import compiled, cost_model, hlo
from deepseek_jax.aot.cost_model import Rates

RATES = Rates(flops=1e12, flops_fp8=2e12, memory_bytes=1e9, slow_bytes=1e6, fast_bytes=2e6)
BYTES = 64 * 32 * 2


def program(text=STEP):
    module = hlo.parse(text)
    return compiled.Program(module, compiled.collectives(module, MESH), (), {}, 0)


def test_replay_of_a_timeline_worked_out_by_hand():
    seconds = {
        "slow": 20, "first": 1, "triton": 2, "fast-start.7": 6, "gemm": 4, "product": 5,
        "late": 7, "shift-start": 3, "big": 1, "whole": 10,
    }  # fmt: skip
    # slow 0-20; first and triton until 3. In the loop fast waits for the link: 20-26, gemm 3-7,
    # wait until 26; twice more 6 each, of which gemm 4. Done at 38, slow is long there. product
    # until 43, the longer branch until 50, shift until 53, big until 54, whole until 64.
    timeline = cost_model.replay(program(), seconds)
    waits = {w.collective.name: (w.seconds, w.exposed) for w in timeline.waits}
    assert waits == {
        "slow": (20, 0),
        "fast-start.7": (18, 19 + 2 + 2),
        "shift-start": (3, 3),
        "whole": (10, 10),
    }
    assert (timeline.total, timeline.compute) == (64, 1 + 2 + 3 * 4 + 5 + 7 + 1)
    assert timeline.exposed == timeline.total - timeline.compute
    assert timeline.hidden_share == pytest.approx(1 - 36 / 51)


def test_costs_follow_from_flops_and_bytes():
    costs = cost_model.costs(program(), RATES)
    gemm, memory = 2 * 64 * 32 * 32 / 1e12, (2 * BYTES + 32 * 32 * 2) / 1e9
    assert memory > gemm
    assert costs["gemm"] == pytest.approx(memory)  # so small that reading its weights decides
    assert costs["slow"] == pytest.approx(BYTES / 2 / 1e6)
    assert costs["fast-start.7"] == pytest.approx(BYTES * 3 / 4 / 2e6)
    assert costs["shift-start"] == pytest.approx(BYTES / 2e6)
    assert costs["whole"] == pytest.approx(max(BYTES / 1e6, 6 * BYTES / 2e6))
    assert costs["first"] == pytest.approx(2 * BYTES / 1e9)
    # Each trip waits for its exchange, which takes longer than the GEMM beside it.
    assert costs["fast-start.7"] > costs["gemm"]
    assert costs["loop"] == pytest.approx(3 * costs["fast-start.7"])
    assert costs["either"] == pytest.approx(costs["late"]) == pytest.approx(2 * BYTES / 1e9)
    assert not {"x", "i", "state", "next", "fast-done", "slow.2", "step"} & costs.keys()


def test_fp8_takes_half_the_time():
    fast = dataclasses.replace(RATES, memory_bytes=1e30)
    wide = cost_model.costs(program(), fast)["gemm"]
    narrow = cost_model.costs(program(STEP.replace("bf16", "f8e4m3fn")), fast)["gemm"]
    assert wide == pytest.approx(2 * 64 * 32 * 32 / 1e12)
    assert narrow == pytest.approx(wide / 2)


def test_of_a_pool_only_the_slice_counts():
    """A fusion that reads one layer of stacked weights, and one that writes a slot in place."""
    text = STEP.replace(
        "ROOT %dot = bf16[64,16]{1,0} dot(%p.0, %flat), lhs",
        "ROOT %dot = bf16[64,16]{1,0} add(%p.0, %flat), lhs",
    )
    traffic = cost_model.costs(program(text), RATES)["product"] * 1e9
    assert traffic == pytest.approx(BYTES + 32 * 16 * 2 + 4 + 64 * 16 * 2)
    written = text.replace(
        "ROOT %dot = bf16[64,16]{1,0} add(%p.0, %flat)",
        "ROOT %dot = bf16[8,32,16]{2,1,0} dynamic-update-slice(%p.1, %slice, %p.2)",
    )
    traffic = cost_model.costs(program(written), RATES)["product"] * 1e9
    assert traffic == pytest.approx(32 * 16 * 2 + 4 + 32 * 16 * 2)


def test_the_text_form():
    seconds = {"all-to-all-start.8": 9.4e-3, "loop_add_fusion": 1 / 3}
    written = cost_model.text(seconds)
    assert written.splitlines()[0] == 'costs { name: "all-to-all-start.8" cost_us: 9400.0 }'
    assert cost_model.parse(written) == pytest.approx(seconds, rel=1e-15)
    assert list(cost_model.parse(written)) == list(seconds)
