"""A frozen linear layer of 4-bit weights, as bitsandbytes 0.50 runs it.

autograd/_functions.py, MatMul4Bit; functional.py, dequantize_4bit; nn/modules.py, Linear4bit.
Forward and backward each make the whole weight anew, [out, in] in the dtype that is computed in,
and of nested scales float32 ones, one for 64 weights. A GPU may do without in the forward
(backends/cuda/ops.py, _gemm_4bit_kernel_impl). What is saved is the codes, which are there
anyway: nothing of the input, and nothing that a checkpointed block would drop.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.autograd.products import FLOAT32, Products
from planner.autograd.recording import only
from planner.autograd.tensors import Gradients, Node, Tensor

BLOCK = 64


@dataclass(frozen=True, slots=True)
class FourBitLinear:
    """Sizes of a layer; bytes of an element that it computes in, and was quantised from.

    `packed`: the forward's product reads the codes themselves.
    """

    out: int
    into: int
    itemsize: int
    double_quant: bool
    packed: bool = False


class FourBitProducts(Products):
    """Products with weights of 4 bits."""

    def four_bit(self, x: Tensor, layer: FourBitLinear, bias: Tensor | None, name: str) -> Tensor:
        """Linear4bit.forward: x in the layer's dtype, and back."""
        lowered = self.cast(x, layer.itemsize, f"{name}, input")
        return self.cast(self._four_bit(lowered, layer, bias, name), x.itemsize, name)

    def clone(self, x: Tensor, name: str) -> Tensor:
        """x.clone()."""
        out = self.aten.elementwise("clone", name, x)
        return self._record(lambda node, flowed: [only(flowed)], (x,), out)

    def _four_bit(self, x: Tensor, layer: FourBitLinear, bias: Tensor | None, name: str) -> Tensor:
        def backward(node: Node, flowed: Gradients) -> Gradients:
            gradient, like = only(flowed), node.inputs[0]
            called = f"gradient of {like.name}"
            weight = self.dequantised(layer, called)
            rows = tuple(extent for dim in gradient.dims[:-1] for extent in dim)
            flat = self.aten.reshape(gradient, (rows, gradient.dims[-1]))
            return [self.aten.reshape(self.aten.mm(flat, weight, called), like.dims)]

        scales = [] if layer.packed else self._scales(layer, name)
        weights = [] if layer.packed else [self._weight(layer, name, scales)]
        lies = self.aten.contiguous(x) if layer.packed else x
        dims = (*x.dims[:-1], (layer.out,))
        out = self.aten.new(
            "gemm_4bit",
            name,
            dims,
            layer.itemsize,
            flops=(2, *(extent for dim in (*dims, x.dims[-1]) for extent in dim)),
            reads=(lies, *weights) if bias is None else (lies, *weights, bias),
            rows=[(layer.out * layer.into // 2,)] if layer.packed else (),
        )
        del scales, weights, lies
        return self._record(backward, (x,), out)

    def _scales(self, layer: FourBitLinear, name: str) -> list[Tensor]:
        """Of nested ones, plus their offset; on a GPU those without it live as long.

        backends/default/ops.py, _gemm_4bit_default_impl; backends/cuda/ops.py,
        _dequant_linear_fallback.
        """
        if not layer.double_quant:
            return []
        without = self._float32_scales(layer, name)
        whole = self.aten.elementwise("add.Tensor", f"{name}, scales", without)
        return [without, whole] if self.aten.on_gpu else [whole]

    def _float32_scales(self, layer: FourBitLinear, name: str) -> Tensor:
        blocks = -(-layer.out * layer.into // BLOCK)
        return self.aten.new("dequantize_blockwise", f"{name}, scales", ((blocks,),), FLOAT32)

    def _weight(self, layer: FourBitLinear, name: str, scales: list[Tensor]) -> Tensor:
        """Of codes, two in a byte, and float32 scales."""
        dims = ((layer.out,), (layer.into,))
        called, elements = f"{name}, dequantised weight", layer.out * layer.into
        stored = [] if scales else [(-(-elements // BLOCK), FLOAT32)]
        return self.aten.new(
            "dequantize_4bit",
            called,
            dims,
            layer.itemsize,
            reads=scales[-1:],
            rows=[(elements // 2,), *stored],
        )

    def dequantised(self, layer: FourBitLinear, name: str) -> Tensor:
        """functional.dequantize_4bit: the offset is added in place, the scales go when it ends."""
        scales = [self._float32_scales(layer, name)] if layer.double_quant else []
        return self._weight(layer, name, scales)
