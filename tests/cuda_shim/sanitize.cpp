// All kernels under AddressSanitizer and UndefinedBehaviorSanitizer, a process of its own because those must be loaded
// first: hostile shapes in heap blocks of exact size. Checks that nothing is touched that should not be, that every
// result is written, and that the order of threads does not show; the values are held against the reference elsewhere.
// With an argument: runs that one of the controls, which should then be stopped by a sanitizer.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/augment.h"

extern "C" {
const char* augment(uint64_t, int64_t, int64_t, const uint8_t*, int64_t, int, int, int, const int64_t*, int64_t,
                    const void*, int, const int32_t*, int, const uint8_t*, const uint32_t*, const int64_t*,
                    const int32_t*, const ups::AugmentSettings*, uint32_t*);
const char* control(const char*, uint64_t, int*);
const char* fixmatch_loss(uint64_t, int64_t, int, const void*, int64_t, const void*, int64_t, int64_t, int, const void*,
                          double, double, const void*, int, void*, bool*, int64_t*, void*);
const char* fixmatch_loss_backward(uint64_t, int64_t, int, const void*, int64_t, const void*, int64_t, int64_t, int,
                                   const int64_t*, const void*, const void*, void*);
const char* mc_select(uint64_t, int, const void*, int64_t, int64_t, int, int64_t, int, const double*, int64_t*, float*,
                      float*, bool*, void*, bool);
const char* mc_select_multilabel(uint64_t, int64_t, int, const void*, int64_t, int64_t, int, int64_t, int,
                                 const double*, const void*, void*, void*, void*, void*, bool);
const char* nce_loss(uint64_t, int64_t, int, const void*, int64_t, int64_t, int, const void*, int64_t, bool,
                     const void*, int, void*, void*);
const char* nce_loss_backward(uint64_t, int64_t, int, const void*, int64_t, const void*, int64_t, int64_t, int,
                              const void*, int64_t, bool, const void*, const void*, void*);
const char* ups_loss(uint64_t, int64_t, int, const void*, int64_t, int64_t, int, const int64_t*, const void*, int64_t,
                     double, const bool*, const void*, int64_t, bool, const void*, int, void*, void*);
const char* ups_loss_backward(uint64_t, int64_t, int, const void*, int64_t, const void*, int64_t, int64_t, int,
                              const int64_t*, const void*, int64_t, double, const bool*, const void*, int64_t, bool,
                              const void*, const void*, void*);
const char* ups_loss_multilabel(uint64_t, int64_t, int, const void*, int64_t, int64_t, int, const void*, int64_t, bool,
                                const void*, int64_t, bool, const void*, const void*, int64_t, int, void*, void*);
const char* ups_loss_multilabel_backward(uint64_t, int64_t, int, const void*, int64_t, const void*, int64_t, int64_t,
                                         int, const void*, int64_t, bool, const void*, int64_t, bool, const void*,
                                         const void*, int64_t, const void*, void*);
}

namespace {

constexpr int kBytesOf[] = {4, 2, 2, 8};  // of float32, float16, bfloat16, float64

uint64_t random_state = 1;
uint64_t random_bits() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return random_state >> 33;
}

// A heap block of exactly so many bytes.
class Bytes {
 public:
  explicit Bytes(int64_t n) : data_(std::make_unique<unsigned char[]>(n)), n_(n) { std::memset(get(), 0xa5, n); }
  unsigned char* get() const { return data_.get(); }
  bool operator==(const Bytes& other) const { return std::memcmp(get(), other.get(), n_) == 0; }

 private:
  std::unique_ptr<unsigned char[]> data_;
  int64_t n_;
};

// Logits as random bits of their type: NaN, infinite, huge and subnormal ones among them, or moderate ones alone.
Bytes logits_of(int dtype, int64_t n, bool wild) {
  Bytes bytes(n * kBytesOf[dtype]);
  for (int64_t i = 0; i < n; ++i) {
    const float moderate = static_cast<float>(random_bits() % 16001) / 1000 - 8;
    const uint64_t wild_bits = random_bits() << 33 ^ random_bits();
    uint32_t bits;
    std::memcpy(&bits, &moderate, 4);
    const double wide = moderate;
    const uint16_t small[] = {static_cast<uint16_t>(random_bits() % 0x4800), static_cast<uint16_t>(bits >> 16)};
    const void* const choices[] = {&bits, &small[0], &small[1], &wide};
    const void* from = wild && i % 7 == 0 ? &wild_bits : choices[dtype];
    std::memcpy(bytes.get() + i * kBytesOf[dtype], from, kBytesOf[dtype]);
  }
  return bytes;
}

