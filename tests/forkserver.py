"""A process that has imported what our commands import, and forks the commands of procs.py.

Starting Python, torch, accelerate and DeepSpeed takes seconds of CPU time, and the tests start
hundreds of processes. Here this is paid once for all workers of `pytest -n`. A forked command is a
real process in a session of its own. It has the environment, arguments, directory, files and signal
handlers of a process that was just started. It ends through Python's usual exit, but for what
leave_imports() names.

A command that a fork cannot stand for is started by exec, from the same clean state:
- it is not Python's, or it asks for options of Python;
- its environment differs in a variable that was read while the modules were imported, or that
  Python, torch's C++ code or the thread libraries read when they are loaded.

No torch operation may run before a fork: threads do not survive it. So the server checks that it
has one thread.
"""

import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import selectors
import signal
import socket
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
LARGEST_REQUEST = 2**20
# Read by C code when it is loaded, so no import shows that they matter.
READ_BY_LIBRARIES = (
    "GOMP_",
    "KMP_",
    "LANG",
    "LC_",
    "LD_",
    "MALLOC_",
    "MKL_",
    "OMP_",
    "OPENBLAS_",
    "PYTHON",
    "TORCH_",
)
# What the server itself is started with. Without the first, the import of numpy starts threads.
START = {"OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
# Modules that only run in a process of their own, which is started by exec. pyarrow starts a
# thread.
NOT_IMPORTED = ("dist_lm.__main__", "dist_lm.data.text.table_parser")
# Modules that our code imports inside functions, because they are slow.
SLOW_MODULES = ("matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo")
# Modules that a forked process takes apart when it ends.
ENDED_AT_EXIT = ("__main__", "builtins", "dist_lm", "sys")


@contextmanager
def recorded_environment() -> Iterator[set[str]]:
    """The names of the environment variables that Python code asks for inside."""
    asked: set[str] = set()
    original = os._Environ.__getitem__

    def getitem(environment: Any, name: str) -> str:
        asked.add(name)
        return original(environment, name)

    os._Environ.__getitem__ = getitem  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        os._Environ.__getitem__ = original  # type: ignore[method-assign]


def only_ours(name: str) -> bool:
    """Whether a variable of the server's environment is none of the commands'."""
    return name in START or name.startswith("PYTEST_")


def import_modules(also: list[str]) -> None:
    """All of dist_lm, as it is in this checkout, and what it imports late."""
    package = importlib.import_module("dist_lm")
    assert Path(package.__path__[0]).samefile(ROOT / "dist_lm"), (
        f"dist_lm is imported from {package.__path__[0]}"
    )
    for module in pkgutil.walk_packages(package.__path__, "dist_lm."):
        if module.name not in NOT_IMPORTED:
            importlib.import_module(module.name)
    if "deepspeed" in also:
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # as dist_lm does before it imports DeepSpeed
    for name in (*SLOW_MODULES, *also):
        importlib.import_module(name)


class Server:
    """Forks commands for the pytest processes of one run, and tells who asked the pid and later the
    exit code, over a connection of its own.
    """

    def __init__(self, door: socket.socket, also: list[str]):
        self.door = door
        self.selector = selectors.DefaultSelector()
        self.askers: set[socket.socket] = set()  # one of each pytest process
        self.waiting: dict[int, socket.socket] = {}  # by pid, who may ask for the exit code
        self.started_by: dict[int, socket.socket] = {}  # by pid, until the process is reaped
        self.pidfds: dict[int, int] = {}  # by pid, until the process is reaped
        assert os.environ["PYTHONUNBUFFERED"], "open_streams() makes streams without a buffer"
        self.environment = {
            name: value for name, value in os.environ.items() if not only_ours(name)
        }
        self.can_fork = not os.path.exists("/dev/nvidiactl")  # CUDA does not survive a fork
        if self.can_fork:
            with recorded_environment() as self.asked:
                import_modules(also)
            threads = os.listdir("/proc/self/task")
            assert len(threads) == 1, (
                f"the imports started {len(threads) - 1} threads, which a fork would lose"
            )
        set_since = {
            name for name, value in os.environ.items() if self.environment.get(name) != value
        }
        self.set_by_imports = {name: os.environ[name] for name in set_since if not only_ours(name)}

    def serve(self) -> dict[str, Any]:
        """Work until the tests end. Returns in a forked process only: with what it shall run."""
        self.selector.register(self.door, selectors.EVENT_READ, self.new_asker)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj in self.selector.get_map() and (request := key.data(key.fileobj)):
                    return request

    def new_asker(self, door: socket.socket) -> None:
        asker, _ = door.accept()
        asker.send(b"ready")
        self.askers.add(asker)
        self.selector.register(asker, selectors.EVENT_READ, self.answer)

    def answer(self, asker: socket.socket) -> dict[str, Any] | None:
        """Take a request and fork; the request in the child, None in the server."""
        try:
            message, files, _, _ = socket.recv_fds(asker, LARGEST_REQUEST, 4)
        except ConnectionResetError:  # it left before it had read all
            message = b""
        if not message:
            self.asker_left(asker)
            return None
        request: dict[str, Any] = json.loads(message)
        request["cold"] = self.why_cold(request)
        pid = os.fork()
        if pid == 0:
            self.close()
            os.close(files[3])
            enter(request, files[:3])
            if not request["cold"]:
                request["env"] = {**self.set_by_imports, **request["env"]}
            return request
        for file in files[:3]:
            os.close(file)
        caller = socket.socket(fileno=files[3])
        tell(caller, {"pid": pid, "cold": request["cold"]})
        self.waiting[pid] = caller
        self.started_by[pid] = asker
        self.pidfds[pid] = os.pidfd_open(pid)
        self.selector.register(self.pidfds[pid], selectors.EVENT_READ, self.ended)
        self.selector.register(caller, selectors.EVENT_READ, self.caller_left)
        return None

    def why_cold(self, request: dict[str, Any]) -> str:
        """Why a fork cannot stand for this command, or nothing."""
        words, env = request["words"], request["env"]
        if request["cold"] or not self.can_fork:
            return request["cold"] or "there is a GPU"
        if words[0] != sys.executable or not (words[1] in ("-c", "-m") or words[1].endswith(".py")):
            return "not a plain command of Python"
        names = {
            name for name in {*env, *self.environment} if name.startswith(READ_BY_LIBRARIES)
        } | self.asked
        different = sorted(name for name in names if not self.is_equal(name, env.get(name)))
        return f"other {', '.join(different)}" if different else ""

    def is_equal(self, name: str, value: str | None) -> bool:
        """Whether the modules would have been imported in the same way with this value."""
        if name in self.set_by_imports and value == self.set_by_imports[name]:
            return True
        return value == self.environment.get(name) or name.startswith("PYTEST_")

    def ended(self, pidfd: int) -> None:
        """Tell the caller how it ended.

        It stays a zombie until the caller has read that, so its pid stays its own.
        """
        pid = next(pid for pid, known in self.pidfds.items() if known == pidfd)
        how = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert how
        self.selector.unregister(pidfd)
        code = how.si_status if how.si_code == os.CLD_EXITED else -how.si_status
        if pid in self.waiting:
            tell(self.waiting[pid], {"code": code})
        else:
            self.reap(pid)

    def caller_left(self, caller: socket.socket) -> None:
        """It has read the exit code, or does not care about it any more."""
        pid = next(pid for pid, known in self.waiting.items() if known is caller)
        self.selector.unregister(caller)
        if self.pidfds[pid] not in self.selector.get_map():
            self.reap(pid)
        self.waiting.pop(pid).close()

    def reap(self, pid: int) -> None:
        os.waitpid(pid, 0)
        os.close(self.pidfds.pop(pid))
        del self.started_by[pid]

    def asker_left(self, asker: socket.socket) -> None:
        """Its tests have ended, in whatever way: so do all that they started.

        The server itself ends with the last one.
        """
        for pid in [pid for pid, known in self.started_by.items() if known is asker]:
            for kill in (os.kill, os.killpg):
                with suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
        self.selector.unregister(asker)
        self.askers.remove(asker)
        asker.close()
        if not self.askers:
            for pid in self.pidfds:
                os.waitpid(pid, 0)
            os._exit(0)

    def close(self) -> None:
        """In a child: none of the server's files stays open."""
        self.selector.close()
        for file in self.pidfds.values():
            os.close(file)
        for connection in (self.door, *self.askers, *self.waiting.values()):
            connection.close()


def tell(caller: socket.socket, answer: dict[str, Any]) -> None:
    with suppress(ConnectionError):  # its pytest process was killed
        caller.send(json.dumps(answer).encode())


def leave_imports(held: dict[str, ModuleType]) -> None:
    """Let a child end without taking apart what the server has imported: these modules and more.

    To take a page of memory apart, a child must first copy it: that would be 0.2 s of each process.
    A child's own modules, exit handlers and objects end as in any other process.
    """
    held.update(sys.modules)
    for name in sys.modules:
        if name.partition(".")[0] in ENDED_AT_EXIT:
            del held[name]
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)  # so C's handlers of the imports, which are older, do not run
    libc.on_exit(libc.fcloseall, None)  # runs before it, and writes what C's buffers hold


