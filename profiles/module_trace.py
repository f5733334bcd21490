"""The memory of any nn.Module without a GPU: run on fake tensors, played through the allocator.

Fake tensors have shapes and no values: a model of any size is traced in seconds and holds no
memory. They live on the CPU and stand for a GPU's: fake "cuda" tensors abort a CPU build of torch.
Attention is what `scaled_dot_product_attention` picks there, the flash kernel: its output and one
float32 a row, as on a GPU; a mask that a GPU's flash kernel would refuse does not change that.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from planner.allocator import Alloc, AllocatorSettings, AllocatorStats, Event, Free, simulate
from planner.errors import ConfigError, check_choice, shown
from profiles.recording import Allocation, AllocationRecorder
from profiles.trace import _fake_mode, _shapes_only, _told

if TYPE_CHECKING:
    import pandas as pd

Loss = Callable[[Any], Tensor]
OPTIMIZERS = ("adamw", "sgd")
IMPLEMENTATIONS = ("foreach", "fused", "for-loop")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleTrace:
    """What a module allocated: traced, not predicted and not measured.

    `kinds` says of each id in `made` whether it was weights, inputs, gradients, optimizer states or
    activations (everything else, a cache too). `seconds` is how long tracing took.
    """

    name: str
    events: tuple[Event, ...]
    made: tuple[Allocation, ...]
    kinds: tuple[str, ...]
    first_gemm: int | None
    seconds: float

    @property
    def peak_live_bytes(self) -> int:
        """The largest sum of live storages, weights included; inputs are the caller's."""
        return self._highest()[0]

    @property
    def peak_allocation(self) -> Allocation:
        """What reached the peak."""
        return self.made[self._highest()[1]]

    def at_peak(self) -> pd.DataFrame:
        """What lives at the peak, largest first: kind, op, module, phase, count, bytes."""
        import pandas as pd

        counts: Counter[tuple[str, ...]] = Counter()
        sizes: Counter[tuple[str, ...]] = Counter()
        for made in self._live_at_peak():
            a = self.made[made]
            key = (self.kinds[made], a.op, a.module, a.phase)
            counts[key] += 1
            sizes[key] += a.size_bytes
        rows = [(*key, counts[key], size) for key, size in sizes.most_common()]
        return pd.DataFrame(rows, columns=["kind", "op", "module", "phase", "count", "bytes"])

    def split(self) -> dict[str, int]:
        """Bytes of each kind at the peak."""
        sizes: Counter[str] = Counter()
        for made in self._live_at_peak():
            sizes[self.kinds[made]] += self.made[made].size_bytes
        return dict(sizes)

    def allocator(
        self,
        *,
        workspace_bytes: int = 0,
        capacity_bytes: int | None = None,
        settings: AllocatorSettings | None = None,
    ) -> AllocatorStats:
        """The trace through torch's caching allocator (simulated, not measured).

        `workspace_bytes`: cuBLAS's, made before the first matrix product.
        """
        events = list(self.events)
        if self.first_gemm is not None and workspace_bytes:
            events.insert(self.first_gemm, Alloc("cuBLAS workspace", workspace_bytes))
        return simulate(
            events, capacity_bytes=capacity_bytes, settings=settings or AllocatorSettings()
        )

    def _highest(self) -> tuple[int, int]:
        """(bytes, id of the storage that reached them)."""
        live = highest = cause = 0
        for event in self.events:
            if isinstance(event, Alloc | Free):
                made = int(event.id)  # type: ignore[call-overload]
                if self.kinds[made] == "inputs":
                    continue
                size = self.made[made].size_bytes
                live += size if isinstance(event, Alloc) else -size
                if live > highest:
                    highest, cause = live, made
        return highest, cause

    def _live_at_peak(self) -> list[int]:
        _, cause = self._highest()
        alive: dict[int, None] = {}
        for event in self.events:
            if isinstance(event, Alloc):
                made = int(event.id)  # type: ignore[call-overload]
                alive[made] = None
                if made == cause:
                    break
            elif isinstance(event, Free):
                alive.pop(int(event.id), None)  # type: ignore[call-overload]
        return [made for made in alive if self.kinds[made] != "inputs"]


def fake_copy(module: nn.Module) -> nn.Module:
    """The module with fake tensors for its own, in place; what is tied stays tied."""
    made: dict[int, Any] = {}
    with _fake_mode():
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    if id(p) not in made:
                        blank = torch.empty(p.shape, dtype=p.dtype)
                        made[id(p)] = nn.Parameter(blank, requires_grad=p.requires_grad)
                    part._parameters[name] = made[id(p)]
            for name, b in part._buffers.items():
                if b is not None:
                    made.setdefault(id(b), torch.empty(b.shape, dtype=b.dtype))
                    part._buffers[name] = made[id(b)]
    return module


def fake_ids(batch: int, tokens: int) -> Tensor:
    """Token ids [B, T] without values."""
    with _fake_mode():
        return torch.zeros(batch, tokens, dtype=torch.long)


def without_values(inputs: Any) -> Any:
    """Inputs as fake tensors of the same shapes."""
    with _fake_mode():
        return tree_map(
            lambda x: torch.empty(x.shape, dtype=x.dtype) if _has_values(x) else x,
            inputs,
        )


