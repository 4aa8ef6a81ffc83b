"""``python -m bpfree_kernels``: the doctor."""

import sys

from bpfree_kernels.doctor import main

sys.exit(main())
