"""The settings of a run: frozen, validated, and what they mean on a number of processes.

The defaults are the quickstart. Four sections (model, data, optim, run) decide the mathematics
and the places. How a run is spread over machines is not here: `batch_layout()` derives what
depends on the number of processes. This module imports neither torch nor numpy, so that a typing
mistake is answered at once.
"""

import re
import string
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from dist_lm.arithmetic import ceil_div, round_up
from dist_lm.errors import UserError
from dist_lm.nearest import did_you_mean

NO_TARGET = -100  # the target of a token that has none, as torch's cross-entropy has it
FOLLOWS: Any = None  # the default of a field that follows another: validation fills it in

LARGEST = 2**63 - 1  # of a whole number: it fits a tensor
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST)]
# Sizes of a network, far above any that was ever trained: a slip of the finger or a hostile
# config.json ends here, and not in a table of a billion layers.
Layers = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=10**6)]
MOST_HASHED_UNITS = 2000  # in a line of metrics.jsonl, whose readers have a limit
LONGEST_CONTEXT = 2**22  # tokens
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


def _one_or_several(value: Any) -> Any:
    """A list of one as that one, and YAML's list of several as a tuple."""
    if not isinstance(value, (list, tuple)):
        return value
    return value[0] if len(value) == 1 else tuple(value)


# One place of a source, or several, which are read in that order.
Inputs = Annotated[
    str | Annotated[tuple[str, ...], Field(min_length=1)], BeforeValidator(_one_or_several)
]


class Section(BaseModel):
    """Settings that belong together: frozen, typed strictly, and nothing besides its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def _derive(self, **values: Any) -> None:
        """Fill fields that follow others. Only validators do so, before anyone sees the object."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def plain_type(annotation: Any) -> Any:
    """A type without its limits and without None: int of `Annotated[int, Field(ge=1)] | None`."""
    options = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return plain_type(options[0])
    if get_origin(annotation) in (Union, UnionType):
        return plain_type(next(option for option in options if option is not NoneType))
    return annotation


