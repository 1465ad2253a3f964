"""Training speed: tokens per second beside Hugging Face, and the share of the matmul speed.

The model has 10.8 million parameters: 4 layers of which 1 dense, width 256, 16 experts of width
128, top-4 in 4 groups, vocabulary 8192, no MTP module, batch 8 x 256, float32. If torch and
transformers are installed, `transformers` trains the same weights on the same batch in the same
process, in turns with ours, after its first loss and gradient were found to be ours.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from deepseek_jax.bench import hugging_face
from deepseek_jax.config import Config
from deepseek_jax.hardware import xla_options
from deepseek_jax.model.count import count
from deepseek_jax.model.flops import training_flops_per_token
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.train import optimizer, state, token_schedule
from deepseek_jax.train.anomalies import Limits
from deepseek_jax.train.step import make_step, tokens_spec

TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-4}  # relative; the balance loss is in our norm alone


def sized(config: Config, **model: Any) -> Config:
    """Config of the benchmark: the recipe of `config` with the sizes above."""
    sizes = dict(
        vocab=8192, layers=4, dense_layers=1, d_model=256, d_dense=1024, heads=4,
        q_latent=128, kv_latent=64, d_nope=64, d_rope=32, d_value=64,
        experts=16, shared_experts=1, top_k=4, groups=4, top_groups=2, d_expert=128, mtp_depth=0,
    )  # fmt: skip
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **sizes | model),
        mesh=dataclasses.replace(config.mesh, pipe=1, replica=1, node=1, gpu=1, tensor=1),
        batch=dataclasses.replace(
            config.batch,
            length=256,
            sequences=8,
            ramp_sequences=8,
            ramp_tokens=0,
            micro_sequences=8,
        ),
        layout=dataclasses.replace(
            config.layout, recompute="none", attention_block=128, unroll=4, loss_chunk=512
        ),
        precision=dataclasses.replace(config.precision, recipe="float32"),
        optimizer=dataclasses.replace(config.optimizer, ema_decay=0.0, moments="float32"),
    )


@dataclasses.dataclass(frozen=True)
class Stepper:
    """Compiled training step with its state and data.

    Attributes:
      config: Config of the benchmark.
      step: Function that runs one step and returns its metrics.
      program: Text of the compiled step.
      temporary_bytes: Bytes that the compiled step holds besides its arguments and results.
      build_seconds: Time of initialising the state.
      compile_seconds: Time of tracing and compiling the step.
    """

    config: Config
    step: Callable[[], dict[str, jax.Array]]
    program: str
    temporary_bytes: int
    build_seconds: float
    compile_seconds: float

    @classmethod
    def of(cls, config: Config) -> "Stepper":
        """Initialises the state and compiles the step."""
        start = time.perf_counter()
        mesh, layout = meshes.build(config.mesh), meshes.layout(config)
        adam = optimizer.build(config.optimizer)
        with jax.set_mesh(mesh):
            places = state.shardings(config, layout, mesh, adam)
            now = jax.block_until_ready(state.initialise(config, places, adam))
            built = time.perf_counter()
            place = NamedSharding(mesh, tokens_spec(layout))
            tokens = jax.device_put(batch(config)[None], place)
            hyper = jax.tree.map(np.float32, first_hyper(config))
            given: tuple[Any, ...] = tokens, np.int32(1), hyper
            if config.anomaly.rule == "skip":
                given += (jax.tree.map(np.float32, Limits()),)
            step = jax.jit(make_step(config, layout, mesh, adam), donate_argnums=0)
            options = xla_options.options(jax.default_backend())
            compiled = step.lower(now, *given).compile(options)
            compile_seconds = time.perf_counter() - built

        def one() -> dict[str, jax.Array]:
            nonlocal now
            now, metrics = compiled(now, *given)
            return metrics

        memory = compiled.memory_analysis()
        held = memory.temp_size_in_bytes if memory else 0
        return cls(config, one, compiled.as_text() or "", held, built - start, compile_seconds)

    def run(self) -> float:
        """Runs one step; returns its seconds."""
        return seconds_of(lambda: jax.block_until_ready(self.step()))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return token_schedule.tokens_per_micro_batch(self.config.batch)


def batch(config: Config) -> np.ndarray:
    """Random tokens of every step, B(S+1)."""
    shape = (config.batch.micro_sequences, config.batch.length + 1)
    return np.random.default_rng(0).integers(0, config.model.vocab, shape, np.int32)


def first_hyper(config: Config) -> token_schedule.Hyper:
    """Hyperparameters of every step: those of the first."""
    return token_schedule.hyper(config.schedule, step=0, tokens=0)


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def matmul_flops_per_second(size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of square float32 matmuls, the best of a few."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def measure(config: Config, *, rounds: int = 6, steps: int = 4) -> dict[str, Any]:
    """Measures rounds of matmuls and steps in turns, as the machine may be shared.

    Returns:
      Figures of our step; `hugging_face` tokens per second or None, `of_hugging_face` the median of
      the rounds' ratios, and `pairs`, a list with tokens per second of each round.

    Raises:
      ValueError: `transformers` computes another loss or gradient.
    """
    config = sized(config)
    stepper = Stepper.of(config)
    begin = time.perf_counter()
    metrics = jax.device_get(stepper.step())
    first = time.perf_counter() - begin
    theirs = trainer(config, metrics) if hugging_face.installed() else None
    seconds, peaks, pairs = [], [], []
    for _ in range(rounds):
        peaks.append(matmul_flops_per_second())
        turn = [stepper.run() for _ in range(steps)]
        seconds += turn
        if theirs is not None:
            others = [seconds_of(theirs.step) for _ in range(steps)]
            pairs.append(_pair(stepper.tokens, turn, others))
    tokens_per_second = stepper.tokens / float(np.median(seconds))
    flops = training_flops_per_token(config.model, config.batch.length)
    peak = float(np.median(peaks))
    return {
        "parameters": count(config.model).total,
        "flops_per_token": flops,
        "tokens_per_second": tokens_per_second,
        "matmul_flops_per_second": peak,
        "share_of_matmul": tokens_per_second * flops / peak,
        "hugging_face": _median(pairs, "hugging_face"),
        "of_hugging_face": _median(pairs, "of_hugging_face"),
        "build_seconds": stepper.build_seconds,
        "compile_seconds": stepper.compile_seconds,
        "first_step_seconds": first,
        "pairs": pairs,
    }


def trainer(config: Config, ours: Mapping[str, Any]) -> hugging_face.TorchTrainer:
    """Makes a training of `transformers` and takes its first step, which must be ours.

    Args:
      ours: metrics of our first step.
    """
    made = hugging_face.TorchTrainer(config, batch(config), first_hyper(config).learning_rate)
    for name, theirs in made.step().items():
        if abs(theirs - ours[name]) > TOLERANCES[name] * abs(theirs):
            raise ValueError(
                f"the first step of transformers has {name} {theirs:.7g}, and ours "
                f"{ours[name]:.7g}: they do not train the same model"
            )
    return made


def _pair(tokens: int, ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Row of table `pairs` from the seconds of each step of a round."""
    mine, other = (tokens / float(np.median(seconds)) for seconds in (ours, theirs))
    return {"ours": mine, "hugging_face": other, "of_hugging_face": mine / other}


def _median(rows: list[dict[str, float]], name: str) -> float | None:
    return float(np.median([row[name] for row in rows])) if rows else None
