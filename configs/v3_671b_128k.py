"""Second phase of the context extension: 1000 steps of 480 sequences of 128K tokens (section 4.3).

It continues from the first, `v3_671b_32k.py`, and changes length and batch only. 480 sequences do
not divide among that phase's 128 data ranks, nor among 64: here the 2,048 devices are 16 stages of 32
data ranks with 4 tensor ranks each. The report does not publish the layout of this phase.
"""

from configs import v3_671b_32k


def get_config():
    config = v3_671b_32k.get_config()
    config.mesh.update(replica=1, node=4, tensor=4)
    v3_671b_32k.phase(config, length=131_072, sequences=480, steps=1000)
    return config
