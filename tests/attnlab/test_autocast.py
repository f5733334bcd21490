"""Autocast and accumulation: as near as transformers' autocast, and the whole batch's step."""

import pytest
import torch

import planner
from attnlab.lora import adapters, add_adapters
from planner import ConfigError
from tests.attnlab.families import V
from tests.attnlab.test_lora import their_loss
from tests.attnlab.trained import FEW, gradients, step, theirs_of, trainable

FAMILIES = (*FEW, "opt-350m", "bloom", "gpt_oss", "qwen3_next", "bart")
DRAWS = [torch.randint(3, V, (2, 13), generator=torch.Generator().manual_seed(n)) for n in range(4)]


def deviations(found, exact):
    """(of the loss, of all gradients) from those of float32."""
    squares = [
        (found[1][name].float() - g).square().sum() for name, g in exact[1].items() if g is not None
    ]
    return torch.stack([(found[0] - exact[0]).abs(), sum(squares).sqrt()])


def their_step(theirs, ours, ids):
    with torch.autocast("cpu", torch.bfloat16):
        loss = their_loss(theirs, ours, ids)
    loss.backward()
    live, made = dict(theirs.named_parameters()), {}
    pairs = zip(ours.model.parameters(), ours.model.checkpoint_parameters(), strict=True)
    for here, there in pairs:
        gradient = live[there.name].grad
        turned = there.transposed and not here.transposed
        made[here.name] = gradient.T if turned else gradient
    theirs.zero_grad()
    return loss.detach(), made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 7])
def test_autocast_is_as_near_to_float32_as_transformers(family, chunk):
    """By the geometric mean over batches: the side of a corner that a number falls on is chance."""
    ours, theirs, errors = trainable(family), theirs_of(family), []
    for ids in DRAWS:
        exact = step(ours, ids), gradients(ours)
        made = step(ours, ids, precision="autocast", loss_chunk_tokens=chunk), gradients(ours)
        assert {g.dtype for g in made[1].values() if g is not None} == {torch.float32}
        found = (made, their_step(theirs, ours, ids))
        errors.append(torch.stack([deviations(it, exact) for it in found]))
    (loss, gradient), (their_loss, their_gradient) = torch.stack(errors).log().mean(0).exp()
    assert gradient <= 1.5 * their_gradient
    assert loss <= 1.5 * their_loss + 1e-3 * exact[0]  # a quarter of what bfloat16 rounds it to


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_checkpointing_computes_the_same_under_autocast(family, checkpointing, ids):
    ours = trainable(family)
    expected, wanted = step(ours, ids, precision="autocast"), gradients(ours)
    loss = step(ours, ids, precision="autocast", checkpointing=checkpointing)
    assert torch.equal(loss, expected)
    for name, made in gradients(ours).items():
        torch.testing.assert_close(made, wanted[name], rtol=1e-6, atol=1e-7, msg=name)


def test_products_are_bfloat16_and_the_residual_stream_is_not(ids):
    ours, seen = trainable("llama"), {}
    for name in ("layers.0", "layers.0.self_attn.q_proj"):
        ours.get_submodule(name).register_forward_hook(
            lambda module, given, out, name=name: seen.update({name: out.dtype})
        )
    step(ours, ids, precision="autocast")
    assert [*seen.values()] == [torch.bfloat16, torch.float32]


def test_rounded_weights_are_refused(ids):
    ours = trainable("llama", dtype=torch.bfloat16)
    message = r"precision=autocast is not allowed with weights of torch.bfloat16 to train"
    with pytest.raises(ConfigError, match=message):
        step(ours, ids, precision="autocast")


def test_adapters_in_float32_train_beside_rounded_weights(ids):
    ours = trainable("llama", dtype=torch.bfloat16)
    add_adapters(ours, planner.LoRA(rank=2))
    step(ours, ids, precision="autocast")
    assert all(p.grad.dtype == torch.float32 for p in adapters(ours).values())


def test_an_unknown_precision_is_refused(ids):
    with pytest.raises(ConfigError, match="precision='half' is not allowed: one of pure, autocast"):
        step(trainable("llama"), ids, precision="half")


@pytest.mark.parametrize("family", ["llama", "mixtral", "mamba2", "t5"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_accumulated_gradients_are_those_of_the_whole_batch(family, chunk, ids):
    """Also where the parts have labels of unlike number: the mean is over all of them."""
    ours = trainable(family)
    labels = ids.clone()
    labels[0, :9] = -100
    expected, wanted = step(ours, ids, labels=labels), gradients(ours)
    how = dict(accumulation_steps=2, loss_chunk_tokens=chunk, labels=labels)
    torch.testing.assert_close(step(ours, ids, **how), expected)
    for name, made in gradients(ours).items():
        torch.testing.assert_close(made, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_parts_that_are_not_equal_are_refused(ids):
    with pytest.raises(ConfigError, match="accumulation_steps=3 is not allowed with 2 sequences"):
        step(trainable("llama"), ids, accumulation_steps=3)
