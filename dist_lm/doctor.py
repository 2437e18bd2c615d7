"""Are these machines fit for the run: `torchrun --nproc-per-node 8 -m dist_lm.doctor --config FILE [--launch zero3]`.

Started as train.py would be (torchrun, accelerate launch, srun, alone) with the same arguments. One page, each line ok,
warn or fail with what to do; nothing is trained and nothing stays in the run folder. Exit code 0 when nothing fails,
else that of the first failure: 2 settings, 65 data, 70 machines. Every check ends in bounded time; when a rank dies
or is silent, all others say so.
Each rank finds out its own facts, all get all of them, rank 0 prints what follows from them.
"""

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm import __version__
from dist_lm.config import Config, UserError, load, run_entry

if TYPE_CHECKING:
    from dist_lm.runtime import Runtime

FLAGS = {
    "launch": "The strategy that train.py will get: a file of launch/.",
    "json": "Print one JSON object.",
    "timeout_seconds": "How long to wait for a silent rank or a hanging folder (60).",
}
BAD_SETTINGS, BAD_DATA, BAD_MACHINE = 2, 65, 70
PACKAGES = ("torch", "accelerate", "deepspeed", "datasets")
SLOW, SKEW_SECONDS, SAVE_SECONDS = 0.8, 1.0, 300.0  # share of the median; what a clock, and a save, may take
PAIR_BYTES, SUM_BYTES, DISK_BYTES = 2**22, 2**24, 2**26


@dataclass(frozen=True)
class Check:
    """A line of the page."""

    name: str
    grade: str  # ok, warn, fail
    text: str
    remedy: str = ""
    code: int = 0


def main(argv: list[str]) -> None:
    config, given = load(argv, FLAGS, "dist_lm/doctor.py")
    seconds = given.get("timeout_seconds", ["60"])[-1]
    if not seconds.isdecimal() or int(seconds) < 1:
        raise UserError(f"--timeout_seconds={seconds} must be a whole number of 1 or more; nearest: 60")
    checks: list[Check] = []
    runtime = None
    try:
        from dist_lm.runtime import start  # after the command line: torch takes seconds to import

        run = config.run.model_copy(update={"timeout_seconds": float(seconds)})
        launch = next(iter(given.get("launch", [])), None)
        runtime = start(config.model_copy(update={"run": run}), launch, examining=True)
        for check in examine(runtime, config, float(seconds)):
            checks.append(check)
    except UserError as error:
        code = error.code if error.code in (BAD_SETTINGS, BAD_DATA) else BAD_MACHINE
        checks.append(Check("start", "fail", str(error), "correct what it names", code))
    except RuntimeError as error:  # of torch.distributed
        after = f"after the check of {checks[-1].name}" if checks else "at the start"
        where = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '?')}"
        text = f"a rank is missing, died or was silent for {seconds} s, {after} (rendezvous {where}): {_line(error)}"
        remedy = "look at the ranks that do not say this, and whether every host reaches MASTER_ADDR at MASTER_PORT"
        checks.append(Check("peers", "fail", text, remedy, BAD_MACHINE))
    code = next((check.code for check in checks if check.grade == "fail"), 0)
    broken, rank = checks[-1].name in ("start", "peers"), os.environ.get("RANK", "0")
    if rank == "0":
        print(report(checks, runtime.world_size if runtime else 0, code, "json" in given), flush=True)
    elif checks[-1].name == "peers":  # rank 0 may be the one that is gone
        print(f"rank {rank} ({socket.gethostname()}): {checks[-1].text}", file=sys.stderr, flush=True)
    if broken:
        os._exit(code)  # threads may wait for a dead peer for ever
    if runtime:
        runtime.close()
    sys.exit(code)


def report(checks: Sequence[Check], world: int, code: int, as_json: bool) -> str:
    if as_json:
        return json.dumps({"ranks": world, "code": code, "checks": [asdict(check) for check in checks]}, indent=1)
    lines = []
    for check in checks:
        lines.append(f"{check.grade:6}{check.name:12}{check.text}")
        if check.remedy:
            lines.append(f"{'':18}-> {check.remedy}")
    grades = [check.grade for check in checks]
    return "\n".join([*lines, f"{len(grades)} checks: {grades.count('warn')} warn, {grades.count('fail')} fail"])


