// The gradient of LayerNorm for one row, h = (t - mean) * rstd and g = dy * weight:
//
//   dt = (g - mean(g) - h * mean(g h)) * rstd (+ the gradient that reaches t past the norm)
//
// and the row's part of dweight, dy * h, and of dbias, dy, added to the sums of a block of rows. Included through
// foreach_isa.h, once for each instruction set: no include guard.

// T is the type of dy, t, dt and the residual gradient (null if there is none); W that of weight. The sums have
// room for whole vectors.
template <class T, class W, class A = accumulate_t<T>>
void row_gradient(const void* dy_row, const void* t_row, const void* weight_row, const void* residual_row, A mean,
                  A rstd, void* dt_row, A* dweight_sum, A* dbias_sum, int64_t width) {
  constexpr int64_t step = lanes<A>;
  const T* const dy = static_cast<const T*>(dy_row);
  const T* const t = static_cast<const T*>(t_row);
  const W* const weight = static_cast<const W*>(weight_row);
  const T* const residual = static_cast<const T*>(residual_row);
  T* const dt = static_cast<T*>(dt_row);

  // lanes past the end of a row are zeros, and so is their dy
  Vector<A> sum_g[2] = {}, sum_gh[2] = {};
  for (int64_t i = 0; i < width; i += step) {
    Vector<A> upstream, h, w, sum;
    load_up_to(upstream, dy + i, width - i);
    load_up_to(h, t + i, width - i);
    load_up_to(w, weight + i, width - i);
    h = (h - mean) * rstd;
    const Vector<A> g = upstream * w;
    const int64_t chain = i / step % 2;
    sum_g[chain] += g;
    sum_gh[chain] += g * h;
    load(sum, dweight_sum + i);
    store(dweight_sum + i, sum + upstream * h);
    load(sum, dbias_sum + i);
    store(dbias_sum + i, sum + upstream);
  }
  const A mean_g = sum_lanes<A>(sum_g[0] + sum_g[1]) / static_cast<A>(width);
  const A mean_gh = sum_lanes<A>(sum_gh[0] + sum_gh[1]) / static_cast<A>(width);
  for (int64_t i = 0; i < width; i += step) {
    Vector<A> upstream, h, w;
    load_up_to(upstream, dy + i, width - i);
    load_up_to(h, t + i, width - i);
    load_up_to(w, weight + i, width - i);
    h = (h - mean) * rstd;
    Vector<A> gradient = (upstream * w - mean_g - h * mean_gh) * rstd;
    if (residual != nullptr) {
      Vector<A> past;
      load_up_to(past, residual + i, width - i);
      gradient += past;
    }
    store_up_to(dt + i, gradient, width - i);
  }
}
