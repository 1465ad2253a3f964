"""`bench indexer`: its rows, and the counted work of V3.2 by hand."""

import pytest
import small

from configs import v3_2_671b
from deepseek_jax import config as configs
from deepseek_jax.bench import indexer


def test_rows():
    sizes = dict(d_model=32, heads=2, q_latent=16, kv_latent=16, d_nope=8, d_rope=4, d_value=8)
    sizes |= dict(index_heads=2, index_width=8, index_top_k=16)
    found = indexer.measure(small.config(), lengths=(16, 48), rounds=1, **sizes)
    for name in ("attention", "v3_2"):
        assert [row["cache_length"] for row in found[name]] == [16, 48]
    for row in found["attention"]:
        assert row["sparse_of_dense"] == row["sparse_ms"] / row["dense_ms"] > 0
    assert found["v3_2"][0]["sparse_of_dense"] == 1  # attends to all, and scores none


def test_work_of_v3_2_at_128k():
    model = configs.parse(v3_2_671b.get_config()).model
    row = indexer.counted(model, 131_072)
    dense, sparse = 131_072 * 128 * (2 * 512 + 64), 2048 * 128 * (2 * 512 + 64) + 131_072 * 64 * 128
    assert row["dense_gflop"] == pytest.approx(2 * 61 * dense / 1e9)
    assert row["sparse_of_dense"] == pytest.approx(sparse / dense)
    cached = (2048 * 576 + 131_072 * 128) / (131_072 * 576)
    assert row["sparse_of_dense_bytes"] == pytest.approx(cached)
