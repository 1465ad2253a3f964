"""`bench cache_formats`: rows of a small model with an indexer, whose keys are cached, too."""

from equations import checkpoints

from deepseek_jax.bench import cache_formats


def test_narrower_formats_err_more(tmp_path):
    one = dict(num_hidden_layers=1, num_nextn_predict_layers=0)  # a dense layer
    checkpoints.write(tmp_path, *checkpoints.make("v32", **one))
    found = cache_formats.measure(None, directory=tmp_path, texts=2, prompt=16, tokens=16)
    rows = {(row["weights"], row["cache"]): row for row in found["cache_formats"]}
    for weights in ("trained", "random"):
        exact, half, narrow = (rows[weights, form] for form in ("float32", "bfloat16", "fp8"))
        assert exact["logits_error"] == exact["divergence_nats"] == exact["loss_change_nats"] == 0
        assert exact["same_first_choice"] == exact["greedy_tokens_equal"] == 1
        assert 0 < half["logits_error"] < 0.01 < narrow["logits_error"] < 0.2
        assert 0 < half["divergence_nats"] < narrow["divergence_nats"]
        assert narrow["bytes_per_token"] < half["bytes_per_token"] < exact["bytes_per_token"]
