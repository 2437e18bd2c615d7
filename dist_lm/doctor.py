"""Are these machines fit for the run: `torchrun --nproc-per-node 8 -m dist_lm.doctor --config FILE [--launch zero3]`.

Started as train.py would be (torchrun, accelerate launch, srun, alone) with the same arguments. One page, each line ok,
warn or fail with what to do; nothing is trained and nothing stays in the run folder. Exit code 0 when nothing fails,
else that of the first failure: 2 settings, 65 data, 70 machines. Every check ends in bounded time; when a rank dies
or is silent, all others say so.
Each rank finds out its own facts, all get all of them, rank 0 prints what follows from them.
"""

from dist_lm.launcher import die_with_launcher

if (
    __name__ == "__main__"
):  # before all imports that take time: a launcher may be killed during them
    die_with_launcher()

from dist_lm.cli import load
from dist_lm.config import Config
from dist_lm.errors import UserError, run_entry

FLAGS = {
    "launch": "The strategy that train.py will get: a file of launch/.",
    "json": "Print one JSON object.",
    "timeout_seconds": "How long to wait for a silent rank or a hanging folder (60).",
}


def arguments(argv: list[str]) -> tuple[Config, float, dict[str, list[str]]]:
    """Settings, seconds to wait, and flags."""
    config, given = load(argv, FLAGS, "dist_lm/doctor.py")
    seconds = given.get("timeout_seconds", ["60"])[-1]
    if not seconds.isdecimal() or int(seconds) < 1:
        raise UserError(
            f"--timeout_seconds={seconds} must be a whole number of 1 or more; nearest: 60"
        )
    return config, float(seconds), given


if __name__ == "__main__":  # before the seconds that torch takes to import: typing mistakes
    ARGUMENTS = run_entry(arguments)

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dist_lm.checkpoint.folder import step_folders
from dist_lm.checkpoint.load import tokenizer_hash
from dist_lm.data.files import find_files
from dist_lm.data.manifest import MANIFEST, find_prepared, read_manifest
from dist_lm.data.remote import is_remote
from dist_lm.data.shards import TokenShards
from dist_lm.data.tokenizer import Tokenizer, is_trained_spec
from dist_lm.errors import in_a_line
from dist_lm.provenance import version_and_hash
from dist_lm.runtime.start import start
from dist_lm.runtime.world import Runtime
from dist_lm.size import checkpoint_bytes, checkpoints_kept, parameters, steps_of, vocabulary

BAD_SETTINGS, BAD_DATA, BAD_MACHINE = 2, 65, 70
PACKAGES = ("torch", "accelerate", "deepspeed", "datasets")
SLOW, SLOW_LINK = 0.8, 0.4  # shares of the median
SKEW_SECONDS, SAVE_SECONDS = 1.0, 300.0  # what clocks may differ by, and a checkpoint may take
MESSAGE_BYTES, DISK_BYTES = 2**24, 2**25


@dataclass(frozen=True)
class Check:
    """A line of the page."""

    name: str
    grade: str  # ok, warn, fail
    text: str
    remedy: str = ""
    code: int = 0


def main(config: Config, seconds: float, given: Mapping[str, list[str]]) -> None:
    checks: list[Check] = []
    runtime = None
    try:
        run = config.run.model_copy(update={"timeout_seconds": seconds})
        runtime = start(
            config.model_copy(update={"run": run}), given.get("launch", [None])[0], examining=True
        )
        for check in examine(runtime, config, seconds):
            checks.append(check)  # one by one, so that a peer's end leaves what was found before
    except UserError as error:
        code = error.code if error.code in (BAD_SETTINGS, BAD_DATA) else BAD_MACHINE
        checks.append(Check("start", "fail", str(error), "correct what it names", code))
    except RuntimeError as error:  # of torch.distributed
        after = f"after the check of {checks[-1].name}" if checks else "at the start"
        where = f"rendezvous {os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '?')}"
        text = f"a rank is missing, died or was silent for {seconds:g} s, {after} ({where}): {in_a_line(error)}"
        remedy = "look at the ranks that do not say this, and whether every host reaches MASTER_ADDR at MASTER_PORT"
        checks.append(Check("peers", "fail", text, remedy, BAD_MACHINE))
    code = next((check.code for check in checks if check.grade == "fail"), 0)
    last, rank = checks[-1], os.environ.get("RANK", "0")
    if rank == "0":
        print(
            report(checks, runtime.world_size if runtime else 0, code, "json" in given), flush=True
        )
    elif last.name == "peers":  # rank 0 may be the one that is gone
        print(f"rank {rank} ({socket.gethostname()}): {last.text}", file=sys.stderr, flush=True)
    if runtime is None or last.name == "peers":
        os._exit(code)  # threads may wait for a dead peer for ever
    runtime.close()
    sys.exit(code)


