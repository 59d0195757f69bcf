// Which kernel variant serves a shape, and with how many threads: plain host functions of the shape alone, so that a
// plan can be shown, tested, and used by the tests' CUDA on the CPU. Results never depend on the device's size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace ups::cuda {

constexpr int kMaxClasses = 1 << 30;  // a class and a step over all of them fit an int

struct LaunchPlan {
  int variant;          // index into the op's table below
  int threads_per_row;  // threads that share one row
  int threads;          // per block
  int64_t blocks;       // grid
  int shared = 0;       // bytes of shared memory whose size is chosen at launch
};

// mc_select: a lane keeps `chunks` chunks of `width` neighboring classes in registers over all passes, and a chunk is
// one load. The arithmetic on a class (27 to 29 instructions a pass on an H100) weighs more than its load, so a row
// should fill its threads: 10 classes do exactly, 100 leave 12 slots idle, 1000 leave 24. The last variant loops over
// classes instead.
struct McSelectVariant {
  int max_classes;
  int threads_per_row;
  int chunks;
  int width;
};

constexpr McSelectVariant kMcSelectVariants[] = {
    {4, 1, 2, 2},    {10, 1, 5, 2},   {14, 1, 7, 2},   {28, 2, 7, 2},     {56, 4, 7, 2},     {112, 8, 7, 2},
    {224, 16, 7, 2}, {448, 32, 7, 2}, {512, 64, 2, 4}, {1024, 128, 2, 4}, {2048, 256, 2, 4}, {INT32_MAX, 512, 0, 4},
};
constexpr int kMcSelectMaxLoopedPasses = 1024;

// The losses: threads stride over the row, so any C fits any variant.
struct LossVariant {
  int max_classes;
  int threads_per_row;
};

constexpr LossVariant kLossVariants[] = {{32, 4}, {128, 16}, {1024, 32}, {INT32_MAX, 256}};

constexpr int kLossThreads = 256;      // of a block
constexpr int kLossResident = 4;       // blocks of a backward per multiprocessor at least: a thread has 64 registers
constexpr int kLossMaxThreads = 1024;  // of a block that does everything
constexpr int kLossMaxTurns = 2;       // of such a block; a multiprocessor is some 2 us busy with each
constexpr int kLossMaxBlocks = 1024;   // 8 for each multiprocessor of a large GPU; as many partial sums to add up

// Threads of a block of mc_select: those of one team, or of several small ones.
constexpr int threads_of(int threads_per_row) { return threads_per_row > 32 ? threads_per_row : 128; }

template <class Variant, std::size_t kCount>
int find_variant(const Variant (&variants)[kCount], int64_t classes) {
  std::size_t i = 0;
  while (i + 1 < kCount && classes > variants[i].max_classes) ++i;
  return static_cast<int>(i);
}

// The kernel of a variant found at run time: kernel_of(std::integral_constant<int, i>) gives that of variant i.
template <class KernelOf, int... kVariants>
auto pick_kernel(int variant, KernelOf kernel_of, std::integer_sequence<int, kVariants...>) {
  const decltype(kernel_of(std::integral_constant<int, 0>{})) kernels[] = {
      kernel_of(std::integral_constant<int, kVariants>{})...};
  return kernels[variant];
}
template <class Variant, std::size_t kCount, class KernelOf>
auto pick_kernel(const Variant (&)[kCount], int variant, KernelOf kernel_of) {
  return pick_kernel(variant, kernel_of, std::make_integer_sequence<int, kCount>{});
}

// kernel_of(std::integral_constant<int, n>{}) for the n threads per row that a plan of a loss has.
template <class KernelOf>
auto loss_kernel(const LaunchPlan& plan, KernelOf kernel_of) {
  return pick_kernel(kLossVariants, plan.variant, [&](auto i) {
    return kernel_of(std::integral_constant<int, kLossVariants[decltype(i)::value].threads_per_row>{});
  });
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline LaunchPlan mc_select_plan(int64_t rows, int64_t classes) {
  const int i = find_variant(kMcSelectVariants, classes);
  const int threads_per_row = kMcSelectVariants[i].threads_per_row;
  const int threads = threads_of(threads_per_row);
  return {i, threads_per_row, threads, ceil_div(rows, threads / threads_per_row)};
}

// mc_select_multilabel: a thread for each `width` neighboring classes of each row, or bits of its words.
inline LaunchPlan mc_select_multilabel_plan(int64_t rows, int64_t classes, bool packed, int width) {
  const int64_t blocks = ceil_div(rows * (packed ? ceil_div(classes, 32) * 32 : classes) / width, 256);
  return {0, 1, 256, blocks < INT32_MAX ? blocks : INT32_MAX};
}

// Blocks walk over the rows and leave a partial sum each, which a second launch adds up. A small batch is not worth
// that: a single block does it all.
inline LaunchPlan loss_plan(int64_t rows, int64_t classes) {
  const int i = find_variant(kLossVariants, classes);
  const int threads_per_row = kLossVariants[i].threads_per_row;
  const int64_t work = rows > 0 ? rows * threads_per_row : 1;
  if (threads_per_row <= 32 && work <= kLossMaxTurns * kLossMaxThreads) {
    return {i, threads_per_row, work < kLossMaxThreads ? static_cast<int>(ceil_div(work, 32) * 32) : kLossMaxThreads,
            1};
  }
  const int64_t blocks = ceil_div(work, kLossThreads);
  return {i, threads_per_row, kLossThreads, blocks < kLossMaxBlocks ? blocks : kLossMaxBlocks};
}

// Rows of a backward are independent: as many blocks as it takes.
inline LaunchPlan loss_backward_plan(int64_t rows, int64_t classes) {
  const int i = find_variant(kLossVariants, classes);
  const int threads_per_row = kLossVariants[i].threads_per_row;
  const int64_t blocks = ceil_div(rows * threads_per_row, kLossThreads);
  return {i, threads_per_row, kLossThreads, blocks < INT32_MAX ? blocks : INT32_MAX};
}

// augment: a block per image; more threads for more pixels, but no more than keep several blocks on a multiprocessor.
// Variant 0 works in shared memory. Variant 1, for images that do not fit there, in canvas_bytes of global memory for
// each block; some 8 blocks for each multiprocessor of a large GPU then walk over the images.
constexpr int64_t kAugmentMaxBlocks = 1024;

inline LaunchPlan augment_plan(int64_t images, int64_t pixels, size_t canvas_bytes, int64_t shared_bytes) {
  const int threads = pixels <= 256 ? 64 : pixels <= 2048 ? 128 : 256;
  if (static_cast<int64_t>(canvas_bytes) > shared_bytes) {
    return {1, threads, threads, images < kAugmentMaxBlocks ? images : kAugmentMaxBlocks};
  }
  return {0, threads, threads, images, static_cast<int>(canvas_bytes)};
}

// counter_dropout, mish: four elements a thread, as blocks walk over them.
inline LaunchPlan elementwise_plan(int64_t elements) {
  const int64_t blocks = ceil_div(elements, 4 * 256);
  return {0, 1, 256, blocks < INT32_MAX ? blocks : INT32_MAX};
}

inline LaunchPlan draw_plan(int64_t images) { return {0, 1, 128, ceil_div(images, 128)}; }

}  // namespace ups::cuda
