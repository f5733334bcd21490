import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab.attention import naive, sdpa, sdpa_backend
from attnlab.masks import make_mask
from attnlab.transformer import Transformer, backend_name
from planner import ConfigError


def mask_of(T, S, window):
    positions = torch.arange(S)
    return make_mask(positions[S - T :], positions, window=window)


def random_qkv(*, T, S, H=6, G=2, D=8, dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(2, T, H, D, dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, G, S + 3, D, dtype=dtype)[:, :, :, :S]  # as a cache's views
    return q, k, v


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (9, 9), (4, 9)])
def test_naive_equals_sdpa(T, S, window):
    qkv = random_qkv(T=T, S=S)
    mask = mask_of(T, S, window)
    torch.testing.assert_close(
        naive(*qkv, scaling=0.3, mask=mask), sdpa(*qkv, scaling=0.3, mask=mask)
    )


@pytest.mark.parametrize(("T", "S", "window"), [(9, 9, None), (4, 9, 3), (1, 9, None)])
def test_naive_equals_softmax_written_out(T, S, window):
    q, k, v = random_qkv(T=T, S=S)
    out = naive(q, k, v, scaling=0.3, mask=mask_of(T, S, window), logit_softcap=0.7)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(3, 1)) * 0.3
    scores = 0.7 * torch.tanh(scores / 0.7)
    for t in range(T):
        for s in range(S):
            p = S - T + t  # the query's position
            if s > p or (window is not None and s <= p - window):
                scores[:, :, t, s] = -torch.inf
    expected = torch.softmax(scores, dim=-1) @ v.repeat_interleave(3, 1)
    torch.testing.assert_close(out, expected)


class Seen(TorchDispatchMode):
    """The attention ops that really run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("T", "S", "window"), [(9, 9, None), (4, 9, 3), (1, 9, None)])
@pytest.mark.parametrize("allowed", [["FLASH_ATTENTION", "MATH"], ["MATH"]])
def test_the_backend_named_is_the_one_that_runs(T, S, window, allowed):
    q, k, v = random_qkv(T=T, S=S)
    mask = mask_of(T, S, window)
    backends = [getattr(torch.nn.attention.SDPBackend, name) for name in allowed]
    with torch.nn.attention.sdpa_kernel(backends), Seen() as seen:
        sdpa(q, k, v, scaling=0.3, mask=mask)
        name = sdpa_backend(q, k, v, scaling=0.3, mask=mask)
    flash = {"_scaled_dot_product_flash_attention_for_cpu"}
    assert (name, seen.names) == (("flash_cpu", flash) if len(allowed) == 2 else ("math", set()))


def test_a_transformer_names_its_backend(pairs):
    assert backend_name(pairs("llama")[1]) == "sdpa:flash_cpu"
    assert backend_name(pairs("qwen2-hybrid")[1], tokens=4, context_tokens=9) == "sdpa:flash_cpu"
    assert backend_name(pairs("gemma2")[1]) == "naive"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert backend_name(pairs("llama")[1]) == "sdpa:math"


def test_a_meta_transformer_has_no_backend(pairs):
    meta = Transformer(pairs("llama")[1].model, dtype=torch.float32, device="meta")
    with pytest.raises(ConfigError, match="device=meta"):
        backend_name(meta)


def test_sdpa_refuses_a_soft_cap():
    mask = mask_of(1, 1, None)
    with pytest.raises(ConfigError, match=r"logit_softcap=30\.0"):
        sdpa(*random_qkv(T=1, S=1), scaling=1.0, mask=mask, logit_softcap=30.0)
