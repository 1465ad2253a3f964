"""Whether a layout fits, what to change, and families that are left out as a whole."""

import dataclasses

import pytest
from all_configs import load
from small_v3 import SMALL, with_

from deepseek_jax.plan import candidates, families, fits, machine_lookup, search
from deepseek_jax.plan.memory_floor import closed_form_bytes
from deepseek_jax.plan.peak import room_bytes

H800 = machine_lookup.find("h800")


def chip(room):
    """The chip with `room` bytes for a program."""
    return dataclasses.replace(
        H800.chip, hbm_bytes=H800.chip.hbm_bytes - room_bytes(H800.chip) + room
    )


def test_what_is_free():
    peak = closed_form_bytes(SMALL)
    found = fits.report(SMALL, chip(peak + 2**30))
    assert found["over_bytes"] == -(2**30) and not found["remedies"]
    assert fits.text(found).startswith("Fits h800: 1.0 of ")


def test_remedies_are_changes_that_are_planned():
    """Micro-batches of eight sequences for a device; computing all again is enough, or not."""
    wide = with_(SMALL, batch=dict(micro_sequences=32), layout=dict(recompute="none"))
    full = closed_form_bytes(with_(wide, layout=dict(recompute="full")))
    found = fits.report(wide, chip(full))
    assert found["over_bytes"] == closed_form_bytes(wide) - full > 0
    assert found["remedies"][0].startswith("--config.layout.recompute=full: ")
    assert found["remedies"][0].endswith(", fits")
    tight = fits.report(wide, chip(full - 1))["remedies"]
    assert tight[0].endswith(", does not fit") and "micro_sequences=4" in tight[1]


def test_a_sequence_that_stays_whole():
    """docs/limits.md: no layout of this config fits; the plan says up to which length one would."""
    config = load("v3_671b_128k")
    found = fits.report(config, H800.chip)
    assert found["largest"] == "activations" and found["over_bytes"] > 400 * 2**30
    shown = fits.text(found)
    assert "no context parallelism" in shown and max(map(len, shown.splitlines())) <= 100
    (length,) = (2**k for k in range(10, 17) if f" {2**k:,} tokens fit" in shown)
    for tokens, fit in ((length, True), (2 * length, False)):
        size = closed_form_bytes(with_(config, batch=dict(length=tokens)))
        assert (size <= room_bytes(H800.chip)) == fit


def test_weights_that_do_not_fit_are_no_matter_of_tokens():
    less = fits.report(SMALL, chip(2**20))
    assert less["remedies"][-1].startswith(("No shorter length", "More pipeline ranks"))
    assert "tokens fit" not in fits.text(less)


@pytest.fixture(scope="module")
def layouts():
    return list(candidates.candidates(SMALL, 16, H800))


def test_no_member_needs_less_than_the_smallest_of_its_family(layouts):
    smallest = families.Smallest(layouts, closed_form_bytes)
    for each in layouts[:: len(layouts) // 40]:
        least, size = smallest.of(families.family_of(each))
        assert families.family_of(least) == families.family_of(each)
        assert closed_form_bytes(least) == size <= closed_form_bytes(each)
    assert smallest.least()[1] == min(smallest.of(f)[1] for f in map(families.family_of, layouts))


def test_a_family_that_cannot_fit_is_planned_once(monkeypatch):
    """No member of it is timed, and few are planned."""
    planned = []

    def count(config):
        planned.append(config)
        return 10**15

    monkeypatch.setattr(search, "peak_bytes", lambda config, execution: count(config))
    monkeypatch.setattr(search, "closed_form_bytes", count)
    monkeypatch.setattr(search, "_step", None)
    with pytest.raises(fits.ConfigError, match="no layout of 16 devices fits"):
        search.search(SMALL, 16, H800)
    tried = len(list(candidates.candidates(SMALL, 16, H800)))
    assert 0 < len(planned) < tried / 5
