"""Adapters against peft's: loss, gradients, merging."""

import warnings

import peft
import pytest
import torch

import planner
from attnlab.lora import adapters, add_adapters, merge, unmerge
from planner import ConfigError
from planner.trained.lora import adapters as described
from tests.attnlab.encoder_decoders import inputs_of, padding_mask
from tests.attnlab.trained import gradients, step, theirs_of, trainable

CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32
TARGETS = {
    "llama": "all-linear",
    "gemma2": ("q_proj", "down_proj"),
    "gpt2": "all-linear",
    "opt-350m": "all-linear",
    "falcon-7b": "all-linear",
    "mixtral": ("q_proj", "o_proj"),
    "deepseek_v3": ("q_a_proj", "kv_b_proj", "o_proj"),
    "mamba2": ("in_proj",),
    "t5": ("q", "v", "wo"),
}
FAMILIES = list(TARGETS)


def pair(family, dtype=torch.float32, adapter_dtype=None, alpha=3.0):
    """That of peft, every A and B drawn, and ours with the same."""
    theirs, ours = theirs_of(family, dtype), trainable(family, dtype)
    targets = TARGETS[family]
    config = peft.LoraConfig(
        r=3, lora_alpha=alpha, target_modules=targets if isinstance(targets, str) else [*targets]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, which peft turns by itself
        theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=adapter_dtype is None)
    lora = planner.LoRA(rank=3, targets=targets, dtype=adapter_dtype)
    add_adapters(ours, lora, alpha=alpha)
    live, generator = dict(theirs.named_parameters()), torch.Generator().manual_seed(0)
    beside = {}
    for name, here in adapters(ours).items():
        there = beside[name] = live[their_name(ours.model, name)]
        drawn = torch.randn(here.shape, generator=generator) * 0.2
        for p in (here, there):
            assert p.requires_grad
            assert p.dtype == here.dtype
            p.data.copy_(drawn)
    return theirs, ours, beside


def their_name(model, name):
    base, side = name.removesuffix(".weight").rsplit(".", 1)
    module = model.checkpoint_name(f"{base}.weight").removesuffix(".weight")
    return f"base_model.model.{module}.{side}.default.weight"


def their_loss(theirs, ours, ids):
    labels, given = ids, dict(input_ids=ids)
    if ours.reads_encoder:
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        inputs, mask = inputs_of(ours.model), padding_mask([9, 4], 9)
        given = dict(input_ids=inputs, attention_mask=mask, decoder_input_ids=ids)
    return theirs(**given, labels=labels, use_cache=False).loss


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_peft(family, ids):
    ids = ids.masked_fill(ids == 1, 2)  # opt's padding
    theirs, ours, beside = pair(family)
    expected = their_loss(theirs, ours, ids)
    expected.backward()
    torch.testing.assert_close(step(ours, ids), expected.detach(), **CLOSE)
    for name, made in gradients(ours).items():
        if name not in beside:
            assert made is None, name
        else:
            torch.testing.assert_close(made, beside[name].grad, **CLOSE)
    trained = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert trained == {their_name(ours.model, name) for name in beside}


@pytest.mark.parametrize("adapter_dtype", [None, "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bfloat16_they_are_as_near_to_float32_as_pefts(family, adapter_dtype, ids):
    exact = pair(family)[1]
    step(exact, ids)
    wanted = gradients(exact)
    theirs, ours, beside = pair(family, torch.bfloat16, adapter_dtype)
    kept = torch.float32 if adapter_dtype is None else torch.bfloat16
    assert {p.dtype for p in beside.values()} == {kept}
    their_loss(theirs, ours, ids).backward()
    step(ours, ids)
    made = gradients(ours)

    def error(found):
        return sum((found[n].float() - wanted[n]).square().sum() for n in beside).sqrt()

    assert error(made) <= 1.5 * error({n: p.grad for n, p in beside.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_the_planner_counts(family):
    ours = pair(family)[1]
    lora = planner.LoRA(rank=3, targets=TARGETS[family])
    built = {name: tuple(p.shape) for name, p in adapters(ours).items()}
    assert built == {p.name: p.shape for p in described(ours.model, lora)}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == set(built)
    names = {name for name, _ in ours.named_parameters()} - set(built)
    assert names == {p.name for p in ours.model.parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_the_first_forward_is_the_models_own(family, ids):
    ours = trainable(family)
    expected = ours(ids)
    add_adapters(ours, planner.LoRA(targets=TARGETS[family]))
    assert torch.equal(ours(ids), expected)


@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_merged_they_make_the_same_logits_and_unmerged_the_same_weights(family, ids):
    ours = pair(family)[1]
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    expected = ours(ids)
    merge(ours)
    merge(ours)  # nothing is added twice
    torch.testing.assert_close(ours(ids), expected, rtol=1e-3, atol=1e-4)
    changed = {n for n, p in ours.named_parameters() if not torch.equal(p, before[n])}
    sides = {name.rpartition(".lora_")[0] for name in adapters(ours)}
    assert changed == {f"{name}.weight" for name in sides}
    unmerge(ours)
    unmerge(ours)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, before[name])


def test_merging_equals_pefts():
    theirs, ours, _ = pair("llama")
    merge(ours)
    merged = theirs.merge_and_unload().state_dict()
    for name, p in ours.named_parameters():
        if ".lora_" not in name:
            torch.testing.assert_close(p, merged[ours.model.checkpoint_name(name)])


def test_absorbed_attention_sees_the_adapters_of_what_it_absorbs(ids):
    ours = pair("deepseek_v3")[1]
    logits = []
    for latent in ("expanded", "absorbed"):
        for layer in ours.layers:
            layer.self_attn.latent = latent
        logits.append(ours(ids))
    torch.testing.assert_close(*logits, **CLOSE)


@pytest.mark.parametrize("how", [{"checkpointing": "full"}, {"checkpointing": "selective"}])
def test_checkpointing_changes_no_gradient(how, ids):
    ours = pair("llama")[1]
    step(ours, ids)
    wanted = gradients(ours)
    step(ours, ids, **how)
    made = gradients(ours)
    assert all(torch.equal(made[name], wanted[name]) for name in adapters(ours))


def test_an_optimizer_moves_the_adapters_alone(ids):
    ours = pair("llama")[1]
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    adamw = torch.optim.AdamW(adapters(ours).values(), lr=0.01)
    losses = [step(ours, ids, adamw, loss_chunk_tokens=5) for _ in range(3)]
    assert losses[-1] < losses[0]
    moved = {n for n, p in ours.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(adapters(ours))


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ("q_proj", "wq"), "lora.targets: 'wq' is no linear layer of llama"),
        ("mixtral", "all-linear", "lora.targets='all-linear' of mixtral is not planned yet"),
    ],
)
def test_targets_that_the_model_lacks_are_refused(family, targets, message):
    ours = trainable(family)
    with pytest.raises(ConfigError, match=message):
        add_adapters(ours, planner.LoRA(targets=targets))
    assert all(p.requires_grad for p in ours.parameters())


def test_a_second_set_is_refused():
    ours = pair("llama")[1]
    with pytest.raises(ConfigError, match="there are adapters already"):
        add_adapters(ours, planner.LoRA())
