"""Dense warm-up of V3.2's lightning indexers: everything else is frozen (section 2.1.1, equation 3).

1000 steps of 16 sequences of 128K tokens, 2.1B tokens, at a learning rate of 1e-3: section 2.1.1 of the
DeepSeek-V3.2-Exp report. The weights are those of V3.1-Terminus. The layout is ours: 16 stages of 16
data ranks with 8 tensor ranks each, so that 16 sequences divide among the data ranks.
"""

from ml_collections import ConfigDict

from configs import v3_2_671b, v3_671b_32k


def get_config() -> ConfigDict:
    """Config of the dense warm-up of V3.2."""
    config = v3_2_671b.get_config()
    config.mesh.update(replica=1, node=2, gpu=8, tensor=8)
    v3_671b_32k.phase(config, length=131_072, sequences=16, steps=1000)
    config.schedule.update(
        index_phase="warm_up", learning_rate=1e-3, decayed_learning_rate=1e-3,
        final_learning_rate=1e-3,
    )  # fmt: skip
    return config
