"""Pieces of dispatch and combine on one GPU, each timed alone beside its least possible time.

Sizes of V3: 4096 tokens per GPU of width 7168 in bfloat16, dispatched in FP8 and combined in
bfloat16; 256 experts on 8 nodes of 8 GPUs, top-8 on 4 nodes. The buffers of this GPU follow the
routes of all 64 GPUs; the all-to-alls are left out. "Floor" is the least time by the chip's
datasheet.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.bench import grouped
from deepseek_jax.bench.grouped import Shape
from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.hardware.chips import Chip
from deepseek_jax.model.router import select_experts
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.parallel.experts import message
from deepseek_jax.parallel.experts.dispatch import (
    AllToAllDispatch,
    Route,
    permute_rows,
    unpermute_rows,
)
from deepseek_jax.parallel.experts.exchange import Exchange
from deepseek_jax.parallel.experts.message import Field
from deepseek_jax.precision.payload import FP8_PAYLOAD


@dataclasses.dataclass(frozen=True)
class DispatchCase:
    """Sizes of one GPU's part.

    Attributes:
      tokens: Tokens of a GPU.
      width: Width of a token.
      nodes: Nodes of the expert-parallel group, one expert group each.
      gpus: GPUs of a node.
      experts: Routed experts.
      top_k: Experts of a token.
      top_groups: Nodes of a token.
      dtype: Type of tokens and matmuls.
      matmuls: Shapes of the grouped matmuls.
      steps: Runs of a piece that are timed together.
    """

    tokens: int
    width: int
    nodes: int
    gpus: int
    experts: int
    top_k: int
    top_groups: int
    dtype: str
    matmuls: tuple[Shape, ...]
    steps: int


V3 = DispatchCase(4096, 7168, 8, 8, 256, 8, 4, "bfloat16", grouped.GPU.shapes, steps=50)


@dataclasses.dataclass(frozen=True)
class DispatchPiece:
    """A computation to time.

    Attributes:
      name: Name of the row.
      run: Function (changes, fixed) -> arrays.
      changes: Arguments that differ from run to run.
      fixed: Other arguments.
      bytes: Least memory traffic.
      flops: Operations.
    """

    name: str
    run: Callable[[Any, Any], Any]
    changes: Any
    fixed: Any
    bytes: int
    flops: int = 0

    def floor_seconds(self, chip: Chip, dtype: str) -> float:
        """Least seconds by the chip's memory bandwidth and compute."""
        return max(self.bytes / chip.hbm_bytes_per_s, self.flops / chip.peak_flops_per_s[dtype])


def measure(config: Config, *, case: DispatchCase = V3, repeats: int = 5) -> dict[str, Any]:
    """Measures the tables `moves` and `matmuls`; a `times_floor` below 1 is a measuring error.

    Each byte counts once, however often it is read. `layout.capacity_factor` is the config's.
    """
    device = jax.devices()[0]
    chip = grouped.known_chip(device.device_kind)
    return {
        "device": device.device_kind,
        "dtype": case.dtype,
        "buffer": config.layout.capacity_factor,
        "moves": [
            _row(piece, case, chip, repeats, "gb_per_s", piece.bytes / 1e9)
            for piece in moves(config, case)
        ],
        "matmuls": [
            _row(piece, case, chip, repeats, "tflops_per_s", piece.flops / 1e12)
            for piece in matmuls(case, jax.default_backend())
        ],
    }


def _row(
    piece: DispatchPiece,
    case: DispatchCase,
    chip: Chip | None,
    repeats: int,
    unit: str,
    amount: float,
):
    spent = seconds(piece, case.steps, repeats)
    floor = None if chip is None else piece.floor_seconds(chip, case.dtype)
    return {
        "piece": piece.name,
        "microseconds": 1e6 * spent,
        unit: amount / spent,
        "floor": None if floor is None else 1e6 * floor,
        "times_floor": None if floor is None else spent / floor,
    }


def seconds(piece: DispatchPiece, steps: int, repeats: int) -> float:
    """Seconds of one run: the median over `repeats` loops of `steps` dependent runs."""
    out = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(piece.run, piece.changes, piece.fixed)
    )
    state = jax.tree.map(jnp.copy, piece.changes), out
    loop = repeated(piece, steps)
    state = jax.block_until_ready(loop(state, piece.fixed))
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        state = jax.block_until_ready(loop(state, piece.fixed))
        taken.append((time.perf_counter() - begin) / steps)
    return float(np.median(taken))


def repeated(piece: DispatchPiece, steps: int) -> Any:
    """Jitted loop ((changes, result), fixed) -> (changes, result) after `steps` runs, in place."""

    def loop(state, fixed):
        def step(_, state):
            changes = _after(*state)
            return changes, piece.run(changes, fixed)

        return lax.fori_loop(0, steps, step, state)

    return jax.jit(loop, donate_argnums=0)


def _after(changes: Any, out: Any) -> Any:
    """Equal values that depend on `out`, so that the compiler cannot reorder or skip runs."""
    (first, *others), tree = jax.tree.flatten(changes)
    decides = jax.tree.leaves(out)[0]
    bits = {2: jnp.uint16, 4: jnp.uint32}[decides.dtype.itemsize]
    never = lax.bitcast_convert_type(decides[0, 0], bits) == np.array(0x5A5A, bits)
    changed = first.at[0, 0].set(jnp.where(never, jnp.zeros((), first.dtype), first[0, 0]))
    return jax.tree.unflatten(tree, [changed, *others])


