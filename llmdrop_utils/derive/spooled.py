"""What waits in a file: all tokens' streams, of which one batch at a time is read, need not be in memory at once."""

import errno
import tempfile
import weakref
from collections.abc import Iterable, MutableSequence
from typing import NamedTuple

import torch

from ..base.errors import LLMDropError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Spooled(MutableSequence[torch.Tensor]):
    """A list of tensors in CPU memory which are in a file instead, and come as copies when they are asked for.

    The file has no name, and ends with the list or the program. It is where Python puts temporary files: TMPDIR moves it. The
    system holds it in memory while there is room, so that little is waited for. Raises LLMDropError if it cannot be written.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed when this list ends
        except OSError as error:
            raise LLMDropError(f"No temporary file can be made: {error.strerror}. Set TMPDIR to a folder of yours.") from error
        weakref.finalize(self, self._file.close)
        self._places: list[_Place] = []
        self._end = 0
        self.extend(tensors)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):
        start, shape, dtype = self._places[index]
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        self._file.readinto(_bytes_of(tensor))
        return tensor

    def __setitem__(self, index, tensor):
        old = self._places[index]
        is_alike = (old.shape, old.dtype) == (tensor.shape, tensor.dtype)
        self._places[index] = self._write(old.start if is_alike else self._end, tensor)

    def __delitem__(self, index):
        del self._places[index]

    def insert(self, index: int, value: torch.Tensor) -> None:
        self._places.insert(index, self._write(self._end, value))

    def _write(self, start: int, tensor: torch.Tensor) -> "_Place":
        try:
            self._file.seek(start)
            self._file.write(_bytes_of(tensor))
            self._file.flush()
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise LLMDropError(
                f"{tempfile.gettempdir()} is full: what layers read of all samples is kept there meanwhile, gigabytes of it. "
                "Set TMPDIR to a folder of a larger disk, or give fewer samples."
            ) from error
        self._end = max(self._end, start + tensor.nbytes)
        return _Place(start, tensor.shape, tensor.dtype)


class _Place(NamedTuple):
    start: int  # in bytes
    shape: torch.Size
    dtype: torch.dtype


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
