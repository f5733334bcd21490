"""What is known of each architecture, found by comparing it: the rows of docs/architectures.md.

`python -m tests.coverage` writes the table; tests/test_coverage.py makes every row again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import planner
import tests.conftest  # noqa: F401  threads and the instruction set, before torch is there
from planner import CacheSpec, ConfigError
from planner.huggingface import READERS
from profiles.trace import trace
from tests.planner.every_type import CASES
from tests.planner.huggingface import test_readers_encoder_decoders as encoder_decoders
from tests.planner.oracle import (
    assert_same_parameters,
    linear_weights,
    live_active_count,
    live_cache_bytes,
    live_model,
    live_prefill,
)

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
TYPES = sorted({*READERS, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})
COLUMNS = ("model_type", "path", "parameters", "active", "linear layers", "cache", "static cache")
LENGTHS = (2, 9, 20)
NEED_VALUES = ("gemma4", "gemma4_unified", "mpt")
"""Types whose masks look at a value, as those of encoder-decoders do: the meta device has none."""


def row(model_type: str) -> tuple[str, ...]:
    """One row: how the type is known, and what was found equal to its live class."""
    return _read(model_type) if model_type in READERS else _traced(model_type)


def _read(model_type: str) -> tuple[str, ...]:
    if model_type not in CASES:
        try:
            planner.read_config({"model_type": model_type})
        except ConfigError:
            return (model_type, "refused", *["–"] * 5)
        return (model_type, "reader", *["own tests"] * 5)
    case = CASES[model_type]
    model = planner.read_config(case.config)
    seq2seq = model_type in encoder_decoders.TYPES
    device = "cpu" if seq2seq or model_type in NEED_VALUES else None
    live = live_model(case.config, auto=case.auto, device=device)
    frames = model.encoder_tokens or 9

    def dynamic() -> None:
        for tokens in LENGTHS:
            if seq2seq:
                got = encoder_decoders.cache_of(live, 2, tokens, model.encoder_tokens or tokens)
            else:
                got = live_cache_bytes(live_prefill(live, 2, tokens))
            assert planner.kv_cache_bytes(model, batch=2, context_tokens=tokens) == got

    def static() -> None:
        spec = CacheSpec(kind="static", capacity_tokens=20)
        if seq2seq:
            got = encoder_decoders.cache_of(live, 2, 9, frames, capacity=20)
        else:
            got = live_cache_bytes(live_prefill(live, 2, 9, static=20))
        sizes: dict[str, Any] = {"batch": 2, "context_tokens": 9, "cache": spec}
        assert planner.kv_cache_bytes(model, **sizes) == got

    def linear() -> None:
        ours = {p.name for p in model.checkpoint_parameters() if p.linear}
        assert ours == linear_weights(live)

    def active() -> None:
        assert model.active_parameter_count == live_active_count(live)

    checks: tuple[Callable[[], None], ...]
    checks = (lambda: assert_same_parameters(model, live), active, linear)
    if model.is_decoder:
        checks = (*checks, dynamic, static)
    return (model_type, "reader", *map(_outcome, checks), *["none"] * (5 - len(checks)))


def _outcome(check: Callable[[], None]) -> str:
    """equal, or that the live class itself cannot do it; a difference is an error."""
    try:
        check()
    except AssertionError:
        raise
    except Exception as error:
        return f"its class fails: {type(error).__name__}"
    return "equal"


def _traced(model_type: str) -> tuple[str, ...]:
    def tell(read: Callable[[], object]) -> str:
        try:
            read()
        except ConfigError:
            return "refused"
        return "traced"

    config: dict[str, Any] = {"model_type": model_type, "num_hidden_layers": 2}
    parameters = tell(lambda: trace(config))
    cache_ = "refused"
    if parameters == "traced":
        cache_ = tell(lambda: trace(config).kv_cache_bytes(batch=1, context_tokens=8))
    return (model_type, "traced", parameters, "–", "–", cache_, "–")


@cache
def written() -> dict[str, tuple[str, ...]]:
    """The rows of the file."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    return {cells[0]: cells for cells in rows if cells[0] not in ("model_type", "---")}


def text() -> str:
    """The file: a title, what it is, the table."""
    rows = [row(model_type) for model_type in TYPES]
    read = sum(cells[1] == "reader" for cells in rows)
    head = (
        "# Architectures\n\n"
        f"Made by `python -m tests.coverage` with transformers {transformers.__version__}; "
        "tests/test_coverage.py makes every row again.\n\n"
        f"{read} types have a reader: *equal* says that names and shapes of all parameters, active "
        "parameters, the layers that quantisers replace, and the bytes of a real DynamicCache and "
        "StaticCache equal those of the live class. The readers' own tests "
        "compare many more configs, drawn at random. *none*: encoders cache nothing. *own tests*: "
        "compared in the reader's tests alone, towers among them as parts of what holds them. "
        "*refused*: transformers cannot build the type without a package that is not here.\n\n"
        f"{len(rows) - read} more types of causal language models are *traced* when asked for "
        "(`--traced`, `profiles.trace`): read off transformers' own class. *refused*: that class "
        "cannot be built from its defaults, or its forward needs values.\n\n"
    )
    table = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return head + "\n".join("| " + " | ".join(cells) + " |" for cells in table) + "\n"


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text())
    print(f"wrote {TABLE}")
