"""The plan beside published systems: errors within bounds, and DeepGEMM's shapes."""

import pytest
from all_configs import load

from deepseek_jax.hardware import chips, network
from deepseek_jax.parallel.pipeline.schedule import Work
from deepseek_jax.plan import published_steps, published_trace
from deepseek_jax.plan.chunk_time import forward_and_backward
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
        "NeMo, 1,024 H100, FP8": -6.9,
        "NeMo 25.04, 1,024 H100, BF16, 16 ranks": -7.0,
        "NeMo 25.04, 512 H100, BF16, 8 ranks": -1.6,
        "Megatron-Bridge, Moonlight 16B, 16 H100, BF16": 8.1,
        "NeMo 25.04, 256 GB200, BF16, 4 ranks": -66.0,
    }


def test_steps_that_the_gpu_bounds_are_within_ten_percent(steps):
    """All but one, whose software leaves a fast chip idle (docs/cluster.md)."""
    outside = [step.name for step in steps if abs(step.seconds.error) > 0.10]
    assert outside == ["NeMo 25.04, 256 GB200, BF16, 4 ranks"]


def test_terms_of_the_corrected_rows():
    """docs/cluster.md: messages that hide nothing or all bound NeMo's FP8 step."""
    fp8 = published_steps.megatron_fp8_times(load("v3_671b"))
    exposed, hidden = (published_steps.interleaved(fp8, overlap=each) for each in (False, True))
    assert hidden < 25.88 < exposed
    assert (hidden, exposed) == pytest.approx((24.1, 30.9), abs=0.1)
    layer = fp8.layer(dense=False)
    pair = forward_and_backward(layer, layer)
    late = layer.slots[Work.INPUT_GRAD][0] - layer.attention[Work.FORWARD].total
    assert pair.exposed == pytest.approx(late) and late > 1e-3  # combines of B under attention F


@pytest.mark.parametrize("pair", [12.0, 9.0, 8.0])
def test_interleaved_pairs_leave_a_warm_up(pair):
    """Megatron's schedule of three ranks with two chunks, its dependences simulated."""
    ranks, chunks, many, forward, backward = 3, 2, 12, 4.0, 8.0
    alone, steps = forward + backward, many * chunks
    found = simulated(ranks, chunks, many, {"F": forward, "B": backward, "FB": pair})
    late = published_steps.unpaired(ranks, chunks) * (alone - pair)
    assert found == pytest.approx(steps * pair + (ranks - 1) * alone + late)


def simulated(ranks, chunks, many, seconds):
    """Seconds of interleaved 1F1B; rank r has 2 (ranks - r - 1) + (chunks - 1) ranks + 1 ahead."""
    order = [
        (chunk, batch)
        for first in range(0, many, ranks)
        for chunk in range(chunks)
        for batch in range(first, first + ranks)
    ]
    done, clock, waiting = {}, [0.0] * ranks, []
    for rank in range(ranks):
        ahead = 2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1
        forwards = [("F", chunk * ranks + rank, batch) for chunk, batch in order]
        last = chunks * ranks - 1
        backwards = [("B", last - (chunk + 1) * ranks + 1 + rank, batch) for chunk, batch in order]
        paired = list(zip(forwards[ahead:], backwards, strict=False))
        alone = forwards[:ahead], backwards[len(paired) :]
        waiting.append([(f,) for f in alone[0]] + paired + [(b,) for b in alone[1]])
    last = chunks * ranks - 1
    while any(waiting):
        for rank, steps in enumerate(waiting):
            needed = [before(*task, last) for task in (steps[0] if steps else ())]
            if steps and all(each is None or each in done for each in needed):
                start = max([clock[rank], *(done[each] for each in needed if each)])
                clock[rank] = start + seconds["".join(kind for kind, *_ in steps[0])]
                done |= dict.fromkeys(steps.pop(0), clock[rank])
    return max(clock)


def before(kind, stage, batch, last):
    """The task that another one waits for, or None."""
    if kind == "F":
        return ("F", stage - 1, batch) if stage else None
    return ("B", stage + 1, batch) if stage < last else ("F", last, batch)


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
