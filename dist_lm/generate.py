"""Text out of a checkpoint, in one process.

Reads a run folder (its newest valid step), a step folder, or a folder in transformers' layout. All
prompts and samples run as one batch, and each is printed in order, as it is made. What a prompt
becomes depends on it, the settings and the seed, never on its neighbours. The command line is
judged before torch is imported; neither accelerate nor deepspeed ever is.
"""

import contextlib
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from dist_lm.cli import ONE_AT_A_TIME, Command, read_flags
from dist_lm.config import Section
from dist_lm.console import printable
from dist_lm.errors import DataError, UserError, run_entry

if TYPE_CHECKING:
    from dist_lm.data.tokenizer import Tokenizer
    from dist_lm.model.gpt import GPT
    from dist_lm.sample import Continuation

AT_ONCE = 64  # sequences in one batch; more are made in several, with the same text
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
HUGE = 10**9

Texts = Annotated[tuple[str, ...], ONE_AT_A_TIME]


class GenerateFlags(Section):
    """Generate text from a checkpoint.

    Without --prompt and --prompt_file the prompt is read from stdin, or asked for on a terminal.
    """

    ckpt: str = Field(
        description="A run folder, a step folder or a folder in transformers' layout."
    )
    prompt: Texts = Field(
        (), description="Text to go on from; repeatable; '' starts a new document."
    )
    prompt_file: Texts = Field(
        (), description="File whose text is a prompt, but for its last newline; repeatable."
    )
    max_new_tokens: int = Field(200, ge=1, le=HUGE, description="Tokens to make at most.")
    temperature: float = Field(
        0.8,
        ge=0,
        le=HUGE,
        description="0 takes the likeliest token (greedy), 1 samples as learned, more is wilder.",
    )
    top_k: int = Field(0, ge=0, le=HUGE, description="Choose among the k likeliest tokens; 0: all.")
    top_p: float = Field(
        1.0,
        ge=1e-6,
        le=1,
        description="Choose among the fewest tokens that have this probability together; 1: all.",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Leave out tokens less likely than this share of the likeliest; 0: none.",
    )
    repetition_penalty: float = Field(
        1.0, ge=1e-6, le=HUGE, description="Make tokens seen before less likely; 1: no change."
    )
    num_samples: int = Field(1, ge=1, le=HUGE, description="Continuations of each prompt.")
    context: Literal["slide", "refuse"] = Field(
        "slide",
        description="When the text outgrows the model's context: slide over its last part,"
        " or refuse.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where there is one."
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Arithmetic of the model.")
    seed: int | None = Field(
        None,
        ge=0,
        le=2**63 - 1,
        description="Repeat the same samples; unset: other ones each time.",
    )
    stop: Texts = Field(
        (), description="Text that ends a continuation, itself left out; repeatable."
    )
    ema: bool = Field(
        False, description="Use the moving average of the weights that a run with run.ema kept."
    )
    compile: bool = Field(False, description="Compile the model: slow to start, faster on a GPU.")
    as_json: bool = Field(
        False,
        alias="json",
        description="Print one JSON object a line for each continuation, when it is finished.",
    )
    logprobs: bool = Field(False, description="With --json: the log-probability of each new token.")
    raw: bool = Field(False, description="Do not escape control characters on a terminal.")

    @model_validator(mode="after")
    def _check(self) -> "GenerateFlags":
        if "" in self.stop:
            raise ValueError("--stop '' must not be empty; nearest: no --stop")
        if self.logprobs and not self.as_json:
            raise ValueError("--logprobs is printed in JSON lines only; nearest: --json --logprobs")
        for text in (*self.prompt, *self.stop):
            problem = not_utf8(os.fsencode(text), "the command line")
            if problem:
                raise ValueError(problem)
        return self


GENERATE = Command(
    "python -m dist_lm.generate --ckpt RUN_OR_STEP_OR_HF_FOLDER --prompt TEXT", GenerateFlags
)


def main(argv: list[str]) -> None:
    flags = read_flags(argv, GENERATE)
    if flags.seed is None:
        flags = flags.model_copy(update={"seed": secrets.randbelow(10**9)})
    prompts = prompts_from(flags)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    import torch  # slow to import

    from dist_lm.checkpoint.load import read_model
    from dist_lm.sample import lay_out_for_decoding

    has_cuda = torch.cuda.is_available()
    if flags.device == "cuda" and not has_cuda:
        raise UserError("--device cuda: no CUDA device is visible to torch; nearest: --device cpu")
    model, tokenizer, _ = read_model(flags.ckpt, flags.ema)
    device = "cuda" if has_cuda and flags.device != "cpu" else "cpu"
    dtype = getattr(torch, DTYPES[flags.dtype])
    model.to(device, dtype)
    if device == "cpu" and dtype == torch.float32:
        lay_out_for_decoding(model)
    if prompts is None:
        ask(model, tokenizer, flags)
    else:
        generate(model, tokenizer, prompts, flags)


# --- prompts


def prompts_from(flags: GenerateFlags) -> list[str] | None:
    """All prompts: those of --prompt, then those of --prompt_file, else stdin.

    None means that a terminal has to be asked for them.
    """
    prompts = list(flags.prompt)
    for path in flags.prompt_file:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"--prompt_file {path}: {error.strerror}") from error
        prompts.append(prompt_in(content, f"--prompt_file {path}"))
    if not prompts and not sys.stdin.isatty():
        prompts.append(prompt_in(sys.stdin.buffer.read(), "stdin"))
    return prompts or None


