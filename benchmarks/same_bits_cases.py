"""The cases of same_bits.py: what is run on both sides, and which facts about it must be equal.

A case returns bits, which must be the same on both sides, and messages, which may be reworded.
Checkpoints and prepared folders that a case only reads were made by the base, so reading them
is part of the proof.
"""

import csv
import hashlib
import json
import os
import random
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from same_bits_sides import ROOT, Done, Side

WORDS = ["the", "a", "one", "cat", "dog", "bird", "tree", "house", "runs", "sleeps", "eats"]
WORDS += ["and", "or", "not", "under", "over", "small", "big", "red", "grüßt", "猫", "🐈"]


@dataclass
class Result:
    """What one side did in one case."""

    bits: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Side, Path], Result]  # gets an empty folder of its own


class BaseFailed(Exception):
    """A case that does not do on the base what it is meant to do proves nothing."""


# --- what both sides read


def documents(count: int, seed: int) -> list[str]:
    """Sentences of a small vocabulary, with letters of one to four bytes."""
    rng = random.Random(seed)
    sentences = []
    for number in range(count):
        words = rng.choices(WORDS, k=rng.randint(15, 50))
        sentences.append(f"{number} " + " ".join(words) + ".")
    return sentences


def write_csv(path: Path, texts: list[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(texts))


def write_jsonl(path: Path, texts: list[str]) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")


def write_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=40)


def make_inputs(base: Side, say: Callable[[str], None]) -> None:
    """Texts, prepared folders and a checkpoint, all by the base's own command lines."""
    folder = base.inputs
    folder.mkdir(parents=True, exist_ok=True)
    texts = documents(250, seed=1)
    say("writing texts")
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    write_csv(folder / "text.csv", texts)
    write_jsonl(folder / "text.jsonl", texts)
    write_parquet(folder / "text.parquet", texts)
    write_jsonl(folder / "other.jsonl", documents(250, seed=2))
    (folder / "empty.txt").write_text("")
    (folder / "number.jsonl").write_text('{"text": "a"}\n{"text": 7}\n')
    (folder / "not-utf-8.txt").write_bytes(b"abc\xff")
    (folder / "mixture.yaml").write_text(mixture(folder / "shards", folder / "other", stream=False))
    streams = mixture(folder / "text.parquet", folder / "other.jsonl", stream=True)
    (folder / "streams.yaml").write_text(streams)
    (folder / "section.yaml").write_text("modell:\n  layers: 2\n")
    (folder / "field.yaml").write_text("model:\n  layer: 2\n")
    (folder / "twice.yaml").write_text("model:\n  layers: 2\n  layers: 3\n")
    (folder / "broken.yaml").write_text("model: [1,\n")

    say("preparing shards")
    prepare = ["-m", "dist_lm.prepare", "--processes", "1"]
    first = ["--input", str(folder / "text.jsonl"), "--output", str(folder / "shards")]
    need(base.run(*prepare, *first, "--tokenizer", "char"))
    second = ["--input", str(folder / "other.jsonl"), "--output", str(folder / "other")]
    need(base.run(*prepare, *second, "--tokenizer", str(folder / "shards")))

    say("training the checkpoint that both sides read")
    flags = settings({"run.steps": 60, "run.ema": 0.9, "optim.lr": 0.01, "run.eval_every": 30})
    shards = ["--data.input", str(folder / "shards")]
    need(base.run("dist_lm/train.py", "--run.dir", str(folder / "run"), *shards, *flags))
    shutil.copytree(folder / "run", folder / "damaged")
    (newest_step(folder / "damaged") / "model.safetensors").write_bytes(b"cut")
    (folder / "empty").mkdir()
    (folder / "begun").mkdir()
    (folder / "begun" / "metrics.jsonl").touch()
    shutil.copytree(ROOT / "tests" / "made_by_907367e", folder / "old")
    for file in (folder / "old" / "text").iterdir():
        os.utime(file, (OLD_TEXT_TIME, OLD_TEXT_TIME))


