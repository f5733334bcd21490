"""Real training steps under torch's fully_shard: one rank of a world whose others are not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

from planner.workload import Deployment
from profiles.meters import LiveTensorMeter
from tests.planner.small_decoders import DTYPES, padding, words

MOST_SHARDS = 16


@contextmanager
def fake_ranks() -> Iterator[None]:
    """This process as the first of many, whose collectives return at once."""
    dist.init_process_group("fake", rank=0, world_size=MOST_SHARDS, store=FakeStore())
    yield
    dist.destroy_process_group()


def shard(live: torch.nn.Module, layers: torch.nn.ModuleList, deploy: Deployment) -> None:
    """Each layer and the root, in place."""
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[str(deploy.dtype)], reduce_dtype=DTYPES[deploy.reduce_dtype]
    )
    mesh = DeviceMesh("cpu", list(range(deploy.data_parallel_shards)))
    kept = {"all": 0, "all-but-last": 1, "none": len(layers)}[deploy.reshard_after_forward]
    for index, layer in enumerate(layers):
        freed = index < len(layers) - kept
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=freed)
    fully_shard(live, mesh=mesh, mp_policy=policy)


class ShardMeter(LiveTensorMeter):
    """Sees also what gives a gathered weight its bytes and takes them: no op, so no mode sees it.

    To be entered when no weight is gathered. `made`: the size of every storage, and the stream.
    """

    made: list[tuple[int, Any]]

    def __enter__(self) -> ShardMeter:
        self._kept = _fsdp_param.alloc_storage, _fsdp_param.free_storage

        def resizing(resize: Any) -> Any:
            def resized(tensor: torch.Tensor) -> None:
                storage = tensor.untyped_storage()
                before = storage.nbytes()
                resize(tensor)
                self._op = "storage.resize_"
                self._change(storage.nbytes() - before)

            return resized

        _fsdp_param.alloc_storage, _fsdp_param.free_storage = map(resizing, self._kept)
        self.made = []
        super().__enter__()
        return self

    def _created(self, key: int, storage: torch.UntypedStorage) -> None:
        self.made.append((storage.nbytes(), torch.cpu.current_stream()))
        super()._created(key, storage)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _fsdp_param.alloc_storage, _fsdp_param.free_storage = self._kept


def sharded_meter(
    live: torch.nn.Module,
    batch: int,
    tokens: int,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    padded: bool = False,
    steps: int = 1,
) -> ShardMeter:
    """The meter of the second step, of `steps` batches; the first makes what stays: states."""
    ids = words(live.config, batch, tokens)
    mask = padding(batch, tokens) if padded else None
    for _ in range(2):
        with ShardMeter(log=True) as meter:
            for _ in range(steps):
                loss = None
                loss = live(ids, attention_mask=mask, labels=ids, use_cache=False).loss
                loss.backward()
            if optimizer is not None:
                optimizer.step()
            live.zero_grad(set_to_none=True)
            del loss
    return meter


def shard_bytes(live: torch.nn.Module) -> int:
    """What this rank keeps of the parameters, padded, and the buffers."""
    shards = sum(p.to_local().untyped_storage().nbytes() for p in live.parameters())
    return shards + sum(b.nbytes for b in live.buffers())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What it keeps of this rank's shards."""
    tensors = (x for state in optimizer.state.values() for x in state.values())
    return sum(getattr(x, "_local_tensor", x).nbytes for x in tensors)
