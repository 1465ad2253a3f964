"""Lines and fields that `generate` adds to a text: how it was sampled, and why it ended."""

import json

import serving

from deepseek_jax.serve.sampling_choice import FILE


def test_the_command_tells_how_it_samples_and_why_texts_end(typed, tmp_path):
    folder = serving.fill(tmp_path)
    (folder / FILE).write_text('{"do_sample": true, "temperature": 0.25}')
    flags = (f"--checkpoint={folder}", "--max_tokens=2", "--config=configs/v3_tiny.py")
    flags += ("--config.layout.unroll=1",)  # quick to compile
    code, out, err = typed("generate", *flags, "--prompt=ab", "--seed=7")
    assert code == 0 and out.startswith("ab")
    first, last = err.splitlines()
    assert first.startswith(f"temperature 0.25 ({FILE}), top_p 0.9 (default), seed 7; ")
    assert last.startswith("--max_tokens=2 cut the text off")
    code, out, err = typed("generate", *flags, "--prompt=ab", "--temperature=0", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["sampling"]["temperature"] == 0
    assert found["sampling"]["temperature_from"] == "flag"
    assert [one["finish_reason"] for one in found["requests"]] == ["length"]


def test_a_text_that_ends_with_a_stop_token_is_not_cut(typed, tmp_path):
    folder = serving.fill(tmp_path)
    flags = (f"--checkpoint={folder}", "--prompt=ab", "--config=configs/v3_tiny.py", "--json")
    flags += ("--config.layout.unroll=1", "--temperature=0", "--max_tokens=2")
    first = json.loads(typed("generate", *flags)[1])["requests"][0]["tokens"][0]
    (folder / FILE).write_text(json.dumps({"eos_token_id": first}))
    found = json.loads(typed("generate", *flags)[1])["requests"][0]
    assert (found["tokens"], found["finish_reason"]) == ([first], "stop")
