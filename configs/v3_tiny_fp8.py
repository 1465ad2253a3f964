"""DeepSeek-V3 at laptop size in FP8: `v3_tiny` with the report's recipe (section 3.3).

Linear layers multiply E4M3 in tiles and blocks, tokens travel in FP8, moments are bfloat16.
"""

from ml_collections import ConfigDict

from configs import v3_tiny


def get_config() -> ConfigDict:
    """Config of a DeepSeek-V3 for a laptop, in FP8."""
    config = v3_tiny.get_config()
    config.precision.update(recipe="fp8", dispatch="fp8")
    return config
