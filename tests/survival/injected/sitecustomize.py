"""Fault of a process under test, at the moment at which it enters a section.

Python imports this file in every process of a run that has this folder in PYTHONPATH. The variable
FAULT is SIGNAL:SECTION:PROCESS:NOTE, as SIGKILL:save:1:/tmp/note. The process sends the signal to
itself once, and writes the time into NOTE before that.
"""

import importlib.machinery
import os
import signal
import sys
import time

MODULE = "deepseek_jax.runtime.progress"
FIRST_STEP = 4  # of those at which a fault in `step` happens


class _Finder:
    """Finds the module in the usual places, and arms it once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def load_and_arm(module):
            load(module)
            _arm(module)

        spec.loader.exec_module = load_and_arm
        return spec


def _arm(module):
    name, section, process, note = os.environ["FAULT"].split(":")
    change, begin = module.Publisher._change, module.begin

    def strike(now):
        if now.process != int(process) or now.section != section or os.path.exists(note):
            return
        if section == "step" and now.step < FIRST_STEP:
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


if "FAULT" in os.environ:
    sys.meta_path.insert(0, _Finder())
