"""DeepSeek-V3 16B in FP8 for one node of eight GPUs: `v3_16b` with the report's recipe.

Linear layers multiply E4M3 in tiles and blocks (section 3.3), tokens travel in FP8, and backward
recomputes what the report does (section 3.2.3). The report compares FP8 with BF16 on a model of
about this size (appendix B.1).
"""

from ml_collections import ConfigDict

from configs import v3_16b


def get_config() -> ConfigDict:
    """Config of a 16B DeepSeek-V3 in FP8."""
    config = v3_16b.get_config()
    config.precision.update(recipe="fp8", dispatch="fp8")
    config.layout.recompute = "report"
    return config
