"""Training steps of attnlab (kernels/attnlab/training.py) as programs.

The forward is written as attnlab's own, line by line and `del` by `del`, on tensors without
contents (`planner/autograd`); the backward follows from what it recorded. The first layer of each
kind is written apart from those like it: it comes last on the way back, and frees what they share
(rotary tables, masks).
"""

from __future__ import annotations

from functools import lru_cache

from planner.autograd.fused_attention import kernel_note
from planner.autograd.tensors import Tensor
from planner.errors import ConfigError
from planner.layers import Dense, Layer, LearnedPositions, MoE, RoPE, Sinusoidal
from planner.model import Model
from planner.program import B, Dims, Program, T
from planner.runtimes.attnlab_training.attention import AttentionWriter
from planner.runtimes.attnlab_training.chunked_loss import ChunkedLoss, in_chunks
from planner.runtimes.attnlab_training.mixture import MixtureWriter, check_trained
from planner.runtimes.attnlab_training.regime import Regime, Shared, Step, gqa_of, window_of
from planner.runtimes.base import Phase, Setting, check_step
from planner.runtimes.writer import FLOAT32, INT64
from planner.workload import Training


def training_phase(model: Model, work: Training, setting: Setting) -> Phase:
    """One step's program and sizes; ConfigError for what is not planned."""
    held = work.held_dtype(setting.dtype)
    check_trained(model, held)
    check_step(
        "attnlab",
        work,
        method=("full", "lora"),
        precision=("pure", "autocast"),
        keep_every=(1,),
    )
    if work.adapters is not None and work.adapters.dora:
        raise ConfigError("lora.dora=True is not what runtime=attnlab has: False, or transformers")
    if work.precision == "autocast" and setting.dtype != "bf16":
        raise ConfigError(f"precision='autocast' in dtype={setting.dtype!r} is not planned: bf16")
    tokens = work.sequence_tokens
    dims = Dims(batch=work.batch, tokens=tokens, context=tokens, routing=work.routing)
    regime = Regime.of(model, dims)
    if setting.device == "cuda" and setting.attention == "sdpa":
        _check_flash(model, regime)
    step = Step(
        attention=setting.attention,  # type: ignore[arg-type]
        dtype=held,
        device=setting.device,
        capability=setting.capability,
        multiprocessors=setting.multiprocessors,
        optimizer=work.optimizer,
        optimizer_impl=work.optimizer_impl,
        checkpointing=work.checkpointing,
        checkpoint_every=work.checkpoint_every,
        lora=work.adapters,
        autocast=setting.dtype if work.precision == "autocast" else None,
        loss_chunk_tokens=work.loss_chunk_tokens,
    )
    note = kernel_note(setting.device, setting.capability, setting.dtype)
    program = in_chunks(step_program(model, step, regime), work.loss_chunk_tokens, dims)
    return Phase(name="training step", program=program, dims=dims, note=note)


def _check_flash(model: Model, regime: Regime) -> None:
    """ConfigError where CUDA's flash attention does not run: torch's choice then is unknown."""
    widths = {gqa_of(layer).head_dim for layer in model.layer_kinds()}
    why = {
        f"over a window of {max(regime.masked, default=0)} tokens": bool(regime.masked),
        f"of head_dim={max(widths)}": any(D % 8 or D > 256 for D in widths),
    }
    for part, refused in why.items():
        if refused:
            raise ConfigError(
                f"attention=sdpa {part} is not planned for training on a GPU yet: naive"
            )


@lru_cache(maxsize=128)
def step_program(model: Model, step: Step, regime: Regime) -> Program:
    """Forward and backward of [B, T] ids and labels, in one regime of sizes.

    Of a loss in chunks one whole and one shorter chunk is written: see in_chunks.
    """
    return _Training(model, step, regime).write_step(
        "attnlab training step", step.optimizer, step.optimizer_impl
    )


