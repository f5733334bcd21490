"""Records what torch's CUDA allocator does during a run, from the first byte on.

    with recorded() as history:          # before the first tensor of the process
        run()
    history.write("run.json.gz", about={"model": "gpt2"})    # for profiles.allocator_replay
    history.write_pickle("run.pickle")                        # for pytorch.org/memory_viz

The replay begins with an empty allocator, so the history has to. Not only tensors count: cuBLAS has
torch allocate its workspace at the first matrix product, and keeps it; recording gives such
workspaces and cached segments back first, and refuses to begin while anything is left.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from planner import ConfigError
from profiles import history_format
from profiles.environment import find_device

MAX_ENTRIES = 5_000_000
"""The oldest events of more than these are lost. An event without stacks is some 200 bytes."""

PICKLE_PROTOCOL = 4
"""The newest that memory_viz reads."""


class History:
    """A recorded run; the snapshot is there once the `with` block has ended."""

    def __init__(self) -> None:
        self._snapshot: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        """Whether the snapshot was taken."""
        return self._snapshot is not None

    @property
    def snapshot(self) -> dict[str, Any]:
        """What torch.cuda.memory._snapshot() returned at the end."""
        if self._snapshot is None:
            raise RuntimeError("the recording has not ended, or its snapshot could not be taken")
        return self._snapshot

    def compact(self, *, device: int = 0, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The history of one device, small: see history_format."""
        about = {"torch": torch.__version__, **(about or {})}
        return history_format.compact(self.snapshot, device=device, about=about)

    def write(
        self, path: str | Path, *, device: int = 0, about: Mapping[str, Any] | None = None
    ) -> None:
        """The compacted history as .json.gz, for `allocator_replay.read_recording`."""
        history_format.write(path, self.compact(device=device, about=about))

    def write_pickle(self, path: str | Path) -> None:
        """The whole snapshot for pytorch.org/memory_viz. Nothing here ever reads a pickle."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            pickle.dump(self.snapshot, file, protocol=PICKLE_PROTOCOL)


@contextmanager
def drawn_by_memory_viz(path: str | Path, *, device: str) -> Iterator[None]:
    """Record the block with Python stacks and write it to `path` for pytorch.org/memory_viz.

    What happened before a block raised is written too. ConfigError, before anything runs, for a
    `device` that is not CUDA: no other allocator keeps a history; and for a path whose folder
    cannot be written to.
    """
    target, path = find_device(device), Path(path)
    if target.type != "cuda":
        raise ConfigError(
            f"--memory-viz is not allowed on device={target.type}: cuda, whose allocator keeps a "
            "history"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"--memory-viz={path} cannot be written: {error.strerror}") from None
    history: History | None = None
    try:
        with recorded(context="alloc") as history:
            yield
    finally:
        if history is not None and history.ended:
            history.write_pickle(path)


@contextmanager
def recorded(
    *, context: Literal["alloc", "all"] | None = None, max_entries: int = MAX_ENTRIES
) -> Iterator[History]:
    """Record the allocator's events of the block. `context` adds Python stacks: for memory_viz.

    Also after a block that raises, out of memory say: its history is there, its exception goes on.
    """
    _start_empty()
    torch.cuda.memory._record_memory_history(
        "all", context=context, stacks="python", max_entries=max_entries
    )
    history = History()
    try:
        yield history
    except BaseException:
        try:
            _stop(history)
        except Exception:  # the block's own error says more
            history._snapshot = None
        raise
    _stop(history)


def _stop(history: History) -> None:
    """Take the snapshot, then stop: stopping clears the events."""
    try:
        history._snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(None)


def _start_empty() -> None:
    """Give back what torch keeps for later; ConfigError if something is still held."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    gc.collect()
    torch.cuda.synchronize()
    clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear_workspaces is not None:
        clear_workspaces()
    torch.cuda.empty_cache()
    held_bytes = torch.cuda.memory_reserved()
    if held_bytes:
        raise ConfigError(
            f"the allocator holds {held_bytes:,} bytes already: a history begins before the first "
            "tensor, in a process of its own"
        )
