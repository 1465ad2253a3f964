"""`v3_small` with V3's latent of 512 + 64 and its widths per head, for GPU engines that serve it.

Their kernels for latent attention are written for these widths (docs/serving.md). The number of
heads, 16, is ours: that of V2-Lite. The rest is `v3_small`.
"""

from ml_collections import ConfigDict

from configs import v3_small


def get_config() -> ConfigDict:
    """Config of a small DeepSeek-V3 that GPU engines serve."""
    config = v3_small.get_config()
    config.model.update(heads=16, kv_latent=512, d_nope=128, d_rope=64, d_value=128)
    return config
