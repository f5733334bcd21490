"""Decoder layers: <Type>DecoderLayer.forward, by where its norms stand."""

from __future__ import annotations

from planner.autograd.tensors import Tensor
from planner.layers import Dense, Layer, MoE
from planner.program import B, T
from planner.runtimes.transformers_code.bloom import BloomWriter
from planner.runtimes.transformers_code.falcon import FalconWriter
from planner.runtimes.transformers_code.mixture import MixtureWriter
from planner.runtimes.transformers_code.regime import Shared


class BlockWriter(BloomWriter, FalconWriter, MixtureWriter):
    """One layer. What a forward there names lives here until it returns, too."""

    def block(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """The layer's forward."""
        self.left_alone = layer.left_alone
        match self.code.block:
            case "gpt2":
                return self._gpt2(layer, x, given)
            case "neox":
                return self._neox(layer, x, given)
            case "stablelm":
                return self._stablelm(layer, x, given)
            case "opt":
                return self._opt(layer, x, given)
            case "bloom":
                return self.bloom_block(layer, x, given)
            case "falcon":
                return self.falcon_block(layer, x, given)
        match layer.placement:
            case "pre":
                return self._pre(layer, x, given)
            case "post":
                return self._post(layer, x, given)
            case "sandwich":
                return self._sandwich(layer, x, given)
            case "post-sum":
                return self._post_sum(layer, x, given)
            case _:
                return self._parallel(layer, x, given)

    def fed(self, layer: Layer, x: Tensor) -> Tensor:
        """The feed-forward or the mixture."""
        match layer.feed_forward:
            case Dense() as dense:
                return self.feed_forward(dense, x)
            case MoE() as moe:
                return self.mixture(moe, x)
            case _:
                raise AssertionError("refused by check_planned")

    def _normed(self, layer: Layer, x: Tensor, name: str) -> Tensor:
        return self.norm(layer.norm, x, name, name)

    def _scaled(self, layer: Layer, x: Tensor) -> Tensor:
        return x if layer.residual_multiplier is None else self.f.scale(x, "scaled")

    def _pre(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        f = self.f
        hidden = self._normed(layer, x, "attention norm")
        hidden, weights = self.attention(layer, hidden, given)
        hidden = f.add(x, self._scaled(layer, hidden), "residual")
        residual = hidden
        hidden = self._normed(layer, hidden, "feed-forward norm")
        hidden = self.fed(layer, hidden)
        hidden = f.add(residual, self._scaled(layer, hidden), "hidden states")
        del residual
        if self.code.loop:
            self.loop(weights)
        del weights
        return hidden

    def _post(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        f = self.f
        hidden, weights = self.attention(layer, x, given)
        hidden = self._normed(layer, hidden, "post norm")
        hidden = f.add(x, hidden, "residual")
        residual = hidden
        hidden = self.fed(layer, hidden)
        hidden = self._normed(layer, hidden, "post norm")
        hidden = f.add(residual, hidden, "hidden states")
        del residual, weights
        return hidden

    def _sandwich(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        f = self.f
        hidden = self._normed(layer, x, "attention norm")
        hidden, weights = self.attention(layer, hidden, given)
        hidden = self._normed(layer, hidden, "post norm")
        hidden = f.add(x, hidden, "residual")
        residual = hidden
        hidden = self._normed(layer, hidden, "feed-forward norm")
        hidden = self.fed(layer, hidden)
        hidden = self._normed(layer, hidden, "post norm")
        hidden = f.add(residual, hidden, "hidden states")
        del residual, weights
        return hidden

    def _post_sum(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        f = self.f
        hidden, weights = self.attention(layer, x, given)
        hidden = f.add(x, hidden, "residual")
        hidden = self._normed(layer, hidden, "attention norm")
        residual = hidden
        hidden = self.fed(layer, hidden)
        hidden = f.add(residual, hidden, "residual")
        hidden = self._normed(layer, hidden, "hidden states")
        del residual, weights
        return hidden

    def _parallel(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """PhiDecoderLayer, CohereDecoderLayer, StableLmDecoderLayer."""
        f = self.f
        hidden = self._normed(layer, x, "attention norm")
        attended, weights = self.attention(layer, hidden, given)
        if layer.placement == "parallel-two":
            hidden = self._normed(layer, x, "feed-forward norm")
        fed = self.fed(layer, hidden)
        if self.code.block == "phi":
            hidden = f.add(f.add(attended, fed, "residual"), x, "hidden states")
        else:
            hidden = f.add(f.add(x, attended, "residual"), fed, "hidden states")
        del weights
        return hidden

    def _gpt2(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """GPT2Block.forward."""
        f = self.f
        hidden = self._normed(layer, x, "attention norm")
        attended, weights = self.attention(layer, hidden, given)
        hidden = f.add(attended, x, "residual")
        residual = hidden
        hidden = self._normed(layer, hidden, "feed-forward norm")
        fed = self.fed(layer, hidden)
        hidden = f.add(residual, fed, "hidden states")
        del attended, weights
        return hidden

    def _neox(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """GPTNeoXLayer.forward."""
        f = self.f
        attended, weights = self._normed_and_attended(layer, x, given)
        if layer.placement == "pre":
            attended = f.add(attended, x, "residual")
            fed = self._normed_and_fed(layer, attended)
            hidden = f.add(fed, attended, "hidden states")
        else:
            fed = self._normed_and_fed(layer, x)
            hidden = f.add(f.add(fed, attended, "residual"), x, "hidden states")
        del weights
        return hidden

    def _normed_and_attended(
        self, layer: Layer, x: Tensor, given: Shared
    ) -> tuple[Tensor, Tensor | None]:
        normed = self._normed(layer, x, "attention norm")
        return self.attention(layer, normed, given)

    def _normed_and_fed(self, layer: Layer, x: Tensor) -> Tensor:
        normed = self._normed(layer, x, "feed-forward norm")
        return self.fed(layer, normed)

    def _stablelm(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """StableLmDecoderLayer.forward."""
        f, residual = self.f, x
        hidden = self._normed(layer, x, "attention norm")
        attended, weights = self.attention(layer, hidden, given)
        if layer.placement == "pre":
            residual = f.add(residual, attended, "residual")
            fed = self._normed_and_fed(layer, residual)
            out = f.add(residual, fed, "hidden states")
        else:
            fed = self.fed(layer, hidden)
            out = f.add(f.add(residual, attended, "residual"), fed, "hidden states")
        del weights
        return out

    def _opt(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """OPTDecoderLayer.forward: the feed-forward on [B · T, h]."""
        f, first = self.f, layer.placement == "pre"
        hidden = self._normed(layer, x, "attention norm") if first else x
        hidden, weights = self.attention(layer, hidden, given)
        hidden = f.add(x, hidden, "residual")
        if not first:
            hidden = self._normed(layer, hidden, "attention norm")
        shape = hidden.dims
        hidden = f.view(hidden, ((B, T), shape[2]))
        residual = hidden
        if first:
            hidden = self._normed(layer, hidden, "feed-forward norm")
        assert isinstance(layer.feed_forward, Dense)
        dense = layer.feed_forward
        hidden = self.linear(hidden, "up_proj", dense.intermediate_size, bias=dense.bias)
        hidden = self.activate(dense.activation, hidden)
        hidden = self.linear(hidden, "down_proj", self.model.hidden_size, bias=dense.bias)
        hidden = f.view(f.add(residual, hidden, "hidden states"), shape)
        if not first:
            hidden = self._normed(layer, hidden, "hidden states")
        del weights
        return hidden
