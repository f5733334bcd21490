"""Recurrent layers alone: states in place, padding that leaves no trace, what the planner says."""

from dataclasses import replace

import pytest
import torch

import planner
from attnlab.kv_cache import FixedShapeCache, KVCache
from attnlab.mixers import MIXERS, build_mixer
from attnlab.states import new_states
from attnlab.training import training_step
from attnlab.transformer import Transformer
from planner import ConfigError
from planner.layers import Norm
from planner.mixers.linear import GatedDeltaNet, KimiDelta
from planner.mixers.mamba import Mamba, Mamba2
from planner.mixers.recurrent import RGLRU, RWKV, ShortConv
from planner.runtimes.attnlab import RECURRENT
from tests.attnlab.families import FAMILIES
from tests.attnlab.test_families import twin
from tests.attnlab.test_training import shifted

h = 12
CPU = torch.device("cpu")
NORM = Norm(kind="rmsnorm", eps=1e-5)
DELTA = GatedDeltaNet(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
    linear_value_head_dim=5, linear_conv_kernel_dim=4, projections="fused",
)  # fmt: skip
SMALL = {
    "mamba": Mamba(
        intermediate_size=20, state_size=6, conv_kernel=4, time_step_rank=3, use_bias=True,
        use_conv_bias=True, inner_norms=True,
    ),
    "mamba2": Mamba2(
        num_heads=4, head_dim=5, n_groups=2, state_size=6, conv_kernel=4, use_conv_bias=True,
        use_bias=True, out_bias=True,
    ),
    "mamba2 without a norm": Mamba2(
        num_heads=4, head_dim=5, n_groups=1, state_size=6, conv_kernel=2, use_conv_bias=False,
        use_bias=False, out_bias=True, norm=False,
    ),
    "gated delta": DELTA,
    "gated delta, split": replace(DELTA, projections="split", allow_neg_eigval=True),
    "gated delta, separate": replace(DELTA, projections="separate"),
    "kimi delta": KimiDelta(linear_num_heads=3, linear_head_dim=4, linear_conv_kernel_dim=4),
    "lru": RGLRU(lru_width=20, num_attention_heads=4, conv1d_width=4),
    "short convolution": ShortConv(hidden_size=h, conv_kernel=3, conv_bias=True),
}  # fmt: skip


@pytest.fixture(params=SMALL)
def layer(request):
    """(what the planner says of it, the module)."""
    torch.manual_seed(0)
    module = build_mixer(SMALL[request.param], h, NORM, torch.float32)[1]
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return SMALL[request.param], module.requires_grad_(False)


def test_parameters_and_states_are_the_planners(layer):
    mixer, module = layer
    name = build_mixer(mixer, h, NORM, torch.float32)[0]
    built = {f"{name}.{p}": tuple(t.shape) for p, t in module.named_parameters()}
    assert built == {p.name: p.shape for p in mixer.parameters(h)}
    states = new_states(mixer, 3, torch.bfloat16, CPU)
    described = mixer.states(99)
    assert [t[0].numel() for t in states] == [state.elements for state in described]
    dtypes = {None: torch.bfloat16, "fp32": torch.float32}
    assert [t.dtype for t in states] == [dtypes[state.dtype] for state in described]


