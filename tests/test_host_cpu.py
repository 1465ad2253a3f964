"""Kind of the CPU, read from files as Linux writes them on x86 and on Arm."""

import builtins
import io

import pytest

from deepseek_jax import host_cpu

X86 = """processor\t: 0
model name\t: AMD EPYC
bugs\t\t: avx512f
flags\t\t: fpu avx2 fma avx512fp16

processor\t: 1
flags\t\t: fpu avx2 avx512f
"""
ARM = """processor\t: 0
Features\t: fp asimd sve
CPU part\t: 0xd4f
"""


@pytest.mark.parametrize(
    "text, instructions, there",
    [
        (X86, "avx2", True),
        (X86, "avx512f", False),  # neither part of a word, nor of another line or core
        (ARM, "sve", True),
        (ARM, "avx2", False),
        ("", "avx2", False),
    ],
)
def test_instructions_are_whole_words_of_the_first_core(monkeypatch, text, instructions, there):
    monkeypatch.setattr(builtins, "open", lambda name: io.StringIO(text))
    assert host_cpu.has(instructions) == there


def test_a_system_without_the_file(monkeypatch):
    def missing(name):
        raise FileNotFoundError(name)

    monkeypatch.setattr(builtins, "open", missing)
    assert host_cpu.lines() == [] and not host_cpu.has("avx2")
