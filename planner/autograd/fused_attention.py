"""torch's fused attention: F.scaled_dot_product_attention, and what each of its kernels allocates.

ATen/native/transformers of torch 2.11 and 2.13: attention.cpp and cuda/sdp_utils.cpp (which kernel
runs), cuda/attention.cu, attention_backward.cu, cudnn/MHA.cpp (what it allocates). The scratch of
cuDNN and of the efficient kernel is not in that source: it is what an H200's allocator was asked
for, in profiles/data/histories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from planner.autograd.layouts import preserved
from planner.autograd.products import FLOAT32, Products
from planner.autograd.recording import only
from planner.autograd.tensors import Dims, Gradients, Like, Node, Tensor
from planner.dtypes import element_bytes
from planner.program import Dims as Sizes
from planner.program import Extent, Number, Shape, Symbol, evaluate, formula, maximum, minimum

FusedKernel: TypeAlias = Literal["cpu", "flash", "cudnn", "efficient"]

SEED_BYTES, CUDNN_WORKSPACE_BYTES = 8, 256
"""cuDNN: dropout's seed and offset, there without dropout too; its own workspace forward."""
SPLIT_KEYS, SPLIT_BYTES = 128, 128
EFFICIENT_ROW_BYTES = 128
"""Of the workspace that the efficient backward adds for each head of each sequence."""

NAMES = {
    "cpu": "_scaled_dot_product_flash_attention_for_cpu",
    "flash": "_scaled_dot_product_flash_attention",
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
}


def fused_kernel(device: str, capability: str | None, itemsize: int) -> FusedKernel:
    """The kernel that torch tries first: on Hopper and datacentre Blackwell cuDNN's.

    sdp_utils.cpp, check_prefer_cudnn_attention: cuDNN from 9.15 on, on 9.x and 10.x. Neither it nor
    flash takes float32.
    """
    if device == "cpu":
        return "cpu"
    if itemsize == FLOAT32:
        return "efficient"
    return "cudnn" if (capability or "").split(".")[0] in ("9", "10") else "flash"


def kernel_note(device: str, capability: str | None, dtype: str) -> str:
    """What has to be said of a training step there: whose scratch was not seen on a GPU."""
    if fused_kernel(device, capability, element_bytes(dtype)) != "flash":
        return ""
    return "approximate: the scratch of flash attention is from its source, not measured"


