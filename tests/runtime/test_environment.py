"""Variables of the environment that XLA and JAX would answer with an abort or a stack."""

import logging

import jax
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.runtime import environment, processes

BAD = {
    "--xla_no_such_flag=1": "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1; remove it",
    "--xla_cpu_enable_fast_math=maybe": "Couldn't interpret value maybe for flag xla_cpu_enable_",
    "--xla_force_host_platform_device_count=two": "Couldn't interpret value two for flag xla_force",
    "--xla_force_host_platform_device_count=1000000": "XLA_FLAGS has --xla_force_host_platform_",
    "--xla_force_host_platform_device_count=-1": "XLA_FLAGS has --xla_force_host_platform_device_",
    "nowhere": "XLA_FLAGS='nowhere' is neither flags, as --NAME=VALUE, nor a file",
}


@pytest.mark.parametrize("given", BAD)
def test_flags_that_xla_cannot_read(monkeypatch, given):
    monkeypatch.setenv("XLA_FLAGS", given)
    with pytest.raises(ConfigError) as error:
        environment.check()
    assert str(error.value).startswith(BAD[given]) and "\n" not in str(error.value)


def test_a_file_of_flags_is_read(monkeypatch, tmp_path):
    file = tmp_path / "flags"
    monkeypatch.setenv("XLA_FLAGS", str(file))
    file.write_text("--xla_cpu_enable_fast_math=false\n")
    environment.check()
    file.write_text("--xla_no_such_flag=1\n")
    with pytest.raises(ConfigError, match=r"^Unknown flag in XLA_FLAGS: --xla_no_such_flag=1; "):
        environment.check()


def test_a_platform_that_is_not_here(monkeypatch, caplog):
    """JAX logs the stack of a plugin that failed, and then fails an assertion."""

    def local_devices():
        try:
            raise RuntimeError("Unable to load\ncuDNN")
        except RuntimeError:
            logging.getLogger("jax._src.xla_bridge").exception("Jax plugin configuration error")
        raise AssertionError

    monkeypatch.setattr(jax, "local_devices", local_devices)
    words = r"JAX finds no device of it here \(Unable to load cuDNN\); unset it or name another$"
    with pytest.raises(ConfigError, match=words):
        processes.start()
    assert not caplog.records
