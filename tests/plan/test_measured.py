"""Measured times in place of published efficiencies."""

import json

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.plan import machine_lookup, measured
from deepseek_jax.plan.layer_work import Matmul

H800 = machine_lookup.find("h800")


def write(path, rows, device="NVIDIA H800 80GB HBM3"):
    path.write_text(json.dumps({"device": device, "rows": rows}))
    return path


def row(piece, shape, seconds, recipe="fp8", size=0):
    return dict(piece=piece, recipe=recipe, shape=shape, seconds=seconds, flops=0, bytes=size)


MATMULS = [
    ("linear forward", (4096, 7168, 2112), Matmul(4096, 7168, 2112)),
    ("linear input gradient", (4096, 7168, 2112), Matmul(4096, 2112, 7168)),
    ("linear weight gradient", (4096, 7168, 2112), Matmul(7168, 4096, 2112, gradient=True)),
    ("experts forward", (4, 32_768, 7168, 4096), Matmul(32_768, 7168, 4096, 4)),
    (
        "experts weight gradient",
        (4, 32_768, 7168, 4096),
        Matmul(28_672, 8192, 4096, 4, gradient=True),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("piece", "shape", "matmul"), MATMULS)
@pytest.mark.parametrize("recipe", ["fp8", "bfloat16"])
def test_a_measured_product_is_predicted(piece, shape, matmul, recipe, tmp_path):
    """With the file, the plan's time of a measured shape is the measured time."""
    seconds = 1.7 * H800.matmul_seconds(matmul, recipe)
    path = write(tmp_path / "rates.json", [row(piece, shape, seconds, recipe)])
    found, names = measured.with_measured(H800, path)
    assert len(names) == 1
    assert found.matmul_seconds(matmul, recipe) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("piece", "shape", "seconds", "size", "message"),
    [
        ("linear forward", (4096, 7168), 1e-4, 0, "expected 3 numbers"),
        ("experts forward", (4096, 7168, 2112), 1e-4, 0, "expected 4 numbers"),
        ("linear forward", (4096, 7168, 2112), 1e-9, 0, "matmul_fp8="),  # far above the peak
        ("quantise rows", (4096, 7168), 1e-4, -5, "bytes=-5"),
        ("quantise rows", (4096, 7168), 1e-4, "5", "measured rates"),
        ("quantise rows", (4096, 7168), 1e-4, 0, "quantise_forward=0"),
    ],
)
def test_rows_that_cannot_be(piece, shape, seconds, size, message, tmp_path):
    path = write(tmp_path / "rates.json", [row(piece, shape, seconds, size=size)])
    with pytest.raises(ConfigError, match=message) as error:
        measured.with_measured(H800, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_attention_and_quantisers(tmp_path):
    rows = [
        row("attention forward", (1, 4096, 128, 192, 128), 1.24e-3, "bfloat16"),
        row("attention backward", (1, 4096, 128, 192, 128), 4.25e-3, "bfloat16"),
        row("quantise rows", (4096, 7168), 1e-4, size=2 * 10**8),
        row("quantise both", (4096, 7168), 1e-4, size=10**8),
        row("attention forward", (1, 4096, 128, 192, 128), 1.0, "bfloat16 portable"),
    ]
    found, names = measured.with_measured(H800, write(tmp_path / "rates.json", rows))
    assert names == (
        "attention_forward", "attention_backward", "quantise_forward", "quantise_backward",
    )  # fmt: skip
    shares = found.efficiency
    assert shares.attention_forward == pytest.approx(4096**2 * 128 * 320 / 1.24e-3 / 989.5e12)
    assert shares.attention_backward == pytest.approx(4096**2 * 128 * 832 / 4.25e-3 / 989.5e12)
    assert shares.quantise_forward == pytest.approx(2e12 / 3.35e12)
    assert shares.quantise_backward == pytest.approx(1e12 / 3.35e12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "no file of measured rates"),
        ("[]", "no file of measured rates"),
        (("h800", {}), "no file of measured rates"),
        (("h800", row("linear forward", (1, 2, 3), -1)), "seconds=-1"),
        (("NVIDIA B200", row("quantise rows", (1, 2), 1, size=1)), "is of b200"),
        (("cpu",), "is of a CPU"),
        (("h800",), "no row that the plan knows"),
    ],
)  # fmt: skip
def test_files_that_cannot_be(text, message, tmp_path):
    path = tmp_path / "rates.json"
    if isinstance(text, tuple):
        write(path, list(text[1:]), text[0])
    elif text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        measured.with_measured(H800, path)
    assert "\n" not in str(error.value)
