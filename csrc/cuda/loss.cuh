// What nce_loss and ups_loss share: the softmax of a row, its NCE and gradient, and sums over rows. The formulas are
// those of math/loss_row.h. A lane takes every kThreadsPerRow-th class, so any C fits any team; a row is read from
// memory once, for its softmax, and again from the cache for what follows.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>

#include "../math/loss_row.h"
#include "element.cuh"
#include "plan.h"
#include "team.cuh"

namespace ups::cuda {

// Losses and sums are float32, but float64 for float64 logits.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

// bool [N, C], or bits of 32-bit words [N, ceil(C / 32)]; null, and then never read, where there is no mask.
struct Mask {
  const void* data;
  int64_t row_stride;  // in elements
  bool packed;

  __device__ __forceinline__ bool at(int64_t row, int c) const {
    if (packed) return static_cast<const unsigned*>(data)[row * row_stride + c / 32] >> (c % 32) & 1u;
    return static_cast<const bool*>(data)[row * row_stride + c];
  }
};

// The largest logit, which class has it (the lowest of a tie), and the sum of exp(z - top) over all other classes.
template <class A>
struct RowSummary {
  A top;
  A rest;
  int top_class;

  __device__ __forceinline__ void add(A z, int c) {
    const A e = z == top ? A(1) : std::exp(-std::fabs(z - top));  // -inf twice is a tie, not NaN
    if (z > top) {
      rest = (1 + rest) * e;
      top = z;
      top_class = c;
    } else {
      rest += e;
    }
  }
};

struct MergeSummaries {
  template <class A>
  __device__ __forceinline__ RowSummary<A> operator()(RowSummary<A> a, RowSummary<A> b) const {
    const bool a_leads = a.top > b.top || (a.top == b.top && a.top_class < b.top_class);
    const A shrink = a.top == b.top ? A(1) : std::exp(-std::fabs(a.top - b.top));
    const A rest_of_a_leading = a.rest + (1 + b.rest) * shrink;
    const A rest_of_b_leading = b.rest + (1 + a.rest) * shrink;
    return {a_leads ? a.top : b.top, a_leads ? rest_of_a_leading : rest_of_b_leading,
            a_leads ? a.top_class : b.top_class};
  }
};

// The softmax of one row. Its probabilities are NaN where a logit is NaN or the largest one is infinite.
template <class A>
struct Softmax {
  A top;
  A rest;
  A inv_sum;
  int top_class;

  __device__ __forceinline__ A p(A z, int c) const { return c == top_class ? inv_sum : std::exp(z - top) * inv_sum; }
  __device__ __forceinline__ A not_p(A p, int c) const { return c == top_class ? rest * inv_sum : 1 - p; }
};

template <class T, int kThreadsPerRow>
__device__ __forceinline__ Softmax<Acc<T>> softmax_of(const T* z /* [C] */, int classes, Team<kThreadsPerRow>& team) {
  using A = Acc<T>;
  RowSummary<A> row = {A(-INFINITY), 0, INT_MAX};
  for (int c = team.lane(); c < classes; c += kThreadsPerRow) row.add(to_acc(z[c]), c);
  row = team.reduce(row, MergeSummaries{});
  const A sum = 1 + row.rest + 0 * row.top;  // 0 * inf is NaN
  return {row.top, row.rest, 1 / sum, row.top_class};
}

// Over a row's masked classes: their number, the sum of -log(1 - p), the sum of w = p / (1 - p) without the top class.
template <class A>
struct MaskedSums {
  A nll;
  A others_w;
  int count;

