"""Each recurrence's scan against its step token by token, and against the functions of the classes.

The largest difference is printed in units of the largest output.
"""

import pytest
import torch
from torch.nn.functional import conv1d, normalize, pad
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from attnlab import recurrences

STEPS = 500
H, G, P, N = 4, 2, 6, 10  # heads, groups, channels of a head, state
K, V = 8, 6
FORMS = {
    "ssd": (recurrences.ssd_reference, recurrences.ssd_scan),
    "gated delta": (recurrences.gated_delta_reference, recurrences.gated_delta_scan),
    "gated delta by channel": (recurrences.gated_delta_reference, recurrences.gated_delta_scan),
    "selective": (recurrences.selective_reference, recurrences.selective_scan),
}


def drawn(kind, tokens=STEPS, batch=2, seed=0):
    """(what does not change, inputs over time, a state before them)."""
    torch.manual_seed(seed)
    rand = lambda *shape: torch.rand(batch, tokens, *shape)  # noqa: E731
    randn = lambda *shape: torch.randn(batch, tokens, *shape)  # noqa: E731
    if kind == "ssd":
        inputs = randn(H, P), rand(H), randn(G, N), randn(G, N)
        return (-2 * torch.rand(H),), inputs, torch.randn(batch, H, P, N)
    if kind == "selective":
        inputs = randn(P), rand(P), randn(N), randn(N)
        return (-2 * torch.rand(P, N),), inputs, torch.randn(batch, P, N)
    q, k = normalize(randn(H, K), dim=-1), normalize(randn(H, K), dim=-1)
    g = -rand(H, K if "channel" in kind else 1)
    return (), (q, k, randn(H, V), g, 2 * rand(H)), torch.randn(batch, H, K, V)


def worst(made, expected):
    return ((made - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, STEPS])
@pytest.mark.parametrize("kind", FORMS)
def test_a_scan_equals_the_step_500_times(kind, chunk):
    reference, scan = FORMS[kind]
    fixed, inputs, state = drawn(kind)
    expected, end = reference(*fixed, *inputs, state)
    out, last = scan(*fixed, *inputs, state, chunk=chunk)
    print(f"{kind}, chunks of {chunk}: {worst(out, expected):.1e}, state {worst(last, end):.1e}")
    assert worst(out, expected) < 2e-5
    assert worst(last, end) < 2e-5
    assert {out.dtype, last.dtype} == {torch.float32}


@pytest.mark.parametrize("lengths", [[1, 499], [63, 1, 64, 65, 307], [250, 250]])
@pytest.mark.parametrize("kind", FORMS)
def test_a_scan_may_stop_anywhere_and_go_on_from_its_state(kind, lengths):
    scan = FORMS[kind][1]
    fixed, inputs, state = drawn(kind)
    whole, end = scan(*fixed, *inputs, state)
    parts = []
    for piece in zip(*(t.split(lengths, dim=1) for t in inputs), strict=True):
        out, state = scan(*fixed, *piece, state)
        parts.append(out)
    assert worst(torch.cat(parts, dim=1), whole) < 2e-5
    assert worst(state, end) < 2e-5


@pytest.mark.parametrize("kind", FORMS)
def test_a_token_without_step_or_decay_leaves_the_state_bit_for_bit(kind):
    scan = FORMS[kind][1]
    fixed, inputs, state = drawn(kind, tokens=9)
    still = [3, 4] if "delta" in kind else [1]
    inputs = tuple(torch.zeros_like(t) if i in still else t for i, t in enumerate(inputs))
    assert torch.equal(scan(*fixed, *inputs, state)[1], state)


