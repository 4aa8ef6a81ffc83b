// The CPU kernels. This file is compiled once per instruction set, with BPFREE_ISA naming the set and the
// compiler told to use it; kernels.h picks one table at run time.
#include "activation.h"
#include "gemm.h"

namespace bpfree::cpu::BPFREE_ISA {
namespace {

template <class T>
int64_t forward_scratch(int64_t batch) {
  return kRowBlock * padded<T>(batch);
}

template <class T>
void forward_rows(const Input<T>& x, const T* weight, const T* bias, int64_t out, T* z,
                  int64_t begin, int64_t end, T* scratch) {
  const int64_t stride = padded<T>(x.batch);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block * kRowBlock;
    const int64_t rows = out - row < kRowBlock ? out - row : kRowBlock;
    forward_block(weight + row * x.in, rows, x, scratch);
    for_columns(scratch, stride, rows, x.batch,
                [&](int64_t n, int64_t r, Vec<T> values, int64_t lanes) {
                  if (bias) values += load_lanes(bias + row + r, lanes);
                  store_lanes(z + n * out + row + r, values, lanes);
                });
  }
}

template <class T>
void forward_samples(const T* x, const Input<T>& weight, const T* bias, T* z, int64_t begin,
                     int64_t end, T* scratch) {
  const int64_t out = weight.batch, stride = padded<T>(out);
  for (int64_t n = begin; n < end; n += kRowBlock) {
    const int64_t samples = end - n < kRowBlock ? end - n : kRowBlock;
    forward_block(x + n * weight.in, samples, weight, scratch);
    for (int64_t j = 0; j < samples; ++j) {
      for_vectors<T>(out, [&](int64_t c, int64_t lanes) {
        Vec<T> values = load_lanes(scratch + j * stride + c, lanes);
        if (bias) values += load_lanes(bias + c, lanes);
        store_lanes(z + (n + j) * out + c, values, lanes);
      });
    }
  }
}

template <class T>
void update_bias(const T* signal, int64_t stride, int64_t out, int64_t batch, const Target<T>& to) {
  for_vectors<T>(out, [&](int64_t r, int64_t lanes) {
    Vec<T> total = {};
    for (int64_t n = 0; n < batch; ++n) total += load_lanes(signal + n * stride + r, lanes);
    alignas(64) T g[kLanes<T>];
    store(g, total);
    apply_tile<T>(g, kLanes<T>, 1, lanes, to.at(r), 0);
  });
}

// Row length of a block's signal: whole vectors.
template <class T>
inline constexpr int64_t kSignalStride = (kRowBlock + kLanes<T> - 1) / kLanes<T> * kLanes<T>;

template <class T>
int64_t drtp_scratch(int64_t batch) {
  // z and f'(z) by output row, the signal by sample, and what the update's ragged columns need
  return 2 * kRowBlock * padded<T>(batch) + kSignalStride<T> * batch +
         update_block_scratch<T>(batch);
}

// Activation and signal of a block: z [rows][stride] becomes output [batch][out] and signal
// [batch][kSignalStride].
template <class T>
void drtp_signal_block(const DrtpLinear<T>& layer, int64_t row, int64_t rows, T* z, T* derivative,
                       T* signal) {
  const int64_t batch = layer.x.batch, stride = padded<T>(batch);
  with_activation(layer.activation, [&]<Activation kind>() {
    for (int64_t r = 0; r < rows; ++r) {
      const T bias = layer.bias ? layer.bias[row + r] : T(0);
      for (int64_t n = r * stride; n < (r + 1) * stride; n += kLanes<T>) {
        const Activated<T> a = activate<kind, T>(load(z + n) + bias, layer.slope);
        store(z + n, a.value);
        store(derivative + n, a.derivative);
      }
    }
  });
  for_columns(z, stride, rows, batch, [&](int64_t n, int64_t r, Vec<T> values, int64_t lanes) {
    store_lanes(layer.output + n * layer.out + row + r, values, lanes);
  });
  for_columns(derivative, stride, rows, batch,
              [&](int64_t n, int64_t r, Vec<T> values, int64_t lanes) {
                const int32_t label = layer.labels[n];
                const T* feedback = layer.feedback + label * layer.out + row + r;
                const Vec<T> random = label < 0 ? Vec<T>{} : load_lanes(feedback, lanes);
                store(signal + n * kSignalStride<T> + r, random * values);
              });
}

template <class T>
void drtp_rows(const DrtpLinear<T>& layer, int64_t begin, int64_t end, T* scratch) {
  const Input<T>& x = layer.x;
  T* z = scratch;
  T* derivative = z + kRowBlock * padded<T>(x.batch);
  T* signal = derivative + kRowBlock * padded<T>(x.batch);
  T* ragged = signal + kSignalStride<T> * x.batch;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block * kRowBlock;
    const int64_t rows = layer.out - row < kRowBlock ? layer.out - row : kRowBlock;
    forward_block(layer.weight + row * x.in, rows, x, z);
    drtp_signal_block(layer, row, rows, z, derivative, signal);
    update_block(signal, kSignalStride<T>, rows, x, 0, x.in, layer.to_weight.at(row * x.in),
                 ragged);
    if (layer.to_bias.value) {
      update_bias<T>(signal, kSignalStride<T>, rows, x.batch, layer.to_bias.at(row));
    }
  }
}

