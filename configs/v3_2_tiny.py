"""DeepSeek-V3.2 at laptop size: `v3_tiny` with a lightning indexer, trained from random weights.

V3.2 trains its indexers after pre-training, alone at first (`v3_2_671b_warm_up.py`); here everything is
trained from the start, with attention to the 32 positions of 128 that the indexer selects. At this
learning rate many index scores of the second layer are 0 for a while; docs/one_node.md has the commands
of V3.2's own order, and docs/limits.md figures of both.
"""

from ml_collections import ConfigDict

from configs import v3_tiny


def get_config() -> ConfigDict:
    """Config of a DeepSeek-V3.2 for a laptop."""
    config = v3_tiny.get_config()
    config.model.update(index_heads=8, index_width=32, index_top_k=32)
    return config
