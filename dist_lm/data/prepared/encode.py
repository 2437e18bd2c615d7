"""Encode pieces of documents, here, in threads or in worker processes.

Invariant: the pieces come back in their order, each with the tokens that its text has, whatever the
number of threads or processes.

tiktoken lets other threads work while it encodes, so threads are enough for it: on two cores they
needed 0.75 of the CPU time of two processes, and less time by the clock. With `tokenizers`, other
threads wait while it makes a Python list of each text's tokens: there two processes were 1.4 x as
fast as two threads.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_lm.data.child import start_child
from dist_lm.data.tokenizer import Tokenizer

# A job is what a worker process encodes at once.
JOB_CHARACTERS = 2**20
JOB_PIECES = 2**13  # at most
JOBS_AHEAD = 2  # of the writer, per worker

SEPARATOR = b"\xff"  # between the texts of a job; it is in no UTF-8
WORKER = (
    "import sys; from dist_lm.data.prepared.encode import serve;"
    " serve(sys.argv[1], int(sys.argv[2]))"
)


class TextPiece(NamedTuple):
    """A stretch of a document that is encoded at once."""

    split: str
    place: tuple[int, int]  # number of the document in the split, and of the piece in the document
    source: int  # number of the file in the source
    row: int
    text: str
    last: bool  # whether the document ends here


def encode_pieces(
    pieces: Iterator[TextPiece], tokenizer: Tokenizer, folder: Path, processes: int
) -> Iterator[tuple[TextPiece, np.ndarray]]:
    """Pieces with their tokens, in order. Worker processes load the tokenizer from `folder`.

    `processes` says how many texts are encoded at once.
    """
    if processes == 1:
        for piece in pieces:
            (tokens,) = tokenizer.encode_arrays([piece.text])
            yield piece, tokens
        return
    jobs = _make_jobs(pieces)
    pool: EncodingThreads | WorkerPool
    if tokenizer.encodes_beside_python():
        pool = EncodingThreads(tokenizer, processes)
    else:
        pool = WorkerPool(folder, tokenizer.dtype, processes)
    waiting: deque[tuple[list[TextPiece], Future[list[np.ndarray]]]] = deque()
    try:
        while True:
            while len(waiting) < JOBS_AHEAD * processes:
                job = next(jobs, None)
                if job is None:
                    break
                waiting.append((job, pool.submit(job)))
            if not waiting:
                return
            job, encoded = waiting.popleft()
            yield from zip(job, encoded.result(), strict=True)
    finally:
        pool.close()


def _make_jobs(pieces: Iterator[TextPiece]) -> Iterator[list[TextPiece]]:
    job: list[TextPiece] = []
    size = 0
    for piece in pieces:
        job.append(piece)
        size += len(piece.text)
        if size >= JOB_CHARACTERS or len(job) >= JOB_PIECES:
            yield job
            job = []
            size = 0
    if job:
        yield job


class EncodingThreads:
    """Threads that encode beside this one."""

    def __init__(self, tokenizer: Tokenizer, number: int):
        self.tokenizer = tokenizer
        self.threads = ThreadPoolExecutor(number, "encode")

    def submit(self, job: list[TextPiece]) -> Future[list[np.ndarray]]:
        """Encode a job as soon as a thread is free."""
        texts = [piece.text for piece in job]
        return self.threads.submit(self.tokenizer.encode_arrays, texts)

    def close(self) -> None:
        """Encode nothing more; what has begun comes to its end."""
        self.threads.shutdown(cancel_futures=True)


class WorkerPool:
    """Worker processes, each fed by a thread of its own.

    A worker ends when its pipe closes, however the parent ends.
    """

    def __init__(self, folder: Path, dtype: np.dtype, processes: int):
        self.folder = folder  # holds the tokenizer
        self.dtype = dtype  # of tokens
        self.threads = ThreadPoolExecutor(processes, "encode")
        self.of_thread = threading.local()  # `worker` is the one that this thread feeds
        self.workers: list[Worker] = []

    def submit(self, job: list[TextPiece]) -> Future[list[np.ndarray]]:
        """Encode a job as soon as a worker is free."""
        return self.threads.submit(self._encode, job)

    def close(self) -> None:
        """End all workers and threads, whatever they are doing."""
        for worker in self.workers:
            worker.process.kill()
        self.threads.shutdown(cancel_futures=True)
        # A thread may have started another worker in between; that one ends when its pipe closes.
        for worker in self.workers:
            worker.pipe.close()
            worker.process.wait()

    def _encode(self, job: list[TextPiece]) -> list[np.ndarray]:
        # Not in the initializer of the thread pool, which would keep its errors to itself.
        if not hasattr(self.of_thread, "worker"):
            self.of_thread.worker = Worker(self.folder, self.dtype)
            self.workers.append(self.of_thread.worker)
        worker: Worker = self.of_thread.worker
        return worker.encode(job)


class Worker:
    """One worker process, and the pipe to it."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.dtype = dtype
        alone = {"TOKENIZERS_PARALLELISM": "false"}
        self.pipe, self.process = start_child(WORKER, str(folder), env=alone)

    def encode(self, job: list[TextPiece]) -> list[np.ndarray]:
        """The tokens of each piece."""
        texts = [piece.text.encode() for piece in job]
        try:
            self.pipe.send_bytes(SEPARATOR.join(texts))
            sizes = np.frombuffer(self.pipe.recv_bytes(), np.int64)
            tokens = np.frombuffer(self.pipe.recv_bytes(), self.dtype)
        except (EOFError, OSError) as error:
            code = self.process.wait()
            raise RuntimeError(f"an encoding process ended with exit code {code}") from error
        return np.split(tokens, np.cumsum(sizes)[:-1])


def serve(path: str, descriptor: int) -> None:
    """Encode texts that come through a pipe until it closes. The worker's side of `Worker`.

    Texts come with SEPARATOR between them. The number of tokens of each goes back, then the tokens.
    """
    tokenizer = Tokenizer.load(path)
    pipe = Connection(descriptor)
    # These errors mean that the other end is closed, or its process gone.
    with contextlib.suppress(EOFError, OSError):
        while True:
            texts = [text.decode() for text in pipe.recv_bytes().split(SEPARATOR)]
            encoded = tokenizer.encode_arrays(texts)
            sizes = np.array([len(ids) for ids in encoded])
            pipe.send_bytes(sizes.tobytes())
            pipe.send_bytes(np.concatenate(encoded).tobytes())
