"""A function in a fresh process: a crash, a hang or a lack of memory ends that process alone.

The processes fork from a server that has imported torch and what else takes seconds, and has never
touched a device: so each begins in a fraction of a second, with a CUDA context and an allocator of
its own. Where the parent dies, its child does too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOADED = ("profiles.preloaded",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a process ended: with its answer, or with the reason why there is none."""

    answer: Any = None
    problem: str | None = None
    timed_out: bool = False


def run_isolated(
    function: Callable[..., Any], arguments: Sequence[Any], *, timeout_s: float
) -> Ended:
    """Call a module's function in a process of its own; its answer must be picklable.

    Raises KeyboardInterrupt after the process is gone.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, tuple(arguments)), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            return Ended(problem=f"timed out after {timeout_s:g} s", timed_out=True)
        answer, problem = receiver.recv()
        return Ended(answer=answer, problem=problem)
    except EOFError:
        process.join()
        return Ended(problem=_died(process.exitcode or 0))
    finally:
        if process.is_alive():
            process.join(timeout=1.0)
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()


def _child(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    _die_with_parent()
    try:
        sender.send((function(*arguments), None))
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[0][:300]
        sender.send((None, f"{type(error).__name__}: {message}"))
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no clean-up of a device that the system cleans up faster


def _die_with_parent() -> None:
    """End when whoever asked has ended: the server lives as long as one of its processes does."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _died(code: int) -> str:
    if code < 0:
        return f"the process died of {signal.Signals(-code).name}"
    return f"the process ended with exit code {code} and no answer"
