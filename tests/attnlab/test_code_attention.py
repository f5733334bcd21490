import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attnlab.code_attention import attention_over_codes
from attnlab.quantize import decode, encode
from planner import ConfigError
from planner.kv_format_names import KV_FORMATS, both
from planner.kv_formats import Scales, TensorFormat

B, H, G, T, S, D = 2, 6, 2, 5, 77, 64
ERROR = {"int8_per_token_head": 0.011, "fp8_per_token_head": 0.04, "int4_per_token_head": 0.2}


def drawn(seed=0, *, D=D, S=S):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, D)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def grouped(bits, group):
    scales = Scales(per="token-head", group_size=group, dtype="fp16")
    return both("grouped", TensorFormat(bits=bits, scales=scales))


FORMS = {**{name: KV_FORMATS[name] for name in ERROR}, "int4 of 16": grouped(4, 16)}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_it_is_sdpa_over_what_is_dequantised(form, causal):
    q, k, v = drawn()
    keys, values = encode(k, form.keys), encode(v, form.values)
    visible = None
    if causal:
        visible = torch.arange(S) <= torch.arange(S - T, S)[:, None]
    got = attention_over_codes(q, keys, values, form, scaling=D**-0.5, visible=visible)
    k, v = (decode(x, form.keys, width=D, dtype=torch.float32) for x in (keys, values))
    want = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("name", ERROR)
def test_outputs_move_by_the_errors_of_keys_and_values_together(name, D):
    """Of random q, k, v, relative L2: each error counts alike, so √2 of one; int8 0.8 to 1.0 %."""
    q, k, v = drawn(1, D=D, S=1024)
    form = KV_FORMATS[name]
    stored = encode(k, form.keys), encode(v, form.values)
    got = attention_over_codes(q, *stored, form, scaling=D**-0.5)
    want = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    error = float((got - want).norm() / want.norm())
    one = float((decode(stored[1], form.values, width=D, dtype=v.dtype) - v).norm() / v.norm())
    print(name, D, f"{error:.2e}", f"{one:.2e}")
    assert error < ERROR[name]
    assert error == pytest.approx(2**0.5 * one, rel=0.12)


def test_zero_points_are_refused():
    q, k, v = drawn()
    form = KV_FORMATS["q4_1"]
    with pytest.raises(ConfigError, match="without zero points"):
        attention_over_codes(q, encode(k, form.keys), encode(v, form.values), form, scaling=1.0)
