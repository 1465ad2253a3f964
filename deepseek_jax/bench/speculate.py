"""Self-speculation on held-out text: acceptance, tokens per step and speed-up.

Trains the config's model with MTP depth 1 and 4 on its corpus, once: the runs stay in
`runs/speculate_DEPTH` and are read again. Prefixes of held-out documents are then continued one
request at a time, in turns by plain decoding and with drafts; medians are reported.

Greedy decoding of a small model soon repeats itself, and repetition is easy to draft: the rows at
temperature 1 are the significant ones.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.hf.safetensors import read_json
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import Config
from deepseek_jax.data import corpus, scoring
from deepseek_jax.serve import generation
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.requests import Request
from deepseek_jax.train import loop

GOALS = {1: 1.8, 4: 3.0}  # tokens per step, by depth
PROMPT, TOKENS = 64, 64


def measure(
    config: Config,
    *,
    folder: Path = Path("runs"),
    prompts: int = 16,
    tokens: int = TOKENS,
    rounds: int = 3,
) -> dict[str, Any]:
    """Measures the table `speculate`: a row for each depth, number of drafts and temperature.

    Args:
      config: Config of the runs.
      folder: Folder of the workdirs.
      prompts: Number of prompts.
      tokens: Tokens generated for each prompt.
      rounds: Runs over all prompts.
    """
    rows = []
    for depth in GOALS:
        workdir = folder / f"speculate_{depth}"
        own = _trained(config, depth, workdir)
        begin = _prefixes(own, prompts)
        for drafts in sorted({depth, 2}) if depth == 1 else (depth,):
            rows += _rows(own, workdir, depth, drafts, begin, tokens, rounds)
    return {"prompts": prompts, "prompt_tokens": PROMPT, "tokens": tokens, "speculate": rows}


def _trained(config: Config, depth: int, workdir: Path) -> Config:
    """Config of the run of this depth, which is trained to its end first if needed."""
    summary = workdir / "summary.json"
    if summary.is_file() and not read_json(summary)["stopped"]:
        run = open_checkpoint(workdir).run
        if run is not None and run.model.mtp_depth == depth:
            return run
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mtp_depth=depth),
        mesh=dataclasses.replace(config.mesh, pipe=1, replica=1, node=1, gpu=-1, tensor=1),
    )
    loop.train(config, workdir)
    return config


def _prefixes(config: Config, count: int) -> list[tuple[int, ...]]:
    """Prompts of PROMPT tokens from held-out text."""
    documents = corpus.prepare(config.data, vocab=config.model.vocab, say=lambda text: None)
    sizes = dict(count=count, length=PROMPT + TOKENS, tokens=config.evaluation.tokens)
    sequences = scoring.held_out_prompts(documents, **sizes)
    return [tuple(map(int, row[:PROMPT])) for row in sequences]


def _rows(
    config: Config,
    workdir: Path,
    depth: int,
    drafts: int,
    prompts: list[tuple[int, ...]],
    tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    checkpoint = open_checkpoint(workdir)
    servers = {
        number: generation.open_engine(
            checkpoint,
            config,
            mesh={},
            slots=1,
            length=PROMPT + tokens,
            cache="float32",
            stop=(),
            drafts=number,
            steps=32,
        )
        for number in (0, drafts)
    }
    rows = []
    for temperature in (0.0, 1.0):
        requests = [
            Request(prompt, tokens, temperature, seed=seed) for seed, prompt in enumerate(prompts)
        ]
        seconds: dict[int, list[float]] = {0: [], drafts: []}
        for server in servers.values():
            server.run(requests[:1])  # compile
            server.reset_counts()
        for _ in range(rounds):
            for number, server in servers.items():
                seconds[number].append(_decode_seconds(server, requests))
        told = generation.timing(servers[drafts].counts)
        plain, ours = (float(np.median(seconds[number])) for number in (0, drafts))
        made = len(requests) * (tokens - 1)
        rows.append(
            {
                "depth": depth,
                "drafts": drafts,
                "temperature": temperature,
                "acceptance": " ".join(f"{share:.2f}" for share in told["acceptance"]),
                "tokens_per_step": told["tokens_per_step"],
                "goal": GOALS[depth] if drafts == depth else None,
                "tokens_per_second": made / ours,
                "plain": made / plain,
                "speed_up": plain / ours,
            }
        )
    return rows


def _decode_seconds(server: Engine, requests: list[Request]) -> float:
    before = server.counts.decode_seconds
    server.run(requests)
    return server.counts.decode_seconds - before
