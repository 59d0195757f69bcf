// mc_select: pseudo-labels from the logits of P stochastic passes [P, N, C].
//
// Per row: softmax at two temperatures in every pass, mean and M2 of both over the passes, argmax, thresholds.
// The logits are read once (twice above 2048 classes) and only results are written, 13 bytes a row and the negative
// mask: no probability, mean or std of a class ever exists in memory.
//
// Mapping: a team of 1 to 256 threads has a row, a thread keeps 4 to 14 of its classes in registers over all passes
// (plan.h). Passes come in groups: the loads of a group are issued before the first is used, and its maxima, then its
// sums, are reduced over the team together. The loads of 16-bit logits, of more than 10 classes, are a group ahead.
#pragma once

#include <climits>
#include <cmath>

#include "../math/row_stats.h"
#include "element.cuh"
#include "plan.h"
#include "team.cuh"

namespace ups::cuda {
namespace {

template <class T>
struct McSelectArgs {
  const T* logits;      // [P, N, C], classes contiguous
  int64_t pass_stride;  // in elements
  int64_t row_stride;
  int passes;      // P
  int64_t rows;    // N
  int classes;     // C
  bool aligned;    // every chunk of every row lies on a multiple of its size
  bool temp_is_2;  // temp_nl == 2
  Thresholds<float> limits;
  int64_t* label;           // [N]
  float* confidence;        // [N]
  float* deviation;         // [N]
  bool* positive;           // [N]
  bool* negative;           // [N, C], or null:
  unsigned* negative_bits;  // [N, ceil(C / 32)]
};

constexpr int kResidentThreads = 512;  // per multiprocessor at least, so that a thread may use 128 registers

template <class T>
using McSelectKernel = void (*)(McSelectArgs<T>);

// exp(z - max) and exp((z - max) / temp_nl) of one logit. At temperature 2 the first is the square of the second, so
// one exponential gives both: `prepare` puts it in the place of the logit, the others read it off.
template <bool kTempIs2>
struct Exponentials {
  static constexpr float kLog2E = 1.44269504f;
  float scale_q;

  __device__ explicit Exponentials(const Thresholds<float>& limits) : scale_q(kLog2E * limits.inv_temp) {}

  __device__ __forceinline__ float prepare(float z, float top) const {
    return kTempIs2 ? fast_exp2(z - top, kLog2E / 2) : z - top;
  }
  __device__ __forceinline__ float add_p(float sum, float x) const {
    return kTempIs2 ? fmaf(x, x, sum) : sum + fast_exp2(x, kLog2E);
  }
  __device__ __forceinline__ float add_q(float sum, float x) const {
    return sum + (kTempIs2 ? x : fast_exp2(x, scale_q));
  }
  // Rounded products: one fused into Welford's subtraction would leave equal passes with a std above 0.
  __device__ __forceinline__ float scaled_p(float x, float inv) const {
    return rounded_product(kTempIs2 ? x * inv : fast_exp2(x, kLog2E), kTempIs2 ? x : inv);
  }
  __device__ __forceinline__ float scaled_q(float x, float inv) const {
    return rounded_product(kTempIs2 ? x : fast_exp2(x, scale_q), inv);
  }
};

// Running statistics of a lane's classes over the passes.
template <int kSlots>
struct ClassStats {
  float mean_p[kSlots] = {};
  float m2_p[kSlots] = {};
  float mean_q[kSlots] = {};
  float m2_q[kSlots] = {};

  __device__ __forceinline__ void add(int i, float p, float q, float inv_k) {
    welford(mean_p[i], m2_p[i], p, inv_k);
    welford(mean_q[i], m2_q[i], q, inv_k);
  }
};

// The label so far, and whether a logit of the row was NaN or infinite.
struct Best {
  float mean;
  float m2;
  int c;
  unsigned spoiled;
};

struct BetterOf {
  __device__ __forceinline__ Best operator()(Best a, Best b) const {
    Best best = a.mean > b.mean || (a.mean == b.mean && a.c < b.c) ? a : b;  // the lowest class of a tie
    best.spoiled = a.spoiled | b.spoiled;
    return best;
  }
};

template <int kCount>
struct Floats {
  float v[kCount];
};

struct MaxEach {
  template <int kCount>
  __device__ __forceinline__ Floats<kCount> operator()(Floats<kCount> a, Floats<kCount> b) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) a.v[i] = fmaxf(a.v[i], b.v[i]);
    return a;
  }
};

