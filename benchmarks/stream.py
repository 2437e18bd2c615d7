"""What streaming costs. Each claim measures both sides in turn, in the same run, on the same text.

    taskset -c 0 python benchmarks/stream.py raw       # Parquet -> tokens -> batches, against encode_batch alone: >= 0.85
    python benchmarks/stream.py pipeline               # against the usual `datasets` pipeline, two processes: >= 2 x
    taskset -c 0 python benchmarks/stream.py mosaic    # prepared shards against mosaicml-streaming's: >= 2 x
    taskset -c 0 python benchmarks/stream.py resume    # at the end of 1 GB, to the first batch: < 3 s
    taskset -c 0 python benchmarks/stream.py memory    # of the process over 1 GB: flat

The text is generated from a seed: words of a made-up vocabulary as frequent as in a language (Zipf), in documents of
4 kB on average. Rates are medians over rounds, with the least and the most; a ratio is the median of each round's own.
"""

import argparse
import dataclasses
import gzip
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node

from dist_lm.channel import Channel
from dist_lm.cli import resolve
from dist_lm.config import Config, batch_layout
from dist_lm.data.batches import Batches
from dist_lm.data.dataset import Dataset, open_dataset
from dist_lm.data.mix import PreparedReader
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.sources import PreparedSource, StreamSource
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import UserError

T, BATCH, FILES, MB = 1024, 16, 8, 10**6
NEAR = 400  # batches before the end, where `resume` is measured
CPU = torch.device("cpu")

# The other side of `mosaic`, in its own environment: argv is the sequences as .npy, its folder,
# workers, epochs.
MOSAIC = """
import os, sys, time
import numpy as np, torch
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

def main():
    table, folder, workers, epochs = np.load(sys.argv[1], mmap_mode="r"), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if not os.path.exists(folder + "/index.json"):
        with MDSWriter(out=folder, columns={"tokens": f"ndarray:uint16:{table.shape[1]}"}) as writer:
            for row in table:
                writer.write({"tokens": row})

    class Tokens(StreamingDataset):
        def __getitem__(self, at):
            return torch.from_numpy(super().__getitem__(at)["tokens"].astype(np.int64))

    torch.set_num_threads(1)
    data = Tokens(local=folder, shuffle=True, batch_size=16)
    loader = DataLoader(data, batch_size=16, num_workers=workers, persistent_workers=workers > 0)
    def epoch():
        return sum(batch[:, :-1].numel() + 0 * batch[:, 1:].numel() for batch in loader)
    epoch()
    begin = time.perf_counter()
    tokens = sum(epoch() for _ in range(epochs))
    print(tokens / (time.perf_counter() - begin), flush=True)

if __name__ == "__main__":
    main()
"""


def corpus(megabytes: float, seed: int = 1) -> Iterator[str]:
    """Documents of so much text in all."""
    rng, left, most = np.random.default_rng(seed), megabytes * MB, 60_000
    sounds = np.array(
        [c + v + e for c in "bcdfghklmnprstvwz" for v in "aeiou" for e in ("", "n", "r", "st")],
        object,
    )
    words: dict[str, None] = {}
    while len(words) < most:  # the more frequent the shorter
        words["".join(rng.choice(sounds, 1 + int(len(words) > 100) + int(rng.integers(0, 3))))] = (
            None
        )
    table = np.array([word + end for end in (" ", ", ", ". ", ".\n") for word in words], object)
    ends = np.repeat(np.arange(4), [87, 7, 5, 1])
    while left > 0:
        sizes = rng.lognormal(6, 1, 500).astype(int) + 1
        ranks = (most ** rng.random(sizes.sum())).astype(int) - 1  # density 1 / rank
        chosen = table[ranks + most * ends[rng.integers(0, 100, len(ranks))]].tolist()
        for begin, end in pairwise([0, *np.cumsum(sizes).tolist()]):
            document = "".join(chosen[begin:end])
            yield document
            left -= len(document)
            if left <= 0:
                return


