"""Data sets: every layout and packing, damaged and missing files, and the download."""

from __future__ import annotations

import gzip
import http.server
import io
import lzma
import os
import pickle
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from bpfree import data
from bpfree.data import DataError, formats, sources
from bpfree.data.download import RemoteFile

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
rng = np.random.default_rng(0)
IMAGES = {
    "train": rng.integers(0, 256, (7, 28, 28), dtype=np.uint8),
    "t10k": rng.integers(0, 256, (3, 28, 28), dtype=np.uint8),
}
LABELS = {"train": np.arange(7, dtype=np.uint8), "t10k": np.array([9, 0, 4], np.uint8)}
PIXELS = rng.integers(0, 256, (6, 2, 3072), dtype=np.uint8)
CIFAR_LABELS = rng.integers(0, 10, (6, 2), dtype=np.uint8)


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No data of this machine, and an error instead of a download that a test did not ask for."""
    monkeypatch.delenv("BPFREE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    nowhere = {
        name: replace(
            source,
            downloads=tuple(
                RemoteFile(f"http://127.0.0.1:9/{file.name}", file.sha256)
                for file in source.downloads
            ),
        )
        for name, source in sources._SOURCES.items()
    }
    monkeypatch.setattr(sources, "_SOURCES", nowhere)


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_files() -> dict[str, bytes]:
    files = {}
    for part in ("train", "t10k"):
        files[f"{part}-images-idx3-ubyte"] = idx(IMAGES[part])
        files[f"{part}-labels-idx1-ubyte"] = idx(LABELS[part])
    return files


def cifar_bins() -> dict[str, bytes]:
    records = np.concatenate([CIFAR_LABELS[..., None], PIXELS], axis=2)
    return {f"{name}.bin": block.tobytes() for name, block in zip(BATCHES, records, strict=True)}


def cifar_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    batch = {b"data": pixels, b"labels": labels, b"batch_label": b"one", b"filenames": [b"a.png"]}
    return pickle.dumps(batch, protocol=2)


def cifar_pickles() -> dict[str, bytes]:
    pairs = zip(PIXELS, CIFAR_LABELS, strict=True)
    blocks = [cifar_pickle(pixels, labels.tolist()) for pixels, labels in pairs]
    return dict(zip(BATCHES, blocks, strict=True))


def write(
    folder: Path, files: dict[str, bytes], suffix: str = "", pack: Callable[[bytes], bytes] = bytes
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / (name + suffix)).write_bytes(pack(content))
    return folder


def write_cifar_archive(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in sorted(cifar_bins().items(), reverse=True):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def check_idx(dataset: data.Dataset, name: str = "mnist") -> None:
    assert (dataset.name, dataset.classes, dataset.input_shape) == (name, 10, (1, 28, 28))
    assert dataset.train_x.dtype == torch.float32
    assert dataset.train_y.dtype == torch.int64
    torch.testing.assert_close(dataset.train_x[:, 0] * 255, torch.tensor(IMAGES["train"]).float())
    torch.testing.assert_close(dataset.test_x[:, 0] * 255, torch.tensor(IMAGES["t10k"]).float())
    assert dataset.train_y.tolist() == LABELS["train"].tolist()
    assert dataset.test_y.tolist() == LABELS["t10k"].tolist()


def check_cifar(dataset: data.Dataset) -> None:
    assert (dataset.name, dataset.classes, dataset.input_shape) == ("cifar-10", 10, (3, 32, 32))
    train = torch.tensor(PIXELS[:5].reshape(10, 3, 32, 32)).float()
    torch.testing.assert_close(dataset.train_x * 255, train)
    assert dataset.train_y.tolist() == CIFAR_LABELS[:5].flatten().tolist()
    test = torch.tensor(PIXELS[5].reshape(2, 3, 32, 32)).float()
    torch.testing.assert_close(dataset.test_x * 255, test)
    assert dataset.test_y.tolist() == CIFAR_LABELS[5].tolist()


def test_digits_are_embedded_and_always_split_alike() -> None:
    first, second = data.load("digits"), data.load("digits")
    assert first.input_shape == (1, 8, 8)
    assert (len(first.train_x), len(first.test_x)) == (1437, 360)
    assert first.train_x.min() == 0
    assert first.train_x.max() == 1
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_y, second.test_y)
    share = first.test_y.bincount() / (first.test_y.bincount() + first.train_y.bincount())
    assert ((share > 0.18) & (share < 0.22)).all()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
def test_idx_layouts(tmp_path: Path, folder: str, suffix: str) -> None:
    write(tmp_path / folder, idx_files(), suffix, gzip.compress if suffix else bytes)
    check_idx(data.load("mnist", tmp_path))


def test_fashion_mnist_has_its_own_folders(tmp_path: Path) -> None:
    write(tmp_path / "FashionMNIST" / "raw", idx_files())
    check_idx(data.load("fashion-mnist", tmp_path), "fashion-mnist")


@pytest.mark.parametrize("folder", ["", "cifar-10", "cifar-10-batches-bin"])
@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_cifar_binary_layouts(tmp_path: Path, folder: str, suffix: str) -> None:
    write(tmp_path / folder, cifar_bins(), suffix, lzma.compress if suffix else bytes)
    check_cifar(data.load("cifar-10", tmp_path))


def test_cifar_archive_is_read_packed(tmp_path: Path) -> None:
    write_cifar_archive(tmp_path / "cifar-10")
    check_cifar(data.load("cifar-10", tmp_path))
    assert [path.name for path in (tmp_path / "cifar-10").iterdir()] == ["cifar-10-binary.tar.gz"]


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-py"])
def test_torchvisions_cifar_pickles(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder, cifar_pickles())
    check_cifar(data.load("cifar-10", tmp_path))


def test_pickled_array_in_column_order() -> None:
    images, _ = formats.parse_cifar_pickle(cifar_pickle(np.asfortranarray(PIXELS[0]), [1, 2]), "x")
    assert np.array_equal(images.reshape(2, 3072), PIXELS[0])


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("harmful",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({b"data": _Harmful(), b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": PIXELS[0].astype(np.float32), b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.array([_Harmful()]), b"labels": [1]}, protocol=2),
        pickle.dumps({b"labels": [1, 2]}, protocol=2),
        pickle.dumps([1, 2, 3], protocol=2),
        pickle.dumps({b"data": 1, b"labels": [1, 2]}, protocol=2),
        cifar_pickle(PIXELS[0], [1, 2, 3]),
        cifar_pickle(PIXELS[0], [1, 300]),
        cifar_pickle(PIXELS[0], [1, 10]),
        cifar_pickle(PIXELS[0][:0], []),
        cifar_pickle(PIXELS[0], [1, 2])[:-100],
        b"not a pickle",
        b"",
    ],
)
def test_a_pickle_that_is_no_cifar_batch_is_refused_and_runs_nothing(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data_batch_1 is damaged"):
        formats.parse_cifar_pickle(content, "data_batch_1")
    assert not (tmp_path / "harmful").exists()


def test_data_dir_comes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "env", idx_files())
    files = idx_files() | {"t10k-labels-idx1-ubyte": idx(np.array([1, 1, 1], np.uint8))}
    write(tmp_path / "dir", files)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("BPFREE_DATA", str(tmp_path / "env"))
    named = data.load("mnist", tmp_path / "dir")
    assert (named.test_y.tolist(), named.source) == ([1, 1, 1], str(tmp_path / "dir"))
    check_idx(data.load("mnist"))
    check_idx(data.load("mnist", tmp_path / "empty"))


def test_unknown_name_and_missing_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="one of digits, mnist, fashion-mnist, cifar-10, got 'svh"):
        data.load("svhn")
    with pytest.raises(DataError, match=r"nowhere, given by data_dir \(--data-dir\), is not"):
        data.load("mnist", tmp_path / "nowhere")
    monkeypatch.setenv("BPFREE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere, given by \$BPFREE_DATA, is not a folder"):
        data.load("mnist")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, idx_files())
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte or .*\.gz is missing in .*: put"):
        data.load("mnist", tmp_path)
    write(tmp_path / "cifar-10", cifar_bins())
    (tmp_path / "cifar-10" / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin or test_batch\.bin\.xz is missing in"):
        data.load("cifar-10", tmp_path)


@pytest.mark.parametrize(
    ("part", "content", "reason"),
    [
        ("train-images-idx3-ubyte", b"", "this one with nothing"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "begins with"),
        ("train-images-idx3-ubyte", idx(IMAGES["train"])[:-1], "promises"),
        ("train-images-idx3-ubyte", idx(IMAGES["train"]) + b"\0", "promises"),
        ("train-images-idx3-ubyte", idx(LABELS["train"]), "begins with 00 00 08 03, this one with"),
        ("train-images-idx3-ubyte", b"\0\0\x0d\x03" + idx(IMAGES["train"])[4:], "begins with"),
        ("train-images-idx3-ubyte", idx(IMAGES["train"][:, :27]), r"shape \(27, 28\)"),
        ("t10k-labels-idx1-ubyte", idx(LABELS["t10k"][:2]), "2 labels for the 3 of t10k-images"),
        ("t10k-labels-idx1-ubyte", idx(LABELS["t10k"] + np.uint8(1)), "a label of 10"),
    ],
)
def test_a_damaged_idx_file_is_named_with_the_reason(
    tmp_path: Path, part: str, content: bytes, reason: str
) -> None:
    write(tmp_path, idx_files() | {part: content})
    with pytest.raises(DataError, match=f"{part} is damaged .*{reason}.*fresh copy"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:-9], lambda b: b[:60] + b"XX" + b[62:], lambda _: b"no"]
)
def test_a_gz_file_that_does_not_unpack(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    write(tmp_path, idx_files(), ".gz", gzip.compress)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:-9], lambda b: b[:90] + b"XX" + b[92:], lambda _: b"no"]
)
def test_an_xz_file_that_does_not_unpack(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    write(tmp_path, cifar_bins(), ".xz", lzma.compress)
    path = tmp_path / "data_batch_3.bin.xz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=r"data_batch_3\.bin\.xz is damaged"):
        data.load("cifar-10", tmp_path)


def test_cifar_files_of_a_wrong_size_or_with_a_wrong_label(tmp_path: Path) -> None:
    write(tmp_path, cifar_bins() | {"data_batch_2.bin": b"\0" * 3072})
    with pytest.raises(DataError, match=r"data_batch_2\.bin is damaged .*3072 bytes, not a mult"):
        data.load("cifar-10", tmp_path)
    write(tmp_path, {"data_batch_2.bin": b"\x0a" * 3073})
    with pytest.raises(DataError, match=r"data_batch_2\.bin is damaged .*label of 10"):
        data.load("cifar-10", tmp_path)


def test_a_truncated_or_incomplete_archive(tmp_path: Path) -> None:
    path = write_cifar_archive(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz is damaged"):
        data.load("cifar-10", tmp_path)
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(DataError, match=r"it holds no cifar-10-batches-bin/data_batch_1\.bin"):
        data.load("cifar-10", tmp_path)


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read .*: check its permissions"):
        formats.read_file(tmp_path)  # a folder: what open() refuses whoever runs the test


def test_standardized_uses_the_training_images(tmp_path: Path) -> None:
    write(tmp_path, cifar_bins())
    plain = data.load("cifar-10", tmp_path)
    dataset = plain.standardized()
    mean, std = dataset.train_x.mean((0, 2, 3)), dataset.train_x.std((0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(3))
    shift = plain.train_x.mean((0, 2, 3), keepdim=True)
    scale = plain.train_x.std((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(dataset.test_x, (plain.test_x - shift) / scale)
    with pytest.raises(DataError, match="cannot be standardised"):
        replace(plain, train_x=torch.zeros_like(plain.train_x)).standardized()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def do_GET(self) -> None:
        _Quiet.requests.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A local web server: the folder that it serves, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    _Quiet.requests = []
    handler = partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_address[1]}/"
        httpd.shutdown()


def serve_mnist(folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, idx_files(), ".gz", gzip.compress)
    downloads = tuple(
        RemoteFile(address + path.name, sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.iterdir())
    )
    mnist = replace(sources._SOURCES["mnist"], downloads=downloads)
    monkeypatch.setitem(sources._SOURCES, "mnist", mnist)


def test_download_into_the_cache_once(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_mnist(*server, monkeypatch)
    check_idx(data.load("mnist"))
    assert len(_Quiet.requests) == 4
    check_idx(data.load("mnist"))
    assert len(_Quiet.requests) == 4
    cache = Path(data.load("mnist").source)
    assert cache.is_relative_to(os.environ["XDG_CACHE_HOME"])
    (cache / "t10k-images-idx3-ubyte.gz").write_bytes(b"spoiled")
    check_idx(data.load("mnist"))
    assert len(_Quiet.requests) == 5


def test_a_download_with_another_checksum_is_refused(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_mnist(*server, monkeypatch)
    write(server[0], {"t10k-images-idx3-ubyte.gz": b"something else"})
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz .*could not .*does not match"):
        data.load("mnist")
    cached = Path(os.environ["XDG_CACHE_HOME"]).rglob("t10k-images*")
    assert not list(cached)


def test_a_download_that_fails_says_where_to_put_the_files() -> None:
    with pytest.raises(DataError, match=r"cifar-10-binary.* could not be downloaded .*--data-dir"):
        data.load("cifar-10")


def test_download_of_cifar_is_one_archive(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = server
    content = write_cifar_archive(folder).read_bytes()
    remote = RemoteFile(address + "cifar-10-binary.tar.gz", sha256(content).hexdigest())
    cifar = replace(sources._SOURCES["cifar-10"], downloads=(remote,))
    monkeypatch.setitem(sources._SOURCES, "cifar-10", cifar)
    check_cifar(data.load("cifar-10"))
