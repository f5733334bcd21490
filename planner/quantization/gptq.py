"""GPTQ (arXiv:2210.17323) as AutoGPTQ and gptqmodel store it: words of 32 bits down the inputs.

Linear layers of the blocks, those of routed experts each by itself; routers, embeddings and the
head stay, the head unless `lm_head` says otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import ConfigError, check_choice, check_size, shown
from planner.quantization.base import Linear, Quantization, Stored, groups, linears, plain
from planner.quantization.skip import skip_patterns
from planner.tensors import Parameter

WORD = 32
BITS = (2, 3, 4, 8)
IRRELEVANT = ("sym", "desc_act", "act_group_aware", "damp_percent", "mse", "static_groups")
"""What `dynamic` may change without changing a shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """How wide the integers of a layer are, and how many inputs share a scale (−1: all)."""

    bits: int
    group_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """An entry of gptqmodel's `dynamic`: modules that stay (grid None) or have their own grid."""

    pattern: str
    grid: Grid | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq(Quantization):
    """`qweight`, `qzeros`, `scales` and `g_idx` for each layer.

    `modules` are the ends of names in the blocks that are quantised (None: all), `blocks` is what
    their names begin with. The first rule that matches a module's beginning decides.
    """

    grid: Grid
    lm_head: bool
    blocks: str
    modules: tuple[str, ...] | None
    rules: tuple[Rule, ...]

    @property
    def method(self) -> str:
        """`quant_method` as config.json writes it."""
        return "gptq"

    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """The packed layer, or the parameter as it is."""
        found = linears(parameter) if self._eligible(parameter) else ()
        chosen = [(linear, self._grids(linear)) for linear in found]
        if not any(grid for _, grids in chosen for grid in grids):
            yield plain(parameter, dtype)
            return
        for linear, grids in chosen:
            for grid, copies in grids.items():
                yield from _layer(replace(linear, copies=copies), grid, dtype)

    def _eligible(self, parameter: Parameter) -> bool:
        if parameter.layer is None:
            return self.lm_head and parameter.name == "lm_head.weight"
        return parameter.group != "router" and parameter.name.startswith(self.blocks)

    def _grids(self, linear: Linear) -> dict[Grid | None, int]:
        """How many copies of a layer have which grid."""
        named = "*" in linear.module and (self.modules is not None or self.rules)
        if not named:
            return {self._grid(linear.module): linear.copies}
        names = (linear.module.replace("*", str(e)) for e in range(linear.copies))
        return dict(Counter(self._grid(name) for name in names))

    def _grid(self, module: str) -> Grid | None:
        if self.modules is not None and module != "lm_head" and not module.endswith(self.modules):
            return None
        for rule in self.rules:
            if re.match(rule.pattern, module):
                return rule.grid
        return self.grid


