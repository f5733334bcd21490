import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from attnlab.alibi import bias, slopes


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 20, 32, 71, 112])
def test_slopes_equal_those_of_bloom_and_mpt(heads):
    ours = torch.tensor(slopes(heads))
    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)
    torch.testing.assert_close(ours, theirs[:, 0, 1], rtol=1e-5, atol=0)
    mpt = build_mpt_alibi_tensor(heads, 2, device="cpu")
    torch.testing.assert_close(ours, -mpt[:, 0, 0], rtol=1e-5, atol=0)


def test_twelve_heads_have_the_slopes_of_the_paper():
    """Those of 8 heads, then every other of 16 (arXiv:2108.12409, section 3 and its code)."""
    exponents = [*range(1, 9), 0.5, 1.5, 2.5, 3.5]
    assert slopes(12) == pytest.approx([2.0**-i for i in exponents])


def test_the_bias_falls_with_the_distance():
    made = bias(torch.tensor([0.5, 0.25]), torch.tensor([3, 4]), torch.arange(5))
    assert made[0].tolist() == [[-1.5, -1.0, -0.5, 0.0, 0.5], [-2.0, -1.5, -1.0, -0.5, 0.0]]
    ragged = bias(torch.tensor([0.5]), torch.tensor([[3], [0]]), torch.arange(3)[None])
    assert ragged[:, 0, 0].tolist() == [[-1.5, -1.0, -0.5], [0.0, 0.5, 1.0]]
