"""BERT and T5 of transformers: peaks to the byte, over random small configs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from profiles.meters import module_bytes
from tests.planner.small_decoders import CHECKPOINTING, DTYPES, checkpoint, described
from tests.planner.small_encoders import (
    berts,
    built,
    encoding_peak,
    seq2seq_peaks,
    step_meter,
    t5s,
)
from tests.properties import examples

SIZES = st.integers(1, 45)
ATTENTIONS = st.sampled_from(("eager", "sdpa"))


def held(live, config, work, dtype, attention):
    """Storages that the estimate says the passes create."""
    deploy = planner.Deployment(gpu="cpu", dtype=dtype, attention=attention)
    model = planner.load_model(config)
    memory = planner.estimate(model, work, deploy).memory
    assert memory.weights_bytes == module_bytes(live)
    return memory.peak_live_bytes - memory.weights_bytes - memory.optimizer_bytes


def trained(config, dtype, attention, how):
    live = built(described(config), dtype, attention).train()
    checkpoint(live, how)
    return live


@examples(20, fuzz=30)
@given(
    config=berts(),
    dtype=st.sampled_from(tuple(DTYPES)),
    attention=ATTENTIONS,
    batch=st.integers(1, 3),
    tokens=SIZES,
    padded=st.booleans(),
)
def test_a_forward_of_bert_is_exact(config, dtype, attention, batch, tokens, padded):
    live = built(described(config), dtype, attention).eval()
    work = planner.Inference(batch=batch, prompt_tokens=tokens, padded=padded)
    seen = encoding_peak(live, batch, tokens, padded=padded)
    assert held(live, config, work, dtype, attention) == seen


@examples(20, fuzz=30)
@given(
    config=berts(headed=True),
    dtype=st.sampled_from(tuple(DTYPES)),
    attention=ATTENTIONS,
    batch=st.integers(1, 3),
    tokens=SIZES,
    how=CHECKPOINTING,
    padded=st.booleans(),
)
def test_a_step_of_bert_is_exact(config, dtype, attention, batch, tokens, how, padded):
    live = trained(config, dtype, attention, how)
    meter = step_meter(live, batch, tokens, tokens, padded=padded)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        padded=padded,
        optimizer=None,
        checkpointing=how[0],
        checkpoint_every=how[1],
    )
    assert held(live, config, work, dtype, attention) == meter.peak_bytes


@examples(20, fuzz=30)
@given(
    config=t5s(),
    dtype=st.sampled_from(tuple(DTYPES)),
    attention=ATTENTIONS,
    batch=st.integers(1, 3),
    encoded=SIZES,
    tokens=SIZES,
    steps=st.integers(0, 3),
)
def test_a_generation_of_t5_is_exact(config, dtype, attention, batch, encoded, tokens, steps):
    live = built(described(config), dtype, attention).eval()
    work = planner.Inference(
        batch=batch, prompt_tokens=tokens, output_tokens=1 + steps, encoder_tokens=encoded
    )
    seen = seq2seq_peaks(live, batch, encoded, tokens, steps=steps)
    assert held(live, config, work, dtype, attention) == max(seen)


@examples(20, fuzz=30)
@given(
    config=t5s(),
    dtype=st.sampled_from(tuple(DTYPES)),
    attention=ATTENTIONS,
    batch=st.integers(1, 3),
    encoded=SIZES,
    tokens=SIZES,
    how=CHECKPOINTING,
)
def test_a_step_of_t5_is_exact(config, dtype, attention, batch, encoded, tokens, how):
    live = trained(config, dtype, attention, how)
    meter = step_meter(live, batch, encoded, tokens)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        encoder_tokens=encoded,
        optimizer=None,
        checkpointing=how[0],
        checkpoint_every=how[1],
    )
    assert held(live, config, work, dtype, attention) == meter.peak_bytes


T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 256,
    "d_kv": 32,
    "d_ff": 1024,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 8,
    "vocab_size": 1024,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("impl", ["foreach", "fused", "for-loop"])
@pytest.mark.parametrize(
    "config",
    [
        T5 | {"vocab_size": 50, "d_model": 16, "d_ff": 24},
        BERT,
        BERT | {"tie_word_embeddings": False},  # a bias of its head is never read
    ],
)
def test_a_step_with_adamw_adds_up(config, impl):
    live = trained(config, "bf16", "sdpa", ("none", 1))
    ways = {"foreach": impl == "foreach", "fused": impl == "fused"}
    adamw = torch.optim.AdamW(live.parameters(), **ways)
    step_meter(live, 2, 30, 30, adamw)  # makes the states
    meter = step_meter(live, 2, 30, 30, adamw)
    states = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    work = planner.Training(batch=2, sequence_tokens=30, optimizer_impl=impl)
    assert held(live, config, work, "bf16", "sdpa") == meter.peak_bytes
    memory = planner.estimate(
        planner.load_model(config), work, planner.Deployment(gpu="cpu", dtype="bf16")
    ).memory
    assert memory.optimizer_bytes == states


@pytest.mark.parametrize(
    ("dtype", "attention", "tokens", "checkpointing", "train_peak", "infer_peak"),
    [
        ("fp32", "eager", 128, "none", 105_144_328, 11_927_552),
        ("fp32", "sdpa", 128, "none", 101_572_616, 10_747_904),
        ("bf16", "eager", 128, "none", 58_220_548, 5_963_776),
        ("bf16", "sdpa", 128, "none", 63_823_876, 5_373_952),
        ("fp32", "eager", 128, "full", 50_748_424, 11_927_552),
        ("fp32", "sdpa", 128, "full", 50_748_424, 10_747_904),
        ("bf16", "eager", 128, "full", 25_965_060, 5_963_776),
        ("bf16", "sdpa", 128, "full", 26_882_564, 5_373_952),
        ("fp32", "eager", 256, "none", 234_930_184, 28_835_840),
        ("fp32", "sdpa", 256, "none", 220_577_800, 23_592_960),
        ("bf16", "eager", 256, "none", 129_548_292, 14_417_920),
        ("bf16", "sdpa", 256, "none", 145_604_612, 11_796_480),
    ],
)
def test_t5_holds_what_others_measured(
    dtype, attention, tokens, checkpointing, train_peak, infer_peak
):
    """Two sequences on a CPU, measured apart from this project with its own meter."""
    model, deploy = (
        planner.load_model(T5),
        planner.Deployment(gpu="cpu", dtype=dtype, attention=attention),
    )
    work = planner.Training(
        batch=2, sequence_tokens=tokens, optimizer=None, checkpointing=checkpointing
    )
    memory = planner.estimate(model, work, deploy).memory
    assert memory.peak_live_bytes - memory.weights_bytes == train_peak
    work = planner.Inference(batch=2, prompt_tokens=tokens)
    memory = planner.estimate(model, work, deploy).memory
    assert memory.peak_live_bytes - memory.weights_bytes == infer_peak


def test_the_last_logits_of_t5_are_all_of_them():
    model, deploy = planner.load_model(T5), planner.Deployment(gpu="cpu")
    every, last = (
        planner.estimate(
            model, planner.Inference(batch=2, prompt_tokens=9, logits=logits), deploy
        ).memory.peak_live_bytes
        for logits in ("all", "last")
    )
    assert every == last


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (BERT | {"architectures": ["BertForSequenceClassification"]}, "this head"),
        (BERT | {"architectures": ["BertForPreTraining"]}, "this head"),
        (T5 | {"architectures": ["T5EncoderModel"]}, "head for words"),
        (T5 | {"architectures": ["T5Model"]}, "head for words"),
    ],
)
def test_classes_that_are_not_written_are_refused(config, named):
    work = planner.Inference(batch=1, prompt_tokens=8)
    with pytest.raises(ConfigError, match=named):
        planner.estimate(planner.load_model(config), work, planner.Deployment(gpu="cpu"))


def test_an_encoder_runs_once_and_a_pooler_is_not_trained():
    deploy = planner.Deployment(gpu="cpu")
    work = planner.Inference(batch=1, prompt_tokens=8, output_tokens=2)
    with pytest.raises(ConfigError, match="output_tokens=2 is not allowed: 1, bert"):
        planner.estimate(planner.load_model(BERT), work, deploy)
    pooled = planner.load_model(BERT | {"architectures": ["BertModel"]})
    with pytest.raises(ConfigError, match="training of model_type=bert"):
        planner.estimate(pooled, planner.Training(batch=1, sequence_tokens=8), deploy)


def test_a_float16_t5_is_refused():
    deploy = planner.Deployment(gpu="cpu", dtype="fp16")
    with pytest.raises(ConfigError, match="dtype='fp16' is not planned for t5"):
        planner.estimate(
            planner.load_model(T5), planner.Inference(batch=1, prompt_tokens=8), deploy
        )


def test_torchs_allocator_finds_every_cache_of_t5_where_the_last_step_left_it():
    """Everything that a generation makes is there at the end or was given back: nothing is lost."""
    deploy = planner.Deployment(gpu="h200", dtype="bf16")
    work = planner.Inference(batch=4, prompt_tokens=40, output_tokens=12, encoder_tokens=700)
    memory = planner.estimate(planner.load_model(T5), work, deploy).memory
    live = memory.peak_live_bytes + 32 * 2**20  # cuBLAS
    assert live <= memory.peak_allocated_bytes <= live * 1.02
