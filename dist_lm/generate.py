"""Text out of a checkpoint, in one process: `python -m dist_lm.generate --ckpt RUN_OR_STEP_OR_HF_FOLDER --prompt TEXT`.

Reads a run folder (its newest valid step), a step folder, or a folder in transformers' layout. All prompts and samples
run as one batch, and each is printed in order, as it is made; what a prompt becomes depends on it, the settings and
the seed, never on its neighbours. The command line is judged before torch is imported. Neither accelerate nor
deepspeed is.
"""

import argparse
import contextlib
import json
import math
import os
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dist_lm.cli import FlagParser
from dist_lm.console import printable
from dist_lm.errors import DataError, UserError, did_you_mean, run_entry

if TYPE_CHECKING:
    from dist_lm.data.tokenizer import Tokenizer
    from dist_lm.model.gpt import GPT
    from dist_lm.sample import Continuation

AT_ONCE = 64  # sequences in one batch; more are made in several, with the same text
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
HUGE = 10**9
# Flags whose value is a number: the default, the least, the greatest, and what it means.
NUMBERS: dict[str, tuple[Any, float, float, str]] = {
    "max_new_tokens": (200, 1, HUGE, "tokens to make at most"),
    "temperature": (
        0.8,
        0,
        HUGE,
        "0 takes the likeliest token (greedy), 1 samples as learned, more is wilder",
    ),
    "top_k": (0, 0, HUGE, "choose among the k likeliest tokens; 0: all"),
    "top_p": (
        1.0,
        1e-6,
        1,
        "choose among the fewest tokens that have this probability together; 1: all",
    ),
    "min_p": (0.0, 0, 1, "leave out tokens less likely than this share of the likeliest; 0: none"),
    "repetition_penalty": (1.0, 1e-6, HUGE, "make tokens seen before less likely; 1: no change"),
    "num_samples": (1, 1, HUGE, "continuations of each prompt"),
}
# Flags whose value is one of a few words, the first by default.
WORDS: dict[str, tuple[tuple[str, ...], str]] = {
    "context": (
        ("slide", "refuse"),
        "when the text outgrows the model's context: slide over its last part, or refuse",
    ),
    "device": (("auto", "cpu", "cuda"), "auto: cuda where there is one"),
    "dtype": (tuple(DTYPES), "arithmetic of the model"),
}