Bytes mask_of(int64_t rows, int64_t width, bool packed) {
  Bytes bytes(rows * width * (packed ? 4 : 1));
  for (int64_t i = 0; i < rows * width; ++i) {
    const auto word = static_cast<uint32_t>(random_bits());
    if (packed) {
      std::memcpy(bytes.get() + 4 * i, &word, 4);
    } else {
      bytes.get()[i] = word % 3 == 0;
    }
  }
  return bytes;
}

void expect(bool good, const std::string& what, const std::string& where) {
  if (good) return;
  std::fprintf(stderr, "%s: %s\n", where.c_str(), what.c_str());
  std::exit(1);
}

template <class T>
T* as(const Bytes& bytes, int64_t offset = 0) {
  return reinterpret_cast<T*>(bytes.get() + offset);
}

void try_mc_select(int dtype, int passes, int64_t rows, int classes, bool packed, int offset, double temp_nl) {
  const std::string where = "mc_select dtype " + std::to_string(dtype) + " [" + std::to_string(passes) + ", " +
                            std::to_string(rows) + ", " + std::to_string(classes) + "] offset " +
                            std::to_string(offset);
  const double inf = std::numeric_limits<double>::infinity();
  const double thresholds[] = {0.4, 0.2, passes > 1 ? 0.2 : inf, passes > 1 ? 0.05 : inf, temp_nl};
  const int64_t row_stride = classes + offset, pass_stride = rows * row_stride + offset;
  const int64_t needed = offset + (passes - 1) * pass_stride + (rows - 1) * row_stride + classes;
  const Bytes logits = logits_of(dtype, needed, rows > 1);
  const int64_t mask_bytes = packed ? rows * ((classes + 31) / 32) * 4 : rows * classes;
  std::vector<std::vector<Bytes>> results;
  for (uint64_t seed = 0; seed < 2; ++seed) {
    std::vector<Bytes>& r = results.emplace_back();
    for (int64_t bytes : {8 * rows, 4 * rows, 4 * rows, rows, mask_bytes}) r.emplace_back(bytes);
    const std::string error = mc_select(seed, dtype, as<void>(logits, offset * kBytesOf[dtype]), pass_stride,
                                        row_stride, passes, rows, classes, thresholds, as<int64_t>(r[0]),
                                        as<float>(r[1]), as<float>(r[2]), as<bool>(r[3]), as<void>(r[4]), packed);
    expect(error.empty(), error, where);
    for (int64_t i = 0; i < rows; ++i) {
      expect(as<int64_t>(r[0])[i] >= -1 && as<int64_t>(r[0])[i] < classes, "label out of range", where);
    }
    for (int64_t i = 0; !packed && i < mask_bytes; ++i) expect(r[4].get()[i] <= 1, "negative not written", where);
  }
  for (int i = 0; i < 5; ++i) expect(results[0][i] == results[1][i], "the order of threads shows", where);
}

