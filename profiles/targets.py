"""What `planner trace` is pointed at: a factory in someone's own code, or a model that we know."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.errors import ConfigError, shown
from planner.loading import load_config, load_model
from profiles.module_trace import ModuleTrace, fake_ids, trace_module
from profiles.trace import _built, _told


def is_factory(target: str) -> bool:
    """`pkg.mod:make`, and no file, folder or hf: name."""
    module, colon, name = target.partition(":")
    dotted = all(part.isidentifier() for part in module.split("."))
    return bool(colon) and dotted and name.isidentifier() and module != "hf"


def load_factory(target: str) -> Any:
    """The callable that `pkg.mod:make` names; the current directory is importable."""
    path, _, name = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise ConfigError(_told(f"{path} cannot be imported", error)) from None
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConfigError(f"{target}: {path} has no function {shown(name)}")
    return factory


def made_by(target: str, *, batch: int, tokens: int) -> tuple[nn.Module, Any, Any]:
    """(module, inputs, loss or None) of a factory, built on the meta device.

    It returns a module, which then takes token ids [batch, tokens], or (module, inputs), or
    (module, inputs, loss), where loss(output) is a scalar.
    """
    factory = load_factory(target)
    try:
        with torch.device("meta"):
            made = factory()
    except Exception as error:
        raise ConfigError(_told(f"{target} failed", error)) from None
    parts = made if isinstance(made, tuple) else (made,)
    if not isinstance(parts[0], nn.Module) or len(parts) > 3:
        raise ConfigError(
            f"{target} returned {type(made).__name__}: an nn.Module, (module, inputs) or "
            "(module, inputs, loss)"
        )
    inputs = parts[1] if len(parts) > 1 else fake_ids(batch, tokens)
    return parts[0], inputs, parts[2] if len(parts) > 2 else None


def module_made_by(target: str) -> tuple[nn.Module, Any]:
    """(module, tensor that it takes or None) of a factory, built where its code builds it.

    It returns a module, or (module, inputs, …); random numbers start from 0.
    """
    try:
        factory = load_factory(target)
        torch.manual_seed(0)
        made = factory()
    except ConfigError:
        raise
    except SystemExit as error:
        raise ConfigError(f"{target} failed: it exits with {error.code}") from None
    except Exception as error:
        raise ConfigError(_told(f"{target} failed", error)) from None
    parts = made if isinstance(made, tuple) else (made,)
    if not parts or not isinstance(parts[0], nn.Module):
        raise ConfigError(
            f"{target} returned {type(made).__name__}: an nn.Module or (module, inputs)"
        )
    given = parts[1] if len(parts) > 1 else None
    if isinstance(given, dict) and len(given) == 1:
        (given,) = given.values()
    return parts[0], given if isinstance(given, torch.Tensor) else None


def trace_target(
    target: str,
    *,
    batch: int,
    tokens: int,
    runtime: str = "transformers",
    dtype: str | None = None,
    logits: str = "all",
    **how: Any,
) -> ModuleTrace:
    """Trace a factory, or the module that a runtime has for a model; `how` as `trace_module`."""
    if is_factory(target):
        module, inputs, loss = made_by(target, batch=batch, tokens=tokens)
        return trace_module(module, inputs, name=target, loss=loss, **how)
    if runtime == "attnlab":
        from attnlab.transformer import Transformer
        from profiles.workloads import TORCH_DTYPES

        model = load_model(target)
        built: nn.Module = Transformer(
            model, dtype=TORCH_DTYPES[dtype or model.dtype], device="meta"
        )
        _to_cpu(built)
        asked = {"ids": fake_ids(batch, tokens), "logits": logits}
        return trace_module(built, asked, name=model.name, **how)
    if runtime != "transformers":
        raise ConfigError(f"runtime={shown(runtime)} is not traced: transformers or attnlab")
    name, config = load_config(target)
    stated = dtype or str(config.get("dtype", config.get("torch_dtype")) or "fp32")
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(stated, stated)
    module = _built.__wrapped__(json.dumps(dict(config)), short, False)
    last = {"logits_to_keep": 1} if logits == "last" and not how.get("train") else {}
    return trace_module(module, {"input_ids": fake_ids(batch, tokens), **last}, name=name, **how)


def _to_cpu(built: nn.Module) -> None:
    """A Transformer says where it lives; its fake tensors are CPU tensors."""
    built.device = torch.device("cpu")  # type: ignore[assignment]
