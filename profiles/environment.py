"""What this machine is: the environment of a record, and the memory that is free now."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from planner import ConfigError
from planner.catalog.gpus import gpu_of_torch_name
from planner.catalog.here import processor_name
from planner.errors import check_choice
from profiles.nvml import NvmlDevice
from profiles.records import Environment

DEVICES = ("auto", "cuda", "cpu")


def find_device(name: str) -> torch.device:
    """The torch device for "auto", "cuda" or "cpu"; ConfigError where it is not here."""
    check_choice("device", name, DEVICES)
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise ConfigError(
            f"device=cuda is not here: torch {torch.__version__} finds no CUDA device"
        )
    return torch.device("cuda" if present and name != "cpu" else "cpu")


def device_uuid(device: torch.device) -> str | None:
    """NVML's name of a CUDA device: "GPU-…"; None for the CPU."""
    if device.type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def describe(device: torch.device, driver: NvmlDevice | None) -> Environment:
    """The environment of a measurement on `device`; clocks are read by the measurement itself."""
    cuda = device.type == "cuda"
    cpu = processor_name()
    name = torch.cuda.get_device_name(device) if cuda else cpu or "cpu"
    return Environment(
        device="cuda" if cuda else "cpu",
        device_name=name,
        gpu=gpu_of_torch_name(name) if cuda else "cpu",
        device_uuid=device_uuid(device),
        driver=driver.driver if driver else None,
        platform=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=installed("triton"),
        transformers=installed("transformers"),
        cpu=cpu,
        cpu_threads=torch.get_num_threads(),
        total_memory_bytes=_total_bytes(device),
        git_commit=_git_commit(),
    )


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor could take now.

    CUDA: the driver's figure, the context of this process already off. CPU: MemAvailable of
    /proc/meminfo, or what is left of the control group's limit where that is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_meminfo_bytes("MemAvailable"), _cgroup_left_bytes())


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _meminfo_bytes("MemTotal")


def _meminfo_bytes(name: str) -> int:
    """A field of /proc/meminfo; where that file is not, physical memory as sysconf has it."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_left_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What the control group (v2) may still take, its page cache counted as free."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 2**63
    if limit == "max":
        return 2**63
    return int(limit) - used + int(stat.get("inactive_file", 0))


@cache
def _git_commit() -> str | None:
    """The commit of this code, "+dirty" where files differ from it; None outside a checkout.

    A copy of a checkout without its history may be told by PLANNER_GIT_COMMIT.
    """
    if told := os.environ.get("PLANNER_GIT_COMMIT"):
        return told
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+dirty" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
