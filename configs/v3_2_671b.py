"""DeepSeek-V3.2-Exp: V3 with a lightning indexer, in its sparse training (section 2.1.1).

Sections and equations are those of the DeepSeek-V3.2-Exp report. The model is V3's, with the context of
128K tokens that V3.1-Terminus has, from which it is trained on: 15,000 steps of 480 sequences of 128K
tokens, 943.7B tokens, at one learning rate. The layout is that of `v3_671b_128k.py`; the published one
is unknown. `v3_2_671b_warm_up.py` is the phase before, which trains the indexers alone.
"""

from ml_collections import ConfigDict

from configs import v3_671b_32k, v3_671b_128k


def get_config() -> ConfigDict:
    """Config of the sparse training of V3.2."""
    config = v3_671b_128k.get_config()
    config.model.update(
        index_heads=64,  # released config.json: index_n_heads
        index_width=128,  # released config.json: index_head_dim
        index_top_k=2048,  # section 2.1.1: positions selected for each query
    )
    v3_671b_32k.phase(config, length=131_072, sequences=480, steps=15_000)  # section 2.1.1
    config.schedule.update(
        index_phase="sparse",  # equation 4
        index_weight=1.0,  # not published; no other loss moves the indexers
    )
    return config
