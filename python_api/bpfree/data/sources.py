"""Which data sets there are, where each one's files may lie, and how they become a `Dataset`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bpfree._extras import train_extra
from bpfree.data.dataset import DataError, Dataset
from bpfree.data.download import RemoteFile, fetch
from bpfree.data.formats import Bytes
from bpfree.data.layouts import CIFAR_ARCHIVE, CLASSES, Split, read_cifar_folder, read_idx_folder

ENVIRONMENT = "BPFREE_DATA"
"""Environment variable that names a folder with data sets."""


@dataclass(frozen=True)
class _Files:
    """A data set that consists of files.

    Attributes:
        downloads: the files to download where there are none.
        read: reads the data set out of one folder, ``None`` if none of its files is there.
    """

    downloads: tuple[RemoteFile, ...]
    read: Callable[[Path], tuple[Split, Split] | None]


def _remote(address: str, sums: dict[str, str]) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(address + name, sha256) for name, sha256 in sums.items())


_SOURCES = {
    "mnist": _Files(
        _remote(
            # The first address, yann.lecun.com, no longer serves the files; this is PyTorch's copy.
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            {
                "train-images-idx3-ubyte.gz": (
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
                ),
                "train-labels-idx1-ubyte.gz": (
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
                ),
                "t10k-images-idx3-ubyte.gz": (
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
                ),
                "t10k-labels-idx1-ubyte.gz": (
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
                ),
            },
        ),
        partial(read_idx_folder, name="mnist", torchvision_name="MNIST"),
    ),
    "fashion-mnist": _Files(
        _remote(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            {
                "train-images-idx3-ubyte.gz": (
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
                ),
                "train-labels-idx1-ubyte.gz": (
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
                ),
                "t10k-images-idx3-ubyte.gz": (
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
                ),
                "t10k-labels-idx1-ubyte.gz": (
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
                ),
            },
        ),
        partial(read_idx_folder, name="fashion-mnist", torchvision_name="FashionMNIST"),
    ),
    "cifar-10": _Files(
        _remote(
            "https://www.cs.toronto.edu/~kriz/",
            {CIFAR_ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
        ),
        read_cifar_folder,
    ),
}

DATASETS = ("digits", *_SOURCES)
"""Names of all data sets."""


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a data set, training and test part.

    ``digits`` is embedded (scikit-learn's 8×8 handwritten digits, split 80 : 20, always alike). The
    others are looked for in `data_dir`, then in ``$BPFREE_DATA``, then in the user cache, and
    downloaded into the cache if they are in none of them. In a folder DIR the files may lie in DIR
    itself, in DIR/NAME, or as torchvision lays them out; packed or not.

    Args:
        name: one of `DATASETS`.
        data_dir: a folder to look into first.

    Returns:
        Images float32 [N, channels, height, width] in [0, 1], labels int64 [N].

    Raises:
        ValueError: unknown name.
        DataError: a file is missing or damaged, a folder does not exist, or a download failed.
        MissingExtraError: a package of the extra ``[train]`` is needed and not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"data set must be one of {', '.join(DATASETS)}, got {name!r}.")
    roots = _roots(data_dir)
    if name == "digits":
        return _load_digits()
    source = _SOURCES[name]
    for root in roots:
        splits = source.read(root)
        if splits is not None:
            return _dataset(name, splits, str(root))
    folder = fetch(name, source.downloads)
    splits = source.read(folder)
    if splits is None:
        raise DataError(f"{folder} holds no file of {name}: delete it and try again.")
    return _dataset(name, splits, str(folder))


def _roots(data_dir: str | os.PathLike[str] | None) -> list[Path]:
    """The folders to look into, in order; each must exist, so that a slip of the pen is seen."""
    named = [("data_dir (--data-dir)", data_dir), (f"${ENVIRONMENT}", os.environ.get(ENVIRONMENT))]
    roots = [(origin, Path(folder)) for origin, folder in named if folder]
    for origin, root in roots:
        if not root.is_dir():
            raise DataError(
                f"{root}, given by {origin}, is not a folder: correct or drop {origin}."
            )
    return [root for _, root in roots]


def _load_digits() -> Dataset:
    with train_extra("The digits data set"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[:, None]
    parts = train_test_split(
        images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(part.copy()) for part in parts)
    return Dataset(
        "digits", train_x, train_y.long(), test_x, test_y.long(), CLASSES, "scikit-learn"
    )


def _dataset(name: str, splits: tuple[Split, Split], source: str) -> Dataset:
    (train_x, train_y), (test_x, test_y) = splits
    return Dataset(
        name,
        _scaled(train_x),
        torch.from_numpy(train_y.astype(np.int64)),
        _scaled(test_x),
        torch.from_numpy(test_y.astype(np.int64)),
        CLASSES,
        source,
    )


def _scaled(images: Bytes) -> Tensor:
    return torch.from_numpy(images.astype(np.float32)).div_(255)