def examine(runtime: "Runtime", config: Config, seconds: float) -> Iterator[Check]:
    """All checks, in order. All ranks."""
    facts = runtime.channel.gather(within(seconds / 2, lambda: machine(runtime)))
    names = [f"rank {rank} ({fact.get('host', '?')})" for rank, fact in enumerate(facts)]
    for name, fact in zip(names, facts, strict=True):
        if "error" in fact:
            yield Check("machine", "fail", f"{name}: {fact['error']}", "see that host", BAD_MACHINE)
            return
    yield same_versions(facts, names)
    yield devices(facts, runtime)
    yield threads(facts)
    yield free_memory(facts, runtime, config)
    yield clocks(runtime, names)
    yield rendezvous(facts)
    yield sums(runtime)
    yield from pairs(runtime, facts, names)
    yield speed(runtime, names)
    yield from run_folder(runtime, config, names, seconds)
    yield from data(runtime, config, names, seconds)


def machine(runtime: "Runtime") -> dict[str, Any]:
    """What this rank's machine and software are."""
    import torch

    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    found: dict[str, Any] = {"python": platform.python_version(), "dist_lm": f"{__version__} ({code.hexdigest()[:8]})"}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    with open("/proc/meminfo") as file:
        memory = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    facts = {
        "versions": found, "host": socket.gethostname(), "device": platform.processor() or platform.machine(),
        "driver": "", "threads": torch.get_num_threads(), "cores": sorted(os.sched_getaffinity(0)), "memory": memory,
        "device_memory": 0, "address": own_address(), "backend": "gloo",
    }  # fmt: skip
    if runtime.device.type == "cuda":
        with contextlib.suppress(OSError, IndexError):
            facts["driver"] = Path("/proc/driver/nvidia/version").read_text().split("  ")[1]
        facts |= {"device": torch.cuda.get_device_name(runtime.device), "backend": "nccl",
                  "device_memory": torch.cuda.mem_get_info(runtime.device)[0]}  # fmt: skip
    return facts


def own_address() -> str:
    """This host's address on the way to rank 0's, and the interface that has it or that a variable names."""
    named = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
        return str(probe.getsockname()[0]) + (f" by {named}" if named else "")
    return "no route to MASTER_ADDR"


def same_versions(facts: list[dict[str, Any]], names: list[str]) -> Check:
    first = facts[0]["versions"]
    different = [
        f"{name}: {key} {fact['versions'].get(key, 'missing')}, not {first.get(key, 'missing')}"
        for name, fact in zip(names, facts, strict=True)
        for key in {**first, **fact["versions"]} if fact["versions"].get(key) != first.get(key)
    ]  # fmt: skip
    if different:
        return Check("versions", "fail", "; ".join(different[:4]), "install the same on every host", BAD_MACHINE)
    return Check("versions", "ok", ", ".join(f"{key} {value}" for key, value in first.items()))


def devices(facts: list[dict[str, Any]], runtime: "Runtime") -> Check:
    kinds = sorted({" ".join(f"{fact['device']} {fact['driver']}".split()) for fact in facts})
    text = (
        f"{len(facts)} ranks on {len({fact['host'] for fact in facts})} host(s): {', '.join(kinds)}; {runtime.strategy}"
    )
    if len(kinds) > 1:
        return Check("devices", "warn", text, "all wait for the slowest kind in each step")
    return Check("devices", "ok", text)


def threads(facts: list[dict[str, Any]]) -> Check:
    for host in dict.fromkeys(fact["host"] for fact in facts):
        here = [fact for fact in facts if fact["host"] == host]
        cores, wanted = len(set().union(*(fact["cores"] for fact in here))), sum(fact["threads"] for fact in here)
        if wanted > cores:
            text = f"{host}: {wanted} threads of {len(here)} ranks share {cores} core(s)"
            return Check("threads", "warn", text, "fewer ranks there, or more cores for them")
    return Check("threads", "ok", f"{facts[0]['threads']} a rank on {len(facts[0]['cores'])} cores")


