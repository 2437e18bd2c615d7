"""DeepSpeed's ZeRO as an engine.

Each rank holds a slice of the optimizer's state, under ZeRO-3 also of the weights. The launch file
only chooses stage and offload; batch, clipping and precision come from the run's config, and what
DeepSpeed made of them is read back. deepspeed is imported inside functions: it is an optional
package, slow to import, and one process or DDP must do without it.
"""

import contextlib
import ctypes
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_lm.channel import Channel
from dist_lm.checkpoint.layout import OwnedSlice
from dist_lm.config import BatchLayout, Config
from dist_lm.errors import UserError
from dist_lm.own_optimizers import MatrixSlice, Muon
from dist_lm.runtime.async_io import build_async_io
from dist_lm.runtime.engine import Engine, Shapes, built_on
from dist_lm.runtime.strategy import BUCKET, Strategy, gathered_elements

LEAF = "Block"  # the class of the modules that ZeRO-3 gathers at once
_M_TRIM_THRESHOLD = -1  # numbers of glibc's mallopt()
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class _Place:
    """Where this rank's slice of a parameter lies."""

    name: str  # of the parameter
    start: int  # first element of the slice in the flattened parameter
    size: int  # elements
    flat: int  # number of the flat piece that holds the slice
    at: int  # its first element there


