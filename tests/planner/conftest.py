"""What several tests here need before they run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def unpack_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """quanto compiles its unpack kernel when it first dequantises: not in a test."""
    cpp = pytest.importorskip("optimum.quanto.library.extensions.cpp")

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        mask = 2**bits - 1
        return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)])

    monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))
