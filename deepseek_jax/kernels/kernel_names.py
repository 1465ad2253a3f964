"""Names of the kernels that a run may choose one by one."""

PRODUCT = "fp8_product"
OUTER = "fp8_outer"
QUANTISE = "fp8_quantise"
ATTENTION = "attention"
ATTENTION_PADDED = "attention_padded"  # where cuDNN refuses values narrower than keys
LATENT_ATTENTION = "latent_attention"
ALL = (PRODUCT, OUTER, QUANTISE, ATTENTION, ATTENTION_PADDED, LATENT_ATTENTION)