void try_losses(int dtype, int64_t rows, int classes, bool packed, int offset) {
  const std::string where = "losses dtype " + std::to_string(dtype) + " [" + std::to_string(rows) + ", " +
                            std::to_string(classes) + "] offset " + std::to_string(offset);
  const int64_t stride = classes + offset, width = packed ? (classes + 31) / 32 : classes;
  const int size = dtype == 3 ? 8 : 4;  // of the results
  const Bytes logits = logits_of(dtype, offset + (rows - 1) * stride + classes, rows > 1);
  const void* z = as<void>(logits, offset * kBytesOf[dtype]);
  const Bytes mask = mask_of(rows, width, packed);
  Bytes target(8 * rows), positive(rows), ones(8 * rows), weight(size * rows);
  const int64_t soft_stride = classes + offset;
  const Bytes soft = logits_of(dtype == 3 ? 3 : 0, (rows - 1) * soft_stride + classes, rows > 1);
  for (int64_t i = 0; i < rows; ++i) {
    as<int64_t>(target)[i] = static_cast<int64_t>(random_bits() % (classes + 2)) - 1;
    positive.get()[i] = random_bits() % 2;
    if (dtype == 3) as<double>(ones)[i] = 1, as<double>(weight)[i] = i % 3;
    if (dtype != 3) as<float>(ones)[i] = 1, as<float>(weight)[i] = i % 3;
  }
  std::vector<std::vector<Bytes>> results;
  for (uint64_t seed = 0; seed < 2; ++seed) {
    constexpr int64_t blocks = 3;  // at most, so that a block has several rows of every variant
    std::vector<Bytes>& r = results.emplace_back();
    const int64_t d_bytes = rows * classes * kBytesOf[dtype];
    for (int64_t bytes : {rows * size, 1L * size, 1L * size, d_bytes, 1L * size, 2L * size, d_bytes, rows * size,
                          2L * size, d_bytes, 1L * size, d_bytes}) {
      r.emplace_back(bytes);
    }
    const auto run = [&](const char* error) { expect(*error == 0, error, where); };
    run(nce_loss(seed, blocks, dtype, z, stride, rows, classes, as<void>(mask), width, packed, nullptr, 0,
                 as<void>(r[0]), as<void>(r[1])));
    run(nce_loss(seed, blocks, dtype, z, stride, rows, classes, as<void>(mask), width, packed, as<void>(weight), 1,
                 as<void>(r[2]), as<void>(r[1])));
    run(nce_loss_backward(seed, blocks, dtype, as<void>(ones), 1, z, stride, rows, classes, as<void>(mask), width,
                          packed, as<void>(weight), as<void>(r[1]), as<void>(r[3])));
    run(ups_loss(seed, blocks, dtype, z, stride, rows, classes, as<int64_t>(target), nullptr, 0, 0, as<bool>(positive),
                 as<void>(mask), width, packed, nullptr, 1, as<void>(r[4]), as<void>(r[5])));
    run(ups_loss_backward(seed, blocks, dtype, as<void>(ones), 0, z, stride, rows, classes, as<int64_t>(target),
                          nullptr, 0, 0, as<bool>(positive), as<void>(mask), width, packed, nullptr, as<void>(r[5]),
                          as<void>(r[6])));
    // Soft targets, weights, no negatives; then smoothed classes.
    run(ups_loss(seed, blocks, dtype, z, stride, rows, classes, nullptr, as<void>(soft), soft_stride, 0,
                 as<bool>(positive), nullptr, 0, false, as<void>(weight), 0, as<void>(r[7]), as<void>(r[8])));
    run(ups_loss_backward(seed, blocks, dtype, as<void>(ones), 1, z, stride, rows, classes, nullptr, as<void>(soft),
                          soft_stride, 0, as<bool>(positive), nullptr, 0, false, as<void>(weight), as<void>(r[8]),
                          as<void>(r[9])));
    run(ups_loss(seed, blocks, dtype, z, stride, rows, classes, as<int64_t>(target), nullptr, 0, 0.1,
                 as<bool>(positive), as<void>(mask), width, packed, as<void>(weight), 3, as<void>(r[10]),
                 as<void>(r[8])));
    run(ups_loss_backward(seed, blocks, dtype, as<void>(ones), 0, z, stride, rows, classes, as<int64_t>(target),
                          nullptr, 0, 0.1, as<bool>(positive), as<void>(mask), width, packed, as<void>(weight),
                          as<void>(r[8]), as<void>(r[11])));
  }
  for (size_t i = 0; i < results[0].size(); ++i) {
    expect(results[0][i] == results[1][i], "the order of threads shows in result " + std::to_string(i), where);
  }
}

