// The augmentation of one image by a team: the threads of a block, or one thread of a CPU. No include guard, as in
// row_math.inl.
//
//   gather -> the drawn operations -> flip and reflect crop -> jitter -> normalize, with a cutout
//
// Every step gives Pillow's result bit for bit. The arithmetic is integer but for one line of auto_contrast: what
// Pillow computes in floating point is either as exact in integers (the jitter, by the choice of its factors) or comes
// from a table (the blends). A team offers
//
//   each(n, f)            f(i) for each i < n, shared out among its threads
//   each_pixel(H, W, f)   f(y, x) likewise
//   sync()                all threads read what any has written before
//   add, least, most      *to += x, min and max, safe when several threads do it

// A byte written through a pointer may be anything, so far as the compiler knows: what a loop over pixels needs is
// copied to local constants first and captured by value, or it would be read again for each pixel.

// What a team works on. All pointers are its own memory, but for the results.
template <int C, class Team>
struct Canvas {
  const Team& team;
  const int H, W;
  uint8_t *image, *spare;  // [H, W, C]; an operation that cannot work in place writes to `spare` and swaps
  int32_t* counts;         // [C, 256]
  uint8_t* lookup;         // [C, 256]
  int32_t* plan;           // plan_words(n_ops)

  UPS_HD int size() const { return H * W * C; }
  // f(pixel) for each pixel [C].
  template <class F>
  UPS_HD void each_pixel(const F& f) const {
    uint8_t* const first = image;
    team.each(H * W, [=](int i) { f(first + i * C); });
  }
  UPS_HD void swap() {
    team.sync();
    uint8_t* const old = image;
    image = spare, spare = old;
  }
};

template <int C, class Team>
UPS_HD Canvas<C, Team> canvas_in(uint8_t* memory, const Team& team, const DrawArgs& a) {
  const CanvasBytes bytes = canvas_bytes(a.H, a.W, C, a.settings.n_ops);
  uint8_t *const spare = memory + bytes.image, *const counts = spare + bytes.image;
  uint8_t *const lookup = counts + bytes.counts, *const plan = lookup + bytes.lookup;
  return {team, a.H, a.W, memory, spare, reinterpret_cast<int32_t*>(counts), lookup, reinterpret_cast<int32_t*>(plan)};
}

// Gray as Pillow's conversion to mode "L": ITU-R 601-2 luma.
template <int C>
UPS_HD int luma(const uint8_t* pixel) {
  return C == 1 ? pixel[0] : (pixel[0] * 19595 + pixel[1] * 38470 + pixel[2] * 7471 + 0x8000) >> 16;
}

UPS_HD int reflected(int i, int size) {
  i = i < 0 ? -i : i;
  return i < size ? i : 2 * (size - 1) - i;
}

// Each pixel value through a table: of all channels, or of each its own ([C, 256], stride 256).
template <int C, class Team>
UPS_HD void look_up(const Canvas<C, Team>& c, const uint8_t* table, int stride) {
  c.each_pixel([=](uint8_t* pixel) {
    for (int channel = 0; channel < C; ++channel) pixel[channel] = table[channel * stride + pixel[channel]];
  });
  c.team.sync();
}

// The mean of the gray values, rounded to nearest, halves up.
template <int C, class Team>
UPS_HD int mean_luma(const Canvas<C, Team>& c) {
  c.team.each(1, [&](int) { c.counts[0] = 0; });
  c.team.sync();
  int sum = 0;
  c.each_pixel([&](const uint8_t* pixel) { sum += luma<C>(pixel); });
  c.team.add(c.counts, sum);
  c.team.sync();
  const int total = c.counts[0], n = c.H * c.W;
  c.team.sync();
  return (2 * total + n) / (2 * n);
}

// Each channel stretched so that its darkest value becomes 0 and its lightest 255.
template <int C, class Team>
UPS_HD void auto_contrast(const Canvas<C, Team>& c) {
  int32_t *const low = c.counts, *const high = c.counts + C;
  c.team.each(C, [&](int channel) { low[channel] = 255, high[channel] = 0; });
  c.team.sync();
  int lowest[C], highest[C];  // of the pixels of this thread
  for (int channel = 0; channel < C; ++channel) lowest[channel] = 255, highest[channel] = 0;
  c.each_pixel([&](const uint8_t* pixel) {
    for (int channel = 0; channel < C; ++channel) {
      lowest[channel] = pixel[channel] < lowest[channel] ? pixel[channel] : lowest[channel];
      highest[channel] = pixel[channel] > highest[channel] ? pixel[channel] : highest[channel];
    }
  });
  for (int channel = 0; channel < C; ++channel) {
    c.team.least(low + channel, lowest[channel]);
    c.team.most(high + channel, highest[channel]);
  }
  c.team.sync();
  c.team.each(C * 256, [&](int i) {
    const int channel = i / 256, value = i % 256, lo = low[channel], hi = high[channel];
    if (hi <= lo) {
      c.lookup[i] = static_cast<uint8_t>(value);
    } else {  // in Pillow's doubles, rounded where Pillow rounds
      const double scale = 255.0 / (hi - lo), level = value, darkest = -lo;
      const int stretched = static_cast<int>(rounded_product(level, scale) + rounded_product(darkest, scale));
      c.lookup[i] = static_cast<uint8_t>(stretched < 0 ? 0 : stretched > 255 ? 255 : stretched);
    }
  });
  c.team.sync();
  look_up(c, c.lookup, 256);
}

