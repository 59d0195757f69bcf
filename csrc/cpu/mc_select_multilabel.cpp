// mc_select_multilabel on the CPU: from the logits of P passes to confidence, std, positives and negatives of each
// class of each sample, every one judged by itself.
//
//   p = sigmoid(z), q = sigmoid(z / temp); mean and M2 over the passes by Welford
//   positive: mean_p >= tau_p and M2_p < kappa_p^2 (P - 1)
//   negative: mean_q <  tau_n and M2_q < kappa_n^2 (P - 1)
//
// Never materialized: a probability of any pass. A thread works through blocks of rows. As classes do not know each
// other, a block of dense rows is a single row of all their classes, so that vectors are full however few these are.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../math/row_stats.h"
#include "../tensors.h"
#include "isa.h"
#include "scratch.h"

namespace ups {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kMaxLanes = 16;  // of any instruction set, so many may be touched behind the classes of a block

template <class S, class T>
struct MultilabelArgs {
  const S* logits;  // [P, N, C], the last dimension dense
  const S* end;     // behind the last of them
  int64_t stride_p, stride_n;
  int64_t P, N, C;
  int64_t rows;     // of a block; several only where rows are dense
  const T* limits;  // [4, limits_stride]: tau_p, M2_p, tau_n, M2_n of each class of a block
  int64_t limits_stride;
  const T* inv_k;  // [P], 1 / 1, 1 / 2, ...
  T inv_temp;
  T* confidence;   // [N, C]
  T* deviation;    // [N, C]
  void* positive;  // bool [N, C], or int32 [N, ceil(C / 32)]
  void* negative;
  bool packed;
};

// bytes [n], each 0 or 1, as bits: word w holds bytes 32 w and up. So many as a multiple of 8 are read.
inline void pack_bytes(const uint8_t* bytes, int64_t n, uint32_t* words) {
  for (int64_t first = 0; first < n; first += 32) {
    uint32_t word = 0;
    for (int64_t i = 0; i < 32 && first + i < n; i += 8) {
      uint64_t eight;
      __builtin_memcpy(&eight, bytes + first + i, sizeof eight);
      uint32_t bits = 0;  // of each byte its lowest
      for (int b = 0; b < 8; ++b) bits |= static_cast<uint32_t>(eight >> (8 * b) & 1) << b;
      word |= bits << i;
    }
    if (n - first < 32) word &= (1u << (n - first)) - 1;
    words[first / 32] = word;
  }
}

}  // namespace ups

#define UPS_ISA_SOURCE "mc_select_multilabel.inl"
#include "each_isa.h"

namespace ups {
namespace {

struct Numbers {
  double tau_p, tau_n, kappa_p, kappa_n;
};

// Of each class of a block of `rows` rows; what is behind the last one is there and never used.
template <class T>
std::vector<T> block_limits(const Numbers& numbers, const Tensor& of_class, int64_t passes, int64_t C, int64_t rows,
                            int64_t stride) {
  const Thresholds<T> all =
      make_thresholds<T>(numbers.tau_p, numbers.tau_n, numbers.kappa_p, numbers.kappa_n, 1, passes);
  std::vector<T> limits(4 * stride);
  const T* const values = of_class.defined() ? data<const T>(of_class) : nullptr;  // tau_p, tau_n, kappa_p, kappa_n
  for (int64_t c = 0; c < C; ++c) {
    const T four[] = {values ? values[c] : all.tau_p, values ? m2_limit_of(values[2 * C + c], passes) : all.limit_p,
                      values ? values[C + c] : all.tau_n,
                      values ? m2_limit_of(values[3 * C + c], passes) : all.limit_n};
    for (int64_t row = 0; row < rows; ++row) {
      for (int i = 0; i < 4; ++i) limits[i * stride + row * C + c] = four[i];
    }
  }
  return limits;
}

template <class S, class T>
void select(const Tensor& logits, const Numbers& numbers, const Tensor& of_class, double temp_nl, bool packed,
            const std::tuple<Tensor, Tensor, Tensor, Tensor>& result) {
  const auto& [confidence, deviation, positive, negative] = result;
  const int64_t P = logits.size(0), N = logits.size(1), C = logits.size(2);
  const bool dense = N == 1 || logits.stride(1) == C;
  // Multiples of 16 rows make whole vectors; some thousand classes stay in the first-level cache.
  const int64_t rows = !dense || C > 256 ? 1 : kMaxLanes * std::max<int64_t>(1, 64 / C);
  const int64_t stride = rows * C + kMaxLanes;
  const std::vector<T> limits = block_limits<T>(numbers, of_class, P, C, rows, stride);
  std::vector<T> inv_k(P);
  for (int64_t pass = 0; pass < P; ++pass) inv_k[pass] = T(1) / static_cast<T>(pass + 1);
  const MultilabelArgs<S, T> args = {
      data<const S>(logits),
      data<const S>(logits) + (P - 1) * logits.stride(0) + (N - 1) * logits.stride(1) + C,
      logits.stride(0),
      logits.stride(1),
      P,
      N,
      C,
      rows,
      limits.data(),
      stride,
      inv_k.data(),
      static_cast<T>(1 / temp_nl),
      data<T>(confidence),
      data<T>(deviation),
      positive.data_ptr(),
      negative.data_ptr(),
      packed};
  const int64_t grain = 1 + 16384 / (P * rows * C);
  torch::stable::parallel_for(0, (N + rows - 1) / rows, grain, [&](int64_t begin, int64_t end) {
    UPS_ISA_CALL(mc_select_multilabel_blocks, args, begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mc_select_multilabel_cpu(const Tensor& logits_in, double tau_p, double tau_n,
                                                                    double kappa_p, double kappa_n, double temp_nl,
                                                                    bool packed,
                                                                    std::optional<Tensor> class_thresholds) {
  check_dim("logits", logits_in, 3);
  const Tensor logits = dense_rows(logits_in);
  const int64_t P = logits.size(0), N = logits.size(1), C = logits.size(2);
  UPS_CHECK(P >= 1 && C >= 1, "logits must have at least one pass and one class, got [", P, ", ", N, ", ", C, "]");
  const Tensor of_class = checked_class_thresholds(class_thresholds, logits);

  const auto result = new_multilabel_selection(logits, packed);
  if (N == 0) return result;
  dispatch_logits(logits, [&](auto storage, auto compute) {
    select<decltype(storage), decltype(compute)>(logits, {tau_p, tau_n, kappa_p, kappa_n}, of_class, temp_nl, packed,
                                                 result);
  });
  return result;
}

}  // namespace
}  // namespace ups

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CPU, m) {
  m.impl("mc_select_multilabel", TORCH_BOX(&ups::mc_select_multilabel_cpu));
}
