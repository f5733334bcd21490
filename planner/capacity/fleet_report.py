"""A capacity report: for every service on every kind of GPU that is owned, what it takes.

A copy that gets r requests a second spends r · P of each second on prompts, P what a prompt takes
of a full pass, and the rest on decode steps: a token takes TPOT / (1 − r · P). Requests at once
follow from Little's law: r × time in the system, TTFT + (output − 1) such times at the batch that
results. A copy runs at most what its memory holds; of copies, and so of GPUs, as few as leave both
possible. Times are estimates: so are copies that they decide. A pass that takes prompts and a
decode step together reads the weights once: that gain is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from planner.capacity.answers import binding_of
from planner.capacity.concurrency import concurrent_requests
from planner.capacity.fleet import Fleet, OwnedGpus, Service
from planner.capacity.limits import layouts
from planner.catalog.gpus import gpu_named
from planner.errors import ConfigError, check_kind
from planner.estimate import estimate
from planner.format import gib, seconds
from planner.result import Estimate
from planner.workload import Deployment, Inference

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "service": "object",
    "model": "object",
    "gpu": "object",
    "runtime": "object",
    "dtype": "object",
    "kv_dtype": "object",
    "tensor_parallel": "Int64",
    "pipeline_parallel": "Int64",
    "gpus_per_copy": "Int64",
    "fits": "boolean",
    "weights_bytes": "Int64",
    "kv_pool_bytes": "Int64",
    "kv_pool_tokens": "Int64",
    "headroom_bytes": "Int64",
    "requests_at_once_per_copy": "Int64",
    "requests_at_once_needed": "Float64",
    "copies": "Int64",
    "gpus_needed": "Int64",
    "gpus_owned": "Int64",
    "enough": "boolean",
    "ttft_s": "Float64",
    "tpot_s": "Float64",
    "meets_targets": "boolean",
    "price_per_hour": "Float64",
    "binding": "object",
    "latency_basis": "object",
    "refused": "object",
}
"""The report's columns in their order; bytes are those of one GPU, the fullest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """Copies that serve the rate, the requests in all of them, and the times of one at its batch.

    `ttft_s`: of a prompt that comes alone; `tpot_s`: between others' prompts.
    """

    copies: int
    requests: float
    ttft_s: float
    tpot_s: float
    estimate: Estimate


def capacity_report(fleet: Fleet) -> pd.DataFrame:
    """A row for every service, kind of GPU and layout of up to the GPUs that are owned.

    Layouts that do not hold the model are left out but for the last of them, which says why.
    """
    import pandas as pd

    check_kind("fleet", fleet, Fleet)
    rows = [row for s in fleet.services for owned in fleet.gpus for row in _rows(s, owned)]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype(COLUMNS)


def _rows(service: Service, owned: OwnedGpus) -> Iterator[dict[str, Any]]:
    base = Deployment(
        gpu=owned.name,
        runtime=service.runtime,
        dtype=service.dtype,
        kv_dtype=service.kv_dtype,
        weight_dtype=service.weight_dtype,
    )
    held, last = False, None
    for tp, pp in layouts(base):
        if tp * pp > owned.count or (held and pp > 1):
            continue
        deploy = replace(base, tensor_parallel=tp, pipeline_parallel=pp)
        row = _row(service, owned, deploy)
        if row["fits"]:
            held = True
            yield row
        else:
            last = row
    if not held and last is not None:
        yield last


def _row(service: Service, owned: OwnedGpus, deploy: Deployment) -> dict[str, Any]:
    n = deploy.world_size
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
        "service": service.name,
        "model": service.model.name,
        "gpu": owned.name,
        "runtime": service.runtime,
        "dtype": service.dtype or service.model.dtype,
        "kv_dtype": service.kv_dtype or service.dtype or service.model.dtype,
        "tensor_parallel": deploy.tensor_parallel,
        "pipeline_parallel": deploy.pipeline_parallel,
        "gpus_per_copy": n,
        "gpus_owned": owned.count,
        "binding": "",
        "latency_basis": "",
        "refused": "",
    }
    try:
        at_once = concurrent_requests(service.model, service.traffic, deploy)
        settled = _settled(service, deploy, max(1, at_once.requests))
    except ConfigError as error:
        return row | {"refused": str(error)}
    e = settled.estimate
    row |= {
        "fits": at_once.requests > 0,
        "weights_bytes": e.memory.weights_bytes,
        "kv_pool_bytes": e.kv_pool_bytes,
        "kv_pool_tokens": e.kv_pool_tokens,
        "headroom_bytes": e.headroom_bytes,
        "requests_at_once_per_copy": at_once.requests,
        "binding": at_once.binding if at_once.requests else _why_not(e),
        "latency_basis": e.latency.basis,
    }
    if not at_once.requests:
        return row
    gpus = settled.copies * n
    return row | {
        "requests_at_once_needed": settled.requests,
        "copies": settled.copies,
        "gpus_needed": gpus,
        "enough": gpus <= owned.count,
        "ttft_s": settled.ttft_s,
        "tpot_s": settled.tpot_s,
        "meets_targets": _meets(service, settled.ttft_s, settled.tpot_s),
        "price_per_hour": owned.price_per_hour and gpus * owned.price_per_hour,
    }


def _why_not(e: Estimate) -> str:
    return "the cache of one request" if e.fits else binding_of(e)


def _settled(service: Service, deploy: Deployment, most: int) -> Settled:
    """The fewest copies, of `most` requests each, that serve the service's rate."""
    prompt, output = (max(1, round(n)) for n in service.traffic.mean)

    @cache
    def of(batch: int) -> Estimate:
        work = Inference(batch=batch, prompt_tokens=prompt, output_tokens=output, logits="last")
        return estimate(service.model, work, deploy)

    alone = of(1)
    in_a_pass = min(most, max(1, (alone.setting.max_batched_tokens or prompt) // prompt))
    ttft_s = alone.latency.ttft_s or 0.0
    prompt_s = (of(in_a_pass).latency.ttft_s or 0.0) / in_a_pass

    def tpot(copies: int, batch: int) -> float:
        """Of a token, prompts of others between; endless where they leave no time."""
        free = 1 - service.requests_per_s / copies * prompt_s
        return (of(batch).latency.tpot_s or 0.0) / free if free > 0 else math.inf

    def requests(copies: int, batch: int) -> float:
        """In one copy at such a batch."""
        lives_s = ttft_s + (output - 1) * tpot(copies, batch) if output > 1 else ttft_s
        return service.requests_per_s / copies * lives_s

    copies = _first(lambda n: tpot(n, most) < math.inf and requests(n, most) <= most)
    batch = _first(lambda n: n >= most or requests(copies, n) <= n)
    return Settled(
        copies=copies,
        requests=copies * requests(copies, batch),
        ttft_s=ttft_s,
        tpot_s=tpot(copies, batch),
        estimate=of(batch),
    )


def _first(holds: Callable[[int], bool]) -> int:
    """The smallest number from 1 on that holds, where all larger ones do."""
    high = 1
    while not holds(high):
        high *= 2
    low = high // 2  # does not hold, or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _meets(service: Service, ttft_s: float, tpot_s: float | None) -> bool | None:
    """Whether the targets that there are are met, by the roofline's floor; None without any."""
    wanted = ((service.ttft_s, ttft_s), (service.tpot_s, tpot_s))
    asked = [(target, time) for target, time in wanted if target is not None]
    if not asked:
        return None
    return all(time is None or time <= target for target, time in asked)


def report_markdown(table: pd.DataFrame) -> str:
    """The report for people: the choice of each service first, then all rows."""
    lines = ["# Capacity report", ""]
    for service in dict.fromkeys(table["service"]):
        lines += [f"- {_choice(str(service), table[table['service'] == service])}"]
    lines += [_together(best_rows(table))]
    names = [
        "service", "model", "gpu", "tensor_parallel", "pipeline_parallel", "fits",
        "kv_pool_bytes", "requests_at_once_per_copy", "requests_at_once_needed", "copies",
        "gpus_needed", "gpus_owned", "enough", "ttft_s", "tpot_s", "meets_targets",
        "price_per_hour", "binding",
    ]  # fmt: skip
    shown = [name for name in names if not table[name].isna().all()]
    lines += ["", "| " + " | ".join(shown) + " |", "|" + ":--|" * len(shown)]
    for row in table[shown].astype(object).itertuples(index=False):
        cells = (_cell(name, value) for name, value in zip(shown, row, strict=True))
        lines.append("| " + " | ".join(cells) + " |")
    basis = ", ".join(sorted(set(table["latency_basis"]) - {""}))
    lines += ["", f"Times: {basis or 'none'}; bytes of one GPU, the fullest.", ""]
    return "\n".join(lines)


def best_rows(table: pd.DataFrame) -> pd.DataFrame:
    """One row a service: enough GPUs first, then targets met, then price, GPUs, copies."""
    import pandas as pd

    chosen = []
    for service in dict.fromkeys(table["service"]):
        mine = table[(table["service"] == service) & table["fits"].fillna(False).astype(bool)]
        if mine.empty:
            continue
        order = pd.DataFrame(
            {
                "short": ~mine["enough"].fillna(False).astype(bool),
                "slow": ~mine["meets_targets"].fillna(True).astype(bool),
                "price": mine["price_per_hour"].astype(float),
                "gpus": mine["gpus_needed"].astype(int),
                "copies": mine["copies"].astype(int),
            },
            index=mine.index,
        )
        chosen.append(
            order.sort_values(["short", "slow", "price", "gpus", "copies"], kind="stable").index[0]
        )
    return table.loc[chosen]


def _choice(service: str, rows: pd.DataFrame) -> str:
    best = best_rows(rows)
    if best.empty:
        why = next((r for r in (*rows["refused"], *rows["binding"]) if r), "nothing owned holds it")
        return f"**{_safe(service)}**: no deployment fits ({_safe(why)})"
    row = best.iloc[0]
    enough = "" if row["enough"] else f", of which {row['gpus_owned']} are owned"
    price = "" if row.isna()["price_per_hour"] else f", {row['price_per_hour']:.2f} an hour"
    return (
        f"**{_safe(service)}**: {row['gpus_needed']} × {gpu_named(row['gpu']).label}{enough}, "
        f"{row['copies']} × (tensor parallel {row['tensor_parallel']}, pipeline parallel "
        f"{row['pipeline_parallel']}), {row['requests_at_once_per_copy']} requests at once each"
        f"{price}"
    )


def _together(best: pd.DataFrame) -> str:
    """What the choices take of each kind of GPU."""
    used: dict[str, list[int]] = {}
    for gpu, needed, owned in zip(
        best["gpu"], best["gpus_needed"], best["gpus_owned"], strict=True
    ):
        used.setdefault(str(gpu), [0, int(owned)])[0] += int(needed)
    said = [
        f"{needed} of {owned} {gpu_named(gpu).label}{' (too few)' * (needed > owned)}"
        for gpu, (needed, owned) in used.items()
    ]
    return f"- Together: {', '.join(said) or 'nothing'}"


def _cell(name: str, value: object) -> str:
    if value is None or str(value) in ("<NA>", "nan"):
        return ""
    if name.endswith("_bytes"):
        return gib(int(str(value)))
    if name.endswith("_s"):
        return seconds(float(str(value)))
    if isinstance(value, float):
        return f"{value:,.2f}"
    return _safe(str(value))


def _safe(text: str) -> str:
    """Text that cannot end a table's cell or begin markup."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
