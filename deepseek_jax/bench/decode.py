"""Decoding: tokens per second beside Hugging Face, and time per token as the cache grows.

The model is that of `bench train`, 10.8 million random parameters in float32. If torch and
transformers are installed, it is exported and loaded by `transformers` in the same run. Both decode
the same prompts greedily, on the GPU if JAX has one; times are those of the whole generation.

Attention of one layer is timed alone, over caches of growing length: absorbed, over the latents,
and expanded, over keys and values of every head.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.bench import hugging_face
from deepseek_jax.bench.train import sized
from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.model import execution, rotary
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mla import LatentAttention
from deepseek_jax.model.transformer import Transformer, build_model
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.plan.kv_cache import cache_bytes_per_token
from deepseek_jax.precision.einsum import exact_einsum
from deepseek_jax.serve import latent_cache
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.requests import Request

PROMPT, TOKENS = 32, 128
LENGTHS = (256, 1024, 4096, 16384)


def measure(
    config: Config, *, tokens: int = TOKENS, rounds: int = 3, lengths: tuple[int, ...] = LENGTHS
) -> dict[str, Any]:
    """Measures the tables `decode`, `attention` and `cache`.

    Args:
      config: Recipe; its own model is used in `cache` only.
      tokens: Tokens generated for each prompt.
      rounds: Runs of each, in turns; medians are reported, as the machine may be shared.
      lengths: Lengths of the caches.
    """
    small = sized(config)
    model = jax.jit(build_model, static_argnums=0)(small.model, jax.random.key(0))
    theirs = _hugging_face(model)
    return {
        "goal_of_hugging_face": 5.0,
        "decode": [_row(small, model, theirs, batch, tokens, rounds) for batch in (1, 8)],
        "attention": [_attention_row(small.model, length, rounds) for length in lengths],
        "cache": _cache_rows(config.model),
    }


def _row(
    config: Config, model: Transformer, theirs: Any, batch: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Row of table `decode` for one batch size."""
    prompts = np.random.default_rng(0).integers(0, config.model.vocab, (batch, PROMPT))
    mesh, layout = meshes.build(config.mesh, jax.devices()[:1]), meshes.layout(config)
    server = Engine(
        model,
        execution.of(config),
        layout,
        mesh,
        slots=batch,
        length=PROMPT + tokens,
        cache="float32",
        steps=32,
    )
    requests = [Request(tuple(map(int, prompt)), tokens) for prompt in prompts]
    both = {"ours": lambda: server.run(requests)}
    if theirs is not None:
        both["hugging_face"] = lambda: theirs(prompts, tokens)
    made = {name: run() for name, run in both.items()}  # compile
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(rounds):
        for name, run in both.items():
            seconds[name].append(_seconds(run))
    rate = {name: batch * tokens / float(np.median(s)) for name, s in seconds.items()}
    known = "hugging_face" in rate
    return {
        "batch": batch,
        "tokens_per_second": rate["ours"],
        "hugging_face": rate.get("hugging_face"),
        "of_hugging_face": rate["ours"] / rate["hugging_face"] if known else None,
        "same_tokens": float(np.mean(np.equal(*map(np.array, made.values())))) if known else None,
    }


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _hugging_face(model: Transformer) -> Callable[[np.ndarray, int], Any] | None:
    """Greedy decoding of `transformers` with these weights; None if it is not installed."""
    if not hugging_face.installed():
        return None
    import torch

    loaded, device = hugging_face.load(model).eval(), hugging_face.device()

    def generate(prompts: np.ndarray, tokens: int) -> Any:
        with torch.inference_mode():
            made = loaded.generate(
                torch.tensor(prompts, device=device),
                attention_mask=torch.ones(prompts.shape, dtype=torch.int64, device=device),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return made[:, prompts.shape[1] :].tolist()

    return generate


def _attention_row(config: ModelConfig, length: int, rounds: int, batch: int = 8) -> dict[str, Any]:
    """Row of table `attention`: one token of each request, whose cache is otherwise full."""
    attention = LatentAttention(config, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (batch, 1, config.d_model))
    positions = jnp.full((batch, 1), length - 1)
    layer = dataclasses.replace(config, layers=1, dense_layers=0)
    latents = latent_cache.make(layer, batch, length, "float32", mtp=False).moe
    expanded = _Expanded.empty(config, batch, length)

    def absorbed(attention, past, x):
        return attention.decode(x, Execution(), past, 0, positions)

    def over_heads(attention, past, x):
        return past.decode(attention, x, positions)

    timed = [_Timed(absorbed, attention, latents, x), _Timed(over_heads, attention, expanded, x)]
    seconds = np.array([[one.run() for one in timed] for _ in range(rounds)])
    latent, heads = map(float, np.median(seconds, axis=0))
    return {
        "cache_length": length,
        "latent_us_per_token": 1e6 * latent / batch,
        "expanded_us_per_token": 1e6 * heads / batch,
        "expanded_of_latent": heads / latent,
    }


class _Timed:
    """Jitted function that updates its cache in place, call by call."""

    def __init__(self, fn: Any, attention: LatentAttention, past: Any, x: jax.Array):
        self._step = functools.partial(jax.jit(fn, donate_argnums=1), attention)
        self._past, self._x = past, x
        self.run(1)

    def run(self, calls: int = 20) -> float:
        """Mean seconds of a call."""
        begin = time.perf_counter()
        for _ in range(calls):
            out, self._past = self._step(self._past, self._x)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / calls


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Expanded:
    """Cache of expanded attention: BTHX keys and BTHW values of every head, X = N + R."""

    key: jax.Array
    value: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int) -> "_Expanded":
        shape = (batch, length, config.heads)
        key = jnp.zeros((*shape, config.d_nope + config.d_rope))
        return cls(key, jnp.zeros((*shape, config.d_value)))

    def decode(
        self, attention: LatentAttention, x: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, "_Expanded"]:
        config, how = attention.config, Execution()
        cos, sin = rotary.cos_sin(config, positions, still=config.d_nope)
        query = attention._query(x, attention._query_latent(x, how), how)
        query = rotary.rotate(query, cos[:, :, None], sin[:, :, None])
        latent, rope = attention.latent(x, how)
        both = exact_einsum("BSC,CHX->BSHX", attention.kv_norm(latent), attention.kv_up[...])
        nope, value = jnp.split(both, [config.d_nope], axis=-1)
        rope = rotary.rotate(rope, cos[..., config.d_nope :], sin[..., config.d_nope :])
        rope = jnp.broadcast_to(rope[:, :, None], (*nope.shape[:-1], config.d_rope))
        request = jnp.arange(x.shape[0])[:, None]
        past = _Expanded(
            self.key.at[request, positions].set(jnp.concatenate([nope, rope], axis=-1)),
            self.value.at[request, positions].set(value),
        )
        scores = exact_einsum("BSHX,BTHX->BHST", query, past.key) * rotary.softmax_scale(config)
        seen = positions[:, :, None] >= jnp.arange(self.key.shape[1])[None, None]
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        mixed = exact_einsum("BHST,BTHW->BSHW", weights, past.value)
        return exact_einsum("BSHW,HWD->BSD", mixed, attention.out[...]), past


def _cache_rows(config: ModelConfig) -> list[dict[str, Any]]:
    """Cache bytes of one token of the config's own model, by format."""
    plain = cache_bytes_per_token(config)
    rows = {
        f"latent, {form}": latent_cache.bytes_per_token(config, form)
        for form in latent_cache.FORMATS
    }
    rows |= {f"{plain.gqa_heads} groups, bfloat16": plain.gqa, "every head, bfloat16": plain.mha}
    return [{"cache": name, "bytes_per_token": size} for name, size in rows.items()]
