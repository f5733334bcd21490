"""What a process of its own may come to: functions that crash, hang, run out of memory, or work."""

import os
import signal
import sys
import time
from dataclasses import replace

from profiles.suite_run import measured_point


def loaded():
    """Whether the expensive modules were there before this process began."""
    return "torch" in sys.modules and "transformers" in sys.modules


def raises():
    raise RuntimeError("first line\nsecond line")


def crashes():
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves():
    os._exit(3)


def hangs():
    time.sleep(1000)


def fated(point, suite, device, index, histories):
    """Measure, unless the point's model says what is to go wrong."""
    fate = {"gpt2": crashes, "gpt2-medium": hangs, "gpt2-large": raises}.get(point.model)
    if fate is not None:
        fate()
    return measured_point(replace(point, model="llama-50m"), suite, device, index, histories)


def slowly(point, suite, device, index, histories):
    """A point that says where its process is, and never ends."""
    with open(os.environ["FATED_PIDS"], "a") as file:
        file.write(f"{os.getpid()}\n")
    hangs()