struct AddEach {
  template <int kCount>
  __device__ __forceinline__ Floats<kCount> operator()(Floats<kCount> a, Floats<kCount> b) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) a.v[i] += b.v[i];
    return a;
  }
};

// 1 / sum of the exponentials of a row. Slots past the last class have added 0, because kMasked lies far below any
// maximum, unless every logit of the row is that very number: then each of the C exponentials is 1.
__device__ __forceinline__ float inverse_sum(float sum, float top, int classes) {
  return fast_inverse(top == kMasked ? static_cast<float>(classes) : sum);
}

// Adds kGroup passes, the first of which is number `done` from 0, to the statistics. z becomes scratch.
template <bool kTempIs2, int kGroup, class T, int kThreadsPerRow, int kSlots>
__device__ __forceinline__ void add_passes(float (*z)[kSlots], int done, const McSelectArgs<T>& a,
                                           Team<kThreadsPerRow>& team, ClassStats<kSlots>& stats) {
  const Exponentials<kTempIs2> exponentials(a.limits);
  Floats<kGroup> top;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    top.v[g] = z[g][0];
#pragma unroll
    for (int i = 1; i < kSlots; ++i) top.v[g] = fmaxf(top.v[g], z[g][i]);
  }
  top = team.reduce(top, MaxEach{});

  Floats<2 * kGroup> sums = {};  // of p, then of q
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      z[g][i] = exponentials.prepare(z[g][i], top.v[g]);
      sums.v[g] = exponentials.add_p(sums.v[g], z[g][i]);
      sums.v[kGroup + g] = exponentials.add_q(sums.v[kGroup + g], z[g][i]);
    }
  }
  sums = team.reduce(sums, AddEach{});

#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    if (done + g < a.passes) {
      const float inv_p = inverse_sum(sums.v[g], top.v[g], a.classes);
      const float inv_q = inverse_sum(sums.v[kGroup + g], top.v[g], a.classes);
      const float inv_k = fast_inverse(static_cast<float>(done + g + 1));
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        stats.add(i, exponentials.scaled_p(z[g][i], inv_p), exponentials.scaled_q(z[g][i], inv_q), inv_k);
      }
    }
  }
}

// Takes the classes c .. c + kWidth, in slots from `slot` on, into the search for the label.
template <int kWidth, int kSlots>
__device__ __forceinline__ void improve(Best& best, const ClassStats<kSlots>& stats, int slot, int c, int classes) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (c + i < classes && stats.mean_p[slot + i] > best.mean) {
      best.mean = stats.mean_p[slot + i];
      best.m2 = stats.m2_p[slot + i];
      best.c = c + i;
    }
  }
}

// Bit i: the sample is surely not of class c + i.
template <int kWidth, int kSlots>
__device__ __forceinline__ unsigned negative_flags(const ClassStats<kSlots>& stats, int slot, int c, int classes,
                                                   int label, const Thresholds<float>& limits) {
  unsigned flags = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const bool negative = stats.mean_q[slot + i] < limits.tau_n && stats.m2_q[slot + i] < limits.limit_n;
    flags |= static_cast<unsigned>(negative && c + i != label && c + i < classes) << i;
  }
  return flags;
}

// Writes what a row says of itself. For one thread of its team.
template <class T>
__device__ __forceinline__ void write_row(const McSelectArgs<T>& a, int64_t row, const Best& best) {
  const bool good = best.spoiled == 0;
  a.label[row] = good ? best.c : -1;
  a.confidence[row] = good ? best.mean : NAN;
  a.deviation[row] = good ? std_of(best.m2, a.passes) : NAN;
  a.positive[row] = good && best.mean >= a.limits.tau_p && best.m2 < a.limits.limit_p;
}

// Writes the flags of a chunk as bytes: in one store where C allows it.
template <int kWidth>
__device__ __forceinline__ void write_bytes(bool* row /* [C] */, int c, int classes, unsigned flags) {
  if (classes % kWidth == 0) {
    if (c < classes) store_flags<kWidth>(row + c, flags);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (c + i < classes) row[c + i] = (flags >> i & 1u) != 0;
    }
  }
}