// Each channel's values spread so that all become about as frequent.
template <int C, class Team>
UPS_HD void equalize(const Canvas<C, Team>& c) {
  c.team.each(C * 256, [&](int i) { c.counts[i] = 0; });
  c.team.sync();
  int32_t* const counts = c.counts;
  const Team& team = c.team;
  c.each_pixel([=, &team](const uint8_t* pixel) {
    for (int channel = 0; channel < C; ++channel) team.add(counts + channel * 256 + pixel[channel], 1);
  });
  c.team.sync();
  c.team.each(C, [&](int channel) {
    const int32_t* const count = c.counts + channel * 256;
    uint8_t* const lookup = c.lookup + channel * 256;
    int last = 255;
    while (count[last] == 0) --last;
    const int step = (c.H * c.W - count[last]) / 255;  // 0 also where there is one value only
    int sum = step / 2;
    for (int value = 0; value < 256; ++value) {
      const int level = step ? sum / step : value;
      lookup[value] = static_cast<uint8_t>(level < 255 ? level : 255);
      sum += count[value];
    }
  });
  c.team.sync();
  look_up(c, c.lookup, 256);
}

// Nearest neighbor, black outside: pixel (y, x) shows (a3 x + a4 y + a5, a0 x + a1 y + a2), 16.16 fixed point.
template <int C, class Team>
UPS_HD void affine(Canvas<C, Team>& c, const int32_t* a) {
  const int a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3], a4 = a[4], a5 = a[5], H = c.H, W = c.W;
  const uint8_t* const image = c.image;
  uint8_t* const spare = c.spare;
  c.team.each_pixel(H, W, [=](int y, int x) {
    const int from_x = (a0 * x + a1 * y + a2) >> 16, from_y = (a3 * x + a4 * y + a5) >> 16;
    const bool inside = from_x >= 0 && from_x < W && from_y >= 0 && from_y < H;
    const uint8_t* const from = image + (inside ? (from_y * W + from_x) * C : 0);
    uint8_t* const to = spare + (y * W + x) * C;
    for (int channel = 0; channel < C; ++channel) to[channel] = inside ? from[channel] : 0;
  });
  c.swap();
}

// Away from gray or towards it, as `table` [256, 256] blends.
template <int C, class Team>
UPS_HD void color(const Canvas<C, Team>& c, const uint8_t* table) {
  c.each_pixel([=](uint8_t* pixel) {
    const uint8_t* const row = table + 256 * luma<C>(pixel);
    for (int channel = 0; channel < C; ++channel) pixel[channel] = row[pixel[channel]];
  });
  c.team.sync();
}

// Away from the smoothed image or towards it: the mean of the 3x3 neighbors, the center counted five times. The border
// is not smoothed.
template <int C, class Team>
UPS_HD void sharpness(Canvas<C, Team>& c, const uint8_t* table) {
  const int H = c.H, W = c.W, row = W * C;
  const uint8_t* const image = c.image;
  uint8_t* const spare = c.spare;
  c.team.each_pixel(H, W, [=](int y, int x) {
    const uint8_t* const from = image + (y * W + x) * C;
    uint8_t* const to = spare + (y * W + x) * C;
    const bool border = y == 0 || x == 0 || y == H - 1 || x == W - 1;
    for (int channel = 0; channel < C; ++channel) {
      const uint8_t* const p = from + channel;
      int smooth = *p;
      if (!border) {
        const int sum = p[-row - C] + p[-row] + p[-row + C] + p[-C] + 5 * *p + p[C] + p[row - C] + p[row] + p[row + C];
        smooth = (2 * sum + 13) / 26;
      }
      to[channel] = table[256 * smooth + *p];
    }
  });
  c.swap();
}

// A square of one color.
template <int C, class Team>
UPS_HD void fill(const Canvas<C, Team>& c, const Variant& v, const PlannedOp& op) {
  const int reach = v.value[1], W = c.W, top = op.top, left = op.left;
  const int bottom = top + reach < c.H ? top + reach + 1 : c.H, right = left + reach < W ? left + reach + 1 : W;
  uint8_t* const image = c.image;
  const int32_t* const color = v.value + 2;
  c.team.each_pixel(bottom - top, right - left, [=](int y, int x) {
    uint8_t* const pixel = image + ((top + y) * W + left + x) * C;
    for (int channel = 0; channel < C; ++channel) pixel[channel] = static_cast<uint8_t>(color[channel]);
  });
  c.team.sync();
}