def _has_values(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, FakeTensor)


def trace_module(
    module: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any] | Tensor,
    *,
    name: str = "",
    train: bool = False,
    optimizer: str | None = None,
    optimizer_impl: str = "foreach",
    loss: Loss | None = None,
    autocast: bool = False,
) -> ModuleTrace:
    """Run `module` on fake tensors: a forward, or with `train` two whole steps.

    A step: forward, loss, backward, optimizer ("adamw", "sgd" or None), gradients set to None.
    The loss is `loss(output)`, else the output's own, else the cross-entropy of the next token,
    else the mean. Raises ConfigError in one line for a module whose forward needs values.
    """
    if optimizer is not None:
        check_choice("optimizer", optimizer, OPTIMIZERS)
    check_choice("optimizer_impl", optimizer_impl, IMPLEMENTATIONS)
    if optimizer is not None and not train:
        raise ConfigError(f"optimizer={shown(optimizer)} is not allowed without training: None")
    args, kwargs = _call(without_values(inputs))
    fake_copy(module).train(train)
    recorder = AllocationRecorder()
    started = time.perf_counter()
    try:
        with _fake_mode(), _shapes_only(), recorder, recorder.names_of(module):
            recorder.add([*module.parameters(), *module.buffers()], "weights")
            recorder.add([t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)], "inputs")
            if train:
                _train(recorder, module, args, kwargs, optimizer, optimizer_impl, loss, autocast)
            else:
                recorder.phase("forward")
                with torch.no_grad(), _casting(autocast):
                    out = module(*args, **kwargs)
                del out
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_told(f"tracing {name or type(module).__name__}", error)) from None
    kinds = tuple(recorder.kinds.get(made, "activations") for made in range(len(recorder.made)))
    host = {made for made, kind in enumerate(kinds) if kind == "host"}
    return ModuleTrace(
        name=name or type(module).__name__,
        events=tuple(e for e in recorder.trace if getattr(e, "id", None) not in host),
        made=tuple(recorder.made),
        kinds=kinds,
        first_gemm=None if recorder.first_gemm is None else _without(recorder, host),
        seconds=time.perf_counter() - started,
    )


def _without(recorder: AllocationRecorder, host: set[int]) -> int:
    """Where the first product comes among the events that are kept."""
    before = recorder.trace[: recorder.first_gemm]
    return sum(getattr(event, "id", None) not in host for event in before)


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return tuple(inputs), {}


def _casting(autocast: bool) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)


def _train(
    recorder: AllocationRecorder,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    optimizer: str | None,
    implementation: str,
    loss: Loss | None,
    autocast: bool,
) -> None:
    """Two steps, so that the second finds what the first leaves."""
    updates = _optimizer(module, optimizer, implementation)
    signature = inspect.signature(module.forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    if "labels" in signature.parameters and "labels" not in given:
        kwargs = {**kwargs, "labels": args[0] if args else kwargs.get("input_ids")}
    if "use_cache" in signature.parameters and "use_cache" not in given:
        kwargs = {"use_cache": False, **kwargs}
    for step in (1, 2):
        recorder.phase(f"step {step}: forward")
        with _casting(autocast):
            value = _loss(module(*args, **kwargs), loss, args, kwargs)
        recorder.phase(f"step {step}: backward")
        value.backward()  # type: ignore[no-untyped-call]
        del value
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        recorder.classify(grads, "gradients")
        del grads
        if updates is not None:
            recorder.phase(f"step {step}: optimizer")
            updates.step()
            for state in updates.state.values():
                for key, held in state.items():
                    if isinstance(held, Tensor):
                        on_host = key == "step" and implementation != "fused"  # adam.py
                        recorder.classify([held], "host" if on_host else "optimizer")
        module.zero_grad(set_to_none=True)


def _optimizer(
    module: nn.Module, name: str | None, implementation: str
) -> torch.optim.Optimizer | None:
    foreach, fused = implementation == "foreach", implementation == "fused"
    parameters = [p for p in module.parameters() if p.requires_grad]
    match name:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=1e-3, foreach=foreach, fused=fused)
        case "sgd":
            return torch.optim.SGD(parameters, lr=1e-3, foreach=foreach, fused=fused)
    return None


def _loss(out: Any, loss: Loss | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if loss is not None:
        return loss(out)
    given = getattr(out, "loss", None)
    if isinstance(given, Tensor):
        return given
    if not isinstance(out, Tensor):
        out = next(t for t in _tensors_of(out))
    ids = args[0] if args else next(iter(kwargs.values()))
    if isinstance(ids, Tensor) and not ids.is_floating_point() and out.dim() == ids.dim() + 1:
        wide = out[:, :-1].float().flatten(0, 1)
        loss_of_next: Tensor = nn.functional.cross_entropy(wide, ids[:, 1:].flatten())
        return loss_of_next
    mean: Tensor = out.float().mean()
    return mean


def _tensors_of(out: Any) -> Iterator[Tensor]:
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(out, name, None), Tensor):
            yield getattr(out, name)
    if isinstance(out, tuple | list):
        yield from (t for t in out if isinstance(t, Tensor))
    raise ConfigError(f"the module returns {type(out).__name__}: a tensor, .logits or .loss")
