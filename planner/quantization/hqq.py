"""HQQ (half-quadratic quantisation)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.quantization.base import Quantization

METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {}
