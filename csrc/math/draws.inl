// What is drawn for an image: a pure function of (seed, draw, sample id, what it is for). No include guard, as in
// row_math.inl.

struct Words {
  uint32_t word[4];
};

// Philox 4x32 with 10 rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
UPS_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0, n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
    c0 = n0, c1 = static_cast<uint32_t>(b), c2 = n2, c3 = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// An integer of low..high.
UPS_HD int32_t between(uint32_t word, int32_t low, int32_t high) {
  return low + static_cast<int32_t>((uint64_t{word} * static_cast<uint32_t>(high - low + 1)) >> 32);
}

// The first pixel of a square whose center lies anywhere in [0, size), or with low = 1 in (1, size], cut off at 0.
UPS_HD int32_t corner(uint32_t word, int32_t size, int32_t half, int32_t low) {
  const int64_t center =  // 16.16
      low * int64_t{65537} + static_cast<int64_t>((uint64_t{word} * (static_cast<uint32_t>(size - low) << 16)) >> 32);
  const int32_t first = center > half ? static_cast<int32_t>((center - half) >> 16) : 0;
  return first < size ? first : size;
}

constexpr uint32_t kFrameSlot = 1 << 16, kJitterSlot = kFrameSlot + 1, kCutoutSlot = kFrameSlot + 2;

// Of row b of the batch: slot 0..n_ops-1 draws an operation, then the frame, the jitter and the cutout: n_ops + 3
// slots, which may be drawn by as many threads.
UPS_HD void draw_slot(const DrawArgs& a, int64_t b, int slot, int32_t* plan) {
  const AugmentSettings& s = a.settings;
  const auto draw = [&](uint32_t what) {
    const auto id = static_cast<uint64_t>(a.index[b]), seed = static_cast<uint64_t>(*a.seed);
    const auto draw_number = static_cast<uint32_t>(a.draw_number[b * a.draw_stride]);
    return philox(static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32), draw_number, what,
                  static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  };
  auto& frame = *reinterpret_cast<PlannedFrame*>(plan + s.n_ops * kOpWords);
  if (slot < s.n_ops) {
    const Words r = draw(slot);
    const int32_t* operation = a.operations + 2 * between(r.word[0], 0, a.n_operations - 1);
    const int32_t chosen = operation[0] + between(r.word[1], 0, operation[1] - 1);
    auto& op = reinterpret_cast<PlannedOp*>(plan)[slot];
    const Variant& variant = a.variants[chosen];
    const bool fill = variant.operation == Operation::fill;
    op.variant = chosen;
    op.top = fill ? corner(r.word[2], a.H, variant.value[0], variant.value[5]) : 0;
    op.left = fill ? corner(r.word[3], a.W, variant.value[0], variant.value[5]) : 0;
  } else if (slot == s.n_ops) {
    const Words r = draw(kFrameSlot);
    frame.flip = s.flip ? between(r.word[0], 0, 1) : 0;
    frame.dy = between(r.word[1], -s.crop, s.crop);
    frame.dx = between(r.word[2], -s.crop, s.crop);
    frame.order = between(r.word[3], 0, 5);
  } else if (slot == s.n_ops + 1) {
    const Words r = draw(kJitterSlot);
    for (int i = 0; i < 3; ++i) frame.factor[i] = between(r.word[i], s.low[i], s.high[i]);
  } else {
    const Words r = draw(kCutoutSlot);
    const int32_t half = s.cutout ? between(r.word[0], 1, s.cutout) / 2 : 0;
    const int32_t y = between(r.word[1], 0, a.H - 1), x = between(r.word[2], 0, a.W - 1);
    frame.top = y - half > 0 ? y - half : 0;
    frame.left = x - half > 0 ? x - half : 0;
    frame.bottom = y + half < a.H ? y + half : a.H;
    frame.right = x + half < a.W ? x + half : a.W;
  }
}

// Whether a plan that was given can be carried out.
UPS_HD bool plan_fits(const DrawArgs& a, const int32_t* plan) {
  bool fits = true;
  for (int i = 0; i < a.settings.n_ops; ++i) {
    const PlannedOp& op = reinterpret_cast<const PlannedOp*>(plan)[i];
    fits = fits && op.variant >= -1 && op.variant < a.n_variants;
    fits = fits && op.top >= 0 && op.top <= a.H && op.left >= 0 && op.left <= a.W;
  }
  const auto& f = *reinterpret_cast<const PlannedFrame*>(plan + a.settings.n_ops * kOpWords);
  fits = fits && f.dy > -a.H && f.dy < a.H && f.dx > -a.W && f.dx < a.W && f.order >= 0 && f.order < 6;
  for (int i = 0; i < 3; ++i) fits = fits && f.factor[i] >= 0 && f.factor[i] <= 2 * kOne;
  return fits && f.top >= 0 && f.top <= f.bottom && f.bottom <= a.H && f.left >= 0 && f.left <= f.right &&
         f.right <= a.W;
}
