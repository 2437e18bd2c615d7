"""How a run is spread over processes: one alone, DDP, or DeepSpeed's ZeRO with its offload.

A file of launch/ names the strategy; it decides speed and memory, never the mathematics. Neither
torch nor DeepSpeed is imported here, because the plan asks for strategies on machines that have no
ranks.
"""

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_lm.config import Config
from dist_lm.errors import UserError
from dist_lm.nearest import did_you_mean
from dist_lm.safe_yaml import parse
from dist_lm.shipped import shipped

LAUNCH_FILES = shipped("launch")
BUCKET = 50_000_000  # elements that ZeRO reduces or gathers at once
BLOCKS_AT_A_TIME = 3  # that ZeRO-3 has gathered on a GPU: in use, on its way, and just used
# ZeRO works on slices of parameters. An elementwise optimizer can do so too, and Muon collects its
# matrices.
OPTIMIZERS = ("adamw", "sgd", "lion", "muon")
# All that a launch file tells about DeepSpeed.
_KEYS = (
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
)
_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED")  # a launch file's distributed_type
_ENVIRONMENT_PREFIX = "ACCELERATE_DEEPSPEED_"


@dataclass(frozen=True)
class Strategy:
    """How a run is spread over processes."""

    stage: int = 0  # of ZeRO; 0 is DDP, or one process alone
    optimizer_device: str = "none"  # where the optimizer's part is offloaded to: none, cpu or nvme
    param_device: str = "none"  # ZeRO-3 only
    nvme_path: str = "none"

    def name(self, world_size: int) -> str:
        """The launch file's name, as state.json carries it."""
        if not self.stage:
            return "single" if world_size == 1 else "ddp"
        devices = (self.optimizer_device, self.param_device)
        suffix = ""
        if "nvme" in devices:
            suffix = "-nvme"
        elif "cpu" in devices:
            suffix = "-offload"
        return f"zero{self.stage}{suffix}"


def gathered_elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The most elements that ZeRO-3 has gathered on a GPU: three blocks, and all outside blocks."""
    of_block = 0
    outside = 0
    for name, shape in shapes.items():
        if name.startswith("blocks.0."):
            of_block += math.prod(shape)
        elif not name.startswith("blocks."):
            outside += math.prod(shape)
    return BLOCKS_AT_A_TIME * of_block + outside


def choose_strategy(launch: str | None) -> Strategy:
    """The strategy of `accelerate launch`, else of --launch.

    Refuses a contradiction between the two.
    """
    given = _from_environment()
    if launch is None:
        return given
    wanted = _from_file(launch)
    # accelerate passes on all that its file holds except the folder.
    comparable = replace(wanted, nvme_path=given.nvme_path)
    if "ACCELERATE_MIXED_PRECISION" in os.environ and comparable != given:
        raise UserError(
            f"--launch {launch} is not what accelerate launch started ({given.name(2)}); rule: one"
            " of the two; leave out --launch, or give that file to --config_file"
        )
    return wanted


def refuse_combinations(strategy: Strategy, config: Config) -> None:
    """Refuse by name what does not work under ZeRO, before anything is built."""
    name = strategy.name(2)
    optimizer = config.optim.name
    if config.run.exact:
        raise UserError(
            f"run.exact=true is not available under {name}: DeepSpeed adds gradients itself, as"
            " floats in an order that depends on the number of processes; rule: one process or DDP;"
            " nearest: launch/ddp.yaml, or run.exact=false"
        )
    if config.run.precision == "fp16":
        raise UserError(
            f"run.precision=fp16 is not available under {name}: DeepSpeed would clip gradients"
            " before it unscales them; rule: fp16 with one process or DDP; nearest: bf16"
        )
    if optimizer not in OPTIMIZERS:
        raise UserError(
            f"optim.name={optimizer} is not available under {name}: it keeps statistics of whole"
            f" matrices, which ZeRO cuts to pieces; rule: one of {', '.join(OPTIMIZERS)}; nearest:"
            " adamw"
        )
    is_offloaded = strategy.optimizer_device != "none" or strategy.param_device != "none"
    if optimizer != "adamw" and is_offloaded:
        raise UserError(
            f"optim.name={optimizer} is not available under {name}: only AdamW was tried with"
            " offload; nearest: adamw"
        )


def _from_environment() -> Strategy:
    """The strategy that `accelerate launch` put into the environment."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        return Strategy()
    given = {"zero_stage": "2"}
    for name, value in os.environ.items():
        if name.startswith(_ENVIRONMENT_PREFIX):
            key = name.removeprefix(_ENVIRONMENT_PREFIX).lower()
            given[key] = value
    if given.get("config_file", "none") != "none":
        raise UserError(
            "deepspeed_config_file is not read; rule: zero_stage and offload devices inside the"
            " launch file, as in launch/zero3-offload.yaml"
        )
    return _of_deepspeed(given)


def _from_file(launch: str) -> Strategy:
    """The strategy of a launch file, by name or path, where accelerate did not start the ranks."""
    path = Path(launch)
    if "/" not in launch and not launch.endswith(".yaml"):
        path = LAUNCH_FILES / f"{launch}.yaml"
    try:
        content = parse(path.read_text(encoding="utf-8"))
        kind = str(content["distributed_type"])
        deepspeed = content.get("deepspeed_config") or {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        names = [file.stem for file in sorted(LAUNCH_FILES.glob("*.yaml"))]
        raise UserError(
            f"--launch {launch}: no readable launch file; rule: one of {', '.join(names)}, or a"
            " path" + did_you_mean(launch, names)
        ) from error
    if kind not in _KINDS:
        raise UserError(
            f"{path}: distributed_type={kind} must be one of"
            f" {', '.join(_KINDS)}{did_you_mean(kind, _KINDS)}"
        )
    for key in set(deepspeed) - set(_KEYS):
        raise UserError(
            f"{path}: deepspeed_config.{key} is not read; rule: only"
            f" {', '.join(_KEYS)}{did_you_mean(key, _KEYS)}"
        )
    if kind != "DEEPSPEED":
        return Strategy()
    return _of_deepspeed(deepspeed)


def _of_deepspeed(given: Mapping[str, Any]) -> Strategy:
    """The strategy from DeepSpeed's settings in a launch file or the environment."""
    values = {key: str(given.get(key) or "none") for key in _KEYS}
    stage = values["zero_stage"]
    optimizer_device = values["offload_optimizer_device"]
    param_device = values["offload_param_device"]
    if stage not in ("1", "2", "3"):
        raise UserError(f"zero_stage={stage} of the launch file must be 1, 2 or 3; nearest: 2")
    folder = "none"
    if "nvme" in (optimizer_device, param_device):
        paths = [values["offload_optimizer_nvme_path"], values["offload_param_nvme_path"]]
        given_paths = [path for path in paths if path != "none"]
        folder = given_paths[0] if given_paths else tempfile.gettempdir()
    return Strategy(
        stage=int(stage),
        optimizer_device=optimizer_device,
        param_device=param_device,
        nvme_path=folder,
    )
