import pytest
import torch
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.stablelm.modeling_stablelm import StableLmLayerNormPerHead

from attnlab.norms import build_norm, build_qk_norm
from planner.layers import Norm, QKNorm


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


def same(ours, theirs, x, y=None):
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x if y is None else y))


def test_layernorm_of_one_plus_weight_equals_that_of_nemotron():
    norm = Norm(kind="layernorm", eps=1e-5, bias=True, plus_one=True)
    ours = build_norm(norm, 24, torch.float32)
    x = torch.randn(3, 24)
    torch.testing.assert_close(ours(x), torch.nn.functional.layer_norm(x, (24,)))
    same(ours, NemotronLayerNorm1P(24, eps=1e-5), x)


def test_norms_without_a_weight_only_normalise():
    for kind in ("layernorm", "rmsnorm"):
        made = build_norm(Norm(kind=kind, eps=1e-5, weight=False), 24, torch.float32)
        assert not list(made.parameters())
        x = torch.randn(3, 24)
        centred = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
        expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(made(x), expected)


def test_a_scale_for_each_head_equals_that_of_cohere():
    norm = QKNorm(norm=Norm(kind="layernorm", eps=1e-5), width="per-head")
    theirs = CohereLayerNorm(hidden_size=(3, 8), eps=1e-5)
    same(build_qk_norm(norm, 3, 8, torch.float32), theirs, torch.randn(2, 5, 3, 8))


def test_a_norm_for_each_head_equals_that_of_stablelm():
    norm = QKNorm(norm=Norm(kind="layernorm", eps=1e-5), width="head-list")
    ours = build_qk_norm(norm, 3, 8, torch.float32)
    theirs = StableLmLayerNormPerHead(8, 3, eps=1e-5, bias=False)
    x = torch.randn(2, 5, 3, 8)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))
