"""What a user can fix, by kind and exit code; the nearest good value; how a command ends.

Each kind of error is a class that knows its name and its exit code. An error is one line: the
field, its value, the rule, and the nearest good value. It is printed at the process edge only, by
run_entry().
"""

import difflib
import gc
import os
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from dist_lm.console import make_streams_last, printable, warn
from dist_lm.launcher import RETRYABLE

Result = TypeVar("Result")

INTERRUPTED = 130  # the exit code of shells for a Ctrl-C
_LONGEST_ERROR = 2_000  # characters of the text of an error
_MOST_DIGITS = 9  # of a number in the environment
_LONGEST_WORD = 100  # characters of a name that are compared with the good ones


class UserError(ValueError):
    """Something a user can fix. Commands print it as one line and exit with its `code`.

    Its text is short, however long a value from outside in it is: the middle is left out.
    """

    kind = "config"  # how outcome.json names it
    code = 2

    def __init__(self, text: str):
        super().__init__(_shortened(text))


class DataError(UserError):
    """The text, the shards or the tokenizer cannot be used."""

    kind = "data"
    code = 65


class CheckpointError(UserError):
    """A checkpoint, or a file of a run, is missing or cannot be used."""

    kind = "checkpoint"
    code = 66


class RetryableError(UserError):
    """The machines failed; the same command may work later."""

    kind = "retryable"
    code = RETRYABLE


class PreemptedError(UserError):
    """The run was told to stop; the same command goes on."""

    kind = "preempted"
    code = 75


class DivergedError(UserError):
    """The loss or a gradient is not finite."""

    kind = "diverged"
    code = 76


class SecurityError(UserError):
    """The environment would let a file run code."""

    kind = "security"
    code = 77


ERRORS: tuple[type[UserError], ...] = (UserError, *UserError.__subclasses__())
# How a run can end, and the exit code that says so.
CODES = {"done": 0} | {error.kind: error.code for error in ERRORS}


def kind(code: int) -> str:
    """How a run ended, from its exit code; any other code means that the machines failed."""
    for name, known in CODES.items():
        if code == known:
            return name
    return RetryableError.kind


def error_with_code(message: str, code: int) -> UserError:
    """The error with that code. An error of another rank travels as text and code."""
    for error in ERRORS:
        if error.code == code:
            return error(message)
    return UserError(message)