def _layer(linear: Linear, grid: Grid | None, dtype: str) -> Iterator[Stored]:
    """One linear layer on its grid; as it is without one."""
    module, out, into, copies = linear.module, linear.out, linear.into, linear.copies
    if grid is None:
        yield Stored(name=f"{module}.weight", dtype=dtype, shape=(out, into), copies=copies)
        return
    if out % WORD or into % WORD:
        raise ConfigError(
            f"quantization_config.quant_method=gptq is not allowed for {module} of {into} inputs "
            f"and {out} outputs: multiples of {WORD}"
        )
    rows = groups(into, grid.group_size)
    packed = out // WORD * grid.bits
    yield Stored(
        name=f"{module}.qweight",
        dtype="int32",
        shape=(into // WORD * grid.bits, out),
        copies=copies,
    )
    yield Stored(
        name=f"{module}.qzeros",
        dtype="int32",
        shape=(rows, packed),
        role="zero point",
        copies=copies,
    )
    yield Stored(
        name=f"{module}.scales", dtype="fp16", shape=(rows, out), role="scale", copies=copies
    )
    yield Stored(name=f"{module}.g_idx", dtype="int32", shape=(into,), role="index", copies=copies)


def read_gptq(config: Mapping[str, Any]) -> Quantization:
    """GPTQConfig, and the fields that gptqmodel adds; layouts of single kernels are refused."""
    field = "quantization_config"
    for name in ("checkpoint_format", "format"):
        if config.get(name) is not None:
            check_choice(f"{field}.{name}", config[name], ("gptq", "gptq_v2"))
    if config.get("pack_dtype") not in (None, "int32", "torch.int32"):
        raise ConfigError(
            f"{field}.pack_dtype={shown(config['pack_dtype'])} is not read yet: int32"
        )
    for name in ("is_marlin_format", "adapter", "rotation", "modules_to_not_convert"):
        if config.get(name):
            raise ConfigError(f"{field}.{name}={shown(config[name])} is not read yet: null")
    lm_head, blocks = config.get("lm_head"), config.get("block_name_to_quantize")
    if lm_head is not None and not isinstance(lm_head, bool):
        raise ConfigError(f"{field}.lm_head={shown(lm_head)} is not allowed: true or false")
    if blocks is not None and not isinstance(blocks, str):
        raise ConfigError(
            f"{field}.block_name_to_quantize={shown(blocks)} is not allowed: a module's name"
        )
    grid = read_grid(config, field)
    return Gptq(
        grid=grid,
        lm_head=bool(lm_head),
        blocks=blocks or "",
        modules=_modules(config.get("modules_in_block_to_quantize")),
        rules=_rules(config.get("dynamic"), grid),
    )


def read_grid(config: Mapping[str, Any], field: str, default: Grid | None = None) -> Grid:
    """`bits` and `group_size`, 128 where nothing is said."""
    bits = config.get("bits", default.bits if default else None)
    if type(bits) is not int or bits not in BITS:
        allowed = ", ".join(map(str, BITS))
        raise ConfigError(f"{field}.bits={shown(bits)} is not allowed: one of {allowed}")
    size = config.get("group_size", default.group_size if default else 128)
    if size != -1:
        check_size(f"{field}.group_size", size)
    return Grid(bits=bits, group_size=size)


def _modules(given: Any) -> tuple[str, ...] | None:
    """Lists of lists of ends of names, quantised one list after the other."""
    if given is None:
        return None
    lists: list[Any] = given if isinstance(given, list) else [given]
    if not all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in lists):
        raise ConfigError(
            f"quantization_config.modules_in_block_to_quantize={shown(given)} is not allowed: "
            "lists of module names"
        )
    return tuple(dict.fromkeys(name for names in lists for name in names))


def _rules(given: Any, grid: Grid) -> tuple[Rule, ...]:
    """`dynamic`: "-:pattern" leaves modules alone and comes first, "+:pattern" changes them."""
    if given is None:
        return ()
    field = "quantization_config.dynamic"
    if not isinstance(given, Mapping) or not all(isinstance(x, str) for x in given):
        raise ConfigError(f"{field}={shown(given)} is not allowed: an object of patterns")
    skip_patterns({"dynamic": [x.removeprefix("-:").removeprefix("+:") for x in given]}, "dynamic")
    rules: list[Rule] = []
    entries: list[tuple[str, Any]] = sorted(given.items(), key=_changes)
    for pattern, changes in entries:
        if pattern.startswith("-:"):
            rules.append(Rule(pattern=pattern.removeprefix("-:"), grid=None))
            continue
        known = {"bits", "group_size", *IRRELEVANT}
        if not isinstance(changes, Mapping) or not known.issuperset(changes):
            raise ConfigError(
                f"{field} has {shown(changes)} for {shown(pattern)}: an object of bits, "
                f"group_size, {', '.join(IRRELEVANT)}"
            )
        changed = read_grid(changes, field, grid)
        rules.append(Rule(pattern=pattern.removeprefix("+:"), grid=changed))
    return tuple(rules)


def _changes(entry: tuple[str, Any]) -> bool:
    return not entry[0].startswith("-:")


METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {"gptq": read_gptq}
