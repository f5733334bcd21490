"""A frozen linear layer of 4-bit weights, as bitsandbytes 0.41.1 runs it.

autograd/_functions.py, MatMul4Bit; functional.py, dequantize_4bit. The weight is made anew forward
and backward, in float16 where it was quantised from that, and then once more in the dtype that is
computed in. The input is an attribute of the node, not one of its saved tensors: where it needs a
gradient, it lives until the whole graph goes.
"""

from __future__ import annotations

from planner.autograd.four_bit import BLOCK, FourBitLinear
from planner.autograd.products import FLOAT32, Products
from planner.autograd.recording import only
from planner.autograd.tensors import Gradients, Node, Tensor


class EarlyFourBitProducts(Products):
    """Products with weights of 4 bits."""

    def early_four_bit(
        self,
        x: Tensor,
        layer: FourBitLinear,
        bias: Tensor | None,
        name: str,
        *,
        from_half: bool,
        held: list[Tensor],
    ) -> Tensor:
        """MatMul4Bit; `from_half`: weights come as float16 and are cast. `held` takes the input."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            gradient, like = only(flowed), node.inputs[0]
            called = f"gradient of {like.name}"
            weight = self._made_anew(layer, called, from_half=from_half)
            rows = tuple(extent for dim in gradient.dims[:-1] for extent in dim)
            flat = self.aten.reshape(gradient, (rows, gradient.dims[-1]))
            return [self.aten.reshape(self.aten.mm(flat, weight, called), like.dims)]

        weight = self._made_anew(layer, f"{name}, dequantised weight", from_half=from_half)
        dims = (*x.dims[:-1], (layer.out,))
        out = self.aten.new(
            "mm" if bias is None else "addmm",
            name,
            dims,
            layer.itemsize,
            flops=(2, *(extent for dim in (*dims, x.dims[-1]) for extent in dim)),
            reads=(x, weight) if bias is None else (x, weight, bias),
        )
        del weight
        if x.node is not None:
            held.append(x.detach())
        return self._record(backward, (x,), out)

    def _made_anew(self, layer: FourBitLinear, name: str, *, from_half: bool) -> Tensor:
        """dequantize_4bit(…).to(dtype): nested scales go before the cast."""
        aten, dims = self.aten, ((layer.out,), (layer.into,))
        blocks = -(-layer.out * layer.into // BLOCK)
        scales = [
            aten.new("dequantize_blockwise", f"{name}, scales", ((blocks,),), FLOAT32)
            for _ in range(layer.double_quant)
        ]
        weight = aten.new("dequantize_4bit", name, dims, layer.itemsize, reads=scales)
        del scales
        if not from_half:
            return weight
        return aten.new("_to_copy", name, dims, layer.itemsize, reads=(weight,))