class _Training(AttentionWriter, MixtureWriter):
    """Runs attnlab's training_step."""

    def embed(self) -> Tensor:
        """Transformer._embed and ._masks: hidden states, rotary tables and masks."""
        model, f, h = self.model, self.f, self.model.hidden_size
        self.table = self.weight("embed_tokens", model.vocab_size, model.embedding_size or h)
        self.start()
        x = f.embedding(self.table, self.given("token ids", ((B,), (T,)), INT64), "hidden states")
        if model.embedding_norm is not None:
            x = self.norm(model.embedding_norm, x, "hidden states", "embed_norm")
        if model.embedding_size is not None:
            x = self.linear(x, "project_in", h, bias=False, name="hidden states")
        if model.embedding_scale is not None:
            x = f.scale(x, "hidden states")
        match model.positions:
            case LearnedPositions() as learned:
                x = self.learned_positions(x, learned)
            case Sinusoidal():
                x = self.sinusoids(x)
        for sliding, positions in ((False, model.positions), (True, model.local_positions)):
            if isinstance(positions, RoPE):
                self.rotations[sliding] = self.rotary_tables(positions)
        self.make_masks()
        return x

    def head(self, hidden: list[Tensor]) -> Tensor:
        """Last norm, head, caps, cross-entropy in float32."""
        model, f = self.model, self.f
        self.finish()
        x, V = hidden.pop(), model.vocab_size
        if model.final_norm is not None:
            x = self.norm(model.final_norm, x, "final norm", "norm")
        if model.embedding_size is not None:
            x = self.linear(x, "project_out", model.embedding_size, bias=False)
        head = self.table if model.tie_word_embeddings else self.weight("lm_head", V, x.sizes[-1])
        bias = self.weight("lm_head.bias", V) if model.lm_head_bias else None
        if self.step.loss_chunk_tokens is not None:
            chunked = ChunkedLoss(f, model, self.step.loss_chunk_tokens)
            handed = self.hidden_gradient if x.storage.buffer is self.hidden else None
            return chunked.loss(x, head, bias, gradient=handed)
        logits = f.linear(x, head, bias, "logits")
        del x
        if model.logit_scale is not None:
            logits = f.scale(logits, "logits")
        if model.final_logit_softcapping is not None:
            logits = f.scale(logits, "logits", kernel="div.Tensor")
            logits = f.pointwise(logits, "logits", "tanh", saves="result")
            logits = f.scale(logits, "logits")
        wide = f.view(f.cast(logits, FLOAT32, "float32 logits"), ((B, T), (V,)))
        del logits
        return f.nll_loss(f.softmax(wide, "log-probabilities", kernel="_log_softmax"))

    def shared(self, layer: Layer) -> Shared:
        """The rotation and the mask of this kind of layer."""
        gqa = gqa_of(layer)
        assert self.positions is not None
        sliding = gqa.sliding_window is not None and True in self.rotations
        return Shared(
            rotation=self.rotations.get(sliding) if gqa.rope else None,
            mask=self.masks[window_of(gqa), gqa.chunked],
            positions=self.positions,
        )

    def block(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """block.Block.forward, by where its norms stand."""
        f = self.f
        gqa = gqa_of(layer)

        def fed(x: Tensor) -> Tensor:
            if isinstance(layer.feed_forward, MoE):
                return self.mixture(layer.feed_forward, x)
            assert isinstance(layer.feed_forward, Dense)
            return self.feed_forward(layer.feed_forward, x)

        def norm(x: Tensor, name: str) -> Tensor:
            return self.norm(layer.norm, x, name, name)

        def before(x: Tensor) -> Tensor:
            return norm(x, "attention norm")

        def after(x: Tensor) -> Tensor:
            return norm(x, "feed-forward norm")

        def post(x: Tensor) -> Tensor:
            return norm(x, "post norm")

        def attention(x: Tensor) -> Tensor:
            return self.attention(gqa, x, given)

        def scaled(x: Tensor) -> Tensor:
            return x if layer.residual_multiplier is None else f.scale(x, "scaled")

        match layer.placement:
            case "pre":
                x = f.add(x, scaled(attention(before(x))), "residual")
                return f.add(x, scaled(fed(after(x))), "hidden states")
            case "post":
                x = f.add(x, scaled(post(attention(x))), "residual")
                return f.add(x, scaled(post(fed(x))), "hidden states")
            case "post-sum":
                out = f.add(x, scaled(attention(x)), "residual")
                x = before(out)
                del out
                out = f.add(x, scaled(fed(x)), "residual")
                return norm(out, "hidden states")
            case "sandwich":
                out = post(attention(before(x)))
                x = f.add(x, scaled(out), "residual")
                del out
                out = post(fed(after(x)))
                return f.add(x, scaled(out), "hidden states")
            case "parallel":
                normed = before(x)
                out = f.add(x, scaled(attention(normed)), "residual")
                return f.add(out, scaled(fed(normed)), "hidden states")
            case _:  # parallel-two
                out = f.add(x, scaled(attention(before(x))), "residual")
                return f.add(out, scaled(fed(after(x))), "hidden states")
