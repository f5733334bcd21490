"""MXFP4 (OCP microscaling formats 1.0) as gpt-oss stores its experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.quantization.base import Quantization

METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {}
