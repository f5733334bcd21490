"""The `llama.cpp` runtime at commit 0c1e57098: a cache of whole contexts, allocated up front.

Cells (llama-context.cpp, llama-kv-cache.cpp): every sequence has a stream of n_ctx_seq cells, its
context rounded up to 256 (`kv_unified` off, as in the library's defaults). Sliding layers
(llama-kv-cache-iswa.cpp, `swa_full` off) have min(n_ctx_seq, n_swa + n_ubatch), rounded up to 256.
With MLA there is one tensor of latent and rotary key, and none of values.
"""

from __future__ import annotations

from functools import lru_cache

from planner.catalog.gpus import Gpu
from planner.errors import ConfigError
from planner.kv_cache import mixer_kind
from planner.kv_format_names import KV_FORMATS
from planner.kv_formats import attention_bytes, cached_tensors
from planner.layers import GQA, MLA, Dense
from planner.ledger import Row
from planner.model import Model
from planner.parallel import Share
from planner.program import Dims, Number, Program, minimum
from planner.runtimes.base import (
    Phase,
    Pool,
    Setting,
    check_cache_kind,
    check_kv_dtype,
    check_planned,
    choose_attention,
    one_share,
    static_capacity,
    whole,
)
from planner.runtimes.llamacpp_program import graph_program
from planner.workload import CacheSpec, Inference

CELLS_MULTIPLE = 256
BATCH_TOKENS, UBATCH_TOKENS = 2048, 512
"""n_batch and n_ubatch of llama_context_default_params."""

BLOCK = 32
"""Elements of a q8_0 or q4_0 block, which a head's width has to be a multiple of."""

GGML_TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
"""What our names of KV dtypes are called there."""

QUANTISED = ("int8", "int4")

SLIDING = ("gemma2", "gemma3", "gemma3_text", "gpt_oss", "cohere2")
"""Model types whose windows its architectures of the same name read (swa_type, src/models/)."""

WINDOW_IGNORED = ("mistral", "mixtral")
"""Model types that it loads as the architecture llama, which has no window."""


class LlamaCpp:
    """libllama on one device, everything offloaded to it."""

    name = "llama.cpp"
    pooled = False
    on_torch = False
    version = "0c1e57098"
    kv_dtypes = tuple(GGML_TYPES)

    def attention(self, model: Model, name: str | None) -> str:
        """flash, or eager: -fa off.

        Raises ConfigError for a model whose graph is not written as a program.
        """
        check_planned(self.name, model)
        for layer in model.layer_kinds():
            _window(model, _cached(model, layer.attention))
            if not isinstance(layer.attention, GQA) or not isinstance(layer.feed_forward, Dense):
                raise ConfigError(
                    f"runtime=llama.cpp does not plan MLA or experts of model_type="
                    f"{model.model_type} yet: kv_cache_bytes is known"
                )
        return choose_attention(self.name, model, name, ("flash", "eager"))

    def cache_rows(
        self,
        model: Model,
        *,
        batch: int,
        context_tokens: int,
        dtype: str,
        cache: CacheSpec | None,
        encoder_tokens: int,
        compute_dtype: str,
        decoded_tokens: int,
        blocks: tuple[int, int] | None = None,
    ) -> list[Row]:
        """Cells of `batch` sequences, the blocks' scales apart."""
        check_cache_kind(self.name, cache, ("static",))
        check_kv_dtype(self.name, dtype, self.kv_dtypes)
        context_tokens = static_capacity(cache, context_tokens)
        if not model.is_decoder:
            raise ConfigError(f"runtime=llama.cpp does not plan model_type={model.model_type} yet")
        rows = []
        for layer, count in model.layer_kinds().items():
            if layer.beside is not None or layer.cross_attention is not None:
                raise ConfigError(
                    f"runtime=llama.cpp does not plan the second caches of model_type="
                    f"{model.model_type} yet"
                )
            attention = _cached(model, layer.attention)
            cells = cache_cells(
                context_tokens, batch=batch, sliding_window=_window(model, attention)
            )
            rows += _rows(attention, count, batch=batch, cells=cells, dtype=dtype)
        return rows

    def rank(self, model: Model, tensor_parallel: int) -> Model:
        """All of it: one GPU."""
        return whole(self.name, model, tensor_parallel)

    def shares(
        self, model: Model, tensor_parallel: int, pipeline_parallel: int
    ) -> tuple[Share, ...]:
        """All of it: one GPU."""
        return one_share(self.name, model, tensor_parallel, pipeline_parallel)

    def peak_note(self, model: Model) -> str:
        """Written from the source."""
        return (
            "uncalibrated: written from llama.cpp's source; ggml's allocator leaves holes that are "
            "not planned"
        )

    def cache_note(self, setting: Setting) -> str:
        """Nothing."""
        return ""

    def buffer_rows(self, model: Model, *, dtype: str, capability: str | None = None) -> list[Row]:
        """None: rotations are computed from the positions."""
        return []

    def alike(self, model: Model, work: Inference) -> Number:
        """All cells run the same programs."""
        return 0

    def memory_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        """The graph reserved at the start: n_ubatch tokens of one sequence over all its cells."""
        if setting.attention == "eager" and setting.kv_dtype in QUANTISED:
            raise ConfigError(
                f"kv_dtype={setting.kv_dtype!r} is not allowed with attention='eager' in "
                "runtime=llama.cpp: quantised values need attention='flash'"
            )
        cells = cache_cells(static_capacity(setting.cache, work.context_tokens), batch=work.batch)
        tokens = ubatch_tokens(cells, batch=work.batch)
        program = _program(model, setting, logits_of_all=True)
        return [
            Phase(
                name="reserved graph",
                program=program,
                dims=Dims(batch=1, tokens=tokens, context=cells),
            )
        ]

    def pool(
        self, share: Share, setting: Setting, gpu: Gpu, *, budget_bytes: int, held_bytes: int
    ) -> Pool | None:
        """None: the cache is as large as the context that is asked for."""
        return None

    def prefill(self, model: Model, work: Inference, setting: Setting) -> Program:
        """The whole prompt, logits of each sequence's last token."""
        return _program(model, setting, logits_of_all=work.logits == "all")

    def decode(self, model: Model, work: Inference, setting: Setting) -> Program:
        """One token for every sequence."""
        return _program(model, setting, logits_of_all=False)


