"""A training run from top to bottom, and the only place with side effects.

The order of one turn, everywhere: data, step, check, log, save, stop.
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from deepseek_jax import config as configs
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import Config
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.loader import TrainData
from deepseek_jax.data.scoring import held_out
from deepseek_jax.hardware import xla_options
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.pipeline import stage_assignment
from deepseek_jax.runtime import processes
from deepseek_jax.train import evaluation, optimizer, state, token_schedule, workdir
from deepseek_jax.train.report import Report
from deepseek_jax.train.step import make_ema, make_step, tokens_spec


class NotFinite(RuntimeError):
    """The loss or the gradients stopped being numbers; the message names the last good step."""


def train(config: Config, directory: Path, *, screen: bool = True) -> dict[str, Any]:
    """Trains until `schedule.tokens` are consumed, from `directory`'s newest checkpoint if any.

    Returns:
      The summary that the screen ends with: step, tokens, held-out bits per byte and gzip's; or
      step, tokens and `stopped` where a signal ended the run early.

    Raises:
      ConfigError: before anything is compiled or written.
      NotFinite: a loss or gradient norm is NaN or infinite.
    """
    config = check_devices(config)
    workdir.check(directory, config)
    primary = processes.is_primary()
    tokens = config.schedule.tokens
    report = Report(directory, total_tokens=tokens, screen=screen, primary=primary)
    with contextlib.closing(report):
        mesh, layout = meshes.build(config.mesh), meshes.layout(config)
        place = NamedSharding(mesh, tokens_spec(layout))
        row, readers = _rows(place, config)
        data = TrainData(
            config.data,
            vocab=config.model.vocab,
            length=config.batch.length,
            micro_sequences=config.batch.micro_sequences,
            seed=config.seed,
            process_index=row,
            process_count=readers,
            say=report.say,
        )
        store = Store(directory / "checkpoints", keep=config.checkpoint.keep)
        with contextlib.closing(data), contextlib.closing(store), jax.set_mesh(mesh):
            summary, now = _run(config, directory, layout, mesh, data, store, report)
            if not summary["stopped"]:
                report.say("scoring held-out text")
                summary |= _held_out(config, layout, mesh, now, data.corpus)
        if summary["stopped"]:
            report.say(f"stopped after step {summary['step']}; the same command goes on from there")
        else:
            report.finish(summary)
    return summary


def _run(
    config, directory, layout, mesh, data, store, report
) -> tuple[dict[str, Any], state.TrainState]:
    """From the newest checkpoint to the last step."""
    adam = optimizer.build(config.optimizer)
    places = state.shardings(config, layout, mesh, adam)
    now, tokens = _start(config, places, adam, store, data, report)
    workdir.claim(directory, config, data.corpus)  # what was there fits: the folder is this run's
    step = jax.jit(
        make_step(config, layout, mesh, adam),
        donate_argnums=0,
        out_shardings=(dataclasses.replace(places, ema=None), None),
    )
    move_ema = make_ema(config, places)
    all_finite = jax.jit(_all_finite)
    place = NamedSharding(mesh, tokens_spec(layout))
    options = xla_options.options(jax.default_backend(), config.layout.cost_profile)
    done = saved = int(now.step)
    stop = processes.StopSignal()
    stop.install()
    report.begin(done, tokens)
    report.say(_headline(config, data))

    compiled, logged_at, logged_tokens, stopped = None, time.perf_counter(), tokens, False
    while tokens < config.schedule.tokens and not stopped:
        count = token_schedule.micro_batches(config.batch, tokens)
        hyper = token_schedule.hyper(config.schedule, step=done, tokens=tokens)
        inputs = (
            dataclasses.replace(now, ema=None),
            _batch(data, config, place, count),
            np.int32(count),
            jax.tree.map(np.float32, hyper),
        )
        if compiled is None:
            report.say("compiling the training step")
            compiled = step.lower(*inputs).compile(compiler_options=options)
            logged_at = time.perf_counter()  # the speed of a step is without its compilation
        moved, metrics = compiled(*inputs)
        del inputs  # the state in it was donated
        ema = None if now.ema is None else move_ema(now.ema, moved.params)
        now = dataclasses.replace(moved, ema=ema)
        done, tokens = (
            done + 1,
            tokens + count * token_schedule.tokens_per_micro_batch(config.batch),
        )

        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        _check_finite(values, done, saved)
        stopped = stop.reached(done)
        last = stopped or tokens >= config.schedule.tokens
        if done == 1 or done % config.log.every_steps == 0 or last:
            speed = (tokens - logged_tokens) / (time.perf_counter() - logged_at)
            violations = values.pop("max_violation")
            report.step(
                {
                    "step": done,
                    "tokens": tokens,
                    **values,
                    "max_violation": max(violations, default=0.0),
                    "layer_max_violation": violations,
                    **dataclasses.asdict(hyper),
                    "sequences": count * config.batch.micro_sequences,
                    "tokens_per_second": speed,
                }
            )
            logged_at, logged_tokens = time.perf_counter(), tokens
        if done % config.checkpoint.every_steps == 0 or last:
            # This step's loss is of the weights before it: its own are in no metric yet.
            if not all_finite(now.params, now.bias):
                raise NotFinite(_not_finite(f"step {done} made weights that are no numbers", saved))
            store.save(done, state.to_dict(now), {"tokens": tokens, "data": data.state()})
            saved = done
    store.wait()
    stopped = stopped and tokens < config.schedule.tokens
    return {"step": done, "tokens": tokens, "stopped": stopped}, now


def check_devices(config: Config) -> Config:
    """The config with its mesh filled in and checked against the devices there are."""
    mesh = meshes.resolve(config.mesh, jax.device_count())
    config = dataclasses.replace(config, mesh=mesh)
    configs.check(config)
    if mesh.pipe > 1:
        stage_assignment.assign_layers(config)
    xla_options.options(jax.default_backend(), config.layout.cost_profile)
    return config


def _start(config, places, adam, store, data, report) -> tuple[state.TrainState, int]:
    """The newest checkpoint, which may be of weights alone, or a fresh start."""
    abstract = state.abstract(config, places, adam)

    def held(meta):
        alone = meta.get("weights_only")
        return state.weights_only(abstract) if alone else state.to_dict(abstract)

    restored = store.restore(held)
    if restored is None:
        return state.initialise(config, places, adam), 0
    step, values, meta = restored
    if meta.get("weights_only"):
        report.say("starting from the weights of another checkpoint")
        return state.begin(config, abstract, adam, values), 0
    data.restore(meta["data"])
    report.say(f"resumed from step {step}, {meta['tokens']:,} tokens in")
    return state.from_dict(abstract, values), int(meta["tokens"])


def _rows(place: NamedSharding, config: Config) -> tuple[int, int]:
    """Which equal run of each micro-batch's rows this process reads, and how many there are."""
    rows = config.batch.micro_sequences
    first, end = _span(place, (1, rows, 1))
    return first // (end - first), rows // (end - first)