def report(checks: Sequence[Check], world: int, code: int, as_json: bool) -> str:
    if as_json:
        return json.dumps(
            {"ranks": world, "code": code, "checks": [asdict(check) for check in checks]}, indent=1
        )
    lines = []
    for check in checks:
        lines.append(f"{check.grade:6}{check.name:12}{check.text}")
        if check.remedy:
            lines.append(f"{'':18}-> {check.remedy}")
    grades = [check.grade for check in checks]
    return "\n".join(
        [*lines, f"{len(grades)} checks: {grades.count('warn')} warn, {grades.count('fail')} fail"]
    )


def examine(runtime: Runtime, config: Config, seconds: float) -> Iterator[Check]:
    """All checks, in order. All ranks."""
    ranks = Ranks(runtime, config, seconds)
    failed = set()
    try:
        for name, look, remedy in CHECKS:
            if NEEDS.get(name, "devices") in failed:
                failed.add(name)
                continue
            try:
                text, is_wrong = look(ranks)
                yield Check(name, "warn", text, remedy) if is_wrong else Check(name, "ok", text)
            except UserError as error:
                failed.add(name)
                yield Check(
                    name,
                    "fail",
                    str(error),
                    remedy,
                    BAD_DATA if look in (data, tokenizer) else BAD_MACHINE,
                )
    finally:
        if ranks.is_main:
            run_within(seconds / 4, ranks.clean)


class Ranks:
    """All ranks, asked in bounded time: one that fails or hangs is named, and all others know of it."""

    def __init__(self, runtime: Runtime, config: Config, seconds: float):
        self.runtime, self.config, self.seconds = runtime, config, seconds
        self.world, self.is_main, self.device = runtime.world_size, runtime.is_main, runtime.device
        self.gather = runtime.channel.gather
        self.names = [
            f"rank {rank} ({host})" for rank, host in enumerate(self.gather(socket.gethostname()))
        ]
        self.facts: list[dict[str, Any]] = []  # each rank's machine()
        self.checkpoint_bytes = 0  # not known yet
        self.folder = Path(config.run.dir).absolute()
        self.probe: Path  # a folder in it, for all that is written; see run_folder()
        self.made: list[Path] = []  # folders on the way there, which rank 0 takes away again

    def clean(self) -> None:
        """Leave nothing in the run folder, nor what a killed doctor left."""
        for path in self.folder.glob(".doctor-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.made:
            with contextlib.suppress(OSError):
                path.rmdir()

    def ask(self, work: Callable[[], Any], asked: bool = True) -> list[Any]:
        """What `work` finds on each rank that is asked, or else all raise what it failed of. All ranks."""
        # Half of the time, so that the others do not give up a slow rank first.
        said = self.gather(run_within(self.seconds / 2, work) if asked else {"found": None})
        failed = [
            f"{who}: {one['error']}"
            for who, one in zip(self.names, said, strict=True)
            if "error" in one
        ]
        if failed:
            raise UserError(_few(failed, "; "))
        return [one["found"] for one in said]


def run_within(seconds: float, work: Callable[[], Any]) -> dict[str, Any]:
    """{"found": what `work` gives}, or {"error": why} if it fails or does not end in time (a mount that hangs)."""
    said: list[dict[str, Any]] = []

    def run() -> None:
        try:
            said.append({"found": work()})
        except Exception as error:
            said.append({"error": str(error) if isinstance(error, UserError) else in_a_line(error)})

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0] if said else {"error": f"no answer within {seconds:g} s"}


