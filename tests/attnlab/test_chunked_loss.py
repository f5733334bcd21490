"""Chunked cross-entropy: the plain loss and its gradients, without the logits."""

import dataclasses

import pytest
import torch

import planner
from attnlab.chunked_loss import IGNORED, chunked_loss
from attnlab.training import next_token_loss
from attnlab.transformer import Transformer
from planner import ConfigError
from profiles.meters import LiveTensorMeter
from tests.attnlab.families import LLAMA
from tests.attnlab.trained import FEW, gradients, step, trainable

CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32
HEADS = (*FEW, "gemma", "cohere", "granite", "phi", "gptj, tied", "opt-350m", "bart")
"""Tied or not, with a scale, a soft cap, a bias, a narrower embedding, an added buffer."""


@pytest.mark.parametrize("chunk", [1, 5, 26, 99])
@pytest.mark.parametrize("family", HEADS)
def test_loss_and_gradients_equal_the_plain_ones(family, chunk, ids):
    ours = trainable(family)
    if ours.model.final_logits_bias:
        torch.nn.init.normal_(ours.final_logits_bias, generator=torch.Generator().manual_seed(0))
    expected, wanted = step(ours, ids), gradients(ours)
    torch.testing.assert_close(step(ours, ids, loss_chunk_tokens=chunk), expected, **CLOSE)
    for name, made in gradients(ours).items():
        if wanted[name] is None:
            assert made is None, name
        else:
            torch.testing.assert_close(made, wanted[name], **CLOSE, msg=name)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_bfloat16_is_as_near_to_float32_as_the_plain_loss_is(family, ids):
    exact = trainable(family)
    loss, wanted = step(exact, ids), gradients(exact)
    rounded = trainable(family, dtype=torch.bfloat16)
    plain_loss, plain = step(rounded, ids), gradients(rounded)
    chunked, made = step(rounded, ids, loss_chunk_tokens=7), gradients(rounded)
    assert (chunked - loss).abs() <= 1.5 * (plain_loss - loss).abs() + 1e-4
    for name in wanted:
        error, their_error = (
            (found[name].float() - wanted[name]).norm() / wanted[name].norm()
            for found in (made, plain)
        )
        assert error <= 1.5 * their_error + 1e-3, name


def drawn(model, B, T, dtype=torch.float32):
    """Hidden states, a head and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    V, h = model.vocab_size, model.hidden_size
    x, w = torch.randn(B, T, h, generator=generator), torch.randn(V, h, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, ::3] = IGNORED
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), labels


def wide(**more):
    config = dict(LLAMA, vocab_size=1_000, model_type="llama", architectures=["LlamaForCausalLM"])
    return planner.read_config(config | more)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [16, 64, 999])
def test_its_bytes_are_those_of_the_formula(chunk, dtype, cap):
    """N·h·e + V·h·e_w + C·V·(e + 4), where the logits are their own float32: C·V·4."""
    model = wide()
    if cap is not None:
        model = dataclasses.replace(model, final_logit_softcapping=cap)
    x, w, labels = drawn(model, 2, 80, dtype)
    with LiveTensorMeter() as meter:
        chunked_loss(x, w, None, labels, chunk_tokens=chunk, model=model)
    N, h, V, C, e = 160, 32, 1_000, min(chunk, 160), dtype.itemsize
    logits = C * V * (4 if dtype == torch.float32 and cap is None else e + 4)
    formula = N * h * e + V * h * e + logits
    assert formula <= meter.peak_bytes <= formula + 64 * N + C * h * e


@pytest.mark.parametrize("chunk", [16, 64])
def test_under_autocast_the_heads_copy_and_a_chunks_product_come_on_top(chunk):
    model = wide()
    x, w, labels = drawn(model, 2, 80)
    with LiveTensorMeter() as meter, torch.autocast("cpu", torch.bfloat16):
        chunked_loss(x, w, None, labels, chunk_tokens=chunk, model=model)
    N, h, V, C, e = 160, 32, 1_000, chunk, 2
    held = N * h * 4 + V * h * 4 + V * h * e  # gradients, the copy
    formula = held + max(C * V * (e + 4), C * V * e + V * h * e)
    assert formula <= meter.peak_bytes <= formula + 64 * N + C * h * (e + 4)


def test_the_peak_of_a_step_falls_by_the_logits():
    ids = torch.randint(1_000, (2, 60), generator=torch.Generator().manual_seed(0))
    ours = Transformer(wide(), dtype=torch.float32, device="cpu")
    peaks = []
    for chunk in (None, 4):
        with LiveTensorMeter() as meter:
            step(ours, ids, loss_chunk_tokens=chunk)
        peaks.append(meter.peak_bytes)
        gradients(ours)
    N, V, h = ids.numel(), 1_000, 32
    assert peaks[0] > 2 * N * V * 4  # log-probabilities and their gradient
    assert peaks[0] - peaks[1] > 2 * N * V * 4 - V * h * 4 - 4 * V * 4 - N * h * 4


def test_ignored_labels_count_for_nothing():
    model = wide()
    x, w, labels = drawn(model, 2, 9)
    chunked_loss(x, w, None, labels, chunk_tokens=4, model=model).backward()
    assert not x.grad[labels == IGNORED].any()
    assert x.grad[labels != IGNORED].any(-1).all()


def test_without_a_real_label_the_loss_is_no_number_as_the_plain_one():
    model = wide()
    x, w, labels = drawn(model, 1, 5)
    labels.fill_(IGNORED)
    loss = chunked_loss(x, w, None, labels, chunk_tokens=2, model=model)
    loss.backward()
    assert loss.isnan()
    assert next_token_loss(x @ w.T, labels).isnan()
    assert not x.grad.any()


def test_a_frozen_head_gets_no_gradient_and_no_place_for_one():
    model = wide()
    x, w, labels = drawn(model, 1, 8)
    w.requires_grad_(False)
    with LiveTensorMeter() as meter:
        loss = chunked_loss(x, w, None, labels, chunk_tokens=1, model=model)
    loss.backward()
    assert w.grad is None
    assert meter.peak_bytes < w.numel() * 4


def test_a_second_way_back_is_refused():
    model = wide()
    x, w, labels = drawn(model, 1, 5)
    loss = chunked_loss(x, w, None, labels, chunk_tokens=2, model=model)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("chunk", [0, -3, 2.5])
def test_a_chunk_of_no_token_is_refused(chunk, ids):
    with pytest.raises(ConfigError, match=r"loss_chunk_tokens=.* is not allowed: a whole number"):
        step(trainable("llama"), ids, loss_chunk_tokens=chunk)
