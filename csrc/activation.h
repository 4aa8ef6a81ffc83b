// The activations by name (bpfree_kernels/activations.py has the table of them).
#pragma once

namespace bpfree {

enum class Activation { identity, relu, leaky_relu, tanh, sigmoid, hardtanh, sign };

}  // namespace bpfree