// Writes the flags of a lane's chunks, the first of which starts at class c, the others kThreadsPerRow chunks on each.
// All lanes must reach this, those without a row too: neighbors that share a word of bits put it together.
template <int kThreadsPerRow, int kWidth, class T, int kChunks>
__device__ __forceinline__ void write_negative(const McSelectArgs<T>& a, int64_t row, bool row_exists, int c,
                                               const unsigned (&flags)[kChunks]) {
  constexpr int kLayer = kThreadsPerRow * kWidth;  // classes from one chunk of a lane to its next
  if (a.negative != nullptr) {
    if (!row_exists) return;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      write_bytes<kWidth>(a.negative + row * a.classes, c + j * kLayer, a.classes, flags[j]);
    }
    return;
  }
  constexpr int kLayersPerWord = kLayer < 32 ? 32 / kLayer : 1;
  Team<(kLayer < 32 ? kThreadsPerRow : 32 / kWidth)> sharers;
  unsigned* words = a.negative_bits + row * ((a.classes + 31) / 32);
#pragma unroll
  for (int j = 0; j < kChunks; j += kLayersPerWord) {
    unsigned word = 0;
#pragma unroll
    for (int i = j; i < kChunks && i < j + kLayersPerWord; ++i) word |= flags[i] << ((c + i * kLayer) % 32);
    word = sharers.reduce(word, BitOr{});
    const int start = c + j * kLayer;
    if (row_exists && start < a.classes && sharers.lane() == 0) words[start / 32] = word;
  }
}

// The logits of a group of passes, of which `count` exist; the others are kMasked throughout.
template <int kWidth, bool kAligned, int kThreadsPerRow, class T, int kGroup, int kSlots>
__device__ __forceinline__ void load_passes(const T* from, int64_t pass_stride, int count, int classes,
                                            float (&z)[kGroup][kSlots]) {
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const int left = g < count ? classes : 0;
#pragma unroll
    for (int j = 0; j < kSlots / kWidth; ++j) {
      constexpr int kLayer = kThreadsPerRow * kWidth;
      load_chunk<kWidth, kAligned>(from + j * kLayer, left - j * kLayer, z[g] + j * kWidth);
    }
    from += pass_stride;
  }
}

// The same in two steps, for chunks that all lie on multiples of their size: `load` asks for them as they lie in
// memory, and `unpack` waits for them. Of the passes `count` exist, of the classes from the lane's first on `left`.
template <class T, int kThreadsPerRow, int kGroup, int kChunks, int kWidth>
struct PassGroup {
  static constexpr int kLayer = kThreadsPerRow * kWidth;  // classes from one chunk of a lane to its next
  using Word = typename WordOf<kWidth * sizeof(T)>::type;
  Word words[kGroup][kChunks];

  __device__ __forceinline__ void load(const T* from, int64_t pass_stride, int count, int left) {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        if (g < count && left > j * kLayer) words[g][j] = __ldg(reinterpret_cast<const Word*>(from + j * kLayer));
      }
      from += pass_stride;
    }
  }

  __device__ __forceinline__ void unpack(int count, int left, float (&z)[kGroup][kChunks * kWidth]) const {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        T x[kWidth];
        std::memcpy(x, &words[g][j], sizeof x);
        const bool exists = g < count && left > j * kLayer;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z[g][j * kWidth + i] = exists ? to_acc(x[i]) : kMasked;
      }
    }
  }
};

// Up to 2048 classes. Chunk j of a lane starts at class (j * kThreadsPerRow + lane) * kWidth.
template <class T, int kThreadsPerRow, int kChunks, int kWidth>
__global__ void __launch_bounds__(threads_of(kThreadsPerRow), kResidentThreads / threads_of(kThreadsPerRow))
    mc_select_resident(const McSelectArgs<T> a) {
  constexpr int kSlots = kChunks * kWidth;
  constexpr int kGroup = kSlots <= 10 ? 5 : 2;            // so many passes' logits wait in registers
  constexpr bool kAhead = sizeof(T) == 2 && kGroup == 2;  // and those of the next, where there are registers for them
  Team<kThreadsPerRow> team;
  const int first = team.lane() * kWidth;
  const int64_t wanted =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / kThreadsPerRow) + threadIdx.x / kThreadsPerRow;
  const bool row_exists = wanted < a.rows;
  const int64_t row = row_exists ? wanted : a.rows - 1;  // all lanes must reach every shuffle: repeat the last row
  const T* logits = a.logits + row * a.row_stride + first;

  ClassStats<kSlots> stats;
  float nonfinite = 0.0f;  // stays 0 while all logits are finite: 0 * NaN and 0 * inf are NaN
  const int left = a.classes - first;
  PassGroup<T, kThreadsPerRow, kGroup, kChunks, kWidth> next;
  if (kAhead && a.aligned) next.load(logits, a.pass_stride, a.passes, left);
  for (int done = 0; done < a.passes; done += kGroup) {
    const int count = a.passes - done;
    float z[kGroup][kSlots];
    if (kAhead && a.aligned) {
      next.unpack(count, left, z);
      next.load(logits + kGroup * a.pass_stride, a.pass_stride, count - kGroup, left);
    } else if (a.aligned) {
      load_passes<kWidth, true, kThreadsPerRow>(logits, a.pass_stride, count, left, z);
    } else {
      load_passes<kWidth, false, kThreadsPerRow>(logits, a.pass_stride, count, left, z);
    }
    logits += kGroup * a.pass_stride;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float in_pass = 0.0f;  // a chain of its own for each pass
#pragma unroll
      for (int i = 0; i < kSlots; ++i) in_pass = fmaf(z[g][i], 0.0f, in_pass);
      nonfinite += in_pass;
    }
    if (a.temp_is_2) {
      add_passes<true, kGroup>(z, done, a, team, stats);
    } else {  // one by one: two exponentials of each class have to wait in registers
#pragma unroll
      for (int g = 0; g < kGroup; ++g) add_passes<false, 1>(z + g, done + g, a, team, stats);
    }
  }

  Best best = {-1.0f, 0.0f, INT_MAX, nonfinite != 0.0f};
