"""Split of a backward pass into input gradients (B) and weight gradients (W), as in zero bubble.

The previous stage waits for input gradients; only the optimiser needs weight gradients. `split`
traces a pass that makes both, runs the equations that the input gradients depend on, and returns
the remaining ones with the arrays that they read: for a matmul, its input and the gradient of its
output. Nothing is computed twice, and every equation keeps its named scopes, by which profiles and
compiled programs tell the products of a layer apart, and its context, such as XLA's metadata.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.extend.core import Literal

# Primitives that call a jaxpr once; they are inlined, so that their equations can be split.
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
    """Deferred part of a computation.

    Attributes:
      arrays: values that its equations read.
      rest: its equations.
    """

    arrays: list[jax.Array]
    rest: "_Deferred" = dataclasses.field(metadata=dict(static=True))

    def make(self) -> Any:
        """Runs the deferred part and returns its results."""
        env = dict(zip(self.rest.inputs, self.arrays, strict=True))
        _run(self.rest.eqns, env)
        return jax.tree.unflatten(self.rest.tree, [_value(env, v) for v in self.rest.results])


@dataclasses.dataclass(frozen=True, eq=False)
class _Deferred:
    eqns: list[Any]
    inputs: list[Any]
    results: list[Any]
    tree: Any


def split(fn: Callable[[], tuple[Any, Any]]) -> tuple[Later, Any]:
    """Runs fn() = (late, now) as far as `now` needs; returns the deferred `late`, and `now`."""
    calls, (late, now) = jax.make_jaxpr(fn, return_shape=True)()
    inlined = jax.make_jaxpr(lambda: _inline(calls.jaxpr, calls.consts, ()))()
    late_leaves, late_tree = jax.tree.flatten(late)
    jaxpr, count = inlined.jaxpr, len(late_leaves)
    eqns = list(jaxpr.eqns)
    first = _needed(eqns, jaxpr.outvars[count:])
    done = {v for eqn in first for v in eqn.outvars}
    rest = [x for x in _needed(eqns, jaxpr.outvars[:count]) if not done.intersection(x.outvars)]

    env = dict(zip(jaxpr.constvars, inlined.consts, strict=True))
    _run(first, env)
    asked = [v for eqn in rest for v in eqn.invars] + jaxpr.outvars[:count]
    inputs = [v for v in dict.fromkeys(v for v in asked if not isinstance(v, Literal)) if v in env]
    later = Later(
        [env[v] for v in inputs], _Deferred(rest, inputs, jaxpr.outvars[:count], late_tree)
    )
    return later, jax.tree.unflatten(
        jax.tree.structure(now), [_value(env, v) for v in jaxpr.outvars[count:]]
    )


def _needed(eqns: list[Any], results: Iterable[Any]) -> list[Any]:
    """Equations on which `results` depend, in order."""
    wanted = {v for v in results if not isinstance(v, Literal)}
    found = []
    for eqn in reversed(eqns):
        if wanted.intersection(eqn.outvars):
            found.append(eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, Literal))
    return found[::-1]


def _inline(jaxpr: Any, consts: Iterable[Any], arguments: Iterable[Any]) -> list[Any]:
    """Results of a jaxpr, with the bodies of its calls in their places."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    for eqn in jaxpr.eqns:
        called = _called(eqn)
        if called is None:
            _run([eqn], env)
        else:
            inner, inner_consts = getattr(called, "jaxpr", called), getattr(called, "consts", ())
            inputs = [_value(env, v) for v in eqn.invars]
            with _surroundings(eqn):
                results = _inline(inner, inner_consts, inputs)
            env.update(zip(eqn.outvars, results, strict=True))
    return [_value(env, v) for v in jaxpr.outvars]


def _called(eqn: Any) -> Any:
    """Jaxpr that an equation calls; None for a call with metadata, which are those of the whole."""
    if eqn.primitive.name not in _CALLS or eqn.ctx.xla_metadata:
        return None
    return next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)


def _run(eqns: Iterable[Any], env: dict[Any, Any]) -> None:
    for eqn in eqns:
        with _surroundings(eqn):
            out = eqn.primitive.bind(*(_value(env, v) for v in eqn.invars), **eqn.params)
        env.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


@contextlib.contextmanager
def _surroundings(eqn: Any) -> Iterator[None]:
    """Context of an equation, and its named scopes inside those that are active."""
    names = str(eqn.source_info.name_stack)
    with eqn.ctx.manager, jax.named_scope(names) if names else contextlib.nullcontext():
        yield


def _value(env: dict[Any, Any], v: Any) -> Any:
    return v.val if isinstance(v, Literal) else env[v]
