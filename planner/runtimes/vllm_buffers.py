"""Tensors of vLLM's modules that are not parameters: scales of attention, rotary tables."""

from __future__ import annotations

from planner.dtypes import element_bytes
from planner.layers import GQA, MLA, RoPE
from planner.ledger import Row
from planner.model import Model

SCALES = 7  # of an attention layer

LATENT_WORKSPACE_BYTES = 128 * 2**20
"""`g_fi_workspace`, made as v1/attention/backends/mla/flashinfer_mla.py (0.19.1) is imported: with
all backends of latents while the first layer picks one (get_valid_backends, platforms/cuda.py), so
that it is among the weights whichever is picked."""


def buffer_rows(model: Model, *, dtype: str, capability: str | None) -> list[Row]:
    """Scales of every attention layer, and cos and sin of every position.

    The scales (set_default_quant_scales, layers/attention/attention.py, 0.19.1) are there whatever
    the KV dtype: float32 scalars of q, k, v and the probabilities, ranges of q, k, v. A rotary
    table is in the model's dtype and one for all layers that turn alike (`_ROPE_DICT`). Models with
    latents bring a workspace on NVIDIA devices.
    """
    layers = sum(isinstance(layer.attention, GQA | MLA) for layer in model.layers)
    rows = [
        Row(
            component="weights",
            item="attention scales (buffers)",
            count=layers,
            formula="7 · 4",
            values=(),
            size_bytes=layers * SCALES * 4,
        )
    ]
    tables = [("rotary table (buffer)", model.positions)]
    if model.local_positions is not None and model.local_positions != model.positions:
        tables.append(("rotary table of sliding layers (buffer)", model.local_positions))
    for item, positions in tables:
        if isinstance(positions, RoPE):
            length, D = table_positions(model, positions), positions.rotary_dim
            b = element_bytes(dtype)
            table = Row(
                component="weights",
                item=item,
                count=1,
                formula="positions · d_rot · b",
                values=(("positions", length), ("d_rot", D), ("b", b)),
                size_bytes=length * D * b,
            )
            rows.append(table)
    if any(isinstance(kind.attention, MLA) for kind in model.layer_kinds()) and _is_cuda(
        capability
    ):
        rows.append(
            Row(
                component="weights",
                item="workspace of latent attention (buffer)",
                count=1,
                formula="constant",
                values=(("constant", LATENT_WORKSPACE_BYTES),),
                size_bytes=LATENT_WORKSPACE_BYTES,
                note="made at the import of FlashInfer's backend (vLLM 0.19)",
            )
        )
    return rows


def _is_cuda(capability: str | None) -> bool:
    """Whether it is a compute capability, not AMD's gfx name or nothing."""
    return capability is not None and capability.replace(".", "").isdigit()


def table_positions(model: Model, rope: RoPE) -> int:
    """Positions that a rotary table is made for (layers/rotary_embedding/, 0.19.1).

    The model's; scaled linearly or dynamically, times the factor; yarn: the original ones times the
    factor; longrope: one table of the original and one of all positions.
    """
    positions = model.max_position_embeddings or 0
    scaling = dict(rope.scaling)
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    times = factor if isinstance(factor, int | float) and not isinstance(factor, bool) else 1
    first = original if isinstance(original, int) and not isinstance(original, bool) else positions
    match rope.rope_type:
        case "linear" | "dynamic":
            return int(positions * times)
        case "yarn":
            return int(first * times)
        case "longrope" | "su":
            return positions + first
    return positions
