"""Layers' own rows of kernels, against transformers' code and a loop over experts."""

import pytest
import torch
from torch.nn.functional import silu

from profiles.microbench.composite_ops import chunk_scan, experts


def test_a_scan_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.bamba.modeling_bamba")
    batch, T, H, P, N, chunk = 2, 12, 3, 4, 5, 4
    x, dt = torch.randn(batch, T, H, P), torch.randn(batch, T, H)
    A, D, bias = -torch.rand(H), torch.randn(H), torch.randn(H)
    B, C = torch.randn(batch, T, 1, N), torch.randn(batch, T, 1, N)
    y, state = chunk_scan(x, dt, A, B, C, D, bias, chunk)
    expected = modeling.mamba2_chunk_scan(
        x, dt, A, B, C, chunk, D=D, dt_bias=bias, dt_softplus=True, return_final_states=True
    )
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(state, expected[1])


def test_each_token_is_the_weighted_sum_of_its_experts():
    tokens, h, width, E, k = 5, 16, 8, 6, 2
    x, logits = torch.randn(tokens, h), torch.randn(tokens, E)
    gate_up, down = torch.randn(E, 2 * width, h), torch.randn(E, h, width)
    out = experts(x, logits, gate_up, down, k)
    scores = logits.softmax(-1)
    for token in range(tokens):
        expected = torch.zeros(h)
        for pick in scores[token].topk(k).indices.tolist():
            gate, up = (gate_up[pick] @ x[token]).chunk(2)
            expected += scores[token, pick] * (down[pick] @ (silu(gate) * up))
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-4)
