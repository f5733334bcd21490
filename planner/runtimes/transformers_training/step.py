"""Training steps of transformers 5.23: <Type>ForCausalLM.forward with labels, without a cache.

Written beside models/<type>/modeling_<type>.py, masking_utils.py and loss/loss_utils.py of that
version, in train mode with dropout 0. Of the output only the loss is kept.
"""

from __future__ import annotations

from functools import lru_cache

from planner.autograd.aten import ONE
from planner.autograd.tensors import Tensor
from planner.errors import ConfigError
from planner.layers import Dense, Layer, RoPE
from planner.model import Model
from planner.program import B, Dims, Program, T
from planner.runtimes.base import Phase, Setting
from planner.runtimes.transformers_training.attention import AttentionWriter
from planner.runtimes.transformers_training.regime import (
    T_AND_ONE,
    Regime,
    Shared,
    Step,
    gqa_of,
)
from planner.runtimes.writer import BOOL, FLOAT32, INT64
from planner.workload import Training

EXACT_STEPS = frozenset(
    ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3",
     "starcoder2")
)  # fmt: skip
"""Model types whose steps were held against their classes (tests/)."""

WIDE_ROTARY = frozenset(("olmo", "olmo2", "olmo3"))
"""Types whose rotary tables stay float32."""

NOTE = "approximate: written from transformers' source and torch's, not measured on a GPU"


def training_phase(model: Model, work: Training, setting: Setting) -> Phase:
    """One step's program and sizes; ConfigError for what is not planned."""
    for field, planned in (("method", "full"), ("checkpointing", "none"), ("precision", "pure")):
        if getattr(work, field) != planned:
            raise ConfigError(
                f"{field}={getattr(work, field)!r} is not planned for runtime=transformers yet: "
                f"{planned}"
            )
    if model.text_type not in EXACT_STEPS or model.towers:
        raise ConfigError(
            f"training of model_type={model.model_type} is not planned for runtime=transformers "
            f"yet: {', '.join(sorted(EXACT_STEPS))}"
        )
    tokens = work.sequence_tokens
    dims = Dims(batch=work.batch, tokens=tokens, context=tokens)
    step = Step(
        attention=setting.attention,  # type: ignore[arg-type]
        dtype=setting.dtype,
        device=setting.device,
        optimizer=work.optimizer,
        optimizer_impl=work.optimizer_impl,
    )
    program = step_program(model, step, Regime.of(model, dims))
    note = NOTE if setting.device == "cuda" else ""
    return Phase(name="training step", program=program, dims=dims, note=note)


@lru_cache(maxsize=128)
def step_program(model: Model, step: Step, regime: Regime) -> Program:
    """Forward and backward of [B, T] ids and labels, in one regime of sizes."""
    return _Step(model, step, regime).write(
        "transformers training step", step.optimizer, step.optimizer_impl
    )


