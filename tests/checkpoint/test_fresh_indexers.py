"""V3's weights with new indexers: the model that V3.2's warm-up begins with."""

import json

import numpy as np
import small
from equations import checkpoints

import deepseek_jax
from deepseek_jax.checkpoint import conversion
from deepseek_jax.checkpoint.load import open_checkpoint

SHARD = 300_000  # bytes


def test_a_recipe_with_indexers_adds_them_to_v3(tmp_path):
    """Random ones; up to index_top_k tokens the model is the same to the bit."""
    found, weights = checkpoints.make("mtp")
    checkpoints.write(tmp_path / "in", found, weights)
    base = small.config(**small.indexer(40, index_phase="warm_up"))
    config = conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", base)
    assert config.model.index_top_k == 40 and config.schedule.index_phase == "warm_up"
    v3, v3_2 = (deepseek_jax.load(tmp_path / name) for name in ("in", "run"))
    tokens = checkpoints.tokens(found)
    np.testing.assert_array_equal(v3(tokens[:, :40]).logits, v3_2(tokens[:, :40]).logits)
    assert not np.array_equal(v3(tokens).logits, v3_2(tokens).logits)
    own = v3_2.weights.moe_layers.attention.indexer
    query = np.asarray(own.query_up[...])
    assert abs(query.std() / config.model.init_std - 1) < 0.1 and (query[0] != query[1]).all()
    assert (own.key_norm.scale[...] == 1).all() and not own.key_norm.bias[...].any()
    conversion.to_published(open_checkpoint(tmp_path / "run"), tmp_path / "out", "float32", SHARD)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["model_type"] == "deepseek_v32" and settings["index_topk"] == 40
