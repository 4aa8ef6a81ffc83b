"""Where the files of a data set may lie in a folder, and how they become images and labels.

The readers return ``None`` if a folder holds none of the data set's files, and raise `DataError` if
it holds some but not all of them, or damaged ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bpfree.data.dataset import DataError
from bpfree.data.formats import (
    Bytes,
    damaged,
    parse_cifar_binary,
    parse_cifar_pickle,
    parse_idx,
    read_file,
    read_tar_members,
)

CLASSES = 10
"""Number of classes of every data set here."""

CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
"""CIFAR-10 as one file, the form in which it is downloaded."""

Split = tuple[Bytes, Bytes]
"""Images, uint8 [N, channels, height, width], and labels, uint8 [N]."""

_IDX_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_CIFAR_MEMBERS = tuple(f"cifar-10-batches-bin/{batch}.bin" for batch in _CIFAR_BATCHES)

# SHA-256 of the training labels: data sets whose files are named alike are told apart by it.
_WHOSE_LABELS = {
    "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13": "mnist",
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7": "fashion-mnist",
}


def _locate(folder: Path, stems: Sequence[str], suffixes: Sequence[str]) -> list[Path] | None:
    """One file for each stem, with whichever suffix; None if the folder holds none of them."""
    found = {
        stem: next((p for s in suffixes if (p := folder / (stem + s)).is_file()), None)
        for stem in stems
    }
    if not any(found.values()):
        return None
    for stem, path in found.items():
        if path is None:
            names = " or ".join(stem + suffix for suffix in suffixes)
            raise DataError(
                f"{names} is missing in {folder}, where other files of the data set are: "
                "put it there, or move them away to have the data set downloaded."
            )
    return [path for path in found.values() if path is not None]


def read_idx_folder(root: Path, name: str, torchvision_name: str) -> tuple[Split, Split] | None:
    """Read MNIST or a data set of its form: four IDX files, plain or ``.gz``.

    Args:
        root: the folder DIR: the files lie in DIR/`name`, DIR/`torchvision_name`/raw or DIR itself.
        name: the data set's name here.
        torchvision_name: the data set's name in torchvision.

    Returns:
        The training and the test part.
    """
    for folder in (root / name, root / torchvision_name / "raw", root):
        paths = _locate(folder, _IDX_STEMS, ("", ".gz"))
        if paths is None:
            continue
        train_x, train_y, test_x, test_y = (
            parse_idx(read_file(path), str(path), dims)
            for path, dims in zip(paths, (3, 1, 3, 1), strict=True)
        )
        _refuse_other_data(name, train_y, paths[1])
        return (
            _checked_idx(train_x, train_y, paths[:2]),
            _checked_idx(test_x, test_y, paths[2:]),
        )
    return None


def _checked_idx(images: Bytes, labels: Bytes, paths: Sequence[Path]) -> Split:
    if images.shape[1:] != (28, 28):
        raise damaged(str(paths[0]), f"its images have shape {images.shape[1:]}, not (28, 28)")
    if len(images) != len(labels) or not len(labels):
        raise damaged(
            str(paths[1]), f"it holds {len(labels)} labels for the {len(images)} of {paths[0].name}"
        )
    if labels.max() >= CLASSES:
        raise damaged(str(paths[1]), f"it has a label of {labels.max()}, above 9")
    return images[:, None], labels


def _refuse_other_data(name: str, labels: Bytes, path: Path) -> None:
    """MNIST and Fashion-MNIST name their files alike: tell from the labels which these are."""
    whose = _WHOSE_LABELS.get(hashlib.sha256(labels.tobytes()).hexdigest(), name)
    if whose != name:
        raise DataError(
            f"{path} belongs to {whose}, not to {name}: "
            f"name a folder that holds the files of {name}."
        )


def read_cifar_folder(root: Path) -> tuple[Split, Split] | None:
    """Read CIFAR-10: binary files, plain or ``.xz``, or their archive, or torchvision's pickles.

    Args:
        root: the folder DIR: the files lie in DIR/cifar-10 or DIR itself, or below one of them in
            the folder that the official archive unpacks to.

    Returns:
        The training and the test part.
    """
    base = root / "cifar-10"
    for folder in (base, base / "cifar-10-batches-bin", root / "cifar-10-batches-bin", root):
        paths = _locate(folder, _CIFAR_BATCHES, (".bin", ".bin.xz"))
        if paths is not None:
            return _joined([parse_cifar_binary(read_file(path), str(path)) for path in paths])
    for archive in (base / CIFAR_ARCHIVE, root / CIFAR_ARCHIVE):
        if archive.is_file():
            contents = read_tar_members(archive, _CIFAR_MEMBERS)
            return _joined(
                [
                    parse_cifar_binary(content, f"{member} in {archive}")
                    for content, member in zip(contents, _CIFAR_MEMBERS, strict=True)
                ]
            )
    for folder in (base / "cifar-10-batches-py", root / "cifar-10-batches-py", root):
        paths = _locate(folder, _CIFAR_BATCHES, ("",))
        if paths is not None:
            return _joined([parse_cifar_pickle(read_file(path), str(path)) for path in paths])
    return None


def _joined(batches: Sequence[Split]) -> tuple[Split, Split]:
    """The training batches as one, and the test batch, which comes last."""
    *train, test = batches
    images = np.concatenate([batch[0] for batch in train])
    labels = np.concatenate([batch[1] for batch in train])
    return (images, labels), test
