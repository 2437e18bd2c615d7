"""data.encode."""

import contextlib
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_lm.data.tokenizer import SEPARATOR, Tokenizer


def serve(path: str, descriptor: int) -> None:
    """A worker of preparing: texts come with SEPARATOR between them; how many tokens each has, and these, go back."""
    tokenizer, pipe = Tokenizer.load(path), Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):  # the other end is closed, or its process is gone
        while True:
            ids = tokenizer.encode_batch(
                [text.decode() for text in pipe.recv_bytes().split(SEPARATOR)]
            )
            pipe.send_bytes(np.array([len(i) for i in ids]).tobytes())
            pipe.send_bytes(np.concatenate([np.array(i, tokenizer.dtype) for i in ids]).tobytes())


JOB, JOB_PIECES = 2**20, 2**13  # characters, and texts at most, in one job of an encoding process


WORKER = "import sys; from dist_lm.data.encode import serve; serve(sys.argv[1], int(sys.argv[2]))"


class TextPiece(NamedTuple):
    """A stretch of a document, encoded at once; its place counts documents of the split and pieces of the document."""

    split: str
    place: tuple[int, int]
    source: int
    row: int
    text: str
    last: bool


def _jobs(pieces: Iterator[TextPiece]) -> Iterator[list[TextPiece]]:
    job: list[TextPiece] = []
    size = 0
    for piece in pieces:
        job.append(piece)
        size += len(piece.text)
        if size >= JOB or len(job) >= JOB_PIECES:
            yield job
            job, size = [], 0
    if job:
        yield job


def _encode(
    pieces: Iterator[TextPiece], tokenizer: Tokenizer, folder: Path, processes: int
) -> Iterator[tuple[TextPiece, np.ndarray]]:
    """Pieces with their tokens, in order; texts go in jobs to worker processes, a few jobs ahead of the writer."""
    if processes == 1:
        for piece in pieces:
            yield piece, np.array(tokenizer.encode(piece.text), tokenizer.dtype)
        return
    # Workers are plain subprocesses, each fed by a thread: nothing is pickled, the caller's main module is not imported
    # again, a worker ends when its pipe closes, however the parent ends, and Ctrl-C reaches the parent alone.
    path = os.pathsep.join(
        [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-P", "-c", WORKER, str(folder)]
    workers: list[tuple[Connection, subprocess.Popen[bytes]]] = []
    own = threading.local()

    def start() -> None:
        here, there = Pipe()
        try:
            with there:
                own.worker = subprocess.Popen(
                    [*command, str(there.fileno())],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    pass_fds=[there.fileno()],
                    process_group=0,
                )
        except OSError as error:
            here.close()
            raise RuntimeError(f"an encoding process could not be started: {error}") from error
        own.pipe = here
        workers.append((own.pipe, own.worker))

    def encode(job: list[TextPiece]) -> list[np.ndarray]:
        if not hasattr(own, "pipe"):  # not the pool's initializer, which keeps its errors to itself
            start()
        try:
            own.pipe.send_bytes(SEPARATOR.join(piece.text.encode() for piece in job))
            sizes, tokens = (
                np.frombuffer(own.pipe.recv_bytes(), kind) for kind in (np.int64, tokenizer.dtype)
            )
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"an encoding process ended with exit code {own.worker.wait()}"
            ) from error
        return np.split(tokens, np.cumsum(sizes)[:-1])

    pool, jobs = ThreadPoolExecutor(processes, "encode"), _jobs(pieces)
    waiting: deque[tuple[list[TextPiece], Future[list[np.ndarray]]]] = deque()
    try:
        while True:
            while len(waiting) < 2 * processes and (job := next(jobs, None)) is not None:
                waiting.append((job, pool.submit(encode, job)))
            if not waiting:
                return
            job, future = waiting.popleft()
            yield from zip(job, future.result(), strict=True)
    finally:
        for _, worker in workers:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        for pipe, worker in workers:  # one that was started in between ends with its pipe
            pipe.close()
            worker.wait()