def write(folder: Path, kind: str, megabytes: float, row_group: int = 1000) -> int:
    """The corpus as files of one kind, each with documents of its own; how many."""
    folder.mkdir()
    documents = 0
    for number in range(FILES):
        texts, path = corpus(megabytes / FILES, seed=number), folder / f"{number}.{kind}"
        if kind == "parquet":
            with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
                while group := list(islice(texts, row_group)):
                    writer.write_table(pa.table({"text": group}))
                    documents += len(group)
        else:
            with (
                gzip.open(path, "wb", compresslevel=1)
                if kind.endswith(".gz")
                else open(path, "wb") as file
            ):
                for text in texts:
                    file.write(json.dumps({"text": text}).encode() + b"\n")
                    documents += 1
    return documents


def loaded(folder: Path, kind: str) -> datasets.IterableDataset:
    """The same files, streamed by `datasets`."""
    return datasets.load_dataset(
        "parquet" if kind == "parquet" else "json",
        split="train",
        streaming=True,
        data_files=sorted(map(str, folder.iterdir())),
    )


def make_tokenizer(scratch: Path) -> Path:
    """A BPE of 8192 tokens, learned from a little of the text."""
    train_tokenizer("bpe:8192", corpus(8, seed=0)).save(scratch)
    return scratch / "tokenizer.json"


def config_of(
    source: Path, tokenizer: Path | str, scratch: Path, workers: int = 0, stream: bool = True
) -> Config:
    return resolve(
        (
            "benchmark",
            {
                "data.input": str(source),
                "data.tokenizer": str(tokenizer),
                "data.stream": stream,
                "data.val_fraction": 0.0,
                "data.seq_len": T,
                "data.global_batch": BATCH,
                "data.workers": workers,
                "run.eval_every": 0,
                "run.epochs": 1,
                "optim.schedule": "constant",
                "run.dir": tempfile.mkdtemp(dir=scratch),
            },
        )
    )


def opened(config: Config) -> Dataset:
    return open_dataset(config, lambda work: work(), lambda text: None)


def batches_of(
    config: Config, data: Dataset, state: Any = None, rank: int = 0, world: int = 1
) -> Batches:
    channel = Channel(rank, world, CPU) if world > 1 else None
    reader = data.open_reader(config.data, state=state, rank=rank, world=world, channel=channel)
    return Batches(reader, config.data, batch_layout(config, world), CPU, eot=data.tokenizer.eot)


def read_pass(batches: Batches) -> int:
    """Read to the end of the pass; the tokens that were targets."""
    tokens = 0
    while not (batch := batches.take()).end:
        tokens += batch.targets
    batches.close()
    return tokens


def whole_pass(config: Config, data: Dataset) -> int:
    return read_pass(batches_of(config, data))


