"""Write planner/catalog/host_calls.json: what a decode step asks of Python besides its kernels.

    python -m tools.host_calls

Every decoder class that the planner writes down op by op is built small and decodes one token under
a counter: calls of torch that run no kernel (views), and calls of Python functions (modules,
caches, masks, attribute look-ups of modules). Widths do not change either; layers do, so that what
belongs to a layer is the difference of two depths, and the rest belongs to the pass. Attention is
replaced by an empty output: what runs inside it is the device's business. Run it after changing the
pinned transformers or attnlab; a test fails until the file says what is installed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import planner
from planner.host_calls import FILE, Calls
from planner.runtimes import runtime_named
from planner.runtimes.transformers import EAGER_ONLY
from planner.runtimes.transformers_code.families import HELD
from profiles.workloads import Workload, build

OUT = Path(__file__).parents[1] / "planner" / "catalog" / FILE
DEPTHS = (12, 24)
"""Multiples of every pattern of layers (gemma3: one in six attends to all)."""
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
    "bloom": {"hidden_size": 64, "n_head": 4},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": {k: WIDTHS[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")},
    "opt": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 64,
        "pad_token_id": 1,
    },
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
}
TYPES = tuple(sorted(HELD - {"bert", "t5"} | {"deepseek_v2", "deepseek_v3"}))
"""Decoders."""
DEPTH_NAMES = {"bloom": "n_layer", "gpt2": "n_layer", "gpt_bigcode": "n_layer"}


def config(kind: str, layers: int) -> dict[str, Any]:
    """A small config of a type."""
    depth = DEPTH_NAMES.get(kind, "num_hidden_layers")
    sizes = OWN.get(kind, {**WIDTHS, **EXPERTS})
    return {"model_type": kind, "vocab_size": 128, depth: layers, **NO_TOKENS, **sizes}


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Kernels by name, of everything that runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.dispatched = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run it, and count it where it is no view."""
        name = func.name().removeprefix("aten::")
        self.dispatched += 1
        if not func.is_view and not name.startswith(NO_KERNEL):
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


class Viewing(TorchFunctionMode):
    """Calls of torch from Python that run no kernel but make a tensor: views."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counting, self.views = counting, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run it; a call that reached no op at all only asked for a shape."""
        before = self.counting.dispatched, self.counting.kernels.total()
        out = func(*args, **(kwargs or {}))
        after = self.counting.dispatched, self.counting.kernels.total()
        self.views += after[0] > before[0] and after[1] == before[1]
        return out


def decode_step(runtime: str, kind: str, attention: str, layers: int) -> Callable[[], Tensor]:
    """Runs the next step of a small model that has decoded two tokens, on the CPU."""
    model = planner.read_config(config(kind, layers))
    built: Workload = build(
        model, runtime=runtime, attention=attention, dtype="bf16", device=torch.device("cpu")
    )
    built.begin(batch=BATCH, capacity_tokens=16)
    ids = torch.zeros((BATCH, PROMPT), dtype=torch.int64)

    def step() -> Tensor:
        nonlocal ids
        out = built.forward(ids, "last")
        ids = torch.zeros((BATCH, 1), dtype=torch.int64)
        return out

    for _ in range(3):
        step()
    return step


def counted(runtime: str, kind: str, attention: str, layers: int) -> tuple[Calls, Counter[str]]:
    """Views and Python calls of one decode step, and its kernels."""
    with torch.no_grad(), empty_attention():
        step = decode_step(runtime, kind, attention, layers)
        counting = Counting()
        with counting, Viewing(counting) as viewing:
            step()
        calls = 0

        def seen(frame: FrameType, event: str, _: object) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(seen)
        try:
            step()
        finally:
            sys.setprofile(None)
    return Calls(views=float(viewing.views), calls=float(calls)), counting.kernels


@contextmanager
def empty_attention() -> Iterator[None]:
    """sdpa as one kernel, whatever the device would make of it."""
    functional = torch.nn.functional
    kept = functional.scaled_dot_product_attention

    def nothing(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    functional.scaled_dot_product_attention = nothing  # type: ignore[assignment]
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
                entry[attention] = {
                    "layer": [layer.views, layer.calls],
                    "pass": [whole.views, whole.calls],
                }
    return made


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


def parts(runtime: str, kind: str, attention: str) -> tuple[Calls, Calls]:
    """What one layer asks for, averaged over the kinds there are, and what is left of the pass."""
    few, many = DEPTHS
    (a, _), (b, _) = (counted(runtime, kind, attention, layers) for layers in DEPTHS)

    def one(name: str) -> tuple[float, float]:
        x, y = getattr(a, name), getattr(b, name)
        layer = (y - x) / (many - few)
        return round(layer, 2), round(x - few * layer, 2)

    (views, more_views), (calls, more_calls) = one("views"), one("calls")
    return Calls(views=views, calls=calls), Calls(views=more_views, calls=more_calls)


def content() -> dict[str, Any]:
    """The file's content."""
    return {
        "transformers": metadata.version("transformers"),
        "python": ".".join(map(str, sys.version_info[:2])),
        "counts": table(),
    }


def text(made: dict[str, Any]) -> str:
    """A type a line."""
    lines = [f'"{name}": {json.dumps(made[name])}' for name in ("transformers", "python")]
    engines = []
    for engine, kinds in made["counts"].items():
        rows = ",\n".join(f'"{kind}": {json.dumps(entry)}' for kind, entry in kinds.items())
        engines.append(f'"{engine}": {{\n{rows}\n}}')
    return "{\n" + ",\n".join(lines) + ',\n"counts": {\n' + ",\n".join(engines) + "\n}}\n"


if __name__ == "__main__":
    OUT.write_text(text(content()), encoding="utf-8")
