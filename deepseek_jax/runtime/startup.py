"""First steps of `python -m deepseek_jax.COMMAND`, before JAX is imported.

`deepseek_jax/__init__.py` calls `of_command` first thing. Nothing happens where the package is
imported by another program: its signal handlers and its sys.path stay as they are.
"""

import gc
import os
import sys
from types import TracebackType

PREFIX = "deepseek_jax."
WITHOUT_JAX = (f"{PREFIX}watch",)  # commands that compute nothing, and start in half the time

# glibc's heap uses huge pages and keeps freed memory for the next step: blocks up to 32 MiB (the
# most that it allows), 1 GiB in all.
_MALLOC = {"hugetlb": 1, "mmap_threshold": 32 << 20, "trim_threshold": 1 << 30}


def needs_jax() -> bool:
    """Whether this process computes, as all do but some commands of this package."""
    return _module(sys.argv, sys.orig_argv) not in WITHOUT_JAX


def of_command() -> None:
    """Prepares this process if it is a command of this package."""
    module = _module(sys.argv, sys.orig_argv)
    if not module.startswith(PREFIX):
        return
    gc.set_threshold(100_000, 50, 100)  # traced programs have many objects, and few of them die
    _forget_working_directory()
    from deepseek_jax.runtime import signals  # its imports come after sys.path is set right

    signals.block()
    _tune_memory()
    signals.take_over(_code_of_sigterm(module, sys.argv[1:]))
    sys.excepthook = _tell_in_one_line


def _module(arguments: list[str], whole: list[str]) -> str:
    """NAME of `python -m NAME` while Python imports NAME's package, else "".

    Args:
      arguments, whole: sys.argv and sys.orig_argv.
    """
    if arguments[:1] != ["-m"] or len(arguments) > len(whole):
        return ""
    return whole[-len(arguments)].removeprefix("-m")


def _forget_working_directory() -> None:
    """Takes the working directory, which -m puts first, off sys.path.

    A file that happens to lie there, such as grain.py, must not replace a package. Where this
    package itself comes from there the directory is searched last.
    """
    if sys.flags.safe_path or not sys.path:
        return
    first = sys.path.pop(0)
    parent = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if os.path.realpath(first) == os.path.realpath(parent) and first not in sys.path:
        sys.path.append(first)


def _tune_memory() -> None:
    """Starts this program again, once, with glibc's heap set up for a step's temporaries.

    XLA's CPU client and its matmuls allocate temporaries anew each time. In fresh pages of 4 KiB a
    quarter of a small model's step goes into page faults (measured: `bench train` with and without
    an empty GLIBC_TUNABLES). glibc reads these settings at start-up only.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in _MALLOC.items())
        environment = os.environ | {"GLIBC_TUNABLES": tunables}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _code_of_sigterm(module: str, arguments: list[str]) -> int:
    """Exit code after SIGTERM: --stop_code of `main`, needed before flags are parsed, else 143."""
    if module != f"{PREFIX}main":
        return 143
    code = "0"
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--stop_code", "-stop_code"):
            code = value if equals else "".join(arguments[position + 1 : position + 2])
    return int(code) if code.isdecimal() and len(code) < 4 else 0


def _tell_in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Ends a command that fails while it imports; `command.run` has the rest.

    JAX reads its variables of the environment when it is imported, and absl its --flagfile.
    """
    if os.environ.get("DEEPSEEK_JAX_TRACEBACK"):
        sys.__excepthook__(kind, error, trace)
    text = " ".join(str(error).split())
    print(f"error: cannot start: {text or kind.__name__}", file=sys.stderr, flush=True)
    given = isinstance(error, ValueError) or kind.__module__.startswith("absl.flags")
    os._exit(2 if given else 1)
