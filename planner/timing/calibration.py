"""What was measured of a device, boiled down to a file: planner/catalog/calibration/<gpu>.json.

Each file names its sources with version and licence, and carries the errors of every fit over ops
whose shapes it never saw. `planner calibrate` writes them; nothing here needs the measurements.
One's own file of a device (calibration_files.py) comes before the catalogue's; of a CPU, whichever
was measured on the processor that is asked about, and where none was, the times of another CPU
stand for it: an extrapolation by nothing at all, with a band to match.

A device that has no file of its own is timed by its nearest kin's, transferred by the ratio of
ceilings: shares of peak and bandwidth stay, seconds follow. That is an extrapolation and is called
one. A device without kin has no calibration (roofline.py has the defaults that stand in).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from planner.catalog.gpus import Gpu, gpus
from planner.catalog.here import Processor
from planner.errors import ConfigError, shown
from planner.timing.calibration_files import Stamp, committed_text, own_file, own_stamp, own_text
from planner.timing.op_families import ALIAS, COMMUNICATION, WEIGHT_BYTES
from planner.timing.op_times import Errors, Fit, Roof, family_named

SCHEMA = 1
TRANSFERRED = "transferred from"
KIN: Mapping[str, str] = {
    "Volta": "a100-80gb",
    "Turing": "a100-80gb",
    "Ampere": "a100-80gb",
    "Ada Lovelace": "l40s",
    "Hopper": "h100-80gb",
    "Blackwell": "b200",
    "Blackwell Ultra": "b300",
}
"""The measured device that stands for an architecture."""
REFERENCE = "h200"
"""The device whose every family was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where measurements came from."""

    name: str
    version: str
    licence: str
    url: str
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HostCost:
    """Seconds that the host needs to issue one op, by what runs it; "other" for the rest.

    `scale` multiplies them all: one number an engine, from its calibration rows (`scaled_on`), for
    what a whole model takes beyond the same calls in a loop (host_cost.py). `spread`: how far
    single steps of the same work vary, and how much longer the slowest of those rows has it.
    """

    op_s: Mapping[str, float] = field(hash=False)
    scale: Mapping[str, float] = field(hash=False)
    spread: float
    scaled_on: tuple[str, ...]
    source: str

    def as_fast_as(self, add_s: float | None) -> HostCost:
        """The host that needs `add_s` for an addition; None: this one."""
        if add_s is None:
            return self
        ratio = add_s / self.op_s["add"]
        return replace(self, op_s={name: ratio * cost for name, cost in self.op_s.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphCost:
    """A CUDA graph's replay on the device: a floor, and what a kernel with nothing to do takes.

    `between_s`: what replayed steps take beyond their kernels' own times, for each of torch's: the
    mean over `scaled_on`, two of them; no other is seen. What it is made of is not known: kernels
    of unlike kinds in turn take no longer than alike ones.
    """

    replay_s: float
    kernel_s: float
    source: str
    between_s: float = 0.0
    scaled_on: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PageCost:
    """What a CPU takes to give a process a page that it has not had (fresh_pages.py)."""

    page_s: float
    page_bytes: int
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyCost:
    """Power that flows when nothing runs, and joules of work beyond it.

    `clock`: the share of a burst's clock that the product ran at which `flop_j` was measured with.
    `others`: both of products in further dtypes, where these were timed.
    """

    idle_w: float
    flop_j: float
    byte_j: float
    source: str
    clock: float = 1.0
    others: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)

    def of(self, dtype: str) -> tuple[float, float]:
        """Joules of a FLOP, and the clock that they were measured at."""
        return self.others.get(dtype, (self.flop_j, self.clock))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """All fits of a device, by "family:dtype" or, for attention, "family:dtype:backend".

    `transferred_from` names the kin whose measurements these are; None: the device's own. `half`:
    what computing takes in fp16 of the same in bf16, whose fits it has.
    `own_file`: where they lie, where they are not the catalogue's. Of a CPU, `measured_on` is the
    one that was timed, `used_on` the one that is asked about.
    """

    gpu: str
    fits: Mapping[str, Fit]
    sources: Mapping[str, Source]
    host: HostCost | None = None
    graph: GraphCost | None = None
    energy: EnergyCost | None = None
    transferred_from: str | None = None
    pages: PageCost | None = None
    half: float = 1.0
    own_file: str = ""
    measured_on: Processor | None = None
    used_on: Processor | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether another CPU than the one that is asked about was timed."""
        return self.used_on is not None and self.used_on != self.measured_on

    def times_products(self, dtype: str) -> bool:
        """Whether a matrix product was timed in this dtype, or one that runs alike."""
        return self.fit("gemm", dtype) is not None

    def fit(self, family: str, dtype: str = "", *backends: str) -> Fit | None:
        """The first there is of these backends, then the one without a backend; None: none."""
        name = ":".join(filter(None, (family, ALIAS.get(dtype, dtype))))
        for backend in backends:
            if f"{name}:{backend}" in self.fits:
                return self.fits[f"{name}:{backend}"]
        if name in self.fits:
            return self.fits[name]
        return next((fit for key, fit in self.fits.items() if key.startswith(f"{name}:")), None)


