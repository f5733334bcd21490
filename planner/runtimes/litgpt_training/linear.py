"""Linear layers and what stands beside them (lit_gpt/lora.py), norms (lit_gpt/rmsnorm.py)."""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.four_bit import FourBitLinear
from planner.autograd.layouts import is_contiguous
from planner.autograd.tensors import Dims, Tensor
from planner.layers import GQA, Norm
from planner.program import B, T
from planner.runtimes.litgpt_training.regime import LitWriter
from planner.runtimes.writer import FLOAT32, INT64

QKV = ("q_proj", "k_proj", "v_proj")


class LinearWriter(LitWriter):
    """What attention, feed-forwards and the head are made of."""

    def linear(self, x: Tensor, module: str, out: int, *, bias: bool) -> Tensor:
        """LoRALinear.forward; without adapters that of nn.Linear."""
        if self.step.method == "adapter-v2":
            return self._scaled(x, module, out, bias=bias)
        f, pretrained = self.f, self.frozen(x, module, out, bias=bias)
        if module not in self.adapted:
            return pretrained
        assert self.lora is not None
        name, rank = f"{module}, adapters", self.lora.rank
        into = self.beside(f"{module}.lora_A", rank, x.sizes[-1])
        back = self.beside(f"{module}.lora_B", out, rank)
        dropped = f.dropout(x, f"{module}, dropout")
        low = f.linear(dropped, into, None, name)
        del dropped
        beside = f.scale(f.linear(low, back, None, name), name)
        del low
        return f.add(pretrained, beside, f"{module} with adapters")

    def _scaled(self, x: Tensor, module: str, out: int, *, bias: bool) -> Tensor:
        """AdapterV2Linear.forward, which names nothing in between."""
        f, added = self.f, self.beside(f"{module}.adapter_bias", out)
        scale = self.beside(f"{module}.adapter_scale", out)
        return f.mul(
            scale,
            f.add(self.frozen(x, module, out, bias=bias), added, f"{module} + bias"),
            f"{module}, scaled",
        )

    def frozen(self, x: Tensor, module: str, out: int, *, bias: bool) -> Tensor:
        """The layer as it was loaded."""
        if self.step.four_bit is not None:
            return self._four_bit(x, module, out, bias=bias)
        weight = self.weight(f"{module}.weight", out, x.sizes[-1])
        biases = self.weight(f"{module}.bias", out) if bias else None
        if is_contiguous(x.sizes, x.strides):
            return self.f.linear(x, weight, biases, module)
        return self._by_sequences(x, weight, biases, module)

    def _four_bit(self, x: Tensor, module: str, out: int, *, bias: bool) -> Tensor:
        """Fabric quantises from float16, whatever is computed in (precision/bitsandbytes.py)."""
        layer = FourBitLinear(out, x.sizes[-1], x.itemsize, bool(self.step.four_bit))
        return self.f.early_four_bit(
            x,
            layer,
            self.given(f"{module}.bias", ((out,),), self.b) if bias else None,
            module,
            from_half=self.step.dtype != "fp16",
            held=self.held_by_nodes[self.walking],
        )

    def _by_sequences(self, x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        """F.linear of tokens that do not lie together: a product for each sequence."""
        f = self.f
        turned = f.transpose(weight, 0, 1)
        product = f.matmul(x, f.expand(turned, (x.dims[0], *turned.dims)), name, kernel="bmm")
        if bias is None:
            return product
        return f.add(product, bias, name) if self.aten.watched else f.add_(product, bias)

    def qkv(self, gqa: GQA, x: Tensor) -> Tensor:
        """LoRAQKVLinear.forward: one matrix, adapters on some of the three."""
        f, h = self.f, x.sizes[-1]
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        whole = (H + 2 * G) * D
        if self.has_prefixes:
            return self.linear(x, "qkv_proj", whole, bias=gqa.qkv_bias)
        pretrained = self.frozen(x, "qkv_proj", whole, bias=gqa.qkv_bias)
        widths = [n * D for module, n in zip(QKV, (H, G, G), strict=True) if module in self.adapted]
        if not widths:
            return pretrained
        assert self.lora is not None
        rank = self.lora.rank
        into = self.beside("qkv_proj.lora_A", rank * len(widths), h)
        back = self.beside("qkv_proj.lora_B", sum(widths), rank)
        after_a = f.linear(f.dropout(x, "qkv_proj, dropout"), into, None, "after A")
        columns = f.transpose(after_a, -2, -1)
        kernels = f.view(back, (*back.dims, ONE))
        if H == G:
            after_b = f.conv1d(columns, kernels, "after B")
        else:
            after_b = self._unequal(columns, kernels, widths)
        del columns, kernels
        after_b = f.transpose(after_b, -2, -1)
        padded = after_b if len(widths) == len(QKV) else self._zero_pad(after_b, whole)
        lora = f.scale(padded, "qkv_proj, adapters")
        del padded
        return f.add(pretrained, lora, "qkv_proj with adapters")

    def _unequal(self, columns: Tensor, kernels: Tensor, widths: list[int]) -> Tensor:
        """LoRAQKVLinear.conv1d of parts that are not equally wide."""
        f = self.f
        assert self.lora is not None
        parts = f.split(columns, [self.lora.rank] * len(widths), 1)
        weights = f.split(kernels, widths, 0)
        made = [f.conv1d(a, b, "after B") for a, b in zip(parts, weights, strict=True)]
        return f.cat(made, ((B,), (sum(widths),), (T,)), "after B", dim=1)

    def _zero_pad(self, after_b: Tensor, whole: int) -> Tensor:
        """LoRAQKVLinear.zero_pad: index_copy saves what it copies."""
        f, aten, name, b = self.f, self.aten, "zero-padded", after_b.itemsize
        x = f.transpose(after_b, 0, 1)
        rows: Dims = ((T, B), (whole,))
        result = aten.new("new_zeros", name, rows, b)
        index = aten.new("lift_fresh", "places of the columns", (x.dims[-1],), INT64)
        result = f.index_copy(result, index, f.view(x, ((T, B), x.dims[-1])), name)
        return f.transpose(f.view(result, ((T,), (B,), (whole,))), 0, 1)

    def norm(self, norm: Norm, x: Tensor, name: str, module: str) -> Tensor:
        """nn.LayerNorm, or RMSNorm.forward, which computes in float32."""
        f, b = self.f, x.itemsize
        weight = self.weight(f"{module}.weight", x.sizes[-1])
        if norm.kind == "layernorm":
            bias = self.weight(f"{module}.bias", x.sizes[-1])
            kept = FLOAT32 if self.aten.on_gpu else b
            return f.layer_norm(x, [weight, bias], name, statistics_bytes=kept)
        wide = f.cast(x, FLOAT32, f"{name}, float32")
        mean = f.mean(f.mul(wide, wide, f"{name}, squares"), f"{name}, mean square")
        scaled = f.rsqrt(f.shift(mean, f"{name}, mean square"), f"{name}, 1 / rms")
        normed = f.mul(wide, scaled, f"{name}, normalised")
        del scaled
        return f.cast(f.mul(weight, normed, f"{name}, scaled"), b, name)
