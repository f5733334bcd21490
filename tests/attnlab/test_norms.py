import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from attnlab.norms import build_norm
from planner.layers import Norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("theirs", "plus_one"), [(LlamaRMSNorm, False), (Gemma2RMSNorm, True)])
def test_rmsnorm_equals_that_of_transformers_to_the_bit(theirs, plus_one, dtype):
    norm = Norm(kind="rmsnorm", eps=1e-5, plus_one=plus_one)
    ours, expected = build_norm(norm, 24, dtype), theirs(24, eps=1e-5).to(dtype)
    torch.nn.init.normal_(expected.weight)
    ours.load_state_dict(expected.state_dict())
    x = torch.randn(3, 24, dtype=dtype)
    assert torch.equal(ours(x), expected(x))


@pytest.mark.parametrize("bias", [True, False])
def test_layernorm_has_a_bias_where_the_model_says_so(bias):
    made = build_norm(Norm(kind="layernorm", eps=1e-5, bias=bias), 24, torch.float32)
    assert [name for name, _ in made.named_parameters()] == ["weight", "bias"][: 1 + bias]
