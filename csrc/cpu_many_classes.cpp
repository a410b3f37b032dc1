// Prototype losses of many classes: a block of rows at a time through torch's matrix product.
#include <cstring>

#include "cpu_matrix.h"
#include "cpu_modality.h"

namespace pycdgkd {
namespace {

// Blocks whose products are kept together for the prototypes' gradient, which sums over rows: the
// order of that sum must not depend on the number of threads.
constexpr int64_t kBlocksTogether = 4;
constexpr int64_t kClassesTogether = 1024;

// Rows of a block: few enough that its products stay in a cache and that threads can share them
// out, enough for a matrix product to pay.
int64_t block_rows(int64_t N, int64_t K) {
  const int64_t cached = std::clamp<int64_t>((int64_t{1} << 18) / K / 16 * 16, 128, 512);
  return std::min(cached, std::max<int64_t>(32, padded(N / 4)));
}

template <class Task>
void in_parallel(int64_t tasks, const Task& task) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    task(begin, end);
  });
}

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : (dtype == Dtype::float32 ? 4 : 2);
}

void serially(int64_t count, int64_t, RangeBody body, void* context) {
  if (count > 0) body(0, count, context);
}

template <class A>
class ManyClasses {
 public:
  ManyClasses(const Modality& m, const std::vector<int32_t>& classes, void* row_loss,
              void* true_prob, const ModalityGrads& grads)
      : m_(m),
        classes_(classes),
        row_loss_(static_cast<A*>(row_loss)),
        true_prob_(static_cast<A*>(true_prob)),
        grads_(grads),
        centred_(static_cast<A*>(const_cast<void*>(m.centred))),
        rows_(block_rows(m.N, m.K)),
        blocks_((m.N + rows_ - 1) / rows_),
        loss_(static_cast<size_t>(blocks_)),
        rate_(static_cast<size_t>(blocks_)) {}

  ModalitySums run() {
    grads_.prototypes != nullptr ? run_together() : run_apart();
    return {sum_of(loss_), sum_of(rate_)};
  }

 private:
  // Room for some blocks: products (rows, K), centred features (rows, D) and their gradient.
  class Space {
   public:
    Space(int64_t rows, int64_t K, int64_t D)
        : storage_(rows * (K + 2 * D), kWide), products(static_cast<A*>(storage_.at(0))) {
      centred = products + rows * K;
      grad = centred + rows * D;
    }

   private:
    Workspace storage_;

   public:
    A *products, *centred, *grad;
  };

  static constexpr bool kWide = sizeof(A) == sizeof(double);

  static Tensor view(A* data, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t col_stride = 1) {
    return array_view(data, rows, columns, kWide, row_stride, col_stride);
  }

  int64_t rows_of(int64_t block) const { return std::min(rows_, m_.N - block * rows_); }
  int64_t stride() const { return padded(m_.D); }
  A* prototypes() const { return centred_ + stride(); }
  const A* bias() const { return prototypes() + centred_rows(m_.K) * stride(); }
  static A* from(A* array, int64_t first) { return array == nullptr ? nullptr : array + first; }

  // One block, its arrays at place `slot` of the space.
  void block(int64_t index, Space& space, int64_t slot) {
    const int64_t first = index * rows_, rows = rows_of(index), K = m_.K, D = m_.D;
    A* z = space.centred + slot * rows_ * D;
    A* x = space.products + slot * rows_ * K;
    Matrix features = m_.features;
    features.data = static_cast<const char*>(features.data) +
                    first * features.row_stride * size_of(features.dtype);
    cpu::kernels().centre_rows({rows, D, kWide, features, classes_.data() + first, centred_, z});
    const Tensor products = view(x, rows, K, K);
    matrix_product(view(z, rows, D, D), view(prototypes(), D, K, 1, stride()), products);
    const auto* row_factor = static_cast<const A*>(grads_.row_factor);
    cpu::kernels().softmax_rows({rows, K, kWide, m_.scale, bias(), classes_.data() + first,
                                 row_factor == nullptr ? nullptr : row_factor + first, x,
                                 from(row_loss_, first), from(true_prob_, first), &loss_[index],
                                 &rate_[index]});
    if (grads_.features == nullptr) return;
    A* grad = space.grad + slot * rows_ * D;
    if (D < kThin) {
      thin_product(x, rows, grad);
    } else {
      matrix_product(products, view(prototypes(), K, D, stride()), view(grad, rows, D, D));
    }
    cpu::kernels().scale_rows(
        {rows, D, kWide, &grads_.factor, 0, grad,
         static_cast<char*>(grads_.features) + first * D * size_of(grads_.features_dtype),
         grads_.features_dtype},
        serially);
  }