def timed(act: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock and of CPU time."""
    begin = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


# --- the claims


def raw(args: argparse.Namespace, scratch: Path) -> None:
    """encode_batch on a list in memory, with the offsets it also finds and without (_fast), against
    all of streaming.
    """
    one_core()
    folder, file = scratch / "raw", make_tokenizer(scratch)
    write(folder, "parquet", args.megabytes or 6)
    documents = [
        text
        for path in sorted(folder.iterdir())
        for text in pq.read_table(path)["text"].to_pylist()
    ]
    alone, configs = (
        tokenizers.Tokenizer.from_file(str(file)),
        [config_of(folder, file, scratch, n) for n in (0, 1)],
    )
    data = [opened(config) for config in configs]
    size = sum(len(text) for text in documents) / MB

    def encode(method: Callable[..., Any]) -> None:
        for at in range(0, len(documents), 128):
            method(documents[at : at + 128], add_special_tokens=False)

    sides: dict[str, Callable[[], Any]] = {
        "encode_batch": lambda: encode(alone.encode_batch),
        "encode_batch_fast": lambda: encode(alone.encode_batch_fast),
        "stream, 0 workers": partial(whole_pass, configs[0], data[0]),
        "stream, 1 worker": partial(whole_pass, configs[1], data[1]),
    }
    rounds = []
    for n in range(args.rounds):  # each side comes first in turn
        names = [*sides, *sides][n % len(sides) :][: len(sides)]
        rounds.append({name: timed(sides[name]) for name in names})
    print(f"{size:.0f} MB of text, {len(documents)} documents, {args.rounds} rounds")
    for name in sides:
        print(
            f"{name:18} {spread([size / r[name][0] for r in rounds])} MB/s, "
            f"{spread([size / r[name][1] for r in rounds])} MB per CPU second"
        )
    for name in list(sides)[2:]:
        for base in list(sides)[:2]:
            clock, cpu = ([r[base][n] / r[name][n] for r in rounds] for n in (0, 1))
            print(f"{name} / {base}: {spread(clock, 3)} by the clock, {spread(cpu, 3)} by CPU time")
    shares = []
    for _ in range(args.rounds):
        tokenizer = Timed(data[0].tokenizer.stored)
        cpu_seconds = timed(partial(whole_pass, configs[0], with_tokenizer(data[0], tokenizer)))[1]
        shares.append(tokenizer.seconds / cpu_seconds)
    print(f"share of streaming's CPU time that is inside encode_batch_fast: {spread(shares, 3)}")


class Timed(Tokenizer):
    """Knows the CPU time it took.

    On a busy machine steadier than two measurements one after the other.
    """

    seconds = 0.0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        begin = time.process_time()
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        self.seconds += time.process_time() - begin
        return [encoding.ids for encoding in encodings]


def with_tokenizer(data: Dataset, tokenizer: Tokenizer) -> Dataset:
    (source,) = data.sources.values()
    assert isinstance(source, StreamSource), "a stream"
    spec = dataclasses.replace(source.spec, tokenizer=tokenizer)
    return dataclasses.replace(data, sources={"text": StreamSource(spec)})


def pipeline(args: argparse.Namespace, scratch: Path) -> None:
    """Two processes, each on a core: what both give together, from opening the files to the end of
    a pass.
    """
    folder, file = scratch / "pipeline", make_tokenizer(scratch)
    write(folder, "parquet", args.megabytes or 6)
    rounds = []
    for _ in range(args.rounds):
        rounds.append(
            {side: two_processes(side, folder, file, scratch) for side in ("ours", "theirs")}
        )
    for side, name in (("ours", "stream"), ("theirs", "datasets")):
        clock, cpu = ([r[side][n] / MB for r in rounds] for n in (0, 1))
        print(f"{name:9} {spread(clock, 3)} M tokens/s of both, {spread(cpu, 3)} M per CPU second")
    clock, cpu = ([r["ours"][n] / r["theirs"][n] for r in rounds] for n in (0, 1))
    print(f"stream / datasets: {spread(clock)} by the clock, {spread(cpu)} by CPU time")


def two_processes(side: str, folder: Path, file: Path, scratch: Path) -> tuple[float, float]:
    """Tokens a second of both, and a second of CPU time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [
        sys.executable,
        __file__,
        "rank",
        "--side",
        side,
        "--folder",
        str(folder),
        "--tokenizer",
        str(file),
        "--scratch",
        str(scratch),
    ]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | world | {"RANK": str(n)})
        for n in range(2)
    ]
    try:
        found = [json.loads(process.communicate()[0]) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    tokens, seconds, cpu = zip(*found, strict=True)
    return sum(tokens) / max(seconds), sum(tokens) / sum(cpu)


def rank(args: argparse.Namespace, scratch: Path) -> None:
    """One of the two processes of `pipeline`, which starts it."""
    number, cores = int(os.environ["RANK"]), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tokens = [0]
    if args.side == "ours":
        config = config_of(args.folder, args.tokenizer, scratch)

        def act() -> None:
            tokens[0] = read_pass(batches_of(config, opened(config), rank=number, world=2))
    else:
        # transformers' run_clm.py, streamed
        import transformers  # slow, and needed for this side only

        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(args.tokenizer), eos_token="<|endoftext|>"
        )
        tokenizer.model_max_length = 10**9  # no warning about the length

        def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
            joined = {key: list(chain(*examples[key])) for key in examples}
            total = len(joined["input_ids"]) // T * T
            result = {
                key: [ids[i : i + T] for i in range(0, total, T)] for key, ids in joined.items()
            }
            result["labels"] = result["input_ids"].copy()
            return result

        def act() -> None:
            rows = loaded(args.folder, "parquet").map(
                lambda found: tokenizer(found["text"]), batched=True, remove_columns=["text"]
            )
            rows = rows.map(group_texts, batched=True).shuffle(seed=1, buffer_size=1000)
            rows = split_dataset_by_node(rows, number, 2)
            loader = torch.utils.data.DataLoader(
                rows, BATCH // 2, collate_fn=transformers.default_data_collator
            )
            tokens[0] = sum(batch["input_ids"].numel() for batch in loader)

    dist.barrier()
    seconds, cpu = timed(act)
    print(json.dumps([tokens[0], seconds, cpu]))
    dist.barrier()
    dist.destroy_process_group()


