"""Low-rank adapters (arXiv:2106.09685): W · x + (α / r) · B · A · x, and W is frozen.

A [r, in] and B [out, r] beside a matrix [out, in] are r · (in + out) elements to train in place of
in · out: gradients and optimizer states shrink so, activations do not. A starts as peft's does
(Kaiming-uniform), B at zero: the first forward is the model's own. They are float32 whatever the
model is, as peft keeps them: what goes in is cast to that and what comes out cast back. Merged into
W they cost nothing; what rounding W + (α / r) · B · A took is not given back by unmerging.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attnlab.linear import Linear
from attnlab.transformer import Transformer
from planner.errors import ConfigError
from planner.trained.lora import adapters as described
from planner.workload import LoRA

ALPHA = 8.0
"""peft's lora_alpha by default."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDE_A = ".lora_A.weight"


class AdaptedLinear(Linear):
    """The linear layer that it is made from, weight and bias the same ones, and its adapters."""

    def __init__(self, base: Linear, rank: int, alpha: float, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scaling, self.merged = alpha / rank, False
        with self.weight.device:
            self.lora_A = Linear(self.in_features, rank, bias=False, dtype=dtype)
            self.lora_B = Linear(rank, self.out_features, bias=False, dtype=dtype)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in the dtype that W alone makes."""
        out = super().forward(x)
        if self.merged:
            return out
        kept, x = out.dtype, x.to(self.lora_A.weight.dtype)
        out = out + self.lora_B(self.lora_A(x)) * self.scaling
        return out.to(kept)

    def matrix(self) -> Tensor:
        """W with the adapters in it."""
        return self.weight if self.merged else self.weight + self.change()

    def change(self) -> Tensor:
        """(α / r) · B · A in the dtype of W, [out, in]."""
        change = self.lora_B.weight @ self.lora_A.weight * self.scaling
        return change.to(self.weight.dtype)


def add_adapters(transformer: Transformer, lora: LoRA, *, alpha: float = ALPHA) -> None:
    """Put adapters beside the linear layers that `lora` means; nothing else is trained any more.

    They are named as planner.lora names them. Raises ConfigError for targets that the model lacks
    and where there are adapters already; nothing is changed then.
    """
    if next(_adapted(transformer), None) is not None:
        raise ConfigError("there are adapters already: one set of them is allowed")
    a_sides = [p.name for p in described(transformer.model, lora) if p.name.endswith(SIDE_A)]
    names = [name.removesuffix(SIDE_A) for name in a_sides]
    dtype = DTYPES[lora.dtype or "fp32"]
    transformer.requires_grad_(False)
    for name in names:
        parent, _, word = name.rpartition(".")
        base = transformer.get_submodule(name)
        assert type(base) is Linear, f"{name} is no linear layer"
        made = AdaptedLinear(base, lora.rank, alpha, dtype)
        setattr(transformer.get_submodule(parent), word, made)


def adapters(transformer: Transformer) -> dict[str, nn.Parameter]:
    """All A and B by name."""
    return {
        f"{name}.{side}.weight": getattr(module, side).weight
        for name, module in _adapted(transformer)
        for side in ("lora_A", "lora_B")
    }


@torch.no_grad()
def merge(transformer: Transformer) -> None:
    """Add every adapter to its W, in place; what is merged already stays so."""
    for _, module in _adapted(transformer):
        if not module.merged:
            module.weight += module.change()
            module.merged = True


@torch.no_grad()
def unmerge(transformer: Transformer) -> None:
    """Take them out again."""
    for _, module in _adapted(transformer):
        if module.merged:
            module.weight -= module.change()
            module.merged = False


def _adapted(transformer: Transformer) -> Iterator[tuple[str, AdaptedLinear]]:
    for name, module in transformer.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module
