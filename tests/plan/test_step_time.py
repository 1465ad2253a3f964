"""Times of a step: against closed forms, and monotone where they must be."""

import dataclasses

import pytest
from all_configs import NAMES, load

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline import timeline
from deepseek_jax.parallel.pipeline.schedule import Work
from deepseek_jax.plan import layout_report, machine_lookup, messages, step_time, time_report
from deepseek_jax.plan.chunk_time import ChunkTimes, forward_and_backward
from deepseek_jax.plan.layer_work import DeviceShare, layer_work

V3 = load("v3_671b")


def with_(config, **sections):
    for name, keys in sections.items():
        config = dataclasses.replace(
            config, **{name: dataclasses.replace(getattr(config, name), **keys)}
        )
    return config


def machine(config, name="h800", **changed):
    found = machine_lookup.with_messages(machine_lookup.find(name), config)
    network = dataclasses.replace(found.network, **changed)
    return dataclasses.replace(found, network=network)


def total(config, name="h800", execution="asynchronous", imbalance=1.0, **changed):
    times = step_time.times(config, machine(config, name, **changed), imbalance=imbalance)
    return step_time.step_time(times, execution).total


def test_operations_of_a_layer_are_six_per_weight():
    """Products of the layer's three phases against its weights, counted by hand."""
    share = DeviceShare(with_(V3, layout=dict(recompute="none"), mesh=dict(pipe=1)), 4096)
    work = layer_work(share, dense=False)
    attention = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    experts = 3 * 7168 * 2048 * 9
    for part, weights in ((work.attention, attention), (work.feed, experts)):
        for phase in (Work.FORWARD, Work.INPUT_GRAD, Work.WEIGHT_GRAD):
            assert sum(m.flops for m in part[phase].matmuls) == 2 * 4096 * weights


def test_attention_of_a_layer_is_half_of_all_scores():
    share = DeviceShare(with_(V3, layout=dict(recompute="none"), mesh=dict(pipe=1)), 4096)
    core = layer_work(share, dense=False).attention
    assert core[Work.FORWARD].core_flops == 2 * 4096 * 4096 * 128 * (192 + 128) / 2
    assert core[Work.INPUT_GRAD].core_flops == 2 * 4096 * 4096 * 128 * (3 * 192 + 2 * 128) / 2


def test_messages_are_those_of_the_compiled_program():
    """Bytes of a V3 layer's buffers, as docs/performance.md has them from a compiled program."""
    found = messages.buffers(V3, 4096)
    assert found["send"] == [148_930_560, 297_861_120]
    assert found["combine"] == [293_765_120, 587_530_240]


def test_copies_of_a_token():
    """At most four nodes: 3.5 of four copies leave the node; without the limit 5.27 of 8 nodes."""
    slow, fast = messages.copies(V3)
    assert slow == 4 * 7 / 8 and 6 < fast < 7
    free, _ = messages.copies(with_(V3, model=dict(top_groups=8)))
    assert free == pytest.approx(8 * (1 - 0.3413) * 7 / 8, rel=0.01)
    flat, _ = messages.copies(with_(V3, layout=dict(dispatch="flat")))
    assert 4 < flat / (7 / 8) < 8


def test_a_message_alone_takes_its_bytes_over_the_link():
    config = V3
    times = ChunkTimes(DeviceShare(config, 4096), machine(config))
    chunk = times.layer(dense=False)
    slow, _ = messages.copies(config)
    size = 4096 * slow * (7168 + 56 + 2 * 7168)
    assert chunk.messages[Work.FORWARD] == pytest.approx(size / 43.75e9)


def test_a_pair_hides_messages_until_they_exceed_it():
    fast = ChunkTimes(DeviceShare(V3, 4096), machine(V3)).chunk((0, 4))
    slow = ChunkTimes(DeviceShare(V3, 4096), machine(V3, infiniband_effective_bytes_per_s=5e9))
    slow = slow.chunk((0, 4))
    assert forward_and_backward(fast, fast).exposed == 0
    pair = forward_and_backward(slow, slow)
    assert pair.exposed == pytest.approx(pair.payload - pair.compute) and pair.exposed > 0


