"""What a data set is here, four tensors in memory, and the error when there is none."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


class DataError(RuntimeError):
    """A data set is missing or damaged; the message names the file and says what to do."""


@dataclass(frozen=True)
class Dataset:
    """A data set for classification, whole and in memory.

    Attributes:
        name: one of `bpfree.data.DATASETS`.
        train_x: training images, float32 [N, channels, height, width], in [0, 1] as loaded.
        train_y: training labels, int64 [N], in [0, classes).
        test_x: test images, like `train_x`.
        test_y: test labels, like `train_y`.
        classes: number of classes.
        source: where the files were read from.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    source: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, (channels, height, width)."""
        return tuple(self.train_x.shape[1:])

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Dataset:
        """The same data set with its tensors on `device`, the images of type `dtype`."""
        return replace(
            self,
            train_x=self.train_x.to(device, dtype),
            train_y=self.train_y.to(device),
            test_x=self.test_x.to(device, dtype),
            test_y=self.test_y.to(device),
        )

    def standardized(self) -> Dataset:
        """The same data set with every channel at mean 0 and standard deviation 1.

        Both are taken from the training images and applied to the test images too, as the DRTP
        authors' code does for CIFAR-10 (it leaves MNIST in [0, 1]).
        """
        std, mean = torch.std_mean(self.train_x, dim=(0, 2, 3), keepdim=True, correction=0)
        if not (std > 0).all():
            raise DataError(
                f"{self.name} cannot be standardised: a channel of its training images is constant."
            )
        return replace(
            self,
            train_x=self.train_x.sub(mean).div_(std),
            test_x=self.test_x.sub(mean).div_(std),
        )
