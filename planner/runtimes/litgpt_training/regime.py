"""Which step is written, and what of its sizes decides how it looks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner.autograd.aten import Sizes
from planner.autograd.passes import HEAD, Part, PassWriter
from planner.autograd.tensors import Tensor
from planner.dtypes import element_bytes
from planner.layers import GQA, Layer
from planner.model import Model
from planner.program import Dims
from planner.tensors import Parameter
from planner.trained.prefix_adapters import METHODS, START_LAYER, trained_beside
from planner.workload import LoRA

NORMS = ("norm_1.", "norm_2.", "ln_f.")
SOME_BATCH = 999_983
"""A prime that stands for any number of sequences above 1 where strides are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Which training step. `four_bit`: linear layers of 4 bits; True: their scales are, too."""

    method: str
    dtype: str
    device: str
    capability: str | None = None
    multiprocessors: int = 0
    optimizer: str | None = None
    optimizer_impl: str = "foreach"
    lora: LoRA | None = None
    four_bit: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """What of the sizes decides which ops there are: the logits are made by so many tokens."""

    several_batches: bool
    tokens: int

    @staticmethod
    def of(dims: Dims) -> Regime:
        """The regime of one point."""
        return Regime(several_batches=bool(dims.batch > 1), tokens=int(dims.tokens))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What a block is given besides its input: rows of the rotary tables."""

    cos: Tensor
    sin: Tensor


class LitWriter(PassWriter[Shared]):
    """A step of lit-gpt in one regime of sizes."""

    def __init__(self, model: Model, step: Step, regime: Regime) -> None:
        tokens = regime.tokens
        batch = SOME_BATCH if regime.several_batches else 1
        super().__init__(
            model,
            element_bytes(step.dtype),
            Sizes(Dims(batch=batch, tokens=tokens, context=tokens)),
            lora=step.lora,
        )
        self.step, self.regime = step, regime
        self.known_leaves: dict[str, Tensor] = {}  # of the part: the head runs several times
        self.prefixed = False  # the layer that is being written has a prefix
        self.aten.watched = step.device == "cpu"
        self.aten.on_gpu = step.device == "cuda"
        self.aten.multiprocessors = step.multiprocessors

    @property
    def has_prefixes(self) -> bool:
        """Whether what is trained is LLaMA-Adapter's."""
        return self.step.method in METHODS

    def weight(self, name: str, *shape: int) -> Tensor:
        """A parameter of the model, trained where its kind is."""
        made = self.given(name, tuple((n,) for n in shape), self.b)
        norms = self.step.method == "adapter-v2" and name.startswith(NORMS)
        return self._trained_leaf(made) if norms or self.step.method == "full" else made

    def beside(self, name: str, *shape: int) -> Tensor:
        """A parameter beside the model's, whichever method adds it."""
        if name not in self.known_leaves:
            made = self.given(name, tuple((n,) for n in shape), self.b)
            self.known_leaves[name] = self._trained_leaf(made)
        return self.known_leaves[name]

    def run(self, part: Part, entered: list[Tensor]) -> Tensor:
        """One part; its layers have a prefix from one on."""
        self.prefixed = self.has_prefixes and part.layer is not None and part.layer >= START_LAYER
        self.known_leaves.clear()
        return super().run(part, entered)

    def _apart(self, layer: Layer, start: int) -> int:
        """Layers without a prefix, the first with one, and the first that hands a gradient on."""
        return START_LAYER + 2 if self.has_prefixes else super()._apart(layer, start)

    def trained_in(self, part: Part) -> Iterable[Parameter]:
        """Those of low-rank adapters, or of LLaMA-Adapter."""
        if not self.has_prefixes:
            return super().trained_in(part)
        trained = trained_beside(self.model, self.step.method)
        if part.layer is None:
            return [p for p in trained if p.layer is None] if part.label == HEAD else []
        return [p for p in trained if p.layer == part.layer]


def gqa_of(layer: Layer) -> GQA:
    """The attention of a layer that lit-gpt has."""
    assert isinstance(layer.attention, GQA)
    return layer.attention