def calibration_of(gpu: Gpu) -> Calibration | None:
    """The device's own calibration, its kin's transferred to it, or None.

    What it lacks (norms, casts, what the host costs: tables have none) is `REFERENCE`'s; joules are
    another's too, where architecture and TDP are the same.
    """
    return _calibration_of(gpu, own_stamp(gpu.name))


@lru_cache(maxsize=64)
def _calibration_of(gpu: Gpu, stamp: Stamp) -> Calibration | None:
    if gpu.is_cpu:
        return _of_cpu(gpu)
    own, known = load_own(gpu.name) or load(gpu.name), gpus()
    kin = kin_of(gpu)
    if own is None and kin is not None:
        measured = load(kin)
        own = None if measured is None else transferred(measured, gpu, known[kin])
    if own is None:
        return None
    own = replace(own, fits={**own.fits, **_in_float32(own.fits, gpu)})
    reference = load(REFERENCE)
    if reference is None or gpu.name == REFERENCE:
        return own
    lent = transferred(reference, gpu, known[REFERENCE])
    families = {name.split(":")[0] for name in own.fits}
    missing = {n: fit for n, fit in lent.fits.items() if n.split(":")[0] not in families}
    alike = (gpu.architecture, gpu.tdp_w) == (known[REFERENCE].architecture, known[REFERENCE].tdp_w)
    return replace(
        own,
        fits={**own.fits, **missing},
        host=own.host or reference.host,
        graph=own.graph or reference.graph,
        energy=own.energy or (reference.energy if alike else None),
    )


def _of_cpu(gpu: Gpu) -> Calibration | None:
    """Of the processor that is asked about, else the first there is."""
    found = [one for one in (load_own(gpu.name), load(gpu.name)) if one is not None]
    alike = (one for one in found if one.measured_on == gpu.processor)
    chosen = next(alike, found[0] if found else None)
    return None if chosen is None else replace(chosen, used_on=gpu.processor)


def _in_float32(fits: Mapping[str, Fit], gpu: Gpu) -> dict[str, Fit]:
    """Products and attention in fp32 that nobody timed: bf16's shares of fp32's peak.

    The memory-efficient kernel multiplies float32 on tensor cores, as three products in TF32, which
    is half as fast as bf16 (ATen/native/transformers/cuda/mem_eff_attention/gemm_kernel_utils.h:
    OpMultiplyAddFastF32).
    """
    timed = {name.split(":")[0] for name, fit in fits.items() if fit.dtype == "fp32"}
    vectors, tensors = gpu.flops_per_s("fp32"), gpu.flops_per_s("bf16") / 6.0
    return {
        name.replace(":bf16", ":fp32"): replace(
            fit,
            dtype="fp32",
            peak_flops_per_s=max(vectors, tensors) if name.endswith("efficient") else vectors,
            source=f"{TRANSFERRED} bf16",
        )
        for name, fit in fits.items()
        if fit.dtype == "bf16" and name.split(":")[0] not in timed
    }