#pragma unroll
  for (int j = 0; j < kChunks; ++j)
    improve<kWidth>(best, stats, j * kWidth, first + j * kThreadsPerRow * kWidth, a.classes);
  best = team.reduce(best, BetterOf{});
  if (row_exists && team.lane() == 0) write_row(a, row, best);

  unsigned flags[kChunks];
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    const int c = first + j * kThreadsPerRow * kWidth;
    flags[j] = best.spoiled ? 0 : negative_flags<kWidth>(stats, j * kWidth, c, a.classes, best.c, a.limits);
  }
  write_negative<kThreadsPerRow, kWidth>(a, row, row_exists, first, flags);
}

// The softmax of one pass: p = exp(z - top) * inv_p, q likewise.
struct PassSoftmax {
  float top;
  float inv_p;
  float inv_q;
};

// A row's maximum and sums so far (of exponentials shifted by that maximum).
struct PassSums {
  float top;
  float sum_p;
  float sum_q;
};

template <bool kTempIs2>
struct MergeSums {
  Exponentials<kTempIs2> exponentials;

  __device__ __forceinline__ PassSums operator()(PassSums a, PassSums b) const {
    const float top = fmaxf(a.top, b.top);
    const float shrink_a = exponentials.prepare(a.top, top);
    const float shrink_b = exponentials.prepare(b.top, top);
    return {top, exponentials.scaled_p(shrink_a, a.sum_p) + exponentials.scaled_p(shrink_b, b.sum_p),
            exponentials.scaled_q(shrink_a, a.sum_q) + exponentials.scaled_q(shrink_b, b.sum_q)};
  }
};

template <class T>
__device__ __forceinline__ void clear_negative(const McSelectArgs<T>& a, int64_t row, int c) {
  if (a.negative != nullptr) {
    a.negative[row * a.classes + c] = false;
  } else {
    a.negative_bits[row * ((a.classes + 31) / 32) + c / 32] &= ~(1u << (c % 32));
  }
}

