"""What this machine is: card, driver, versions, commit: `python -m benchmarks.gpu.facts`."""

import importlib.metadata
import json
import platform
import subprocess
from typing import Any

from dist_lm.revision import git_commit, version_and_hash

SMI_FIELDS = {  # of nvidia-smi: our name of it
    "driver_version": "driver",
    "clocks.max.sm": "clock_max_mhz",
    "clocks.sm": "clock_at_start_mhz",
    "clocks.max.memory": "memory_clock_max_mhz",
    "power.limit": "power_limit_watts",
    "temperature.gpu": "temperature_celsius",
}
PACKAGES = ("accelerate", "deepspeed", "transformers", "triton", "numpy", "tokenizers")


def collect() -> dict[str, Any]:
    """Facts as the result file has them. `card` is missing where there is no CUDA."""
    import torch  # slow

    facts: dict[str, Any] = {
        "dist_lm": version_and_hash(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in PACKAGES:
        facts[name] = version_of(name)
    if not torch.cuda.is_available():
        return facts
    properties = torch.cuda.get_device_properties(0)
    facts |= {
        "card": properties.name,
        "cards": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()),
    }
    return facts | {SMI_FIELDS[field]: value for field, value in ask_smi(list(SMI_FIELDS)).items()}


def commit() -> str:
    """The commit of the checkout, and whether files differ from it."""
    known = git_commit()
    if known is None:
        return "unknown"
    done = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    )
    return f"{known[:12]}, changed" if done.stdout.strip() else known[:12]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ask_smi(fields: list[str]) -> dict[str, str]:
    """Fields of nvidia-smi for the first card; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
    return dict(zip(fields, values, strict=False))


if __name__ == "__main__":
    print(json.dumps(collect()))
