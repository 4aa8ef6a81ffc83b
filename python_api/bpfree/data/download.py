"""Downloads into the user cache, with a known checksum and a progress bar for every file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bpfree._extras import train_extra
from bpfree.data.dataset import DataError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_CHUNK = 1 << 18  # bytes between two steps of the progress bar


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be downloaded: its address and the SHA-256 sum of its content."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        """The file's name, the last part of its address."""
        return self.url.rsplit("/", 1)[-1]


def fetch(dataset: str, files: Sequence[RemoteFile]) -> Path:
    """Bring a data set's files into the user cache; what is there and whole is left alone.

    Args:
        dataset: name of the data set and of its folder in the cache.
        files: what to download.

    Returns:
        The folder that holds the files.

    Raises:
        DataError: a download failed, or its checksum is not the known one.
        MissingExtraError: pooch or rich is not installed.
    """
    with train_extra("Downloading a data set"):
        import pooch
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
    folder = Path(pooch.os_cache("bpfree")) / dataset
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for file in files:
            bar = _DownloadBar(progress, file.name)
            downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=_CHUNK)
            try:
                pooch.retrieve(file.url, file.sha256, file.name, folder, downloader=downloader)
            except (OSError, ValueError) as error:  # no connection, no space; wrong checksum
                raise DataError(
                    f"{file.name} of {dataset} could not be downloaded from {file.url} ({error}): "
                    "try again, or put the data set's files into a folder and name that with "
                    "--data-dir or $BPFREE_DATA."
                ) from error
    return folder


class _DownloadBar:
    """A bar of rich's in the form that pooch drives (tqdm's)."""

    def __init__(self, progress: Progress, name: str) -> None:
        self.total = 0
        self._progress = progress
        self._name = name
        self._task: TaskID | None = None

    def update(self, size: int) -> None:
        """`size` more bytes are there. The bar appears with the first of them."""
        if self._task is None:
            self._task = self._progress.add_task(self._name)
        self._progress.update(self._task, total=self.total or None, advance=size)

    def reset(self) -> None:
        """Back to 0 bytes; pooch does so before it sets the final size."""
        if self._task is not None:
            self._progress.reset(self._task)

    def close(self) -> None:
        """Nothing to do: the bars end together."""