class ZeroEngine(Engine):
    """A DeepSpeed engine with ZeRO stage 1, 2 or 3.

    The optimizer works on flat pieces: for each of its groups one fp32 tensor with this rank's
    slices of the group's parameters. Under stage 3 a group may have several.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        strategy: Strategy,
        settings: dict[str, Any],
    ):
        super().__init__(accelerator, config, strategy)
        self.stage = strategy.stage
        self.settings = settings  # as zero_settings() makes them
        self.zero: Any = None  # DeepSpeed's ZeRO optimizer, around ours
        self._is_last_micro = False

    # --- building

    @contextlib.contextmanager
    def construction(self) -> Iterator[None]:
        """Under ZeRO-3 each parameter is cut to slices as soon as it exists."""
        if self.stage < 3:
            with built_on(self.device):
                yield
            return
        import deepspeed

        # Whole parameters that were cut up must go back to the system: as holes in the heap they
        # nearly doubled the peak.
        tune_malloc(mmap_threshold=2**20, trim_threshold=2**17)
        # No dtype: given one, DeepSpeed 0.19 takes fp16 or bf16 whatever it is. Without it the
        # settings decide: fp32.
        with deepspeed.zero.Init(config_dict_or_path=dict(self.settings)):
            yield
        # where glibc's own adjustment ends
        tune_malloc(mmap_threshold=2**25, trim_threshold=2**26)

    def _move(self, model: nn.Module) -> None:
        """Only the buffers: DeepSpeed leaves them where a model built in slices has them."""
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)

    def _wrap(self, shapes: Shapes, channel: Channel) -> None:
        if self.stage == 3 and self.on_gpu:
            self._bound_gathered(shapes)
        self.model, _ = self.accelerator.prepare(self.bare, self.optimizer)
        self.zero = self.model.optimizer
        self._refuse_other_settings()
        if isinstance(self.optimizer, Muon):
            slices = self._matrix_slices(shapes, channel)
            self.optimizer.share_matrices(self.rank, slices, channel.exchange)

    def _bound_gathered(self, shapes: Shapes) -> None:
        """Let ZeRO-3 keep few blocks gathered.

        By default it keeps 10^9 elements, so it would save nothing of the weights of a smaller
        model. Weights outside of blocks are in use during the whole step.
        """
        limit = gathered_elements(shapes)
        for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
            self.settings["zero_optimization"][name] = limit
            plugin = self.accelerator.deepspeed_plugin
            plugin.deepspeed_config["zero_optimization"][name] = limit

    def _refuse_other_settings(self) -> None:
        """Read back what DeepSpeed made of our settings."""
        engine = self.model
        zero = self.settings["zero_optimization"]
        made = engine._config.zero_config
        kind = "DeepSpeedZeroOptimizer_Stage3" if self.stage == 3 else "DeepSpeedZeroOptimizer"
        is_cast = engine.bfloat16_enabled() or engine.fp16_enabled()
        autocasts = "torch_autocast" in self.settings
        actual_and_asked = {
            "stage": (engine.zero_optimization_stage(), self.stage),
            "optimizer": (type(self.zero).__name__, kind),
            "weights cast to bf16 or fp16": (is_cast, False),
            "torch_autocast": (engine.torch_autocast_enabled(), autocasts),
        }
        for name in (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        ):
            actual_and_asked[name] = (getattr(engine, name)(), self.settings[name])
        if "overlap_comm" in zero:
            actual_and_asked["overlap_comm"] = (engine.zero_overlap_comm(), True)
        if "leaf_module" in zero and self.stage == 3:
            leaves = [hasattr(block, "_z3_leaf") for block in self.bare.blocks]
            actual_and_asked["blocks gathered at once"] = (leaves, [True] * len(leaves))
        for name in ("max_live_parameters", "max_reuse_distance"):
            if f"stage3_{name}" in zero:
                actual_and_asked[name] = (getattr(made, name), zero[f"stage3_{name}"])
        different = []
        for name, (actual, asked) in actual_and_asked.items():
            if actual != asked:
                different.append(f"{name}: {actual!r}, not {asked!r}")
        assert not different, (
            f"DeepSpeed runs with other settings than asked for: {'; '.join(different)}"
        )

    def release(self) -> None:
        super().release()
        self.zero = None

    # --- one step

    def warm_up(self, loss_of_nothing: Callable[[], Tensor]) -> None:
        """Nothing to do: DeepSpeed sums in the same order from the first step on."""

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self._is_last_micro = last  # DeepSpeed is told in backward()
        with self.autocast():
            yield

    def _backward(self, loss: Tensor) -> None:
        self.model.set_gradient_accumulation_boundary(self._is_last_micro)
        self.model.backward(loss, scale_wrt_gas=False)

    def _step(self) -> Tensor:
        self.model.step()  # clips and forgets the gradients too
        norm = self.model.get_global_grad_norm()
        # With offload it comes on the CPU.
        return torch.as_tensor(norm, device=self.model.device).detach()

    # --- what this rank holds

    def opened(self) -> Iterator[Sequence[int]]:
        """Under ZeRO-3 a turn for each flat piece, else one turn.

        ZeRO-3 shows the optimizer a piece only during its update, and what lies on NVMe is in
        memory only then.
        """
        flats = self._flats()
        if self.stage < 3:
            yield range(len(flats))
            return
        groups = self.zero.optimizer.param_groups
        for number, flat in enumerate(flats):
            group = groups[self.zero.sub_group_to_group_id[number]]
            is_swapped = self.zero._swappable_optimizer_subgroup(number)
            if is_swapped:
                self.zero._optimizer_states_and_gradient_swap_in(number)
            group["params"] = [flat]
            yield [number]
            group["params"] = []
            if is_swapped:
                self.zero._optimizer_states_and_gradient_swap_out(number)

    def owned(self) -> Iterator[OwnedSlice]:
        """Under stage 3 a slice of every parameter, under 1 and 2 of some of them."""
        places = list(self._places())
        for numbers in self.opened():
            for place in places:
                if place.flat in numbers:
                    flat = self._flats()[place.flat]
                    yield OwnedSlice.part(
                        name=place.name,
                        start=place.start,
                        size=place.size,
                        tensor=flat,
                        state=self.zero.optimizer.state.get(flat, {}),
                        at=place.at,
                    )

    def spread(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        # Small parameters are whole between steps, and would stay as they were.
        self.zero._partition_all_parameters()
        for numbers in self.opened():
            for number in numbers:
                self.zero._reassign_or_swap_out_partitioned_parameters(number)
        whole = self.zero.persistent_parameters
        if whole:
            whole[0].all_gather(whole)

    def _flats(self) -> list[Tensor]:
        """The flat pieces of this rank."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat  # type: ignore[no-any-return]
        return self.zero.single_partition_of_fp32_groups  # type: ignore[no-any-return]

    def _places(self) -> Iterator[_Place]:
        """This rank's slices, in the order of the parameters. It has none of some parameters."""
        for name, parameter in self.bare.named_parameters():
            place = self._place(name, parameter)
            if place and place.size > 0:
                yield place

    def _place(self, name: str, parameter: Any) -> _Place | None:
        if self.stage == 3:
            number = self.zero.get_param_id(parameter)
            flat, at, share = self.zero.grad_position[number]
            start = self.rank * share
            size = min(share, parameter.ds_numel - start)
            return _Place(name, start=start, size=size, flat=flat, at=at)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        return _Place(
            name,
            start=mapping.lp_fragment_address.start,
            size=mapping.hp_fragment_address.numel,
            flat=mapping.param_group_index,
            at=mapping.hp_fragment_address.start,
        )

    def _matrix_slices(self, shapes: Shapes, channel: Channel) -> dict[Tensor, list[MatrixSlice]]:
        """For each flat piece the slices in it, for an optimizer that needs whole matrices.

        All ranks.
        """
        places = {place.name: place for place in self._places()}
        sizes = [[place.name, place.size] for place in places.values()]
        lengths = {name: [0] * self.world_size for name in shapes}
        for rank, sizes_of_rank in enumerate(channel.gather(sizes)):
            for name, size in sizes_of_rank:
                lengths[name][rank] = size

        names = {parameter: name for name, parameter in self.bare.named_parameters()}
        groups = self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups
        slices: dict[Tensor, list[MatrixSlice]] = {}
        for flat, group in zip(self._flats(), groups, strict=True):
            slices[flat] = []
            for parameter in group:
                name = names[parameter]
                at = places[name].at if name in places else 0
                slices[flat].append(MatrixSlice(shapes[name], at, tuple(lengths[name])))
        return slices


