import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab.backend import backend_name
from attnlab.implementations import flex, flex_with, implementation, naive, sdpa, sdpa_backend
from attnlab.masks import Keys, Pattern, make_mask
from attnlab.transformer import Transformer
from planner import ConfigError


def mask_of(T, S, window, slopes=None):
    keys = Keys(torch.arange(S), in_order=True)
    return make_mask(keys.positions[S - T :], keys, Pattern(window=window), slopes=slopes)


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
    assert (
        backend_name(pairs("qwen2 sliding from layer 1")[1], tokens=4, context_tokens=9)
        == "sdpa:flash_cpu"
    )
    assert backend_name(pairs("gemma2")[1]) == "naive"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert backend_name(pairs("llama")[1]) == "sdpa:math"


def test_a_meta_transformer_has_no_backend(pairs):
    meta = Transformer(pairs("llama")[1].model, dtype=torch.float32, device="meta")
    with pytest.raises(ConfigError, match="device=meta"):
        backend_name(meta)


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.05, 0.02, 0.01])


@pytest.mark.parametrize(("T", "S", "window"), [(9, 9, None), (4, 9, 3), (1, 9, None)])
def test_alibi_equals_a_bias_of_slope_times_distance(T, S, window):
    q, k, v = random_qkv(T=T, S=S)
    biased = mask_of(T, S, window, slopes=SLOPES)
    query, key = torch.arange(S - T, S)[:, None], torch.arange(S)
    hidden = (key > query) | (key <= query - (window or S))
    bias = (SLOPES[:, None, None] * (key - query)).masked_fill(hidden, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), bias, scale=0.3
    )
    for attend in (naive, sdpa):
        torch.testing.assert_close(attend(q, k, v, scaling=0.3, mask=biased), expected)


def test_sinks_equal_those_of_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v = random_qkv(T=9, S=9)
    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups = torch.randn(6), 3
    mask = torch.zeros(9, 9).masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    expected, _ = eager_attention_forward(module.eval(), q, k, v, mask, scaling=0.3)
    out = naive(q, k, v, scaling=0.3, mask=mask_of(9, 9, None), sinks=module.sinks)
    torch.testing.assert_close(out.transpose(1, 2), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("slopes", [None, SLOPES])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 1, 6)])
@pytest.mark.parametrize(("T", "S", "window"), [(9, 9, None), (4, 9, 3), (1, 9, None)])
def test_what_flex_asks_for_equals_naive(T, S, window, sinks, slopes, softcap):
    """Uncompiled, as FlexAttention itself defines it; compiled it needs a GPU."""
    qkv, mask = random_qkv(T=T, S=S), mask_of(T, S, window, slopes=slopes)
    settings = dict(scaling=0.3, mask=mask, logit_softcap=softcap, sinks=sinks)
    torch.testing.assert_close(flex_with(flex_attention, *qkv, **settings), naive(*qkv, **settings))


def test_flex_is_refused_without_cuda(pairs):
    mask = mask_of(1, 1, None)
    with pytest.raises(ConfigError, match="attention=flex does not run on device=cpu: cuda"):
        flex(*random_qkv(T=1, S=1), scaling=1.0, mask=mask)
    with pytest.raises(ConfigError, match="attention=flex does not run on device=cpu: cuda"):
        Transformer(pairs("llama")[1].model, attention="flex", dtype=torch.float32, device="cpu")


def test_a_pinned_kernel_runs_or_is_refused():
    qkv, mask = random_qkv(T=9, S=9), mask_of(9, 9, None)
    for name, ran in (("sdpa:flash", True), ("sdpa:math", False)):
        with Seen() as seen:
            out = implementation(name)(*qkv, scaling=0.3, mask=mask)
        assert bool(seen.names) == ran
        torch.testing.assert_close(out, naive(*qkv, scaling=0.3, mask=mask))
    with pytest.raises(ConfigError, match="attention=sdpa:efficient does not run here"):
        implementation("sdpa:efficient")(*qkv, scaling=0.3, mask=mask)
