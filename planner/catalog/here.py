"""`--gpu auto`: the card of this machine, with the memory that is free on it now."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from planner.errors import ConfigError, shown

if TYPE_CHECKING:
    from planner.catalog.gpus import Gpu


def gpu_here() -> Gpu:
    """The first device that the driver names; `memory_bytes` is what of it is free.

    Raises ConfigError where there is no driver or device, and for one outside the catalogue.
    """
    import pynvml

    from planner.catalog.gpus import gpu_named, gpu_of_torch_name

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise ConfigError(f"gpu='auto' is not allowed here: no NVIDIA driver ({error})") from None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(handle)
        free_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).free)
    except pynvml.NVMLError as error:
        raise ConfigError(f"gpu='auto' is not allowed here: {error}") from None
    finally:
        pynvml.nvmlShutdown()
    name = name.decode() if isinstance(name, bytes) else name
    known = gpu_of_torch_name(name)
    if known is None:
        raise ConfigError(f"gpu='auto' is {shown(name)} here, which is not in the catalogue")
    gpu = gpu_named(known)
    return replace(gpu, memory_bytes=min(free_bytes, gpu.memory_bytes))
