"""Image-classification data sets, as tensors.

``load("digits")`` comes with scikit-learn; ``mnist``, ``fashion-mnist`` and ``cifar-10`` are read
from ``data_dir``, from ``$BPFREE_DATA``, or from the user cache, where they are downloaded to when
they are not there yet.
"""

from bpfree.data.dataset import DataError, Dataset
from bpfree.data.sources import DATASETS, load

__all__ = ["DATASETS", "DataError", "Dataset", "load"]
