"""Reader of ministral3 (transformers 5.23, models/ministral3/)."""

from __future__ import annotations

from collections.abc import Callable

from planner.huggingface.blocks import gated, gqa, gqa_decoder, layer_windows, rope
from planner.huggingface.fields import Fields
from planner.huggingface.later_decoders import stated_heads
from planner.huggingface.sparse_latent import scaled_queries
from planner.model import Model


def read_ministral3(fields: Fields) -> Model:
    """Ministral-3: mistral's blocks, queries that grow with their position, YaRN by default."""
    sizes = stated_heads(fields)
    scaled = scaled_queries(fields, theta=1_000_000.0, factor=16.0, original=16384)
    return gqa_decoder(
        fields,
        stem="Ministral3",
        attention=gqa(sizes),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=gated(fields),
        positions=rope(scaled, head_dim=sizes[2]),
    )


READERS: dict[str, Callable[[Fields], Model]] = {
    "ministral3": read_ministral3,
}