def kin_of(gpu: Gpu) -> str | None:
    """The measured device nearest to this one; None for another vendor's."""
    if gpu.vendor != "nvidia":
        return None
    if (gpu.compute_capability or "").startswith("12."):  # Blackwell without its tensor memory
        return "rtx-pro-6000"
    return KIN.get(gpu.architecture)


def load(name: str) -> Calibration | None:
    """The committed file of a device; None where there is none."""
    text = committed_text(name)
    return None if text is None else from_dict(json.loads(text))


def load_own(name: str) -> Calibration | None:
    """One's own file of a device; None where there is none, ConfigError where it is none."""
    text = own_text(name)
    if text is None:
        return None
    path = str(own_file(name))
    try:
        return replace(from_dict(json.loads(text)), own_file=path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = str(error) if isinstance(error, ConfigError) else "it is not what calibrate writes"
        raise ConfigError(f"{path} is no calibration: {what}") from None


def transferred(measured: Calibration, gpu: Gpu, kin: Gpu) -> Calibration:
    """The kin's shares of peak and bandwidth, at this device's ceilings.

    Residuals stay: they follow tiles and waves of the architecture. Joules do not.
    """

    def moved(fit: Fit) -> Fit:
        wider = gpu.memory_bandwidth_bytes_per_s / kin.memory_bandwidth_bytes_per_s
        faster = wider  # an offset, a step of a sum: no FLOPs
        if fit.dtype in WEIGHT_BYTES:
            faster = gpu.flops_per_s(fit.dtype) / kin.flops_per_s(fit.dtype)
        return replace(
            fit,
            peak_flops_per_s=fit.peak_flops_per_s * faster,
            bandwidth_bytes_per_s=fit.bandwidth_bytes_per_s * wider,
            source=f"{TRANSFERRED} {kin.name}",
        )

    return replace(
        measured,
        gpu=gpu.name,
        fits={name: moved(fit) for name, fit in measured.fits.items()},
        energy=None,
        transferred_from=kin.name,
    )


def from_dict(content: Mapping[str, Any]) -> Calibration:
    """A calibration as its file has it."""
    if content.get("schema") != SCHEMA:
        raise ConfigError(f"calibration schema={shown(content.get('schema'))} is not {SCHEMA}")
    sources = {name: Source(**entry) for name, entry in content["sources"].items()}
    host, graph, energy = (content.get(part) for part in ("host", "graph", "energy"))
    pages, machine = content.get("pages"), content.get("machine")
    if host is not None:
        host = HostCost(**{**host, "scaled_on": tuple(host["scaled_on"])})
    if graph is not None:
        graph = GraphCost(**{**graph, "scaled_on": tuple(graph.get("scaled_on", ()))})
    return Calibration(
        gpu=content["gpu"],
        fits={name: _fit(name, entry) for name, entry in content["fits"].items()},
        sources=sources,
        host=host,
        graph=graph,
        energy=None if energy is None else _energy(energy),
        half=content.get("half", 1.0),
        pages=None if pages is None else PageCost(**pages),
        measured_on=None if machine is None else Processor(**machine),
    )


def _energy(entry: Mapping[str, Any]) -> EnergyCost:
    others = {dtype: (flop_j, clock) for dtype, (flop_j, clock) in entry.get("others", {}).items()}
    return EnergyCost(**{**entry, "others": others})


def _fit(name: str, entry: Mapping[str, Any]) -> Fit:
    family, *rest = name.split(":")
    dtype = rest[0] if rest else ""
    if family in COMMUNICATION:
        family, dtype = f"{family}:{dtype}", ""
    errors = entry.get("held_out")
    return Fit(
        family=family_named(family),
        dtype=dtype,
        roof=Roof(**entry["roof"]),
        peak_flops_per_s=entry["peak_flops_per_s"],
        bandwidth_bytes_per_s=entry["bandwidth_bytes_per_s"],
        points=np.array(entry["points"], dtype=np.float64),
        weights=np.array(entry["weights"], dtype=np.float64),
        held_out=None if errors is None else Errors(**errors),
        source=entry["source"],
    )