def forget(held: dict[str, ModuleType]) -> None:
    """In a child, when all other exit handlers have run: Python does not look at these modules."""
    for name in held:
        sys.modules.pop(name, None)


def enter(request: dict[str, Any], files: list[int]) -> None:
    """In a child: a session, files and a directory of its own.

    The rest of its state is that of the server.
    """
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.chdir(request["cwd"])


def open_streams() -> None:
    """In a child: the streams of sys for the files that 0, 1 and 2 are now.

    What they are decides how they work.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old, writing = getattr(sys, name), number > 0
        raw = io.FileIO(number, "wb" if writing else "rb", closefd=False)
        raw.name = f"<{name}>"
        stream = io.TextIOWrapper(
            raw if writing else io.BufferedReader(raw),  # type: ignore[arg-type] # as under PYTHONUNBUFFERED
            encoding=old.encoding,
            errors=old.errors,
            newline="\n" if writing else None,
            write_through=True,
        )
        stream.mode = "w" if writing else "r"
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def default_signals() -> None:
    """What Python sets at its start, whatever was ignored or blocked where the tests started."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def execute(request: dict[str, Any]) -> NoReturn:
    """In a child: become the command."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # exec keeps what is ignored
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(request["words"][0], request["words"], request["env"])
    except OSError as error:
        print(f"{request['words'][0]}: {error}", file=sys.stderr)
        os._exit(127)


def run(request: dict[str, Any]) -> None:
    """In a child: do what Python does after its start with these words."""
    words = request["words"][1:]
    open_streams()
    os.environ.clear()
    os.environ.update(request["env"])
    show_command(request["words"])
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # random does it by itself
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.orig_argv = request["words"]
    if words[0] == "-m":
        import runpy

        sys.argv = ["-m", *words[2:]]
        sys.path[0] = os.getcwd()
        sys.modules.pop(words[1], None)
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined] # as Python does
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path[0] = ""
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).absolute().parent)
        main.__dict__.update(__file__=words[0], __cached__=None)
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)


def show_command(words: list[str]) -> None:
    """Overwrite the server's own command line, which the padding made long, so that ps and tests
    see the child's.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    line = os.fsencode(" ".join(words))[: end - start - 2]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, line, len(line))
    ctypes.memset(
        end - 1, ord("."), 1
    )  # no zero at the end tells Linux that a title was written here


def main(number: str, also: str, padding: str) -> dict[str, Any]:
    held: dict[str, ModuleType] = {}
    atexit.register(forget, held)  # the oldest handler is the last to run
    default_signals()
    os.umask(0o022)
    server = Server(socket.socket(fileno=int(number)), also.split())
    gc.collect()
    gc.freeze()  # the children share these objects and need not look through them again and again
    leave_imports(held)
    return server.serve()


if __name__ == "__main__":
    request = main(*sys.argv[1:])
    if request["cold"]:
        execute(request)
    run(request)