def free_memory(facts: list[dict[str, Any]], runtime: "Runtime", config: Config) -> Check:
    """Against the least that the strategy needs before any activation."""
    from dist_lm.size import checkpoint_bytes, vocabulary, weight_bytes

    smallest = min(facts, key=lambda fact: fact["device_memory"] or fact["memory"])
    on_gpu, world = bool(smallest["device_memory"]), len(facts)
    free = smallest["device_memory"] if on_gpu else smallest["memory"]
    try:
        weights, state = (count(config, vocabulary(config)) for count in (weight_bytes, checkpoint_bytes))
    except UserError:
        return Check("memory", "ok", f"{_gb(free)} free on {smallest['host']}")
    stage = int(runtime.strategy[4]) if runtime.strategy.startswith("zero") else 0
    whole, parts = {0: (weights + state, 0), 3: (0, weights + state)}.get(stage, (weights, weights + state))
    least = (whole + parts / world) * (0 if on_gpu and "-" in runtime.strategy else 1)
    ranks = 1 if on_gpu else sum(fact["host"] == smallest["host"] for fact in facts)
    text = f"{_gb(free)} free on {smallest['host']}, weights, gradients and moments take {_gb(least * ranks)}"
    if least * ranks > free:
        return Check("memory", "fail", text, "python -m dist_lm.plan shows what would fit", BAD_MACHINE)
    return Check("memory", "ok", text)


def clocks(runtime: "Runtime", names: list[str]) -> Check:
    offsets = []
    for _ in range(5):
        runtime.barrier()
        times = runtime.channel.gather(time.time())
        offsets.append([own - times[0] for own in times])
    return judge_clocks(offsets, names)


def judge_clocks(offsets: list[list[float]], names: list[str]) -> Check:
    """From several looks at each rank's time less rank 0's, of which the smallest has least of the look's own delay."""
    best = [min(column, key=abs) for column in zip(*offsets, strict=True)]
    worst = max(range(len(best)), key=lambda rank: abs(best[rank]))
    text = f"at most {abs(best[worst]):.3g} s apart ({names[worst]} from rank 0)"
    if abs(best[worst]) > SKEW_SECONDS:
        return Check("clocks", "warn", text, "set the clocks by NTP: times in logs and metrics do not compare")
    return Check("clocks", "ok", text)


def rendezvous(facts: list[dict[str, Any]]) -> Check:
    where = f"{os.environ.get('MASTER_ADDR', 'none: one process')}:{os.environ.get('MASTER_PORT', '')}".rstrip(":")
    addresses = [f"{fact['host']} {fact['address']}" for fact in {fact["host"]: fact for fact in facts}.values()]
    several = len(addresses) > 1
    loopback = [text for text in addresses if " 127." in text]
    text = f"{where}, {facts[0]['backend']}, {', '.join(addresses[:4])}{' ...' if len(addresses) > 4 else ''}"
    if several and loopback:
        remedy = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface between the hosts"
        return Check("rendezvous", "warn", text, remedy)
    return Check("rendezvous", "ok", text)


