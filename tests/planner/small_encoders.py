"""Small random configs of BERT and T5, and what their classes hold when they run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers as hf
from hypothesis import strategies as st

from profiles.meters import LiveTensorMeter
from tests.planner.small_decoders import DTYPES, padding, words

HEADS = {"bert": ("BertForMaskedLM", "BertModel"), "t5": ("T5ForConditionalGeneration",)}


@st.composite
def berts(draw: st.DrawFn, *, headed: bool = False) -> dict[str, Any]:
    """A BERT of a few layers, with its head for masked words or with its pooler alone."""
    heads, width = draw(st.integers(1, 3)), 8 * draw(st.integers(1, 3))
    names = HEADS["bert"][: 1 if headed else 2]
    return {
        "model_type": "bert",
        "architectures": [draw(st.sampled_from(names))],
        "vocab_size": draw(st.integers(3, 120)),
        "hidden_size": heads * width,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 90)),
        "max_position_embeddings": draw(st.integers(45, 64)),
        "type_vocab_size": draw(st.integers(1, 3)),
        "hidden_act": draw(st.sampled_from(("gelu", "relu", "gelu_new"))),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 0,
    }


@st.composite
def t5s(draw: st.DrawFn) -> dict[str, Any]:
    """A T5 of a few layers on either side."""
    return {
        "model_type": "t5",
        "architectures": list(HEADS["t5"]),
        "vocab_size": draw(st.integers(3, 120)),
        "d_model": 4 * draw(st.integers(1, 8)),
        "d_kv": 4 * draw(st.integers(1, 4)),
        "d_ff": draw(st.integers(1, 90)),
        "num_layers": draw(st.integers(1, 6)),
        "num_decoder_layers": draw(st.integers(1, 6)),
        "num_heads": draw(st.integers(1, 4)),
        "feed_forward_proj": draw(st.sampled_from(("relu", "gated-gelu", "gated-silu"))),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }


def built(config: hf.PretrainedConfig, dtype: str, attention: str) -> Any:
    """The class that the config names, with random weights."""
    assert config.architectures is not None
    cls = getattr(hf, config.architectures[0])
    return cls._from_config(config, dtype=DTYPES[dtype], attn_implementation=attention)


def encoding_peak(live: Any, batch: int, tokens: int, *, padded: bool = False) -> int:
    """Peak of one forward of an encoder."""
    ids = words(live.config, batch, tokens)
    mask = padding(batch, tokens) if padded else None
    with torch.no_grad(), LiveTensorMeter() as meter:
        out = live(ids, attention_mask=mask)
    del out
    return meter.peak_bytes


def seq2seq_peaks(live: Any, batch: int, encoded: int, tokens: int, *, steps: int) -> list[int]:
    """Peaks of a prefill of both stacks and the decode steps behind it."""
    read, ids = words(live.config, batch, encoded), words(live.config, batch, tokens)
    seen: list[int] = []
    with torch.no_grad(), LiveTensorMeter() as meter:
        out = live(input_ids=read, decoder_input_ids=ids, use_cache=True)
        seen.append(meter.peak_bytes)
        states = hf.modeling_outputs.BaseModelOutput(
            last_hidden_state=out.encoder_last_hidden_state
        )
        cache = out.past_key_values
        for _ in range(steps):
            del out
            meter.reset_peak()
            out = live(encoder_outputs=states, decoder_input_ids=ids[:, :1], past_key_values=cache)
            seen.append(meter.peak_bytes)
        del out
    return seen


def step_meter(
    live: Any,
    batch: int,
    encoded: int,
    tokens: int,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    low: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    listed: AbstractContextManager[Any] | None = None,
    padded: bool = False,
) -> LiveTensorMeter:
    """The meter after a step of which only the loss was kept.

    `low`: what autocast around the forward casts to; `listed`: what casts there besides.
    """
    labels = words(live.config, batch, tokens)
    read = words(live.config, batch, encoded)
    more: dict[str, Any] = {"use_cache": False} if live.config.is_encoder_decoder else {}
    if padded:
        more["attention_mask"] = padding(batch, encoded)
    with LiveTensorMeter() as meter:
        with torch.autocast("cpu", dtype=low, enabled=low is not None), listed or nullcontext():
            loss = live(read, labels=labels, **more).loss
        (loss if scaler is None else scaler.scale(loss)).backward()
        if optimizer is not None:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=True)
    return meter