template <int C, class Team>
UPS_HD void operate(Canvas<C, Team>& c, const Variant& v, const PlannedOp& op, const uint8_t* blends) {
  const auto table = [&] { return blends + 65536 * v.value[0]; };
  switch (v.operation) {
    case Operation::lookup:
      return look_up(c, v.lookup, 0);
    case Operation::auto_contrast:
      return auto_contrast(c);
    case Operation::equalize:
      return equalize(c);
    case Operation::affine:
      return affine(c, v.value);
    case Operation::color:
      return color(c, table());
    case Operation::contrast:
      return look_up(c, table() + 256 * mean_luma(c), 0);
    case Operation::sharpness:
      return sharpness(c, table());
    case Operation::fill:
      return fill(c, v, op);
  }
}

// Mirrored first, then cropped from the reflected surroundings.
template <int C, class Team>
UPS_HD void flip_and_crop(Canvas<C, Team>& c, const PlannedFrame& frame) {
  if (!frame.flip && !frame.dy && !frame.dx) return;
  const int H = c.H, W = c.W, dy = frame.dy, dx = frame.dx, flip = frame.flip;
  const uint8_t* const image = c.image;
  uint8_t* const spare = c.spare;
  c.team.each_pixel(H, W, [=](int y, int x) {
    const int from_x = reflected(x + dx, W), from_y = reflected(y + dy, H);
    const uint8_t* const from = image + (from_y * W + (flip ? W - 1 - from_x : from_x)) * C;
    uint8_t* const to = spare + (y * W + x) * C;
    for (int channel = 0; channel < C; ++channel) to[channel] = from[channel];
  });
  c.swap();
}

// From a to b by factor / kOne, and beyond. With factors below 2 in steps of 2^-14 no float32 product or sum of
// Pillow's is rounded, so this is the same number.
UPS_HD uint8_t blend(int a, int b, int factor) {
  const int value = (a * kOne + factor * (b - a)) >> 14;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

template <int C, class Team>
UPS_HD void jitter(const Canvas<C, Team>& c, const PlannedFrame& frame) {
  constexpr int kOrders[6] = {0x012, 0x021, 0x102, 0x120, 0x201, 0x210};  // a digit for each step
  for (int step = 2; step >= 0; --step) {
    const int what = kOrders[frame.order] >> 4 * step & 15, factor = frame.factor[what];
    if (factor == kOne) continue;
    if (what == kSaturation) {
      c.each_pixel([=](uint8_t* pixel) {
        const int gray = luma<C>(pixel);
        for (int channel = 0; channel < C; ++channel) pixel[channel] = blend(gray, pixel[channel], factor);
      });
      c.team.sync();
    } else {
      const int base = what == kContrast ? mean_luma(c) : 0;
      uint8_t* const lookup = c.lookup;
      c.team.each(256, [=](int value) { lookup[value] = blend(base, value, factor); });
      c.team.sync();
      look_up(c, lookup, 0);
    }
  }
}

template <int C, class Team, class Word>
UPS_HD void normalize(const Canvas<C, Team>& c, const PlannedFrame& frame, const Word* norm, Word* out) {
  const uint8_t* const image = c.image;
  c.team.each(c.H * c.W, [=](int i) {
    for (int channel = 0; channel < C; ++channel) out[i * C + channel] = norm[channel * 256 + image[i * C + channel]];
  });
  c.team.sync();
  const int W = c.W, top = frame.top, left = frame.left;
  c.team.each_pixel(frame.bottom - top, (frame.right - left) * C,
                    [=](int y, int x) { out[((top + y) * W + left) * C + x] = 0; });
}

// The plan of row b: as given, or drawn.
template <int C, class Team, class Word>
UPS_HD void make_plan(const Canvas<C, Team>& c, const AugmentArgs<Word>& a, int64_t b) {
  const int n_ops = a.settings.n_ops;
  if (a.plan == nullptr) {
    c.team.each(n_ops + 3, [&](int slot) { draw_slot(a, b, slot, c.plan); });
  } else {
    c.team.each(plan_words(n_ops), [&](int i) { c.plan[i] = a.plan[b * plan_words(n_ops) + i]; });
  }
  c.team.sync();
}

template <int C, class Team, class Word>
UPS_HD void augment_image(Canvas<C, Team> c, const AugmentArgs<Word>& a, int64_t b) {
  make_plan(c, a, b);
  const uint8_t* const source = a.images + a.index[b] * c.size();
  uint8_t* const image = c.image;
  c.team.each(c.size(), [=](int i) { image[i] = source[i]; });
  c.team.sync();
  for (int i = 0; i < a.settings.n_ops; ++i) {
    const PlannedOp& op = reinterpret_cast<const PlannedOp*>(c.plan)[i];
    if (op.variant >= 0) operate(c, a.variants[op.variant], op, a.blends);
  }
  const auto& frame = *reinterpret_cast<const PlannedFrame*>(c.plan + a.settings.n_ops * kOpWords);
  flip_and_crop(c, frame);
  jitter(c, frame);
  normalize(c, frame, a.norm, a.out + b * c.size());
  c.team.sync();  // the next image may reuse this memory
}
