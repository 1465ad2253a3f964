"""State of a run for Prometheus, as a text file for the collector of its node exporter."""

from pathlib import Path
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import reason
from deepseek_jax.train.metrics import Row

PREFIX = "deepseek_jax_"
ALIVE = ("starting", "training")

# Name of a gauge -> its help; values of `run_files.status` under the same name.
GAUGES = {
    "step": "Optimiser steps taken",
    "tokens": "Tokens consumed",
    "total_tokens": "Tokens at the end of the run",
    "seconds_left": "Time left at the present speed",
    "loss": "Cross entropy of the next token in the last row, nats per token",
    "grad_norm": "Gradient norm before clipping in the last row",
    "learning_rate": "Learning rate in the last row",
    "tokens_per_second": "Tokens per second of all devices",
    "step_seconds": "Wall time of a step",
    "mfu": "Model FLOPs utilisation, a share",
    "idle_share": "Share of time without a step in flight",
    "max_violation": "MaxVio: load of the busiest expert over the mean, minus 1",
    "idle_experts": "Experts below a tenth of the mean load",
    "row_age_seconds": "Seconds since the last row of metrics",
    "restarts": "Starts of the run after the first",
    "skipped_steps": "Steps whose update was left out",
    "rewinds": "Times that the run has gone back to a checkpoint",
    "anomalies": "Steps that were not finite, or spikes",
}


def values(found: Row) -> dict[str, tuple[str, float]]:
    """(help, value) of each gauge that is known."""
    out = {
        name: (text, float(found[name]))
        for name, text in GAUGES.items()
        if found.get(name) is not None
    }
    kept, processes = found["checkpoint"], found["processes"]
    more = {
        "running": ("Whether the run gives signs of life", float(found["state"] in ALIVE)),
        "checkpoint_step": ("Step of the newest checkpoint", kept["step"]),
        "checkpoint_age_seconds": ("Seconds since that checkpoint", kept["age_seconds"]),
        "processes_seen": ("Processes that tell of their progress", processes["seen"]),
    }
    if last := processes["slowest"]:
        more["slowest_step"] = ("Step of the process that is furthest behind", last["step"])
        more["slowest_seconds"] = ("Seconds since that process made progress", last["seconds"])
    return out | {
        name: (text, float(value)) for name, (text, value) in more.items() if value is not None
    }


def write(found: Row, file: Path) -> None:
    """Writes the gauges to `file`, which appears whole or not at all.

    Raises:
      ConfigError: `prometheus-client` is not installed, or the file cannot be written.
    """
    try:
        import prometheus_client as client
    except ImportError as error:
        raise ConfigError(
            "--prometheus needs prometheus-client: pip install 'deepseek_jax[prometheus]'"
        ) from error
    registry: Any = client.CollectorRegistry()
    for name, (text, value) in values(found).items():
        gauge = client.Gauge(PREFIX + name, text, ["workdir"], registry=registry)
        gauge.labels(found["workdir"]).set(value)
    try:
        client.write_to_textfile(str(file), registry)
    except OSError as error:
        raise ConfigError(f"--prometheus={file} cannot be written ({reason(error)})") from error
