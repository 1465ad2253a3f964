"""A backward pass in two halves: what the stage before is waiting for, and what can wait.

Nobody but the optimiser needs the gradients of weights. `split` traces a pass that makes both,
runs what the inputs' gradients need, and leaves the rest with the arrays that it will want: for a
matmul its input and its output's gradient. Nothing is computed twice.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import Literal

# Primitives that call a jaxpr once, and would hide both halves from one another.
_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "checkpoint",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Later:
    """Attributes:
    arrays: all that is needed to go on.
    rest: what goes on.
    """

    arrays: list[jax.Array]
    rest: "_Rest" = dataclasses.field(metadata=dict(static=True))

    def make(self) -> Any:
        env = dict(zip(self.rest.given, self.arrays, strict=True))
        _run(self.rest.lines, env)
        return jax.tree.unflatten(self.rest.tree, [_value(env, v) for v in self.rest.results])


@dataclasses.dataclass(frozen=True, eq=False)
class _Rest:
    lines: list[Any]
    given: list[Any]
    results: list[Any]
    tree: Any


def split(fn: Callable[[], tuple[Any, Any]]) -> tuple[Later, Any]:
    """What fn() = (late, now) returns: `now`, and what makes `late`."""
    calls, (late, now) = jax.make_jaxpr(fn, return_shape=True)()
    inlined = jax.make_jaxpr(lambda: _inline(calls.jaxpr, calls.consts, ()))()
    late_leaves, late_tree = jax.tree.flatten(late)
    jaxpr, count = inlined.jaxpr, len(late_leaves)
    lines = list(jaxpr.eqns)
    first = _needed(lines, jaxpr.outvars[count:])
    done = {v for line in first for v in line.outvars}
    rest = [x for x in _needed(lines, jaxpr.outvars[:count]) if not done.intersection(x.outvars)]

    env = dict(zip(jaxpr.constvars, inlined.consts, strict=True))
    _run(first, env)
    asked = [v for line in rest for v in line.invars] + jaxpr.outvars[:count]
    given = [v for v in dict.fromkeys(v for v in asked if not isinstance(v, Literal)) if v in env]
    later = Later([env[v] for v in given], _Rest(rest, given, jaxpr.outvars[:count], late_tree))
    return later, jax.tree.unflatten(
        jax.tree.structure(now), [_value(env, v) for v in jaxpr.outvars[count:]]
    )


def _needed(lines: list[Any], results: Iterable[Any]) -> list[Any]:
    """The lines that results depend on, in order."""
    wanted = {v for v in results if not isinstance(v, Literal)}
    found = []
    for line in reversed(lines):
        if wanted.intersection(line.outvars):
            found.append(line)
            wanted.update(v for v in line.invars if not isinstance(v, Literal))
    return found[::-1]


def _inline(jaxpr: Any, consts: Iterable[Any], arguments: Iterable[Any]) -> list[Any]:
    """The results of a jaxpr, its calls replaced by what they call."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    for line in jaxpr.eqns:
        called = _called(line) if line.primitive.name in _CALLS else None
        if called is None:
            _run([line], env)
        else:
            inner, inner_consts = getattr(called, "jaxpr", called), getattr(called, "consts", ())
            given = [_value(env, v) for v in line.invars]
            env.update(zip(line.outvars, _inline(inner, inner_consts, given), strict=True))
    return [_value(env, v) for v in jaxpr.outvars]


def _called(line: Any) -> Any:
    return next(line.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in line.params)


def _run(lines: Iterable[Any], env: dict[Any, Any]) -> None:
    for line in lines:
        out = line.primitive.bind(*(_value(env, v) for v in line.invars), **line.params)
        env.update(
            zip(line.outvars, out if line.primitive.multiple_results else [out], strict=True)
        )


def _value(env: dict[Any, Any], v: Any) -> Any:
    return v.val if isinstance(v, Literal) else env[v]
