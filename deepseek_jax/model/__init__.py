"""The model of section 2 of the DeepSeek-V3 report, one idea per file.

Letters, in einsums and comments of the whole package:
B sequence, S position, T key position, D model width, V vocabulary,
H head, Q query latent, C key-value latent, N non-rotary head width, R rotary head width,
W value width, E expert, G group, K chosen experts of a token, F feed-forward width,
L layer, M rows.
"""
