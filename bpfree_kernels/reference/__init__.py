"""Every op in plain PyTorch, for any device and dtype: the truth that the kernels are tested against."""
