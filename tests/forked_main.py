"""`python -m deepseek_jax.main` in a process that is forked after the imports.

A server of `multiprocessing` imports this module, and with it what the command imports, without a
device of JAX. A process that it forks then has the command's signals, arguments, environment and
exit code, as if it had been started anew.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

INJECTED = Path(__file__).parent / "survival" / "injected" / "sitecustomize.py"


def run(arguments: list[str], environment: dict[str, str], told: str) -> None:
    """Runs the command, whose standard error goes to the file `told`."""
    import jax

    from deepseek_jax.runtime import progress, signals, startup

    os.environ.clear()
    os.environ.update(environment)
    with open(told, "w") as file, open(os.devnull, "w") as nowhere:
        os.dup2(file.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
    module = "deepseek_jax.main"
    signals.block()
    signals.take_over(startup._code_of_sigterm(module, arguments))
    jax.config.update("jax_compilation_cache_dir", environment.get("JAX_COMPILATION_CACHE_DIR"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e6)  # it writes no programs
    if environment.get("JAX_ENABLE_COMPILATION_CACHE") == "false":
        jax.config.update("jax_enable_compilation_cache", False)
    if "FAULT" in environment:
        spec = importlib.util.spec_from_file_location("injected", INJECTED)
        assert spec and spec.loader
        injected = importlib.util.module_from_spec(spec)
        hooks = list(sys.meta_path)
        spec.loader.exec_module(injected)
        sys.meta_path[:] = hooks  # the module that it would change is there already
        injected._arm(progress)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ != "__main__":
    import deepseek_jax.endings
    import deepseek_jax.train.loop
    import deepseek_jax.train.plots  # noqa: F401