def _span(place: NamedSharding, shape: tuple[int, int, int]) -> tuple[int, int]:
    """First and last + 1 of the rows that this process's devices hold."""
    held: Any = place.addressable_devices_indices_map(shape).values()
    spans = [index[1].indices(shape[1])[:2] for index in held]
    return min(span[0] for span in spans), max(span[1] for span in spans)


def _batch(data: TrainData, config: Config, place: NamedSharding, count: int) -> jax.Array:
    """The next `count` micro-batches as one global array, as long as the longest step needs."""
    most = token_schedule.most_micro_batches(config.batch)
    local = np.stack([next(data) for _ in range(count)])
    local = np.pad(local, ((0, most - count), (0, 0), (0, 0)))
    shape = (most, config.batch.micro_sequences, config.batch.length + 1)
    first, _ = _span(place, shape)

    def part(index):
        start, end, _ = index[1].indices(shape[1])
        return local[:, start - first : end - first]

    return jax.make_array_from_callback(shape, place, part)


def _check_finite(values: dict[str, Any], step: int, saved: int) -> None:
    loss, norm = values["loss"], values["grad_norm"]
    if not np.isfinite([loss, norm]).all():
        raise NotFinite(_not_finite(f"step {step} has loss {loss}, gradient norm {norm}", saved))


def _not_finite(what: str, saved: int) -> str:
    good = f"the last good checkpoint is step {saved}" if saved else "there is no checkpoint yet"
    return f"{what}; {good}. Lower schedule.learning_rate, or look at the data of this step"


def _all_finite(*trees: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trees)]).all()


def _held_out(config, layout, mesh, now: state.TrainState, corpus: Corpus) -> dict[str, Any]:
    """Bits per byte of the weights, and of their average, on text that training never saw."""
    if not config.evaluation.tokens:
        return {}
    text = held_out(corpus, length=config.batch.length, tokens=config.evaluation.tokens)
    score = evaluation.make_score(config, layout, mesh)
    scored = score(now.params, now.bias, text.sequences, text.valid)
    out = {
        "held_out_loss": scored.nats / scored.targets,
        "held_out_bits_per_byte": scored.bits_per_byte(text.bytes),
        "gzip_bits_per_byte": 8 * text.gzip_bytes / text.bytes,
        "held_out_bytes": text.bytes,
    }
    if now.ema is not None:
        on_device = jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), now.ema)
        average = jax.device_put(now.ema, on_device)
        scored = score(average, now.bias, text.sequences, text.valid)
        out["ema_bits_per_byte"] = scored.bits_per_byte(text.bytes)
    return out


def _headline(config: Config, data: TrainData) -> str:
    mesh = ", ".join(f"{name} {n}" for name, n in dataclasses.asdict(config.mesh).items() if n > 1)
    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    return f"{devices}{': ' + mesh if mesh else ''}; {data.facts.tokens:,} tokens of text"
