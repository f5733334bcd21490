"""The card of this machine, as its driver tells it."""

from __future__ import annotations

from planner.errors import ConfigError


def device_here() -> tuple[str, int]:
    """What the driver calls its first device, and the bytes of it that are free now.

    Raises ConfigError where there is no driver or device.
    """
    import pynvml

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
    return name.decode() if isinstance(name, bytes) else name, free_bytes
