"""V3's shape at a hundredth, for plans; no search of it tries a policy that needs a trace."""

import dataclasses

from all_configs import load


def with_(config, **sections):
    """The config with other values of keys, by section."""
    for name, keys in sections.items():
        part = dataclasses.replace(getattr(config, name), **keys)
        config = dataclasses.replace(config, **{name: part})
    return config


SMALL = with_(
    load("v3_671b"),
    model=dict(
        layers=8, dense_layers=1, d_model=1024, d_dense=2048, heads=8, vocab=4096, experts=32,
        d_expert=512, q_latent=256, kv_latent=128,
    ),
    mesh=dict(pipe=4, replica=1, node=1, gpu=4),
    batch=dict(sequences=512, ramp_sequences=512, micro_sequences=16),
)  # fmt: skip
