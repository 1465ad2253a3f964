"""Starts runs of `tiny.py`, in this process or from the command line, and reads their output."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np

from deepseek_jax import config as configs
from deepseek_jax.config import Config

ROOT = Path(__file__).parents[1]
TINY = Path(__file__).with_name("tiny.py")


def tiny(text: Path, **sections: dict) -> Config:
    """The config of `tiny.py` over the text at `text`: `tiny(text, mesh={"gpu": 8})`."""
    config = runpy.run_path(str(TINY))["get_config"]()
    config.data.update(path=str(text), cache=str(text.parent / "cache"))
    for section, values in sections.items():
        config[section].update(values)
    return configs.parse(config)


def documents(folder: Path) -> Path:
    """A new folder of thirty documents, each of 120 words drawn from one sentence."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = "the loss of a token is what the next one costs when it surprises us".split()  # noqa: SIM905
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(" ".join(rng.choice(words, 120)))
    return folder


def arguments(config: Config, workdir: Path) -> list[str]:
    """Command-line arguments that run `config`."""
    out = [f"--config={TINY}", f"--workdir={workdir}"]
    for section, value in dataclasses.asdict(config).items():
        for key, setting in value.items() if isinstance(value, dict) else ():
            if key != "rules":
                out.append(f"--config.{section}.{key}={setting}")
    return out


def start(command: list[str], **variables: str) -> subprocess.Popen:
    """A command in a process of its own, with more variables in its environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_main(flags: list[str]) -> subprocess.Popen:
    return start([sys.executable, "-m", "deepseek_jax.main", *flags])


def rows(workdir: Path) -> list[dict]:
    """Complete rows of `metrics.jsonl`."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(workdir: Path) -> np.ndarray:
    """[steps, 3]: loss, MTP loss and gradient norm, after a check that no step is missing."""
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return np.array([[row["loss"], row["mtp_loss"], row["grad_norm"]] for row in found])


def checkpoints(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def bits(workdir: Path) -> dict[str, list]:
    """Type and sum of bits of every array of the newest checkpoint, from its own record."""
    from orbax.checkpoint import v1 as ocp

    newest = workdir / "checkpoints" / str(checkpoints(workdir)[-1])
    return ocp.metadata(newest).custom_metadata["leaves"]