def sums(runtime: "Runtime") -> Check:
    """Latency and bandwidth of a sum over all ranks. All ranks."""
    import torch

    if runtime.world_size == 1:
        return Check("all-reduce", "ok", "one process: none")
    one = torch.ones(1, device=runtime.device)
    latency = best_of(20, lambda: runtime.sum(one.fill_(1)).item())
    tensor = torch.ones(SUM_BYTES // 4, device=runtime.device)
    seconds = best_of(3, lambda: (runtime.sum(tensor.fill_(1)), tensor[0].item()))
    if tensor[0].item() != runtime.world_size:
        return Check("all-reduce", "fail", f"ones added up to {tensor[0].item()} over {runtime.world_size} ranks",
                     "the network or its library corrupts data", BAD_MACHINE)  # fmt: skip
    bus = 2 * (runtime.world_size - 1) / runtime.world_size * SUM_BYTES / seconds
    return Check("all-reduce", "ok", f"{1000 * latency:.3g} ms, {_gb(bus)}/s on the bus")


def pairs(runtime: "Runtime", facts: list[dict[str, Any]], names: list[str]) -> Iterator[Check]:
    """Neighbouring ranks send to and fro, even and odd pairs in turns; the slowest pair of each class. All ranks."""
    mine = [pair_speed(runtime, low, low + 1) for first in (0, 1) for low in range(first, len(facts) - 1, 2)
            if runtime.rank in (low, low + 1)]  # fmt: skip
    gathered = {tuple(entry[0]): entry[1:] for entries in runtime.channel.gather(mine) for entry in entries}
    for kind in ("same node", "between nodes"):
        own = {
            (low, high): gathered[low, high] for low, high in pairwise(range(len(facts)))
            if (facts[low]["host"] == facts[high]["host"]) == (kind == "same node")
        }  # fmt: skip
        if own:
            slow, (latency, rate) = min(own.items(), key=lambda item: item[1][1])
            middle = statistics.median(rate for _, rate in own.values())
            text = f"{kind}: {1000 * latency:.3g} ms, {_gb(rate)}/s at least ({names[slow[0]]} and {names[slow[1]]})"
            grade = "warn" if rate < SLOW / 2 * middle else "ok"
            remedy = f"the median is {_gb(middle)}/s: look at the link of these two" if grade == "warn" else ""
            yield Check("pairs", grade, text, remedy)


def pair_speed(runtime: "Runtime", low: int, high: int) -> list[Any]:
    """[pair, seconds one way, bytes a second], between two ranks that both call this."""
    import torch

    other, found = high if runtime.rank == low else low, []
    for size, turns in ((1, 20), (PAIR_BYTES // 4, 3)):
        tensor = torch.ones(size, device=runtime.device)

        def there_and_back(tensor: Any = tensor) -> None:
            for sender in (low, high):
                if runtime.rank == sender:
                    runtime.channel.send(tensor, other, 0).wait()
                else:
                    runtime.channel.receive(tensor, other, 0)
            tensor[0].item()

        found.append(best_of(turns, there_and_back) / 2)
    return [[low, high], found[0], PAIR_BYTES / found[1]]


def speed(runtime: "Runtime", names: list[str]) -> Check:
    """The same product of matrices on every device at the same time. All ranks."""
    import torch

    on_gpu = runtime.device.type == "cuda"
    size, kind = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a = torch.randn(size, size, device=runtime.device).to(kind)
    runtime.barrier()
    seconds = best_of(8, lambda: (a @ a)[0, 0].item())
    rates = [2 * size**3 / took for took in runtime.channel.gather(seconds)]
    middle = statistics.median(rates) if len(rates) > 2 else max(rates)
    slow = [f"{names[rank]} {rate / 1e12:.3g}" for rank, rate in enumerate(rates) if rate < SLOW * middle]
    text = f"{min(rates) / 1e12:.3g} to {max(rates) / 1e12:.3g} TFLOP/s in {str(kind).removeprefix('torch.')}"
    if slow:
        remedy = "all wait for it in each step: look for other jobs, heat or a power limit there, or leave it out"
        return Check("speed", "warn", f"{text}; slow: {', '.join(slow[:4])}", remedy)
    return Check("speed", "ok", text)


def run_folder(runtime: "Runtime", config: Config, names: list[str], seconds: float) -> Iterator[Check]:
    """Seen by all ranks, with the same content; room and speed of its disk. All ranks."""
    folder = Path(config.run.dir).absolute()
    made: list[Path] = []
    name = f".doctor-{os.getpid()}-{time.time_ns()}"

    def write() -> dict[str, Any]:
        made.extend(path for path in (folder, *folder.parents) if not path.exists())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
        return {"name": name, "free": shutil.disk_usage(folder).free}

    try:
        said = runtime.channel.gather(within(seconds / 2, write) if runtime.is_main else {})[0]
        if "error" in said:
            yield Check("run folder", "fail", f"run.dir={config.run.dir} cannot be written: {said['error']}",
                        "another run.dir, or its permissions", BAD_MACHINE)  # fmt: skip
            return
        seen = runtime.channel.gather(
            within(seconds / 2, lambda: answer(folder / said["name"], seconds / 4, runtime.rank))
        )
        blind = [f"{who}: {found['error']}" for who, found in zip(names, seen, strict=True) if "error" in found]
        listed = within(seconds / 4, lambda: {"names": os.listdir(folder)}) if runtime.is_main else {}
        answers = runtime.channel.gather(listed)[0].get("names", [])
        blind += [f"{who}: rank 0 does not see what it wrote" for rank, who in enumerate(names)
                  if not blind and f"{said['name']}-{rank}" not in answers]  # fmt: skip
        if blind:
            yield Check("run folder", "fail", f"run.dir={config.run.dir}: {'; '.join(blind[:4])}",
                        "a folder that all hosts share, by its absolute path", BAD_MACHINE)  # fmt: skip
            return
        yield Check("run folder", "ok", f"{folder}: all ranks see the same")
        yield from disk(runtime, config, folder, said["free"], names, seconds)
    finally:
        if runtime.is_main:
            within(seconds / 4, lambda: clean(folder, made))


def clean(folder: Path, made: list[Path]) -> dict[str, Any]:
    for path in folder.glob(".doctor-*"):
        path.unlink(missing_ok=True)
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir()
    return {}


def answer(written: Path, patience: float, rank: int) -> dict[str, Any]:
    """Wait until what rank 0 wrote is seen here (NFS remembers what was not there), and write beside it."""
    began = time.monotonic()
    while not written.exists() or written.read_text() != written.name:
        if time.monotonic() - began > patience:
            return {"error": f"{written.parent} here has not what rank 0 wrote there"}
        time.sleep(0.1)
    written.with_name(f"{written.name}-{rank}").write_text(str(rank))
    return {}


def disk(
    runtime: "Runtime", config: Config, folder: Path, free: int, names: list[str], seconds: float
) -> Iterator[Check]:
    from dist_lm.size import checkpoint_bytes, checkpoints_kept, steps_of, vocabulary

    def figures() -> dict[str, Any]:
        size = checkpoint_bytes(config, vocabulary(config))
        return {"size": size, "number": checkpoints_kept(config, steps_of(config))}

    found = runtime.channel.gather(within(seconds / 2, figures) if runtime.is_main else {})[0]
    if "error" in found:
        yield Check(
            "space", "warn", f"{_gb(free)} free; what is needed is not known: {found['error']}", "prepare first"
        )
        found = {"size": 0, "number": 0}
    else:
        needed = found["size"] * found["number"]
        text = f"{_gb(free)} free, {found['number']} checkpoints of {_gb(found['size'])} need {_gb(needed)}"
        short = needed > free
        yield Check("space", "fail" if short else "ok", text, "another run.dir, a smaller run.keep_last, or free some"
                    if short else "", BAD_MACHINE if short else 0)  # fmt: skip
    size = min(DISK_BYTES, free // 4)

    def write() -> dict[str, Any]:
        began, written, chunk = time.monotonic(), 0, os.urandom(2**20)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-disk-", buffering=0) as file:
            while written < size and time.monotonic() - began < seconds / 8:
                written += file.write(chunk)
            os.fsync(file.fileno())
        return {"rate": written / (time.monotonic() - began)}

    first = os.environ.get("LOCAL_RANK", "0") == "0"  # one rank of each host writes
    wrote = runtime.channel.gather(within(seconds / 2, write) if first else {"rate": None})
    failed = [f"{who}: {one['error']}" for who, one in zip(names, wrote, strict=True) if "error" in one]
    if failed:
        yield Check("disk", "fail", "; ".join(failed[:4]), "see that host's disk", BAD_MACHINE)
        return
    rate = min(one["rate"] for one in wrote if one["rate"])
    text, lasts = f"{_gb(rate)}/s a host at least", found["size"] / rate
    text += f", a checkpoint in about {lasts:.2g} s" if found["size"] else ""
    slow = lasts > SAVE_SECONDS
    yield Check("disk", "warn" if slow else "ok", text, "a faster disk, or a larger run.save_every" if slow else "")


def data(runtime: "Runtime", config: Config, names: list[str], seconds: float) -> Iterator[Check]:
    """Reachable and the same from every rank; its tokenizer that of the checkpoint. All ranks."""
    seen = runtime.channel.gather(within(seconds / 2, lambda: look(config)))
    bad = [f"{who}: {one['error']}" for who, one in zip(names, seen, strict=True) if "error" in one]
    if bad:
        yield Check("data", "fail", "; ".join(bad[:4]), "put it where every host sees it, by its absolute path",
                    BAD_DATA)  # fmt: skip
        return
    other = [who for who, one in zip(names, seen, strict=True) if one["hash"] != seen[0]["hash"]]
    if other:
        yield Check("data", "fail", f"data.input={config.data.input}: {', '.join(other[:4])} see(s) other content than"
                    " rank 0", "the same copy on every host", BAD_DATA)  # fmt: skip
        return
    yield Check("data", "ok", seen[0]["what"])
    said = runtime.channel.gather(within(seconds / 2, lambda: tokenizer(config, seen[0])) if runtime.is_main else {})[0]
    if "error" in said:
        yield Check("tokenizer", "fail", said["error"], "data and checkpoint that belong together", said["code"])
    else:
        yield Check("tokenizer", said["grade"], said["text"], said["remedy"])


def look(config: Config) -> dict[str, Any]:
    """What this rank sees of the data; raises UserError or OSError where it cannot be read."""
    from dist_lm.remote import is_remote
    from dist_lm.shards import MANIFEST, TokenShards, find_prepared
    from dist_lm.sources import find_sources
    from dist_lm.text import Tokenizer

    for folder in (Path(config.data.input), Path(config.run.dir, "data")):
        if find_prepared(folder):
            train, _ = TokenShards(folder, "train"), TokenShards(folder, "val")  # every shard has its size
            length, stride = config.data.seq_len, config.data.stride or config.data.seq_len
            if sequences := sum(train.counts(length, stride)):
                train.read([0, sequences - 1], length, stride)
            facts, own = train.manifest["tokenizer"], Tokenizer.load(folder)
            return {"what": f"{folder}: prepared, {sum(train.sizes):,} tokens to train on", "folder": str(folder),
                    "hash": hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(), "sha256": own.sha256,
                    "manifest": facts["sha256"], "size": own.vocab_size,
                    "spec": train.manifest["settings"]["tokenizer"]}  # fmt: skip
    named = config.data.named_sources()
    raw = {name: spec for name, spec in named.items() if not find_prepared(spec.input)}
    sources = [source for name, spec in raw.items() for source in find_sources(spec, config.data.field_of(name))]
    for source in sources:
        if source.path and not is_remote(source.path):
            with open(source.path, "rb") as file:
                file.read(1)
    listed = json.dumps([[source.name, source.size] for source in sources])
    total = _gb(sum(source.size for source in sources))
    where, local = ", ".join(spec.input for spec in named.values()), all(source.path for source in sources)
    text = f"{len(sources)} file(s), {total}" if local else "a hub dataset, not looked at"
    return {"what": f"{where}: {text}", "hash": hashlib.sha256(listed.encode()).hexdigest()}


def tokenizer(config: Config, seen: dict[str, Any]) -> dict[str, Any]:
    """Whether tokenizer, prepared data and the checkpoints that would be gone on from belong together."""
    from dist_lm.checkpoint import step_folders, tokenizer_hash
    from dist_lm.text import Tokenizer, is_trained_spec

    spec, ok = config.data.tokenizer, {"grade": "ok", "remedy": ""}
    if "sha256" not in seen:
        if is_trained_spec(spec):
            return ok | {"text": f"{spec}: made from the text as a run begins"}
        if not Path(spec).exists():
            return ok | {"text": f"{spec}: from the hub, not looked at"}
        own, size = Tokenizer.load(spec).sha256, Tokenizer.load(spec).vocab_size
    else:
        own, size = seen["sha256"], seen["size"]
        if own != seen["manifest"]:
            return _wrong(f"{seen['folder']}/tokenizer.json is not the one that the folder was prepared with", BAD_DATA)
    folders = step_folders(Path(config.run.dir))[-1:]
    if config.run.init_from and Path(config.run.init_from).is_dir():
        folders += [Path(config.run.init_from), *step_folders(Path(config.run.init_from))[-1:]]
    for folder in folders:
        if tokenizer_hash(folder) not in (None, own):
            return _wrong(f"{folder} was trained with another tokenizer than data.input={config.data.input} has",
                          BAD_DATA)  # fmt: skip
    text = f"{size:,} tokens" + (f", as {folders[0]}" if folders else "")
    if (used := seen.get("spec", spec)) != spec:
        text += f"; prepared with data.tokenizer={used}, which stands, not {spec}"
        return {"grade": "warn", "text": text, "remedy": f"--data.tokenizer {used}"}
    return ok | {"text": text}


def _wrong(text: str, code: int) -> dict[str, Any]:
    return {"error": text, "code": code}


def within(seconds: float, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` finds, or {"error": why} if it fails or does not end in time (a hanging mount holds a thread)."""
    outcome: dict[str, Any] = {"error": f"no answer within {seconds:g} s", "code": BAD_MACHINE}

    def run() -> None:
        try:
            made = work()
            outcome.clear()
            outcome.update(made)
        except UserError as error:
            outcome.update(error=str(error), code=error.code)
        except Exception as error:
            outcome.update(error=_line(error), code=BAD_MACHINE)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return dict(outcome)


def best_of(turns: int, work: Callable[[], Any]) -> float:
    """Seconds of the fastest turn, after one to warm up."""
    times = []
    for _ in range(turns + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _gb(number: float) -> str:
    return f"{number / 1e9:.3g} GB"


if __name__ == "__main__":
    run_entry(main)
