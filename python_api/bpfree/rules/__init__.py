"""The learning rules, one file each."""

from bpfree.rules.base import Learner
from bpfree.rules.bp import BP
from bpfree.rules.drtp import DRTP
from bpfree.rules.ekdaa import EKDAA
from bpfree.rules.gait import GAITProp
from bpfree.rules.pepita import PEPITA
from bpfree.rules.shallow import Shallow
from bpfree.rules.urfb import FRFB, URFB

__all__ = ["BP", "DRTP", "EKDAA", "FRFB", "PEPITA", "URFB", "GAITProp", "Learner", "Shallow"]
