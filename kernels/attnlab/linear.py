"""Linear layers and tables that start as N(0, 0.02²), biases 0, filled once where they lie."""

from __future__ import annotations

from torch import Tensor, nn


class Linear(nn.Linear):
    """x · Wᵀ + b with W [out, in]."""

    def reset_parameters(self) -> None:
        """Fill W and b."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def matrix(self) -> Tensor:
        """W as it acts."""
        return self.weight


class Embedding(nn.Embedding):
    """A row of W [rows, width] for each id."""

    def reset_parameters(self) -> None:
        """Fill W."""
        nn.init.normal_(self.weight, std=0.02)
