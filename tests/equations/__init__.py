"""The DeepSeek-V3 report in NumPy float64, one line per equation, for tests to compare with.

Nothing here knows the package under test. Two plain dictionaries go in everywhere:

- settings: the keys of a published `config.json` (`hidden_size`, `q_lora_rank`, ...);
- weights: arrays under their published names, each of shape [out, in]. A function for one part
  takes the names below that part, which `norm.part` cuts out.

Letters: B batch, T position, D model width, H heads, N width of a head without position, R rotary
width, V width of a value (or the vocabulary, for logits), C key-value latent, E routed experts,
K experts per token, L layers. Numbers of equations are those of the report (arXiv 2412.19437).
"""
