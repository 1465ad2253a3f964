"""Memory of the machine, from files as Linux writes them."""

import pytest

from deepseek_jax.hardware import machine_memory


@pytest.mark.parametrize(
    ("groups", "files", "want"),
    [
        ("0::/\n", {"memory.max": "1000\n"}, [1000]),
        ("0::/\n", {"memory.max": "max\n"}, []),
        (
            "0::/a/b\n",
            {"a/b/memory.max": "max", "a/memory.max": "500", "memory.max": "900"},
            [500, 900],
        ),
        ("0::/of/the/host\n", {"memory.max": "700"}, [700]),
        ("4:memory:/job\n3:cpu:/\n0::/\n", {"memory/job/memory.limit_in_bytes": "600"}, [600]),
        ("5:cpu,cpuacct:/\n", {"memory/memory.limit_in_bytes": "600"}, []),
    ],
)
def test_limits_of_control_groups(tmp_path, groups, files, want):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert list(machine_memory._limits(groups, tmp_path)) == want


def test_sizes_of_the_host():
    text = "MemTotal:       24576 kB\nHugePages_Total:       0\nSwapTotal:         8 kB\n"
    assert machine_memory._meminfo(text) == {"MemTotal": 24576 * 1024, "SwapTotal": 8 * 1024}


@pytest.mark.parametrize(
    ("count", "want"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**75, "3.28e+04 EiB"),
    ],
)
def test_bytes_as_text(count, want):
    assert machine_memory.text(count) == want