  // The row's loss, 0 without a mask.
  __device__ __forceinline__ A nce() const { return nll / (static_cast<A>(count) + A(kNceEps)); }
};

struct AddMaskedSums {
  template <class A>
  __device__ __forceinline__ MaskedSums<A> operator()(const MaskedSums<A>& a, const MaskedSums<A>& b) const {
    return {a.nll + b.nll, a.others_w + b.others_w, a.count + b.count};
  }
};

// All lanes must reach this. `wanted`: false leaves the sums empty, and so does a mask that is null.
template <bool kForward, class T, int kThreadsPerRow>
__device__ __forceinline__ MaskedSums<Acc<T>> masked_sums(const T* z /* [C] */, int classes, const Mask& mask,
                                                          int64_t row, bool wanted, const Softmax<Acc<T>>& softmax,
                                                          Team<kThreadsPerRow>& team) {
  using A = Acc<T>;
  MaskedSums<A> sums = {0, 0, 0};
  wanted = wanted && mask.data != nullptr;
  for (int c = team.lane(); wanted && c < classes; c += kThreadsPerRow) {
    if (!mask.at(row, c)) continue;
    const A p = softmax.p(to_acc(z[c]), c);
    const A not_p = softmax.not_p(p, c);
    sums.count += 1;
    if constexpr (kForward) {
      sums.nll -= std::log(not_p < A(kNceEps) ? A(kNceEps) : not_p);  // NaN stays NaN
    } else if (c != softmax.top_class) {
      sums.others_w += p / not_p;
    }
  }
  return team.reduce(sums, AddMaskedSums{});
}

// Of a row as target, over its classes but the top one: their sum, and sum of t (top - z) over all.
template <class A>
struct TargetSums {
  A others;
  A cross;
};

struct AddTargetSums {
  template <class A>
  __device__ __forceinline__ TargetSums<A> operator()(const TargetSums<A>& a, const TargetSums<A>& b) const {
    return {a.others + b.others, a.cross + b.cross};
  }
};

// All lanes must reach this. target(c) is that of class c; `wanted`: false leaves the sums empty.
template <class T, int kThreadsPerRow, class Target>
__device__ __forceinline__ TargetSums<Acc<T>> target_sums(const T* z /* [C] */, int classes, const Target& target,
                                                          bool wanted, const Softmax<Acc<T>>& softmax,
                                                          Team<kThreadsPerRow>& team) {
  using A = Acc<T>;
  TargetSums<A> sums = {0, 0};
  for (int c = team.lane(); wanted && c < classes; c += kThreadsPerRow) {
    const A t = target(c);
    if (c != softmax.top_class) sums.others += t;
    if (t != 0) sums.cross += t * (softmax.top - to_acc(z[c]));  // 0 * inf would be NaN
  }
  return team.reduce(sums, AddTargetSums{});
}

// weight * dNCE/dz of a row; 0 without a mask.
//
//   G dNCE/dz_c = w_c - p_c sum w = p_c (g_c + w_c - sum w)        because w_c (1 - p_c) = g_c p_c
//
// The w of the top class may be 1e6; in the second form it meets no sum that it would have to cancel.
template <class A>
struct NceGradient {
  Softmax<A> softmax;
  A others_w;
  bool top_counts;  // the top class is masked and not clamped
  A factor;         // weight / G, or 0

  __device__ __forceinline__ A at(A z, int c, bool masked) const {
    if (factor == 0) return 0;
    const A p = softmax.p(z, c);
    if (c == softmax.top_class) return factor * p * (A(top_counts) - others_w);
    const A w = masked ? p / (1 - p) : A(0);
    const A top_w = top_counts ? 1 / softmax.rest : A(0);
    return factor * p * (A(masked) - (others_w - w) - top_w);
  }
};

template <class A>
__device__ __forceinline__ NceGradient<A> nce_gradient(const Softmax<A>& softmax, const MaskedSums<A>& sums,
                                                       const Mask& mask, int64_t row, int classes, A weight) {
  const bool clamped = softmax.rest * softmax.inv_sum < A(kNceEps);
  const bool exists = softmax.top_class < classes;  // not where a logit is NaN
  const bool masked = exists && mask.data != nullptr && mask.at(row, softmax.top_class);
  return {softmax, sums.others_w, masked && !clamped,
          sums.count > 0 ? weight / (static_cast<A>(sums.count) + A(kNceEps)) : A(0)};
}

// Sums over the rows of each group (nce_loss has one, ups_loss two), and of their weights.
template <class A, int kGroups>
struct GroupSums {
  A loss[kGroups];
  double weight[kGroups];