void try_fixmatch_loss(int dtype, int64_t rows, int classes, int offset) {
  const std::string where = "fixmatch_loss dtype " + std::to_string(dtype) + " [" + std::to_string(rows) + ", " +
                            std::to_string(classes) + "] offset " + std::to_string(offset);
  const int64_t stride = classes + offset, needed = offset + (rows - 1) * stride + classes;
  const int size = dtype == 3 ? 8 : 4;  // of the results
  const Bytes strong = logits_of(dtype, needed, rows > 1), weak = logits_of(dtype, needed, rows > 1);
  const void* const s = as<void>(strong, offset * kBytesOf[dtype]);
  const void* const w = as<void>(weak, offset * kBytesOf[dtype]);
  Bytes class_tau(classes * size), weight(rows * size), ones(rows * size);
  for (int64_t i = 0; i < classes || i < rows; ++i) {
    const double tau = static_cast<double>(i % 5) / 10;
    if (dtype == 3 && i < classes) as<double>(class_tau)[i] = tau;
    if (dtype != 3 && i < classes) as<float>(class_tau)[i] = static_cast<float>(tau);
    if (dtype == 3 && i < rows) as<double>(weight)[i] = i % 3, as<double>(ones)[i] = 1;
    if (dtype != 3 && i < rows) as<float>(weight)[i] = i % 3, as<float>(ones)[i] = 1;
  }
  std::vector<std::vector<Bytes>> results;
  for (uint64_t seed = 0; seed < 2; ++seed) {
    std::vector<Bytes>& r = results.emplace_back();
    const int64_t d_bytes = rows * classes * kBytesOf[dtype];
    for (int64_t bytes : {rows * size, rows, 8 * rows, 1L * size, d_bytes, 1L * size, rows, 8 * rows, 1L * size}) {
      r.emplace_back(bytes);
    }
    const auto run = [&](const char* error) { expect(*error == 0, error, where); };
    run(fixmatch_loss(seed, 3, dtype, s, stride, w, stride, rows, classes, as<void>(class_tau), 1, 0.5,
                      as<void>(weight), 0, as<void>(r[0]), as<bool>(r[1]), as<int64_t>(r[2]), as<void>(r[3])));
    run(fixmatch_loss_backward(seed, 3, dtype, as<void>(ones), 1, s, stride, rows, classes, as<int64_t>(r[2]),
                               as<void>(r[3]), as<void>(weight), as<void>(r[4])));
    run(fixmatch_loss(seed, 3, dtype, s, stride, w, stride, rows, classes, nullptr, 0.3, 1, nullptr, 3, as<void>(r[5]),
                      as<bool>(r[6]), as<int64_t>(r[7]), as<void>(r[8])));
    for (int64_t i = 0; i < rows; ++i) {
      expect(as<int64_t>(r[2])[i] >= -1 && as<int64_t>(r[2])[i] < classes, "target out of range", where);
    }
  }
  for (size_t i = 0; i < results[0].size(); ++i) {
    expect(results[0][i] == results[1][i], "the order of threads shows in result " + std::to_string(i), where);
  }
}

// Selection, then the loss of the first pass under the masks found; class thresholds and weights of entries in turns.
void try_multilabel(int dtype, int64_t rows, int classes, bool packed, int offset) {
  const std::string where = "multilabel dtype " + std::to_string(dtype) + " [" + std::to_string(rows) + ", " +
                            std::to_string(classes) + "] offset " + std::to_string(offset);
  const int64_t stride = classes + offset, pass_stride = rows * stride, n = rows * classes;
  const int64_t width = packed ? (classes + 31) / 32 : classes, size = dtype == 3 ? 8 : 4;
  const Bytes logits = logits_of(dtype, offset + pass_stride + (rows - 1) * stride + classes, rows > 1);
  const void* const z = as<void>(logits, offset * kBytesOf[dtype]);
  const Bytes of_class = logits_of(dtype == 3 ? 3 : 0, 4 * classes, false),
              weight = logits_of(dtype == 3 ? 3 : 0, n, false);
  const double thresholds[] = {0.5, 0.3, 0.3, 0.3, offset % 2 ? 2.0 : 3.0};
  const bool entries = offset % 2;
  std::vector<std::vector<Bytes>> results;
  for (uint64_t seed = 0; seed < 2; ++seed) {
    std::vector<Bytes>& r = results.emplace_back();
    const int64_t mask = rows * width * (packed ? 4 : 1);
    for (int64_t bytes : {n * size, n * size, mask, mask, rows * size, size, n * kBytesOf[dtype]})
      r.emplace_back(bytes);
    const auto run = [&](const char* error) { expect(*error == 0, error, where); };
    run(mc_select_multilabel(seed, 3, dtype, z, pass_stride, stride, 2, rows, classes, thresholds,
                             entries ? as<void>(of_class) : nullptr, as<void>(r[0]), as<void>(r[1]), as<void>(r[2]),
                             as<void>(r[3]), packed));
    for (int64_t i = 0; !packed && i < mask; ++i) expect(r[2].get()[i] <= 1 && r[3].get()[i] <= 1, "unwritten", where);
    const void* const of_row = entries ? nullptr : as<void>(weight);
    const void* const of_entry = entries ? as<void>(weight) : nullptr;
    run(ups_loss_multilabel(seed, 3, dtype, z, stride, rows, classes, as<void>(r[2]), width, packed, as<void>(r[3]),
                            width, packed, of_row, of_entry, classes, 0, as<void>(r[4]), as<void>(r[5])));
    run(ups_loss_multilabel_backward(seed, 3, dtype, as<void>(weight), 1, z, stride, rows, classes, as<void>(r[2]),
                                     width, packed, as<void>(r[3]), width, packed, of_row, of_entry, classes,
                                     as<void>(r[5]), as<void>(r[6])));
  }
  for (size_t i = 0; i < results[0].size(); ++i) {
    expect(results[0][i] == results[1][i], "the order of threads shows in result " + std::to_string(i), where);
  }
}

