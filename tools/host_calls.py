"""Write planner/catalog/host_calls.json: what a decode step asks of the host.

    python -m tools.host_calls

Every decoder class that the planner writes down op by op is built small and decodes one token under
a counter: ops that run a kernel, calls of torch that run none (views), calls of Python functions
(modules, caches, masks, look-ups of a module's parameters). Widths change none of them; layers do,
so that what belongs to a layer is the difference of two depths, and the rest belongs to the pass.
Attention counts as one kernel: how many it is made of is the device's business. Checkpointing hands
every saved tensor through Python, and peft wraps every adapted linear layer: what both call in a
training step is counted too (on a CPU: without the states of CUDA's random numbers). Of other
caches than a runtime's usual one, and of padded prompts, what is counted is how much more than
that one they ask for. Run it after
changing the pinned transformers or attnlab; a test fails until the file says what is installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import planner
from planner import LoRA, Training
from planner.runtimes import runtime_named
from planner.runtimes.transformers import EAGER_ONLY
from planner.runtimes.transformers_code.families import HELD
from planner.timing.host_calls import FILE, PADDED, USUAL, Calls, cache_name
from planner.trained.lora import adapted
from profiles.bench import left_padding
from profiles.training_methods import prepared
from profiles.workloads import Workload, build

T = TypeVar("T")
OUT = Path(__file__).parents[1] / "planner" / "catalog" / FILE
DEPTHS = (12, 24)
"""Multiples of every pattern of layers (gemma3: one in six attends to all)."""
OWN_DEPTHS = {"bamba": (24, 36)}
"""About the depth of what was published: bamba's loop lists the kinds of all layers for each layer
(config.layers_block_type), so that its Python calls grow with the square of the depth."""
BATCH, PROMPT = 2, 4
NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "detach", "alias", "lift_fresh")
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16}
LATENT = {
    **WIDTHS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
GPT2 = {"n_embd": 64, "n_head": 4, "n_positions": 64}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {
        **{k: WIDTHS[k] for k in WIDTHS if k not in ("head_dim", "num_experts_per_tok")},
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
    },
    "bloom": {"hidden_size": 64, "n_head": 4},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": {k: WIDTHS[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")},
    "bert": {k: WIDTHS[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")},
    "t5": {
        "d_model": 64,
        "d_ff": 64,
        "d_kv": 16,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
    "opt": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 64,
        "pad_token_id": 1,
    },
    "deepseek_v2": {**LATENT, "topk_method": "greedy", "q_lora_rank": None},  # as V2-Lite has it
    "deepseek_v3": LATENT,
}
TYPES = tuple(sorted(HELD - {"bert", "t5"} | {"bamba", "deepseek_v2", "deepseek_v3"}))
"""Decoders."""
TRAINED = tuple(kind for kind in TYPES if kind in HELD)
"""Those whose training is planned."""
STARTS = {"pad_token_id": 0, "decoder_start_token_id": 0}
HEADS: dict[str, dict[str, Any]] = {
    "bert": {"architectures": ["BertForMaskedLM"]},
    "t5": {"architectures": ["T5ForConditionalGeneration"], **STARTS},
}
READERS = ("bert", "t5")
"""Types with an encoder: what a forward pass of training asks of a layer, of t5 the mean of both
towers' layers."""
Checkpointing = Literal["none", "full", "selective"]
POLICIES: tuple[tuple[str, Checkpointing], ...] = (
    ("checkpointed", "full"),
    ("selective", "selective"),
)
CHECKPOINTED: tuple[tuple[str, Checkpointing], ...] = (("plain", "none"), ("checkpointed", "full"))
DEPTH_NAMES = {"bloom": "n_layer", "gpt2": "n_layer", "gpt_bigcode": "n_layer", "t5": "num_layers"}


