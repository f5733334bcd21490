"""Codes and scales against the errors that they imply, published figures and numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab.quantize import check_format, decode, encode, stored_widths
from planner import ConfigError
from planner.kv_format_names import KV_FORMATS, kivi
from planner.kv_formats import Scales, TensorFormat
from tests.properties import examples

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def per_token(bits, group=None, *, scale="fp32", zero=None, floating=False):
    return TensorFormat(
        bits=bits,
        scales=Scales(per="token-head", group_size=group, dtype=scale, zero_dtype=zero),
        floating=floating,
    )


FORMATS = {
    "int8": KV_FORMATS["int8_per_token_head"].keys,
    "int4": KV_FORMATS["int4_per_token_head"].keys,
    "fp8": KV_FORMATS["fp8_per_token_head"].keys,
    "int8 of 8": per_token(8, 8),
    "int4 of 16": per_token(4, 16),
    "int2": per_token(2),
    "fp8 of 16, fp16 scales": per_token(8, 16, scale="fp16", floating=True),
    "int4 of 16, fp16 scales (q4_0)": per_token(4, 16, scale="fp16"),
    "int4 of 16 and a minimum (q4_1)": per_token(4, 16, scale="fp16", zero="fp16"),
    "int8 and a minimum": per_token(8, zero="scale"),
    "KIVI-4 keys": kivi(4, group_size=8, residual_tokens=8).keys,
    "KIVI-4 values": kivi(4, group_size=8, residual_tokens=8).values,
    "KIVI-2 keys": kivi(2, group_size=8, residual_tokens=8).keys,
    "KIVI-2 values": kivi(2, group_size=8, residual_tokens=8).values,
    "KIVI-2 values, words filled up": kivi(2, group_size=4, residual_tokens=8).values,
    "KIVI-8 values": kivi(8, group_size=8, residual_tokens=8).values,
}
both = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def drawn(dtype=torch.float32, shape=(2, 3, 24, 48), seed=0):
    """Normal, with rows and channels of very different sizes, and zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x * torch.logspace(-3, 2, shape[2])[:, None] * torch.logspace(-1, 1, shape[3])
    x[0, 0] = 0
    x[-1, -1, 3:5] = 0
    return x.to(dtype)


def read(x, form, dtype=torch.float32):
    return decode(encode(x, form), form, width=x.shape[-1], dtype=dtype)


def spread(scales, x, form):
    """A scale for each element of x."""
    channel = form.scales.per == "channel"
    of = x.transpose(-1, -2) if channel else x
    each = scales.float().repeat_interleave(of.shape[-1] // scales.shape[-1], dim=-1)
    return each.transpose(-1, -2) if channel else each


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@both
def test_errors_are_within_what_the_scales_imply(form, dtype):
    x = drawn(dtype)
    got, scales = read(x, form).double(), spread(encode(x, form)[1], x, form).double()
    x = x.double()
    bound = scales / 2
    if form.bits == 8 and form.scales.dtype is None and dtype == torch.bfloat16:
        bound = scales
    if form.floating:
        bound = torch.maximum(x.abs() * 2**-4, scales * 2**-10)
    # float32 rounds the quotient, and the product again
    assert torch.all((got - x).abs() <= bound * (1 + 1e-5) + x.abs() * 2**-22)


@both
def test_zeros_stay_zeros_and_nothing_is_infinite(form):
    for x in (torch.zeros(1, 2, 8, 48), torch.full((1, 2, 8, 48), 1e-38)):
        assert torch.allclose(read(x, form), x, rtol=0, atol=1e-4)
    assert torch.equal(read(torch.zeros(1, 1, 8, 48), form), torch.zeros(1, 1, 8, 48))
    assert torch.isfinite(read(torch.full((1, 1, 8, 48), 6e4), form)).all()


@both
def test_stored_tensors_are_what_the_planner_counts(form):
    x = drawn(torch.bfloat16, shape=(2, 3, 24, 48))
    stored = encode(x, form)
    counted = form.stored(batch=2, heads=3, tokens=24, width=48, computed="bf16")
    plain = counted.elements_bytes
    if form.residual is not None:  # of which nothing is left out here
        blank = TensorFormat(
            bits=form.bits, scales=form.scales, packed=form.packed, word_bytes=form.word_bytes
        )
        counted = blank.stored(batch=2, heads=3, tokens=24, width=48, computed="bf16")
        plain = counted.elements_bytes
    assert stored[0].nbytes == plain
    assert sum(t.nbytes for t in stored[1:]) == counted.scales_bytes
    if form.scales.per == "token-head":
        kept = stored_widths(form, 48)
        assert [t.shape[-1] for t in stored] == [width for width, _ in kept]
        assert [t.dtype for t in stored] == [dtype or torch.bfloat16 for _, dtype in kept]


@pytest.mark.parametrize("form", [f for f in FORMATS.values() if f.scales.per == "token-head"])
def test_tokens_are_quantised_each_for_itself(form):
    x = drawn(torch.bfloat16)
    whole = encode(x, form)
    parts = zip(*(encode(part, form) for part in x.split([1, 5, 18], dim=2)), strict=True)
    for stored, split in zip(whole, parts, strict=True):
        assert torch.equal(stored, torch.cat(split, dim=2))


def test_int8_is_numpys_rounding():
    x = drawn().numpy()
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.finfo("f4").tiny)
    codes, scales = encode(torch.from_numpy(x), FORMATS["int8"])
    assert np.array_equal(scales.numpy(), scale)
    assert np.array_equal(codes.numpy(), np.rint(x / scale).astype("int8"))


