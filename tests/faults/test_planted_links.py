"""Links that somebody left in a workdir: what they lead to is never written."""

from types import SimpleNamespace

import pytest
import small
from reports import SUMMARY, run

from deepseek_jax.config import ConfigError
from deepseek_jax.data import tokenizer
from deepseek_jax.train import lock, workdir

NAMES = (
    "config.json", ".config.json.tmp", "tokenizer.json", ".tokenizer.json.tmp",
    "tokenizer_config.json", "metrics.jsonl", ".metrics.jsonl.tmp", "summary.json",
    ".summary.json.tmp", "loss.png", ".loss.png.tmp", "expert_load.png",
)  # fmt: skip


@pytest.mark.parametrize("content", ["precious\n", None], ids=["a file", "nothing yet"])
def test_what_a_run_writes(tmp_path, content):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    folder.mkdir()
    if content:
        victim.write_text(content)
    for name in NAMES:
        (folder / name).symlink_to(victim)
    words = tokenizer.make("byte", vocab=264, texts=())
    workdir.claim(folder, small.config(), SimpleNamespace(tokenizer=words))
    going = run(folder, [1, 2], screen=False)
    going.finish(SUMMARY)
    going.close()
    assert (victim.read_text() if victim.exists() else None) == content
    for name in ("config.json", "tokenizer.json", "metrics.jsonl", "summary.json", "loss.png"):
        assert (folder / name).stat().st_size and not (folder / name).is_symlink()


def test_the_lock_of_a_run(tmp_path):
    (tmp_path / "victim").write_text("precious\n")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=r"cannot be written"), lock.held(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "precious\n"
