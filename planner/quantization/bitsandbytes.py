"""bitsandbytes: nf4 and fp4 (arXiv:2305.14314), int8 (arXiv:2208.07339)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.quantization.base import Quantization

METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {}