def mixture(first: Path, second: Path, stream: bool) -> str:
    """Two sources by weight, and other weights from the fifth step on."""
    return textwrap.dedent(f"""\
        data:
          stream: {str(stream).lower()}
          sources:
            rows: {{input: "{first}", weight: 0.7}}
            other: {{input: "{second}", weight: 0.3}}
          stages:
            - {{from_step: 5, weights: {{rows: 1.0, other: 2.0}}}}
        """)


def need(done: Done) -> None:
    if done.code:
        raise BaseFailed(f"exit code {done.code}: {done.last_line}")


# --- training

TINY = {
    "model.layers": 2,
    "model.heads": 2,
    "model.width": 32,
    "data.tokenizer": "char",
    "data.seq_len": 32,
    "data.global_batch": 8,
    "optim.lr": 0.003,
    "optim.warmup_steps": 4,
    "run.steps": 12,
    "run.eval_every": 0,
    "run.eval_batches": 2,
    "run.save_every": 6,
    "run.log_batch_hash": "true",
}
GPT2 = {
    "model.positions": "learned",
    "model.norm": "layernorm",
    "model.activation": "gelu_tanh",
    "model.bias": "true",
    "model.init": "scaled",
}
LLAMA = {
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.qk_norm": "true",
    "model.tie_embeddings": "false",
    "model.init": "xavier",
}
POST_NORM = {
    "model.positions": "sinusoidal",
    "model.norm": "layernorm",
    "model.norm_placement": "post",
    "model.activation": "gelu",
    "model.bias": "true",
    "model.init": "orthogonal",
}
# The settings of tests/made_by_907367e, whose runs go on after their first 6 steps.
OLD = {
    "model.layers": 1,
    "model.width": 8,
    "model.ffn_width": 16,
    "model.init": "xavier",
    "data.seq_len": 16,
    "data.global_batch": 4,
    "optim.lr": 0.01,
    "optim.warmup_steps": 3,
}
OLD_STREAM = {
    **OLD,
    "data.stream": "true",
    "data.lanes": 2,
    "optim.name": "muon",
    "model.dropout": 0.1,
}
OLD_TEXT_TIME = 1_700_000_000  # when the files of its stream were changed, in seconds since 1970
# Figures of metrics.jsonl that time has no part in, and how those of a mixture's sources begin.
FIGURES = ["loss", "lr", "grad_norm", "tokens", "batch_hash", "scale", "skipped_updates"]
FIGURES += ["val_set", "val_loss", "val_bits_per_byte"]
FIGURES_OF_A_SOURCE = ("asked_", "share_", "passes_")


def settings(more: Mapping[str, Any]) -> list[str]:
    """A tiny run's flags. A setting in `more` replaces the tiny one."""
    words = ["--run.trackers"]
    for name, value in {**TINY, **more}.items():
        words += [f"--{name}", str(value)]
    return words


def train(
    side: Side,
    folder: Path,
    more: Mapping[str, Any],
    data: str = "shards",
    world: int = 1,
    launch: str = "",
    stops: tuple[int, ...] = (),
    start: str = "",
) -> Result:
    """A run's weights, moments, other files and figures.

    `data` is one of the inputs, or a YAML file of sources among them. `stops` are the steps at
    which the run is stopped and started again. `start` is a run among the inputs to go on with.
    """
    run = folder / "run"
    if start:
        shutil.copytree(side.inputs / start, run)
    words = ["--run.dir", str(run), *settings(more)]
    if data.endswith(".yaml"):
        config = folder / "sources.yaml"
        text = (side.inputs / data).read_text()
        config.write_text(side.in_its_words(text))
        words += ["--config", str(config)]
    else:
        words += ["--data.input", str(side.inputs / data)]
    if launch:
        words += ["--launch", launch]
    done = Done(0, "", "")
    for stop in (*stops, 0):
        until = ["--run.stop_after", str(stop)] if stop else []
        done = side.run("dist_lm/train.py", *words, *until, world=world)
        if done.code:
            break
    if done.code and side.name == "base":
        raise BaseFailed(f"exit code {done.code}: {done.last_line}")
    result = Result({"exit code": str(done.code)})
    if done.code:
        result.bits["exit code"] += f" ({done.last_line})"
        return result
    step = newest_step(run)
    result.bits["step"] = step.name
    # How the state and the manifest are laid out may change; that they are read is what resuming
    # shows.
    ours = ("state.json", "manifest.json")
    result.bits |= {name: h for name, h in hashes(step).items() if name not in ours}
    result.bits |= figures(run)
    return result