// The rows of an output layer: logits in y become outputs, and *loss the sample's loss. A label below 0 is
// no class: a target of zeros.
template <class T>
void softmax_row(T* y, int64_t classes, int32_t label, T* loss) {
  T peak = y[0];
  for (int64_t c = 1; c < classes; ++c) peak = y[c] > peak ? y[c] : peak;
  const T shifted = label < 0 ? T(0) : y[label] - peak;
  Vec<T> total = {};
  for_vectors<T>(classes, [&](int64_t c, int64_t lanes) {
    const Vec<T> e = vexp<T>(load_lanes(y + c, lanes) - peak);
    store_lanes<T>(y + c, e, lanes);
    total += lanes < kLanes<T> ? first_lanes<T>(e, lanes) : e;
  });
  const T mass = sum<T>(total);
  for (int64_t c = 0; c < classes; ++c) y[c] /= mass;
  *loss = label < 0 ? T(0) : natural_log(mass) - shifted;
}

// Binary cross-entropy with logits, stable on both sides: max(z, 0) + log(1 + e^-|z|), where z changes its
// sign for the label.
template <class T>
void sigmoid_row(T* y, int64_t classes, int32_t label, T* loss) {
  if (label >= 0) y[label] = -y[label];
  Vec<T> total = {};
  for_vectors<T>(classes, [&](int64_t c, int64_t lanes) {
    const Vec<T> z = load_lanes(y + c, lanes);
    const Vec<T> terms = vmax<T>(z, Vec<T>{}) + vlog1p<T>(vexp<T>(-vabs<T>(z)));
    total += lanes < kLanes<T> ? first_lanes<T>(terms, lanes) : terms;
  });
  if (label >= 0) y[label] = -y[label];
  for_vectors<T>(classes, [&](int64_t c, int64_t lanes) {
    store_lanes<T>(y + c, vsigmoid<T>(load_lanes(y + c, lanes)), lanes);
  });
  *loss = sum<T>(total) / T(classes);
}

template <class T>
void linear_row(T* y, int64_t classes, int32_t label, T* loss) {
  T total = T(0);
  for (int64_t c = 0; c < classes; ++c) {
    const T difference = y[c] - (c == label ? T(1) : T(0));
    total += difference * difference;
  }
  *loss = total / T(classes);
}

template <class T>
void classify(Loss kind, const int32_t* labels, int64_t classes, T scale, T* output, T* error,
              T* signal, T* loss, int64_t begin, int64_t end) {
  const auto row = kind == Loss::ce    ? softmax_row<T>
                   : kind == Loss::bce ? sigmoid_row<T>
                                       : linear_row<T>;
  for (int64_t n = begin; n < end; ++n) {
    T* y = output + n * classes;
    row(y, classes, labels[n], loss + n);
    for (int64_t c = 0; c < classes; ++c) {
      const T e = y[c] - (c == labels[n] ? T(1) : T(0));
      error[n * classes + c] = e;
      signal[n * classes + c] = scale * e;
    }
  }
}

template <class T>
void update_columns(const T* signal, int64_t out, const Input<T>& x, const Target<T>& to,
                    int64_t begin, int64_t end, T* scratch) {
  const int64_t last = end * kColumns<T> < x.in ? end * kColumns<T> : x.in;
  update_block(signal, out, out, x, begin * kColumns<T>, last, to, scratch);
}

template <class T>
void signal_rows(Activation kind, T slope, const T* z, const T* feedback, const int32_t* labels,
                 int64_t size, T* y, T* signal, int64_t begin, int64_t end) {
  with_activation(kind, [&]<Activation activation>() {
    for (int64_t n = begin; n < end; ++n) {
      const T* row = labels[n] < 0 ? nullptr : feedback + labels[n] * size;
      for_vectors<T>(size, [&](int64_t i, int64_t lanes) {
        const Activated<T> a =
            activate<activation, T>(load_lanes(z + n * size + i, lanes), slope);
        const Vec<T> b = row ? load_lanes(row + i, lanes) : Vec<T>{};
        store_lanes<T>(y + n * size + i, a.value, lanes);
        store_lanes<T>(signal + n * size + i, b * a.derivative, lanes);
      });
    }
  });
}

template <class T>
void apply(const T* gradient, const Target<T>& to, int64_t begin, int64_t end) {
  apply_tile<T>(gradient + begin, 0, 1, end - begin, to.at(begin), 0);
}

}  // namespace

template <class T>
const Kernels<T>& table() {
  static const Kernels<T> kernels = {
      kPanel<T>,      kRowBlock,          kColumns<T>,       pack<T>,
      drtp_rows<T>,   drtp_scratch<T>,    forward_rows<T>,   forward_samples<T>, forward_scratch<T>,
      classify<T>,    update_columns<T>,  update_block_scratch<T>, update_bias<T>,
      signal_rows<T>, apply<T>,
  };
  return kernels;
}

template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();

}  // namespace bpfree::cpu::BPFREE_ISA
