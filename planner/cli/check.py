"""`planner check`: the sharp edges of a config, of source code or of a module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.checks import check
from planner.checks.written import in_words, markdown, sarif, table, to_dict
from planner.cli.layout import TensorParallel
from planner.cli.options import AsJson, Batch, CsvFile, Dtype, KvDtype, RuntimeName
from planner.cli.output import console, exit_unless, show
from planner.errors import check_choice
from planner.findings import Finding
from planner.report import write_csv, write_text

COLOURS = {"critical": "bold red", "high": "red", "medium": "yellow", "info": "dim"}


def check_command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="Catalogue name, config.json or its folder; a .py file or a folder of them; "
            "a factory pkg.mod:make, which alone is run.",
        ),
    ],
    gpu: Annotated[str | None, typer.Option("--gpu", help="Hold the KV cache against it.")] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of each sequence.")
    ] = None,
    batch: Batch = 1,
    runtime: RuntimeName = "transformers",
    tp: TensorParallel = 1,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    takes: Annotated[
        str, typer.Option("--takes", help="What a factory's module takes: ids or embeddings.")
    ] = "ids",
    as_json: AsJson = False,
    csv: CsvFile = None,
    sarif_file: Annotated[
        Path | None, typer.Option("--sarif", metavar="FILE", help="Write SARIF 2.1.0, for CI.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write Markdown.")
    ] = None,
) -> None:
    """What is wrong with a transformer before it is trained. Exit 1 on critical or high.

    Source is parsed and never executed; a factory's module is probed on this machine.
    """
    found = _findings(
        target,
        takes,
        {
            "gpu": gpu,
            "context_tokens": context,
            "batch": batch,
            "runtime": runtime,
            "tensor_parallel": tp,
            "dtype": dtype,
            "kv_dtype": kv_dtype,
        },
    )
    if csv is not None:
        write_csv(table(found), csv)
    if sarif_file is not None:
        write_text(sarif(found, target), sarif_file)
    if markdown_file is not None:
        write_text(markdown(found, target), markdown_file)
    if as_json:
        show(to_dict(found, target))
    else:
        print_findings(found, target)
    exit_unless(not any(finding.fails for finding in found))


def _findings(target: str, takes: str, load: dict[str, Any]) -> Sequence[Finding]:
    check_choice("takes", takes, ("ids", "embeddings"))
    module, colon, name = target.partition(":")
    dotted = all(part.isidentifier() for part in module.split("."))
    if not (colon and dotted and name.isidentifier() and module != "hf"):
        return check(target, **load)
    if Path(target).exists():
        return check(target, **load)
    from attnlab.probes import check as probe  # noqa: TID251
    from profiles.targets import module_made_by  # noqa: TID251

    made, sample = module_made_by(target)
    return probe(made, takes=takes, sample=sample)


def print_findings(found: Sequence[Finding], target: str) -> None:
    """A table for people: what was seen, and beneath it what to do."""
    from rich.table import Table
    from rich.text import Text

    print(printable(in_words(found, target)))
    if not found:
        return
    view = Table(show_lines=True)
    for column in ("severity", "finding", "seen", "do"):
        view.add_column(column, overflow="fold", ratio=None if column == "severity" else 1)
    for f in found:
        named = Text(printable(f.title)).append(f"\n{f.id}", style="dim")
        if f.where:
            named.append(f"\n{printable(f.where)}", style="cyan")
        view.add_row(
            Text(f.severity, style=COLOURS.get(f.severity, "")),
            named,
            Text(printable(f.seen)),
            Text(printable(f.do)),
        )
    console().print(view)


def printable(text: str) -> str:
    """Text without control characters: a terminal obeys them."""
    return "".join(c if c.isprintable() else "?" for c in text)