@pytest.mark.parametrize("kind", FORMS)
def test_gradients_of_a_scan_equal_those_of_the_steps(kind):
    made = []
    for form in FORMS[kind]:
        fixed, inputs, state = drawn(kind, tokens=70)
        leaves = [t.requires_grad_() for t in (*fixed, *inputs, state)]
        out, last = form(*leaves)
        made.append(torch.autograd.grad(out.square().mean() + last.square().mean(), leaves))
    for scanned, stepped in zip(*reversed(made), strict=True):
        torch.testing.assert_close(scanned, stepped, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", FORMS)
def test_decays_that_forget_everything_overflow_nowhere(kind):
    """e^−1000 between neighbours: its inverse is no float32."""
    reference, scan = FORMS[kind]
    fixed, inputs, state = drawn(kind, tokens=100)
    if "delta" in kind:
        inputs = (*inputs[:3], inputs[3] * 1000, inputs[4])
    else:
        fixed = (fixed[0] * 1000,)
    out, last = scan(*fixed, *inputs, state)
    expected, end = reference(*fixed, *inputs, state)
    assert out.isfinite().all()
    assert worst(out, expected) < 1e-4
    assert worst(last, end) < 1e-4


@pytest.mark.parametrize("kind", FORMS)
def test_autocast_rounds_no_scan(kind):
    scan = FORMS[kind][1]
    fixed, inputs, state = drawn(kind, tokens=70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = scan(*fixed, *inputs, state)
    for made, exact in zip(rounded, scan(*fixed, *inputs, state), strict=True):
        assert torch.equal(made, exact)


def test_ssd_equals_mamba_2_of_transformers():
    (A,), (x, dt, B, C), state = drawn("ssd")
    theirs = mamba2_chunk_scan(
        x, dt, A, B, C, chunk_size=32, initial_states=state, return_final_states=True
    )
    for made, expected in zip(recurrences.ssd_scan(A, x, dt, B, C, state), theirs, strict=True):
        assert worst(made, expected) < 2e-5


@pytest.mark.parametrize("kind", ["gated delta", "gated delta by channel"])
def test_the_delta_rule_equals_that_of_transformers(kind):
    _, (q, k, v, g, beta), state = drawn(kind)
    settings = dict(beta=beta, initial_state=state, output_final_state=True)
    if "channel" in kind:
        theirs = chunk_kimi_delta_attention(q, k, v, g=g, **settings)
    else:
        theirs = torch_chunk_gated_delta_rule(q, k, v, g=g[..., 0], **settings)
    ours = recurrences.gated_delta_scan(q * K**-0.5, k, v, g, beta, state)
    for made, expected in zip(ours, theirs, strict=True):
        assert worst(made, expected) < 2e-5


def test_the_selective_scan_equals_mamba_of_transformers():
    (A,), (x, dt, B, C), state = drawn("selective")
    theirs = mamba_selective_scan(*(t.mT for t in (x, dt)), A, B.mT, C.mT, return_last_state=True)
    ours = recurrences.selective_scan(A, x, dt, B, C, torch.zeros_like(state))
    assert worst(ours[0], theirs[0].mT) < 2e-5
    assert worst(ours[1], theirs[1]) < 2e-5


@pytest.mark.parametrize("width", [1, 3, 4])
def test_a_convolution_in_pieces_equals_one_with_zeros_before(width):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 23, 5), torch.randn(5, 1, width), torch.randn(5)
    expected = conv1d(pad(x.mT, (width - 1, 0)), weight, bias, groups=5).mT
    torch.testing.assert_close(recurrences.causal_conv(x, weight, bias, None, None), expected)
    state, pieces = torch.zeros(2, 5, width), [1, 2, 1, 9, 3, 7]
    where = state.data_ptr()
    out = [recurrences.causal_conv(t, weight, bias, state, None) for t in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(out, dim=1), expected)
    assert torch.equal(state, x.mT[..., -width:])
    assert state.data_ptr() == where


def test_a_convolutions_state_takes_the_real_inputs_alone():
    x, weight = torch.randn(3, 6, 5), torch.randn(5, 1, 4)
    state = torch.randn(3, 5, 4)
    before = state.clone()
    real = torch.arange(6) < torch.tensor([6, 2, 0])[:, None]
    recurrences.causal_conv(x, weight, None, state, real)
    assert torch.equal(state[0], x[0].mT[:, -4:])
    assert torch.equal(state[1], torch.cat((before[1, :, 2:], x[1, :2].mT), dim=1))
    assert torch.equal(state[2], before[2])
