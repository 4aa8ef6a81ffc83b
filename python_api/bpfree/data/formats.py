"""The file formats of the data sets: bytes in, checked uint8 arrays out.

Every function takes the name of the file that the bytes came from, for the sentence that a damaged
one gets.
"""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpfree.data.dataset import DataError

Bytes = NDArray[np.uint8]
"""An array of unsigned bytes: pixels or labels."""

_IDX_UNSIGNED_BYTE = 0x08
_CIFAR_IMAGE = (3, 32, 32)
_CIFAR_PIXELS = 3 * 32 * 32
_CIFAR_CLASSES = 10


def damaged(name: str, reason: str) -> DataError:
    """The error for a file that is there but not what it should be."""
    return DataError(f"{name} is damaged ({reason}): replace it with a fresh copy.")


def read_file(path: Path) -> bytes:
    """Read a file whole, unpacked as its suffix says (``.gz``, ``.xz``, or as it is).

    Raises:
        DataError: it cannot be read, or does not unpack.
    """
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            content: bytes = file.read()
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise damaged(str(path), str(error)) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): check its permissions."
        ) from error
    return content


def read_tar_members(path: Path, members: Sequence[str]) -> list[bytes]:
    """Read named files out of a packed ``.tar.gz`` without unpacking it to the disk.

    Raises:
        DataError: the archive does not unpack, or lacks one of the members.
    """
    wanted = set(members)
    contents: dict[str, bytes] = {}
    try:
        # As a stream: the members come in one pass over the compressed file, in whatever order.
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name in wanted else None
                if file is not None:
                    contents[member.name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise damaged(str(path), str(error)) from error
    for name in members:
        if name not in contents:
            raise damaged(str(path), f"it holds no {name}")
    return [contents[name] for name in members]


def parse_idx(content: bytes, name: str, dims: int) -> Bytes:
    """Decode an IDX file of unsigned bytes with `dims` dimensions (MNIST's format).

    Returns:
        uint8, of the shape that the header gives.

    Raises:
        DataError: another type or number of dimensions, or not the length that the header gives.
    """
    magic = bytes([0, 0, _IDX_UNSIGNED_BYTE, dims])
    header = 4 + 4 * dims
    if content[:4] != magic or len(content) < header:
        raise damaged(
            name,
            f"an IDX file of {dims}-dimensional bytes begins with {magic.hex(' ')}, "
            f"this one with {content[:4].hex(' ') or 'nothing'}",
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=dims, offset=4))
    values = len(content) - header
    if values != int(np.prod(shape, dtype=np.int64)):
        raise damaged(name, f"its header promises {shape} values, but it holds {values}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def parse_cifar_binary(content: bytes, name: str) -> tuple[Bytes, Bytes]:
    """Decode a CIFAR-10 ``.bin`` file: records of one label byte and 3 × 1024 pixels.

    Returns:
        Images, uint8 [N, 3, 32, 32], and labels, uint8 [N].

    Raises:
        DataError: not a whole number of records, or a label above 9.
    """
    record = 1 + _CIFAR_PIXELS
    if not content or len(content) % record:
        raise damaged(name, f"it holds {len(content)} bytes, not a multiple of {record}")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _checked_cifar(records[:, 1:], records[:, 0], name)


def parse_cifar_pickle(content: bytes, name: str) -> tuple[Bytes, Bytes]:
    """Decode a file of CIFAR-10's Python version, as torchvision stores it.

    It is a pickle, and a pickle can run any code; this reader only makes byte arrays, lists,
    numbers and strings, and refuses everything else.

    Returns:
        Images, uint8 [N, 3, 32, 32], and labels, uint8 [N].

    Raises:
        DataError: not such a file.
    """
    try:
        batch = _ByteArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        data, labels = batch[b"data"], batch[b"labels"]
        images = data.array()
        labels = np.asarray(labels, dtype=np.uint8)
    except (
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ) as error:  # what pickle raises for arbitrary bytes
        raise damaged(name, f"it is not a CIFAR-10 batch: {error}") from error
    if images.shape != (len(labels), _CIFAR_PIXELS) or not len(labels):
        raise damaged(name, f"it holds {len(labels)} labels and pixels of shape {images.shape}")
    return _checked_cifar(images, labels, name)


def _checked_cifar(pixels: Bytes, labels: Bytes, name: str) -> tuple[Bytes, Bytes]:
    if labels.max() >= _CIFAR_CLASSES:
        raise damaged(name, f"it has a label of {labels.max()}, and CIFAR-10 has 10 classes")
    return pixels.reshape(-1, *_CIFAR_IMAGE), labels


class _PickledBytes:
    """Stands in for numpy.ndarray while a pickle is read: one array of unsigned bytes, no code."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self._content = b""
        self._order: str = "C"

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, bytes]) -> None:
        _, self._shape, _, fortran, self._content = state
        self._order = "F" if fortran else "C"

    def array(self) -> Bytes:
        """The array, C-contiguous; ValueError if the shape does not fit the bytes."""
        flat = np.frombuffer(self._content, np.uint8)
        order: Any = self._order
        return np.ascontiguousarray(flat.reshape(self._shape, order=order))


class _PickledDtype:
    """Stands in for numpy.dtype: accepts unsigned bytes and remembers nothing."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of type {code!r} instead of bytes")

    def __setstate__(self, state: object) -> None:
        pass


def _new_pickled_bytes(*_: object) -> _PickledBytes:
    return _PickledBytes()


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes in a pickle that Python 2 can read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _new_pickled_bytes,
    ("numpy._core.multiarray", "_reconstruct"): _new_pickled_bytes,
    ("numpy", "ndarray"): _PickledBytes,
    ("numpy", "dtype"): _PickledDtype,
    ("_codecs", "encode"): _encode_latin1,
}


class _ByteArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None
