// Which kernel variant serves a shape, and with how many threads: plain host functions of the shape alone, so that a
// plan can be shown, tested, and used by the tests' CUDA on the CPU. Results never depend on the device's size.
#pragma once

#include <cstdint>

namespace ups {

struct LaunchPlan {
  int variant;     // index into the op's table below
  int lanes;       // threads that share one row
  int threads;     // per block
  int64_t blocks;  // grid
};

// mc_select: a lane keeps `chunks` chunks of `width` neighbouring classes in registers over all passes, and a chunk is
// one load. Registers per lane grow by 4 (mean and M2 at two temperatures) + kGroup (logits in flight) per class, so
// 8 to 10 classes per lane fill a third of the register file per 16 resident warps. The last variant loops over
// classes instead.
struct McSelectVariant {
  int max_classes;
  int lanes;
  int chunks;
  int width;
};

constexpr McSelectVariant kMcSelectVariants[] = {
    {4, 1, 2, 2},    {10, 1, 5, 2},   {16, 2, 2, 4},     {32, 4, 2, 4},      {64, 8, 2, 4},           {128, 16, 2, 4},
    {256, 32, 2, 4}, {512, 64, 2, 4}, {1024, 128, 2, 4}, {2048, 256, 2, 4}, {INT32_MAX, 512, 0, 4},
};
constexpr int kMcSelectMaxLoopedPasses = 1024;

// The losses: lanes stride over the row, so any C fits any variant.
struct LossVariant {
  int max_classes;
  int lanes;
};

constexpr LossVariant kLossVariants[] = {{32, 4}, {128, 16}, {1024, 32}, {INT32_MAX, 256}};

namespace detail {

constexpr int kLossThreads = 256;      // block of the losses
constexpr int kLossMaxThreads = 1024;  // their block when one block does everything
constexpr int kLossMaxBlocks = 1024;   // 8 blocks for each multiprocessor of a large GPU; partial sums to add up

// Threads of a block of mc_select: those of one team, or of several small ones.
constexpr int threads_of(int lanes) { return lanes > 32 ? lanes : 128; }

template <class Variant, int kCount>
int find_variant(const Variant (&variants)[kCount], int64_t classes) {
  int i = 0;
  while (classes > variants[i].max_classes) ++i;
  return i;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace detail

inline LaunchPlan mc_select_plan(int64_t rows, int64_t classes) {
  const int i = detail::find_variant(kMcSelectVariants, classes);
  const int lanes = kMcSelectVariants[i].lanes;
  const int threads = detail::threads_of(lanes);
  return {i, lanes, threads, detail::ceil_div(rows, threads / lanes)};
}

// A block walks over rows and hands on one partial sum. A training batch (at most 8 turns of a full block) is done in
// one block and so in one launch; anything larger needs a second launch that adds the partial sums.
inline LaunchPlan loss_plan(int64_t rows, int64_t classes) {
  const int i = detail::find_variant(kLossVariants, classes);
  const int lanes = kLossVariants[i].lanes;
  const int64_t work = rows * lanes;
  if (lanes <= 32 && work <= 8 * detail::kLossMaxThreads) {
    const int64_t threads = work < detail::kLossMaxThreads ? detail::ceil_div(work, 32) * 32 : detail::kLossMaxThreads;
    return {i, lanes, static_cast<int>(threads > 0 ? threads : 32), 1};
  }
  const int64_t blocks = detail::ceil_div(rows, detail::kLossThreads / lanes);
  const int64_t capped = blocks < detail::kLossMaxBlocks ? blocks : detail::kLossMaxBlocks;
  return {i, lanes, detail::kLossThreads, capped > 0 ? capped : 1};
}

// Rows of a backward are independent: as many blocks as it takes.
inline LaunchPlan loss_backward_plan(int64_t rows, int64_t classes) {
  const int i = detail::find_variant(kLossVariants, classes);
  const int lanes = kLossVariants[i].lanes;
  const int64_t blocks = detail::ceil_div(rows, detail::kLossThreads / lanes);
  return {i, lanes, detail::kLossThreads, blocks < INT32_MAX ? blocks : INT32_MAX};
}

}  // namespace ups
