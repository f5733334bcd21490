"""The kernels of a state-space scan: run for real, and put together as transformers does."""

import torch

from profiles.microbench import costs
from profiles.microbench.buffers import Buffers
from profiles.microbench.ops import Preparer
from profiles.microbench.point import OpPoint
from profiles.microbench.scan_points import CALIBRATION, HELD_OUT, scan_points

HEADS = {"batch": 2, "chunks": 3, "chunk": 8, "heads": 4}


class Given(Buffers):
    """Buffers that hand out what the test gave them."""

    def __init__(self, *tensors):
        super().__init__(device=torch.device("cpu"), pool_bytes=0)
        self.tensors = list(tensors)

    def take(self, dtype, *shape):
        tensor = self.tensors.pop(0)
        assert tensor.shape == shape
        return tensor


def ran(op, shape, *tensors, family="bandwidth", dtype="fp32"):
    point = OpPoint(family=family, op=op, shape=shape, dtype=dtype)
    return Preparer(Given(*tensors)).prepare(point)()


def test_decays_masked_summed_and_masked_again_are_sums_of_segments():
    """segment_sum[l, s] = x[s + 1] + … + x[l], −∞ above the diagonal."""
    steps = torch.randn(2, 3, 8, 4)
    x = steps.permute(0, 3, 1, 2)
    sums = ran("cumsum_pairs", HEADS, ran("mask_expanded", HEADS, steps))
    for to in range(8):
        for since in range(to):
            expected = x[..., since + 1 : to + 1].sum(-1)
            torch.testing.assert_close(sums[..., to, since], expected)
    hidden = ran("mask_pairs", HEADS, sums) == -torch.inf
    assert torch.equal(hidden[0, 0, 0], torch.ones(8, 8, dtype=torch.bool).triu())


def test_scores_of_chunks_before_heads_meet_decays_of_heads_before_chunks():
    scores, decays = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 4, 3, 8, 8)
    expected = torch.einsum("bchls,bhcls->bclsh", scores, decays)
    assert torch.equal(ran("mul_pairs", HEADS, scores, decays), expected)


def test_heads_come_before_tokens_and_lie_so():
    x = torch.randn(2, 3, 8, 4, 16)
    out = ran("clone_heads", {**HEADS, "head_dim": 16}, x)
    assert out.is_contiguous()
    assert torch.equal(out, torch.einsum("bclhd->bchld", x))


def test_what_a_convolution_left_is_turned_to_heads_before_tokens():
    left = torch.randn(2, 4 * 16, 3 * 8)
    x = left.unflatten(1, (4, 16)).unflatten(-1, (3, 8))  # [B, H, D, C, L]
    out = ran("clone_turned", {**HEADS, "head_dim": 16}, left)
    assert out.is_contiguous()
    assert torch.equal(out, torch.einsum("bhdcl->bchld", x))


def test_the_other_operand_has_its_tokens_innermost():
    x = torch.randn(2, 3, 8, 4, 16)
    out = ran("clone_across", {**HEADS, "head_dim": 16}, x)
    assert out.is_contiguous()
    assert torch.equal(out, torch.einsum("bclhd->bchdl", x))


def test_a_scan_and_a_convolution_are_added_token_by_token():
    x, left = torch.randn(2, 3, 8, 4, 16), torch.randn(2, 4 * 16, 3 * 8)
    out = ran("add_turned", {**HEADS, "head_dim": 16}, x, left)
    turned = left.unflatten(1, (4, 16)).unflatten(-1, (3, 8))
    assert torch.equal(out, x + torch.einsum("bhdcl->bclhd", turned))


def test_tokens_are_summed_one_head_at_a_time():
    x = torch.randn(2, 3, 8, 4)
    torch.testing.assert_close(ran("cumsum_tokens", HEADS, x), x.cumsum(2).permute(0, 3, 1, 2))


def test_each_heads_numbers_take_its_decay():
    x, decays = torch.randn(2, 3, 8, 4, 16), torch.randn(2, 4, 3, 8)
    expected = torch.einsum("bclhd,bhcl->bclhd", x, decays)
    assert torch.equal(ran("mul_decays", {**HEADS, "head_dim": 16}, x, decays), expected)


def test_a_convolution_sees_no_later_token():
    x = torch.randn(1, 6, 4)
    shape = {"batch": 1, "tokens": 6, "channels": 4, "kernel": 4}
    weight, bias = torch.randn(4, 1, 4), torch.randn(4)
    before = ran("conv1d", shape, x, weight, bias)
    changed = torch.cat((x[:, :-1], torch.zeros(1, 1, 4)), dim=1)
    after = ran("conv1d", shape, changed, weight, bias)
    assert before.shape == (1, 4, 6)
    torch.testing.assert_close(before[..., :-1], after[..., :-1])
    assert not torch.equal(before[..., -1], after[..., -1])


def test_a_batched_product_counts_every_matrix():
    shape = {"batch": 3, "m": 2, "n": 5, "k": 4}
    point = OpPoint(family="gemm", op="bmm", shape=shape, dtype="fp32")
    assert costs.flops(point) == 3 * 2 * 2 * 5 * 4
    assert costs.floor_bytes(point) == 3 * 4 * (2 * 4 + 5 * 4 + 2 * 5)


def test_a_models_own_scan_is_held_out():
    """Bamba-9B: 128 heads of 64 over a state of 128."""
    assert all(scan[3:] == (128, 64, 128) for scan in HELD_OUT)
    assert not any(scan[3] == 128 for scan in CALIBRATION)
    own = [p for p in scan_points() if p.shape.get("heads") == 128]
    assert {p.split for p in own} == {"held-out"}
