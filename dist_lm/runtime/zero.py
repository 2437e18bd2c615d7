"""DeepSpeed's half of the runtime: which strategy was asked for, the engine, and which part of what a rank holds.

Launch files decide only how a run is spread over machines (stage and offload); batch, clipping and precision come from
the run's config, and what the engine believes of them is read back. deepspeed is imported inside functions: it is an
optional package, slow to import, and one process or DDP must do without it.
"""

import ctypes
import fcntl
import hashlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from dist_lm.checkpoint.save import OwnedSlice
from dist_lm.config import BatchLayout, Config
from dist_lm.errors import RetryableError, UserError, did_you_mean
from dist_lm.optim import MatrixSlice

LAUNCH_FILES = Path(__file__).parents[2] / "launch"
BUCKET = 50_000_000  # elements reduced or gathered at once
# All that a launch file says of DeepSpeed.
_KEYS = (
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
)
# What the optimizers need of a parameter: elementwise ones work on any slice, Muon collects its matrices.
OPTIMIZERS = ("adamw", "sgd", "lion", "muon")


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
        return f"zero{self.stage}" + (
            "-nvme" if "nvme" in devices else "-offload" if "cpu" in devices else ""
        )


def choose_strategy(launch: str | None) -> Strategy:
    """What `accelerate launch` put into the environment, or else what --launch names; a contradiction is refused."""
    given = _from_environment()
    if launch is None:
        return given
    wanted = _from_file(launch)
    # accelerate hands on all that its file says but the folder.
    if (
        "ACCELERATE_MIXED_PRECISION" in os.environ
        and replace(wanted, nvme_path=given.nvme_path) != given
    ):
        raise UserError(
            f"--launch {launch} is not what accelerate launch started ({given.name(2)}); rule: one of the two; leave"
            " out --launch, or give that file to --config_file"
        )
    return wanted


def _from_environment() -> Strategy:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        return Strategy()
    prefix = "ACCELERATE_DEEPSPEED_"
    given = {
        name.removeprefix(prefix).lower(): value
        for name, value in os.environ.items()
        if name.startswith(prefix)
    }
    if given.get("config_file", "none") != "none":
        raise UserError(
            "deepspeed_config_file is not read; rule: zero_stage and offload devices inside the launch file, as in"
            " launch/zero3-offload.yaml"
        )
    return _strategy({"zero_stage": "2", **given})


def _from_file(launch: str) -> Strategy:
    """The strategy of a file of launch/, by name or path, where accelerate did not start the ranks."""
    path = (
        LAUNCH_FILES / f"{launch}.yaml"
        if "/" not in launch and not launch.endswith(".yaml")
        else Path(launch)
    )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind, inside = str(content["distributed_type"]), content.get("deepspeed_config") or {}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        names = [file.stem for file in sorted(LAUNCH_FILES.glob("*.yaml"))]
        raise UserError(
            f"--launch {launch}: no readable launch file; rule: one of {', '.join(names)}, or a path"
            + did_you_mean(launch, names)
        ) from error
    kinds = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED")
    if kind not in kinds:
        raise UserError(
            f"{path}: distributed_type={kind} must be one of {', '.join(kinds)}{did_you_mean(kind, kinds)}"
        )
    for key in set(inside) - set(_KEYS):
        raise UserError(
            f"{path}: deepspeed_config.{key} is not read; rule: only {', '.join(_KEYS)}"
            f"{did_you_mean(key, _KEYS)}"
        )
    return _strategy(inside) if kind == "DEEPSPEED" else Strategy()


def _strategy(given: Mapping[str, Any]) -> Strategy:
    """What a launch file says of DeepSpeed."""
    stage, optimizer_device, param_device, *paths = (str(given.get(key) or "none") for key in _KEYS)
    if stage not in ("1", "2", "3"):
        raise UserError(f"zero_stage={stage} of the launch file must be 1, 2 or 3; nearest: 2")
    to_disk = "nvme" in (optimizer_device, param_device)
    folder = (
        next((path for path in paths if path != "none"), tempfile.gettempdir())
        if to_disk
        else "none"
    )
    return Strategy(int(stage), optimizer_device, param_device, folder)


def refuse_combinations(strategy: Strategy, config: Config) -> None:
    """What does not work under ZeRO is refused by name, before anything is built."""
    name, optimizer = strategy.name(2), config.optim.name
    if config.run.precision == "fp16":
        raise UserError(
            f"run.precision=fp16 is not available under {name}: DeepSpeed would clip gradients before it unscales them;"
            " rule: fp16 with one process or DDP; nearest: bf16"
        )
    if optimizer not in OPTIMIZERS:
        raise UserError(
            f"optim.name={optimizer} is not available under {name}: it keeps statistics of whole matrices, which ZeRO"
            f" cuts to pieces; rule: one of {', '.join(OPTIMIZERS)}; nearest: adamw"
        )
    if optimizer != "adamw" and (strategy.optimizer_device, strategy.param_device) != (
        "none",
        "none",
    ):
        raise UserError(
            f"optim.name={optimizer} is not available under {name}: only AdamW was tried with offload; nearest: adamw"
        )