def config(kind: str, layers: int) -> dict[str, Any]:
    """A small config of a type."""
    depth = DEPTH_NAMES.get(kind, "num_hidden_layers")
    head = HEADS.get(kind, {})
    sizes = OWN.get(kind, {**WIDTHS, **EXPERTS})
    made = {"model_type": kind, "vocab_size": 128, depth: layers, **NO_TOKENS, **sizes, **head}
    if kind == "bamba":  # about as many attend as in bamba-9b: 3 of 32
        made["attn_layer_indices"] = list(range(9, layers, 12))
    return made


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ops of everything that runs inside, and those among them that run a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = self.dispatched = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run it, and count it where it is no view."""
        name = func.name().removeprefix("aten::")
        self.dispatched += 1
        self.kernels += not func.is_view and not name.startswith(NO_KERNEL)
        return func(*args, **(kwargs or {}))


class Viewing(TorchFunctionMode):
    """Calls of torch from Python that run no kernel but make a tensor: views.

    What makes several (chunk, split, unbind) narrows to each of them in turn, inside the call.
    """

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.counting, self.views = counting, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run it; a call that reached no op at all only asked for a shape."""
        before = self.counting.dispatched, self.counting.kernels
        out = func(*args, **(kwargs or {}))
        after = self.counting.dispatched, self.counting.kernels
        if after[0] > before[0] and after[1] == before[1]:
            self.views += 1 + (len(out) if isinstance(out, tuple | list) else 0)
        return out


PLAIN_CACHE: dict[str, Any] = {}
"""A cache as a runtime makes it where none is asked for."""


def decode_step(
    runtime: str, kind: str, attention: str, layers: int, cache: dict[str, Any] = PLAIN_CACHE
) -> Callable[[], Tensor]:
    """Runs the next step of a small model that has decoded two tokens, on the CPU.

    `cache`: what a Deployment says of it; `window` and `padded` beside that.
    """
    own = {"sliding_window": cache["window"]} if "window" in cache else {}
    model = planner.read_config(config(kind, layers) | own)
    built: Workload = build(
        model,
        runtime=runtime,
        attention=attention,
        dtype="bf16",
        device=torch.device("cpu"),
        kv_dtype=cache.get("kv_dtype"),
        cache=cache.get("cache"),
    )
    if cache.get("padded"):
        built.hide(left_padding(BATCH, PROMPT, 16))
    built.begin(batch=BATCH, capacity_tokens=16)
    prompt, token = (torch.zeros((BATCH, tokens), dtype=torch.int64) for tokens in (PROMPT, 1))
    built.forward(prompt, "last")
    built.forward(token, "last")
    return lambda: built.forward(token, "last")


def reading(kind: str, attention: str, layers: int) -> Callable[[], Tensor]:
    """Runs a small model's forward pass of training, on the CPU."""
    model = planner.read_config(config(kind, layers))
    device = torch.device("cpu")
    built: Any = build(
        model, runtime="transformers", attention=attention, dtype="bf16", device=device
    )
    module: Any = built.module.train()
    ids = torch.zeros((BATCH, PROMPT), dtype=torch.int64)
    return lambda: module(ids, labels=ids, **built.loss_arguments).loss


def counted(
    runtime: str, kind: str, attention: str, layers: int, cache: dict[str, Any] = PLAIN_CACHE
) -> Calls:
    """One decode step; of a type with an encoder a forward pass."""
    with torch.no_grad(), empty_attention():
        step = (
            reading(kind, attention, layers)
            if kind in READERS
            else decode_step(runtime, kind, attention, layers, cache)
        )
        counting = Counting()
        with counting, Viewing(counting) as viewing:
            step()
        calls, _ = python_calls(step)
    return Calls(kernels=float(counting.kernels), views=float(viewing.views), calls=float(calls))


