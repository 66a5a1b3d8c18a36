"""Objects sent to processes of this machine: a pickle, and a file of their tensors, which all of them map into memory.

Pages of the file are in memory once, however many processes read them; a process that writes to a tensor gets its own
copy of the page.
"""

from __future__ import annotations

import io
import mmap
import pickle
import tempfile
from typing import IO, Any

import cloudpickle
import torch
from torch.storage import TypedStorage, UntypedStorage

from autoprune.evaluators import Context, Evaluator
from autoprune.files.access import brief

_ALIGNMENT = 64  # of PyTorch's own memory: kernels may run other code where it is less
_SMALL = 2**12  # bytes of storages that stay in the pickle


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """Pickles by value what no import finds, and writes the memory of tensors to a file, each once."""

    def __init__(self, stream: IO[bytes], file: IO[bytes]) -> None:
        super().__init__(stream)
        self._file = file
        self._places: dict[int, tuple[int, int]] = {}
        self._alive: list[UntypedStorage] = []  # so that no other memory gets an address that is known

    def persistent_id(self, obj: Any) -> Any:
        """Place of a storage in the file, with its type where it has one; None for what is pickled."""
        typed = isinstance(obj, TypedStorage)
        if not typed and not isinstance(obj, UntypedStorage):
            return None
        storage = obj._untyped_storage if typed else obj
        if storage.device.type != "cpu" or storage.nbytes() < _SMALL:
            return None
        address = storage.data_ptr()
        if address not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._places[address] = self._file.tell(), storage.nbytes()
            self._file.write(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data)
            self._alive.append(storage)
        return (*self._places[address], obj.dtype if typed else None)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], memory: mmap.mmap | None) -> None:
        super().__init__(stream)
        self._memory = memory
        self._made: dict[int, UntypedStorage] = {}

    def persistent_load(self, pid: tuple[int, int, torch.dtype | None]) -> Any:
        """Storage in the mapped file; places that were equal stay one storage."""
        offset, size, dtype = pid
        if offset not in self._made:
            assert self._memory is not None
            values = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=offset)
            self._made[offset] = _of(values, size)
        storage = self._made[offset]
        if dtype is None:
            return storage
        return TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]  # of torch


def _of(values: torch.Tensor, size: int) -> UntypedStorage:
    """The storage of values that lie somewhere in a buffer, which begins where the buffer does."""
    storage = values.untyped_storage()
    assert storage.nbytes() == size
    return storage


class Parcel:
    """A pickle with the file of its tensors, which has no name and ends with the last process that has it open.

    Args:
        parts: Anything that cloudpickle takes.
    """

    def __init__(self, parts: Any) -> None:
        self.file = tempfile.TemporaryFile(prefix="autoprune-")  # noqa: SIM115  kept until `close`
        stream = io.BytesIO()
        try:
            _Pickler(stream, self.file).dump(parts)
        except BaseException:  # raised again
            self.close()
            raise
        self.file.flush()
        self.pickled = stream.getvalue()

    def close(self) -> None:
        """Close the file here."""
        self.file.close()


def opened(pickled: bytes, descriptor: int) -> Any:
    """Make the parts of a parcel from its pickle and the open file; a write to a tensor stays in this process."""
    with open(descriptor, "rb") as file:
        filled = file.seek(0, io.SEEK_END) > 0
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if filled else None
    return _Unpickler(io.BytesIO(pickled), memory).load()


def parcel_of(evaluator: Evaluator, context: Context) -> Parcel:
    """Pack an evaluator and its context.

    Raises:
        TypeError: If something in it cannot be pickled; names the argument.
    """
    try:
        return Parcel((evaluator, context))
    except Exception as error:  # a user's object may raise anything when it is pickled
        parts = {"evaluator": evaluator, "metric": context.judge, "data": context.subsets, "forward": context.forward}
        for name, part in {**parts, "space": context.space, "model": context.model}.items():
            if (why := _why_unpicklable(part)) is not None:
                raise TypeError(
                    f"{name} must be something that cloudpickle can send to other processes, but it cannot "
                    f"({brief(why)}); keep locks, files, sockets and generators out of it, or leave workers= out"
                ) from error
        raise


def _why_unpicklable(part: Any) -> Exception | None:
    try:
        Parcel(part).close()
    except Exception as error:  # as above
        return error
    return None