def test_passes_of_any_length_write_the_same_states_in_place(layer):
    mixer, module = layer
    x = torch.randn(2, 150, h)
    whole = new_states(mixer, 2, torch.float32, CPU)
    expected = module(x, whole, None)
    torch.testing.assert_close(module(x, None, None), expected, rtol=1e-4, atol=1e-5)
    states = new_states(mixer, 2, torch.float32, CPU)
    where = [t.data_ptr() for t in states]
    out = [module(part, states, None) for part in x.split([1, 2, 67, 1, 64, 15], dim=1)]
    torch.testing.assert_close(torch.cat(out, dim=1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states, whole, rtol=1e-4, atol=1e-5)
    assert [t.data_ptr() for t in states] == where


@pytest.mark.parametrize("tokens", [1, 7])
def test_padding_leaves_no_trace_even_if_it_is_nan(layer, tokens):
    mixer, module = layer
    states = new_states(mixer, 3, torch.float32, CPU)
    module(torch.randn(3, 5, h), states, None)
    before = [t.clone() for t in states]
    x = torch.randn(3, tokens, h)
    lengths = [tokens, tokens // 2, 0]
    real = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    out = module(x.masked_fill(~real[..., None], torch.nan), states, real)
    for b, n in enumerate(lengths):
        alone = tuple(t[b : b + 1].clone() for t in before)
        if n:
            expected = module(x[b : b + 1, :n], alone, None)
            torch.testing.assert_close(out[b : b + 1, :n], expected, rtol=1e-4, atol=1e-5)
            for state, single in zip(states, alone, strict=True):
                torch.testing.assert_close(state[b : b + 1], single, rtol=1e-4, atol=1e-5)
        else:
            assert all(torch.equal(t[b], s[0]) for t, s in zip(states, alone, strict=True))


def test_bfloat16_steps_stay_near_float32_over_500_of_them(layer):
    """The state is summed in float32: what bfloat16 rounds is each token's own."""
    mixer, module = layer
    narrow = build_mixer(mixer, h, NORM, torch.bfloat16)[1].requires_grad_(False)
    narrow.load_state_dict(module.state_dict())
    x = torch.randn(1, 500, h).bfloat16()
    exact = module(x.float(), None, None)
    states = new_states(mixer, 1, torch.bfloat16, CPU)
    steps = torch.cat([narrow(token, states, None) for token in x.split(1, dim=1)], dim=1)
    scanned = narrow(x, None, None)
    errors = [
        ((made.float() - exact)[:, -100:].square().mean() / exact.square().mean()).sqrt().item()
        for made in (steps, scanned)
    ]
    print(f"{mixer.kind}: steps {errors[0]:.1e}, scan {errors[1]:.1e} of the outputs' RMS")
    assert errors[0] < 1.5 * errors[1] + 2e-3
    assert states[-1].dtype == (torch.float32 if len(states) > 1 else torch.bfloat16)


def test_a_step_over_fixed_shapes_goes_on_from_a_prefill(pairs, ids):
    for family in ("mamba2", "qwen3_next"):
        ours = pairs(family)[1]
        static = KVCache(ours.model, batch=2, capacity_tokens=13, dtype=torch.float32, device="cpu")
        ours(ids[:, :9], cache=static)
        fixed = FixedShapeCache(
            ours.model, batch=2, capacity_tokens=13, dtype=torch.float32, device="cpu"
        )
        fixed.take(static)
        where = [t.data_ptr() for states in fixed.states for t in states]
        steps = [ours(token, cache=fixed) for token in ids[:, 9:].split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), ours(ids)[:, 9:], rtol=1e-4, atol=2e-5)
        assert [t.data_ptr() for states in fixed.states for t in states] == where


def test_a_float32_stream_is_nearer_than_one_that_is_rounded(pairs, ids):
    ours = pairs("mamba2")[1]
    exact, errors = ours(ids), []
    for wide in (True, False):
        rounded = twin(ours, dtype=torch.bfloat16)
        rounded.model = replace(ours.model, residual_in_fp32=wide)
        errors.append((rounded(ids).float() - exact).square().mean().sqrt())
    assert ours.model.residual_in_fp32
    assert errors[0] < errors[1]


@pytest.mark.parametrize("family", ["jamba", "bamba", "qwen3_next", "recurrent_gemma"])
def test_checkpointing_changes_no_gradient(pairs, ids, family):
    ours, gradients = twin(pairs(family)[1]).requires_grad_(True), []
    for checkpointing in ("none", "full"):
        training_step(ours, ids, shifted(ids), checkpointing=checkpointing)
        gradients.append([p.grad for p in ours.parameters()])
        ours.zero_grad(set_to_none=True)
    assert all(map(torch.equal, *gradients))


def test_what_runs_is_what_the_planner_says_runs():
    assert set(RECURRENT) == set(MIXERS)
    rwkv = RWKV(attention_hidden_size=h, intermediate_size=h)
    with pytest.raises(ConfigError, match="attention=RWKV does not run in attnlab"):
        build_mixer(rwkv, h, NORM, torch.float32)


@pytest.mark.parametrize("family", ["mamba2", "bamba", "qwen3_next", "kimi_linear"])
def test_caches_are_counted_and_passes_are_refused_until_they_are_planned(family):
    model = planner.read_config(FAMILIES[family]().to_dict())
    settings = dict(batch=1, context_tokens=16, dtype="fp32", runtime="attnlab")
    assert planner.kv_cache_bytes(model, **settings) > 0
    work = planner.Inference(batch=1, prompt_tokens=8, output_tokens=8)
    deploy = planner.Deployment(gpu="h200", runtime="attnlab")
    with pytest.raises(
        ConfigError, match=r"runtime=attnlab .*plan .* yet: .*kv_cache_bytes are known"
    ):
        planner.estimate(model, work, deploy)


def test_a_prefix_in_both_directions_is_refused(pairs, ids):
    with pytest.raises(ConfigError, match="prefix_tokens=3 is not allowed: 0, layers recur"):
        pairs("bamba")[1](ids, prefix_tokens=3)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("zamba2", "does not run norms of other names"),
        ("falcon_h1", "does not run blocks with parts of their own"),
        ("minimax", "does not run lightning attention layers"),
    ],
)
def test_what_recurs_in_other_ways_is_refused(model_type, message):
    model = planner.read_config({"model_type": model_type})
    with pytest.raises(ConfigError, match=message):
        Transformer(model, dtype=torch.float32, device="meta")