def within(kind: type, low: float, high: float, default: Any) -> Callable[[str], Any]:
    """An argparse type that takes numbers from low to high and names the nearest good one otherwise."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also true of NaN
            good = default if value != value else kind(min(max(value, low), high))
            number, form = ("a whole number", "d") if kind is int else ("a number", "g")
            is_limit_told = high < HUGE or value > high
            rule = (
                f"from {low:{form}} to {high:{form}}"
                if is_limit_told
                else f"of {low:{form}} or more"
            )
            raise argparse.ArgumentTypeError(
                f"{text} must be {number} {rule}; nearest: {good:{form}}"
            )
        return value

    return read


def one_of(options: tuple[str, ...]) -> Callable[[str], str]:
    """An argparse type that takes one of a few words."""

    def read(text: str) -> str:
        if text not in options:
            raise argparse.ArgumentTypeError(
                f"{text} must be one of {', '.join(options)}{did_you_mean(text, options)}"
            )
        return text

    return read


def command_line(argv: list[str]) -> argparse.Namespace:
    """The validated command line; hyphens in flags count as underscores."""
    parser = FlagParser(
        "python -m dist_lm.generate",
        "Generate text from a checkpoint.\n"
        "Without --prompt and --prompt_file the prompt is read from stdin, or asked for on a terminal.",
    )
    add = parser.add_argument
    add(
        "--ckpt",
        required=True,
        help="run folder (its newest step), step folder, or transformers folder",
    )
    add(
        "--prompt", action="append", help="text to go on from; repeatable; '' starts a new document"
    )
    add(
        "--prompt_file",
        action="append",
        help="file whose text is a prompt, but for its last newline; repeatable",
    )
    for name, (default, low, high, meaning) in NUMBERS.items():
        kind = within(type(default), low, high, default)
        add(f"--{name}", type=kind, default=default, help=f"{meaning} (default {default:g})")
    for name, (options, meaning) in WORDS.items():
        help_text, metavar = f"{meaning} (default {options[0]})", "|".join(options)
        add(f"--{name}", type=one_of(options), default=options[0], metavar=metavar, help=help_text)
    add(
        "--seed",
        type=within(int, 0, 2**63 - 1, 0),
        help="repeat the same samples; unset: other ones each time",
    )
    add(
        "--stop",
        action="append",
        default=[],
        help="text that ends a continuation, itself left out; repeatable",
    )
    add(
        "--ema",
        action="store_true",
        help="use the moving average of the weights that a run with run.ema kept",
    )
    add("--compile", action="store_true", help="compile the model: slow to start, faster on a GPU")
    add(
        "--json",
        action="store_true",
        help="print one JSON object a line for each continuation, when it is finished",
    )
    add(
        "--logprobs", action="store_true", help="with --json: the log-probability of each new token"
    )
    add("--raw", action="store_true", help="do not escape control characters on a terminal")
    args = parser.read(argv)
    if "" in args.stop:
        raise UserError("--stop '' must not be empty; nearest: no --stop")
    if args.logprobs and not args.json:
        raise UserError("--logprobs is printed in JSON lines only; nearest: --json --logprobs")
    for text in [*(args.prompt or []), *args.stop]:
        decoded(os.fsencode(text), "the command line", UserError)
    return args


def decoded(content: bytes, where: str, kind: type[UserError] = DataError) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise kind(
            f"{where}: byte 0x{content[error.start]:02x} at offset {error.start} is not UTF-8;"
            " rule: text is UTF-8"
        ) from None


def without_last_newline(text: str) -> str:
    """An editor and `echo` end a text with a newline that is not meant as part of it."""
    return text.removesuffix("\n").removesuffix("\r")


def prompts_from(args: argparse.Namespace) -> list[str] | None:
    """All prompts in the order --prompt, --prompt_file, else stdin; None means to ask for them."""
    prompts = list(args.prompt or [])
    for path in args.prompt_file or []:
        try:
            with open(path, "rb") as file:
                prompts.append(without_last_newline(decoded(file.read(), f"--prompt_file {path}")))
        except OSError as error:
            raise UserError(f"--prompt_file {path}: {error.strerror}") from error
    if not prompts and not sys.stdin.isatty():
        prompts.append(without_last_newline(decoded(sys.stdin.buffer.read(), "stdin")))
    return prompts or None


def show(
    steps: Iterator[list["Continuation"]], prompts: list[str], args: argparse.Namespace, first: bool
) -> None:
    """Print the continuations in order, each as far as it is made; JSON lines when one is finished."""
    raw = args.raw or not sys.stdout.isatty()

    def write(text: str) -> None:
        sys.stdout.write(text if raw else printable(text))
        sys.stdout.flush()

    at, shown = 0, -1  # the sequence being printed, and how much of it is; -1: not even its prompt
    for rows in steps:
        while at < len(rows) and (not args.json or rows[at].finish_reason):
            row = rows[at]
            if args.json:
                write(json_line(row, prompts[at], args, ascii_only=not raw) + "\n")
            else:
                if shown < 0:
                    write(("" if first and at == 0 else "---\n") + prompts[at])
                    shown = 0
                write(row.text[shown:])
                shown = len(row.text)
                if not row.finish_reason:
                    break
                write("\n")
            at, shown = at + 1, -1


def json_line(row: "Continuation", prompt: str, args: argparse.Namespace, ascii_only: bool) -> str:
    fields: dict[str, Any] = {
        "prompt": prompt,
        "text": row.text,
        "new_tokens": len(row.tokens),
        "finish_reason": row.finish_reason,
        "tokens_per_second": round(len(row.tokens) / row.seconds, 2),
        "seed": args.seed,
    }
    if args.logprobs:
        fields |= {"tokens": row.tokens, "logprobs": row.logprobs}
    return json.dumps(fields, ensure_ascii=ascii_only)


def encode(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """A prompt's tokens; warns of characters that the vocabulary lacks. An empty one begins a new document."""
    ids = tokenizer.encode(prompt)
    unknown = ids.count(tokenizer.unk) if tokenizer.unk is not None else 0
    if unknown:
        lacking = sorted({c for c in prompt if tokenizer.unk in tokenizer.encode(c)})
        print(
            f"warning: {unknown} characters of the prompt are not in the vocabulary and count as unknown: "
            f"{printable(repr(''.join(lacking[:20])))}",
            file=sys.stderr,
        )
    return ids or [tokenizer.eot]


def generate(
    model: "GPT", tokenizer: "Tokenizer", prompts: list[str], args: argparse.Namespace
) -> None:
    from dist_lm.sample import Sampling, sample  # torch

    settings = Sampling(
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.repetition_penalty,
        tuple(args.stop),
        args.context == "slide",
        args.logprobs,
        args.compile,
    )
    jobs = [
        (prompt, ids)
        for prompt in prompts
        for ids in [encode(tokenizer, prompt)]
        for _ in range(args.num_samples)
    ]
    # A stream belongs to (seed, prompt, how often it came before): what stands beside it does not matter.
    times: Counter[str] = Counter()
    seeds = []
    for prompt, _ in jobs:
        seeds.append(f"{args.seed} {times[prompt]} {prompt}")
        times[prompt] += 1
    for n in range(0, len(jobs), AT_ONCE):
        part = jobs[n : n + AT_ONCE]
        steps = sample(model, tokenizer, [ids for _, ids in part], settings, seeds[n : n + AT_ONCE])
        show(steps, [prompt for prompt, _ in part], args, first=n == 0)


def ask(model: "GPT", tokenizer: "Tokenizer", args: argparse.Namespace) -> None:
    """Prompts from a terminal until end of input."""
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
            generate(model, tokenizer, [prompt], args)
        except UserError as error:  # the next prompt may fit
            print(f"error: {error}", file=sys.stderr)


def main(argv: list[str]) -> None:
    args = command_line(argv)
    args.seed = secrets.randbelow(10**9) if args.seed is None else args.seed
    prompts = prompts_from(args)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    import torch  # from here on it is slow

    from dist_lm.checkpoint.load import read_model
    from dist_lm.sample import lay_out_for_decoding

    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise UserError("--device cuda: no CUDA device is visible to torch; nearest: --device cpu")
    model, tokenizer, _ = read_model(args.ckpt, args.ema)
    dtype = getattr(torch, DTYPES[args.dtype])
    model.to("cuda" if cuda and args.device != "cpu" else "cpu", dtype)
    if model.embed.weight.device.type == "cpu" and dtype == torch.float32:
        lay_out_for_decoding(model)
    if prompts is None:
        ask(model, tokenizer, args)
    else:
        generate(model, tokenizer, prompts, args)


if __name__ == "__main__":
    run_entry(main)
