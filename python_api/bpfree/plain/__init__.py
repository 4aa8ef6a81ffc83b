"""Each rule as ordinary PyTorch writes it: what the kernels are measured and tested against."""

from bpfree.plain.drtp import PlainDRTP
from bpfree.plain.ekdaa import PlainEKDAA
from bpfree.plain.gait import PlainGAIT
from bpfree.plain.pepita import PlainPEPITA
from bpfree.plain.urfb import PlainURFB

__all__ = ["PlainDRTP", "PlainEKDAA", "PlainGAIT", "PlainPEPITA", "PlainURFB"]