def prompt_in(content: bytes, where: str) -> str:
    """The text of a file, without the newline that editors and `echo` put at its end."""
    problem = not_utf8(content, where)
    if problem:
        raise DataError(problem)
    return content.decode().removesuffix("\n").removesuffix("\r")


def not_utf8(content: bytes, where: str) -> str:
    """The fault of a text that is not UTF-8, or an empty string."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        return (
            f"{where}: byte 0x{byte:02x} at offset {error.start} is not UTF-8; rule: text is UTF-8"
        )
    return ""


def encode(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """The tokens of a prompt; an empty one begins a new document.

    Warns of characters that the vocabulary lacks.
    """
    ids = tokenizer.encode(prompt)
    unknown = ids.count(tokenizer.unk) if tokenizer.unk is not None else 0
    if unknown:
        lacking = sorted({char for char in prompt if tokenizer.unk in tokenizer.encode(char)})
        print(
            f"warning: {unknown} characters of the prompt are not in the vocabulary and count as"
            f" unknown: {printable(repr(''.join(lacking[:20])))}",
            file=sys.stderr,
        )
    return ids or [tokenizer.eot]


def ask(model: "GPT", tokenizer: "Tokenizer", flags: GenerateFlags) -> None:
    """Take prompts from a terminal until the end of input."""
    with contextlib.suppress(ImportError):  # not every system's Python has it
        import readline  # noqa: F401 -- gives input() line editing

    print("A prompt a line; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        try:
            generate(model, tokenizer, [prompt], flags)
        except UserError as error:  # the next prompt may fit
            print(f"error: {error}", file=sys.stderr)


# --- continuations


def generate(
    model: "GPT", tokenizer: "Tokenizer", prompts: list[str], flags: GenerateFlags
) -> None:
    """Print the continuations of all prompts, in batches of AT_ONCE sequences."""
    from dist_lm.sample import Sampling, sample  # torch

    settings = Sampling(
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
        repetition_penalty=flags.repetition_penalty,
        stop=flags.stop,
        slide=flags.context == "slide",
        logprobs=flags.logprobs,
        compile=flags.compile,
    )
    jobs = []  # text and tokens of the prompt of each sequence
    for prompt in prompts:
        jobs += [(prompt, encode(tokenizer, prompt))] * flags.num_samples
    # The random stream of a sequence belongs to the seed, the prompt and how often the prompt came
    # before. What stands beside it does not matter.
    times: Counter[str] = Counter()
    seeds = []
    for prompt, _ in jobs:
        seeds.append(f"{flags.seed} {times[prompt]} {prompt}")
        times[prompt] += 1
    for begin in range(0, len(jobs), AT_ONCE):
        batch = jobs[begin : begin + AT_ONCE]
        steps = sample(
            model,
            tokenizer,
            prompts=[ids for _, ids in batch],
            settings=settings,
            seeds=seeds[begin : begin + AT_ONCE],
        )
        Printer([prompt for prompt, _ in batch], flags, is_first=begin == 0).print_all(steps)


class Printer:
    """Prints the continuations of a batch in order, each as far as it is made.

    A JSON line is printed when its continuation is finished.
    """

    def __init__(self, prompts: list[str], flags: GenerateFlags, is_first: bool):
        self.prompts = prompts
        self.flags = flags
        self.is_first = is_first  # nothing was printed before this batch
        self.is_raw = flags.raw or not sys.stdout.isatty()
        self.at = 0  # the continuation that is being printed
        self.printed: int | None = None  # characters of it; None: not even its prompt

    def print_all(self, steps: Iterator[list["Continuation"]]) -> None:
        for continuations in steps:
            if self.flags.as_json:
                self.print_json(continuations)
            else:
                self.print_text(continuations)

    def print_text(self, continuations: list["Continuation"]) -> None:
        """Go on with the texts as far as they are made."""
        while self.at < len(continuations):
            continuation = continuations[self.at]
            if self.printed is None:
                is_very_first = self.is_first and self.at == 0
                separator = "" if is_very_first else "---\n"
                self.write(separator + self.prompts[self.at])
                self.printed = 0
            self.write(continuation.text[self.printed :])
            self.printed = len(continuation.text)
            if not continuation.finish_reason:
                return
            self.write("\n")
            self.at += 1
            self.printed = None

    def print_json(self, continuations: list["Continuation"]) -> None:
        """A line for each continuation that is finished, up to the first that is not."""
        while self.at < len(continuations) and continuations[self.at].finish_reason:
            line = json_line(continuations[self.at], self.prompts[self.at], self.flags)
            # Escape sequences of JSON keep a terminal from being driven.
            self.write(json.dumps(line, ensure_ascii=not self.is_raw) + "\n")
            self.at += 1

    def write(self, text: str) -> None:
        sys.stdout.write(text if self.is_raw else printable(text))
        sys.stdout.flush()


def json_line(continuation: "Continuation", prompt: str, flags: GenerateFlags) -> dict[str, Any]:
    """The fields of a JSON line."""
    new_tokens = len(continuation.tokens)
    fields: dict[str, Any] = {
        "prompt": prompt,
        "text": continuation.text,
        "new_tokens": new_tokens,
        "finish_reason": continuation.finish_reason,
        "tokens_per_second": round(new_tokens / continuation.seconds, 2),
        "seed": flags.seed,
    }
    if flags.logprobs:
        fields |= {"tokens": continuation.tokens, "logprobs": continuation.logprobs}
    return fields


if __name__ == "__main__":
    run_entry(main)
