"""Write docs/published.md, and docs/accuracy.md's summary of it, from `profiles/data/published`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from planner.cli.published import reasons, signed
from planner.format import of_quantity, of_value
from planner.report import write_text
from profiles.published import PublishedRow, published_rows, published_summary
from profiles.published_latency import LatencyRow, latency_rows, latency_summary
from tools import markdown

ROOT = Path(__file__).parents[1]
ACCURACY, PAGE = ROOT / "docs" / "accuracy.md", ROOT / "docs" / "published.md"
BEGIN = "<!-- published: written by `python -m tools.published_table` -->"
END = "<!-- /published -->"
HEAD = """# What others measured

Written by `python -m tools.published_table`; `planner compare --published` prints it and the
dashboard's page *Measured* shows it. Each row stands in `profiles/data/published` with its source
and licence. Errors are predicted / measured − 1; numbers stand for the sentences below a table.
"""
MEMORY = """## Memory

`memory.jsonl`. Nothing was fitted on it. GB are 10⁹ bytes; *with* adds what the version that ran is
known, by its source, to hold beside what transformers 5.23 does, and takes off what a compiled one
does not hold. Every miss above 5 % has a sentence.
"""
TIMES = """## Times

`latency.jsonl`: single requests, static batches and first tokens whose conditions are printed with
them. No constant was fitted on it; but 14 rows of gpt-fast had been seen before five rules of
compiled steps of one row were written (docs/time.md names them). Left out: pages without a licence,
GPUs that are not named to the variant (torchao's H100), batches whose caches do not fit at once
(LMDeploy), other sizes of TensorRT-LLM's and LMDeploy's tables (before any was planned), and
llama.cpp's tables, none of which was found with both its GPU and a licence.

- transformers 4.35 ran op by op, fp16: at small batches its host binds, whose speed is not
  published. TTFT is its forward over all logits, TPOT (generate − forward) / (output − 1).
- gpt-fast, and torchao's copy of it: attnlab, compiled, in a CUDA graph. The A100s of the first had
  330 W; joules of an A100 were not measured, so no limit is planned: one row of tokens streams
  weights, which draws less.
- TensorRT-LLM and LMDeploy are no runtimes of ours: planned as vllm, the nearest engine, with all
  prompts in one pass, in the dtypes that they print.
- torchtitan trains with fully_shard over the GPUs of a host, each held to 500 W: planned in
  transformers; compiled layers as they run uncompiled.
- vLLM 0.10 and 0.13 are planned as 0.19. What its scheduler does between passes is not planned. Of
  AMD's MI300X no op was timed: its times are those of an uncalibrated roofline.

*Tokens/s* are of the whole time, the prefill in it: output tokens, and of vLLM the prompts', too,
as each source counts. A run's batch × (prompt + output) stands last. Every miss above 15 % has a
sentence: a cause that was checked in its source, its page or our calibration, or that it is not
explained.
"""


def share(value: float | None) -> str:
    """A fraction in percent; empty where there is none."""
    return "" if value is None else f"{value:.2%}".replace("%", " %")


def error(value: float | None) -> str:
    """A signed error as the page has it."""
    return signed(value).replace("%", " %")


def summary_table(rows: Sequence[PublishedRow]) -> str:
    """Source × quantity: errors, and errors with what the versions name."""
    head = ["source", "quantity", "n", "mean \\|error\\|", "worst", "mean with", "worst with"]
    lines = [[*head, "not planned"], ["---"] * 2 + ["--:"] * 6]
    for s in published_summary(rows):
        cells = map(share, (s.mean_error, s.worst_error, s.mean_named, s.worst_named))
        lines.append(
            [s.source, of_quantity(s.quantity), f"{s.n}", *cells, f"{s.unpredicted or ''}"]
        )
    return markdown.table(lines)


def times_table(rows: Sequence[LatencyRow]) -> str:
    """Engine × quantity: errors, with their sign and without."""
    head = ["engine", "quantity", "n", "mean", "mean \\|error\\|", "worst", "not planned"]
    lines = [head, ["---"] * 2 + ["--:"] * 5]
    for s in latency_summary(rows):
        cells = [error(s.mean_error), share(s.mean_abs_error), share(s.worst_abs_error)]
        lines.append(
            [s.engine, of_quantity(s.quantity), f"{s.n}", *cells, f"{s.unpredicted or ''}"]
        )
    return markdown.table(lines)


def page(rows: Sequence[PublishedRow], times: Sequence[LatencyRow]) -> str:
    """Both tables, their sentences, their sources."""
    urls = dict.fromkeys(row.url for row in (*rows, *times))
    links = {url: f"{index}" for index, url in enumerate(urls, 1)}
    parts = [HEAD.strip(), MEMORY.strip(), summary_table(rows), *memory(rows, links)]
    parts += [TIMES.strip(), times_table(times), *latencies(times, links)]
    parts.append("\n".join(f"[{mark}]: {url}" for url, mark in links.items()))
    return "\n\n".join(parts) + "\n"


def memory(rows: Sequence[PublishedRow], links: Mapping[str, str]) -> tuple[str, str]:
    """Every row of memory, and the sentences."""
    marks = numbered(rows)
    head = ["run", "quantity", "predicted GB", "measured GB", "error", "with", ""]
    lines = [head, ["---"] * 2 + ["--:"] * 4 + ["---"]]
    for row in rows:
        predicted = "" if row.predicted is None else f"{row.predicted / 1e9:.2f}"
        lines.append(
            [
                f"[{row.source}][{links[row.url]}]: {row.model} on {row.gpu}, {row.run}",
                of_quantity(row.quantity),
                predicted,
                f"{row.measured / 1e9:.2f}",
                error(row.relative_error),
                error(row.named_error),
                marks.get(row.why, ""),
            ]
        )
    return markdown.table(lines), sentences(marks)


def latencies(rows: Sequence[LatencyRow], links: Mapping[str, str]) -> tuple[str, str]:
    """Every row of times, and the sentences."""
    marks = numbered(rows)
    head = ["run", "quantity", "planned as", "predicted", "measured", "error", ""]
    lines = [head, ["---"] * 3 + ["--:"] * 3 + ["---"]]
    for row in rows:
        predicted = "" if row.predicted is None else of_value(row.quantity, row.predicted)
        lines.append(
            [
                f"[{row.engine}][{links[row.url]}]: {row.model} on {row.gpu}, {row.run}",
                of_quantity(row.quantity),
                row.planned_as,
                predicted,
                of_value(row.quantity, row.measured),
                error(row.relative_error),
                marks.get(row.why, ""),
            ]
        )
    return markdown.table(lines), sentences(marks)


def numbered(rows: Sequence[PublishedRow] | Sequence[LatencyRow]) -> dict[str, str]:
    """A number for every sentence."""
    return {why: f"({index})" for index, why in enumerate(reasons(rows), 1)}


def sentences(marks: dict[str, str]) -> str:
    """The list below a table."""
    return "\n".join(f"- {mark} {why}." for why, mark in marks.items())


def written(text: str, part: str) -> str:
    """`text` with `part` between its marks."""
    return markdown.between(BEGIN, END, text, part)


if __name__ == "__main__":
    found = published_rows()
    write_text(page(found, latency_rows()), PAGE)
    write_text(written(ACCURACY.read_text(encoding="utf-8"), summary_table(found)), ACCURACY)
