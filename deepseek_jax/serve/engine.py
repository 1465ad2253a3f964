"""Engine with continuous batching: requests join and leave the slots of a running batch."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import RunError
from deepseek_jax.model import params
from deepseek_jax.model.decoding import Unstacked
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.params import split
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.parallel.mesh import spread
from deepseek_jax.serve import decode, sizes, speculate
from deepseek_jax.serve.batch_state import Admission, State, empty
from deepseek_jax.serve.requests import Counts, Delta, Request
from deepseek_jax.serve.sampling import Settings

SHORTEST = 16  # prompts are padded to this or a larger power of two, to compile few programs


class CompiledProgram:
    """Jitted function with fixed first arguments, compiled ahead of its call, once per shapes.

    Args:
      function: Jitted function.
      held: First arguments of every call.
    """

    def __init__(self, function: Any, held: tuple[Any, ...]):
        self._function, self._held = function, held
        self._compiled: dict[Any, Any] = {}

    def prepare(self, *arguments: Any, beside: Callable[[], Any] | None = None) -> None:
        """Compiles for the shapes of `arguments` unless that is done.

        Args:
          beside: is called while XLA compiles, in this thread.
        """
        key = self._shapes(arguments)
        if key in self._compiled:
            return
        lowered = self._function.lower(*self._held, *arguments)
        with futures.ThreadPoolExecutor(1) as thread:
            compiled = thread.submit(lowered.compile)
            if beside is not None:
                beside()
            self._compiled[key] = compiled.result()

    def __call__(self, *arguments: Any) -> Any:
        return self._compiled[self._shapes(arguments)](*self._held, *arguments)

    @staticmethod
    def _shapes(arguments: Any) -> tuple[Any, ...]:
        return tuple(leaf.shape for leaf in jax.tree.leaves(arguments))


def _unstacked(model: Transformer, mesh: Mesh) -> Unstacked:
    """Layers with arrays of their own, on the same mesh.

    On one CPU device NumPy slices and packs them, in a tenth of the time that XLA needs to compile
    as many copies.
    """
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return jax.jit(Unstacked.of)(model)
    own = Unstacked.of(jax.tree.map(np.asarray, model), on_cpu=True)
    return jax.device_put(own, NamedSharding(mesh, P()))


class Engine:
    """A fixed number of request slots: `add` requests, then call `step` while `busy`.

    Args:
      model: Model whose weights are on `mesh`, placed by `layout.storage`.
      how: Execution of the forward pass. With `unroll` above 1 the layers are compiled one after
        another, else as a loop. Its dispatch serves prefill; decoding has few tokens, so that its
        dispatch has buffers which no router overfills.
      layout: Layout of the model over `mesh`.
      mesh: Devices.
      slots: Requests that run at once, over all devices.
      length: Tokens of room in each slot, for prompt and generation.
      cache: Format of the latent cache, one of `latent_cache.FORMATS`.
      stop: Tokens that end a request.
      drafts: Tokens that the MTP modules draft in each step; 0 decodes one token per step.
      steps: Decoding steps of one call; new requests join between calls.

    Attributes:
      counts: Counters since the start or the last `reset_counts`.

    Raises:
      ConfigError: Sizes that cannot work together, before anything is compiled.
    """

    def __init__(
        self,
        model: Transformer,
        how: Execution,
        layout: Layout,
        mesh: Mesh,
        *,
        slots: int,
        length: int,
        cache: str = "bfloat16",
        stop: tuple[int, ...] = (),
        drafts: int = 0,
        steps: int = 8,
    ):
        config = self.config = model.config
        sizes.check_numbers(config, slots=slots, length=length, drafts=drafts, steps=steps)
        self.layout, self.mesh, self.slots, self.length = layout, mesh, slots, length
        self._drafts = drafts
        self.reset_counts()
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._held: list[int | None] = [None] * slots
        self._added = 0
        self._parts = int(
            np.prod([layout.sizes[name] for name in layout.mesh_axes("batch")] or [1])
        )
        if slots % self._parts:
            raise ConfigError(
                f"{slots} slots do not divide among the {self._parts} devices of the data axes; "
                f"set engine.slots={-(-slots // self._parts) * self._parts}"
            )
        sizes.check_room(config, slots // self._parts, length, cache, drafts)
        self._build(model, how, cache, stop, steps)

    def _build(
        self, model: Transformer, how: Execution, cache: str, stop: tuple[int, ...], steps: int
    ) -> None:
        """Builds the empty state, and the programs of prefill and decoding that update it."""
        config, layout, mesh, drafts = self.config, self.layout, self.mesh, self._drafts
        per_layer = how.unroll > 1  # layers that are compiled one after another are not stacked
        with jax.set_mesh(mesh):
            graph, weights, bias = split(_unstacked(model, mesh) if per_layer else model)
        batch = P(layout.mesh_axes("batch") or None)
        held = (
            params.place(weights, layout.storage),
            jax.tree.map(lambda _: P(), bias),
        )
        window = speculate.window(config, drafts) if drafts else 0

        def fresh() -> State:
            compute = how.recipe.activation_dtype
            return empty(config, self.slots, self.length, cache, compute, window, per_layer)

        state = jax.eval_shape(fresh)
        own = State(
            slots=jax.tree.map(lambda _: batch, state.slots),
            cache=jax.tree.map(lambda _: P(None, *batch), state.cache),
            hidden_window=jax.tree.map(lambda _: batch, state.hidden_window),
        )
        self._place = NamedSharding(mesh, batch)

        def program(fn, how, *more):
            """`fn(model, how, state, ...)`, compiled for each device's part of its arguments."""

            def local(weights, bias, *arguments):
                with axes.active(layout):
                    return fn(nnx.merge(graph, weights, bias), how, *arguments)

            sharded = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(*held, own, *more),
                out_specs=(own, P()),
                check_vma=False,
            )
            return CompiledProgram(jax.jit(sharded, donate_argnums=2), (weights, bias))

        step = speculate.stepper(drafts) if drafts else decode.plain_step
        with jax.set_mesh(mesh):
            self._admit = program(functools.partial(decode.admit, stop=stop), how, batch)
            self._decode = program(
                lambda model, how, state: decode.multi_step(
                    step, steps, drafts + 1, model, how, state, stop
                ),
                dataclasses.replace(how, dispatch=how.dispatch.unbounded()),
            )
            places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), own)
            self._state = jax.jit(fresh, out_shardings=places)()

    def add(self, request: Request) -> int:
        """Queues a request and returns its number.

        Raises:
          ConfigError: A request that can never run here: unknown tokens, or more than a slot holds.
        """
        request.check_fits(self.config.vocab, self.length)
        self._waiting.append((self._added, request))
        self._added += 1
        return self._added - 1

    @property
    def busy(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._waiting) or any(number is not None for number in self._held)

    def step(self) -> list[Delta]:
        """Admits waiting requests to free slots, then decodes up to `steps` steps of all slots.

        Raises:
          RunError: Logits that are not finite, which no token follows.
        """
        deltas = []
        for wave in self._waves():
            output, seconds = self._call(self._admit, wave)
            self.counts.prefill_seconds += seconds
            deltas += self._deltas(output)
        if any(number is not None for number in self._held):
            output, seconds = self._call(self._decode)
            self.counts.decode_seconds += seconds
            self._count(output)
            deltas += self._deltas(output)
        return deltas

    def reset_counts(self) -> None:
        """Resets `counts`."""
        self.counts = Counts(np.zeros(self._drafts, np.int64))

    def run(self, requests: Iterable[Request]) -> list[list[int]]:
        """Runs until all requests have ended -> generated tokens of each of `requests`."""
        numbers = [self.add(request) for request in requests]
        made: dict[int, list[int]] = {number: [] for number in numbers}
        while self.busy:
            for delta in self.step():
                made.setdefault(delta.request, []).extend(delta.tokens)
        return [made[number] for number in numbers]

    def _call(self, program: CompiledProgram, *arguments: Any) -> tuple[decode.StepOutput, float]:
        """Runs a program on the state -> its output, and its seconds without compilation."""
        with jax.set_mesh(self.mesh):
            begin = time.perf_counter()
            beside = None
            if jax.process_count() == 1:  # else all processes compile in the same order
                beside = functools.partial(self._decode.prepare, self._state)
            program.prepare(self._state, *arguments, beside=beside)
            self.counts.compile_seconds += time.perf_counter() - begin
            begin = time.perf_counter()
            self._state, output = program(self._state, *arguments)
            output = jax.device_get(output)
        return output, time.perf_counter() - begin

    def _waves(self) -> Iterator[Admission]:
        """Admits waiting requests to free slots, one `Admission` per padded prompt length."""
        free = [slot for slot, number in enumerate(self._held) if number is None]
        by_length: dict[int, list[tuple[int, int, Request]]] = {}
        for slot in free[: len(self._waiting)]:
            number, request = self._waiting.popleft()
            length = self._padded(len(request.prompt))
            by_length.setdefault(length, []).append((slot, number, request))
        for length, wave in sorted(by_length.items()):
            for slot, number, request in wave:
                self._held[slot] = number
                self.counts.prompt_tokens += len(request.prompt)
            yield self._admission(length, [(slot, request) for slot, _, request in wave])

    def _padded(self, length: int) -> int:
        return min(max(SHORTEST, 1 << (length - 1).bit_length()), self.length)

    def _admission(self, length: int, requests: list[tuple[int, Request]]) -> Admission:
        """Admission of new requests with as many rows on every device.

        A device has one row if none gets more than one request, else a row for each of its slots:
        two programs per prompt length.
        """
        here = self.slots // self._parts
        per_device = collections.Counter(slot // here for slot, _ in requests)
        rows = 1 if max(per_device.values()) == 1 else here

        def full(value: float, dtype: Any, *more: int) -> Any:
            return np.full((self._parts * rows, *more), value, dtype)

        new = Admission(
            rows=full(here, np.int32),
            prompts=full(0, np.int32, length),
            lengths=full(0, np.int32),
            limits=full(0, np.int32),
            settings=Settings(full(0, np.float32), full(1, np.float32), full(0, np.uint32)),
        )
        used: collections.Counter[int] = collections.Counter()
        for slot, request in requests:
            device, prompt = slot // here, request.prompt
            row = device * rows + used[device]
            used[device] += 1
            for whole, value in (
                (new.rows, slot % here),
                (new.lengths, len(prompt)),
                (new.limits, len(prompt) + request.max_tokens),
                (new.settings.temperature, request.temperature),
                (new.settings.top_p, request.top_p),
                (new.settings.seed, request.seed),
            ):
                whole[row] = value
            new.prompts[row, : len(prompt)] = prompt
        return jax.tree.map(lambda x: spread(x, self._place), new)

    def _deltas(self, output: decode.StepOutput) -> list[Delta]:
        """New tokens by request; frees the slots of requests that have ended."""
        deltas = []
        for slot, number in enumerate(self._held):
            if number is None:
                continue
            steps = zip(output.tokens[:, slot], output.count[:, slot], strict=True)
            tokens = [int(t) for made, count in steps for t in made[:count]]
            if any(token >= self.config.vocab for token in tokens):
                raise RunError(
                    f"the logits of request {number} are not finite, so no token follows; its "
                    "activations overflow: compute in float32 (--dtype=float32, "
                    "--cache=float32), or look for damage in the weights"
                )
            done = not output.running[slot]
            if done:
                self._held[slot] = None
            if tokens or done:
                deltas.append(Delta(number, tokens, done))
        return deltas

    def _count(self, output: decode.StepOutput) -> None:
        offered, counts = output.offered, self.counts
        counts.tokens += int(output.count.sum())
        counts.steps += int((offered > 0).sum())
        for draft in range(len(counts.accepted)):
            counts.accepted[draft] += int((offered > draft + 1).sum())
