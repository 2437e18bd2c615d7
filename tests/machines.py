"""Hosts and a Slurm cluster on this machine, for real.

Hosts are network namespaces on a bridge. The cluster is slurmctld, slurmd and munged. A host has an
address, a host name, a folder of its own (`private`) and a link that can be cut. All other files
are shared. Everything is taken down at the end, also after a failure. This needs root, iproute2
and, for Slurm, slurm-wlm and munge.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.procs import ROOT, Process, clean_env, free_port

HEAD_ADDRESS = 254


def needs(*programs: str) -> None:
    """Skip where these tests cannot run. CI has all of it, see .ci/run."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for network namespaces")
    missing = [
        name
        for name in programs
        if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install -y slurm-wlm munge iproute2")


def sh(*command: str, check: bool = True) -> str:
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=admin_env()
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
    return done.stdout


def admin_env(**more: str) -> dict[str, str]:
    return clean_env(
        **{**more, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"}
    )


def until(true: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


class Host:
    """A network namespace with one interface on the bridge, and namespaces of its own for mounts
    and the host name.
    """

    def __init__(self, net: "Network", number: int):
        self.name, self.number, self.net = f"node{number}", number, net
        self.space, self.link = f"{net.id}n{number}", f"{net.id}v{number}"
        self.address = net.address(number + 1)
        sh("ip", "netns", "add", self.space)
        sh(
            "ip",
            "link",
            "add",
            self.link,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.space,
        )
        sh("ip", "link", "set", self.link, "master", net.bridge, "up")
        for command in (
            f"addr add {self.address}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
        ):
            sh("ip", "-n", self.space, *command.split())
        mounts = f"mount -t tmpfs none {net.private} && mount --bind {net.hosts} /etc/hosts"
        setup = f"hostname {self.name} && {mounts}"
        self.holder = Process(
            [
                "ip",
                "netns",
                "exec",
                self.space,
                "unshare",
                "--uts",
                "sh",
                "-c",
                f"{setup} && exec sleep infinity",
            ],
            env=admin_env(),
            stdout=None,
            stderr=None,
        )
        until(
            lambda: self.run("hostname", check=False).strip() == self.name, 10, f"{self.name} is up"
        )

    @property
    def enter(self) -> list[str]:
        core = str(
            sorted(os.sched_getaffinity(0))[self.number % len(os.sched_getaffinity(0))]
        )  # a host has one
        return [
            "taskset",
            "-c",
            core,
            "nsenter",
            "-t",
            str(self.holder.pid),
            "-m",
            "-n",
            "-u",
            "--",
        ]

    def run(self, *command: str, check: bool = True) -> str:
        return sh(*self.enter, *command, check=check)

    def start(self, *command: str, **env: str) -> tuple[Process, Path]:
        """The process, and the file that gets what it prints.

        nsenter starts in /, so give absolute paths.
        """
        said = self.net.folder / f"{self.name}-{secrets.token_hex(4)}.out"
        with open(said, "w") as out:
            process = Process([*self.enter, *command], env=admin_env(**env), stdout=out, stderr=out)
        return process, said

    def cut(self) -> None:
        sh("ip", "link", "set", self.link, "down")

    def mend(self) -> None:
        sh("ip", "link", "set", self.link, "up")

    def pids(self, pattern: str) -> list[int]:
        """Processes here whose command line has the pattern, zombies aside."""
        found = []
        for pid in sh("ip", "netns", "pids", self.space, check=False).split():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                dead = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except OSError:
                continue
            if re.search(pattern, line) and not dead:
                found.append(int(pid))
        return found

    def lose(self) -> None:
        """All processes end at once, but for the one that keeps the namespaces."""
        for pid in sh("ip", "netns", "pids", self.space).split():
            if int(pid) != self.holder.pid:
                kill(int(pid))

    def close(self) -> None:
        for pid in sh("ip", "netns", "pids", self.space, check=False).split():
            kill(int(pid))
        kill(self.holder.pid)
        self.holder.wait()
        sh("ip", "netns", "del", self.space, check=False)
        sh("ip", "link", "del", self.link, check=False)


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class Network:
    def __init__(self, folder: Path, hosts: int):
        self.id = "d" + secrets.token_hex(3)
        self.bridge, self.folder, self.subnet = (
            f"{self.id}b",
            folder,
            f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}",
        )
        self.private, self.hosts = folder / "private", folder / "hosts"
        self.private.mkdir(parents=True)
        names = "".join(f"{self.address(n + 1)} node{n}\n" for n in range(hosts))
        self.hosts.write_text(f"127.0.0.1 localhost\n{self.address(HEAD_ADDRESS)} head\n{names}")
        self.nodes: list[Host] = []

    def address(self, number: int) -> str:
        return f"{self.subnet}.{number}"

    def up(self, hosts: int) -> None:
        sh("ip", "link", "add", self.bridge, "type", "bridge")
        sh("ip", "addr", "add", f"{self.address(HEAD_ADDRESS)}/24", "dev", self.bridge)
        sh("ip", "link", "set", self.bridge, "up")
        for number in range(hosts):
            self.nodes.append(Host(self, number))

    def close(self) -> None:
        for host in self.nodes:
            host.close()
        sh("ip", "link", "del", self.bridge, check=False)


@contextmanager
def network(folder: Path, hosts: int = 2) -> Iterator[Network]:
    needs("ip", "nsenter", "unshare")
    net = Network(folder, hosts)
    try:
        net.up(hosts)
        yield net
    finally:
        net.close()


# --- Slurm

CONF = """
ClusterName=test
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=30
MessageTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 OverSubscribe=EXCLUSIVE MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF OverSubscribe=EXCLUSIVE \
MaxTime=INFINITE
"""


class Slurm:
    """A controller on this machine and a slurmd on each host."""

    def __init__(self, net: Network):
        self.net, self.folder = net, net.folder
        self.daemons: dict[str, Process] = {}
        conf = CONF.format(head=net.address(HEAD_ADDRESS), port=free_port(), folder=self.folder)
        conf += "".join(
            f"NodeName={h.name} NodeAddr={h.address} CPUs=2 State=UNKNOWN\n" for h in net.nodes
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)

    def up(self) -> None:
        at = self.folder
        self.spawn(
            "munged",
            "--foreground",
            "--force",
            f"--socket={at}/munge.socket",
            f"--key-file={at}/munge.key",
            f"--pid-file={at}/munged.pid",
            f"--log-file={at}/munged.log",
            f"--seed-file={at}/munged.seed",
        )
        until((at / "munge.socket").exists, 10, "munged is up")
        as_head = ("unshare", "--uts", "sh", "-c", 'hostname head && exec "$0" "$@"')
        self.spawn("slurmctld", "-D", "-f", f"{at}/slurm.conf", enter=as_head)
        for host in self.net.nodes:
            self.start_node(host)
        until(self.idle, 60, "all nodes idle: " + str(at / "slurmctld.log"))

    def spawn(self, name: str, *arguments: str, enter: tuple[str, ...] = (), key: str = "") -> None:
        with open(self.folder / f"{key or name}.out", "ab") as out:
            self.daemons[key or name] = Process(
                [*enter, name, *arguments], stdout=out, stderr=out, env=self.env()
            )

    def start_node(self, host: Host) -> None:
        arguments = ("-D", "-N", host.name, "-f", f"{self.folder}/slurm.conf")
        self.spawn("slurmd", *arguments, enter=tuple(host.enter), key=host.name)

    def lose(self, host: Host) -> None:
        host.lose()
        self.daemons.pop(host.name).wait()

    def env(self, **more: str) -> dict[str, str]:
        return admin_env(SLURM_CONF=str(self.folder / "slurm.conf"), **more)

    def ask(self, *command: str, check: bool = True, **env: str) -> str:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.env(**env),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
        return done.stdout

    def idle(self) -> bool:
        states = self.ask("sinfo", "-h", "-N", "-p", "low", "-o", "%t", check=False).split()
        return len(states) == len(self.net.nodes) and set(states) == {"idle"}

    def submit(self, *arguments: str, **env: str) -> str:
        """sbatch from the checkout, as a user would; the job's number."""
        said = self.ask(
            "sbatch",
            "--parsable",
            f"--output={self.folder}/job-%j.out",
            *arguments,
            PYTHON=sys.executable,
            **env,
        )
        return said.strip().split("\n")[-1]

    def field(self, job: str, name: str) -> str:
        found = re.search(rf"\b{name}=(\S*)", self.ask("scontrol", "show", "job", job, check=False))
        return found[1] if found else ""

    def said(self, job: str) -> str:
        file = self.folder / f"job-{job}.out"
        return file.read_text() if file.exists() else ""

    def wait(
        self,
        job: str,
        seconds: float = 150,
        state: str = "COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL",
    ) -> str:
        until(
            lambda: re.fullmatch(state, self.field(job, "JobState")),
            seconds,
            f"job {job} {state}\n{self.said(job)}",
        )
        return self.field(job, "JobState")

    def close(self) -> None:
        if "slurmctld" in self.daemons:
            self.ask("scancel", "--full", "--user=root", check=False)
        for daemon in reversed(self.daemons.values()):
            daemon.kill()
            daemon.wait()


@contextmanager
def slurm(folder: Path, hosts: int = 2) -> Iterator[Slurm]:
    needs("ip", "nsenter", "unshare", "slurmctld", "slurmd", "munged", "sbatch")
    with network(folder, hosts) as net:
        cluster = Slurm(net)
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.close()
