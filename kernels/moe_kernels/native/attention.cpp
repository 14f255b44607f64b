// Causal attention on CPU, a tile of queries against a tile of keys at a time, in the manner of FlashAttention
// (arXiv 2205.14135, 2307.08691): scores are never all written, and backward makes them again. Tiles that no query sees
// are skipped, so that short documents and windows cost what they need. See native/attention.py.
//
// Every sum has one order, whatever the number of threads.

#include "tiles.h"

namespace {

struct Shape {  // q (B, S, H, d), k (B, S, G, d), v (B, S, G, w); G divides H
  i64 B, S, H, G, d, w, threads;
  float scale;
  const i64* first;  // (B, S): the first key that a query sees; it sees all from there to itself
};

// A key's or query's tile, copied with its rows' inner dimension widened by zeros to ``depth``.
template <class F>
void copy_rows(const typename F::Row* from, i64 stride, i64 rows, i64 n, i64 depth, typename F::Cell* to) {
  for (i64 r = 0; r < ROWS; r++) {
    if (r < rows) convert(from + r * stride, n, to + r * depth);
    std::fill(to + r * depth + (r < rows ? n : 0), to + (r + 1) * depth, typename F::Cell{});
  }
}

// out (64 rows, n) (+)= a (64, depth) b, whose columns are packed in blocks of COLS; ld is that of out.
template <class C>
void product(i64 n, i64 depth, const C* a, const C* b, float* out, i64 ld, bool add) {
  for (i64 c = 0; c < n; c += COLS) {
    const i64 columns = std::min(COLS, n - c);
    tile_product<C>(ROWS, columns, depth, a, depth, b + c * depth, columns, out + c, ld, add);
  }
}

i64 first_tile(const Shape& s, i64 b, i64 query, i64 rows) {
  const i64* first = s.first + b * s.S + query;
  return *std::min_element(first, first + rows) / ROWS;
}

// In a tile's row a query sees the keys from ``low`` to ``high`` (32 bits: loops over floats vectorise).
struct Seen {
  int32_t low, high;
  Seen(i64 low, i64 high) : low(std::clamp<i64>(low, 0, ROWS)), high(std::clamp<i64>(high, 0, ROWS)) {}
  bool operator()(int32_t c) const { return c >= low && c < high; }
  bool all() const { return low == 0 && high == ROWS; }
};

// Zeros for keys that a query does not see.
inline void hide(Seen seen, float* __restrict row) {
  if (!seen.all())
    for (int32_t c = 0; c < ROWS; c++) row[c] = seen(c) ? row[c] : 0.0f;
}

// p = exp(scale * score - above) where a query sees a key, else 0.
inline void weights_of(const float* scores, Seen seen, float scale, float above, float* p) {
  for (i64 c = 0; c < ROWS; c += B) store(p + c, exponential(load(scores + c) * scale - above));
  hide(seen, p);
}

// The gradient of the loss in the scores, from ``above``, that in p.
inline void slopes_of(const float* __restrict p, const float* __restrict above, Seen seen, float scale, float delta,
                      float* __restrict slopes) {
  for (i64 c = 0; c < ROWS; c++) slopes[c] = scale * p[c] * (above[c] - delta);
  hide(seen, slopes);
}

// tops or, in each lane, the largest of the scores that are seen, if that is larger.
inline Floats higher(const float* scores, Seen seen, Floats tops) {
  if (seen.all()) {
    for (i64 c = 0; c < ROWS; c += B) tops = larger(load(scores + c), tops);
  } else {
    float room[ROWS];
    for (int32_t c = 0; c < ROWS; c++) room[c] = seen(c) ? scores[c] : -INFINITY;
    for (i64 c = 0; c < ROWS; c += B) tops = larger(load(room + c), tops);
  }
  return tops;
}

template <class F, class T = typename F::Row>
void forward(const Shape& s, const T* q, const T* k, const T* v, T* out, float* lse) {
  using C = typename F::Cell;
  const i64 depth = up_to(s.d, DEPTH), tiles = (s.S + ROWS - 1) / ROWS, group = s.H / s.G;
  const i64 parts = std::clamp<i64>(s.threads == 1 ? 1 : 4 * s.threads / (s.B * s.G), 1, tiles);
#pragma omp parallel num_threads(s.threads)
  {
    Scratch<C> keys(tiles * ROWS * depth), values(tiles * ROWS * s.w), query(ROWS * depth), p(tiles * ROWS * ROWS);
    Scratch<float> scores(tiles * ROWS * ROWS), sums(ROWS * s.w);
    float shares[ROWS];
#pragma omp for schedule(dynamic, 1)
    for (i64 task = 0; task < s.B * s.G * parts; task++) {
      const i64 part = task % parts, g = task / parts % s.G, b = task / parts / s.G;
      const T *k0 = k + (b * s.S * s.G + g) * s.d, *v0 = v + (b * s.S * s.G + g) * s.w;
      const i64 seen = ((tiles - 1 - part) / parts * parts + part + 1);  // tiles of keys that this part's queries may see
      for (i64 t = 0; t < seen; t++) {
        const i64 rows = std::min(ROWS, s.S - t * ROWS);
        const T *tile_k = k0 + t * ROWS * s.G * s.d, *tile_v = v0 + t * ROWS * s.G * s.w;
        C* to = keys.data + t * ROWS * depth;
        if (rows < ROWS) std::fill(to, to + ROWS * depth, C{});
        pack_transposed<F>(tile_k, s.G * s.d, s.d, rows, depth, to);
        pack_rows<F>([&](i64 r) { return tile_v + r * s.G * s.w; }, rows, s.w, ROWS, values.data + t * ROWS * s.w);
      }
      for (i64 t = part; t < tiles; t += parts) {
        const i64 start = t * ROWS, rows = std::min(ROWS, s.S - start), from = first_tile(s, b, start, rows);
        const i64 width = (t + 1 - from) * ROWS;
        for (i64 h = g * group; h < (g + 1) * group; h++) {
          copy_rows<F>(q + ((b * s.S + start) * s.H + h) * s.d, s.H * s.d, rows, s.d, depth, query.data);
          for (i64 j = from; j <= t; j++)
            tile_product<C>(ROWS, std::min(ROWS, s.S - j * ROWS), depth, query.data, depth, keys.data + j * ROWS * depth,
                            std::min(ROWS, s.S - j * ROWS), scores.data + (j - from) * ROWS, width, false);
          for (i64 r = 0; r < rows; r++) {
            float* row = scores.data + r * width;
            const i64 low = s.first[b * s.S + start + r] - from * ROWS, high = start + r + 1 - from * ROWS;
            Floats tops = Floats{} - INFINITY, totals{};
            for (i64 c = 0; c < width; c += ROWS) tops = higher(row + c, Seen(low - c, high - c), tops);
            const float above = largest(tops) * s.scale;
            for (i64 c = 0; c < width; c += ROWS) {
              float weights[ROWS];
              weights_of(row + c, Seen(low - c, high - c), s.scale, above, weights);
              for (i64 i = 0; i < ROWS; i += B) totals += load(weights + i);
              to_cells<F>(weights, ROWS, p.data + r * ROWS + c * ROWS);
            }
            const float total = sum(totals);
            shares[r] = 1.0f / total;
            lse[(b * s.H + h) * s.S + start + r] = above + std::log(total);
          }
          for (i64 j = 0; j <= t - from; j++)
            product<C>(s.w, ROWS, p.data + j * ROWS * ROWS, values.data + (j + from) * ROWS * s.w, sums.data, s.w, j > 0);
          for (i64 r = 0; r < rows; r++) {
            float* row = sums.data + r * s.w;
            for (i64 c = 0; c < s.w; c++) row[c] *= shares[r];
            convert(row, s.w, out + ((b * s.S + start + r) * s.H + h) * s.w);
          }
        }
      }
    }
    at::native::cpublas::brgemm_release(PAIR<C> == 2);
  }
}

template <class F, class T = typename F::Row>
void backward(const Shape& s, const T* q, const T* k, const T* v, const T* out, const float* lse, const T* dout, T* dq,
              T* dk, T* dv) {
  using C = typename F::Cell;
  const i64 depth = up_to(s.d, DEPTH), wide_depth = up_to(s.w, DEPTH), group = s.H / s.G;
  const i64 tiles = (s.S + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(s.threads)
  {
    Scratch<C> keys(tiles * ROWS * depth), key_rows(tiles * ROWS * s.d), values(tiles * ROWS * wide_depth);
    Scratch<C> query(ROWS * depth), query_rows(ROWS * s.d), above(ROWS * wide_depth), above_rows(ROWS * s.w);
    Scratch<C> p(ROWS * ROWS), ds(ROWS * ROWS), turned(ROWS * ROWS);
    Scratch<float> sum_q(ROWS * s.d), sum_k(tiles * ROWS * s.d), sum_v(tiles * ROWS * s.w);
    Scratch<float> scores(ROWS * ROWS), dp(ROWS * ROWS);
#pragma omp for schedule(dynamic, 1)
    for (i64 task = 0; task < s.B * s.G; task++) {
      const i64 g = task % s.G, b = task / s.G;
      for (i64 t = 0; t < tiles; t++) {
        const i64 rows = std::min(ROWS, s.S - t * ROWS);
        const T *tile_k = k + ((b * s.S + t * ROWS) * s.G + g) * s.d, *tile_v = v + ((b * s.S + t * ROWS) * s.G + g) * s.w;
        pack_transposed<F>(tile_k, s.G * s.d, s.d, rows, depth, keys.data + t * ROWS * depth);
        pack_transposed<F>(tile_v, s.G * s.w, s.w, rows, wide_depth, values.data + t * ROWS * wide_depth);
        pack_rows<F>([&](i64 r) { return tile_k + r * s.G * s.d; }, rows, s.d, ROWS, key_rows.data + t * ROWS * s.d);
      }
      std::fill(sum_k.data, sum_k.data + tiles * ROWS * s.d, 0.0f);
      std::fill(sum_v.data, sum_v.data + tiles * ROWS * s.w, 0.0f);
      for (i64 h = g * group; h < (g + 1) * group; h++)
        for (i64 t = 0; t < tiles; t++) {
          const i64 start = t * ROWS, rows = std::min(ROWS, s.S - start), from = first_tile(s, b, start, rows);
          const i64 at = (b * s.S + start) * s.H + h;  // of the first query, in rows of (B, S, H)
          const T *tile_q = q + at * s.d, *tile_do = dout + at * s.w, *tile_out = out + at * s.w;
          copy_rows<F>(tile_q, s.H * s.d, rows, s.d, depth, query.data);
          copy_rows<F>(tile_do, s.H * s.w, rows, s.w, wide_depth, above.data);
          pack_rows<F>([&](i64 r) { return tile_q + r * s.H * s.d; }, rows, s.d, ROWS, query_rows.data);
          pack_rows<F>([&](i64 r) { return tile_do + r * s.H * s.w; }, rows, s.w, ROWS, above_rows.data);
          float delta[ROWS];
          for (i64 r = 0; r < rows; r++) {
            const T *a = tile_do + r * s.H * s.w, *o = tile_out + r * s.H * s.w;
            float lanes[B] = {};
            i64 c = 0;
            for (; c + B <= s.w; c += B)
              for (i64 lane = 0; lane < B; lane++) lanes[lane] += wide(a[c + lane]) * wide(o[c + lane]);
            for (; c < s.w; c++) lanes[0] += wide(a[c]) * wide(o[c]);
            delta[r] = sum(load(lanes));
          }
          for (i64 j = from; j <= t; j++) {
            const i64 columns = std::min(ROWS, s.S - j * ROWS);
            tile_product<C>(ROWS, columns, depth, query.data, depth, keys.data + j * ROWS * depth, columns, scores.data,
                            ROWS, false);
            tile_product<C>(ROWS, columns, wide_depth, above.data, wide_depth, values.data + j * ROWS * wide_depth,
                            columns, dp.data, ROWS, false);
            std::fill(p.data + rows * ROWS, p.data + ROWS * ROWS, C{});
            std::fill(ds.data + rows * ROWS, ds.data + ROWS * ROWS, C{});
            for (i64 r = 0; r < rows; r++) {
              const Seen seen(s.first[b * s.S + start + r] - j * ROWS, start + r + 1 - j * ROWS);
              float weights[ROWS], slopes[ROWS];
              weights_of(scores.data + r * ROWS, seen, s.scale, lse[(b * s.H + h) * s.S + start + r], weights);
              slopes_of(weights, dp.data + r * ROWS, seen, s.scale, delta[r], slopes);
              to_cells<F>(weights, ROWS, p.data + r * ROWS);
              to_cells<F>(slopes, ROWS, ds.data + r * ROWS);
            }
            pack_columns<Format<C, C>>([&](i64 r) { return p.data + r * ROWS; }, ROWS, ROWS, ROWS, turned.data);
            product<C>(s.w, ROWS, turned.data, above_rows.data, sum_v.data + j * ROWS * s.w, s.w, true);
            pack_columns<Format<C, C>>([&](i64 r) { return ds.data + r * ROWS; }, ROWS, ROWS, ROWS, turned.data);
            product<C>(s.d, ROWS, turned.data, query_rows.data, sum_k.data + j * ROWS * s.d, s.d, true);
            product<C>(s.d, ROWS, ds.data, key_rows.data + j * ROWS * s.d, sum_q.data, s.d, j > from);
          }
          for (i64 r = 0; r < rows; r++) convert(sum_q.data + r * s.d, s.d, dq + (at + r * s.H) * s.d);
        }
      for (i64 r = 0; r < s.S; r++) {
        const i64 at = (b * s.S + r) * s.G + g;
        convert(sum_k.data + r * s.d, s.d, dk + at * s.d);
        convert(sum_v.data + r * s.w, s.w, dv + at * s.w);
      }
    }
    at::native::cpublas::brgemm_release(PAIR<C> == 2);
  }
}

}  // namespace

extern "C" {

void attention_forward(i64 half, const void* q, const void* k, const void* v, const i64* first, void* out, float* lse,
                       i64 B, i64 S, i64 H, i64 G, i64 d, i64 w, double scale, i64 threads) {
  const Shape shape{B, S, H, G, d, w, threads, float(scale), first};
  with_format(half, [=](auto format) {
    using T = typename decltype(format)::Row;
    forward<decltype(format)>(shape, (const T*)q, (const T*)k, (const T*)v, (T*)out, lse);
  });
}

void attention_backward(i64 half, const void* q, const void* k, const void* v, const i64* first, const void* out,
                        const float* lse, const void* dout, void* dq, void* dk, void* dv, i64 B, i64 S, i64 H, i64 G,
                        i64 d, i64 w, double scale, i64 threads) {
  const Shape shape{B, S, H, G, d, w, threads, float(scale), first};
  with_format(half, [=](auto format) {
    using T = typename decltype(format)::Row;
    backward<decltype(format)>(shape, (const T*)q, (const T*)k, (const T*)v, (const T*)out, lse, (const T*)dout, (T*)dq,
                               (T*)dk, (T*)dv);
  });
}
}
