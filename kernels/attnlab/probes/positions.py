"""What happens behind the trained length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab.probes.quiet import mode
from attnlab.probes.subject import Probed, told
from planner.checks.edges import found
from planner.errors import ConfigError
from planner.findings import Finding, Severity

LONGEST = 2_048
GROWTH = 4.0
OFFSETS = 3
"""Rows of a table that some types keep for padding."""


class _Lookups(TorchDispatchMode):
    """Indices and rows of every table lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Watch aten.embedding."""
        if func is torch.ops.aten.embedding.default:
            self.seen.append((int(args[0].shape[0]), args[1].detach().clone()))
        return func(*args, **(kwargs or {}))


def extrapolation(probed: Probed) -> Iterator[Finding]:
    """Run past the trained length: a failure, rows that repeat, numbers that grow.

    The length is the config's, else the rows of a table that increasing positions are looked up in,
    else what the caller says. It can miss that a model is no good out there (random weights do not
    show it: perplexity would), lengths over 2 048, and tables that are sliced, not looked up.
    """
    with mode(probed.module, training=False):
        trained = probed.trained_tokens or table_rows(probed)
        if trained is None or not 2 <= trained <= LONGEST:
            return
        within, beyond = probed.draw(1, trained, seed=6), trained + max(8, trained // 4)
        inputs = probed.draw(1, beyond, seed=6)
        try:
            inside = probed.outputs(within)
        except Exception as error:
            text = told(f"the stated length of {trained:,} tokens fails already", error)
            yield found("positions-past-table", text, severity=short_by(probed, trained))
            return
        lookups = _Lookups()
        try:
            with lookups:
                outside = probed.outputs(inputs)
        except ConfigError as error:
            yield refused(trained, str(error))
            return
        except Exception as error:
            yield refused(trained, told(f"{beyond:,} tokens fail", error))
            return
    repeated = repeats(lookups, beyond)
    if repeated is not None:
        yield found(
            "positions-past-table",
            f"{beyond:,} tokens are looked up in {repeated} rows: positions from {trained:,} on "
            "share rows with others",
            severity="high",
            title="Far tokens share their position",
        )
    before, after = (float(x.double().norm(dim=-1).max()) for x in (inside, outside[:, trained:]))
    if not outside.isfinite().all():
        yield found("not-finite", f"outputs behind the trained {trained:,} tokens")
    elif after > GROWTH * before:
        yield found(
            "context-beyond-positions",
            f"the norm of outputs grows from at most {before:.3g} within {trained:,} tokens to "
            f"{after:.3g} behind them",
            title="Outputs grow behind the trained length",
        )


def short_by(probed: Probed, trained: int) -> Severity:
    """Info where only the rows that an offset takes are missing (roberta), else high."""
    try:
        probed.outputs(probed.draw(1, max(1, trained - OFFSETS), seed=6))
    except Exception:
        return "high"
    return "info"


def refused(trained: int, text: str) -> Finding:
    """Longer inputs fail: good to know, for a config that says so."""
    return found(
        "positions-past-table",
        f"{text}; trained for {trained:,}",
        severity="info",
        title="Inputs behind the trained length fail",
        do="Cut inputs to the table before the model sees them.",
    )


def increasing(indices: Tensor, tokens: int) -> bool:
    """Whether the last dimension counts up by one, as positions do."""
    if indices.dim() == 0 or indices.shape[-1] != tokens:
        return False
    flat = indices.reshape(-1, tokens)
    return bool((flat[:, 1:] - flat[:, :-1] == 1).all())


def table_rows(probed: Probed) -> int | None:
    """Rows of the table that positions are looked up in."""
    lookups = _Lookups()
    try:
        with lookups:
            probed.outputs(probed.draw(1, probed.tokens))
    except Exception:
        return None
    return next((rows for rows, at in lookups.seen if increasing(at, probed.tokens)), None)


def repeats(lookups: _Lookups, tokens: int) -> int | None:
    """Different rows taken by positions that began to count and then stopped."""
    for _, indices in lookups.seen:
        if indices.dim() == 0 or indices.shape[-1] != tokens:
            continue
        row = indices.reshape(-1, tokens)[0]
        counted = int((row[1:] - row[:-1] == 1).long().cumprod(0).sum())
        different = int(row.unique().numel())
        if counted >= tokens // 2 and different < tokens:
            return different
    return None
