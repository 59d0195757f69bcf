// What an augmentation consists of, as Python's tables (ups_fast/policy.py), the plan and both backends see it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "math/common.h"

namespace ups {

enum class Operation : int32_t { lookup, auto_contrast, equalize, affine, color, contrast, sharpness, fill };

// One operation with one of its values: 72 words of the `variants` table.
struct Variant {
  Operation operation;
  // affine: the six numbers of its matrix, 16.16 fixed point; color, contrast, sharpness: which blend table; fill: half
  // the side, 16.16, its whole pixels, three colors, the center's least place
  int32_t value[7];
  uint8_t lookup[256];  // lookup: the new value of a pixel
};
static_assert(sizeof(Variant) == 72 * sizeof(int32_t));

constexpr int kMaxSide = 2048;  // of an image: the sum of its gray values, doubled, fits an int
constexpr int kOne = 1 << 14;   // a jitter factor of 1: factors are multiples of 2^-14, see blend() in pixels.inl

// The parts of a policy that are not tables, in the order of the ops' `settings`.
struct AugmentSettings {
  int32_t n_ops;    // operations drawn for an image, with replacement
  int32_t flip;     // 1: left to right, with probability 1/2
  int32_t crop;     // reflected pixels on each side to crop from
  int32_t cutout;   // largest side of the cutout
  int32_t low[3];   // smallest factor of brightness, contrast, saturation, times kOne
  int32_t high[3];  // largest
};
constexpr int kSettings = sizeof(AugmentSettings) / sizeof(int32_t);

// A plan row: what is drawn for one image.
struct PlannedOp {
  int32_t variant;    // row of the variants table; -1: nothing
  int32_t top, left;  // first pixel of the square, if it is a fill; H or W where it lies outside
};
struct PlannedFrame {
  int32_t flip;                      // 0 or 1
  int32_t dy, dx;                    // how far the crop lies below and right of the image
  int32_t order;                     // of the jitter: index into kJitterOrders
  int32_t factor[3];                 // of brightness, contrast, saturation, times kOne
  int32_t top, left, bottom, right;  // the cutout; bottom and right are the first pixels outside
};
constexpr int kOpWords = sizeof(PlannedOp) / sizeof(int32_t);
constexpr int kFrameWords = sizeof(PlannedFrame) / sizeof(int32_t);

constexpr int kContrast = 1, kSaturation = 2;  // positions among the factors; 0 is brightness

UPS_HD constexpr int plan_words(int n_ops) { return n_ops * kOpWords + kFrameWords; }

// From what a plan is drawn.
struct DrawArgs {
  const int64_t* index;        // [B]
  const Variant* variants;     // [V]
  int n_variants;              // V
  const int32_t* operations;   // [O, 2], first variant and number of variants of each operation of the policy
  int n_operations;            // O
  const int64_t* seed;         // []
  const int64_t* draw_number;  // [] with stride 0, or [B]
  int64_t draw_stride;
  int H, W;
  AugmentSettings settings;
};

// The data of a call. Word is what an output pixel is stored as: uint32_t or uint16_t, copied from `norm`.
template <class Word>
struct AugmentArgs : DrawArgs {
  const uint8_t* images;  // [N, H, W, C]
  int64_t N;
  const uint8_t* blends;  // [K, 256, 256], Pillow's blend of a towards b by a factor
  const Word* norm;       // [C, 256], the normalized value of a pixel
  const int32_t* plan;    // [B, plan_words], or null to draw it
  Word* out;              // [B, H, W, C]
};

// The working memory of one image, in this order, each part aligned to 16 bytes: two copies of it [H, W, C], a count
// and a byte for each value of each channel [C, 256], the plan.
struct CanvasBytes {
  size_t image, counts, lookup, plan, total;
};
UPS_HD constexpr CanvasBytes canvas_bytes(int H, int W, int C, int n_ops) {
  const size_t image = (static_cast<size_t>(H) * W * C + 15) / 16 * 16, lookup = static_cast<size_t>(C) * 256;
  const size_t counts = lookup * sizeof(int32_t), plan = (plan_words(n_ops) * sizeof(int32_t) + 15) / 16 * 16;
  return {image, counts, lookup, plan, 2 * image + counts + lookup + plan};
}

}  // namespace ups