def fields_by_name(section: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section by the names that a user gives: `json` where pydantic has its own."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def list_type(info: FieldInfo) -> Any:
    """The kind of tuple that a field takes, if it takes several values; else None."""
    options = (plain_type(info.annotation), *get_args(info.annotation))
    kinds = [plain_type(option) for option in options]
    return next((kind for kind in kinds if get_origin(kind) is tuple), None)


def is_list(info: FieldInfo) -> bool:
    """Whether a field takes several values."""
    return list_type(info) is not None


def _check_divides(name: str, value: int, of_name: str, of: int) -> None:
    if of % value == 0:
        return
    below = [divisor for divisor in range(1, min(value, of + 1)) if of % divisor == 0][-1:]
    above = [divisor for divisor in range(value + 1, of + 1) if of % divisor == 0][:1]
    nearest = ", ".join(str(divisor) for divisor in below + above)
    raise ValueError(f"{name}={value} does not divide {of_name}={of}; nearest: {nearest}")


def _check_at_most(name: str, value: float, of_name: str, of: float) -> None:
    if value > of:
        raise ValueError(f"{name}={value} must be at most {of_name}={of}; nearest: {of}")


class ModelConfig(Section):
    """The network. Its knobs cover the GPT-2, Llama, Qwen3 and post-norm families."""

    layers: Layers = Field(4, description="Number of transformer blocks.")
    heads: Width = Field(4, description="Attention heads.")
    kv_heads: Width = Field(FOLLOWS, description="Key/value heads (GQA); unset: as many as heads.")
    width: Width = Field(128, description="Width of the residual stream.")
    ffn_width: Width = Field(
        FOLLOWS,
        description="Hidden width of the feed-forward; unset: 4 x width"
        " (swiglu: 8/3, rounded up to 64).",
    )
    positions: Literal["learned", "rope", "sinusoidal", "none"] = Field(
        "rope", description="Position encoding."
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("rmsnorm", description="Kind of normalisation.")
    norm_placement: Literal["pre", "post"] = Field(
        "pre", description="Normalise before or after each branch."
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu"] = Field(
        "swiglu", description="Activation of the feed-forward."
    )
    bias: bool = Field(False, description="Biases in linear layers and layernorms.")
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys in each head.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the embeddings and on each residual branch."
    )
    tie_embeddings: bool = Field(
        True, description="Share the input embedding with the output head."
    )
    init: Literal["gpt2", "scaled", "xavier", "orthogonal"] = Field(
        "gpt2", description="Initial weights of matrices."
    )
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon of the norms.")
    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotary frequencies.")

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        _check_divides("model.heads", self.heads, "model.width", self.width)
        _check_divides("model.kv_heads", self.kv_heads or self.heads, "model.heads", self.heads)
        if self.positions == "rope" and (self.width // self.heads) % 2:
            pairs = max(1, round(self.width / self.heads / 2))
            raise ValueError(
                f"model.width={self.width} with model.heads={self.heads} gives an odd head size,"
                f" which rope cannot rotate; nearest model.width: {2 * self.heads * pairs}"
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(
                f"model.width={self.width} must be even for sinusoidal positions;"
                f" nearest: {self.width + 1}"
            )
        self._derive(kv_heads=self.kv_heads or self.heads)
        self._derive(ffn_width=self.ffn_width or self._usual_ffn_width())
        return self

    def _usual_ffn_width(self) -> int:
        """4 x width; swiglu has three matrices instead of two, so 8/3 of it has as many weights."""
        if self.activation != "swiglu":
            return 4 * self.width
        return round_up(ceil_div(8 * self.width, 3), 64)


class SourceConfig(Section):
    """Where a text lies, and its share of the tokens."""

    input: Inputs = Field(
        description="Text file, glob, folder, URL, hub dataset or prepared folder; or several."
    )
    weight: float = Field(
        1.0, gt=0, description="Share of the tokens, relative to the other sources'."
    )
    text_column: str = Field("text", description="Column of the text in rows.")
    separator: str | None = Field(
        None, min_length=1, description="Text that ends a document inside a .txt file."
    )
    template: str | None = Field(
        None, description="Text made of several columns, e.g. '{title}: {body}'."
    )
    filter: dict[str, str | int | float | bool | None] = Field(
        {}, description="Column: the value that rows must have."
    )
    subset: str | None = Field(None, description="Configuration of a hub dataset.")
    split: str = Field("train", description="Split of a hub dataset.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub dataset.")
    at_end: Literal["repeat", "stop", "hand_on"] = Field(
        "repeat",
        description="After a pass: begin again, end the run, or leave the share to the others.",
    )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The input, or all of them in their order."""
        return (self.input,) if isinstance(self.input, str) else self.input

    @property
    def title(self) -> str:
        """The inputs as they are given on a command line, for messages."""
        return " ".join(self.inputs)

    @property
    def holds_tokens(self) -> bool:
        """Whether the inputs are files of raw tokens, such as nanoGPT's train.bin."""
        return all(one.endswith(".bin") for one in self.inputs)

    def template_columns(self) -> list[str]:
        """The columns that the template names; raises ValueError for a brace alone."""
        parts = string.Formatter().parse(self.template or "")
        return [column for _, column, _, _ in parts if column]


_WIDEST = 1000  # characters that a template may fill up a column to


def _check_template(name: str, source: SourceConfig) -> None:
    if not source.template:
        return
    try:
        has_columns = bool(source.template_columns())
    except ValueError:
        has_columns = False
    if not has_columns:
        nearest = f"{{{source.text_column}}}"
        raise ValueError(
            f"{name}={source.template!r} must name columns in pairs of braces; nearest: {nearest!r}"
        )
    for _, column, layout, _ in string.Formatter().parse(source.template):
        numbers = [int(digits[:9]) for digits in re.findall(r"[0-9]+", layout or "")]
        if "{" in (layout or "") or max(numbers, default=0) > _WIDEST:
            raise ValueError(
                f"{name}={source.template!r} has {column} with the layout {layout!r}; rule: no"
                f" braces in it and no width above {_WIDEST}; nearest: {{{column}}}"
            )


class Stage(Section):
    """From a step on, other weights; a source that is not named has none."""

    from_step: Positive = Field(description="Updates made before this stage.")
    weights: dict[SourceName, Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="Source: its share."
    )


class DataConfig(Section):
    """Which text, as which tokens, in which order."""

    input: Inputs = Field(
        "stdlib",
        description="Text file, glob, folder, hub dataset, prepared folder, or several; or stdlib.",
    )
    sources: dict[SourceName, SourceConfig] = Field(
        {}, description="Several inputs by name, instead of input."
    )
    stages: tuple[Stage, ...] = Field(
        (), description="Other weights of the sources from a step on."
    )
    validation: dict[SourceName, SourceConfig] = Field(
        {}, description="Validation sets by name, never trained on."
    )
    stream: bool = Field(
        False, description="Read raw text while training, instead of preparing it first."
    )
    lanes: Positive = Field(
        8, le=2**16, description="Parts of a stream that are read side by side."
    )
    packing: Literal["concat", "best_fit"] = Field(
        "concat",
        description="Streams: cut the tokens every seq_len, or keep documents whole and fill up.",
    )
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="What to do with rows that are not text."
    )
    cache_gb: float = Field(
        20.0, gt=0, description="Largest local copy of prepared shards that lie at a URL."
    )
    text_column: str = Field(
        "text", description="Column of the text in .jsonl, .json, .csv and .parquet."
    )
    separator: str | None = Field(None, description="Text that ends a document inside a .txt file.")
    template: str | None = Field(
        None, description="Text made of several columns, e.g. '{title}: {body}'."
    )
    filter: dict[str, str | int | float | bool | None] = Field(
        {}, description="Column: the value that rows must have, e.g. '{lang: en}'."
    )
    dtype: Literal["uint16", "uint32"] | None = Field(
        None, description="Type of the tokens in .bin files of raw tokens."
    )
    tokenizer: str = Field(
        "bpe:2048", description="char, byte, bpe:N, a tokenizer.json or its folder, or a hub name."
    )
    val_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share of documents held out, by a hash of their text."
    )
    seq_len: Positive = Field(256, le=LONGEST_CONTEXT, description="Input tokens of a sequence.")
    stride: Positive = Field(
        FOLLOWS, description="Input tokens between sequence starts; unset: seq_len."
    )
    document_mask: bool = Field(False, description="No attention and no target across documents.")
    global_batch: Positive = Field(
        16, le=2**24, description="Sequences in one step, over all processes."
    )
    micro_batch: Positive | None = Field(
        None, description="Sequences in one backward; unset: a rank's whole share."
    )
    workers: NotNegative = Field(
        1, le=1024, description="Threads that read batches ahead; 0 reads in the step itself."
    )

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        _check_at_most("data.stride", self.stride or self.seq_len, "data.seq_len", self.seq_len)
        if self.separator == "":
            raise ValueError(
                "data.separator='' must not be empty; nearest: null (each file is one document)"
            )
        self._check_sources()
        self._check_token_files()
        self._check_stages()
        self._derive(stride=self.stride or self.seq_len)
        if self.stream and self.stride != self.seq_len:
            raise ValueError(
                f"data.stride={self.stride} is for prepared shards;"
                f" nearest with data.stream: {self.seq_len}"
            )
        if self.packing == "best_fit" and not self.stream:
            raise ValueError("data.packing=best_fit needs data.stream=true; nearest: concat")
        return self

    def _check_sources(self) -> None:
        _check_template("data.template", self.as_source())
        if self.sources and self.input != DataConfig.model_fields["input"].default:
            raise ValueError(
                f"data.input={self.input!r} and data.sources exclude each other; rule: give one"
            )
        for name in self.validation.keys() & self.named_sources().keys():
            raise ValueError(
                f"data.validation.{name} has the name of a source; rule: names of their own"
            )
        for name, source in (self.sources | self.validation).items():
            field = self.field_of(name).removesuffix("input") + "template"
            _check_template(field, source)

    def _check_token_files(self) -> None:
        """Files of raw tokens say neither their type nor their tokenizer."""
        holders = []
        for name, source in (self.named_sources() | self.validation).items():
            if source.holds_tokens:
                holders.append(f"{self.field_of(name)}={source.title}")
                if self.stream and name not in self.validation:
                    raise ValueError(f"{holders[-1]} holds tokens; nearest: data.stream=false")
        if not holders:
            if self.dtype:
                raise ValueError(
                    f"data.dtype={self.dtype} is for files of raw tokens, which end in .bin;"
                    " nearest: null"
                )
            return
        if not self.dtype:
            raise ValueError(
                f"{holders[0]} holds tokens, and data.dtype=null; rule: their type; nearest: uint16"
            )
        if self.tokenizer == "char" or self.tokenizer.startswith("bpe:"):
            raise ValueError(
                f"data.tokenizer={self.tokenizer} would be made from text, and {holders[0]} holds"
                " tokens; rule: the tokenizer that they were made with; nearest: gpt2"
            )

    def _check_stages(self) -> None:
        for stage in self.stages:
            for name in stage.weights.keys() - self.sources.keys():
                hint = did_you_mean(name, self.sources)
                raise ValueError(f"data.stages: {name!r} is none of data.sources{hint}")
        first_steps = [stage.from_step for stage in self.stages]
        if first_steps != sorted(set(first_steps)):
            raise ValueError("data.stages must be in the order of from_step, each given once")

    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources by name; `input` alone is called `text`."""
        return self.sources or {"text": self.as_source()}

    def field_of(self, name: str) -> str:
        """The setting that gave a source its input."""
        if name in self.validation:
            return f"data.validation.{name}.input"
        if self.sources:
            return f"data.sources.{name}.input"
        return "data.input"

    @property
    def title(self) -> str:
        """What `input` is on a command line, for messages."""
        return self.as_source().title

    def as_source(self) -> SourceConfig:
        """`input` alone as a source."""
        return SourceConfig(
            input=self.input,
            text_column=self.text_column,
            separator=self.separator,
            template=self.template,
            filter=self.filter,
        )


class OptimConfig(Section):
    """How the weights move."""

    name: Literal["adamw", "sgd", "adafactor", "lion", "muon"] = Field(
        "adamw", description="Optimizer."
    )
    lr: float = Field(4e-3, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of a decaying schedule.")
    warmup_steps: NotNegative = Field(50, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = Field(
        "cosine", description="Learning rate after the warm-up."
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95),
        description="Decay of the first and second moment (sgd: the first is its momentum).",
    )
    eps: float = Field(1e-8, gt=0, description="Epsilon of the update's denominator.")
    weight_decay: float = Field(
        0.1,
        ge=0,
        description="Decay of matrices, not of norms, biases, embeddings; decoupled but for sgd.",
    )
    clip: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 does not clip.")

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        _check_at_most("optim.min_lr", self.min_lr, "optim.lr", self.lr)
        return self


class RunConfig(Section):
    """Where, how long, and what is kept."""

    dir: str = Field("runs/quickstart", min_length=1, description="Folder of the run.")
    steps: Positive | None = Field(400, description="Length of the run in updates.")
    epochs: Positive | None = Field(
        None, description="Length of the run in passes over the data, instead of steps."
    )
    seed: NotNegative = Field(
        1, description="Seed of the weights, the order of the data and dropout."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Arithmetic of the forward; weights and gradients stay fp32."
    )
    compile: bool = Field(False, description="Compile the model with torch.compile.")
    deterministic: bool = Field(
        False, description="On GPUs too, resume with the same bits; costs speed."
    )
    exact: bool = Field(
        False,
        description="The same bits on any number of processes, with data.micro_batch as the unit.",
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in the backward to save memory."
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of a moving average of the weights, kept beside; 0: none.",
    )
    eval_every: NotNegative = Field(100, description="Steps between evaluations; 0: never.")
    eval_batches: Positive = Field(
        20, description="Global batches in an evaluation, always the same ones."
    )
    save_every: NotNegative = Field(200, description="Steps between checkpoints; 0: only the last.")
    keep_last: Positive = Field(
        2, description="How many of the newest checkpoints stay (the best one always does)."
    )
    keep_every: NotNegative = Field(
        0, description="Also keep every checkpoint at a multiple of this step; 0: none."
    )
    resume: str = Field(
        "auto", description="auto: go on where the folder stands; never; or a step folder."
    )
    init_from: str | None = Field(
        None, description="Start from the weights of a checkpoint or transformers model."
    )
    stop_after: Positive | None = Field(
        None, description="Stop at this step as if told to; the schedule stays."
    )
    timeout_seconds: float = Field(
        600.0, ge=1, description="How long a process that is gone can hold up the others."
    )
    check_every: NotNegative = Field(
        0, description="Steps between comparisons of the weights of DDP's ranks; 0: never."
    )
    on_spike: Literal["warn", "act", "ignore"] = Field(
        "warn",
        description="When loss or norm jump: warn, act (go back and step over data) or ignore.",
    )
    log_batch_hash: bool = Field(False, description="Log a hash of each global batch's tokens.")
    log_unit_hashes: bool = Field(
        False, description="With run.exact, log a hash of the gradient of each unit."
    )
    profile_steps: NotNegative = Field(
        0, description="Trace this many steps with torch.profiler; 0: none."
    )
    trackers: tuple[str, ...] = Field(
        ("tensorboard",), description="Trackers of Accelerate, e.g. tensorboard wandb."
    )
    sample_prompt: str | None = Field(
        None,
        min_length=1,
        description="Prompt of the samples at each evaluation; unset: the first words of the"
        " held-out text.",
    )

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"run.steps={self.steps} and run.epochs={self.epochs}:"
                " exactly one of them must be given"
            )
        if self.log_unit_hashes and not self.exact:
            raise ValueError(
                "run.log_unit_hashes=true is about the units of run.exact; nearest:"
                " run.exact=true, or run.log_unit_hashes=false"
            )
        # Sums whose order is fixed are of no use if a kernel adds in any order.
        self._derive(deterministic=self.deterministic or self.exact)
        return self


class Config(Section):
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        batch = self.data.global_batch
        _check_at_most("data.micro_batch", self.data.micro_batch or 1, "data.global_batch", batch)
        if self.run.epochs:
            self._check_epochs(self.run.epochs)
        if self.run.exact and not self.data.micro_batch:
            nearest = max(size for size in (1, 2, 4) if batch % size == 0)
            raise ValueError(
                "run.exact=true computes and adds in units of data.micro_batch sequences, and"
                f" data.micro_batch is unset; rule: a size for all runs; nearest: {nearest}"
            )
        if self.run.log_unit_hashes and units_of(self) > MOST_HASHED_UNITS:
            raise ValueError(
                f"run.log_unit_hashes=true writes {units_of(self)} hashes in a line; rule: at most"
                f" {MOST_HASHED_UNITS} units; nearest: false, or a larger data.micro_batch"
            )
        return self

    def _check_epochs(self, epochs: int) -> None:
        if len(self.data.sources) > 1:
            raise ValueError(
                f"run.epochs={epochs} counts passes over one source; nearest: run.steps"
            )
        schedule = self.optim.schedule
        if self.data.stream and schedule not in ("constant", "inverse_sqrt"):
            raise ValueError(
                f"run.epochs={epochs} of a stream has no length that optim.schedule={schedule}"
                " could end at; rule: run.steps, or optim.schedule=constant or inverse_sqrt"
            )

    def model_spec(self, vocab_size: int) -> "ModelSpec":
        """The network of this run, with a tokenizer of that size."""
        return ModelSpec(self.model, vocab_size, self.data.seq_len)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def flat(self) -> dict[str, Any]:
        """{'model.layers': 4, ...}"""
        return flat(self.model_dump(mode="json"))


def flat(sections: dict[str, Any]) -> dict[str, Any]:
    """{'model': {'layers': 4}} as {'model.layers': 4}."""
    settings = {}
    for section, fields in sections.items():
        for field, value in fields.items():
            settings[f"{section}.{field}"] = value
    return settings


@dataclass(frozen=True)
class ModelSpec:
    """A whole network: its settings, and the two sizes that the tokenizer and the data decide."""

    config: ModelConfig
    vocab_size: int
    seq_len: int  # the longest context


SECTIONS: dict[str, type[Section]] = {name: type(section) for name, section in Config()}
# Every setting by its full name, e.g. model.layers.
FIELDS = flat({name: section.model_fields for name, section in SECTIONS.items()})
# Settings that hold sections of their own, and the kind of these.
NESTED: dict[str, type[Section]] = {
    "data.sources": SourceConfig,
    "data.validation": SourceConfig,
    "data.stages": Stage,
}

_MATHEMATICS_OF_RUN = ("seed", "precision", "ema", "exact", "steps", "epochs")
# What may change when a run goes on without changing its mathematics. The identity of the data
# (its shards and tokenizer) is compared by hash, so where it lies and how it was prepared are
# free here. So is what only the first step reads.
FREE_ON_RESUME = frozenset(
    [
        "data.input",
        "data.sources",
        "data.validation",
        "data.text_column",
        "data.separator",
        "data.template",
        "data.filter",
        "data.dtype",
        "data.tokenizer",
        "data.val_fraction",
        "data.micro_batch",
        "data.workers",
        "data.cache_gb",
        *(f"run.{name}" for name in RunConfig.model_fields if name not in _MATHEMATICS_OF_RUN),
    ]
)
# Under run.exact these decide bits: the unit, and which kernels compute it.
_MATHEMATICS_OF_EXACT = ("data.micro_batch", "run.compile")


def free_on_resume(config: Config) -> frozenset[str]:
    """The settings that may change when this run goes on."""
    return FREE_ON_RESUME.difference(_MATHEMATICS_OF_EXACT if config.run.exact else ())


@dataclass(frozen=True)
class BatchLayout:
    """How a number of processes divide the global batch of a step."""

    world_size: int
    share: int  # sequences of the global batch on the busiest rank
    micro_batch: int
    accumulation: int  # backward passes in a step on the busiest rank
    tokens_per_step: int
    # Rows without targets that even out the ranks, relative to the global batch.
    filler_percent: float
    is_exact: bool = False  # a micro-batch is a unit, which no rank fills up for another's sake

    @property
    def unit(self) -> int:
        """Neighbouring places of the global batch that stay together on one rank."""
        return self.micro_batch if self.is_exact else 1

    def rows(self, places: int) -> int:
        """Rows that a rank computes in a step for its places of the global batch."""
        if self.is_exact:
            return round_up(places, self.micro_batch)
        return self.micro_batch * self.accumulation


def total_steps(config: Config, sequences: int | None) -> int | None:
    """Updates of the whole run.

    None where epochs are asked for and only the data says when they end.
    """
    if config.run.steps:
        return config.run.steps
    if not sequences:
        return None
    positions = (config.run.epochs or 0) * sequences
    return ceil_div(positions, config.data.global_batch)


def batch_layout(config: Config, world_size: int) -> BatchLayout:
    """Derive a rank's work in a step; refuses only a world larger than the global batch."""
    batch = config.data.global_batch
    if world_size > batch:
        raise UserError(
            f"data.global_batch={batch} must be at least the number of processes, {world_size};"
            f" nearest: {world_size}"
        )
    if config.run.exact:
        return _layout_in_units(config, world_size)
    share = ceil_div(batch, world_size)
    micro_batch = min(config.data.micro_batch or share, share)
    accumulation = ceil_div(share, micro_batch)
    rows = world_size * micro_batch * accumulation
    return BatchLayout(
        world_size=world_size,
        share=share,
        micro_batch=micro_batch,
        accumulation=accumulation,
        tokens_per_step=batch * config.data.seq_len,
        filler_percent=100 * (rows / batch - 1),
    )


def units_of(config: Config) -> int:
    """Units of a global batch under run.exact. The last one may have rows that only fill it up."""
    return ceil_div(config.data.global_batch, config.data.micro_batch or 1)


def _layout_in_units(config: Config, world_size: int) -> BatchLayout:
    """Under run.exact: unit after unit goes to rank after rank, whole."""
    batch = config.data.global_batch
    size = config.data.micro_batch or 1
    units = units_of(config)
    if world_size > units:
        raise UserError(
            f"data.global_batch={batch} has {units} units of data.micro_batch={size}, fewer than"
            f" the {world_size} processes; rule with run.exact: at least one each; nearest:"
            f" {units} processes"
        )
    accumulation = ceil_div(units, world_size)
    return BatchLayout(
        world_size=world_size,
        share=min(accumulation * size, batch),
        micro_batch=size,
        accumulation=accumulation,
        tokens_per_step=batch * config.data.seq_len,
        filler_percent=100 * (units * size / batch - 1),
        is_exact=True,
    )


def due(step: int, every: int, at_the_end: bool = False) -> bool:
    """Whether this step is a multiple of `every`. Never for 0."""
    return every > 0 and (at_the_end or step % every == 0)
