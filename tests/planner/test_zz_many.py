"""The program of a training step against every storage that the real step makes on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import planner
from attnlab.training import training_step
from attnlab.transformer import Transformer
from planner.activations import peak, peak_bytes
from planner.program import Dims, evaluate
from profiles.meters import module_bytes
from tests.planner.configs import TINY
from tests.planner.steps import DTYPES, curve, events, program_of, square, watched_step

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@st.composite
def configs(draw):
    """Small decoders of every family that attnlab runs."""
    family = draw(st.sampled_from(("llama", "mistral", "qwen2", "gemma2", "phi3", "gpt2")))
    heads = draw(st.sampled_from((1, 2, 4, 6)))
    layers = draw(st.integers(1, 4))
    if family == "gpt2":
        return {
            "model_type": "gpt2",
            "vocab_size": draw(st.integers(2, 90)),
            "n_embd": heads * draw(st.integers(1, 9)),
            "n_layer": layers,
            "n_head": heads,
            "n_positions": 64,
            "n_inner": draw(st.integers(1, 90)),
            "activation_function": draw(st.sampled_from(ACTIVATIONS)),
            "tie_word_embeddings": draw(st.booleans()),
        }
    config = {
        "model_type": family,
        "vocab_size": draw(st.integers(2, 90)),
        "hidden_size": heads * 2 * draw(st.integers(1, 6)),
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(1, 90)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([g for g in (1, 2, 3, 6) if heads % g == 0])),
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 0,
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
    }
    window = draw(st.none() | st.integers(1, 40))
    if family == "llama":
        config["attention_bias"], config["mlp_bias"] = draw(st.booleans()), draw(st.booleans())
    if family in ("llama", "mistral", "gemma2"):
        config["head_dim"] = 2 * draw(st.integers(1, 8))
    if family == "gemma2":
        config["hidden_activation"] = config.pop("hidden_act")
        config["sliding_window"] = window or 7
        config["layer_types"] = draw(
            st.lists(
                st.sampled_from(("sliding_attention", "full_attention")),
                min_size=layers,
                max_size=layers,
            )
        )
    elif family != "llama":
        config["sliding_window"] = window
    if family == "qwen2":
        config["use_sliding_window"] = window is not None
        config["max_window_layers"] = draw(st.integers(0, layers))
    return config


@settings(max_examples=1500, deadline=None)
@given(
    config=configs(),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 45),
    naive=st.booleans(),
)
def test_every_allocation_of_a_step_is_predicted_in_order_and_to_the_byte(
    config, dtype, batch, tokens, naive
):
    model = planner.read_config(config)
    capped = config["model_type"] == "gemma2"
    attention = "naive" if naive or capped else "sdpa"
    live = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    meter, dims = watched_step(live, batch, tokens), square(batch, tokens)
    program = program_of(model, dims, attention=attention, dtype=dtype)

    assert curve(events(program, dims)) == curve(meter.events)
    highest = peak(program, dims)
    assert (highest.live_bytes, highest.kernel) == (meter.peak_bytes, meter.peak_op)
    gradients = sum(p.grad.nbytes for p in live.parameters())
    assert sum(change for _, change in events(program, dims)) == meter.live_bytes == gradients
