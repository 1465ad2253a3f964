"""Proposals of `plan --search` start as they are: their flags, as the command reads them."""

import dataclasses
import functools
import math
import random
import shlex
import sys

import pytest
import runs
from absl import flags
from all_configs import FOLDER, load
from ml_collections import config_flags

from deepseek_jax import config as configs
from deepseek_jax.plan import candidates, machine_lookup, search, search_text

H800 = machine_lookup.find("h800")


def started(file, overrides):
    """Config of `--config=FILE` and these flags, read and checked as a command does."""
    own, line = flags.FlagValues(), ["main", f"--config={file}", *overrides]
    holder = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", line)  # where the library looks for overrides
        own(line)
    return configs.parse(holder.value)


def assert_it_starts(file, row):
    """The flags of a row make the layout of the row, on its number of devices."""
    config = started(file, row["overrides"])
    assert dataclasses.asdict(config.mesh) == row["mesh"]
    assert config.batch.micro_sequences == row["micro_sequences"]
    assert config.precision.recipe == row["recipe"]
    layout = config.layout
    assert (layout.zero, layout.dispatch, layout.recompute, layout.micro_batches_in_flight) == (
        row["zero"], row["dispatch"], row["recompute"], row["micro_batches_in_flight"]
    )  # fmt: skip
    assert row["pipeline"] in (None, layout.pipeline)


SAMPLED = [("v3_16b", 8), ("v3_671b", 256), ("v3_671b", 2048), ("v3_671b_32k", 1024)]


@pytest.mark.parametrize(("name", "devices"), SAMPLED)
def test_flags_of_any_candidate_make_it_again(name, devices):
    base = load(name)
    found = list(candidates.candidates(base, devices, H800))
    for config in random.Random(0).sample(found, 12):
        again = started(FOLDER / f"{name}.py", candidates.overrides(config, base))
        assert again == config


@functools.cache
def small_search(devices):
    return search.search(load("v3_tiny"), devices, H800)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_proposals_of_small_searches_start(devices):
    found = small_search(devices)
    assert found["proposed"]
    for row in found["proposed"] + found["slower"]:
        assert math.prod(row["mesh"].values()) == devices
        assert_it_starts(FOLDER / "v3_tiny.py", row)


def test_more_devices_never_train_fewer_tokens():
    """At the same batch; all devices are used, also by the fastest layout of more."""
    steps = [small_search(devices)["proposed"][0]["seconds"] for devices in (2, 4, 8)]
    assert steps == sorted(steps, reverse=True)


def test_flags_survive_a_shell():
    """A tuple in a flag has parentheses and blanks, which a shell would read."""
    base = load("v3_671b")
    stages = (*(4,) * 15, 1)
    given = dataclasses.replace(base, layout=dataclasses.replace(base.layout, stage_layers=stages))
    for one, other in ((given, base), (base, given)):
        raw = candidates.overrides(one, other)
        assert shlex.split(search_text.command_line(raw)) == raw
        assert len(raw) == 1 and search_text.command_line(raw) != raw[0]
    assert started(FOLDER / "v3_671b.py", candidates.overrides(given, base)) == given


@pytest.mark.slow
@pytest.mark.parametrize(("name", "devices"), SAMPLED[:3])
def test_proposals_of_large_searches_start(name, devices):
    found = search.search(load(name), devices, H800)
    for row in found["proposed"] + found["slower"]:
        assert_it_starts(FOLDER / f"{name}.py", row)


TWO_STEPS = [
    "--config.schedule.tokens=512", "--config.schedule.warmup_steps=0",
    "--config.schedule.decay_start=512", "--config.schedule.decay_end=512",
    "--config.schedule.final_start=512", "--config.schedule.bias_stop=512",
    "--config.schedule.mtp_switch=512", "--config.batch.ramp_tokens=0",
    "--config.batch.ramp_sequences=8", "--config.batch.sequences=8",
    "--config.log.every_steps=1",
]  # fmt: skip


def two_steps(row, folder):
    """Loss of the second step of a run of `tiny.py` with the flags of a row."""
    text, workdir = runs.documents(folder / "text"), folder / "run"
    run = runs.start_main(
        [
            f"--config={runs.TINY}", *row["overrides"], *TWO_STEPS, f"--config.data.path={text}",
            f"--config.data.cache={folder / 'cache'}", f"--workdir={workdir}",
            f"--emulate_devices={math.prod(row['mesh'].values())}",
        ]
    )  # fmt: skip
    out, err = run.communicate()
    assert run.returncode == 0, out + err
    return runs.losses(workdir)[:, 0]


def tiny_search(tmp_path, name="h800"):
    """Search of eight devices; A100s multiply no FP8, whose program takes long to compile."""
    documents = runs.documents(tmp_path / "of_the_search")
    batch = dict(sequences=8, ramp_sequences=8, ramp_tokens=0)
    return search.search(runs.tiny(documents, batch=batch), 8, machine_lookup.find(name))


@pytest.mark.slow
def test_the_first_proposal_trains(tmp_path):
    row = tiny_search(tmp_path, "a100")["proposed"][0]
    first, second = two_steps(row, tmp_path)
    assert 0 < second < first * 1.5 and first < 2 * math.log(264)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(7))
def test_every_row_trains(number, tmp_path):
    found = tiny_search(tmp_path)
    row = (found["proposed"] + found["slower"])[number]
    assert len(two_steps(row, tmp_path)) == 2