def engine_config(strategy: Strategy, config: Config, layout: BatchLayout) -> dict[str, Any]:
    """DeepSpeed's settings: stage and offload from the launch file, everything else from the run's config."""
    zero: dict[str, Any] = {
        "stage": strategy.stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 10 * config.model.width,
    }
    # DeepSpeed's files have fixed names: two runs in one folder would write over each other's.
    folder = f"dist_lm-{hashlib.sha256(os.path.abspath(config.run.dir).encode()).hexdigest()[:12]}"
    for of, device in (("optimizer", strategy.optimizer_device), ("param", strategy.param_device)):
        if device != "none":
            zero[f"offload_{of}"] = {"device": device}
        if device == "nvme":
            zero[f"offload_{of}"]["nvme_path"] = os.path.join(strategy.nvme_path, folder)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "train_batch_size": layout.micro_batch * layout.accumulation * layout.world_size,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW, on whatever device: no extension to compile
    }
    if (
        config.run.precision == "bf16"
    ):  # as DDP does it: fp32 weights and gradients, no module in bf16 for good
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return settings


def plugin(settings: dict[str, Any]) -> Any:
    """Accelerate's handle on the settings."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it found none
    # torch 2.13 renames what DeepSpeed calls in each step.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            'DeepSpeed is not installed; rule: pip install -e ".[deepspeed]", or launch/ddp.yaml'
        ) from error
    from accelerate.utils import DeepSpeedPlugin

    if "nvme" in str(settings["zero_optimization"]):
        _build_async_io()
    # Accelerate refuses settings from here beside those of its own file, which name the strategy; both are ours.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    # DeepSpeed's reduction in shared memory is compiled at its first use, sums in another order, and is not needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)


def _build_async_io() -> None:
    """Compile DeepSpeed's reader and writer for NVMe, one process of a host at a time; later ones find it made."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    builder = AsyncIOBuilder()
    if torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:
        raise UserError(
            "zero3-nvme compiles an extension; rule: the CUDA toolkit is installed; nearest: zero3-offload"
        )
    if not builder.is_compatible(verbose=False):
        raise UserError(
            "DeepSpeed's async I/O cannot be built here; rule: zero3-nvme needs libaio, e.g. apt install libaio-dev;"
            " nearest: zero3-offload"
        )
    # DeepSpeed builds the second with the first.
    folders = [
        Path(cpp_extension._get_build_directory(name, verbose=False))
        for name in (builder.name, "pin_memory")
    ]
    with only_builder(folders):
        if not any(folders[0].glob("*.so")):
            print(
                "building DeepSpeed's async I/O, once on this host: some minutes",
                file=sys.stderr,
                flush=True,
            )
        # ninja lies beside Python where an environment is used without being activated.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        builder.load(verbose=False)


@contextmanager
def only_builder(folders: Sequence[Path], wait_seconds: float = 900.0) -> Iterator[None]:
    """Surrounds the building of extensions in `folders`: one process of a host at a time, the others wait so long."""
    with open(folders[0] / "builder", "a+") as file:
        began, told = time.monotonic(), os.environ.get("RANK", "0") != "0"
        while True:  # the system drops this lock with the process that holds it
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            file.seek(0)
            who = f"process {file.read()}"
            if time.monotonic() - began > wait_seconds:
                raise RetryableError(
                    f"{folders[0]}: {who} builds for {wait_seconds:.0f} s already; rule: end it"
                )
            if not told:
                print(f"waiting until {who} has built in {folders[0]}", file=sys.stderr, flush=True)
            told = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        # torch's own locks outlive a builder that was killed, and every later start would wait for them for ever.
        for folder in folders:
            (folder / "lock").unlink(missing_ok=True)
        yield


@contextmanager
def construction(settings: Mapping[str, Any] | None) -> Iterator[None]:
    """Surrounds the building of a model: under ZeRO-3 each parameter is cut to slices as soon as it exists."""
    if settings is None or settings["zero_optimization"]["stage"] != 3:
        yield
        return
    import deepspeed

    # Whole parameters that were cut up must go back to the system: as holes in the heap they nearly doubled the peak.
    _tune_malloc(mmap_threshold=2**20, trim_threshold=2**17)
    # No dtype: given one, DeepSpeed 0.19 takes fp16 or bf16 whatever it is; without, what the settings say, fp32.
    with deepspeed.zero.Init(config_dict_or_path=dict(settings)):
        yield
    _tune_malloc(mmap_threshold=2**25, trim_threshold=2**26)  # where glibc's own adjustment ends


