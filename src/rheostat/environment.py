"""Where a number was measured: versions and machine, for results and benchmarks."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of what shapes the numbers."""
    names = ("rheostat", "torch", "transformers", "numpy", "reasoning-gym")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def machine() -> dict[str, str | int]:
    """The machine in words: processor, cores, system."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"cpu": name, "cores": os.cpu_count() or 1, "system": platform.system()}
