"""Continued training: a run that starts from a published checkpoint."""

import numpy as np
import runs
from equations import checkpoints

import deepseek_jax
from deepseek_jax.checkpoint import conversion
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.data import tokenizer
from deepseek_jax.data.loader import TrainData
from deepseek_jax.train import loop


def test_a_run_starts_from_published_weights(text, tmp_path, one_device):
    """The first loss equals that of the checkpoint on the same sequences."""
    settings, weights = checkpoints.make("v3")
    settings |= {"vocab_size": 264, "num_hidden_layers": 2}
    shapes = dict(checkpoints.shapes(settings))
    table = np.random.default_rng(0).standard_normal((264, 48)).astype(np.float32)
    weights |= {"lm_head.weight": table / 7, "model.embed_tokens.weight": table}
    checkpoints.write(tmp_path / "in", settings, {name: weights[name] for name in shapes})
    tokenizer.make("byte", vocab=264, texts=()).save(tmp_path / "in" / "tokenizer.json")
    schedule = dict(
        tokens=256, warmup_steps=0, decay_start=256, decay_end=256, final_start=256, bias_stop=256
    )
    base = runs.tiny(text, schedule=schedule, evaluation={"tokens": 0})
    config = conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", base)
    loop.train(config, tmp_path / "run", screen=False)
    data = TrainData(
        config.data,
        vocab=config.model.vocab,
        length=config.batch.length,
        micro_sequences=config.batch.micro_sequences,
        seed=config.seed,
        process_index=0,
        process_count=1,
    )
    want = float(deepseek_jax.load(tmp_path / "in").loss(next(data)))
    data.close()
    [row] = runs.rows(tmp_path / "run")
    assert abs(row["loss"] - want) < 1e-4 * want
    assert runs.checkpoints(tmp_path / "run") == [0, 1]
