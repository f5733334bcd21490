"""What a step does with its gradients: an optimizer, copies that it steps, a scaler of the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from planner import ConfigError, Training
from planner.trained.optimizer_parts import is_hidden
from profiles.meters import storage_bytes

Named = Mapping[str, Tensor]


class Updates:
    """Backward and optimizer of a step, as `work` has them; `dtype`: what is computed in.

    Master weights step as planner/autograd/master_weights.py says, which takes Megatron-LM's order.
    """

    def __init__(self, work: Training, module: Module, *, dtype: str, device: torch.device) -> None:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.device = device
        self.copies: dict[Parameter, Tensor] = {}
        stepped: Named = trained
        if work.steps_copies:
            self.copies = {p: p.detach().float() for p in trained.values()}
            stepped = {name: self.copies[p] for name, p in trained.items()}
        self.parameters = list(trained.values())
        self.optimizers = list(_optimizers(work, stepped))
        # a scale that overflows nothing: a step is never skipped
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=1.0, enabled=work.scales_loss(dtype)
        )

    @property
    def has_states(self) -> bool:
        """Whether a step has made what the next ones find."""
        return any(optimizer.state for optimizer in self.optimizers)

    def backward(self, loss: Tensor) -> None:
        """Gradients, of the scaled loss where it is scaled."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, on_gradients: Callable[[], None]) -> None:
        """New weights; `on_gradients` is called where the optimizer's gradients are whole."""
        for p, copy in self.copies.items():
            if p.grad is not None:  # a bias of an untied BERT has none
                copy.grad = p.grad.float()
            p.grad = None
        on_gradients()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        if self.optimizers:
            self.scaler.update()
        with torch.no_grad():
            for p, copy in self.copies.items():
                p.copy_(copy)
        for copy in self.copies.values():
            copy.grad = None

    def check_stepped(self) -> None:
        """RuntimeError where gradients overflowed: a step that the scaler skips costs less."""
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1.0:
            raise RuntimeError("gradients in float16 overflowed: the optimizer did not step")

    def gradients_bytes(self) -> int:
        """What the live gradients hold."""
        held = (*self.parameters, *self.copies.values())
        return storage_bytes(p.grad for p in held if p.grad is not None)

    def states_bytes(self) -> int:
        """On the device: the optimizer's states, the copies that it steps, the loss's scale."""
        where = self.device.type
        return storage_bytes(t for t in self._held() if t.device.type == where)

    def _held(self) -> Iterator[Tensor]:
        yield from self.copies.values()
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                yield from (t for t in state.values() if isinstance(t, Tensor))
        for name in ("_scale", "_growth_tracker"):  # a scaler has them where it is enabled
            if (scale := getattr(self.scaler, name, None)) is not None:
                yield scale


def _optimizers(work: Training, named: Named) -> Iterator[torch.optim.Optimizer]:
    """One, or as many as step one after the other: torch's Muon takes matrices alone."""
    if work.optimizer is None:
        return
    if work.optimizer != "muon":
        yield _optimizer(work, list(named.values()))
        return
    hidden = {
        name for name, p in named.items() if is_hidden(tuple(p.shape), 0 if _inside(name) else None)
    }
    others = [p for name, p in named.items() if name not in hidden]
    yield torch.optim.Muon([p for name, p in named.items() if name in hidden])
    if others:
        yield torch.optim.AdamW(others, **_ways(work))


def _inside(name: str) -> bool:
    return ".layers." in name or ".h." in name


def _ways(work: Training) -> dict[str, Any]:
    return {"foreach": work.optimizer_impl == "foreach", "fused": work.optimizer_impl == "fused"}


def _optimizer(work: Training, trained: list[Tensor]) -> torch.optim.Optimizer:
    ways = _ways(work)
    match work.optimizer:
        case "adamw":
            return torch.optim.AdamW(trained, **ways)
        case "sgd" | "sgd-momentum":
            momentum = 0.9 if work.optimizer == "sgd-momentum" else 0.0
            return torch.optim.SGD(trained, momentum=momentum, **ways)
        case "adafactor":
            return torch.optim.Adafactor(trained, foreach=ways["foreach"])
        case "adafactor-transformers":
            import transformers

            hub: Any = transformers
            own: torch.optim.Optimizer = hub.Adafactor(
                trained, lr=1e-3, scale_parameter=False, relative_step=False
            )
            return own
        case "adamw-8bit":
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    import bitsandbytes
            except ImportError:
                raise ConfigError(
                    "optimizer='adamw-8bit' is measured with bitsandbytes, which is not installed"
                ) from None
            untyped: Any = bitsandbytes.optim
            small: torch.optim.Optimizer = untyped.AdamW8bit(trained)
            return small
        case _:
            raise ConfigError(f"optimizer={work.optimizer!r} is not measured: adamw, sgd, …")
