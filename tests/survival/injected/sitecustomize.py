"""Fault of a process under test, at the moment at which it enters a section.

Python imports this file in every process of a run that has this folder in PYTHONPATH. The variable
FAULT is SIGNAL:SECTION:PROCESS:STEP:NOTE, as SIGKILL:step:1:4:/tmp/note, where STEP is the first
step at which a fault in `step` happens. The process sends the signal to itself once, and writes the
time into NOTE before that. Where KEEP_PROGRAMS is set every process
writes its compiled programs into JAX's folder, in which JAX lets process 0 alone write.
"""

import importlib.machinery
import os
import signal
import sys
import time
import types


class _Finder:
    """Finds a module in the usual places, and changes it once it is loaded."""

    def __init__(self, module, change):
        self._module, self._change = module, change

    def find_spec(self, name, path=None, target=None):
        if name != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            self._change(module)

        spec.loader.exec_module = load_and_change
        return spec


def _arm(module):
    name, section, process, step, note = os.environ["FAULT"].split(":")
    change, begin = module.Publisher._change, module.begin

    def strike(now):
        if now.process != int(process) or now.section != section or os.path.exists(note):
            return
        if section == "step" and now.step < int(step):
            return
        with open(note, "w") as file:
            file.write(str(time.time()))
        os.kill(os.getpid(), signal.Signals[name])

    def changed(self, **values):
        change(self, **values)
        strike(self.now)

    def began(number, processes):
        publisher = begin(number, processes)
        strike(publisher.now)
        return publisher

    module.Publisher._change, module.begin = changed, began


def _keep_programs(compiler):
    """Lets the module `compiler` of JAX take every process for process 0, which alone writes."""
    state = types.SimpleNamespace(process_id=0, client=None)
    compiler.distributed = types.SimpleNamespace(global_state=state)


if "FAULT" in os.environ:
    sys.meta_path.insert(0, _Finder("deepseek_jax.runtime.progress", _arm))
if "KEEP_PROGRAMS" in os.environ:
    sys.meta_path.insert(0, _Finder("jax._src.compiler", _keep_programs))
