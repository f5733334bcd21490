"""What the NVIDIA driver says of one device: memory in use, energy, clocks, throttling.

`used` is nvmlDeviceGetMemoryInfo v2: what nvidia-smi shows, without the driver's own reserve. (v1
adds that: 912 MB on an idle A100.) It is the whole device's, with every process and CUDA context;
torch's figures are this process's tensors alone. The energy counter steps every 20–100 ms: windows
shorter than 1 s say little. What a device does not report is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

T = TypeVar("T")

_ABSENT = (
    pynvml.NVMLError_LibraryNotFound,
    pynvml.NVMLError_DriverNotLoaded,
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_NotFound,
    pynvml.NVMLError_InvalidArgument,
)
_UNREPORTED = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_FunctionNotFound,  # a driver older than the call
    pynvml.NVMLError_NoPermission,
)
_REASON = "nvmlClocksEventReason"
_COMPOSITE = ("All", "None")


@dataclass(frozen=True, kw_only=True, slots=True)
class Clocks:
    """Clocks at this moment; None where the device does not say."""

    sm_hz: int | None
    memory_hz: int | None


class NvmlDevice:
    """One device by its NVML handle; use it inside `open_device`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @property
    def name(self) -> str | None:
        """The product name, as nvidia-smi prints it."""
        return _ask(lambda: _text(pynvml.nvmlDeviceGetName(self._handle)))

    @property
    def uuid(self) -> str | None:
        """The device's identity across processes: "GPU-…"."""
        return _ask(lambda: _text(pynvml.nvmlDeviceGetUUID(self._handle)))

    @property
    def driver(self) -> str | None:
        """The version of the kernel driver."""
        return _ask(lambda: _text(pynvml.nvmlSystemGetDriverVersion()))

    def memory_used_bytes(self) -> int | None:
        """Bytes in use on the device by every process, the driver's reserve left out."""
        return _ask(lambda: int(self._memory().used))

    def reserve_bytes(self) -> int | None:
        """Bytes the driver keeps for itself."""
        return _ask(lambda: int(self._memory().reserved))

    def energy_j(self) -> float | None:
        """Energy since the driver was loaded: take the difference of two readings."""
        return _ask(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3)  # mJ

    def clocks(self) -> Clocks:
        """SM and memory clock now."""
        return Clocks(
            sm_hz=self._clock_hz(pynvml.NVML_CLOCK_SM),
            memory_hz=self._clock_hz(pynvml.NVML_CLOCK_MEM),
        )

    def temperature_c(self) -> int | None:
        """Temperature of the GPU now."""
        sensor = pynvml.NVML_TEMPERATURE_GPU
        return _ask(lambda: int(pynvml.nvmlDeviceGetTemperature(self._handle, sensor)))

    def throttle_reasons(self) -> tuple[str, ...] | None:
        """What holds the clocks down now, by NVML's names: ("SwPowerCap",); () is nothing."""
        mask = _ask(lambda: int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)))
        if mask is None:
            return None
        bits = {
            name.removeprefix(_REASON): getattr(pynvml, name)
            for name in dir(pynvml)
            if name.startswith(_REASON)
        }
        return tuple(n for n, bit in bits.items() if n not in _COMPOSITE and mask & bit)

    def _memory(self) -> Any:
        return pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=pynvml.nvmlMemory_v2)

    def _clock_hz(self, kind: int) -> int | None:
        return _ask(lambda: int(pynvml.nvmlDeviceGetClockInfo(self._handle, kind)) * 10**6)  # MHz


@contextmanager
def open_device(which: str | int) -> Iterator[NvmlDevice | None]:
    """The device with this UUID ("GPU-" may be left out) or index; None if there is none.

    Prefer the UUID, torch's `get_device_properties(i).uuid`: CUDA_VISIBLE_DEVICES renumbers torch's
    indices, not NVML's.
    """
    try:
        pynvml.nvmlInit()
    except _ABSENT:
        yield None
        return
    try:
        try:
            device = NvmlDevice(_handle(which))
        except _ABSENT:
            device = None
        yield device
    finally:
        pynvml.nvmlShutdown()


def used_bytes_by_uuid() -> dict[str, int]:
    """Bytes in use on every device of this machine now; empty without a driver."""
    try:
        pynvml.nvmlInit()
    except _ABSENT:
        return {}
    try:
        indices = range(pynvml.nvmlDeviceGetCount())
        devices = [NvmlDevice(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in indices]
        readings = {device.uuid: device.memory_used_bytes() for device in devices}
    finally:
        pynvml.nvmlShutdown()
    return {uuid: used for uuid, used in readings.items() if uuid and used is not None}


def _handle(which: str | int) -> Any:
    if isinstance(which, int):
        return pynvml.nvmlDeviceGetHandleByIndex(which)
    uuid = which if which.startswith(("GPU-", "MIG-")) else f"GPU-{which}"
    return pynvml.nvmlDeviceGetHandleByUUID(uuid)


def _ask(question: Callable[[], T]) -> T | None:
    try:
        return question()
    except _UNREPORTED:
        return None


def _text(value: str | bytes) -> str:
    """Bytes in older bindings, str in newer ones."""
    return value.decode() if isinstance(value, bytes) else value