def run_entry(main: Callable[[list[str]], Result], prints_result: bool = True) -> Result:
    """Run a command's main(argv) at the process edge.

    A UserError becomes one line, printed by rank 0, and its exit code. An interrupt ends with
    130. A command that prints its result ends when standard output is gone: with 0 if its reader
    has seen enough, else with an error. Any other command goes on without it.
    """
    # Importing torch makes many objects that stay. With the default threshold the
    # collector would look through them again and again.
    gc.set_threshold(100_000)
    make_streams_last(_refuse_lost_output if prints_result else _warn_of_lost_output)
    try:
        return _call_and_flush(main)
    except BrokenPipeError:
        sys.exit(0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(INTERRUPTED)
    except UserError as error:
        if _speaks():
            print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(error.code)


def _speaks() -> bool:
    """Whether this process prints errors: rank 0, or one that has no place among the ranks."""
    rank = os.environ.get("RANK", "0")
    world = os.environ.get("WORLD_SIZE", "1")
    return not (rank.isdecimal() and world.isdecimal() and 0 < float(rank) < float(world))


def _call_and_flush(main: Callable[[list[str]], Result]) -> Result:
    """What main(argv) returns, when all that it printed has been written."""
    try:
        result = main(sys.argv[1:])
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return result


def _refuse_lost_output(error: OSError) -> None:
    """Standard output is gone, and with it the result of the command."""
    if isinstance(error, BrokenPipeError):
        raise error
    raise RetryableError(f"standard output: {error.strerror}; rule: a place that can be written")


def _warn_of_lost_output(error: OSError) -> None:
    warn(f"standard output is gone, the command goes on: {error.strerror}")


def nearest(value: str, options: Iterable[object]) -> str:
    """The option most like `value`, or an empty string."""
    names = [str(option) for option in options]
    matches = difflib.get_close_matches(value[:_LONGEST_WORD], names, n=1, cutoff=0.5)
    return matches[0] if matches else ""


# What other trainers call the settings of a run.
OTHER_NAMES = {
    "accum_iter": "data.global_batch",
    "adam_epsilon": "optim.eps",
    "batch_size": "data.global_batch",
    "block_size": "data.seq_len",
    "context_length": "data.seq_len",
    "ctx_len": "data.seq_len",
    "d_model": "model.width",
    "data_dir": "data.input",
    "dataset": "data.input",
    "dataset_name": "data.input",
    "decay_lr": "optim.schedule",
    "emb_dim": "model.width",
    "embed_dim": "model.width",
    "eval_interval": "run.eval_every",
    "eval_iters": "run.eval_batches",
    "eval_steps": "run.eval_every",
    "global_batch_size": "data.global_batch",
    "grad_accum": "data.global_batch",
    "grad_clip": "optim.clip",
    "gradient_accumulation_steps": "data.global_batch",
    "gradient_checkpointing": "run.activation_checkpointing",
    "hidden_size": "model.width",
    "intermediate_size": "model.ffn_width",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "max_grad_norm": "optim.clip",
    "max_iters": "run.steps",
    "max_length": "data.seq_len",
    "max_lr": "optim.lr",
    "max_position_embeddings": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "max_steps": "run.steps",
    "micro_batch_size": "data.micro_batch",
    "model_name_or_path": "run.init_from",
    "n_ctx": "data.seq_len",
    "n_embd": "model.width",
    "n_head": "model.heads",
    "n_kv_head": "model.kv_heads",
    "n_layer": "model.layers",
    "n_layers": "model.layers",
    "n_positions": "data.seq_len",
    "num_attention_heads": "model.heads",
    "num_epochs": "run.epochs",
    "num_heads": "model.heads",
    "num_hidden_layers": "model.layers",
    "num_key_value_heads": "model.kv_heads",
    "num_layers": "model.layers",
    "num_train_epochs": "run.epochs",
    "num_workers": "data.workers",
    "optimizer": "optim.name",
    "out_dir": "run.dir",
    "output_dir": "run.dir",
    "per_device_train_batch_size": "data.micro_batch",
    "report_to": "run.trackers",
    "resume_from_checkpoint": "run.resume",
    "save_steps": "run.save_every",
    "save_total_limit": "run.keep_last",
    "sequence_length": "data.seq_len",
    "tokenizer_name": "data.tokenizer",
    "train_batch_size": "data.global_batch",
    "train_file": "data.input",
    "warmup": "optim.warmup_steps",
    "warmup_iters": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_steps",
    # These have their value in the name.
    "amp": "run.precision bf16",
    "bf16": "run.precision bf16",
    "fp16": "run.precision fp16",
}
# What others call a value of one of our settings.
OTHER_VALUES = {
    "absolute": "learned",
    "adam": "adamw",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "gelu_new": "gelu_tanh",
    "half": "fp16",
    "layer_norm": "layernorm",
    "mixed": "bf16",
    "rms": "rmsnorm",
    "rotary": "rope",
    "swish": "silu",
}


def did_you_mean(value: str, options: Iterable[object], prefix: str = "") -> str:
    """Text that names the nearest option, or nothing."""
    guess = closest(value, options)
    return f"; did you mean {prefix}{guess}?" if guess else ""


def environment_number(name: str, default: int) -> int:
    """The whole number in an environment variable, or the default where there is none."""
    text = os.environ.get(name)
    if not text:
        return default
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise UserError(f"{name}={text} must be a whole number; nearest: {default}, or unset it")
    return int(text)


def _shortened(text: str) -> str:
    """The beginning and the end of a long text: the field, and the rule."""
    if len(text) <= _LONGEST_ERROR:
        return text
    half = _LONGEST_ERROR // 2
    return f"{text[:half]} ... {text[-half:]}"


def one_line(error: UserError) -> str:
    """An error of ours for a terminal: one line, however hostile a value in it is."""
    return printable(" ".join(str(error).splitlines()))


def closest(value: str, options: Iterable[object]) -> str:
    """The option that is meant, or an empty string.

    It is what another trainer calls so, or the field of that name in another section, or the name
    that is most like it.
    """
    names = [str(option) for option in options]
    field = value.rpartition(".")[2].lower().replace("-", "_")
    known = OTHER_NAMES.get(field, OTHER_VALUES.get(field, ""))
    if known.partition(" ")[0] in names:
        return known
    same_field = [name for name in names if name.rpartition(".")[2] == field]
    return same_field[0] if same_field else nearest(value, names)


def in_a_line(error: BaseException) -> str:
    """An error that is not ours, short enough for one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
