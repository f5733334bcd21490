"""A block whose inputs are kept and whose inside is computed again: torch.utils.checkpoint.

Without reentrance and with early stop, as torch 2.13 has it by default (torch/utils/checkpoint.py):
what the block's ops would save is dropped; the first of them that needs something on the way back
runs the block again, which ends as soon as the last saved tensor is there; each is then given out
once. The block's arguments live until the last op that saved something is done.

Selective (create_selective_checkpoint_contexts): what linear layers and fused attention return is
kept from the first run, and the second takes each from there in place of computing it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from planner.autograd.aten import Aten
from planner.autograd.tensors import Node, Tensor

Given = TypeVar("Given")


class StopRecomputationError(Exception):
    """The last saved tensor is there: the rest of the block is not computed."""


class Frame(Generic[Given]):
    """One run of a checkpointed block on `x` and what else it is `given`: both are kept.

    `again` runs it for this frame; what it need not compute then is `kept`.
    """

    def __init__(
        self,
        aten: Aten,
        again: Callable[[Frame[Given], Tensor, Given], None],
        x: Tensor,
        given: Given,
    ) -> None:
        self._aten, self._again = aten, again
        self._x, self._given = x.detach(), given
        self._start, self._end = aten.made, 0  # allocations before, and up to the last that counts
        self._packed = 0
        self._saved: list[list[Tensor]] | None = None
        self.kept = deque[Tensor]()

    @property
    def runs_again(self) -> bool:
        """Whether this is the second run."""
        return self._saved is not None

    def pack(self, node: Node, out: Tensor) -> None:
        """Drop what an op saves; in the second run keep it."""
        if not node.saved:
            return
        if self._saved is not None:
            self._saved.append([x.detach() for x in node.saved])
            if len(self._saved) == self._packed:
                raise StopRecomputationError
            return
        made_here = any(x.storage.index >= out.storage.index for x in node.saved)
        self._end = (self._aten.made if made_here else out.storage.index) - self._start
        node.unpack = self._giver(self._packed)
        node.saved.clear()
        self._packed += 1

    def _giver(self, place: int) -> Callable[[], list[Tensor]]:
        def unpack() -> list[Tensor]:
            if self._saved is None:
                self._run_again()
            assert self._saved is not None
            given, self._saved[place] = self._saved[place], []
            return given

        return unpack

    def _run_again(self) -> None:
        self._saved = []
        doing, self._aten.doing = self._aten.doing, ""
        self._aten.last = self._aten.made + self._end
        self._aten.taken, self._aten.products = self.kept, 0
        try:
            self._again(self, self._x, self._given)
        except StopRecomputationError:
            pass
        finally:
            self._aten.last, self._aten.doing, self._aten.taken = None, doing, None
