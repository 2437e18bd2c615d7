"""Host memory that checkpoints are copied into.

It is used again by all checkpoints of a run, because page faults of new memory would cost as much
as the copy. For a GPU its pages are locked, so that the GPU copies at full speed.
"""

import threading

import torch
from torch import Tensor

_FP32_BYTES = 4


class HostMemory:
    """A flat fp32 tensor of any size that is asked for; it grows where it must."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._is_locked = False
        self._making: threading.Thread | None = None

    def make_ahead(self, elements: int) -> None:
        """Begin to make room, beside what the caller does next. Locking takes seconds."""
        device = torch.cuda.current_device()

        def grow() -> None:
            torch.cuda.set_device(device)  # a thread begins with the first GPU
            self._grow(elements)

        # A daemon, so that it ends with a crash elsewhere.
        self._making = threading.Thread(target=grow, name="host memory", daemon=True)
        self._making.start()

    def of(self, elements: int) -> Tensor:
        """Room for as many elements. What was in it before may still be there."""
        if self._making:
            self._making.join()
            self._making = None
        self._grow(elements)
        return self._bytes[: _FP32_BYTES * elements].view(torch.float32)

    def _grow(self, elements: int) -> None:
        size = _FP32_BYTES * elements
        if size <= self._bytes.numel():
            return
        self._release()
        self._bytes = torch.empty(size, dtype=torch.uint8)
        if torch.cuda.is_available():
            # Not torch's own pinned memory, which rounds sizes up to a power of two.
            self._is_locked = _cuda("cudaHostRegister", self._bytes.data_ptr(), size, 0)

    def _release(self) -> None:
        """Give the memory back before more is taken."""
        if self._is_locked:
            _cuda("cudaHostUnregister", self._bytes.data_ptr())
            self._is_locked = False
        self._bytes = torch.empty(0, dtype=torch.uint8)


def _cuda(function: str, *arguments: int) -> bool:
    """Call CUDA's runtime. Whether it did as asked: without locked pages a copy is only slower."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = getattr(runtime, function)(*arguments)
    return int(error) == 0