def padded(tokens: Number) -> Number:
    """Tokens rounded up to a multiple of 256."""
    return -(-tokens // CELLS_MULTIPLE) * CELLS_MULTIPLE


def ubatch_tokens(cells: Number, *, batch: Number) -> Number:
    """Tokens of a graph: n_ubatch, bounded by n_batch and by the cells of all sequences."""
    return minimum(cells * batch, min(BATCH_TOKENS, UBATCH_TOKENS))


def cache_cells(
    context_tokens: Number, *, batch: Number, sliding_window: int | None = None
) -> Number:
    """Cells of one sequence in one layer."""
    cells = padded(context_tokens)
    if sliding_window is None:
        return cells
    return padded(minimum(cells, sliding_window + ubatch_tokens(cells, batch=batch)))


def _cached(model: Model, attention: object) -> GQA | MLA:
    """An attention that caches keys and values of its own, and nothing else; else ConfigError."""
    match attention:
        case GQA(shares_cache=False, chunked=False):
            return attention
        case MLA(shares_cache=False, indexer=None):
            return attention
    raise ConfigError(
        f"runtime=llama.cpp does not plan the cache of model_type={model.model_type} yet: "
        "full, sliding and latent attention"
    )


def _window(model: Model, attention: GQA | MLA) -> int | None:
    """The window that llama.cpp keeps to; ConfigError where we have not read what it does."""
    window = attention.sliding_window if isinstance(attention, GQA) else None
    if window is None or model.model_type in WINDOW_IGNORED:
        return None
    if model.model_type not in SLIDING:
        raise ConfigError(
            f"runtime=llama.cpp does not plan the sliding windows of model_type="
            f"{model.model_type} yet: those of {', '.join(SLIDING)}"
        )
    return window


def _rows(attention: GQA | MLA, count: int, *, batch: int, cells: int, dtype: str) -> list[Row]:
    """Elements, and scales where the type has them, of the layers of one kind."""
    kind = GGML_TYPES[dtype]
    blocks = dtype in QUANTISED
    tensors = cached_tensors(attention)
    if blocks and any(width % BLOCK for _, width in tensors):
        raise ConfigError(
            f"kv_dtype={dtype!r} ({kind}) is not allowed: heads of "
            f"{tensors[0][1]} are not whole blocks of {BLOCK}"
        )
    form = KV_FORMATS[kind if blocks else dtype]
    stored = attention_bytes(form, attention, batch=batch, tokens=cells, computed="fp16")
    width = sum(heads * width for heads, width in tensors)
    values = (("B", batch), ("cells", cells), ("width", width))
    bits = form.keys.bits
    elements = Row(
        component="kv_cache",
        item=f"{mixer_kind(attention)}, {kind}",
        count=count,
        formula="B · cells · width · bits / 8",
        values=(*values, ("bits", bits)),
        size_bytes=count * stored.elements_bytes,
        note=f"cells of whole contexts; llama.cpp {LlamaCpp.version}",
    )
    if not blocks:
        return [elements]
    scales = Row(
        component="kv_cache",
        item=f"{mixer_kind(attention)}, scales",
        count=count,
        formula=f"B · cells · width / {BLOCK} · 2",
        values=values,
        size_bytes=count * stored.scales_bytes,
        note=f"an fp16 scale for each block of {BLOCK}",
    )
    return [elements, scales]


@lru_cache(maxsize=128)
def _program(model: Model, setting: Setting, *, logits_of_all: bool) -> Program:
    return graph_program(
        model,
        dtype=setting.dtype,
        kv_dtype=setting.kv_dtype,
        flash=setting.attention == "flash",
        logits_of_all=logits_of_all,
    )
