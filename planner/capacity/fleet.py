"""A fleet as a TOML file says it: GPUs owned, services, their traffic and targets.

[[gpus]]
name = "h100-80gb"
count = 8
price_per_hour = 2.5         # optional

[[services]]
name = "chat"
model = "llama-3.1-8b"       # as everywhere; a path is looked for beside the file, too
requests_per_s = 2.0
prompt_tokens = 1200         # means; with a sigma lognormal, without all alike
output_tokens = 300
prompt_sigma = 0.9           # optional
output_sigma = 0.7
# trace = "trace.csv"        # in place of these
runtime = "vllm"             # optional, as dtype, kv_dtype, weight_dtype
ttft_s = 1.0                 # targets, optional
tpot_s = 0.05
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.capacity.traffic import Traffic, fixed, lognormal, trace
from planner.catalog.gpus import gpu_named
from planner.errors import ConfigError, check_kind, check_size, shown
from planner.loading import catalogue, load_model
from planner.model import Model
from planner.runtimes import runtime_named


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnedGpus:
    """`count` GPUs of one kind; what one costs an hour, None where it is not said."""

    name: str
    count: int
    price_per_hour: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A model that is served: its requests, how it is deployed, what is wanted of it."""

    name: str
    model: Model
    requests_per_s: float
    traffic: Traffic
    runtime: str = "vllm"
    dtype: str | None = None
    kv_dtype: str | None = None
    weight_dtype: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """What a report is about."""

    gpus: tuple[OwnedGpus, ...]
    services: tuple[Service, ...]


GPU_FIELDS = ("name", "count", "price_per_hour")
SETTINGS = ("runtime", "dtype", "kv_dtype", "weight_dtype")
LENGTHS = ("prompt_tokens", "output_tokens", "prompt_sigma", "output_sigma", "trace")
SERVICE_FIELDS = ("name", "model", "requests_per_s", *LENGTHS, *SETTINGS, "ttft_s", "tpot_s")


def load_fleet(path: str | Path) -> Fleet:
    """Read a fleet; ConfigError that names the entry and the field for what is not understood."""
    check_kind("path", path, str, Path)
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{str(path)!r} cannot be read as TOML: {reason}") from None
    _only(content, ("gpus", "services"), str(path))
    gpus = [_gpus(entry, i) for i, entry in _entries(content, "gpus")]
    services = [_service(entry, i, Path(path).parent) for i, entry in _entries(content, "services")]
    for kind, names in (("gpus", [g.name for g in gpus]), ("services", [s.name for s in services])):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{kind}: the name {shown(twice)} stands there twice")
    return Fleet(gpus=tuple(gpus), services=tuple(services))


def _entries(content: Mapping[str, Any], kind: str) -> list[tuple[str, dict[str, Any]]]:
    found = content.get(kind)
    if not isinstance(found, list) or not found or not all(isinstance(e, dict) for e in found):
        raise ConfigError(f"{kind} is not there: at least one [[{kind}]]")
    return [(f"{kind}[{index}]", entry) for index, entry in enumerate(found)]


def _only(entry: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for field in entry:
        if field not in known:
            raise ConfigError(f"{where}: {shown(field)} is not known: {', '.join(known)}")


def _gpus(entry: dict[str, Any], where: str) -> OwnedGpus:
    _only(entry, GPU_FIELDS, where)
    name = gpu_named(_text(entry, "name", where)).name
    return OwnedGpus(
        name=name,
        count=check_size(f"{where}.count", entry.get("count")),
        price_per_hour=_number(entry, "price_per_hour", where),
    )


def _service(entry: dict[str, Any], where: str, folder: Path) -> Service:
    _only(entry, SERVICE_FIELDS, where)
    where = f"{where} {shown(entry.get('name'))}"
    rate = _number(entry, "requests_per_s", where)
    if rate is None:
        raise ConfigError(f"{where}: requests_per_s is not there: requests a second")
    settings = {field: _text(entry, field, where) for field in SETTINGS if field in entry}
    runtime_named(settings.get("runtime", "vllm"))
    return Service(
        name=_text(entry, "name", where),
        model=_model(_text(entry, "model", where), folder),
        requests_per_s=rate,
        traffic=_traffic(entry, where, folder),
        ttft_s=_number(entry, "ttft_s", where),
        tpot_s=_number(entry, "tpot_s", where),
        **settings,
    )


def _model(source: str, folder: Path) -> Model:
    beside = folder / source
    if source in catalogue() or source.startswith("hf:") or not beside.exists():
        return load_model(source)
    return load_model(beside)


def _traffic(entry: dict[str, Any], where: str, folder: Path) -> Traffic:
    if "trace" in entry:
        for field in LENGTHS[:-1]:
            if field in entry:
                raise ConfigError(f"{where}: {field} is not allowed beside trace")
        return trace(folder / _text(entry, "trace", where))
    prompt, output = (check_size(f"{where}: {field}", entry.get(field)) for field in LENGTHS[:2])
    sigmas = [_number(entry, field, where, least=0) for field in LENGTHS[2:4]]
    if sigmas == [None, None]:
        return fixed(prompt, output)
    return lognormal(
        prompt_mean=prompt,
        prompt_sigma=sigmas[0] or 0,
        output_mean=output,
        output_sigma=sigmas[1] or 0,
    )


def _text(entry: dict[str, Any], field: str, where: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: {field}={shown(value)} is not allowed: text")
    return value


def _number(
    entry: dict[str, Any], field: str, where: str, *, least: float | None = None
) -> float | None:
    value = entry.get(field)
    if value is None:
        return None
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not known or (value < least if least is not None else value <= 0):
        bound = "above 0" if least is None else f"from {least} on"
        raise ConfigError(f"{where}: {field}={shown(value)} is not allowed: a number {bound}")
    return float(value)