class FusedAttention(Products):
    """Scores, softmax and values in one kernel that never holds the scores."""

    def fused_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        name: str,
        *,
        pairs: Extent,
        kernel: FusedKernel,
        trains: bool,
    ) -> Tensor:
        """Saves q, k, v, mask, output and log-sum-exp.

        q [B, H, T, D], k and v [B, G, T, D]; the output lies as q, gradients as [B, T, heads, D].
        Values of another width are for passes without a way back. `pairs` of query and key are
        computed, twice forward and five times on the way back (the scores are made again). The
        efficient kernel alone gives a mask that is learnt a gradient, one a sequence
        (attention_backward.cu, grad_bias).
        """
        called, scratch = NAMES[kernel], SCRATCH[kernel]

        def backward(node: Node, flowed: Gradients) -> Gradients:
            made: Gradients = []
            reads = (only(flowed), *node.saved)
            for index, like in enumerate(node.inputs):
                B, H, T, D = like.dims
                first, last = index == 0, index == 2
                lying = self.aten.new(
                    f"{called}_backward",
                    f"gradient of {like.name}",
                    (B, T, H, D),
                    like.itemsize,
                    flops=(10, *B, *H, *D, pairs) if first else None,
                    reads=reads if first else (),
                    scratch=scratch(node.inputs) if last else (),
                )
                made.append(self.aten.transpose(lying, 1, 2))
                if last:
                    break
            if learnt is not None:
                dims = (*node.inputs[0].dims[:3], node.inputs[1].dims[2])
                made.append(self.aten.new(f"{called}_backward", learnt, dims, learnt_bytes))
            if kernel == "efficient":
                self._efficient_scratch(called, node.inputs[0])
            return made

        learnt, learnt_bytes = None, 0
        if mask is not None and mask.node is not None and kernel == "efficient":
            learnt, learnt_bytes = f"gradient of {mask.name}, of all sequences", mask.itemsize
        B, H, T, _ = q.dims
        widths = q.sizes[-1] + v.sizes[-1]
        flops = (2, *B, *H, widths, pairs)
        dims, laid = (B, H, T, v.dims[-1]), None
        if q.sizes[-1] == v.sizes[-1]:
            laid = preserved(q.sizes, q.strides)  # as the queries lie
        seeds = [
            self.aten.new(called, f"dropout {what}", (), SEED_BYTES)
            for what in (("seed", "offset") if kernel == "cudnn" else ())
        ]
        reads = (q, k, v) if mask is None else (q, k, v, mask)
        out = self.aten.new(called, name, dims, q.itemsize, strides=laid, flops=flops, reads=reads)
        rows: list[Tensor] = []
        if trains or kernel in ("cpu", "flash"):
            last = (_whole_blocks(T),) if kernel == "efficient" else T
            rows.append(self.aten.new(called, "log-sum-exp", (B, H, last), FLOAT32))
        if kernel == "cudnn":
            one = self.aten.sizes((T,)) == (1,) and mask is None
            size: Shape = (CUDNN_WORKSPACE_BYTES,)
            if one:  # values narrower than keys (latent attention) are not split: none was seen
                size = self._split_bytes(q, k) if q.sizes[-1] == v.sizes[-1] else (0,)
            self.aten.new(called, "workspace", (size,), 1, returned=False)
        seeds.reverse()  # a list lets go of its last one first
        masks = () if mask is None else (mask,)
        saved = (*seeds, out, *rows, v, q, k, *masks)  # the last ones go first
        inputs = (q, k, v) if learnt is None or mask is None else (q, k, v, mask)
        return self._record(backward, inputs, out, saved)

    def _split_bytes(self, q: Tensor, k: Tensor) -> Shape:
        """cuDNN's workspace for one query: keys in splits, each with its output, maximum and sum.

        Seen on an H200: 4 splits of 513 keys with 32 pairs of sequence and key head, 8 of 1 025
        with 2, none with 128: as many as fill the multiprocessors, of 128 keys or more.
        """
        (B, H, _, (D,)), (G, keys) = q.dims, k.dims[1:3]
        assert isinstance(D, int)
        room = self.aten.multiprocessors

        def size(d: Sizes) -> Number:
            pairs = evaluate((*B, *G), d)
            splits = minimum(maximum(room // pairs, 1), maximum(evaluate(keys, d) // SPLIT_KEYS, 1))
            rows = evaluate((*B, *H), d) * (D + 2)
            return (FLOAT32 * splits * rows + SPLIT_BYTES) * (splits > 1)

        return (
            Symbol(f"split({formula((*B, *H))}, {formula((*B, *G))}, {formula(keys)}, {D})", size),
        )

    def _efficient_scratch(self, called: str, queries: Like) -> None:
        """The row sums of gradient · output in float32, then the kernel's workspace."""
        B, H, T, D = queries.dims
        product = self.aten.new("mul.Tensor", "gradient · output", (B, H, T, D), FLOAT32)
        sums = self.aten.new("sum.dim_IntList", "row sums", (B, H, T), FLOAT32, reads=(product,))
        again = self.aten.new("clone", "row sums", (B, H, T), FLOAT32, reads=(sums,))
        del sums, product
        rows: Dims = (B, H, (_workspace_row(T, D),))
        workspace = self.aten.new(f"{called}_backward", "workspace", rows, 1)
        del again, workspace


def _whole_blocks(T: Shape) -> Symbol:
    """Queries in whole blocks of 32."""
    return Symbol(f"ceil32({formula(T)})", lambda d: -(-evaluate(T, d) // 32) * 32)


def _workspace_row(T: Shape, D: Shape) -> Symbol:
    """Bytes that one head of one sequence has in the efficient backward's workspace."""
    (width,) = D
    assert isinstance(width, int)
    per_token = FLOAT32 * width
    return Symbol(
        f"({per_token} · {formula(T)} + {EFFICIENT_ROW_BYTES})",
        lambda d: per_token * evaluate(T, d) + EFFICIENT_ROW_BYTES,
    )


def _no_scratch(inputs: Sequence[Like]) -> list[tuple[Shape, int]]:
    return []


def _flash_scratch(inputs: Sequence[Like]) -> list[tuple[Shape, int]]:
    """mha_bwd (flash_attn/flash_api.cpp): a float32 gradient of q, row sums, and gradients of k and
    v for every query head: (shape, itemsize)."""
    B, H, T, (D,) = inputs[0].dims
    assert isinstance(D, int)
    rows = (*B, *H, Symbol("ceil128(T)", lambda d: -(-d.tokens // 128) * 128))
    scratch: list[tuple[Shape, int]] = [(rows, FLOAT32), ((*rows, D + -D % 32), FLOAT32)]
    if inputs[1].dims[1] != H:
        scratch += [((*B, *T, *H, D), inputs[0].itemsize)] * 2
    return scratch


def _cudnn_scratch(inputs: Sequence[Like]) -> list[tuple[Shape, int]]:
    """One workspace of cuDNN's: the same parts, seen at 32 query and 8 key heads of 64 and 128."""
    B, H, T, (D,) = inputs[0].dims
    assert isinstance(D, int)
    grouped = inputs[1].dims[1] != H
    per_row = FLOAT32 * D + FLOAT32 + 2 * inputs[0].itemsize * D * grouped
    shape = (per_row, *B, *H, *T)
    size = Symbol(
        f"({formula(shape)} + {CUDNN_WORKSPACE_BYTES})",
        lambda d: evaluate(shape, d) + CUDNN_WORKSPACE_BYTES,
    )
    return [((size,), 1)]


SCRATCH: dict[str, Callable[[Sequence[Like]], list[tuple[Shape, int]]]] = {
    "cpu": _no_scratch,
    "flash": _flash_scratch,
    "cudnn": _cudnn_scratch,
    "efficient": _no_scratch,
}
