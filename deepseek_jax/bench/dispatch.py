"""Expert-parallel dispatch: messages, bytes and time.

On emulated CPU devices: forward and backward of dispatch, a small expert network and combine, on
every mesh node x gpu of the devices. Messages and bytes are read from the compiled program, copies
from the routes. The devices share this machine's cores and have no network, so that the time is
that of sorting, packing and copying.

On a GPU: the pieces of `dispatch_pieces.py`, at V3's sizes, without a network.

Sizes: 128 tokens per device of width 128; 8 experts per device of width 64; one expert group per
node, of which a token may use half; top-8.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.aot import compiled, hlo
from deepseek_jax.bench import dispatch_pieces
from deepseek_jax.config import Config, MeshConfig, ModelConfig
from deepseek_jax.model import execution
from deepseek_jax.model.moe import expert_rounds
from deepseek_jax.model.router import select_experts, visits
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as cluster
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.parallel.experts import dispatch, traffic
from deepseek_jax.parallel.experts.dispatch import AllToAllDispatch, ExchangePlan, Hop, Route
from deepseek_jax.parallel.experts.exchange import Exchange

TOKENS, WIDTH, HIDDEN = 128, 128, 64
EXPERTS_PER_DEVICE, TOP_K = 8, 8
WAYS = ("flat", "two_hop")
ROUTERS = ("balanced", "skewed", "one")
RULES = {"batch": ("node", "gpu"), "experts": ("node", "gpu")}
NOTE = "emulated devices on shared cores: no network, so times are of sorting, packing and copying"


def measure(
    config: Config, *, tokens: int = TOKENS, repeats: int = 7, meshes: Sequence[str] = ()
) -> dict[str, Any]:
    """Measures the tables `messages` and `time`; on a GPU, those of `dispatch_pieces.measure`.

    Table `messages` has a row for each hop: the all-to-alls over it in forward and backward of the
    first round, the bytes on one device by `traffic.message_bytes` of each of its four kinds,
    and `as_compiled`, True if the compiled program moves exactly these.

    Table `time` has, per token, `nodes` and `gpus`, those that hold one of its experts; `slow` and
    `fast`, its copies that the first round sends to other nodes and to other GPUs of its node; and
    `served`, the share of its experts that the first round reaches. `busiest` is the largest load
    of a GPU over the mean. `of_flat` is the median of the time divided by that of `flat` in the
    same turn. A mesh of one hop has the same program for both, so that there it shows the noise.

    Args:
      config: Recipe.
      tokens: Tokens of each device.
      repeats: Turns of all runs; times are medians.
      meshes: Meshes, such as ("2x4",); empty for all that the devices allow.
    """
    if jax.default_backend() == "gpu":
        return dispatch_pieces.measure(config)
    names = meshes or _meshes(jax.device_count())
    with ThreadPoolExecutor() as pool:  # compiling takes most of the time
        each = list(pool.map(lambda name: MeasuredDispatch.each_way(config, name, tokens), names))
    runs = [
        (cell, router, cell.arguments(router))
        for exchanges in each
        for router in ROUTERS
        for cell in exchanges
    ]
    first = [cell.run(given) for cell, _, given in runs]
    seconds = np.array([[cell.seconds(given) for cell, _, given in runs] for _ in range(repeats)])
    of_flat = seconds / seconds[:, :: len(WAYS)].repeat(len(WAYS), axis=1)  # `flat` is the first
    table = [
        {
            "mesh": cell.mesh,
            "router": router,
            "way": cell.way,
            **cell.figures(given, found),
            "milliseconds": 1e3 * float(np.median(spent)),
            "of_flat": float(np.median(ratio)),
        }
        for (cell, router, given), found, spent, ratio in zip(
            runs, first, seconds.T, of_flat.T, strict=True
        )
    ]
    return {
        "device": NOTE,
        "buffer": config.layout.capacity_factor,
        "messages": [row for exchanges in each for cell in exchanges for row in cell.messages()],
        "time": table,
    }


def sized(config: Config, mesh: str, way: str) -> Config:
    """Config of the benchmark: the recipe of `config` with the sizes above and a mesh."""
    node, gpu = map(int, mesh.split("x"))
    model = dataclasses.replace(
        config.model,
        d_model=WIDTH,
        d_expert=HIDDEN,
        experts=EXPERTS_PER_DEVICE * node * gpu,
        top_k=TOP_K,
        groups=node,
        top_groups=max(1, node // 2),
    )
    return dataclasses.replace(
        config,
        model=model,
        mesh=MeshConfig(pipe=1, replica=1, node=node, gpu=gpu, tensor=1),
        layout=dataclasses.replace(config.layout, dispatch=way, rules=RULES, zero=0),
    )


def choose(router: str, tokens: int, model: ModelConfig, seed: int = 0) -> np.ndarray:
    """Experts that the model's router chooses from random affinities, (tokens)K int32.

    Gumbel noise plus a bias samples without replacement with probabilities exp(bias): equal for all
    experts ("balanced"), 1/rank of the experts in random order ("skewed", Zipf's law), or 1 for
    expert 0 and equal for the others ("one").
    """
    rng = np.random.default_rng(seed)
    scores = jnp.asarray(rng.gumbel(size=(1, tokens, model.experts)), jnp.float32)
    bias = {
        "balanced": np.zeros(model.experts),
        "skewed": -np.log(1 + rng.permutation(model.experts)),
        "one": 1e3 * (np.arange(model.experts) == 0),
    }[router]
    return np.asarray(select_experts(scores, jnp.asarray(bias, jnp.float32), model)[0][0])


@dataclasses.dataclass(frozen=True)
class MeasuredDispatch:
    """Compiled dispatch and combine, forward and backward.

    Attributes:
      mesh: Nodes x GPUs, such as "2x4".
      way: Dispatch, one of WAYS.
      config: Config of the benchmark.
      tokens: Tokens of each device.
      plan: Hops with their slots.
      program: Compiled program.
      places: Shardings of its arguments.
    """

    mesh: str
    way: str
    config: Config
    tokens: int
    plan: ExchangePlan
    program: Any
    places: tuple[NamedSharding, ...]

    @classmethod
    def each_way(cls, config: Config, mesh: str, tokens: int) -> list["MeasuredDispatch"]:
        """Compiles all ways; with one node, or one GPU per node, they share a program."""
        exchanges: list[MeasuredDispatch] = []
        for way in WAYS:
            mine = sized(config, mesh, way)
            plan = _plan(mine, tokens)
            same = [e for e in exchanges if e.plan == plan]
            program, places = (same[0].program, same[0].places) if same else _compiled(mine, tokens)
            exchanges.append(cls(mesh, way, mine, tokens, plan, program, places))
        return exchanges

    def arguments(self, router: str) -> tuple[jax.Array, ...]:
        """Random arguments of the program, whose experts are chosen by a kind of router."""
        rng = np.random.default_rng(1)
        operands = [
            rng.normal(size=shape).astype(dtype)
            for shape, dtype in _operands(self.config, self.tokens)
        ]
        total = self.tokens * self.config.mesh.node * self.config.mesh.gpu
        operands[3] = np.abs(operands[3])
        operands[4] = choose(router, total, self.config.model)
        return jax.device_put(tuple(operands), self.places)

    def run(self, given: tuple[jax.Array, ...]) -> Any:
        """Runs the program and waits for it."""
        return jax.block_until_ready(self.program(*given))

    def seconds(self, given: tuple[jax.Array, ...]) -> float:
        """Seconds of one run."""
        begin = time.perf_counter()
        self.run(given)
        return time.perf_counter() - begin

    def figures(self, given: tuple[jax.Array, ...], found: Any) -> dict[str, float]:
        """Figures of a row of `time`: the router's choices, and the copies of the first round."""
        chosen, (number, sent, served) = given[4], jax.device_get(found[1])
        total, places = self.config.model.experts, self.config.mesh
        wanted = [
            float(visits(jax.device_get(chosen)[None], total, parts).sum()) / len(chosen)
            for parts in (places.node, places.node * places.gpu)
        ]
        slow, fast = sent.sum(0) / len(chosen)
        load = np.bincount(np.asarray(chosen).ravel() // self.plan.here)
        return {
            "nodes": wanted[0],
            "gpus": wanted[1],
            "busiest": float(load.max() * places.node * places.gpu / load.sum()),
            "slow": float(slow),
            "fast": float(fast),
            "served": float(served.mean()),
            "rounds": int(number.max()),
        }

    def messages(self) -> list[dict[str, Any]]:
        """Rows of `messages`, one for each hop."""
        model, payload = self.config.model, _hops(self.config).payload
        dtype = execution.of(self.config).recipe.activation_dtype
        planned = traffic.message_bytes(self.plan, payload, model.d_model, dtype, model.top_k)
        rows = []
        for number, hop in enumerate(self.plan.hops):
            sizes = {step.replace(" ", "_"): each[number] for step, each in planned.items()}
            moved = sorted(c.bytes for c in self.collectives() if c.axes == hop.over)
            rows.append(
                {
                    "mesh": self.mesh,
                    "way": self.way,
                    "over": " ".join(hop.over),
                    "messages": len(moved),
                    **sizes,
                    "as_compiled": moved == sorted(sizes.values()),
                }
            )
        return rows

    def collectives(self) -> list[compiled.Collective]:
        """All-to-alls of the compiled program, without those of overflow rounds."""
        found = compiled.collectives(
            hlo.parse(self.program.as_text()), dataclasses.asdict(self.config.mesh)
        )
        return [c for c in found if c.kind == "all-to-all" and c.inside == "entry"]


def _hops(config: Config) -> AllToAllDispatch:
    way = dispatch.of(config)
    assert isinstance(way, AllToAllDispatch)  # true of all WAYS
    return way


def _plan(config: Config, tokens: int) -> ExchangePlan:
    with axes.active(cluster.layout(config)):
        return _hops(config).plan(tokens, config.model.top_k, config.model.experts)


def _compiled(config: Config, tokens: int) -> tuple[Any, tuple[NamedSharding, ...]]:
    """Compiled program, and the shardings of its arguments."""
    layout, mesh = cluster.layout(config), cluster.build(config.mesh)
    batch, own = (P(layout.mesh_axes(axis) or None) for axis in ("batch", "experts"))
    specs = (own, own, batch, batch, batch, batch)
    step = jax.shard_map(
        functools.partial(_step, config, layout),
        mesh=mesh,
        in_specs=specs,
        out_specs=((own, own, batch, batch), (batch, batch, batch)),
        check_vma=False,
    )
    places = tuple(NamedSharding(mesh, spec) for spec in specs)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for (shape, dtype), place in zip(_operands(config, tokens), places, strict=True)
    ]
    with jax.set_mesh(mesh):
        return jax.jit(step).lower(*shapes).compile(), places


def _operands(config: Config, tokens: int) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of gate_up, down, tokens, weights, experts and the output's cotangent."""
    model, dtype = config.model, execution.of(config).recipe.activation_dtype
    batch = tokens * config.mesh.node * config.mesh.gpu
    return [
        ((model.experts, model.d_model, 2, model.d_expert), dtype),
        ((model.experts, model.d_expert, model.d_model), dtype),
        ((batch, model.d_model), dtype),
        ((batch, model.top_k), np.float32),
        ((batch, model.top_k), np.int32),
        ((batch, model.d_model), dtype),
    ]


def _step(config: Config, layout: Layout, gate_up, down, tokens, weights, experts, d_out):
    """Part of one device -> gradients, and (rounds (1,), copies (1, 2), served choices MK)."""
    how, total = execution.of(config), config.model.experts
    rounds = expert_rounds(how, config.model.swiglu_limit)

    def weighted_sum(network, tokens, weights):
        everything = jnp.ones(experts.shape, jnp.bool_)
        exchange = Exchange(tokens, weights, experts, everything, total, network)
        arrived = how.dispatch.send(exchange)
        first, served = how.dispatch.combine(rounds.work(network, arrived), arrived.route)
        out, number = rounds.rest(exchange.after(served), first)
        known = number[None], crossings(arrived.route)[None], served
        return jnp.sum((out * d_out).astype(jnp.float32)), known

    with axes.active(layout):
        grad = jax.grad(weighted_sum, (0, 1, 2), has_aux=True)
        ((d_gate_up, d_down), d_tokens, d_weights), known = grad((gate_up, down), tokens, weights)
    return (d_gate_up, d_down, d_tokens, d_weights), known


def crossings(route: Route) -> jax.Array:
    """Copies that this device sends to other nodes and to other GPUs of its node, (2,) int32."""
    sent = [
        _crossings(hop, hop_permutation.used)
        for hop, hop_permutation in zip(route.plan.hops, route.hops, strict=True)
    ]
    return sum(sent, jnp.zeros((2,), jnp.int32))


def _crossings(hop: Hop, used: jax.Array) -> jax.Array:
    gpus = axes.devices(tuple(name for name in hop.over if name == "gpu"))
    lane, own = jnp.arange(hop.parts, dtype=jnp.int32), lax.axis_index(hop.over)
    copies = used.reshape(hop.parts, hop.slots).sum(1, dtype=jnp.int32)
    slow = lane // gpus != own // gpus
    fast = ~slow & (lane != own)
    return jnp.stack([jnp.where(where, copies, 0).sum(dtype=jnp.int32) for where in (slow, fast)])


def _meshes(devices: int) -> list[str]:
    """Meshes node x gpu of a number of devices."""
    return [f"{n}x{devices // n}" for n in range(1, devices + 1) if devices % n == 0]
