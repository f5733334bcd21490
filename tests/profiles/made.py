"""Records made by hand: a tiny model on an H200, of which nothing was measured unless said."""

from profiles import records
from profiles.records import Environment

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}

ENVIRONMENT = Environment(
    device="cuda",
    device_name="NVIDIA H200",
    gpu="h200",
    platform="Linux",
    python="3.12.1",
    torch="2.11.0+cu130",
    total_memory_bytes=150_000_000_000,
)


def measured(**changes):
    """A record of a generation on an H200 of which nothing was measured."""
    values = {
        "status": "ok",
        "model": "tiny",
        "config": CONFIG,
        "runtime": "attnlab",
        "runtime_version": "0.1.0",
        "attention": "sdpa:flash",
        "phase": "generation",
        "batch": 2,
        "prompt_tokens": 16,
        "output_tokens": 4,
        "dtype": "bf16",
        "kv_dtype": "bf16",
        "logits": "last",
        "mode": "eager",
        "environment": ENVIRONMENT,
    }
    return records.create(**(values | changes))
