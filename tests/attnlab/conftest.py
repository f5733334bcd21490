from functools import cache

import pytest
import torch
import transformers

import planner
from attnlab.transformer import Transformer
from attnlab.weights import load_state_dict
from tests.attnlab.families import FAMILIES, V


@cache
def _pair(family):
    """A tiny random model of transformers (eager, float32) and ours with the same weights."""
    config = FAMILIES[family]()
    # falcon's eager attention adds ALiBi twice in transformers 5.23, in the mask and to the scores
    config._attn_implementation = "sdpa" if family == "falcon-rw" else "eager"
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in theirs.named_parameters():
        module = ".".join(name.split(".")[-3:])  # dbrx keeps its attention in a norm_attn_norm
        norm = "norm" in module or "ln_" in module
        torch.nn.init.normal_(p, mean=float(norm and name.endswith("weight")), std=0.2)
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.2)
    model = planner.read_config(config.to_dict())
    ours = Transformer(model, dtype=torch.float32, device="cpu")
    load_state_dict(ours, theirs.state_dict())
    return theirs, ours.requires_grad_(False)


@pytest.fixture(params=list(FAMILIES))
def pair(request):
    return _pair(request.param)


@pytest.fixture
def llama_pair():
    return _pair("llama")


@pytest.fixture
def pairs():
    """family → (the model of transformers, ours)."""
    return _pair


@pytest.fixture
def ids():
    return torch.randint(V, (2, 13), generator=torch.Generator().manual_seed(1))
