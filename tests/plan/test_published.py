"""The plan beside published systems: errors within bounds, and DeepGEMM's shapes."""

import pytest
from all_configs import load

from deepseek_jax.hardware import chips, network
from deepseek_jax.plan import published_steps, published_trace
from deepseek_jax.plan.layer_work import Matmul
from deepseek_jax.plan.machine import Machine


@pytest.fixture(scope="module")
def steps():
    return published_steps.published_steps(load("v3_671b"), load("moonlight_16b"))


# Rows, columns, contraction, groups and TFLOP/s of DeepGEMM's first README, H800.
DEEPGEMM = (
    (4096, 2112, 7168, 1, 1058),
    (4096, 24_576, 1536, 1, 990),
    (4096, 32_768, 512, 1, 590),
    (4096, 7168, 16_384, 1, 1358),
    (4096, 4096, 7168, 1, 1304),
    (4096, 7168, 2048, 1, 1025),
    (4 * 8192, 4096, 7168, 4, 1297),
    (4 * 8192, 7168, 2048, 4, 1099),
    (8 * 4096, 4096, 7168, 8, 1288),
    (8 * 4096, 7168, 2048, 8, 1093),
)


@pytest.mark.parametrize(("rows", "columns", "contraction", "groups", "published"), DEEPGEMM)
def test_matmuls_of_deepgemm(rows, columns, contraction, groups, published):
    matmul = Matmul(rows, contraction, columns, groups)
    seconds = Machine(chips.H800, network.H800).matmul_seconds(matmul, "fp8")
    assert matmul.flops / seconds / 1e12 == pytest.approx(published, rel=0.04)


def test_no_step_is_fitted(steps):
    """The numbers of the rows themselves: a change of the model shows here."""
    found = {step.name: round(100 * step.seconds.error, 1) for step in steps}
    assert found == {
        "DeepSeek, 2,048 H800, FP8": -7.6,
        "Megatron-Bridge, 1,024 H100, BF16": -4.0,
        "NeMo, 1,024 H100, FP8": -15.1,
        "NeMo 25.04, 1,024 H100, BF16, 16 ranks": -24.9,
        "Megatron-Bridge, Moonlight 16B, 16 H100, BF16": 8.1,
    }


def test_rows_outside_ten_percent_and_what_would_move_them(steps):
    """docs/cluster.md: messages that hide nothing or all, and copies to nodes or to GPUs."""
    outside = [step.name for step in steps if abs(step.seconds.error) > 0.10]
    assert outside == ["NeMo, 1,024 H100, FP8", "NeMo 25.04, 1,024 H100, BF16, 16 ranks"]
    fp8 = published_steps.megatron_fp8_times(load("v3_671b"))
    exposed, hidden = (published_steps.interleaved(fp8, overlap=each) for each in (False, True))
    assert hidden < 25.88 < exposed and exposed == pytest.approx(31.7, abs=0.05)
    assert (exposed - 25.88) / (exposed - hidden) == pytest.approx(0.6, abs=0.01)
    flat, hops = (
        published_steps.nemo_one_chunk(load("v3_671b"), way).seconds.predicted
        for way in ("flat", "two_hop")
    )
    assert (flat, hops) == pytest.approx((39.1, 30.2), abs=0.05)


def test_parts_of_the_published_step(steps):
    """Overlapped pairs, backwards and forwards within 10 %; the parts add up to the step."""
    first = steps[0]
    errors = {part.name: part.error for part in first.parts}
    for name in ("forward alone, 1F", "backward alone, 1B", "overlapped, 1F1B"):
        assert abs(errors[name]) < 0.10
    for side in ("predicted", "published"):
        total = sum(getattr(part, side) for part in first.parts)
        assert total == pytest.approx(getattr(first.seconds, side), rel=0.002)


def test_the_trace_is_described():
    rows = {row.name: row for row in published_trace.compare_trace(load("v3_671b"))}
    assert abs(rows["pair"].error) < 0.02
    matmuls = [row.error for name, row in rows.items() if name.endswith("matmuls")]
    assert len(matmuls) == 6 and max(map(abs, matmuls)) < 0.07
