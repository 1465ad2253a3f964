"""Recompute policies are decided in one place, and every residual has its name from one list."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import small

import deepseek_jax
from deepseek_jax.config import values
from deepseek_jax.model import execution, remat
from deepseek_jax.parallel import axes
from deepseek_jax.precision.saved import Saved, save


def layer(x):
    """Two products and a named residual between them."""
    hidden = save(Saved.GATE_UP, jnp.sin(x @ x))
    return jnp.sin(hidden @ x).sum()


def test_policies_are_those_of_the_config():
    assert set(remat.BY_NAME) == set(values._CHOICES["layout.recompute"])
    for name, policy in remat.BY_NAME.items():
        assert execution.of(small.config(layout_recompute=name)).remat == policy


def test_what_each_policy_answers():
    answers = {
        name: (policy.keep_scores, policy.recompute_all, policy.within_tick())
        for name, policy in remat.BY_NAME.items()
    }
    assert answers == {
        "none": (True, False, remat.NONE),
        "report": (False, False, remat.WITHIN_TICK),
        "attention": (False, False, remat.WITHIN_TICK),
        "full": (False, True, remat.WITHIN_TICK),
    }


def test_a_layer_that_saves_everything_is_not_wrapped():
    """With ZeRO-3 it is: otherwise the weights that each layer gathers would be saved."""
    assert remat.NONE.layer(layer) is layer
    for zero in (0, 1, 3):
        layout = dataclasses.replace(small.layout_of({}), zero=zero)
        with axes.active(layout):
            assert (remat.NONE.layer(layer) is layer) == (zero < 3)


@pytest.mark.parametrize("policy", [remat.REPORT, remat.FULL], ids=["report", "full"])
def test_a_named_residual_is_recomputed_by_full_recomputation_alone(policy):
    for wrapped in (policy.layer(layer), policy.step(layer)):
        pull = jax.vjp(wrapped, jnp.ones((2, 2)))[1]
        assert len(jax.tree.leaves(pull)) == (2 if policy is remat.REPORT else 1)


def test_one_function_names_residuals():
    package = Path(deepseek_jax.__file__).parent
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "checkpoint_name" in path.read_text()
    }
    assert users == {"precision/saved.py"}
