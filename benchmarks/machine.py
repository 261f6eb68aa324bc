"""What a benchmark ran on: processor, cores, memory, versions and the day."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens")


def describe() -> dict[str, Any]:
    """The machine of this process, for a file of results."""
    import torch  # here, because the pages are made without it

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": cores(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(memory_bytes() / 2**30),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as Linux gives it; elsewhere what Python knows."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak() -> int:
    """The most memory that this process has had resident since it was asked to forget, in KiB; on Linux."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def sentence(machine: dict[str, Any]) -> str:
    """``machine`` in words; what an earlier version did not record is said to be missing."""
    where = machine.get("cpu", "processor not recorded")
    parts = [where, f"{machine['cores']} cores"] if "cores" in machine else [where]
    parts += [str(machine[name]) for name in ("vectors",) if name in machine]
    if "memory_gib" in machine:
        parts.append(f"{machine['memory_gib']} GiB")
    versions = [f"Python {machine['python']}"] if "python" in machine else []
    versions += [f"{package} {machine[package]}" for package in PACKAGES if package in machine]
    threads = f" with {machine['threads']} threads" if "threads" in machine else ""
    return f"{', '.join(parts)}{threads}; {', '.join(versions)}; {machine.get('date', 'date not recorded')}"