// Every operation, drawn often; an affine one that turns and shifts, so that it looks outside the image.
void try_augment(int H, int W, int C) {
  const std::string where = "augment " + std::to_string(H) + "x" + std::to_string(W) + "x" + std::to_string(C);
  constexpr int kKinds = 8, n = 12;
  std::vector<ups::Variant> variants(kKinds);
  std::vector<int32_t> operations;
  for (int kind = 0; kind < kKinds; ++kind) {
    variants[kind] = {static_cast<ups::Operation>(kind), {}, {}};
    for (uint8_t& value : variants[kind].lookup) value = static_cast<uint8_t>(random_bits());
    operations.insert(operations.end(), {kind, 1});
  }
  const int32_t affine[] = {50000, 40000, -(3 << 16), -40000, 50000, 4 << 16}, fill[] = {5 << 15, 5, 1, 2, 3};
  std::memcpy(variants[3].value, affine, sizeof affine);
  std::memcpy(variants[7].value, fill, sizeof fill);
  const int crop = (H < W ? H : W) - 1;
  const ups::AugmentSettings settings = {7, 1, crop, 16, {0, 0, 0}, {2 * ups::kOne, 2 * ups::kOne, 2 * ups::kOne}};
  Bytes images(int64_t{n} * H * W * C), blends(65536), norm(C * 256 * 4), index(n * 8), counter(16);
  for (int64_t i = 0; i < int64_t{n} * H * W * C; ++i) images.get()[i] = static_cast<uint8_t>(random_bits());
  for (int i = 0; i < n; ++i) as<int64_t>(index)[i] = n - 1 - i;
  std::vector<Bytes> results;
  for (uint64_t seed = 0; seed < 4; ++seed) {  // then in global memory, which 5 blocks use for several images
    const Bytes& out = results.emplace_back(int64_t{n} * H * W * C * 4);
    const std::string error =
        augment(seed, seed < 2 ? 227 << 10 : 0, seed < 2 ? n : 5, images.get(), n, H, W, C, as<int64_t>(index), n,
                variants.data(), kKinds, operations.data(), kKinds, blends.get(), as<uint32_t>(norm),
                as<int64_t>(counter), nullptr, &settings, as<uint32_t>(out));
    expect(error.empty(), error, where);
  }
  for (const Bytes& each : results) expect(each == results[0], "the order of threads, or the memory, shows", where);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    const Bytes out(64 * sizeof(int));
    std::puts(control(argv[1], 0, as<int>(out)));
    return 0;
  }
  // One number of classes for each variant of the plans at least, and its edges; the types take turns.
  const int some_classes[] = {1, 3, 4, 10, 13, 28, 33, 100, 112, 224, 257, 512, 1000, 2047, 2500};
  int dtype = 0;
  for (int classes : some_classes) {
    const int64_t rows = classes > 224 ? 2 : 5;
    for (bool packed : {false, true}) {
      try_mc_select(dtype % 3, 3, rows, classes, packed, 0, 2.0);
      try_mc_select(dtype % 3, 6, 1, classes, packed, 1 + dtype % 2, 3.0);
      try_losses(dtype % 4, rows, classes, packed, dtype % 3);
      try_fixmatch_loss(dtype % 4, rows, classes, dtype % 3);
      try_multilabel(dtype % 4, rows, classes, packed, dtype % 3);
      ++dtype;
    }
  }
  try_losses(0, 601, 10, true, 0);  // several blocks and a second launch
  const int sizes[][2] = {{1, 1}, {8, 8}, {2, 9}, {33, 16}};
  for (const auto& [H, W] : sizes) {
    for (int C : {1, 3}) try_augment(H, W, C);
  }
  std::puts("clean");
  return 0;
}
