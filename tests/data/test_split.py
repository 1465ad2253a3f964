"""The held-out split: nobody twice, equal documents on one side, as it always was without any."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.split import split


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.floats(0.01, 0.4))
def test_equal_documents_stand_on_one_side(numbers, share):
    equal = np.array(numbers)
    training, held_out = split(len(equal), share, equal)
    assert sorted([*training, *held_out]) == list(range(len(equal)))
    assert len(held_out) and len(training) and (np.diff(training) > 0).all()
    count = max(1, round(share * len(equal)))
    sizes = np.unique(equal, return_counts=True)[1]
    if sizes.min() <= max(count, len(equal) // 2):
        assert not np.isin(equal[held_out], equal[training]).any()
        assert len(held_out) <= max(count, sizes.min())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
def test_without_equal_documents_the_split_is_the_older_one(share):
    now, older = split(200, share, np.arange(200)), split(200, share, rule=1)
    for got, want in zip(now, older, strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_split_of_older_runs_is_kept():
    assert split(100, 0.05)[1].tolist() == [47, 75, 42, 29, 65]


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_twins_are_told_and_kept_together(corpus_of, share):
    said: list[str] = []
    corpus = corpus_of([f"text {n}" for n in range(100)] * 2, said.append, held_out=share)
    trained = {corpus.text(i) for i in corpus.training}
    assert not trained & {corpus.text(i) for i in corpus.held_out}
    assert len(corpus.held_out) == 200 * share
    assert said[-1] == (
        "data: 100 documents equal an earlier one; no held-out documents equal one that is "
        "trained on"
    )


LINE_ENDS = [("\n", "\r\n"), ("\n", "\n\n"), (" ", "\t"), ("end", "end\n")]


@pytest.mark.parametrize(("old", "new"), LINE_ENDS)
def test_twins_with_other_blank_space_are_kept_together(corpus_of, old, new):
    texts = [f"text {n}\nis at its end" for n in range(50)]
    corpus = corpus_of([*texts, *(text.replace(old, new) for text in texts)], held_out=0.2)
    trained = {tuple(corpus.text(i).split()) for i in corpus.training}
    assert not trained & {tuple(corpus.text(i).split()) for i in corpus.held_out}
    assert len(corpus.held_out) == 20


def test_documents_that_are_all_equal_are_told(corpus_of):
    said: list[str] = []
    corpus = corpus_of(["the same"] * 20, said.append)
    assert len(corpus.held_out) == 2
    assert said[-1].endswith(
        "2 held-out documents equal one that is trained on, and their score tells little"
    )