# --- the checks: each gives a text and whether it is a warning, or raises UserError, on all ranks alike, if it fails

Found = tuple[str, bool]


def devices(ranks: Ranks) -> Found:
    ranks.facts = ranks.ask(lambda: machine(ranks.device))
    kinds, hosts = ({fact[name] for fact in ranks.facts} for name in ("device", "host"))
    text = f"{ranks.world} ranks on {len(hosts)} host(s): {', '.join(sorted(kinds))}; {ranks.runtime.strategy}"
    return text, len(kinds) > 1


def machine(device: torch.device) -> dict[str, Any]:
    """What this rank's machine and software are."""
    versions = {
        "python": platform.python_version(),
        "dist_lm": version_and_hash(),
    }
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    with open("/proc/meminfo") as file:
        memory = next(
            int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")
        )
    facts = {
        "versions": versions,
        "host": socket.gethostname(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)),
        "memory": memory,
        "device_memory": 0,
        "address": own_address(),
    }
    if device.type == "cuda":
        facts["device"], facts["device_memory"] = (
            torch.cuda.get_device_name(device),
            torch.cuda.mem_get_info(device)[0],
        )
        with contextlib.suppress(OSError, IndexError):
            driver = Path("/proc/driver/nvidia/version").read_text().split("  ")[1]
            facts["device"] = f"{facts['device']} {driver.strip()}"
    return facts


def own_address() -> str:
    """This host's address on the way to rank 0's, and the interface that has it or that a variable names."""
    named = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
        return str(probe.getsockname()[0]) + (f" by {named}" if named else "")
    return "no route to MASTER_ADDR"


def versions(ranks: Ranks) -> Found:
    first = ranks.facts[0]["versions"]
    different = [
        f"{who}: {key} {fact['versions'].get(key, 'missing')}, not {first.get(key, 'missing')}"
        for who, fact in zip(ranks.names, ranks.facts, strict=True)
        for key in {**first, **fact["versions"]}
        if fact["versions"].get(key) != first.get(key)
    ]
    if different:
        raise UserError(_few(different, "; "))
    return ", ".join(f"{key} {value}" for key, value in first.items()), False


def threads(ranks: Ranks) -> Found:
    for host in dict.fromkeys(fact["host"] for fact in ranks.facts):
        here = [fact for fact in ranks.facts if fact["host"] == host]
        cores, wanted = (
            len(set().union(*(fact["cores"] for fact in here))),
            sum(fact["threads"] for fact in here),
        )
        if wanted > cores:
            return f"{host}: {wanted} threads of {len(here)} ranks share {cores} core(s)", True
    return f"{ranks.facts[0]['threads']} a rank on {len(ranks.facts[0]['cores'])} cores", False


def memory(ranks: Ranks) -> Found:
    """What is free against the least that the strategy needs before any activation."""
    smallest = min(ranks.facts, key=lambda fact: fact["device_memory"] or fact["memory"])
    on_gpu, host = bool(smallest["device_memory"]), smallest["host"]
    free = smallest["device_memory"] or smallest["memory"]
    text = f"{_gb(free)} free on {host}"
    strategy = ranks.runtime.engine.strategy
    try:
        vocab_size = vocabulary(ranks.config)
    except UserError:
        return text, False
    if on_gpu and strategy.optimizer_device != "none":
        return text, False
    weights = 4 * parameters(ranks.config, vocab_size)
    divided = weights + checkpoint_bytes(ranks.config, vocab_size)  # gradients; weights and moments
    on_each = (
        weights if strategy.stage in (1, 2) else 0
    )  # there the optimizer has copies of its share
    processes = 1 if on_gpu else sum(fact["host"] == host for fact in ranks.facts)
    least = processes * (on_each + divided / (ranks.world if strategy.stage else 1))
    text += f", weights, gradients and moments take {_gb(least)}"
    if least > free:
        raise UserError(text)
    return text, False


