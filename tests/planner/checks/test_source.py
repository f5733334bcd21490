"""Source: for every mistake a file that makes it and one that does it right. None of it is run."""

import textwrap

import pytest

import planner
from planner.errors import ConfigError

ATTENTION = """
import math, torch
from torch import nn
from torch.nn import functional as F

class CausalSelfAttention(nn.Module):
    def forward(self, x, mask):
        q, k, v = self.q(x), self.k(x), self.v(x)
        {body}
        return p @ v
"""
SCALED = "s = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))"
INF = "float('-inf')"
GENERATES = "\n    def generate(self, ids):\n        return ids\n"
MODEL = """
import torch
from torch import nn
from torch.nn import functional as F

class TinyGPT(nn.Module):
    def __init__(self, n=512, d=64):
        {init}

    def forward(self, ids):
        {body}
"""
LOOP = """
def generate(model, ids, steps):
    {start}
    for _ in range(steps):
        {call}
        new = logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], dim=1)
    return ids
"""


def attention(*lines):
    return ATTENTION.format(body="\n        ".join(lines))


def model(init, *lines):
    return MODEL.format(init=init, body="\n        ".join(lines))


MASKED = f"s = s.masked_fill(mask == 0, {INF})"
SOFTMAX = "p = F.softmax(s, dim=-1)"
TRIL = "tri = torch.tril(torch.ones(9, 9))"
TRIU = "tri = torch.triu(torch.ones(9, 9), diagonal=1)"
WRONG = {
    "unscaled": (attention("s = q @ k.transpose(-2, -1)", MASKED, SOFTMAX), "attention-unscaled"),
    "unscaled matmul": (
        attention("s = torch.matmul(q, k.mT)", MASKED, "p = torch.softmax(s, -1)"),
        "attention-unscaled",
    ),
    "unscaled einsum": (
        attention("s = torch.einsum('bhqd,bhkd->bhqk', q, k)", MASKED, "p = s.softmax(-1)"),
        "attention-unscaled",
    ),
    "unscaled after rotation": (
        attention("q, k = apply_rotary(q, k)", "s = q @ k.transpose(-2, -1)", MASKED, SOFTMAX),
        "attention-unscaled",
    ),
    "unscaled sdpa": (
        attention("p = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)"),
        "attention-unscaled",
    ),
    "scaled twice": (
        attention("q = q / math.sqrt(64)", SCALED, MASKED, SOFTMAX),
        "attention-scaled-twice",
    ),
    "scaled twice by sdpa": (
        attention(
            "q = q * 64 ** -0.5", "p = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)"
        ),
        "attention-scaled-twice",
    ),
    "mask added after": (attention(SCALED, SOFTMAX, "p = p + mask"), "mask-after-softmax"),
    "mask filled after": (
        attention(SCALED, SOFTMAX, f"p = p.masked_fill(mask == 0, {INF})"),
        "mask-after-softmax",
    ),
    "zeros after": (
        attention(SCALED, SOFTMAX, "p = p.masked_fill(mask == 0, 0.0)"),
        "mask-after-softmax",
    ),
    "zeros before": (
        attention(SCALED, "s = s.masked_fill(mask == 0, 0)", SOFTMAX),
        "mask-inverted",
    ),
    "the past is hidden": (
        attention(SCALED, TRIL, f"s = s.masked_fill(tri == 1, {INF})", SOFTMAX),
        "mask-inverted",
    ),
    "the past is hidden by where": (
        attention(SCALED, TRIL, f"s = torch.where(tri.bool(), {INF}, s)", SOFTMAX),
        "mask-inverted",
    ),
    "the past is hidden by a sum": (
        attention(SCALED, f"s = s + torch.tril(torch.full((9, 9), {INF}))", SOFTMAX),
        "mask-inverted",
    ),
    "a mask one off": (
        attention(SCALED, f"s = s.masked_fill(torch.ones(9, 9).triu(2).bool(), {INF})", SOFTMAX),
        "causal-leak",
    ),
    "a mask one off that keeps": (
        attention(
            SCALED, "tri = torch.tril(torch.ones(9, 9), diagonal=1)",
            f"s = s.masked_fill(tri == 0, {INF})", SOFTMAX,
        ),
        "causal-leak",
    ),
    "a mask one off that is added": (
        attention(SCALED, f"s = s + torch.triu(torch.full((9, 9), {INF}), diagonal=2)", SOFTMAX),
        "causal-leak",
    ),
    "a mask that hides the diagonal": (
        attention(SCALED, f"s = s + torch.triu(torch.full((9, 9), {INF}))", SOFTMAX),
        "self-masked",
    ),
    "no mask": (
        attention(SCALED, SOFTMAX).replace("x, mask", "x") + GENERATES,
        "decoder-without-mask",
    ),
    "no mask in sdpa": (
        attention("p = F.scaled_dot_product_attention(q, k, v)").replace("x, mask", "x")
        + GENERATES,
        "decoder-without-mask",
    ),
    "no mask in torch's layers": (
        model("self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 4), 2)",
              "return self.blocks(self.embed(ids))") + GENERATES,
        "decoder-without-mask",
    ),
    "no mask in torch's attention": (
        model("self.attn = nn.MultiheadAttention(d, 4)", "x = self.embed(ids)",
              "return self.attn(x, x, x)[0]") + GENERATES,
        "decoder-without-mask",
    ),
    "post-norm": (
        model("self.n = 1", "x = self.norm1(ids + self.attn(ids))", "return x") + GENERATES,
        "post-norm-deep",
    ),
    "post-norm in two steps": (
        model("self.n = 1", "x = ids", "x = x + self.attn(x)", "x = self.norm1(x)",
              "x = x + self.mlp(x)", "x = self.norm2(x)", "return x") + GENERATES,
        "post-norm-deep",
    ),
    "generation without a cache": (
        LOOP.format(start="pass", call="logits = model(ids)"),
        "generation-without-cache",
    ),
    "generation of a window": (
        LOOP.format(start="pass", call="cut = ids[:, -512:]\n        logits, _ = model(cut)"),
        "generation-without-cache",
    ),
    "a cache that grows": (
        "def f(self, k, v):\n    self.cached_k = torch.cat([self.cached_k, k], dim=2)\n",
        "cache-grows-by-cat",
    ),
    "a past that grows": (
        "def f(past_key, key):\n    return torch.cat((past_key, key), dim=-2)\n",
        "cache-grows-by-cat",
    ),
    "positions of any length": (
        model("self.pos_emb = nn.Embedding(n, d)", "T = ids.shape[1]",
              "return self.pos_emb(torch.arange(T))"),
        "positions-past-table",
    ),
    "positions past a literal table": (
        model("self.pos_emb = nn.Embedding(512, d)", "return self.pos_emb(torch.arange(1024))"),
        "positions-past-table",
    ),
    "positions with an offset": (
        model("self.pos_emb = nn.Embedding(n, d)", "T = ids.shape[1]",
              "return self.pos_emb(torch.arange(T) + 2)"),
        "positions-past-table",
    ),
}  # fmt: skip

