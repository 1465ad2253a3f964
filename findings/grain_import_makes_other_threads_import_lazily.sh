#!/usr/bin/env bash
# grain 0.2.18 with etils 1.15: while a thread imports grain, an import statement in ANY other thread may
# bind a lazy stand-in in place of the module. grain wraps `import pyarrow.parquet` in
# etils.epy.lazy_imports(), which replaces builtins.__import__ of the whole process for that moment, so the
# stand-in also goes to a thread that imports something else just then. Seen as "No module named
# 'jax._src.hijax.HiType'" in a training run that opened its data in a thread while JAX traced, some of whose
# imports are inside functions. Import grain before the first thread starts.
#
# Output, Python 3.11.7: LazyModule while the other thread imported grain, module after it.
# The moment is short. Here a profile function holds the importing thread in it, and the main thread imports.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "grain==0.2.18" "etils[epy,epath]==1.15.0" "numpy==2.3.5"
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata as metadata
import sys
import threading

reached, go_on = threading.Event(), threading.Event()


def hold(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "_lazy_import" and not reached.is_set():
        reached.set()
        go_on.wait(60)


def load():
    sys.setprofile(hold)
    import grain  # noqa: F401

    reached.set()


loading = threading.Thread(target=load)
loading.start()
assert reached.wait(300)
import decimal as other  # of the standard library; grain has nothing to do with it

go_on.set()
loading.join()
import decimal as later

print({name: metadata.version(name) for name in ("grain", "etils")}, sys.version.split()[0])
print("bound in the main thread while the other one imported grain:", type(other).__name__)
print("bound after it:", type(later).__name__)
assert type(other).__name__ == "LazyModule", "grain or etils has changed"
assert type(later).__name__ == "module"
PYTHON
