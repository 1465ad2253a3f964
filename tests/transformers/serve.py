"""Exports, served by `transformers serve`: chats and completions over HTTP, answered as we answer.

    pip install -e ".[transformers]" && PYTHONPATH=tests:. python tests/transformers/serve.py

For every kind of model and each format: a published checkpoint is converted into a workdir that has
a tokenizer of its own, and from there into a folder, which one server opens by its path. Greedy
texts must be equal to ours, both computed in float32, and so must the ids of `AutoTokenizer`, with
and without BOS. Not part of CI, where torch is not installed. Prints a line for each, and fails
where one differs. Names of variants as arguments choose some.
"""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from equations import checkpoints
from transformers import AutoTokenizer

import deepseek_jax
from configs import v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.api import Model
from deepseek_jax.checkpoint import conversion
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.data import tokenizer as tokenizers

FORMATS = ("bfloat16", "fp8")
TOKENS = 8
LENGTH = 96  # of prompts and answers, for one compiled program
PROMPT = "def main(a, b):"
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One {{ and }} two"},
    {"role": "assistant", "content": "Three"},
    {"role": "user", "content": "More"},
]
CHAT = (
    f"{tokenizers.BOS}Be short.\n\nUser: One {{{{ and }}}} two\n\nAssistant: Three"
    f"{tokenizers.EOS}User: More\n\nAssistant:"
)
TEXTS = ("", "a b\n    c", "1234 ¿añ? 你好\t \n\n", " x")


def main() -> None:
    base, wrong = configs.parse(v3_tiny.get_config()), 0
    with tempfile.TemporaryDirectory() as folder, Server() as server:
        for variant in sys.argv[1:] or checkpoints.OF_TRANSFORMERS:
            root = Path(folder) / variant
            settings, weights = checkpoints.make(variant, vocab_size=264)
            checkpoints.write(root / "published", settings, weights)
            conversion.to_run(open_checkpoint(root / "published"), root / "run", base)
            tokenizers.make("byte", vocab=264, texts=()).save(root / "run" / "tokenizer.json")
            for form in FORMATS:
                out = root / form
                conversion.to_published(open_checkpoint(root / "run"), out, form, 10**9)
                rename_kimi(out)
                said = compare(server, out)
                wrong += bool(said)
                print(f"{variant:12} {form:9} {said or 'chat and completion equal'}", flush=True)
            shutil.rmtree(root)
    sys.exit(bool(wrong))


def rename_kimi(folder: Path) -> None:
    """Names Kimi K2 as transformers knows it, which its own guide says to do elsewhere too."""
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"kimi_k2"', '"deepseek_v3"'))


def compare(server: "Server", folder: Path) -> str:
    """What differs, in words; empty where nothing does."""
    ours = open_checkpoint(folder).tokenizer
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours is not None
    for text in TEXTS:
        (bare,) = ours.encode([text])
        if theirs(text, add_special_tokens=False)["input_ids"] != bare.tolist():
            return f"ids of {text!r} DIFFER"
        if theirs(text)["input_ids"] != [ours.marks.bos, *bare]:
            return f"BOS of {text!r} DIFFERS"
    chat = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    if chat != CHAT:
        return f"the chat DIFFERS: {chat!r}"
    asked = {"model": str(folder), "max_tokens": TOKENS, "temperature": 0}
    completion = server.post("/v1/completions", {**asked, "prompt": PROMPT})
    answer = server.post("/v1/chat/completions", {**asked, "messages": MESSAGES})
    got = [completion["choices"][0]["text"], answer["choices"][0]["message"]["content"]]
    model = deepseek_jax.load(folder)
    begun = [[ours.marks.bos, *ours.encode_special(PROMPT)], ours.encode_special(CHAT)]
    want = [ours.decode(greedy(model, ids, ours.marks.eos)) for ids in begun]
    return "" if got == want else f"texts DIFFER: {got} is not {want}"


def greedy(model: Model, prompt: list[int], eos: int) -> list[int]:
    text = np.pad(np.array([prompt]), ((0, 0), (0, LENGTH - len(prompt))))
    for end in range(len(prompt), len(prompt) + TOKENS):
        text[0, end] = np.asarray(model(text).logits[0, end - 1]).argmax()
        if text[0, end] == eos:
            break
    return text[0, len(prompt) : end + 1].tolist()


class Server:
    """A process of `transformers serve`, which ends with the block."""

    def __enter__(self) -> "Server":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        command = [Path(sys.executable).with_name("transformers"), "serve", "--device=cpu"]
        command += [f"--port={self.port}", "--dtype=float32", "--log-level=error"]
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        for _ in range(240):
            try:
                self.get("/health")
                return self
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.5)
        self.__exit__()
        self.log.seek(0)
        raise SystemExit(f"transformers serve did not start: {self.log.read()[-500:].decode()}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://localhost:{self.port}{path}", timeout=5) as reply:
            return reply.read()

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"http://localhost:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path} of {body['model']}: {error} {error.read()[:500]}") from error


if __name__ == "__main__":
    main()
