"""GPU kernels in Triton, one module per op family; the tile functions that they share lie beside them.

Every kernel works on tensors of float32, bfloat16 or float16 without gaps (maps may have their channels
last) and accumulates in float32. None uses atomics, waits for the device or allocates by value: all of
them can be captured in a CUDA graph.
Grids have at most two axes, which leaves the third to replicas of a net.
"""