def mosaic(args: argparse.Namespace, scratch: Path) -> None:
    """The same sequences as our shards and as theirs (MDS, uncompressed); whole shuffled epochs
    after a first one.
    """
    one_core()
    python = args.mosaic_python
    if python is None:
        venv.create(scratch / "venv", with_pip=True)
        python = scratch / "venv" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", "mosaicml-streaming"], check=True)
    file = make_tokenizer(scratch)
    write(scratch / "text", "parquet", args.megabytes or 32)
    prepare_dataset(
        config_of(scratch / "text", file, scratch, stream=False).data,
        scratch / "shards",
        1,
        lambda said: None,
    )
    configs = [config_of(scratch / "shards", file, scratch, n, stream=False) for n in (0, 1)]
    shards = opened(configs[0]).train
    rows = shards.count(configs[0].data) // BATCH * BATCH
    np.save(scratch / "sequences.npy", shards.read(np.arange(rows), T, T))
    epochs = 4

    def ours(config: Config) -> float:
        reader = PreparedReader(PreparedSource("text", shards, T, T, seed=1), BATCH)
        batches = Batches(reader, config.data, batch_layout(config, 1), CPU, eot=0)
        for _ in range(rows // BATCH):
            batches.take()
        begin, steps = time.perf_counter(), epochs * rows // BATCH
        for _ in range(steps):
            batches.take()
        rate = steps * BATCH * T / (time.perf_counter() - begin)
        batches.close()
        return rate / MB

    def theirs(workers: int) -> float:
        command = [
            python,
            "-c",
            MOSAIC,
            scratch / "sequences.npy",
            scratch / "mds",
            str(workers),
            str(epochs),
        ]
        return float(subprocess.check_output(list(map(str, command)))) / MB

    rounds = [
        [ours(configs[0]), theirs(0), ours(configs[1]), theirs(1)] for _ in range(args.rounds)
    ]
    print(f"{rows} sequences of {T}, {epochs} epochs")
    for name, rates in zip(
        ("ours, 0 workers", "mosaic, 0 workers", "ours, 1 worker", "mosaic, 1 worker"),
        zip(*rounds, strict=True),
        strict=True,
    ):
        print(f"{name:18} {spread(list(rates), 1)} M tokens/s")
    print(
        f"ratio, 0 workers: {spread([r[0] / r[1] for r in rounds])}; 1 worker: {spread([r[2] / r[3] for r in rounds])};"
        f" the slower of ours / the faster of theirs: {spread([min(r[0], r[2]) / max(r[1], r[3]) for r in rounds])}"
    )


class Bytes(Tokenizer):
    """The byte tokenizer's ids at the speed of memory, to come quickly to the end of a large
    source.
    """

    def __init__(self) -> None:
        super().__init__(train_tokenizer("byte", []).stored)

    def encode_batch(self, texts: Any) -> Any:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]


