"""Layers of experts that are picked by a power law, predicted from those dealt out in turn.

    pip install '.[silicon]'
    python benchmarks/power_law_routing.py --gpu h200

aiconfigurator times a layer of experts under three distributions. Ours are fitted to "balanced"
alone; "power_law_1.01" and "power_law_1.2" are asked for here and nowhere else. Loads are drawn as
its collector draws them (collector/helper.py: _generate_power_law_distribution; of each expert, to
the tokens there are), the experts reached and the tiles filled counted, and the fit asked at those;
"even" is what was said before, as if every pick were another expert's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from planner.catalog.gpus import gpu_named
from planner.timing.calibration import calibration_of
from planner.timing.expert_tiles import filled_rows, fused_tile
from planner.timing.op_times import Fit
from profiles.fitting import Array, predicted
from profiles.op_tables import SYSTEMS, package_folder

DRAWS = 8
SIZES = ["num_tokens", "hidden_size", "inter_size", "topk", "num_experts"]
FEW, MANY = 64, 512
"""Tokens of a decode step, of a large prefill."""


def main() -> None:
    """Print medians and p90 by distribution and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h200", choices=sorted(SYSTEMS))
    parser.add_argument("--tables", type=Path, help="an unpacked wheel; else as installed")
    asked = parser.parse_args()
    known = calibration_of(gpu_named(asked.gpu))  # an A100's table has no balanced rows: an H200's
    assert known is not None
    fit = known.fit("grouped", "bf16", "vllm")
    assert fit is not None
    table = pd.DataFrame(_errors(fit, _measured(asked.gpu, package_folder(asked.tables))))
    print(f"{asked.gpu}: |predicted / measured − 1|, median / p90, and the median's sign")
    for (distribution, tokens), rows in table.groupby(["distribution", "tokens"], sort=False):
        told = [f"{name} {_told(rows[name])}" for name in ("even", "dealt out")]
        print(f"{distribution:<16}{tokens:<16}{len(rows):>5}  {'   '.join(told)}")


def _measured(gpu: str, folder: Path) -> pd.DataFrame:
    """The median of each set of sizes, ms; on one GPU."""
    newest = max((folder / "systems" / "data" / SYSTEMS[gpu] / "moe" / "vllm").glob("*"))
    table = pd.read_parquet(newest / "moe_perf.parquet")
    whole = (table.moe_tp_size == 1) & (table.moe_ep_size == 1) & (table.moe_dtype == "bfloat16")
    return table[whole].groupby([*SIZES, "distribution"]).latency.median().reset_index()


def _errors(fit: Fit, measured: pd.DataFrame) -> Iterator[dict[str, str | float]]:
    rng = np.random.default_rng(0)
    for row in measured.sort_values(["distribution", "num_tokens"]).itertuples(index=False):
        tokens, hidden, inner, top_k, experts, distribution, taken_ms = row
        if distribution == "balanced":
            continue
        loads = _drawn(rng, tokens, experts, top_k, float(distribution.rsplit("_", 1)[1]))
        rows, tile = float(tokens * top_k), float(fused_tile(tokens))
        even = min(rows, float(experts))
        reached = float((loads > 0).sum(axis=1).mean())
        filled = filled_rows(rows, float(np.ceil(loads / tile).sum(axis=1).mean()), tile, even)
        said = {"even": (rows, even), "dealt out": (filled, reached)}
        yield {
            "distribution": distribution,
            "tokens": f"≤ {FEW}" if tokens <= FEW else f"≤ {MANY}" if tokens <= MANY else "more",
            **{
                name: 1e3 * _seconds(fit, *sizes, hidden, inner) / taken_ms - 1.0
                for name, sizes in said.items()
            },
        }


def _seconds(fit: Fit, rows: float, experts: float, hidden: int, inner: int) -> float:
    """Gate and up together, and down."""
    both = [[rows, experts, 2 * inner, hidden], [rows, experts, hidden, inner]]
    return float(predicted(fit, np.array(both, dtype=np.float64)).sum())


def _drawn(
    rng: np.random.Generator, tokens: int, experts: int, top_k: int, exponent: float
) -> Array:
    """Tokens of every expert, some draws of them: a power law, scaled, rounded, and made to fit."""
    low, high = (1.0, tokens * 0.8) if tokens * top_k > experts else (0.01, 2.0)
    power = 1.0 - exponent
    u = rng.random((DRAWS, experts))
    drawn = ((high**power - low**power) * u + low**power) ** (1.0 / power)
    loads = np.rint(drawn / drawn.sum(axis=1, keepdims=True) * tokens * top_k)
    for one in np.minimum(loads, tokens, out=loads):
        while (left := int(tokens * top_k - one.sum())) != 0:
            order = np.argsort(one, kind="stable")
            if left > 0:  # to those that have least
                one[order[one[order] < tokens][:left]] += 1
            else:
                one[order[-1]] -= 1
    return loads


def _told(errors: pd.Series) -> str:
    size = errors.abs()
    return f"{size.median():5.1%} / {size.quantile(0.9):5.1%} ({errors.median():+.1%})"


if __name__ == "__main__":
    main()
