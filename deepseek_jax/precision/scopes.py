"""Names under which profiles and compiled programs show the three products of an FP8 layer."""

FORWARD = "fp8_forward"
INPUT_GRADIENT = "fp8_input_gradient"
WEIGHT_GRADIENT = "fp8_weight_gradient"
PRODUCTS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
