"""DeepSeek-V3 16B for one node of eight GPUs: V2-Lite's shape, V3's gate and one MTP module.

The gate is V3's: sigmoid, normalised, balanced by biases. There is one group of experts, as in
V2-Lite, so routing is not node-limited. The small ablation model of the report (section 4.5: 15.7B
parameters, 2.4B activated, sigmoid gate, normalised top-k) has this form; its exact sizes are not
published. Experts are split over the eight GPUs, all other weights by ZeRO-3. The 1.33T tokens are
those of the ablation (table 4).
"""

from ml_collections import ConfigDict

from configs import v2_lite_16b, v3_671b


def get_config() -> ConfigDict:
    """Config of a 16B DeepSeek-V3."""
    config, published = v2_lite_16b.get_config(), v3_671b.get_config()
    for key in ("score", "normalise_weights", "mtp_depth", "yarn_mscale", "yarn_mscale_all_dim"):
        config.model[key] = published.model[key]
    config.model.routed_scale = 2.446  # Moonlight's, for the same 64 experts and top-6
    config.schedule = published.schedule
    v3_671b.scale_schedule(config, tokens=1_330 * v3_671b.BILLION)
    config.schedule.update(
        learning_rate=4.2e-4, decayed_learning_rate=4.2e-5, final_learning_rate=1.4e-5
    )
    config.layout.zero = 3
    return config