def clocks(ranks: Ranks) -> Found:
    """Each rank's time less rank 0's; of several looks the smallest has least of the look's own delay. All ranks."""
    looks = []
    for _ in range(5):
        ranks.runtime.barrier()
        times = ranks.gather(time.time())
        looks.append([abs(own - times[0]) for own in times])
    apart, who = max(zip(map(min, zip(*looks, strict=True)), ranks.names, strict=True))
    return f"at most {apart:.3g} s apart ({who} from rank 0)", apart > SKEW_SECONDS


def rendezvous(ranks: Ranks) -> Found:
    where = f"{os.environ.get('MASTER_ADDR', 'none: one process')}:{os.environ.get('MASTER_PORT', '')}".rstrip(
        ":"
    )
    hosts = {fact["host"]: fact["address"] for fact in ranks.facts}
    addresses = _few([f"{host} {address}" for host, address in hosts.items()], ", ")
    only_itself = len(hosts) > 1 and any(address.startswith("127.") for address in hosts.values())
    return f"{where}, {'nccl' if ranks.device.type == 'cuda' else 'gloo'}, {addresses}", only_itself


def sums(ranks: Ranks) -> Found:
    """Latency and bandwidth of a sum over all ranks. All ranks."""
    if ranks.world == 1:
        return "one process: none", False
    latency, rate = latency_and_rate(
        ranks.device, lambda tensor: ranks.runtime.sum(tensor)[0].item()
    )
    bus = 2 * (ranks.world - 1) / ranks.world * rate
    return f"{1000 * latency:.3g} ms, {_gb(bus)}/s on the bus", False


def pairs(ranks: Ranks) -> Found:
    """Neighbouring ranks send to and fro, even and odd pairs in turns; the slowest pair of each class. All ranks."""
    lower = [low for first in (0, 1) for low in range(first, ranks.world - 1, 2)]
    own = [
        (low, *pair_speed(ranks.runtime, low))
        for low in lower
        if ranks.runtime.rank in (low, low + 1)
    ]
    found: defaultdict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for said in ranks.gather(own):
        for low, latency, rate in said:
            same = ranks.facts[low]["host"] == ranks.facts[low + 1]["host"]
            found["same node" if same else "between nodes"].append((rate, latency, low))
    texts, slow = [], False
    for kind, measured in found.items():
        rate, latency, low = min(measured)
        middle = statistics.median(rate for rate, _, _ in measured)
        who = f"{ranks.names[low]} and {ranks.names[low + 1]}"
        texts.append(
            f"{kind}: {1000 * latency:.3g} ms, {_gb(rate)}/s at least ({who}), median {_gb(middle)}/s"
        )
        slow |= rate < SLOW_LINK * middle
    return "; ".join(texts) or "one process: none", slow


def pair_speed(runtime: Runtime, low: int) -> tuple[float, float]:
    """Seconds one way, and bytes a second, between rank `low` and the next, which both call this."""
    other = low + 1 if runtime.rank == low else low

    def there_and_back(tensor: torch.Tensor) -> None:
        for sender in (low, low + 1):
            if runtime.rank == sender:
                runtime.channel.send(tensor, other, 0).wait()
            else:
                runtime.channel.receive(tensor, other, 0)
        tensor[0].item()

    latency, rate = latency_and_rate(runtime.device, there_and_back)
    return latency / 2, 2 * rate