def routes(config: Config, case: DispatchCase, key: jax.Array) -> tuple[Route, jax.Array]:
    """Route of the first GPU in the dispatch of all GPUs, and the experts of its tokens MK.

    Nodes and GPUs are two axes of one array, over which `vmap` maps the code of the dispatch.
    """
    model = _model(config, case)
    sizes = dict(pipe=1, replica=1, node=case.nodes, gpu=case.gpus, tensor=1)
    layout = Layout({"experts": ("node", "gpu")}, sizes, zero=0)
    way = hops(config, case)

    def route(chosen):
        tokens, everything = jnp.zeros((case.tokens, 1)), jnp.ones(chosen.shape, jnp.bool_)
        with axes.active(layout):
            weights = jnp.ones(chosen.shape)
            return way.send(Exchange(tokens, weights, chosen, everything, case.experts)).route

    @jax.jit
    def first(key):
        scores = jax.random.uniform(key, (1, case.nodes * case.gpus * case.tokens, case.experts))
        chosen = select_experts(scores, jnp.zeros((case.experts,)), model)[0]
        chosen = chosen.reshape(case.nodes, case.gpus, case.tokens, case.top_k)
        every = jax.vmap(jax.vmap(route, axis_name="gpu"), axis_name="node")(chosen)
        return jax.tree.map(lambda x: x[0, 0], (every, chosen))

    return first(key)


def hops(config: Config, case: DispatchCase) -> AllToAllDispatch:
    """Two-hop dispatch with an FP8 payload."""
    return AllToAllDispatch(
        True, config.layout.capacity_factor, min(case.top_groups, case.top_k), FP8_PAYLOAD
    )


def _model(config: Config, case: DispatchCase) -> ModelConfig:
    """Model with an expert group per node."""
    return dataclasses.replace(
        config.model,
        experts=case.experts,
        groups=case.nodes,
        top_groups=case.top_groups,
        top_k=case.top_k,
    )


def moves(config: Config, case: DispatchCase) -> list[DispatchPiece]:
    """Pieces of dispatch and combine, in order; each has the result of the one before as input."""
    keys = jax.random.split(jax.random.key(0), 3)
    route, chosen = routes(config, case, keys[0])
    (slow, fast), local = route.hops, route.local
    tokens = jax.random.normal(keys[1], (case.tokens, case.width), case.dtype)
    weights = jax.random.uniform(keys[2], chosen.shape)
    names = (chosen + 1).astype(jnp.uint16)
    sent = [Field.of(x) for x in (*FP8_PAYLOAD.encode(tokens), weights, names)]
    back = [Field.of(x) for x in (tokens, chosen.astype(jnp.uint8))]
    bytes_out = sum(FP8_PAYLOAD.bytes_out(case.width, case.dtype))
    row, row_out, row_back = tokens[0].nbytes, _row_bytes(sent), _row_bytes(back)

    def out_slow(changes, route):
        tokens, weights, names = changes
        return route.hops[0].permute(message.pack((*FP8_PAYLOAD.encode(tokens), weights, names)))

    def out_fast(words, route):
        return route.hops[1].permute(words)

    def out_local(words, route):
        return FP8_PAYLOAD.decode(permute_rows(route.local, words, sent[:-2]), case.dtype)

    def combine_local(out, route):
        words = unpermute_rows(route.local, message.pack((out,)), back[0])
        served = route.local.choice_sent.astype(jnp.uint8)
        return jnp.concatenate([words, message.pack((served,))], axis=1)

    def combine_fast(words, route):
        served = route.hops[1].unpermute(served_of(words))
        words = unpermute_rows(route.hops[1], words, back[0])
        return jnp.concatenate([words, message.pack((served,))], axis=1)

    def combine_slow(words, route):
        rows = message.unpack(unpermute_rows(route.hops[0], words, back[0]), back[:1])[0]
        return rows, route.hops[0].unpermute(served_of(words)) > 0

    def served_of(words):
        return message.unpack(words[:, back[0].words :], back[1:])[0]

    # (name, function, bytes to read); the bytes to write are those of the result.
    chain = [
        ("pack slow hop", out_slow, tokens.nbytes),
        ("pack fast hop", out_fast, _rows(fast.sent) * row_out),
        ("unpack for experts", out_local, _rows(local.sent) * bytes_out),
        ("sum and pack here", combine_local, _count(local.used) * row),
        ("sum and pack in node", combine_fast, _count(fast.used) * row_back),
        ("sum at home", combine_slow, _count(slow.used) * row_back),
    ]
    pieces, given = [], (tokens, weights, names)
    for name, run, read in chain:
        made = jax.jit(run)(given, route)
        written = sum(x.nbytes for x in jax.tree.leaves(made))
        pieces.append(DispatchPiece(name, run, given, route, read + written))
        given = made
    return pieces


def _row_bytes(fields: list[Field]) -> int:
    return message.WORD_BYTES * sum(field.words for field in fields)


def _rows(sent: jax.Array) -> int:
    return _count(sent.any(1))


def _count(mask: jax.Array) -> int:
    return int(mask.sum())


def matmuls(case: DispatchCase, platform: str) -> list[DispatchPiece]:
    """Forward of a dense matmul and of the grouped matmul's backends, with balanced experts."""
    pieces = []
    for shape in case.matmuls:
        keys = jax.random.split(jax.random.key(1), 2)
        rows = jax.random.normal(keys[0], (shape.rows, shape.width), case.dtype)
        weight = jax.random.normal(keys[1], (shape.experts, shape.width, shape.out), case.dtype)
        fixed = weight / math.sqrt(shape.width), jnp.asarray(shape.sizes()["balanced"])
        for name, backend in grouped.backends(platform).items():
            if name != "ragged_dot":
                run = functools.partial(lambda backend, rows, fixed: backend(rows, *fixed), backend)
                label = f"{name} {shape.width} x {shape.out}"
                moved = shape.bytes(rows.dtype.itemsize)
                pieces.append(DispatchPiece(label, run, rows, fixed, moved, shape.flops()))
    return pieces