RIGHT = {
    "scaled": attention(SCALED, MASKED, SOFTMAX),
    "scaled queries": attention(
        "q = q * self.scale", "s = q @ k.transpose(-2, -1)", MASKED, SOFTMAX
    ),
    "normed queries": attention(
        "q, k = self.q_norm(q), self.k_norm(k)", "s = q @ k.mT", MASKED, SOFTMAX
    ),
    "scaled in place": attention("s = q @ k.mT", "s *= self.scale", MASKED, SOFTMAX),
    "through a function": attention("s = self.score(q @ k.mT)", SOFTMAX),
    "a triangle of -inf": attention(
        SCALED, f"s = s + torch.triu(torch.full((9, 9), {INF}), diagonal=1)", SOFTMAX
    ),
    "the future is hidden": attention(SCALED, TRIU, f"s = s.masked_fill(tri == 1, {INF})", SOFTMAX),
    "what the triangle lacks is hidden": attention(
        SCALED, TRIL, f"s = s.masked_fill(tri == 0, {INF})", SOFTMAX
    ),
    "torch's own square mask": attention(
        SCALED,
        "tri = (torch.triu(torch.ones(9, 9)) == 1).transpose(0, 1)",
        f"s = s.masked_fill(tri == 0, {INF})",
        SOFTMAX,
    ),
    "a mask for a cache": attention(
        SCALED, "tri = torch.ones(9, 9).triu(diagonal=past + 1)",
        f"s = s.masked_fill(tri.bool(), {INF})", SOFTMAX,
    ),
    "where": attention(SCALED, TRIL, f"s = torch.where(tri.bool(), s, {INF})", SOFTMAX),
    "rows without keys are zeroed": attention(
        SCALED, MASKED, SOFTMAX, "p = p.masked_fill(mask == 0, 0.0)"
    ),
    "a head mask": attention(SCALED, MASKED, SOFTMAX, "p = p * self.head_mask"),
    "sdpa": attention("p = F.scaled_dot_product_attention(q, k, v, is_causal=True)") + GENERATES,
    "sdpa, queries scaled by hand": attention(
        "q = q * 64 ** -0.5",
        "p = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)",
    ),
    "an encoder": attention(SCALED, SOFTMAX)
    .replace("x, mask", "x")
    .replace("CausalSelfAttention", "EncoderAttention"),
    "cross-attention": attention(SCALED, SOFTMAX)
    .replace("x, mask", "x, memory")
    .replace("self.k(x)", "self.k(memory)")
    + GENERATES,
    "torch's layers, masked": model(
        "self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 4), 2)",
        "return self.blocks(self.embed(ids), mask=self.square(ids), is_causal=True)",
    )
    + GENERATES,
    "pre-norm": model("self.n = 1", "x = ids + self.attn(self.norm1(ids))",
                      "x = x + self.mlp(self.norm2(x))", "return x") + GENERATES,
    "pre-norm in steps": model(
        "self.n = 1", "residual = ids", "x = self.norm1(ids)", "x = self.attn(x)",
        "x = residual + x", "residual = x", "x = self.norm2(x)", "x = self.mlp(x)",
        "x = residual + x", "return x",
    ) + GENERATES,
    "a norm at the end": model(
        "self.n = 1", "x = self.tok(ids) + self.pos_emb(ids)", "for b in self.blocks:",
        "    x = b(x)", "x = self.ln_f(x)", "return self.head(x)",
    ) + GENERATES,
    "generation with a cache": LOOP.format(
        start="cache = None", call="logits, cache = model(ids[:, -1:], past_key_values=cache)"
    ),
    "generation of the last token": LOOP.format(
        start="pass", call="last = ids[:, -1:]\n        logits = model(last)"
    ),
    "cat of two halves": "def f(a, b):\n    return torch.cat((-b, a), dim=-1)\n",
    "positions that are checked": model(
        "self.pos_emb = nn.Embedding(n, d)", "T = ids.shape[1]", "assert T <= self.n",
        "return self.pos_emb(torch.arange(T))",
    ),
    "a table with room for the offset": model(
        "self.pos_emb = nn.Embedding(n + 2, d)", "T = ids.shape[1]", "assert T <= self.n",
        "return self.pos_emb(torch.arange(T) + 2)",
    ),
    "positions that are handed in": model(
        "self.pos_emb = nn.Embedding(n, d)", "return self.pos_emb(ids)"
    ),
}  # fmt: skip