@pytest.mark.parametrize("kind", ["1f1b", "zb1p", "dualpipe"])
def test_equal_stages_have_the_published_bubble(kind):
    """Simulated bubbles of equal stages, without hops, equal the formulas of the report's table 2.

    DualPipe's formula is met where F = I, and an upper bound otherwise.
    """
    costs = timeline.Costs(forward=2.0, input_grad=2.0, weight_grad=1.0)
    built = step_time.schedules.BY_NAME[kind](8, 20)
    line = timeline.simulate(built, costs)
    assert max(line.bubbles) == pytest.approx(timeline.bubble_formula(kind, 8, costs))
    later = timeline.simulate(built, costs, hop=0.1)
    assert later.makespan > line.makespan


def test_slower_is_never_faster():
    base = total(V3)
    assert total(V3, infiniband_effective_bytes_per_s=20e9) > base
    assert total(V3, nvlink_effective_bytes_per_s=20e9) > base
    assert total(V3, imbalance=1.5) > base
    assert total(V3, execution="lockstep") > base
    for keys in (
        dict(precision=dict(recipe="bfloat16")),
        dict(layout=dict(recompute="full")),
        dict(model=dict(top_groups=8)),
        dict(model=dict(layers=64), layout=dict(stage_layers=())),
    ):
        assert total(with_(V3, **keys)) > base, keys
    assert total(with_(V3, layout=dict(recompute="none"))) < base
    assert total(V3, "h100") <= base


def test_a_node_of_72_gpus_has_no_slow_messages():
    chunk = ChunkTimes(DeviceShare(V3, 4096), machine(V3, "gb200")).layer(dense=False)
    assert chunk.waits[Work.FORWARD] == 0
    slow = ChunkTimes(DeviceShare(V3, 4096), machine(V3, "b200")).layer(dense=False)
    assert chunk.messages[Work.FORWARD] < slow.messages[Work.FORWARD] / 3


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_timed(name):
    config = layout_report.resolved(load(name))
    report = time_report.report(config, machine(config, "h100"))
    for step in report["steps"].values():
        assert step["seconds"] > 0 and 0 < step["mfu_causal"] < 0.6
        assert step["dollars"] == pytest.approx(step["device_hours"] * 2.95)
        for rank in step["ranks"]:
            assert min(rank.values()) >= 0


def test_the_parts_of_a_rank_add_up():
    step = step_time.step_time(step_time.times(V3, machine(V3)))
    for rank in step.ranks:
        busy = rank.forward + rank.backward + rank.weight_gradient + rank.pairs
        assert busy + rank.bubble == pytest.approx(step.pipeline)
        assert rank.exposed < busy


def test_a_chip_without_the_format():
    with pytest.raises(ConfigError, match="recipe=bfloat16"):
        total(V3, "a100")


def test_more_gpus_in_a_node_than_there_are():
    wide = with_(V3, mesh=dict(node=4, gpu=16))
    assert total(wide) > 1.1 * total(with_(V3, mesh=dict(node=8, gpu=8)))
    assert (
        "16 GPUs, and a node of h800 has 8" in time_report.report(wide, machine(wide))["notes"][0]
    )


def test_nothing_is_hidden_where_nothing_overlaps():
    def hidden(**sections):
        config = with_(V3, **sections)
        return [row["hidden"] for row in time_report.report(config, machine(config))["links"]]

    assert min(hidden()) > 0.8
    assert hidden(layout=dict(pipeline="1f1b")) == [0.0, 0.0]
    alone, beside = (
        dict(mesh=dict(pipe=1), layout=dict(micro_batches_in_flight=count)) for count in (1, 2)
    )
    assert hidden(**alone) == [0.0, 0.0] and min(hidden(**beside)) > 0.8
