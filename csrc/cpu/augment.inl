// The image loop, compiled once per instruction set (each_isa.h). Images are shared out among threads.

#include "../math/row_math.inl"

#include "../math/draws.inl"
#include "../math/pixels.inl"

struct SingleThread {
  template <class F>
  UPS_HD void each(int n, const F& f) const {
    for (int i = 0; i < n; ++i) f(i);
  }
  template <class F>
  UPS_HD void each_pixel(int H, int W, const F& f) const {
    for (int y = 0; y < H; ++y) {
      for (int x = 0; x < W; ++x) f(y, x);
    }
  }
  UPS_HD void sync() const {}
  UPS_HD void add(int32_t* to, int32_t x) const { *to += x; }
  UPS_HD void least(int32_t* to, int32_t x) const { *to = x < *to ? x : *to; }
  UPS_HD void most(int32_t* to, int32_t x) const { *to = x > *to ? x : *to; }
};

template <int C, class Word>
void augment_rows(const AugmentArgs<Word>& args, int64_t begin, int64_t end) {
  const Aligned scratch(canvas_bytes(args.H, args.W, C, args.settings.n_ops).total);
  const SingleThread team;
  for (int64_t b = begin; b < end; ++b) {
    augment_image(canvas_in<C>(static_cast<uint8_t*>(scratch.data), team, args), args, b);
  }
}

void draw_rows(const DrawArgs& args, int32_t* plan, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    for (int slot = 0; slot < args.settings.n_ops + 3; ++slot) {
      draw_slot(args, b, slot, plan + b * plan_words(args.settings.n_ops));
    }
  }
}
