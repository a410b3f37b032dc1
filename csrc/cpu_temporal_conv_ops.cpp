// The CPU side of temporal_conv.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu_values.h"

namespace pycdgkd {
namespace {

Strided strided(Arguments& args, const std::string& name, const Tensor& tensor,
                std::initializer_list<int64_t> sizes, const char* shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  Strided result{tensor.const_data_ptr(), {}, args.dtype(name, tensor)};
  int64_t d = 0;
  for (const int64_t size : sizes) {
    fits = fits && (size < 0 || tensor.size(d) == size);
    if (fits) result.strides[d] = tensor.stride(d);
    ++d;
  }
  if (!fits) fail(args.op(), name, shape, describe(tensor));
  return result;
}

void at_least_1(const Arguments& args, const char* name, int64_t value) {
  if (value < 1) fail(args.op(), name, "at least 1", std::to_string(value));
}

TemporalConv checked(Arguments& args, const Tensor& eeg, const Tensor& weight, const Tensor& bias,
                     int64_t pool, double slope) {
  TemporalConv c{};
  c.eeg = strided(args, "eeg", eeg, {-1, -1, -1}, "shape (B, C, L)");
  c.weight = args.matrix("weight", weight, -1, -1, "Tk");
  c.B = eeg.size(0), c.C = eeg.size(1), c.L = eeg.size(2);
  c.T = weight.size(0), c.k = weight.size(1);
  const std::string kernels = "shape (" + std::to_string(c.T) + ",)";
  const Strided b = strided(args, "bias", bias, {c.T}, kernels.c_str());
  c.bias = {b.data, 0, b.strides[0], b.dtype};
  at_least_1(args, "kernel length", c.k);
  at_least_1(args, "pool", pool);
  c.pool = pool;
  c.M = (c.L - c.k + 1) / pool;
  if (c.L < c.k || c.M < 1) {
    fail(args.op(), "eeg", "at least k + pool - 1 = " + std::to_string(c.k + pool - 1) + " samples",
         describe(eeg));
  }
  c.wide = args.wide();
  c.slope = slope;
  c.out_dtype = c.eeg.dtype;
  return c;
}

template <class T>
void round_to(const double* values, int64_t row_stride, int64_t columns, Tensor& out) {
  auto* data = static_cast<T*>(out.mutable_data_ptr());
  for (int64_t j = 0; j < out.numel(); ++j) {
    data[j] = baseline::from_arithmetic<T>(values[j / columns * row_stride + j % columns]);
  }
}

// Fills `out` with rows of `columns` values, row_stride apart.
void fill_rounded(const double* values, int64_t row_stride, int64_t columns, Tensor& out) {
  switch (out.scalar_type()) {
    case ScalarType::Double:
      return round_to<double>(values, row_stride, columns, out);
    case ScalarType::BFloat16:
      return round_to<baseline::bfloat16>(values, row_stride, columns, out);
    case ScalarType::Half:
      return round_to<baseline::float16>(values, row_stride, columns, out);
    default:
      return round_to<float>(values, row_stride, columns, out);
  }
}

Tensor temporal_conv(const Tensor& eeg, const Tensor& weight, const Tensor& bias, int64_t pool,
                     double slope) {
  Arguments args("temporal_conv");
  TemporalConv c = checked(args, eeg, weight, bias, pool, slope);
  Tensor out = empty({c.B, c.T, c.C, c.M}, eeg.scalar_type());
  c.out = out.mutable_data_ptr();
  cpu::kernels().temporal_conv(c, torch_threads);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> temporal_conv_backward(const Tensor& grad, const Tensor& eeg,
                                                          const Tensor& weight, const Tensor& bias,
                                                          int64_t pool, double slope,
                                                          bool need_eeg) {
  Arguments args("temporal_conv_backward");
  TemporalConvBackward b{checked(args, eeg, weight, bias, pool, slope), {}, nullptr, nullptr};
  const auto& [B, C, L, T, k] = std::tie(b.conv.B, b.conv.C, b.conv.L, b.conv.T, b.conv.k);
  b.grad = strided(args, "grad", grad, {B, T, C, b.conv.M}, "the shape of the result");
  Tensor grad_eeg = need_eeg ? empty({B, C, L}, eeg.scalar_type()) : empty({0}, eeg.scalar_type());
  if (need_eeg) b.grad_eeg = grad_eeg.mutable_data_ptr();
  const int64_t size = T * (k + 1), rows = B * C, block = temporal_conv_block(rows);
  std::vector<double> sums(static_cast<size_t>((rows + block - 1) / block * size));
  b.block_sums = sums.data();
  cpu::kernels().temporal_conv_backward(b, torch_threads);
  std::vector<double> total(static_cast<size_t>(size), 0.0);
  for (size_t j = 0; j < sums.size(); ++j) total[j % total.size()] += sums[j];
  Tensor grad_weight = empty({T, k}, weight.scalar_type()),
         grad_bias = empty({T}, bias.scalar_type());
  fill_rounded(total.data(), k + 1, k, grad_weight);
  fill_rounded(total.data() + k, k + 1, 1, grad_bias);
  return {grad_eeg, grad_weight, grad_bias};
}

}  // namespace
}  // namespace pycdgkd

STABLE_TORCH_LIBRARY_IMPL(pycdgkd, CPU, m) {
  m.impl("temporal_conv", TORCH_BOX(&pycdgkd::temporal_conv));
  m.impl("temporal_conv_backward", TORCH_BOX(&pycdgkd::temporal_conv_backward));
}
