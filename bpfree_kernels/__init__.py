"""bpfree-kernels: fused kernels for learning without backpropagation, on PyTorch.

The ops as functions; `bpfree` (beside this package) builds learners from them. ``python -m
bpfree_kernels`` reports what was built and what runs here.
"""

from bpfree_kernels import backends
from bpfree_kernels._version import __version__
from bpfree_kernels.activations import ACTIVATIONS
from bpfree_kernels.backends import BackendFallbackWarning, explain
from bpfree_kernels.checks import set_label_checks
from bpfree_kernels.geometry import MaxPool
from bpfree_kernels.ops.classifier import (
    ClassifierOutput,
    classifier_forward,
    classifier_grad,
    classifier_step,
    gradient_scale,
)
from bpfree_kernels.ops.conv import conv_grad, conv_step
from bpfree_kernels.ops.dense import DenseOutput, dense_forward, dense_grad, dense_step
from bpfree_kernels.ops.drtp import drtp_linear_grad, drtp_linear_step, drtp_signal
from bpfree_kernels.ops.ekdaa import (
    UPSAMPLINGS,
    ekdaa_conv_error,
    ekdaa_error,
    ekdaa_linear_error,
)
from bpfree_kernels.ops.inverse import (
    Solution,
    invert,
    orthogonal_update,
    orthogonality,
    refine_inverse,
    solve_nearly_orthogonal,
)
from bpfree_kernels.ops.invertible_conv import (
    INVERTIBLE_ACTIVATIONS,
    invertible_conv_error,
    invertible_conv_reconstruct,
)
from bpfree_kernels.ops.local_conv import (
    LocalConvOutput,
    local_conv_feedback,
    local_conv_forward,
    local_conv_grad,
    local_conv_step,
)
from bpfree_kernels.ops.local_conv_autograd import local_conv
from bpfree_kernels.ops.pepita import pepita_difference, pepita_linear_grad, pepita_linear_step
from bpfree_kernels.ops.pepita_pool import pepita_max_pool
from bpfree_kernels.ops.update import apply_update
from bpfree_kernels.update import SGD, Adam, AdamW, LayerState, ParamState

__all__ = [
    "ACTIVATIONS",
    "INVERTIBLE_ACTIVATIONS",
    "SGD",
    "UPSAMPLINGS",
    "Adam",
    "AdamW",
    "BackendFallbackWarning",
    "ClassifierOutput",
    "DenseOutput",
    "LayerState",
    "LocalConvOutput",
    "MaxPool",
    "ParamState",
    "Solution",
    "__version__",
    "apply_update",
    "backends",
    "classifier_forward",
    "classifier_grad",
    "classifier_step",
    "conv_grad",
    "conv_step",
    "dense_forward",
    "dense_grad",
    "dense_step",
    "drtp_linear_grad",
    "drtp_linear_step",
    "drtp_signal",
    "ekdaa_conv_error",
    "ekdaa_error",
    "ekdaa_linear_error",
    "explain",
    "gradient_scale",
    "invert",
    "invertible_conv_error",
    "invertible_conv_reconstruct",
    "local_conv",
    "local_conv_feedback",
    "local_conv_forward",
    "local_conv_grad",
    "local_conv_step",
    "orthogonal_update",
    "orthogonality",
    "pepita_difference",
    "pepita_linear_grad",
    "pepita_linear_step",
    "pepita_max_pool",
    "refine_inverse",
    "set_label_checks",
    "solve_nearly_orthogonal",
]
