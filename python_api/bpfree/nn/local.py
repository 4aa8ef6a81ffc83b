"""Locally connected layers: convolutions whose weights differ from place to place."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from bpfree.nn._feedback_layer import FeedbackLayer
from bpfree.nn._locally_connected import LocallyConnected
from bpfree_kernels import local_conv
from bpfree_kernels.ops.local_conv import Ints


class LocallyConnected2d(LocallyConnected):
    """A convolution of maps whose weights differ from position to position (*untied*).

    In the place of `torch.nn.Conv2d`, with its arguments, its initialisation, and zero padding::

        layer = bpfree.nn.LocallyConnected2d(3, 32, 5, padding=2, input_size=(32, 32))
        z = layer(x)                                     # [batch, 3, 32, 32] -> [batch, 32, 32, 32]

    z[:, :, i, j] is ``F.conv2d`` of the window there with ``weight[i, j].permute(3, 2, 0, 1)``. Without
    `input_size` the parameters are made at the first batch, as by torch's lazy modules: run one before
    the optimizer is made.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as
            `torch.nn.Conv2d` has them, ``"same"`` and ``"valid"`` too.
        input_size: (height, width) of the input.
        mask: bool, shaped like the weight: which connections exist. The others are set to 0 and get
            no gradient. Needs `input_size`.
        device, dtype: of the parameters.

    Attributes:
        weight: [rows, columns, kernel_h, kernel_w, in/groups, out].
        bias: [rows, columns, out], or ``None``.
        mask: a buffer, kept in the ``state_dict``; ``None`` if every connection exists.

    Raises:
        TypeError: arguments that are no ints, or a mask that is not boolean.
        ValueError: values that are not possible, or a mask of another shape.
    """

    _dims = 2

    def _convolve(self, x: Tensor) -> Tensor:
        weight = self._learning_weight()
        return local_conv(x, weight, self.bias, **self._place, groups=self.groups, mask=self.mask)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, input_size: Ints) -> Self:
        """Untie a convolution: the same function, but each position learns for itself from now on.

        Args:
            conv: the convolution; nothing of it is shared. Its kernel [out, in/groups, kernel_h,
                kernel_w] and its bias are copied to every position.
            input_size: (height, width) of its input.

        Raises:
            TypeError: something else than a `torch.nn.Conv2d`, or one with feedback weights.
            ValueError: a padding mode other than zeros, or an input smaller than the window.
        """
        if isinstance(conv, FeedbackLayer):
            raise TypeError(
                f"conv is a {type(conv).__name__}, whose feedback weights would be lost: use "
                "FeedbackLocallyConnected2d.from_conv2d."
            )
        return cls._from_tied(conv, input_size)


class LocallyConnected1d(LocallyConnected):
    """A convolution of sequences whose weights differ from position to position (*untied*).

    In the place of `torch.nn.Conv1d`; everything else as `LocallyConnected2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as
            `torch.nn.Conv1d` has them.
        input_size: length of the input.
        mask, device, dtype: as `LocallyConnected2d` has them.

    Attributes:
        weight: [positions, kernel, in/groups, out].
        bias: [positions, out], or ``None``.
        mask: a buffer, kept in the ``state_dict``; ``None`` if every connection exists.

    Raises:
        TypeError, ValueError: as `LocallyConnected2d`.
    """

    _dims = 1

    def _convolve(self, x: Tensor) -> Tensor:
        weight = self._learning_weight()[None, :, None]
        bias = None if self.bias is None else self.bias.unsqueeze(0)
        mask = None if self.mask is None else self.mask[None, :, None]
        maps = local_conv(
            x.unsqueeze(2), weight, bias,
            **self._place, groups=self.groups, mask=mask,
        )  # fmt: skip
        return maps.squeeze(2)

    @classmethod
    def from_conv1d(cls, conv: nn.Conv1d, input_size: Ints) -> Self:
        """Untie a convolution of sequences, as `LocallyConnected2d.from_conv2d` does one of maps.

        Args:
            conv: the convolution; nothing of it is shared.
            input_size: length of its input.

        Raises:
            TypeError: something else than a `torch.nn.Conv1d`.
            ValueError: a padding mode other than zeros, or an input shorter than the window.
        """
        return cls._from_tied(conv, input_size)