def python_calls(run: Callable[[], T]) -> tuple[int, T]:
    """How many Python functions it calls, and its result."""
    calls = 0

    def seen(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(seen)
    try:
        made = run()
    finally:
        sys.setprofile(None)
    return calls, made


def trained(
    kind: str, checkpointing: Checkpointing = "none", lora: LoRA | None = None
) -> tuple[float, float]:
    """Python calls of one layer's forward and backward in transformers."""
    found = [_step(kind, n, checkpointing, lora) for n in DEPTHS]
    few, many = DEPTHS
    forward, backward = ((b - a) / (many - few) for a, b in zip(*found, strict=True))
    return round(forward, 2), round(backward, 2)


def _step(
    kind: str, layers: int, checkpointing: Checkpointing, lora: LoRA | None
) -> tuple[int, int]:
    model = planner.read_config(config(kind, layers))
    attention = attentions("transformers", kind)[-1]
    module: Any = build(
        model,
        runtime="transformers",
        attention=attention,
        dtype="bf16",
        device=torch.device("cpu"),
    ).module.train()
    work = Training(
        batch=BATCH,
        sequence_tokens=PROMPT,
        checkpointing=checkpointing,
        method="full" if lora is None else "lora",
        lora=lora,
    )
    module = prepared(module, work, dtype="bf16", weight_dtype=None)
    ids = torch.zeros((BATCH, PROMPT), dtype=torch.int64)
    counts = (0, 0)
    for _ in range(2):  # the first step looks things up that later ones find
        forward, out = python_calls(lambda: module(input_ids=ids, labels=ids, use_cache=False))
        backward, _ = python_calls(out.loss.backward)
        counts = forward, backward
    return counts


def training() -> dict[str, Any]:
    """A checkpointed layer's calls beyond a plain one's, and an adapted linear layer's."""
    made: dict[str, Any] = {"checkpointed": {}, "selective": {}}
    for kind in TRAINED:
        plain, _ = trained(kind)
        for name, policy in POLICIES:
            forward, backward = trained(kind, policy)
            made[name][kind] = [round(forward - plain, 2), backward]
    linears = len(adapted(planner.read_config(config(USUAL, 1)), LoRA(rank=4)))
    for method, lora in (("adapted", LoRA(rank=4)), ("dora", LoRA(rank=4, dora=True))):
        for name, policy in CHECKPOINTED:
            bare, wrapped = trained(USUAL, policy), trained(USUAL, policy, lora)
            each = [round((b - a) / linears, 2) for a, b in zip(bare, wrapped, strict=True)]
            made.setdefault(method, {})[name] = each
    return made


@contextmanager
def empty_attention() -> Iterator[None]:
    """sdpa as one kernel, whatever the device would make of it."""
    functional = torch.nn.functional
    kept = functional.scaled_dot_product_attention

    def nothing(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    functional.scaled_dot_product_attention = nothing
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = kept


def table() -> dict[str, dict[str, dict[str, dict[str, list[float]]]]]:
    """runtime → type → attention → what a layer and the pass around them ask for."""
    made: dict[str, Any] = {}
    for runtime in ("attnlab", "transformers"):
        for kind in TYPES:
            for attention in attentions(runtime, kind):
                layer, whole = parts(runtime, kind, attention)
                entry = made.setdefault(runtime, {}).setdefault(kind, {})
                entry[attention] = _numbers(layer, whole)
    for kind in READERS:
        attention = attentions("transformers", kind)[-1]
        layer, whole = parts("transformers", kind, attention)
        made["transformers"][kind] = {attention: _numbers(layer, whole)}
    return made


def _numbers(layer: Calls, whole: Calls) -> dict[str, list[float]]:
    pairs = (("layer", layer), ("pass", whole))
    return {part: [calls.kernels, calls.views, calls.calls] for part, calls in pairs}


def attentions(runtime: str, kind: str) -> tuple[str, ...]:
    """Those of a runtime that it takes for this type."""
    if runtime == "transformers":
        return ("eager",) if kind in EAGER_ONLY else ("eager", "sdpa")
    model = planner.read_config(config(kind, 2))
    rules = runtime_named(runtime)
    found = []
    for attention in ("naive", "sdpa"):
        try:
            planner.estimate(
                model,
                planner.Inference(batch=1, prompt_tokens=4, output_tokens=2),
                planner.Deployment(gpu="h200", runtime=rules.name, attention=attention),
            )
        except planner.ConfigError:
            continue
        found.append(attention)
    return tuple(found)


def caches() -> dict[str, dict[str, dict[str, Any]]]:
    """runtime → a cache's name → what asks for it: all that a runtime runs here but its usual one.

    A ring is one that the step turns.
    """
    made: dict[str, dict[str, Any]] = {"attnlab": {}, "transformers": {}}
    for kind in ("static", "dynamic", "paged", "ring"):
        own = {"window": PROMPT + 1} if kind == "ring" else {}
        plain = planner.CacheSpec(kind=kind)
        scaled = planner.CacheSpec(kind=kind, scales="token-head")
        kept = [(dtype, plain) for dtype in ("bf16", "fp8", "int8", "int4")]
        for dtype, spec in (*kept, ("fp8", scaled)):
            name = cache_name("attnlab", spec, kv_dtype=dtype, dtype="bf16")
            if name:
                made["attnlab"][name] = {"cache": spec, "kv_dtype": dtype, **own}
    for dtype in ("int8", "int4", "int2"):
        spec = planner.CacheSpec(kind="quantised", q_group_size=2, residual_tokens=4)
        name = cache_name("attnlab", spec, kv_dtype=dtype, dtype="bf16")
        made["attnlab"][name] = {"cache": spec, "kv_dtype": dtype}
    made["transformers"] = {
        "static": {"cache": planner.CacheSpec(kind="static")},
        "quantised fp8": {"kv_dtype": "fp8"},
        PADDED: {"padded": True},
    }
    return made


def more_of_caches() -> dict[str, dict[str, dict[str, list[float]]]]:
    """runtime → a cache's name → what a layer, and the pass around them, asks for beyond the usual.

    Counted in llama; rings, which need a window, in mistral.
    """
    made: dict[str, Any] = {}
    for runtime, named in caches().items():
        for name, cache in named.items():
            made.setdefault(runtime, {})[name] = {
                part: [calls.kernels, calls.views, calls.calls]
                for part, calls in zip(("layer", "pass"), beyond(runtime, cache), strict=True)
            }
    return made


def beyond(runtime: str, cache: dict[str, Any]) -> tuple[Calls, Calls]:
    """A layer's and the pass's calls over this cache less those over the usual one."""
    kind = "mistral" if "window" in cache else USUAL
    with_it, plain = (parts(runtime, kind, "sdpa", c) for c in (cache, PLAIN_CACHE))
    layer, whole = (a.plus(b.times(-1.0)) for a, b in zip(with_it, plain, strict=True))
    return layer, whole


def parts(
    runtime: str, kind: str, attention: str, cache: dict[str, Any] = PLAIN_CACHE
) -> tuple[Calls, Calls]:
    """What one layer asks for, averaged over the kinds there are, and what is left of the pass."""
    few, many = OWN_DEPTHS.get(kind, DEPTHS)
    a, b = (counted(runtime, kind, attention, layers, cache) for layers in (few, many))
    towers = 2 if kind == "t5" else 1
    more = b.plus(a.times(-1.0)).times(1 / (many - few) / towers)
    layer = Calls(**{name: round(value, 2) for name, value in asdict(more).items()})
    whole = a.plus(layer.times(-few * towers))
    return layer, Calls(**{name: round(value, 2) for name, value in asdict(whole).items()})


def content() -> dict[str, Any]:
    """The file's content."""
    return {
        "transformers": metadata.version("transformers"),
        "python": ".".join(map(str, sys.version_info[:2])),
        **training(),
        "caches": more_of_caches(),
        "counts": table(),
    }


def text(made: dict[str, Any]) -> str:
    """A type a line."""
    heads = [name for name in made if name != "counts"]
    lines = [f'"{name}": {json.dumps(made[name])}' for name in heads]
    engines = []
    for engine, kinds in made["counts"].items():
        rows = ",\n".join(f'"{kind}": {json.dumps(entry)}' for kind, entry in kinds.items())
        engines.append(f'"{engine}": {{\n{rows}\n}}')
    return "{\n" + ",\n".join(lines) + ',\n"counts": {\n' + ",\n".join(engines) + "\n}}\n"


if __name__ == "__main__":
    OUT.write_text(text(content()), encoding="utf-8")
