"""Weights of a Hugging Face checkpoint into a Transformer: the family's names and orientation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnlab.transformer import Transformer
from planner.errors import ConfigError

BUFFERS = ("inv_freq", "attn.bias", "attn.masked_bias", "embed_scale")
"""Endings of tensors that checkpoints may hold and no parameter is made from."""


@torch.no_grad()
def load_state_dict(transformer: Transformer, state: Mapping[str, Tensor]) -> None:
    """Copy every parameter from `state`, converted to the transformer's dtype.

    Buffers and the copy of a tied head are passed over. Raises ConfigError, before anything is
    copied, when another tensor is missing, too many or of another shape.
    """
    model = transformer.model
    wanted = {model.checkpoint_name(p.name): p for p in model.parameters()}
    shapes = {p.name: p.shape for p in model.checkpoint_parameters()}
    passed_over = {"lm_head.weight"} if model.tie_word_embeddings else set()
    extra = [n for n in state if n not in wanted and n not in passed_over and not _is_buffer(n)]
    _refuse("lacks", [n for n in wanted if n not in state])
    _refuse("has besides the model's tensors", extra)
    _refuse(
        "has in another shape",
        [
            f"{name} {list(state[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if tuple(state[name].shape) != shape
        ],
    )
    parameters = dict(transformer.named_parameters())
    for name, p in wanted.items():
        tensor = state[name]
        swap = model.transposed_linears and p.layer is not None and tensor.dim() == 2
        parameters[p.name].copy_(tensor.T if swap else tensor)


def _is_buffer(name: str) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in BUFFERS)


def _refuse(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ConfigError(f"the state dict {what}: {', '.join(names[:3])}{more}")
