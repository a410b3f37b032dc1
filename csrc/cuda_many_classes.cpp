#include "cuda_many_classes.h"

#include <algorithm>

#include "cpu_matrix.h"

namespace pycdgkd {
namespace {

// Of a block of rows: few enough that they stay in the L2 cache; but of very many classes more, so
// that the matrix products are not thin and the prototypes' gradient is not added up too often.
constexpr int64_t kProducts = int64_t{1} << 23, kMostProducts = int64_t{1} << 25;
constexpr int64_t kWorthwhileRows = 1024;

int64_t block_rows_of(int64_t N, int64_t K) {
  const int64_t rows = std::max(kProducts / K, std::min(kWorthwhileRows, kMostProducts / K));
  return std::min(std::max<int64_t>(rows, 1), std::max<int64_t>(N, 1));
}

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : (dtype == Dtype::float32 ? 4 : 2);
}

class Run {
 public:
  Run(const OnDevice& device, const ManyClasses& m, const ManyClassGrads& grads)
      : device_(device),
        m_(m),
        grads_(grads),
        bytes_(m.wide ? 8 : 4),
        stride_(padded(m.modality.D)),
        block_rows_(block_rows_of(m.N, m.K)),
        products_(device.empty({block_rows_, m.K}, type())),
        centred_(device.empty({block_rows_, m.modality.D}, type())),
        converts_(grads.features != nullptr && grads.features_dtype != arithmetic_dtype(m.wide)),
        grad_(device.output({block_rows_, m.modality.D}, type(), converts_)),
        sum_(device.output({m.K, m.modality.D}, type(), grads.prototypes != nullptr)),
        pieces_(device.output({(m.K + kPiece - 1) / kPiece, block_rows_, m.modality.D}, type(),
                              grads.features != nullptr && m.modality.D < kThin)) {}

  void all() {
    for (int64_t first = 0; first < m_.N; first += block_rows_) block(first);
    if (m_.N == 0 && grads_.prototypes != nullptr) {
      cuda::zero_async(grads_.prototypes, static_cast<size_t>(m_.K * D() * bytes_),
                       device_.stream());
    }
  }

 private:
  int64_t D() const { return m_.modality.D; }
  ScalarType type() const { return m_.wide ? ScalarType::Double : ScalarType::Float; }
  char* centred_at(int64_t element) const {
    return static_cast<char*>(m_.modality.centred) + element * bytes_;
  }
  Tensor view(void* data, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t col_stride = 1) const {
    const std::array<int64_t, 2> sizes{rows, columns}, strides{row_stride, col_stride};
    return torch::stable::from_blob(data, sizes, strides, device_.device(), type());
  }

  void block(int64_t first) {
    const int64_t rows = std::min(block_rows_, m_.N - first);
    const auto stream = device_.stream();
    void* products = products_.mutable_data_ptr();
    void* centred = centred_.mutable_data_ptr();
    cuda::centre_rows({first, rows, D(), m_.K, m_.wide, m_.modality.features, m_.labels, m_.counts,
                       centred_at(0), centred},
                      stream);
    const Tensor x = view(products, rows, m_.K, m_.K);
    matrix_product(view(centred, rows, D(), D()), view(centred_at(stride_), D(), m_.K, 1, stride_),
                   x);
    const bool need_grad = grads_.features != nullptr || grads_.prototypes != nullptr;
    cuda::softmax_rows(
        {first, rows, m_.K, m_.wide, need_grad, m_.scale,
         centred_at((1 + centred_rows(m_.K)) * stride_), m_.labels, m_.counts, grads_.factor,
         grads_.rows, products, m_.modality.row_loss, m_.modality.true_prob},
        stream);
    if (grads_.features != nullptr) feature_grad(x, first, rows);
    if (grads_.prototypes != nullptr) prototype_grad(first, rows);
  }

  void feature_grad(const Tensor& residual, int64_t first, int64_t rows) {
    char* to = static_cast<char*>(grads_.features) + first * D() * size_of(grads_.features_dtype);
    void* made = converts_ ? grad_.mutable_data_ptr() : to;
    if (D() < kThin) {
      thin_product(rows, made);
    } else {
      matrix_product(residual, view(centred_at(stride_), m_.K, D(), stride_),
                     view(made, rows, D(), D()));
    }
    if (!converts_) return;
    const cuda::Factor one{1.0, {nullptr, 0, Dtype::float32}, nullptr};
    cuda::teacher_backward({rows, D(), 0, m_.wide, one, made, to, grads_.features_dtype, nullptr},
                           device_.stream());
  }

  // made = residual times prototypes, D < kThin
  void thin_product(int64_t rows, void* made) {
    auto* residual = static_cast<char*>(products_.mutable_data_ptr());
    auto* pieces = static_cast<char*>(pieces_.mutable_data_ptr());
    int64_t count = 0;
    for (int64_t first = 0; first < m_.K; first += kPiece, ++count) {
      const int64_t classes = std::min(kPiece, m_.K - first);
      matrix_product(view(residual + first * bytes_, rows, classes, m_.K),
                     view(centred_at((1 + first) * stride_), classes, D(), stride_),
                     view(pieces + count * rows * D() * bytes_, rows, D(), D()));
    }
    Tensor sum = view(made, 1, rows * D(), rows * D());
    const std::array<int64_t, 1> over{0};
    torch::stable::sum_out(sum, view(pieces, count, rows * D(), rows * D()), over, true);
  }

  void prototype_grad(int64_t first, int64_t rows) {
    const Tensor residual = view(products_.mutable_data_ptr(), m_.K, rows, 1, m_.K);
    const Tensor z = view(centred_.mutable_data_ptr(), rows, D(), D());
    matrix_product(residual, z, sum_);
    cuda::add_prototypes({rows, D(), m_.K, m_.wide, first == 0, products_.const_data_ptr(),
                          centred_at(stride_), sum_.const_data_ptr(), grads_.prototypes},
                         device_.stream());
  }

  const OnDevice& device_;
  const ManyClasses& m_;
  const ManyClassGrads& grads_;
  int64_t bytes_, stride_, block_rows_;
  Tensor products_, centred_;
  bool converts_;  // the product is not of the features' dtype
  Tensor grad_, sum_, pieces_;
};

}  // namespace

void many_classes(const OnDevice& device, const ManyClasses& m, const ManyClassGrads& grads) {
  Run(device, m, grads).all();
}

}  // namespace pycdgkd
