"""Ranking of layouts by the plan beside the same layouts compiled (tests/compiled_layouts.py)."""

import pytest
from compiled_layouts import compared
from scipy import stats


@pytest.fixture(scope="module")
def rows():
    return compared()


def rank_correlation(rows, what, unit):
    return stats.spearmanr(
        [row[f"planned_{unit}"] for row in rows], [row[f"compiled_{unit}"] for row in rows]
    ).statistic


def test_layouts_that_need_more_memory_are_planned_to_need_more(rows):
    """docs/performance.md states the correlation."""
    assert len(rows) == 8
    assert rank_correlation(rows, "memory", "GiB") > 0.95


def test_slower_schedules_are_planned_slower(rows):
    """Seconds of the compiled schedule are estimated too, at other rates."""
    assert rank_correlation(rows, "time", "s") > 0.8