def latency_and_rate(
    device: torch.device, work: Callable[[torch.Tensor], object]
) -> tuple[float, float]:
    """Seconds for one number, and bytes a second for many."""
    one, many = (torch.zeros(size // 4, device=device) for size in (4, MESSAGE_BYTES))
    return best_of(20, lambda: work(one)), MESSAGE_BYTES / best_of(3, lambda: work(many))


def speed(ranks: Ranks) -> Found:
    """The same product of matrices on every device at the same time. All ranks."""
    size, kind = (8192, torch.bfloat16) if ranks.device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=ranks.device).to(kind)
    ranks.runtime.barrier()
    seconds = best_of(8, lambda: (a @ a)[0, 0].item())
    rates = [2 * size**3 / took for took in ranks.gather(seconds)]
    middle = statistics.median(rates) if len(rates) > 2 else max(rates)
    slow = [
        f"{who} {rate / 1e12:.3g}"
        for who, rate in zip(ranks.names, rates, strict=True)
        if rate < SLOW * middle
    ]
    text = f"{min(rates) / 1e12:.3g} to {max(rates) / 1e12:.3g} TFLOP/s in {str(kind).removeprefix('torch.')}"
    return text + (f"; slow: {_few(slow, ', ')}" if slow else ""), bool(slow)


def best_of(turns: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest turn, after one to warm up."""
    return min(timeit.repeat(work, number=1, repeat=turns + 1)[1:])


def run_folder(ranks: Ranks) -> Found:
    """Every rank can write into a folder that rank 0 has just made there. All ranks."""

    def make() -> str:
        ranks.made = [path for path in (ranks.folder, *ranks.folder.parents) if not path.exists()]
        ranks.folder.mkdir(parents=True, exist_ok=True)
        ranks.probe = Path(tempfile.mkdtemp(prefix=".doctor-", dir=ranks.folder))
        return ranks.probe.name

    def write() -> None:
        deadline = time.monotonic() + ranks.seconds / 4
        while not ranks.probe.exists() and time.monotonic() < deadline:
            time.sleep(0.1)  # NFS remembers for a while what was not there
        (ranks.probe / str(ranks.runtime.rank)).touch()

    ranks.probe = ranks.folder / ranks.ask(make, asked=ranks.is_main)[0]  # seen from here
    ranks.ask(write)
    return f"{ranks.folder}: all ranks see the same", False


def space(ranks: Ranks) -> Found:
    def sizes() -> tuple[int, int]:
        config = ranks.config
        return checkpoint_bytes(config, vocabulary(config)), checkpoints_kept(
            config, steps_of(config)
        )

    free = ranks.ask(lambda: shutil.disk_usage(ranks.folder).free, asked=ranks.is_main)[0]
    try:
        size, number = ranks.ask(sizes, asked=ranks.is_main)[0]
    except UserError as unknown:
        return f"{_gb(free)} free; what is needed is not known: {unknown}", True
    ranks.checkpoint_bytes = size
    text = f"{_gb(free)} free, {number} checkpoints of {_gb(size)} need {_gb(number * size)}"
    if number * size > free:
        raise UserError(text)
    return text, False


def disk(ranks: Ranks) -> Found:
    """The speed of writing, by one rank of each host. All ranks."""
    part = os.urandom(2**20)

    def write() -> float:
        written, began = 0, time.monotonic()
        with tempfile.NamedTemporaryFile(dir=ranks.probe) as file:
            while written < DISK_BYTES and time.monotonic() - began < ranks.seconds / 8:
                written += file.write(part)
            file.flush()
            os.fsync(file.fileno())
        return written / (time.monotonic() - began)

    rates = ranks.ask(write, asked=os.environ.get("LOCAL_RANK", "0") == "0")
    rate, size = min(rate for rate in rates if rate), ranks.checkpoint_bytes
    text = f"{_gb(rate)}/s a host at least" + (
        f", a checkpoint in about {size / rate:.2g} s" if size else ""
    )
    return text, size / rate > SAVE_SECONDS


def data(ranks: Ranks) -> Found:
    """Reachable and the same from every rank. All ranks."""
    seen = ranks.ask(lambda: seen_here(ranks.config))
    text, content = seen[0]
    others = [who for who, (_, own) in zip(ranks.names, seen, strict=True) if own != content]
    if others:
        raise UserError(
            f"data.input={ranks.config.data.input}: {_few(others, ', ')} see(s) other content than rank 0"
        )
    return text, False


def seen_here(config: Config) -> tuple[str, str]:
    """The data that this rank can read, in words and as a hash."""
    if folder := prepared_folder(config):
        train, val = (
            TokenShards(folder, "train"),
            TokenShards(folder, "val"),
        )  # every shard has its size
        files = [str(folder / name) for name in (*train.files, *val.files)]
        content = b"".join((folder / name).read_bytes() for name in (MANIFEST, "tokenizer.json"))
        text = f"{folder}: prepared, {sum(train.sizes):,} tokens to train on"
    else:
        named = config.data.named_sources()
        raw = {name: spec for name, spec in named.items() if not find_prepared(spec.input)}
        sources = [
            source
            for name, spec in raw.items()
            for source in find_files(spec, config.data.field_of(name))
        ]
        files = [source.path for source in sources if source.path and not is_remote(source.path)]
        content = json.dumps([[source.name, source.size] for source in sources]).encode()
        text = f"{', '.join(spec.input for spec in named.values())}: "
        size = _gb(sum(source.size for source in sources))
        is_hub = any(not source.path for source in sources)
        text += "a hub dataset, not looked at" if is_hub else f"{len(sources)} file(s), {size}"
    for name in files:
        with open(name, "rb") as file:
            file.read(1)
    return text, hashlib.sha256(content).hexdigest()


def prepared_folder(config: Config) -> Path | None:
    folders = (Path(config.data.input), Path(config.run.dir, "data"))
    return next((folder for folder in folders if find_prepared(folder)), None)


def tokenizer(ranks: Ranks) -> Found:
    text, is_another = ranks.ask(lambda: compare_tokenizers(ranks.config), asked=ranks.is_main)[0]
    return text, is_another


def compare_tokenizers(config: Config) -> Found:
    """Whether tokenizer, prepared data and the checkpoints to go on from belong together."""
    used = spec = config.data.tokenizer
    if folder := prepared_folder(config):
        manifest, own = read_manifest(folder), Tokenizer.load(folder)
        used = manifest["tokenizer"]["name"]
        if own.sha256 != manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"{folder}/tokenizer.json is not the one that the folder was prepared with"
            )
    elif is_trained_spec(spec):
        return f"{spec}: made from the text as a run begins", False
    elif not Path(spec).exists():
        return f"{spec}: from the hub, not looked at", False
    else:
        own = Tokenizer.load(spec)
    text = f"{own.vocab_size:,} tokens"
    folders = step_folders(Path(config.run.dir))[-1:]
    if config.run.init_from:
        folders += [Path(config.run.init_from), *step_folders(Path(config.run.init_from))[-1:]]
    for folder in folders:
        theirs = tokenizer_hash(folder)
        if theirs not in (None, own.sha256):
            raise UserError(
                f"{folder} was trained with another tokenizer than data.input={config.data.input} has"
            )
        text += f", as {folder}" if theirs else ""
    text += (
        f"; prepared with data.tokenizer={used}, which stands, not {spec}" if used != spec else ""
    )
    return text, used != spec


# In order: a line's name, its check, and what to do if it is not ok.
CHECKS: tuple[tuple[str, Callable[[Ranks], Found], str], ...] = (
    (
        "devices",
        devices,
        "look at that host; of several kinds all wait for the slowest in each step",
    ),
    ("versions", versions, "install the same on every host"),
    ("threads", threads, "fewer ranks there, or more cores for them"),
    ("memory", memory, "python -m dist_lm.plan shows what would fit"),
    ("clocks", clocks, "set the clocks by NTP: times in logs and metrics do not compare"),
    (
        "rendezvous",
        rendezvous,
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface between the hosts",
    ),
    ("all-reduce", sums, ""),
    ("pairs", pairs, "look at the link of the pair that is slower than the median"),
    (
        "speed",
        speed,
        "all wait for it in each step: look for other jobs, heat or a power limit there, or leave it out",
    ),
    (
        "run folder",
        run_folder,
        "a run.dir that all hosts share and may write to, by its absolute path",
    ),
    (
        "space",
        space,
        "another run.dir, a smaller run.keep_last, or free some; if unknown, prepare the text first",
    ),
    ("disk", disk, "another disk, or a larger run.save_every"),
    ("data", data, "the same copy where every host sees it, by its absolute path"),
    ("tokenizer", tokenizer, "data, data.tokenizer and checkpoint that belong together"),
)
NEEDS = {"space": "run folder", "disk": "space", "tokenizer": "data"}  # all others: devices


def _few(texts: Sequence[str], separator: str) -> str:
    return separator.join(texts[:4]) + (" ..." if len(texts) > 4 else "")


def _gb(number: float) -> str:
    return f"{number / 1e9:.3g} GB"


if __name__ == "__main__":
    run_entry(lambda _: main(*ARGUMENTS))