def zero_settings(
    strategy: Strategy, config: Config, layout: BatchLayout, on_gpu: bool
) -> dict[str, Any]:
    """DeepSpeed's settings, from the strategy and the run's config."""
    zero: dict[str, Any] = {
        "stage": strategy.stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 10 * config.model.width,
    }
    if on_gpu:
        # Gradients are reduced while the backward goes on. DeepSpeed does so by itself in ZeRO-3
        # only. On a CPU nothing can overlap.
        zero["overlap_comm"] = True
    if on_gpu or config.run.compile:
        # ZeRO-3 gathers a whole block, not each of its layers by itself. So there are fewer and
        # larger exchanges, and the hooks that gather are outside of what is compiled. On a CPU
        # sums would have another order.
        zero["leaf_module"] = {"classes": [LEAF], "names": [], "name_suffixes": []}
    devices = {"optimizer": strategy.optimizer_device, "param": strategy.param_device}
    for part, device in devices.items():
        if device != "none":
            zero[f"offload_{part}"] = {"device": device}
        if device == "nvme":
            zero[f"offload_{part}"]["nvme_path"] = _nvme_folder(strategy, config)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "train_batch_size": layout.micro_batch * layout.accumulation * layout.world_size,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's own AdamW, on whatever device: no extension to compile
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.run.precision == "bf16":
        # As under DDP: fp32 weights and gradients, and no module in bf16 for good.
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return settings


def _nvme_folder(strategy: Strategy, config: Config) -> str:
    """A folder of this run alone.

    DeepSpeed's files have fixed names, so two runs would overwrite each other's.
    """
    path = os.path.abspath(config.run.dir)
    name = hashlib.sha256(path.encode()).hexdigest()[:12]
    return os.path.join(strategy.nvme_path, f"dist_lm-{name}")


def deepspeed_plugin(settings: dict[str, Any]) -> Any:
    """Accelerate's plugin for the settings."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found none
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
        build_async_io()
    # Accelerate refuses settings given here beside those of its own file, which names the strategy.
    # Both are ours.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    # DeepSpeed's reduction in shared memory is compiled at its first use, sums in another order,
    # and is not needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)


def tune_malloc(mmap_threshold: int, trim_threshold: int) -> None:
    """Set from which size on freed memory goes back to the system. Does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