def test_halves_are_rounded_to_even():
    x = torch.tensor([[[[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]]])
    assert encode(x, FORMATS["int8"])[0].tolist() == [[[[127, 0, 2, 2, 0, -2]]]]


def test_two_codes_of_four_bits_lie_in_a_byte_the_first_below():
    x = torch.tensor([[[[7.0, -7.0, 0.0, 3.0, -1.0]]]])
    packed, scale = encode(x, FORMATS["int4"])
    assert packed.tolist() == [[[[15 + 16 * 1, 8 + 16 * 11, 7]]]]  # codes + 8; odd rows filled up
    assert scale.item() == 1.0
    assert torch.equal(decode((packed, scale), FORMATS["int4"], width=5, dtype=x.dtype), x)


def test_a_group_of_outliers_leaves_the_others_alone():
    x = drawn(shape=(2, 1, 8, 64))[1:, :, 5:]
    x[..., :8] *= 1000
    whole, grouped = (read(x, per_token(4, g)) for g in (None, 8))
    quiet = slice(8, None)
    assert (whole - x)[..., quiet].norm() > 3 * (grouped - x)[..., quiet].norm()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "int4 of 16"])
def test_reading_rounds_once(name, dtype):
    """In any dtype it is what float32 gives, rounded."""
    x, form = drawn(), FORMATS[name]
    assert torch.equal(read(x, form, dtype), read(x, form).to(dtype))


@pytest.mark.parametrize(
    ("form", "D", "measured"),
    [
        ("int8", 64, 0.00594),
        ("int8", 128, 0.00647),
        ("int8", 256, 0.00695),
        ("fp8", 128, 0.026),
        ("int4", 64, 0.1078),
        ("int4", 128, 0.1174),
    ],
)
def test_relative_error_on_normal_numbers(form, D, measured):
    """‖x − x̂‖ / ‖x‖ of int8 is that of an even error over a step: rms of max|x| / (127 · √12)."""
    x = torch.randn(1, 4, 4096, D, generator=torch.Generator().manual_seed(D))
    error = (read(x, FORMATS[form]) - x).norm() / x.norm()
    print(form, D, float(error))
    assert error == pytest.approx(measured, rel=0.02)
    if not FORMATS[form].floating:
        top = {"int8": 127, "int4": 7}[form]
        largest = x.abs().amax(-1).square().mean().sqrt()
        assert error == pytest.approx(float(largest) / top / math.sqrt(12), rel=0.02)


@given(
    st.sampled_from([8, 4, 2]),
    st.integers(1, 20),
    st.sampled_from([None, 1, 2, 3, 5]),
    st.booleans(),
    st.sampled_from(list(DTYPES.values())),
)
@examples(60)
def test_any_width_and_group_is_read_back(bits, width, group, zero, dtype):
    g = None if group is None or width % group else group
    form = per_token(bits, g, zero="scale" if zero else None)
    x = drawn(dtype, shape=(2, 2, 3, width), seed=width)
    scales = spread(encode(x, form)[1], x, form)
    error = (read(x, form) - x.float()).abs()
    assert torch.all(error <= scales / 2 * (1 + 1e-5) + x.float().abs() * 2**-22)


def test_formats_that_are_not_run_are_refused():
    for form, message in [
        (KV_FORMATS["bf16"].keys, "scales per none are not run by attnlab: token-head or channel"),
        (KV_FORMATS["fp8_per_head"].keys, "scales per head are not run"),
        (KV_FORMATS["q5_0"].keys, r"bits=5 \(whole\) are not run"),
        (per_token(4, floating=True), r"bits=4 \(floating\) are not run"),
        (per_token(8, zero="scale", floating=True), "zero_dtype='scale' is not run with fp8"),
        (per_token(8, scale="fp8"), "scales in fp8"),
        (per_token(8, 32), "group_size=32 does not divide a row of 48 elements"),
        (TensorFormat(bits=4, scales=Scales(per="channel")), "scales per channel are run in"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_format(form, width=48)