  __device__ __forceinline__ void add(int group, A row_loss, A row_weight) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      loss[i] += i == group ? row_weight * row_loss : A(0);
      weight[i] += i == group ? static_cast<double>(row_weight) : 0;
    }
  }
};

struct AddGroupSums {
  template <class A, int kGroups>
  __device__ __forceinline__ GroupSums<A, kGroups> operator()(GroupSums<A, kGroups> a,
                                                              const GroupSums<A, kGroups>& b) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      a.loss[i] += b.loss[i];
      a.weight[i] += b.weight[i];
    }
    return a;
  }
};

// Where the sums go. One block writes the loss itself, several leave it to `add_partials`.
template <class A, int kGroups>
struct LossOutput {
  A* loss;                          // [], or null if only the rows' own losses are wanted
  A* scale;                         // [kGroups], of the rows of each group in the loss
  double divisor;                   // see divisor_of
  GroupSums<A, kGroups>* partials;  // [blocks]
};

template <class A, int kGroups>
__device__ __forceinline__ void write_loss(const LossOutput<A, kGroups>& out, const GroupSums<A, kGroups>& total) {
  A loss = 0;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const double by = out.divisor != 0 ? out.divisor : total.weight[i];
    const A n = by != 0 ? static_cast<A>(by) : A(1);
    loss += total.loss[i] / n;
    out.scale[i] = 1 / n;
  }
  if (out.loss != nullptr) *out.loss = loss;
}

// Adds up the sums of a block's threads; all of them must reach this.
template <class A, int kGroups>
__device__ __forceinline__ void finish_block(const LossOutput<A, kGroups>& out, GroupSums<A, kGroups> sums) {
  Team<kWholeBlock> block;
  sums = block.reduce(sums, AddGroupSums{});
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    write_loss(out, sums);
  } else {
    out.partials[blockIdx.x] = sums;
  }
}

template <class A, int kGroups>
__global__ void __launch_bounds__(kLossMaxThreads) add_partials(const LossOutput<A, kGroups> out, int blocks) {
  GroupSums<A, kGroups> sums = {};
  for (int i = static_cast<int>(threadIdx.x); i < blocks; i += static_cast<int>(blockDim.x)) {
    sums = AddGroupSums{}(sums, out.partials[i]);
  }
  finish_block(out, sums);
}

// The rows of a team: `body(row, exists)` for each. All teams of a block take equally many turns, because lanes must
// meet at shuffles and barriers; in a turn too many `row` is the last one and does not `exist`.
template <int kThreadsPerRow, class Body>
__device__ __forceinline__ void for_rows(int64_t rows, const Body& body) {
  const int64_t teams = blockDim.x / kThreadsPerRow;
  for (int64_t first = blockIdx.x * teams; first < rows; first += gridDim.x * teams) {
    const int64_t row = first + threadIdx.x / kThreadsPerRow;
    body(row < rows ? row : rows - 1, row < rows);
  }
}

// The two launches of a forward, for a real GPU and for the tests' CUDA on the CPU alike. `launch(plan, kernel,
// args...)` launches; `launch.memory(bytes)` lasts until both are done.

// kernel(rows..., out), and where it ran in several blocks the sum of what they left.
template <class Launch, class Kernel, class A, int kGroups, class... Rows>
void launch_loss(Launch& launch, const LaunchPlan& plan, Kernel kernel, LossOutput<A, kGroups> out,
                 const Rows&... rows) {
  using Sums = GroupSums<A, kGroups>;
  if (plan.blocks > 1) out.partials = static_cast<Sums*>(launch.memory(plan.blocks * sizeof(Sums)));
  launch(plan, kernel, rows..., out);
  if (plan.blocks == 1) return;
  launch({0, kLossMaxThreads, kLossMaxThreads, 1}, add_partials<A, kGroups>, out, static_cast<int>(plan.blocks));
}

// What a forward of `rows` rows writes: `loss` is [rows] for the losses of the rows themselves, else [].
template <int kGroups, class A>
LossOutput<A, kGroups> loss_output(A* loss, A* scale, int64_t reduction, int64_t rows) {
  return {reduction == kNone ? nullptr : loss, scale, divisor_of(reduction, rows), nullptr};
}

}  // namespace ups::cuda
