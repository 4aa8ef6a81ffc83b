"""bpfree: learning without backpropagation, on PyTorch.

::

    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 1000), nn.Tanh(), nn.Linear(1000, 10))
    learner = bpfree.DRTP(model, torch.optim.Adam(model.parameters(), lr=1.5e-4))
    learner.fit((x, y), epochs=10, batch_size=60, validation=(x_test, y_test))

The kernels are in `bpfree_kernels`; this package makes learners of them.
"""

from bpfree import checkpoint, diagnostics, nn
from bpfree.losses import LOSSES
from bpfree.mirroring import WeightMirroring
from bpfree.results import BatchInfo, EpochResult, EvalResult, StepResult
from bpfree.rules import BP, DRTP, EKDAA, FRFB, PEPITA, URFB, GAITProp, Learner, Shallow
from bpfree_kernels import __version__

__all__ = [
    "BP",
    "DRTP",
    "EKDAA",
    "FRFB",
    "LOSSES",
    "PEPITA",
    "URFB",
    "BatchInfo",
    "EpochResult",
    "EvalResult",
    "GAITProp",
    "Learner",
    "Shallow",
    "StepResult",
    "WeightMirroring",
    "__version__",
    "checkpoint",
    "diagnostics",
    "nn",
]