def _tune_malloc(mmap_threshold: int, trim_threshold: int) -> None:
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, mmap_threshold)
        libc.mallopt(-1, trim_threshold)


class Engine:
    """A DeepSpeed engine, in the words of the runtime."""

    def __init__(self, wrapped: Any, settings: Mapping[str, Any]):
        self.wrapped, self.stage = wrapped, settings["zero_optimization"]["stage"]
        self.zero = wrapped.optimizer  # DeepSpeed's ZeRO optimizer, around ours
        kind = "DeepSpeedZeroOptimizer_Stage3" if self.stage == 3 else "DeepSpeedZeroOptimizer"
        believed_and_asked = {
            "stage": (wrapped.zero_optimization_stage(), self.stage),
            "optimizer": (type(self.zero).__name__, kind),
            "weights cast to bf16 or fp16": (
                wrapped.bfloat16_enabled() or wrapped.fp16_enabled(),
                False,
            ),
            "torch_autocast": (wrapped.torch_autocast_enabled(), "torch_autocast" in settings),
        }
        for name in (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        ):
            believed_and_asked[name] = (getattr(wrapped, name)(), settings[name])
        different = [
            f"{name}: {a!r}, not {b!r}" for name, (a, b) in believed_and_asked.items() if a != b
        ]
        assert not different, (
            f"DeepSpeed runs with other settings than asked for: {'; '.join(different)}"
        )

    def backward(self, loss: Tensor, last: bool) -> None:
        self.wrapped.set_gradient_accumulation_boundary(last)
        self.wrapped.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        """Clip, update, forget the gradients; the norm before clipping, infinite if the update was left out."""
        self.wrapped.step()
        norm = self.wrapped.get_global_grad_norm()
        return torch.as_tensor(
            norm, device=self.wrapped.device
        ).detach()  # with offload it comes on the CPU

    def flats(self) -> list[Tensor]:
        """The fp32 pieces of this rank that the optimizer works on, one a group."""
        found: list[Tensor]
        found = (
            self.zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero.single_partition_of_fp32_groups
        )
        return found

    def opened(self) -> Iterator[Sequence[int]]:
        """Numbers of the flat pieces that can be worked on in this turn, all of them once. All ranks.

        ZeRO-3 shows the optimizer a piece only during its update, and what lies on NVMe is in memory only for its turn.
        """
        if self.stage < 3:
            yield range(len(self.flats()))
            return
        for number, flat in enumerate(self.flats()):
            group = self.zero.optimizer.param_groups[self.zero.sub_group_to_group_id[number]]
            swapped = self.zero._swappable_optimizer_subgroup(number)
            if swapped:
                self.zero._optimizer_states_and_gradient_swap_in(number)
            group["params"] = [flat]
            yield [number]
            group["params"] = []
            if swapped:
                self.zero._optimizer_states_and_gradient_swap_out(number)

    def slices(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        names: Mapping[nn.Parameter, str],
        lengths: Mapping[str, list[int]],
    ) -> dict[Tensor, list[MatrixSlice]]:
        """What each flat piece holds of which parameter, for an optimizer that needs whole ones."""
        groups = self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups
        places = {
            name: at for name, _, at, _ in self._places((name, p) for p, name in names.items())
        }
        return {
            flat: [
                MatrixSlice(shapes[names[p]], places.get(names[p], 0), tuple(lengths[names[p]]))
                for p in group
            ]
            for flat, group in zip(self.flats(), groups, strict=True)
        }

    def spread(self) -> None:
        """Make the model's weights those of the pieces that the ranks hold. All ranks."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()  # small ones are whole between steps, and would stay as they were
        for numbers in self.opened():
            for number in numbers:
                self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def owned(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[OwnedSlice]:
        """What this rank holds of each parameter: a slice of it under ZeRO-3, of some of them under 1 and 2."""
        places = list(self._places(named_parameters))
        for numbers in self.opened():
            for name, (number, start), at, size in places:
                if number in numbers:
                    flat = self.flats()[number]
                    yield OwnedSlice.part(
                        name, start, size, flat, self.zero.optimizer.state.get(flat, {}), at
                    )

    def _places(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> Iterator[tuple[str, tuple[int, int], int, int]]:
        """What we hold of each parameter: name, (group, first element), place in the group's flat piece, elements."""
        rank = torch.distributed.get_rank()
        for name, parameter in named_parameters:
            if self.stage == 3:
                group, at, share = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start = rank * share
                size = min(share, parameter.ds_numel - start)  # type: ignore[attr-defined]
            elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                group, start = mapping.param_group_index, mapping.lp_fragment_address.start
                at, size = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            else:
                continue
            if size > 0:
                yield name, (group, start), at, size