def resume(args: argparse.Namespace, scratch: Path) -> None:
    """From Mix and its cursors to the first batch, near the end; `datasets` skips the rows before,
    not yet tokenized.
    """
    one_core()
    file = make_tokenizer(scratch)
    for kind in args.kinds:
        folder = scratch / kind
        documents = write(folder, kind, args.megabytes or 1000, args.row_group)
        config = config_of(folder, file, scratch)
        data = opened(config)
        began = time.perf_counter()
        half, end = places(config, data)
        print(
            f"{kind}: {documents} documents, a pass of bytes {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        sides: dict[str, Callable[[], Any]] = {
            "open": partial(opened, config),
            "resume half way": partial(first_batch, config, data, half),
            "resume at the end": partial(first_batch, config, data, end),
            "skip": partial(skip, folder, kind, documents - 1),
        }
        rounds = [{name: timed(side) for name, side in sides.items()} for _ in range(args.rounds)]
        for name in sides:
            clock, cpu = ([r[name][n] for r in rounds] for n in (0, 1))
            print(f"{kind}: {name} {spread(clock)} s, {spread(cpu)} s of CPU time", flush=True)
        shutil.rmtree(folder)


def places(config: Config, data: Dataset) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where the stream stands half way, and NEAR batches of bytes before its end; says what memory
    it all took.
    """
    batches, last = (
        batches_of(config, with_tokenizer(data, Bytes())),
        deque[dict[str, Any]](maxlen=NEAR),
    )
    sizes, some = list[float](), list[dict[str, Any]]()
    while not (batch := batches.take()).end:
        last.append(batch.after)
        some += [batch.after] if len(sizes) % 100 == 0 else []
        sizes.append(resident())
    print(f"memory over {len(sizes)} batches of bytes: {course(sizes)}", flush=True)
    found = json.loads(json.dumps([some[len(some) // 2], last[0]]))
    for state in found:
        for cursor in state["streams"]["text"]["lanes"].values():
            cursor["offset"] = 0  # between documents, which is a place in whatever tokens
    return found[0], found[1]


def first_batch(config: Config, data: Dataset, state: dict[str, Any]) -> None:
    batch = batches_of(config, data, state).take()
    assert batch.targets == BATCH * T, (
        f"{batch.targets} targets, not a full batch: the place is too near the end"
    )


def skip(folder: Path, kind: str, rows: int) -> None:
    next(iter(loaded(folder, kind).skip(rows)))


def memory(args: argparse.Namespace, scratch: Path) -> None:
    """Resident memory while a BPE streams it all."""
    one_core()
    file, folder = make_tokenizer(scratch), scratch / "memory"
    write(folder, args.kinds[0], args.megabytes or 1000, args.row_group)
    config = config_of(folder, file, scratch, workers=1)
    batches, began = batches_of(config, opened(config)), time.perf_counter()
    sizes, tokens = list[float](), 0
    while not (batch := batches.take()).end:
        tokens += batch.targets
        sizes.append(resident())
        if len(sizes) % 1000 == 0:
            print(
                f"{tokens / MB:.1f} M tokens in {time.perf_counter() - began:.0f} s, {sizes[-1]:.0f} MB",
                flush=True,
            )
    batches.close()
    print(f"{tokens / MB:.0f} M tokens in {time.perf_counter() - began:.0f} s: {course(sizes)}")


def course(sizes: list[float]) -> str:
    tenths = [f"{part.max():.0f}" for part in np.array_split(np.array(sizes), 10)]
    return (
        f"first {sizes[0]:.0f}, most {max(sizes):.0f}, last {sizes[-1]:.0f} MB;"
        f" most in each tenth {' '.join(tenths)}"
    )


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB


def main() -> None:
    claims = {act.__name__: act for act in (raw, pipeline, mosaic, resume, memory, rank)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claim", choices=claims)
    parser.add_argument(
        "--megabytes", type=int, default=0, help="of text; unset: what the claim is about"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--kinds", nargs="+", default=["parquet", "jsonl", "jsonl.gz"], help="of resume and memory"
    )
    parser.add_argument(
        "--row_group", type=int, default=1000, help="rows in a row group of Parquet"
    )
    parser.add_argument("--scratch", type=Path, help="where a folder is made and removed again")
    parser.add_argument(
        "--mosaic-python",
        type=Path,
        help="of an environment with mosaicml-streaming; unset: make one",
    )
    for name in ("--side", "--folder", "--tokenizer"):
        parser.add_argument(name, type=Path if name != "--side" else str, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="stream-", dir=args.scratch) as scratch:
        claims[args.claim](args, Path(scratch))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
