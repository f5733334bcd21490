"""Weights of a Hugging Face checkpoint into a Transformer: the family's names and orientation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from attnlab.transformer import Transformer
from planner.errors import ConfigError

BUFFERS = (
    "inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
    "embed_scale",
    "embed_positions",
)
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


def load_safetensors(transformer: Transformer, path: Path | str) -> None:
    """Weights of a .safetensors file, or of all in a folder, into the transformer.

    Files are mapped, not read into memory. Raises ConfigError where there is none, for a file that
    is no safetensors file, and as `load_state_dict`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ConfigError(f"{path} has no weights: a .safetensors file, or a folder of them")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file} is not a safetensors file: {error}") from None
    load_state_dict(transformer, state)


def _is_buffer(name: str) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in BUFFERS)


def _refuse(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ConfigError(f"the state dict {what}: {', '.join(names[:3])}{more}")
