"""Second phase of the context extension: 1000 steps of 480 sequences of 128K tokens (section 4.3).

The phase continues from the first one, `v3_671b_32k.py`, with another length and batch. 480 sequences
do not divide among the 128 data ranks of that phase, nor among 64: here the 2,048 devices are 16
stages of 32 data ranks with 4 tensor ranks each, so that a node holds two experts' ranks of four.
The layout of this phase is not published, and none of this project fits 80 GB (docs/limits.md).
"""

from ml_collections import ConfigDict

from configs import v3_671b_32k


def get_config() -> ConfigDict:
    """Config of the second phase of the context extension."""
    config = v3_671b_32k.get_config()
    config.mesh.update(replica=8, node=2, gpu=2, tensor=4)
    v3_671b_32k.phase(config, length=131_072, sequences=480, steps=1000)
    return config
