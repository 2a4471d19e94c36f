"""Where a measurement was made: what it must carry to be believed, and no name or path."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "numpy",
)


def cpu_name() -> str:
    """The processor's model as Linux gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """A package's version, or None where it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict:
    """Processor, cores, threads, GPU, versions and the command that is running, ready for JSON."""
    found = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "command": command(),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": device.name,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "multiprocessors": device.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def command() -> str:
    """The command line, as `python -m bench.x …`, without the paths of this machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name if spec else os.path.basename(sys.argv[0])
    return " ".join(["python -m", module.removesuffix(".__main__"), *sys.argv[1:]])


def describe(found: dict) -> str:
    """One line for the foot of a table."""
    versions = found["versions"]
    where = (
        found["gpu"]["name"] if "gpu" in found else f"{found['cpu']}, {found['threads']} threads"
    )
    return f"{where}; torch {versions['torch']}, triton {versions['triton']}; {found['command']}"
