"""What a figure was measured on."""

import os
import platform
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The processor's name and how many of its cores this process may use."""
    cpu = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        names = [line.partition(":")[2].strip() for line in facts.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "system": platform.system()}


def accelerators(device: Any, count: int = 1) -> list[str]:
    """Names of the GPUs behind a torch device, as many as there are of it; none for a CPU."""
    import torch

    return [torch.cuda.get_device_name(device)] * count if device.type == "cuda" else []
