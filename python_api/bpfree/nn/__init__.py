"""Modules for ordinary PyTorch training loops: no learner needed."""

from bpfree.nn.activation import SaturatedLinear, Signum
from bpfree.nn.connectivity import random_connectivity
from bpfree.nn.error_kernel import ErrorKernelConv2d, ErrorKernelLinear, TargetActivation
from bpfree.nn.feedback import (
    FeedbackConv2d,
    FeedbackLinear,
    FeedbackLocallyConnected2d,
    feedback_weights,
)
from bpfree.nn.invertible import InvertibleConv2d, InvertibleLinear
from bpfree.nn.local import LocallyConnected1d, LocallyConnected2d
from bpfree.nn.loss import MultiClassHingeLoss
from bpfree.nn.untie import untie

__all__ = [
    "ErrorKernelConv2d",
    "ErrorKernelLinear",
    "FeedbackConv2d",
    "FeedbackLinear",
    "FeedbackLocallyConnected2d",
    "InvertibleConv2d",
    "InvertibleLinear",
    "LocallyConnected1d",
    "LocallyConnected2d",
    "MultiClassHingeLoss",
    "SaturatedLinear",
    "Signum",
    "TargetActivation",
    "feedback_weights",
    "random_connectivity",
    "untie",
]
