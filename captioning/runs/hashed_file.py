"""Files of tensors written a block at a time, hashed on the way.

No call here holds the interpreter over more than a few bytes, so that a training loop in another thread runs on. The
libraries' own functions make the whole file in memory first: with 300 MB they stop all threads for a second and more.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20  # bytes: still in the processor's cache when they are written after they were hashed
# torch's names of types -> safetensors', in the order in which a file holds them
_DTYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32", "int32": "I32",
    "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class HashedFile:
    """A new file that counts and hashes what is written to it."""

    def __init__(self, path: Path):
        self._file, self._digest, self.size = path.open("wb"), hashlib.sha256(), 0
        self._error: OSError | None = None

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # ``finish`` has raised it
            self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Errors of the disk are raised by ``finish``: torch.save calls this from C++, where they would be lost."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self._digest.update(block)
            if self._error is None:
                try:
                    self._file.write(block)
                except OSError as error:
                    self._error = error
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """``finish`` does it; torch.save calls this too."""

    def finish(self) -> str:
        """Put all of it on the disk. Returns its sha256, in hexadecimal.

        Raises:
            OSError: when the disk did not take it.
        """
        if self._error is not None:
            raise self._error
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()


def write_safetensors(file: HashedFile, tensors: "dict[str, Tensor]") -> None:
    """The very bytes that safetensors.torch.save makes (https://github.com/huggingface/safetensors#format)."""
    order = list(_DTYPES)
    kind = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (order.index(kind[name]), name))
    header: dict[str, Any] = {}
    start = 0
    for name in names:
        end = start + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _DTYPES[kind[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(_bytes_of(tensors[name]))


def _bytes_of(tensor: "Tensor") -> memoryview:
    """The memory of a tensor, row by row; copied only if it lies there in another order, or on another device."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_torch(file: HashedFile, value: Any) -> None:
    """What torch.save makes of ``value``. It lets other threads run while it adds up a tensor's checksum."""
    import torch

    torch.save(value, file)  # type: ignore[arg-type]  # has what torch.save asks for
