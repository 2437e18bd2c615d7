"""Settings of torch and CUDA that must be made before the first kernel runs.

CUDA reads its variables when it starts, so a process calls prepare_device() before it meets the
others. Nothing here changes what a CPU computes, unless run.deterministic is set.
"""

import contextlib
import os
import platform
from pathlib import Path

import torch
import torch.utils.deterministic

from dist_lm.config import Config
from dist_lm.console import count
from dist_lm.environment import environment_number

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def prepare_device(config: Config) -> None:
    """Set torch up for this run. What the user has set in the environment stays."""
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        # Segments that grow leave no holes that are too small for the next tensor.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # Partial sums of a bf16 product stay fp32, as on a CPU.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if config.run.deterministic:
        _be_deterministic()
    if config.run.exact:
        _be_the_same_everywhere()


def threads_of_exact() -> int:
    """Threads of a rank on a CPU under run.exact: a kernel that divides its work adds otherwise."""
    return environment_number("DIST_LM_THREADS", 1)


def describe_kernels(device: torch.device) -> str:
    """What decides the bits that kernels compute: another line may mean other bits."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        threads = count(threads_of_exact(), "thread")
        kind = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {threads}"
    return f"torch {torch.__version__}, {kind}"


def _processor() -> str:
    """The kind of processor, as Linux names it; elsewhere the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _be_deterministic() -> None:
    """Refuse or replace every kernel whose result may differ from run to run.

    On GPUs that is, among others, the backward of fast attention and of the embedding, which add by
    atomics in any order. Attention then is flash or memory-efficient attention with a fixed order,
    never cuDNN's.
    """
    # Without it cuBLAS chooses by the memory that happens to be free, and torch refuses to use it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # By default the strict mode also fills new memory, which costs time. Nothing here reads memory
    # before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _be_the_same_everywhere() -> None:
    """No kernel is chosen by how fast it happened to be on this machine."""
    torch.set_float32_matmul_precision("highest")  # no tf32
    torch.backends.cudnn.benchmark = False
