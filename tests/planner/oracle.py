"""The oracle: classes of transformers on the meta device, their parameters and real caches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.pytorch_utils import Conv1D

import planner
from planner.huggingface.fields import SAME_AS
from tests.planner.configs import SMALL_PARAMETERS

transformers.logging.set_verbosity_error()
FAMILIES = (
    ("AutoModelForCausalLM", ("causal",)),
    ("AutoModelForImageTextToText", ("image_text",)),
    ("AutoModelForSeq2SeqLM", ("seq2seq",)),
    ("AutoModelForSpeechSeq2Seq", ("speech",)),
    ("AutoModel", ("model",)),
)


def device_of(config: dict[str, Any]) -> str:
    """Where the class of this config is built."""
    small = planner.read_config(config).parameter_count < SMALL_PARAMETERS
    return "cpu" if small else "meta"


def live_model(config: dict[str, Any], *, auto: str = "causal", device: str | None = None) -> Any:
    """The class of `architectures[0]`, else of the auto class, in bf16, eval mode.

    `auto`: causal | image_text | seq2seq | speech | model. `device`: a small model's is the CPU,
    where it runs faster: ops of the meta device are written in Python.
    """
    device = device or device_of(config)
    given = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype", "dtype")}
    given["model_type"] = SAME_AS.get(given["model_type"], given["model_type"])
    described = AutoConfig.for_model(**deepcopy(given))  # some classes write into their parts
    hub: Any = transformers
    with torch.device(device):
        if config.get("architectures"):
            made = getattr(hub, config["architectures"][0])._from_config(
                described, dtype=torch.bfloat16
            )
        else:
            name = next(name for name, words in FAMILIES if auto in words)
            made = getattr(hub, name).from_config(described, dtype=torch.bfloat16)
    return made.eval()


def live_shapes(live: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of every trained tensor, tied ones once."""
    return {name: tuple(p.shape) for name, p in live.named_parameters()}


def our_shapes(model: planner.Model) -> dict[str, tuple[int, ...]]:
    """The same from the planner, by checkpoint names."""
    return {p.name: p.shape for p in model.checkpoint_parameters()}


def assert_same_parameters(model: planner.Model, live: Any) -> None:
    """Names, shapes and count; says what differs, not two whole dictionaries."""
    ours, theirs = our_shapes(model), live_shapes(live)
    missing = {n: s for n, s in theirs.items() if ours.get(n) != s}
    invented = {n: s for n, s in ours.items() if theirs.get(n) != s}
    assert (missing, invented) == ({}, {})
    assert model.parameter_count == sum(p.numel() for p in live.parameters())


def live_prefill(
    live: Any, batch: int, tokens: int, *, static: bool | int = False, **inputs: Any
) -> Any:
    """The cache after a real forward of `tokens` tokens, routed experts left out.

    `static`: in a StaticCache of so many tokens (True: of `tokens`). `inputs` replace or join
    `input_ids`.
    """
    device = next(live.parameters()).device
    for module in live.modules():  # data-dependent routing has no meta kernels, nor any cache
        if type(module).__name__.endswith("Experts"):
            module.forward = lambda hidden, *_: hidden
    inputs.setdefault("input_ids", torch.zeros(batch, tokens, dtype=torch.long, device=device))
    if static:
        capacity = tokens if static is True else static
        name = "past_key_values"
        if name not in inspect.signature(live.forward).parameters:
            name = "cache_params"
        inputs[name] = StaticCache(config=live.config, max_cache_len=capacity)
    with torch.no_grad():
        made = live(use_cache=True, **inputs)
        for name in ("past_key_values", "cache_params"):  # the latter is mamba's name for it
            if getattr(made, name, None) is not None:
                return getattr(made, name)
        if hasattr(made, "state"):  # rwkv's, a list
            return SimpleNamespace(layers=[], state=made.state)
        # recurrent_gemma returns none: it fills the one it is given, and has states in modules
        inputs.setdefault("past_key_values", DynamicCache(config=live.config))
        live(use_cache=True, **inputs)
    cache = inputs["past_key_values"]
    cache.kept_in_modules = [
        value
        for module in live.modules()
        for name, value in vars(module).items()
        if name in ("conv1d_state", "recurrent_states")
    ]
    return cache


def live_cache_bytes(cache: Any) -> int:
    """numel · itemsize of every tensor that a cache holds per sequence, each once."""
    places = [*(vars(layer) for layer in _layers(cache)), vars(cache)]
    tensors = {id(t): t for place in places for t in _tensors(place)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _layers(cache: Any) -> Iterator[Any]:
    for part in ("self_attention_cache", "cross_attention_cache"):
        if hasattr(cache, part):
            yield from _layers(getattr(cache, part))
    yield from getattr(cache, "layers", ())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.dim() > 1:
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def linear_weights(live: Any) -> set[str]:
    """Names of the weights that quantisers replace."""
    trained = dict(live.named_parameters())
    return {
        f"{module}.weight"
        for module, made in live.named_modules()
        if isinstance(made, torch.nn.Linear | Conv1D) and f"{module}.weight" in trained
    }


def live_active_count(live: Any) -> int:
    """All parameters, those of routed experts × top-k / E (their tensors are [E, …])."""
    text = live.config.get_text_config()
    names = ("num_experts_per_tok", "top_k_experts")  # the latter is gemma4's
    top_k, flat = next((k for name in names if (k := getattr(text, name, None))), 1), None
    if text.model_type == "dbrx":  # [E · i, h]
        top_k, flat = text.ffn_config.moe_top_k, text.ffn_config.moe_num_experts
    return sum(
        p.numel() * top_k // (flat or p.shape[0]) if ".experts." in name else p.numel()
        for name, p in live.named_parameters()
    )


def assert_exact(
    config: dict[str, Any],
    *,
    auto: str = "causal",
    device: str | None = None,
    tokens: tuple[int, ...] = (2, 5, 12),
    static: bool = True,
) -> None:
    """Parameters, active ones, linear layers, dynamic and static cache of a config."""
    model, live = planner.read_config(config), live_model(config, auto=auto, device=device)
    assert_same_parameters(model, live)
    assert model.active_parameter_count == live_active_count(live)
    assert {p.name for p in model.checkpoint_parameters() if p.linear} == linear_weights(live)
    for count in tokens:
        got = planner.kv_cache_bytes(model, batch=2, context_tokens=count, dtype="bf16")
        assert got == live_cache_bytes(live_prefill(live, 2, count)), count
    if static:
        spec = planner.CacheSpec(kind="static", capacity_tokens=max(tokens))
        got = planner.kv_cache_bytes(model, batch=2, context_tokens=2, cache=spec)
        assert got == live_cache_bytes(live_prefill(live, 2, 2, static=max(tokens)))