class _Step(AttentionWriter):
    """Runs <Type>ForCausalLM."""

    def embed(self) -> Tensor:
        """<Type>Model.forward before its layers."""
        model, f, aten = self.model, self.f, self.aten
        self.table = self.weight("embed_tokens", model.vocab_size, model.hidden_size)
        self.labels = self.given("labels", ((B,), (T,)), INT64)
        x = f.embedding(self.table, self.given("token ids", ((B,), (T,)), INT64), "hidden states")
        if model.embedding_scale is not None:
            x = f.scale(x, "hidden states")
        self.embedded = x.detach()  # the model's forward holds it until it returns
        index = aten.new("arange", "positions", ((T,),), INT64)
        self.positions: Tensor | None = aten.elementwise("add.Tensor", "positions", index)
        del index
        self.masks: dict[int | None, Tensor | None] = {}
        windows = [gqa_of(layer).sliding_window for layer in model.layer_kinds()]
        for window in dict.fromkeys(model.mask_windows or windows):
            self.masks[window] = self._mask(window)
        self.rotations: dict[bool, tuple[Tensor, Tensor]] = {}
        for layer in model.layer_kinds():
            slides = self._slides(layer)
            rope = model.local_positions if slides else model.positions
            if slides not in self.rotations and isinstance(rope, RoPE):
                self.rotations[slides] = self._rotary_tables(rope)
        return x

    def _slides(self, layer: Layer) -> bool:
        """Whether the layer turns by positions of its own, as gemma3's sliding ones."""
        return self.model.local_positions is not None and gqa_of(layer).sliding_window is not None

    def _mask(self, window: int | None) -> Tensor | None:
        """masking_utils: bool for sdpa where it cannot do without, additive for eager."""
        square = (ONE, ONE, (T,), (T,))
        eager = self.step.attention == "eager"
        if not eager and (window is None or window not in self.regime.masked):
            return None
        visible = self.aten.new("mask", "mask", square, BOOL)
        if window is not None:
            near = self.aten.new("mask", "mask", square, BOOL)
            visible = self.aten.new("bitwise_and.Tensor", "mask", square, BOOL, reads=(visible,))
            del near
        if not eager:
            return visible
        return self.aten.new(
            "where.self", "mask", ((B,), ONE, (T,), (T,)), self.b, reads=(visible,)
        )

    def _rotary_tables(self, rope: RoPE) -> tuple[Tensor, Tensor]:
        """<Type>RotaryEmbedding.forward: cos and sin, times the attention scaling."""
        aten, name, R = self.aten, "rotary tables", rope.rotary_dim
        wide = aten.new("_to_copy", name, (ONE, (T,), ONE), FLOAT32)
        freqs = aten.new("mul.Tensor", name, (ONE, (T,), (R // 2,)), FLOAT32, reads=(wide,))
        del wide
        angles = aten.new("cat", name, (ONE, ONE, (T,), (R,)), FLOAT32, reads=(freqs,))
        scaled = [
            aten.elementwise("mul.Tensor", name, aten.elementwise(kernel, name, angles))
            for kernel in ("cos", "sin")
        ]
        kept = FLOAT32 if self.model.text_type in WIDE_ROTARY else self.b
        cos, sin = (aten.cast(table, kept, name) for table in scaled)
        return cos, sin

    def shared(self, layer: Layer) -> Shared:
        """The rotation and the mask of this kind of layer."""
        rotation = self.rotations.get(self._slides(layer))
        return Shared(rotation=rotation, mask=self.masks[gqa_of(layer).sliding_window])

    def block(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """<Type>DecoderLayer.forward, by where its norms stand."""
        f = self.f
        assert isinstance(layer.feed_forward, Dense)
        gqa, dense = gqa_of(layer), layer.feed_forward

        def norm(x: Tensor, name: str) -> Tensor:
            return self.norm(layer.norm, x, name, name)

        if layer.placement == "post":  # olmo2
            x = f.add(x, norm(self.attention(gqa, x, given), "post norm"), "residual")
            return f.add(x, norm(self.feed_forward(dense, x), "post norm"), "hidden states")
        attended = self.attention(gqa, norm(x, "attention norm"), given)
        if layer.placement == "sandwich":
            attended = norm(attended, "post norm")
        x = f.add(x, attended, "residual")
        del attended
        fed = self.feed_forward(dense, norm(x, "feed-forward norm"))
        if layer.placement == "sandwich":
            fed = norm(fed, "post norm")
        return f.add(x, fed, "hidden states")

    def loss(self, hidden: list[Tensor]) -> Tensor:
        """Last norm, head, ForCausalLMLoss."""
        model, f = self.model, self.f
        x, V = hidden.pop(), model.vocab_size
        if model.final_norm is not None:
            x = self.norm(model.final_norm, x, "final norm", "norm")
        self.rotations, self.masks, self.positions = {}, {}, None
        del self.embedded
        head = self.table if model.tie_word_embeddings else self.weight("lm_head", V, x.sizes[-1])
        logits = f.linear(x, head, None, "logits")
        if model.final_logit_softcapping is not None:
            logits = f.scale(logits, "logits", kernel="div.Tensor")
            logits = f.pointwise(logits, "logits", "tanh", saves="result")
            logits = f.scale(logits, "logits")
        wide = f.cast(logits, FLOAT32, "float32 logits")
        padded = self.aten.new("constant_pad_nd", "padded labels", ((B,), (T_AND_ONE,)), INT64)
        shifted = padded  # of one sequence the slice behind the first is contiguous
        if self.regime.several_batches:
            shifted = self.aten.new("clone", "shifted labels", ((B,), (T,)), INT64, reads=(padded,))
        wide = f.view(wide, ((B, T), (V,)))
        loss = f.nll_loss(f.softmax(wide, "log-probabilities", kernel="_log_softmax"), shifted)
        del shifted, padded
        return loss