  // grad = residual (rows, K) times prototypes (K, D), D < kThin, its pieces added up in double
  void thin_product(A* residual, int64_t rows, A* grad) {
    const int64_t D = m_.D;
    std::vector<double> sums(static_cast<size_t>(rows * D));
    for (int64_t first = 0; first < m_.K; first += kPiece) {
      const int64_t classes = std::min(kPiece, m_.K - first);
      matrix_product(view(residual + first, rows, classes, m_.K),
                     view(prototypes() + first * stride(), classes, D, stride()),
                     view(grad, rows, D, D));
      for (int64_t j = 0; j < rows * D; ++j) sums[j] += static_cast<double>(grad[j]);
    }
    for (int64_t j = 0; j < rows * D; ++j) grad[j] = static_cast<A>(sums[j]);
  }

  void run_apart() {
    in_parallel(blocks_, [&](int64_t begin, int64_t end) {
      Space space(rows_, m_.K, m_.D);
      for (int64_t index = begin; index < end; ++index) block(index, space, 0);
    });
  }

  void run_together() {
    Space space(kBlocksTogether * rows_, m_.K, m_.D);
    std::vector<double> residual_sums(static_cast<size_t>(m_.K));
    auto* sums = static_cast<A*>(grads_.prototypes);
    std::memset(sums, 0, static_cast<size_t>(m_.K * m_.D) * sizeof(A));
    for (int64_t first = 0; first < blocks_; first += kBlocksTogether) {
      const int64_t count = std::min(kBlocksTogether, blocks_ - first);
      in_parallel(count, [&](int64_t begin, int64_t end) {
        for (int64_t slot = begin; slot < end; ++slot) block(first + slot, space, slot);
      });
      const int64_t rows = std::min(count * rows_, m_.N - first * rows_);
      add_prototype_sums(space, rows, sums, residual_sums);
    }
    for (int64_t k = 0; k < m_.K; ++k) {
      const A* c = prototypes() + k * stride();
      for (int64_t j = 0; j < m_.D; ++j) {
        A& grad = sums[k * m_.D + j];
        grad = static_cast<A>(grads_.factor * (static_cast<double>(grad) -
                                               residual_sums[k] * static_cast<double>(c[j])));
      }
    }
  }

  // sums += residual^T (z - mean), residual_sums += residual^T 1
  void add_prototype_sums(Space& space, int64_t rows, A* sums, std::vector<double>& residual_sums) {
    const int64_t chunks = (m_.K + kClassesTogether - 1) / kClassesTogether, D = m_.D;
    in_parallel(chunks, [&](int64_t begin, int64_t end) {
      Workspace workspace(kClassesTogether * D, kWide);
      auto* product = static_cast<A*>(workspace.at(0));
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * kClassesTogether;
        const int64_t classes = std::min(kClassesTogether, m_.K - first);
        A* residual = space.products + first;
        matrix_product(view(residual, classes, rows, 1, m_.K), view(space.centred, rows, D, D),
                       view(product, classes, D, D));
        for (int64_t j = 0; j < classes * D; ++j) sums[first * D + j] += product[j];
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t k = 0; k < classes; ++k) {
            residual_sums[first + k] += static_cast<double>(residual[i * m_.K + k]);
          }
        }
      }
    });
  }

  const Modality& m_;
  const std::vector<int32_t>& classes_;
  A *row_loss_, *true_prob_;
  const ModalityGrads& grads_;
  A* centred_;
  int64_t rows_, blocks_;
  std::vector<double> loss_, rate_;
};

}  // namespace

ModalitySums many_classes(const Modality& m, const std::vector<int32_t>& classes, void* row_loss,
                          void* true_prob, const ModalityGrads& grads) {
  return m.wide ? ManyClasses<double>(m, classes, row_loss, true_prob, grads).run()
                : ManyClasses<float>(m, classes, row_loss, true_prob, grads).run();
}

void many_classes_backward(const Modality& m, const std::vector<int32_t>& classes,
                           const ModalityGrads& grads) {
  if (grads.factor != 0.0) {
    many_classes(m, classes, nullptr, nullptr, grads);
    return;
  }
  if (grads.features != nullptr) {
    std::memset(grads.features, 0, static_cast<size_t>(m.N * m.D * size_of(grads.features_dtype)));
  }
  if (grads.prototypes != nullptr) {
    std::memset(grads.prototypes, 0, static_cast<size_t>(m.K * m.D * (m.wide ? 8 : 4)));
  }
}

}  // namespace pycdgkd
