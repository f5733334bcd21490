"""One op to time: what it is, at which size, and whether a fit may see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from planner.errors import check_choice

FAMILIES = (
    "ceiling",
    "gemm",
    "moe",
    "prefill",
    "decode",
    "backward",
    "bandwidth",
    "composite",
    "optimizer",
    "host",
    "graph",
    "allocator",
    "sustained",
)

Split = Literal["calibration", "held-out"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpPoint:
    """An op and its sizes.

    `backend` is what is asked for ("default": torch's own choice). `cache` says what an op finds in
    the L2 cache: "cold", its inputs (of a GEMM: its weights) were not there; "warm", the op before
    it left them there, as far as they fit. `repeat` 1 is the second measurement of a point, at the
    end of a run: how far the two differ bounds every claim made from the others.
    """

    family: str
    op: str
    shape: Mapping[str, int] = field(hash=False)
    dtype: str = "bf16"
    backend: str = "default"
    split: Split = "calibration"
    cache: Literal["cold", "warm"] = "cold"
    repeat: int = 0

    def __post_init__(self) -> None:
        check_choice("family", self.family, FAMILIES)

    @property
    def key(self) -> str:
        """The point's name: equal for equal points, whatever run they belong to."""
        sizes = ",".join(f"{name}={size}" for name, size in self.shape.items())
        parts = [self.family, self.op, sizes, self.dtype, self.backend]
        if self.cache == "warm":
            parts.append("warm")
        if self.repeat:
            parts.append(f"repeat{self.repeat}")
        return "/".join(parts)