def newest_step(run: Path) -> Path:
    return max(run.glob("step-*"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def figures(run: Path) -> dict[str, str]:
    """Each figure of metrics.jsonl as a list of its values, so a difference names its step."""
    found: dict[str, list[Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "event" in entry:  # older revisions have none
            continue
        for name, value in entry.items():
            if name in FIGURES or name.startswith(FIGURES_OF_A_SOURCE):
                found.setdefault(name, []).append([entry["step"], value])
    return {name: json.dumps(values) for name, values in found.items()}


def training_cases() -> Iterator[Case]:
    def case(name: str, more: Mapping[str, Any] | None = None, **how: Any) -> Case:
        return Case(name, partial(train, more=more or {}, **how))

    yield case("single adamw", {"run.eval_every": 6})
    yield case("single muon", {"optim.name": "muon"})
    yield case("single adafactor", {"optim.name": "adafactor"})
    yield case("single lion", {"optim.name": "lion", "optim.lr": 0.0005})
    yield case("single sgd", {"optim.name": "sgd", "optim.lr": 0.1})
    yield case("single ema", {"run.ema": 0.9, "run.eval_every": 6})
    yield case("single fp16", {"run.precision": "fp16"})
    yield case("single bf16", {"run.precision": "bf16"})
    yield case("single dropout", {"model.dropout": 0.2, "run.activation_checkpointing": "true"})
    yield case("single accumulation", {"data.micro_batch": 3, "data.document_mask": "true"})
    yield case("single gpt2", {**GPT2, "optim.schedule": "wsd"})
    yield case("single llama", {**LLAMA, "optim.schedule": "linear"})
    yield case("single post-norm", {**POST_NORM, "optim.schedule": "inverse_sqrt"})
    yield case("single resumed", {"model.dropout": 0.1, "data.stride": 16}, stops=(5, 9))
    yield case("single raw text", {"data.separator": "\n\n", "run.eval_every": 12}, data="text.txt")
    yield case("ddp x 2", {"run.eval_every": 6, "model.dropout": 0.1}, world=2)
    yield case("ddp x 2 muon", {"optim.name": "muon"}, world=2)
    yield case("zero1 x 2", world=2, launch="zero1")
    yield case("zero2 x 2", {"data.micro_batch": 2}, world=2, launch="zero2")
    yield case("zero3 x 2", {"run.eval_every": 6}, world=2, launch="zero3")
    yield case("zero3 x 2 muon", {"optim.name": "muon"}, world=2, launch="zero3")
    yield case(
        "zero3 x 2 bf16 ema", {"run.precision": "bf16", "run.ema": 0.9}, world=2, launch="zero3"
    )
    yield case("zero3 x 3", {"model.dropout": 0.1}, world=3, launch="zero3")
    yield case("stream", {"data.packing": "best_fit"}, data="streams.yaml")
    yield case("two streams x 2", {"run.eval_every": 6}, data="streams.yaml", world=2)
    yield case("two streams x 2 resumed", data="streams.yaml", world=2, stops=(7,))
    yield case("mixture with a stage", data="mixture.yaml")
    yield case("mixture with a stage x 2", {"model.dropout": 0.1}, data="mixture.yaml", world=2)
    shards = {"data": "old/shards", "start": "old/on_shards"}
    yield case("old run", {**OLD, "run.ema": 0.9}, **shards)
    yield case("old run x 2", {**OLD, "run.ema": 0.9}, **shards, world=2, launch="zero3")
    yield case("old stream", OLD_STREAM, data="old/text", start="old/on_stream")
    yield case("old stream x 2", OLD_STREAM, data="old/text", start="old/on_stream", world=2)


# --- preparing


def prepare(side: Side, folder: Path, tokenizer: str, form: str) -> Result:
    """Every file of a prepared folder, made by one process and by two."""
    result = Result()
    for processes in ("1", "2"):
        made = folder / processes
        words = ["--output", str(made), "--processes", processes, "--tokenizer", tokenizer]
        if form == "txt":
            words += ["--separator", "\n\n"]
        source = side.inputs / f"text.{form}"
        done = side.run("-m", "dist_lm.prepare", "--input", str(source), *words)
        if done.code and side.name == "base":
            raise BaseFailed(f"exit code {done.code}: {done.last_line}")
        result.bits[f"exit code of {processes}"] = str(done.code)
        if done.code == 0:
            for name, digest in hashes(made).items():
                result.bits[f"{name} by {processes}"] = digest
    return result


def prepare_cases() -> Iterator[Case]:
    for tokenizer in ("char", "byte", "bpe:300"):
        for form in ("txt", "jsonl", "parquet", "csv"):
            act = partial(prepare, tokenizer=tokenizer, form=form)
            yield Case(f"prepare {tokenizer} {form}", act)


# --- generating

PROMPTS = [
    "the cat",
    "a small red",
    "0 ",
    "one dog 猫",
    "bird\nand",
    "",
    "12 not",
    "tree house runs",
]


def generate(side: Side, folder: Path, flags: str, prompts: list[str]) -> Result:
    """The texts of some prompts with their tokens' probabilities."""
    words = ["-m", "dist_lm.generate", "--ckpt", str(side.inputs / "run"), "--json", "--logprobs"]
    for prompt in prompts:
        words.append(f"--prompt={prompt}")
    done = side.run(*words, *flags.split())
    if done.code and side.name == "base":
        raise BaseFailed(f"exit code {done.code}: {done.last_line}")
    result = Result({"exit code": str(done.code)})
    for number, line in enumerate(done.stdout.splitlines(), 1):
        made = json.loads(line)
        del made["tokens_per_second"]
        result.bits[f"text {number}"] = json.dumps(made, ensure_ascii=False)
    return result


def generate_cases() -> Iterator[Case]:
    """40 texts; the longer ones slide over the context of 32 tokens."""
    long = "--max_new_tokens 60"
    kinds = {
        "greedy": (f"--temperature 0 --seed 0 {long}", PROMPTS),
        "seed 1": (f"--seed 1 --num_samples 2 {long}", PROMPTS[:4]),
        "seed 2": (f"--seed 2 --num_samples 2 --top_k 5 {long}", PROMPTS[4:]),
        "seed 3": ("--seed 3 --top_p 0.7 --repetition_penalty 1.3 --stop bird", PROMPTS),
        "seed 4": ("--seed 4 --num_samples 2 --min_p 0.1 --temperature 1.5 --ema", PROMPTS[:2]),
        "seed 5": ("--seed 5 --dtype bf16 --max_new_tokens 20", PROMPTS[2:6]),
    }
    for name, (flags, prompts) in kinds.items():
        yield Case(f"generate {name}", partial(generate, flags=flags, prompts=prompts))


# --- the other commands


def score(side: Side, folder: Path) -> Result:
    """The figures, which stand one a line behind their names."""
    result = Result()
    held_out = str(side.inputs / "shards")
    for name, more in {"own": [], "given": ["--data.input", held_out, "--ema"]}.items():
        done = side.run("-m", "dist_lm.score", "--ckpt", str(side.inputs / "run"), *more)
        if done.code and side.name == "base":
            raise BaseFailed(f"exit code {done.code}: {done.last_line}")
        result.bits[f"exit code, {name}"] = str(done.code)
        for line in done.stdout.splitlines():
            words = line.split()
            if len(words) == 2:
                result.bits[f"{words[0]}, {name}"] = words[1]
            else:
                result.messages[f"score, {name}"] = line
    return result


def show(side: Side, folder: Path) -> Result:
    """What steps trained on: the text lines, and the numbers in the others."""
    result = Result()
    for number in ("1", "7", "60"):
        done = side.run(
            "-m", "dist_lm.show", str(side.inputs / "run"), "--step", number, "--world", "2"
        )
        if done.code and side.name == "base":
            raise BaseFailed(f"exit code {done.code}: {done.last_line}")
        result.bits[f"exit code, step {number}"] = str(done.code)
        texts = [line for line in done.stdout.splitlines() if line.startswith("    | ")]
        others = [line for line in done.stdout.splitlines() if not line.startswith("    | ")]
        result.bits[f"texts of step {number}"] = "\n".join(texts)
        result.messages[f"show --step {number}"] = "\n".join(others[:4])
    return result


def plan(side: Side, folder: Path) -> Result:
    """Its figures for two recipes."""
    result = Result()
    for recipe in ("char", "gpt2-124m"):
        words = ["--config", f"configs/{recipe}.yaml", "--vocab_size", "5000", "--json"]
        done = side.run("-m", "dist_lm.plan", *words)
        if done.code and side.name == "base":
            raise BaseFailed(f"exit code {done.code}: {done.last_line}")
        result.bits[f"exit code, {recipe}"] = str(done.code)
        result.bits[f"figures of {recipe}"] = done.stdout
    return result


def report(side: Side, folder: Path) -> Result:
    """Its table, which is text for people, and whether it draws."""
    picture = folder / "curves.png"
    done = side.run("-m", "dist_lm.report", str(side.inputs / "run"), "--output", str(picture))
    if done.code and side.name == "base":
        raise BaseFailed(f"exit code {done.code}: {done.last_line}")
    return Result(
        {"exit code": str(done.code), "drawn": str(picture.is_file())},
        {f"report, line {n}": line for n, line in enumerate(done.stdout.splitlines(), 1)},
    )


def resolved(side: Side, folder: Path) -> Result:
    """The settings of each recipe, defaults included."""
    result = Result()
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = f"configs/{path.name}"
        done = side.run("dist_lm/train.py", "--config", config, "--print_config")
        if done.code and side.name == "base":
            raise BaseFailed(f"exit code {done.code}: {done.last_line}")
        result.bits[f"exit code, {config}"] = str(done.code)
        result.bits[config] = done.stdout
    return result


# --- what is refused

# Each line is what a command must refuse. INPUTS is the folder of the inputs, WORK an empty folder
# and RUN a copy of a run, which the command may write to.
REFUSED = {
    "train": """
        layers 2
        --modell.layers 2
        --model.layers two
        --model.layers 0
        --model.layers
        --model.width 30 --model.heads 4
        --model.kv_heads 3
        --model.norm batchnorm
        --optim.nam lion
        --optim.lr -1
        --optim.lr 0.1 --optim.lr 0.2
        --data.stride 64 --data.seq_len 32
        --data.packing best_fit
        --data.micro_batch 99
        --run.steps 3 --run.epochs 2
        --run.precision fp61
        --run.trackers tensorbord
        --config INPUTS/missing.yaml
        --config INPUTS/section.yaml
        --config INPUTS/field.yaml
        --config INPUTS/twice.yaml
        --config INPUTS/broken.yaml
        --data.input INPUTS/txt.txt --run.dir WORK/run
        --data.input INPUTS/empty.txt --run.dir WORK/run
        --data.input INPUTS/number.jsonl --run.dir WORK/run
        --data.input INPUTS/not-utf-8.txt --run.dir WORK/run
        --data.input INPUTS/shards --data.seq_len 100000 --run.dir WORK/run
        --data.input INPUTS/shards --run.dir RUN --run.resume never
        --data.input INPUTS/shards --run.dir RUN --model.layers 3
        --data.input INPUTS/shards --run.dir WORK/run --launch zero3
        --data.input INPUTS/shards --run.dir WORK/run --run.init_from INPUTS/run
        --data.input INPUTS/shards --run.dir WORK/run --run.trackers --optim.lr 1e30 \
        --optim.clip 0 --data.seq_len 32 --model.width 32
    """,
    "prepare": """
        --input INPUTS/text.txt
        --input INPUTS/text.txt --output WORK/out --processes 0
        --input INPUTS/text.txt --output WORK/out --tokeniser char
        --input INPUTS/text.txt --output WORK/out --tokenizer bpe:x
        --input INPUTS/text.txt --output WORK/out --val_fraction 2
        --input INPUTS/missing --output WORK/out --tokenizer byte
        --input INPUTS/number.jsonl --output WORK/out --tokenizer byte --processes 1
        --input INPUTS/text.csv --output WORK/out --text_column body
        --verify INPUTS
    """,
    "generate": """
        --prompt a
        --ckpt INPUTS/missing --prompt a
        --ckpt INPUTS/empty --prompt a
        --ckpt INPUTS/run --prompt a --temperature -1
        --ckpt INPUTS/run --prompt a --top_p 2
        --ckpt INPUTS/run --prompt a --dtype bf61
        --ckpt INPUTS/run --prompt a --max_tokens 3
        --ckpt INPUTS/run --prompt a --logprobs
        --ckpt INPUTS/run --prompt_file INPUTS/missing
        --ckpt INPUTS/run --prompt_file INPUTS/not-utf-8.txt
        --ckpt INPUTS/run --prompt a --context refuse
        --ckpt INPUTS/run --prompt a --device cuda
        --ckpt INPUTS/damaged/step-00000060 --prompt a
    """,
    "score": """
        --data.input INPUTS/text.txt
        --ckpt INPUTS/run --ema maybe
        --ckpt INPUTS/run --data.tokenizer byte
        --ckpt INPUTS/run --model.layers 3
        --ckpt INPUTS/run --data.seq_len 64
        --ckpt INPUTS/missing
    """,
    "show": """
        --step 1
        INPUTS/run
        INPUTS/run --step 0
        INPUTS/run --step 61
        INPUTS/run --step 1 --world 2 --rank 2
        INPUTS/run --stepp 1
        INPUTS/missing --step 1
    """,
    "report": """
        --output x.png
        INPUTS/missing
        INPUTS/empty
        INPUTS/begun
        INPUTS/run --outputs x.png
        INPUTS/run --output /dev/null/x.png
    """,
    "plan": """
        --gpu h10
        --nodes 0
        --mfu 2
        --launch zero4 --vocab_size 100
        --config configs/gpt2-124.yaml
        --vocab_size 0
    """,
    "doctor": """
        --timeout_seconds 0
        --launch zero4
        --model.layer 2
        --data.input INPUTS/missing --run.dir WORK/run
    """,
}


def refused(side: Side, folder: Path, command: str) -> Result:
    """The exit code of each bad line, and the last line that it says on stderr."""
    result = Result()
    program = ["dist_lm/train.py"] if command == "train" else ["-m", f"dist_lm.{command}"]
    for number, line in enumerate(bad_lines(command)):
        work = folder / str(number)
        work.mkdir()
        if "RUN" in line:
            shutil.copytree(side.inputs / "run", work / "old")
        places = {"INPUTS": side.inputs, "WORK": work, "RUN": work / "old"}
        words = line
        for name, place in places.items():
            words = words.replace(name, str(place))
        done = side.run(*program, *words.split())
        if done.code == 0 and side.name == "base":
            raise BaseFailed(f"{command} {line}: exit code 0, so it is not refused")
        result.bits[f"exit code of {command} {line}"] = str(done.code)
        result.messages[f"{command} {line}"] = done.last_line
    return result


def bad_lines(command: str) -> list[str]:
    return [line.strip() for line in REFUSED[command].strip().splitlines()]


def all_cases() -> list[Case]:
    return [
        *training_cases(),
        *prepare_cases(),
        *generate_cases(),
        Case("score", score),
        Case("show", show),
        Case("report", report),
        Case("plan", plan),
        Case("settings of the recipes", resolved),
        *(Case(f"refused by {name}", partial(refused, command=name)) for name in REFUSED),
    ]
