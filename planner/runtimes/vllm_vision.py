"""What images leave behind in vLLM's profile run while the language model and the sampler run.

GPUModelRunner.profile_run (v1/worker/gpu_model_runner.py, 0.19.1) feeds as many images as its
encoder budget has room for; its variable keeps their pixels and `encoder_cache` what the encoder
made of them until the end. The encoder's own activations are gone by then and are not planned.
"""

from __future__ import annotations

from planner.dtypes import element_bytes
from planner.model import Model

COLOURS = 3


def kept_images(model: Model, *, batched_tokens: int, dtype: str) -> tuple[tuple[str, int], ...]:
    """(what, bytes) of pixels and outputs; nothing for types whose images vary in size.

    gemma-3: each image has `image_size`² pixels and `mm_tokens_per_image` tokens. The budget is
    max_num_batched_tokens, but one image at least (compute_mm_encoder_budget).
    """
    config = model.config
    vision, tokens = config.get("vision_config"), config.get("mm_tokens_per_image")
    if model.model_type != "gemma3" or not model.towers or not isinstance(vision, dict):
        return ()
    side = vision.get("image_size")
    if not all(type(size) is int and 0 < size < 2**16 for size in (side, tokens)):
        return ()
    images, b = max(1, batched_tokens // int(tokens or 1)), element_bytes(dtype)
    return (
        ("pixels of the profiled images", images * COLOURS * int(side or 0) ** 2 * b),
        ("outputs of the encoder", images * int(tokens or 1) * model.hidden_size * b),
    )