def written(tmp_path, code):
    path = tmp_path / "code.py"
    path.write_text(textwrap.dedent(code))
    return path


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_found_where_it_is(tmp_path, name):
    code, edge = WRONG[name]
    path = written(tmp_path, code)
    found = planner.check(path)
    assert edge in [f.id for f in found]
    finding = next(f for f in found if f.id == edge)
    assert finding.file == str(path)
    assert finding.where == f"{path}:{finding.line}"
    assert 1 < finding.line <= len(code.splitlines())


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_way_passes(tmp_path, name):
    assert planner.check(written(tmp_path, RIGHT[name])) == []


def test_nothing_is_executed(tmp_path):
    mark = tmp_path / "ran"
    planner.check(written(tmp_path, f"open({str(mark)!r}, 'w').close()\nraise SystemExit(3)"))
    assert not mark.exists()


def test_a_folder_is_read_file_by_file_and_what_is_no_python_is_named(tmp_path):
    written(tmp_path, WRONG["unscaled"][0])
    (tmp_path / "deeper").mkdir()
    written(tmp_path / "deeper", WRONG["zeros before"][0])
    (tmp_path / "torn.py").write_text("def f(:")
    found = {f.id: f for f in planner.check(tmp_path)}
    assert {"attention-unscaled", "mask-inverted", "not-checked"} <= set(found)
    assert found["not-checked"].severity == "info"
    assert "torn.py is not Python" in found["not-checked"].seen


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"def f(:", "is not Python"),
        (b"x = 1\0", "is not Python"),
        (b"\xff\xfe\x00", "is not Python"),
        (b"x = " + b"(" * 500 + b")" * 500, "is not Python|too deep"),
        (b"x = " + b"-" * 9000 + b"1", "is not Python|too deeply"),
    ],
)
def test_hostile_source_ends_in_one_line(tmp_path, content, said):
    path = tmp_path / "hostile.py"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as refused:
        planner.check(path)
    assert "\n" not in str(refused.value)


def test_nested_products_are_read_once(tmp_path):
    code = "def f(q, k):\n    return softmax(" + "q @ (" * 60 + "k" + ")" * 60 + ", -1)\n"
    assert planner.check(written(tmp_path, code)) == []


@pytest.mark.parametrize("target", ["absent.py", "a" * 5000 + ".py", "nul\0.py", ""])
def test_a_file_that_is_not_there_is_one_line(target):
    with pytest.raises(ConfigError) as refused:
        planner.check(target)
    assert "\n" not in str(refused.value)


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"neither a config.json nor a .py file"):
        planner.check(tmp_path)
