"""Sizes of an engine."""

import pytest

from deepseek_jax.serve import sizes


@pytest.mark.parametrize("longest, max_tokens, want", [(1, 1, 64), (4, 60, 64), (5, 60, 128)])
def test_a_slot_holds_whole_steps(longest, max_tokens, want):
    """Prompts of similar lengths run the same programs, which are compiled once."""
    assert sizes.length_for([(0,), (0,) * longest], max_tokens) == want