template <bool kTempIs2, class T, int kThreadsPerRow, int kWidth>
__device__ __forceinline__ void loop_over_row(const McSelectArgs<T>& a, PassSoftmax* softmax /* [P], shared */) {
  constexpr int kStep = kThreadsPerRow * kWidth;
  const Exponentials<kTempIs2> exponentials(a.limits);
  Team<kThreadsPerRow> team;
  const int first = team.lane() * kWidth;
  const int64_t row = blockIdx.x;
  const T* logits = a.logits + row * a.row_stride;

  float nonfinite = 0.0f;
  for (int k = 0; k < a.passes; ++k) {
    PassSums sums = {kMasked, 0.0f, 0.0f};
#pragma unroll 2
    for (int c = first; c < a.classes; c += kStep) {
      float z[kWidth];
      load_chunk<kWidth>(logits + k * a.pass_stride + c, a.classes - c, a.aligned, z);
      PassSums chunk = {z[0], 0.0f, 0.0f};
#pragma unroll
      for (int i = 1; i < kWidth; ++i) chunk.top = fmaxf(chunk.top, z[i]);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        nonfinite = fmaf(z[i], 0.0f, nonfinite);
        const float x = exponentials.prepare(z[i], chunk.top);
        chunk.sum_p = exponentials.add_p(chunk.sum_p, x);
        chunk.sum_q = exponentials.add_q(chunk.sum_q, x);
      }
      sums = MergeSums<kTempIs2>{exponentials}(sums, chunk);
    }
    sums = team.reduce(sums, MergeSums<kTempIs2>{exponentials});
    if (threadIdx.x == 0) {
      softmax[k] = {sums.top, inverse_sum(sums.sum_p, sums.top, a.classes),
                    inverse_sum(sums.sum_q, sums.top, a.classes)};
    }
  }
  // A barrier too: `softmax` is complete.
  const unsigned spoiled = team.reduce(static_cast<unsigned>(nonfinite != 0.0f), BitOr{});

  Best best = {-1.0f, 0.0f, INT_MAX, spoiled};
  for (int base = 0; base < a.classes; base += kStep) {
    const int c = base + first;
    ClassStats<kWidth> stats;
#pragma unroll 5
    for (int k = 0; k < a.passes; ++k) {
      float z[kWidth];
      load_chunk<kWidth>(logits + k * a.pass_stride + c, a.classes - c, a.aligned, z);
      const PassSoftmax s = softmax[k];
      const float inv_k = fast_inverse(static_cast<float>(k + 1));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float x = exponentials.prepare(z[i], s.top);
        stats.add(i, exponentials.scaled_p(x, s.inv_p), exponentials.scaled_q(x, s.inv_q), inv_k);
      }
    }
    improve<kWidth>(best, stats, 0, c, a.classes);
    const unsigned flags[] = {spoiled ? 0 : negative_flags<kWidth>(stats, 0, c, a.classes, -1, a.limits)};
    write_negative<kThreadsPerRow, kWidth>(a, row, true, c, flags);
  }

  // A barrier too: the flags of all classes are written, and now the label, known at last, is taken out.
  best = team.reduce(best, BetterOf{});
  if (threadIdx.x == 0) {
    write_row(a, row, best);
    if (!spoiled) clear_negative(a, row, best.c);
  }
}

// Any number of classes: a block reads its row once for the maxima and sums of all passes, once more for the rest.
template <class T, int kThreadsPerRow, int kWidth>
__global__ void __launch_bounds__(kThreadsPerRow) mc_select_looped(const McSelectArgs<T> a) {
  __shared__ PassSoftmax softmax[kMcSelectMaxLoopedPasses];
  if (a.temp_is_2) {
    loop_over_row<true, T, kThreadsPerRow, kWidth>(a, softmax);
  } else {
    loop_over_row<false, T, kThreadsPerRow, kWidth>(a, softmax);
  }
}

template <class T>
McSelectKernel<T> mc_select_kernel(int variant) {
  return pick_kernel(kMcSelectVariants, variant, [](auto i) -> McSelectKernel<T> {
    constexpr McSelectVariant v = kMcSelectVariants[decltype(i)::value];
    if constexpr (v.chunks == 0) {
      return mc_select_looped<T, v.threads_per_row, v.width>;
    } else {
      return mc_select_resident<T, v.threads_per_row, v.chunks, v.width>;
    }
  });
}

// The arguments of the kernel of a plan. thresholds: tau_p, tau_n, kappa_p, kappa_n, temp_nl; `negative` is bool [N,
// C], or int32 [N, ceil(C / 32)] if packed.
template <class T>
McSelectArgs<T> mc_select_args(const LaunchPlan& plan, const T* logits, int64_t pass_stride, int64_t row_stride,
                               int64_t passes, int64_t rows, int64_t classes, const double (&thresholds)[5],
                               int64_t* label, float* confidence, float* deviation, bool* positive, void* negative,
                               bool packed) {
  const auto& [tau_p, tau_n, kappa_p, kappa_n, temp_nl] = thresholds;
  McSelectArgs<T> args = {};
  args.logits = logits;
  args.pass_stride = pass_stride;
  args.row_stride = row_stride;
  args.passes = static_cast<int>(passes);
  args.rows = rows;
  args.classes = static_cast<int>(classes);
  args.aligned = chunks_aligned(logits, pass_stride, row_stride, classes, kMcSelectVariants[plan.variant].width);
  args.temp_is_2 = temp_nl == 2.0;
  args.limits = make_thresholds<float>(tau_p, tau_n, kappa_p, kappa_n, temp_nl, passes);
  args.label = label;
  args.confidence = confidence;
  args.deviation = deviation;
  args.positive = positive;
  args.negative = packed ? nullptr : static_cast<bool*>(negative);
  args.negative_bits = packed ? static_cast<unsigned*>(negative) : nullptr;
  return args;
}

}  // namespace
}  // namespace ups::cuda
