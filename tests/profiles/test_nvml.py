"""NVML is faked at the binding's edge only: the functions of pynvml that reach the driver."""

from types import SimpleNamespace

import pynvml
import pytest

from profiles import nvml


@pytest.fixture
def driver(monkeypatch):
    """A driver with one device; the calls are recorded, and may be replaced."""
    calls = []

    def memory(handle, version=None):
        calls.append(("memory", version))
        return SimpleNamespace(total=1000, used=300, free=640, reserved=60)

    def by_uuid(uuid):
        calls.append(("uuid", uuid))
        if uuid != "GPU-12ab":
            raise pynvml.NVMLError_NotFound
        return "handle"

    clocks = {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201}
    reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwSlowdown
    edge = {
        "nvmlInit": lambda: calls.append(("init",)),
        "nvmlShutdown": lambda: calls.append(("shutdown",)),
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
        "nvmlDeviceGetName": lambda handle: b"NVIDIA H200",
        "nvmlDeviceGetUUID": lambda handle: "GPU-12ab",
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 12_500,
        "nvmlDeviceGetClockInfo": lambda handle, kind: clocks[kind],
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: reasons,
    }
    edge |= {
        "nvmlDeviceGetPowerUsage": lambda handle: 412_500,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 45,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=87, memory=40),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
            SimpleNamespace(pid=11, usedGpuMemory=250),
            SimpleNamespace(pid=12, usedGpuMemory=None),
        ],
    }
    for name, function in edge.items():
        monkeypatch.setattr(pynvml, name, function)
    return calls


def test_without_a_driver_there_is_no_device_and_no_exception():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with nvml.open_device(0) as device:
            assert device is None
        assert nvml.used_bytes_by_uuid() == {}
    else:
        pynvml.nvmlShutdown()
        pytest.skip("this machine has an NVIDIA driver")


def test_readings_are_in_base_units(driver):
    with nvml.open_device("GPU-12ab") as device:
        assert (device.name, device.uuid, device.driver) == ("NVIDIA H200", "GPU-12ab", "580.1")
        assert device.energy_j() == 12.5
        assert device.clocks() == nvml.Clocks(sm_hz=1_980_000_000, memory_hz=3_201_000_000)
        assert (device.power_w(), device.temperature_c(), device.utilisation()) == (412.5, 45, 0.87)
        assert device.total_bytes() == 1000


def test_a_process_that_is_not_listed_or_not_told_is_none(driver):
    with nvml.open_device("GPU-12ab") as device:
        assert [device.process_used_bytes(pid) for pid in (11, 12, 13)] == [250, None, None]


def test_used_memory_is_the_second_version_that_leaves_the_reserve_out(driver):
    with nvml.open_device("GPU-12ab") as device:
        assert (device.memory_used_bytes(), device.reserve_bytes()) == (300, 60)
    assert {call for call in driver if call[0] == "memory"} == {("memory", pynvml.nvmlMemory_v2)}


def test_throttle_reasons_have_nvmls_names_and_none_is_empty(driver, monkeypatch):
    with nvml.open_device("GPU-12ab") as device:
        assert set(device.throttle_reasons()) == {"SwPowerCap", "HwSlowdown"}
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", lambda handle: 0)
        assert device.throttle_reasons() == ()


def test_torchs_bare_uuid_finds_the_device(driver):
    with nvml.open_device("12ab") as device:
        assert device is not None
    assert ("uuid", "GPU-12ab") in driver


def test_a_device_that_nvml_does_not_know_is_none_and_nvml_is_shut_down(driver):
    with nvml.open_device("GPU-ffff") as device:
        assert device is None
    assert driver[-1] == ("shutdown",)


def test_nvml_is_shut_down_after_an_error_of_the_caller(driver):
    with pytest.raises(ZeroDivisionError), nvml.open_device(0):
        raise ZeroDivisionError
    assert driver[-1] == ("shutdown",)


def test_every_device_can_be_read_before_torch_is_asked_for_its_uuid(driver):
    assert nvml.used_bytes_by_uuid() == {"GPU-12ab": 300}
    assert driver[-1] == ("shutdown",)


@pytest.mark.parametrize("error", ["NVMLError_NotSupported", "NVMLError_FunctionNotFound"])
def test_what_a_device_does_not_report_is_none(driver, monkeypatch, error):
    def refuse(*arguments, **options):
        raise getattr(pynvml, error)

    for name in vars(pynvml).copy():
        if name.startswith(("nvmlDeviceGet", "nvmlSystemGet")) and "Handle" not in name:
            monkeypatch.setattr(pynvml, name, refuse)
    with nvml.open_device("GPU-12ab") as device:
        readings = [
            device.name,
            device.driver,
            device.memory_used_bytes(),
            device.reserve_bytes(),
            device.energy_j(),
            device.throttle_reasons(),
            device.total_bytes(),
            device.process_used_bytes(11),
            device.power_w(),
            device.temperature_c(),
            device.utilisation(),
        ]
        assert readings == [None] * 11
        assert device.clocks() == nvml.Clocks(sm_hz=None, memory_hz=None)


def test_a_lost_gpu_is_an_error_and_not_unknown(driver, monkeypatch):
    def lost(*arguments, **options):
        raise pynvml.NVMLError_GpuIsLost

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lost)
    with nvml.open_device("GPU-12ab") as device, pytest.raises(pynvml.NVMLError_GpuIsLost):
        device.memory_used_bytes()
