// The matrix products of an expert layer on CPU, each over all experts in one call; see native/experts.py.
//
// Tiles are multiplied by oneDNN's batch-reduce kernel (AMX, AVX-512 or AVX2, whichever the machine has), which torch
// exports. What is added here is what costs time around it when experts are small: a matrix is put into the kernel's
// layout (and rounded to bfloat16, if wider) once for up to CHUNK rows, rows are gathered straight into scratch, what
// follows a product is done on its tile in the cache, and the work of all experts is shared out among the threads.
//
// Compiled on first use, against declarations alone: no header of torch is needed. T is the type of rows, W of weights.
// Every sum has one order, whatever the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace c10 {
struct BFloat16 {
  uint16_t bits;
};
}  // namespace c10
using bf16 = c10::BFloat16;
using i64 = int64_t;

namespace at::native::cpublas {  // torch 2.7 to 2.13: ATen/native/CPUBlas.h
void brgemm(i64, i64, i64, i64, i64, i64, bool, const bf16*, const bf16*, float*, bool);
void brgemm(i64, i64, i64, i64, i64, i64, bool, const float*, const float*, float*, bool);
void brgemm_release(bool);
}  // namespace at::native::cpublas

namespace {

constexpr i64 CHUNK = 512;       // rows for which a matrix is packed once, at most
constexpr i64 CACHED = 1 << 19;  // values of rows in a scratch
constexpr i64 GROUP = 256;  // columns that are packed together: whole cache lines are read, one after another
constexpr i64 ROWS = 64;    // of a tile
constexpr i64 COLS = 64;
constexpr i64 STEP = 8;     // tiles are widened to a multiple of it: oneDNN generates code for each size
constexpr i64 DEPTH = 32;   // likewise, of the inner dimension; at least two vectors

i64 up_to(i64 n, i64 step) { return (n + step - 1) / step * step; }

float wide(float x) { return x; }
float wide(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

template <class T>
T narrow(float x);
template <>
float narrow<float>(float x) {
  return x;
}
template <>
bf16 narrow<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t nan = (bits >> 16) | 0x40;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded)};
}

template <class T, class From>
T as(From x) {
  if constexpr (sizeof(T) == sizeof(From))
    return x;
  else
    return narrow<T>(wide(x));
}

// to = from, rounded.
template <class T, class From>
void convert(const From* __restrict from, i64 n, T* __restrict to) {
  i64 c = 0;
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) < sizeof(From))
    for (; c + 16 <= n; c += 16) {
      const auto rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + c));
      memcpy(to + c, &rounded, sizeof(rounded));
    }
#endif
  for (; c < n; c++) to[c] = as<T>(from[c]);
}

// n values as T: where they are, or converted into ``room``.
template <class T, class From>
const T* converted(const From* from, i64 n, T* room) {
  if constexpr (sizeof(T) == sizeof(From)) {
    return from;
  } else {
    convert(from, n, room);
    return room;
  }
}

template <class T>
struct Scratch {
  static constexpr i64 LINE = 64 / sizeof(T);
  std::unique_ptr<T[]> memory;
  T* data;
  explicit Scratch(i64 n) : memory(new T[n + LINE]) {
    data = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
  }
};

// ---- layouts ---------------------------------------------------------------------------------------------------------

// The kernel wants its right operand as (k, n), in bfloat16 with each two rows interleaved: (k / 2, n, 2).
template <class T>
constexpr i64 PAIR = sizeof(T) == 2 ? 2 : 1;

// One value of each row of a pair, or the value of a single row, as one word.
template <class T, class W>
uint32_t word(W first, W second) {
  if constexpr (PAIR<T> == 2) return as<bf16>(first).bits | uint32_t(as<bf16>(second).bits) << 16;
  uint32_t out;
  memcpy(&out, &first, 4);
  return out;
}

constexpr i64 B = 16;  // words of a vector
typedef uint32_t Vector __attribute__((vector_size(4 * B), aligned(4)));

// The transpose of B vectors: log2(B) rounds, each of which exchanges blocks of half the size.
inline void transpose(Vector (&v)[B]) {
#define ROUND(width, low, high)                             \
  for (i64 i = 0; i < B; i++)                               \
    if (!(i & width)) {                                     \
      const Vector a = v[i], b = v[i + width];              \
      v[i] = __builtin_shuffle(a, b, Vector low);           \
      v[i + width] = __builtin_shuffle(a, b, Vector high);  \
    }
#define LIST(...) {__VA_ARGS__}
  ROUND(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
        LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  ROUND(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
        LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  ROUND(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
        LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  ROUND(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
        LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#undef LIST
#undef ROUND
}

// out (depth, n), from w (n, k) whose rows are ld apart. Rows of out past k are zeros.
template <class T, class W>
void pack_transposed(const W* w, i64 ld, i64 k, i64 n, i64 depth, T* out) {
  constexpr i64 pair = PAIR<T>;
  auto* words = reinterpret_cast<uint32_t*>(out);
  const i64 whole_n = n / B * B, whole_k = k / pair / B * B;
  for (i64 j = 0; j < whole_n; j += B)
    for (i64 i = 0; i < whole_k; i += B) {
      Vector block[B];
      for (i64 c = 0; c < B; c++) {
        const W* at = w + (j + c) * ld + i * pair;
        T row[B * pair];
        memcpy(&block[c], converted(at, B * pair, row), sizeof(row));
      }
      transpose(block);
      for (i64 r = 0; r < B; r++) memcpy(words + (i + r) * n + j, &block[r], sizeof(Vector));
    }
  for (i64 i = 0; i < depth / pair; i++)
    for (i64 c = i < whole_k ? whole_n : 0; c < n; c++) {
      const W* at = w + c * ld + i * pair;
      words[i * n + c] = word<T>(i * pair < k ? at[0] : W{}, i * pair + pair - 1 < k ? at[pair - 1] : W{});
    }
}

// Likewise from k rows of n values, for blocks of COLS columns, each (depth, COLS), the last one narrower.
template <class T, class Row>
void pack_rows(Row row, i64 k, i64 n, i64 depth, T* out) {
  constexpr i64 pair = PAIR<T>;
  auto* words = reinterpret_cast<uint32_t*>(out);
  for (i64 i = 0; i < depth / pair; i++)
    for (i64 j = 0; j < n; j += COLS) {
      const i64 columns = std::min(COLS, n - j);
      uint32_t* __restrict to = words + j * (depth / pair) + i * columns;
      if (i * pair + pair <= k) {
        T room[2][COLS];
        const T* __restrict a = converted(row(i * pair) + j, columns, room[0]);
        const T* __restrict b = converted(row(i * pair + pair - 1) + j, columns, room[1]);
        for (i64 c = 0; c < columns; c++) to[c] = word<T>(a[c], b[c]);
      } else if (i * pair < k) {
        const auto* a = row(i * pair) + j;
        for (i64 c = 0; c < columns; c++) to[c] = word<T>(a[c], {});
      } else {
        std::fill(to, to + columns, 0);
      }
    }
}

// out (n, depth): the transpose of k rows of n values and, from there on, of zeros.
template <class T, class Row>
void pack_columns(Row row, i64 k, i64 n, i64 depth, T* out) {
  constexpr i64 pair = PAIR<T>;
  auto* words = reinterpret_cast<uint32_t*>(out);
  const i64 width = depth / pair;
  for (i64 i = 0; i < width; i += B)
    for (i64 j = 0; j < n; j += B) {
      const i64 columns = std::min(B, n - j);
      Vector block[B];
      for (i64 r = 0; r < B; r++) {
        const i64 at = (i + r) * pair;
        uint32_t line[B] = {};
        if (at + pair <= k && columns == B) {
          const T *a = row(at) + j, *b = row(at + pair - 1) + j;
          for (i64 c = 0; c < B; c++) line[c] = word<T>(a[c], b[c]);
        } else if (at < k) {
          const T *a = row(at) + j, *b = at + pair <= k ? row(at + pair - 1) + j : nullptr;
          for (i64 c = 0; c < columns; c++) line[c] = word<T>(a[c], b ? b[c] : T{});
        }
        memcpy(&block[r], line, sizeof(line));
      }
      transpose(block);
      for (i64 c = 0; c < columns; c++) memcpy(words + (j + c) * width + i, &block[c], sizeof(Vector));
    }
}

template <class T>
void tile_product(i64 m, i64 n, i64 k, const T* a, i64 lda, const T* b, i64 ldb, float* c, i64 ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, PAIR<T> == 2);
}

// ---- rows times an expert's matrix -----------------------------------------------------------------------------------

template <class T>
struct Rows {  // row r is row index[r], or r, of data
  const T* data;
  const i64* index;
  i64 width;
  const T* operator[](i64 r) const { return data + (index ? index[r] : r) * width; }
};

template <class W>
struct Matrices {  // of each expert: parts matrices that follow each other, (n, k) each, or (k, n) if not transposed
  const W* data;
  i64 experts, parts, n, k;
  bool transposed;
  template <class T>
  void pack(i64 e, i64 part, i64 column, i64 columns, i64 depth, T* out) const {
    const W* matrix = data + (e * parts + part) * n * k;
    if (transposed)
      for (i64 c = 0; c < columns; c += COLS)
        pack_transposed(matrix + (column + c) * k, k, k, std::min(COLS, columns - c), depth, out + c * depth);
    else
      pack_rows([&](i64 r) { return matrix + r * n + column; }, k, columns, depth, out);
  }
};

struct Task {
  i64 expert, row, rows, column, end;
};

// Chunks of every expert's rows; columns are split as well where there are too few chunks for the threads.
i64 chunk_of(i64 width) { return std::clamp(CACHED / width / ROWS * ROWS, ROWS, CHUNK); }

std::vector<Task> tasks_of(const i64* counts, i64 experts, i64 columns, i64 chunk, i64 threads) {
  i64 chunks = 0;
  for (i64 e = 0; e < experts; e++) chunks += (counts[e] + chunk - 1) / chunk;
  const i64 wanted = threads == 1 || chunks == 0 ? 1 : std::max<i64>(1, 4 * threads / chunks);
  const i64 width = up_to((columns + wanted - 1) / wanted, COLS);
  std::vector<Task> tasks;
  for (i64 e = 0, row = 0; e < experts; row += counts[e++])
    for (i64 r = 0; r < counts[e]; r += chunk)
      for (i64 c = 0; c < columns; c += width)
        tasks.push_back({e, row + r, std::min(chunk, counts[e] - r), c, std::min(c + width, columns)});
  return tasks;
}

struct Tile {  // products of ``rows`` rows from ``row`` on with ``columns`` columns from ``column`` on: one for each part
  i64 expert, row, rows, column, columns;
  const float* part[2];
};

template <class T, class W, class Then>
void rows_product(Rows<T> a, Matrices<W> w, const i64* counts, i64 threads, Then then) {
  const i64 depth = up_to(w.k, DEPTH), chunk = chunk_of(depth);
  const auto tasks = tasks_of(counts, w.experts, w.n, chunk, threads);
#pragma omp parallel num_threads(threads)
  {
    Scratch<T> rows(chunk * depth), packed(w.parts * depth * GROUP);
    Scratch<float> products(w.parts * ROWS * COLS);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); i++) {
      const Task& task = tasks[i];
      for (i64 r = 0; r < task.rows; r++) {
        memcpy(rows.data + r * depth, a[task.row + r], w.k * sizeof(T));
        std::fill(rows.data + r * depth + w.k, rows.data + (r + 1) * depth, T{});
      }
      const i64 wide_rows = up_to(task.rows, STEP);
      std::fill(rows.data + task.rows * depth, rows.data + wide_rows * depth, T{});
      for (i64 group = task.column; group < task.end; group += GROUP) {
        const i64 wide = std::min(GROUP, task.end - group);
        for (i64 p = 0; p < w.parts; p++) w.pack(task.expert, p, group, wide, depth, packed.data + p * depth * GROUP);
        for (i64 column = 0; column < wide; column += COLS)
          for (i64 r = 0; r < task.rows; r += ROWS) {
            const i64 n = std::min(ROWS, task.rows - r), m = up_to(n, STEP), columns = std::min(COLS, wide - column);
            Tile tile{task.expert, task.row + r, n, group + column, columns, {products.data, products.data + ROWS * COLS}};
            for (i64 p = 0; p < w.parts; p++)
              tile_product<T>(m, columns, depth, rows.data + r * depth, depth,
                              packed.data + (p * GROUP + column) * depth, columns, products.data + p * ROWS * COLS,
                              columns, false);
            then(tile);
          }
      }
    }
    at::native::cpublas::brgemm_release(PAIR<T> == 2);
  }
}

// ---- activations: moe_kernels.activation ------------------------------------------------------------------------------

enum { SWIGLU, GEGLU, REGLU, GPT_OSS, GELU, RELU2 };

// e^x to about one unit in the last place, as a polynomial, so that loops over it vectorise. Overflows to inf; NaN stays.
inline float exponential(float x) {
  const float n = std::nearbyint(std::min(std::max(x, -87.0f), 88.0f) * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  const float out = p * scale;
  return x > 88.72283f ? INFINITY : x < -87.33654f ? 0.0f : out;
}
inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// f(x) and f'(x) of the function inside the activation.
template <int ACT>
inline float function(float x, float& slope) {
  if constexpr (ACT == SWIGLU) {
    const float s = sigmoid(x);
    slope = s * (1.0f + x * (1.0f - s));
    return x * s;
  } else if constexpr (ACT == GEGLU || ACT == GELU) {  // (1 + tanh(z)) / 2 = sigmoid(2 z)
    const float s = sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    slope = s + x * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
    return x * s;
  } else if constexpr (ACT == REGLU) {
    slope = x <= 0.0f ? 0.0f : 1.0f;
    return x < 0.0f ? 0.0f : x;
  } else {
    const float r = x < 0.0f ? 0.0f : x;
    slope = 2.0f * r;
    return r * r;
  }
}

// The activation and its derivatives in gate and up; plain ones take ``up`` alone.
template <int ACT>
inline float activation(float gate, float up, float& in_gate, float& in_up) {
  if constexpr (ACT == GPT_OSS) {  // a clamped value passes no gradient; at the limit itself it does
    const float limit = 7.0f, alpha = 1.702f;
    const float capped = gate > limit ? limit : gate, shifted = (up > limit ? limit : up < -limit ? -limit : up) + 1.0f;
    const float s = sigmoid(alpha * capped);
    in_gate = gate > limit ? 0.0f : shifted * s * (1.0f + alpha * capped * (1.0f - s));
    in_up = std::fabs(up) > limit ? 0.0f : capped * s;
    return capped * s * shifted;
  } else if constexpr (ACT == GELU || ACT == RELU2) {
    return function<ACT>(up, in_up);
  } else {
    float slope;
    in_up = function<ACT>(gate, slope);
    in_gate = up * slope;
    return in_up * up;
  }
}

template <class Do>
void with_activation(i64 name, Do run) {
  switch (name) {
    case SWIGLU: return run(std::integral_constant<int, SWIGLU>());
    case GEGLU: return run(std::integral_constant<int, GEGLU>());
    case REGLU: return run(std::integral_constant<int, REGLU>());
    case GPT_OSS: return run(std::integral_constant<int, GPT_OSS>());
    case GELU: return run(std::integral_constant<int, GELU>());
    default: return run(std::integral_constant<int, RELU2>());
  }
}

// ---- the four products -----------------------------------------------------------------------------------------------

// h (R, n F) = rows W13^T + b13 and a (R, F) = s * act(h), of the rounded h, which backward will see.
template <class T, class W, int ACT>
void up_projection(Rows<T> x, Matrices<W> w13, const T* b13, const float* s, T* h, T* a, const i64* counts, i64 threads) {
  const i64 F = w13.n, parts = w13.parts;
  rows_product(x, w13, counts, threads, [=](const Tile& t) {
    float part[2][COLS], value[COLS];
    const float* up = part[parts - 1];
    for (i64 r = 0; r < t.rows; r++) {
      T* row_h = h + (t.row + r) * parts * F + t.column;
      for (i64 p = 0; p < parts; p++) {
        memcpy(part[p], t.part[p] + r * t.columns, t.columns * sizeof(float));
        if (b13)
          for (i64 c = 0; c < t.columns; c++) part[p][c] += wide(b13[(t.expert * parts + p) * F + t.column + c]);
        convert(part[p], t.columns, row_h + p * F);
        if (PAIR<T> == 2)
          for (i64 c = 0; c < t.columns; c++) part[p][c] = wide(row_h[p * F + c]);
      }
      const float weight = s ? s[t.row + r] : 1.0f;
      for (i64 c = 0; c < t.columns; c++) {
        float in_gate, in_up;
        value[c] = weight * activation<ACT>(part[0][c], up[c], in_gate, in_up);
      }
      convert(value, t.columns, a + (t.row + r) * F + t.column);
    }
  });
}

// out (R, n) = rows W (+ s * bias).
template <class T, class W>
void rows_times_weights(Rows<T> rows, Matrices<W> w, const T* bias, const float* s, T* out, const i64* counts, i64 threads) {
  rows_product(rows, w, counts, threads, [=](const Tile& t) {
    for (i64 r = 0; r < t.rows; r++) {
      const float* from = t.part[0] + r * t.columns;
      T* to = out + (t.row + r) * w.n + t.column;
      if (bias == nullptr) {
        convert(from, t.columns, to);
      } else {
        const float weight = s ? s[t.row + r] : 1.0f;
        const T* b = bias + t.expert * w.n + t.column;
        float value[COLS];
        for (i64 c = 0; c < t.columns; c++) value[c] = from[c] + weight * wide(b[c]);
        convert(value, t.columns, to);
      }
    }
  });
}

// With da = dy W2: a = s * act(h) again, dh = s * da * act'(h), ds (blocks of COLS columns, R) = sums of da * act(h).
template <class T, class W, int ACT>
void down_gradient(Rows<T> dy, Matrices<W> w2, const float* s, const T* h, T* a, T* dh, float* ds, const i64* counts,
                   i64 R, i64 threads) {
  constexpr bool gated = ACT != GELU && ACT != RELU2;
  const i64 F = w2.n, n_F = gated ? 2 * F : F, UP = n_F - F;
  rows_product(dy, w2, counts, threads, [=](const Tile& t) {
    float gate[COLS], up[COLS], value[COLS], in_gate[COLS], in_up[COLS];
    for (i64 r = 0; r < t.rows; r++) {
      const float* da = t.part[0] + r * t.columns;
      const i64 row = t.row + r;
      const T* row_h = h + row * n_F + t.column;
      T* row_dh = dh + row * n_F + t.column;
      for (i64 c = 0; c < t.columns; c++) gate[c] = wide(row_h[c]), up[c] = wide(row_h[UP + c]);
      const float weight = s ? s[row] : 1.0f;
      float sums[16] = {};
      for (i64 c = 0; c < t.columns; c++) value[c] = activation<ACT>(gate[c], up[c], in_gate[c], in_up[c]);
      for (i64 c = 0; c < t.columns; c++) sums[c % 16] += da[c] * value[c];
      for (i64 c = 0; c < t.columns; c++) {
        value[c] *= weight;
        in_gate[c] *= weight * da[c];
        in_up[c] *= weight * da[c];
      }
      convert(value, t.columns, a + row * F + t.column);
      if (gated) convert(in_gate, t.columns, row_dh);
      convert(in_up, t.columns, row_dh + UP);
      float sum = 0;
      for (float part : sums) sum += part;
      ds[t.column / COLS * R + row] = sum;
    }
  });
}

// out (experts, M, N): of each expert left^T right, over its rows.
template <class T, class W>
void weight_gradient(Rows<T> left, Rows<T> right, W* out, const i64* counts, i64 experts, i64 threads) {
  constexpr i64 pair = PAIR<T>;
  const i64 M = left.width, N = right.width;
  const i64 tallest = *std::max_element(counts, counts + experts), chunk = chunk_of(N);
  auto tasks = tasks_of(counts, experts, N, std::max<i64>(tallest, 1), threads);
  for (i64 e = 0; e < experts; e++)
    if (counts[e] == 0) std::fill(out + e * M * N, out + (e + 1) * M * N, W{});
#pragma omp parallel num_threads(threads)
  {
    const i64 widest = std::min(up_to(tallest, DEPTH), chunk);
    Scratch<T> lefts(widest * ROWS), rights(widest * up_to(N, COLS));
    const bool direct = sizeof(W) == 4;
    Scratch<float> sums(direct ? 0 : M * up_to(N, COLS));
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); i++) {
      const Task& task = tasks[i];
      W* matrix = out + task.expert * M * N;
      float* to = direct ? reinterpret_cast<float*>(matrix) : sums.data;
      for (i64 r = 0; r < task.rows; r += chunk) {
        const i64 rows = std::min(chunk, task.rows - r), depth = up_to(rows, DEPTH);
        pack_rows([&](i64 k) { return right[task.row + r + k] + task.column; }, rows, task.end - task.column, depth,
                  rights.data);
        for (i64 m = 0; m < M; m += ROWS) {
          const i64 high = std::min(ROWS, M - m);
          pack_columns([&](i64 k) { return left[task.row + r + k] + m; }, rows, high, depth, lefts.data);
          for (i64 column = task.column; column < task.end; column += COLS) {
            const i64 columns = std::min(COLS, task.end - column);
            tile_product<T>(high, columns, depth, lefts.data, depth, rights.data + (column - task.column) * depth,
                            columns, to + m * N + column, N, r > 0);
          }
        }
      }
      if constexpr (sizeof(W) == 2)
        for (i64 m = 0; m < M; m++)
          convert(to + m * N + task.column, task.end - task.column, matrix + m * N + task.column);
    }
    at::native::cpublas::brgemm_release(pair == 2);
  }
}

// Runs ``call`` with the types that the flags name; 1 if something in it threw.
template <class Call>
int with_types(i64 half_rows, i64 half_weights, Call call) {
  try {
    if (!half_rows)
      call(float{}, float{});
    else if (half_weights)
      call(bf16{}, bf16{});
    else
      call(bf16{}, float{});
    return 0;
  } catch (...) {
    return 1;
  }
}

}  // namespace

// ---- what Python calls -----------------------------------------------------------------------------------------------

extern "C" {

// Whether the kernel takes these rows here: 0 if so, as it throws otherwise (outside of threads, where it can be caught).
int moe_obstacle(i64 half_rows) {
  return with_types(half_rows, 1, [](auto t, auto) {
    using T = decltype(t);
    Scratch<T> a(STEP * DEPTH), b(DEPTH * COLS);
    Scratch<float> c(STEP * COLS);
    std::fill(a.data, a.data + STEP * DEPTH, narrow<T>(1.0f));
    std::fill(b.data, b.data + DEPTH * COLS, narrow<T>(1.0f));
    tile_product<T>(STEP, COLS, DEPTH, a.data, DEPTH, b.data, COLS, c.data, COLS, false);
    at::native::cpublas::brgemm_release(PAIR<T> == 2);
    if (c.data[0] != float(DEPTH)) throw 0;
  });
}

int moe_up_projection(i64 half_rows, i64 half_weights, const void* x, const i64* index, const void* w13,
                      const void* b13, const float* s, void* h, void* a, const i64* counts, i64 experts, i64 parts,
                      i64 F, i64 D, i64 name, i64 threads) {
  return with_types(half_rows, half_weights, [=](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    with_activation(name, [=](auto act) {
      up_projection<T, W, decltype(act)::value>({(const T*)x, index, D}, {(const W*)w13, experts, parts, F, D, true},
                                                (const T*)b13, s, (T*)h, (T*)a, counts, threads);
    });
  });
}

int moe_rows_times_weights(i64 half_rows, i64 half_weights, const void* rows, const i64* index, const void* weights,
                           const void* bias, const float* s, void* out, const i64* counts, i64 experts, i64 n, i64 k,
                           i64 transposed, i64 threads) {
  return with_types(half_rows, half_weights, [=](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    rows_times_weights<T, W>({(const T*)rows, index, k}, {(const W*)weights, experts, 1, n, k, transposed != 0},
                             (const T*)bias, s, (T*)out, counts, threads);
  });
}

int moe_down_gradient(i64 half_rows, i64 half_weights, const void* dy, const i64* index, const void* w2, const float* s,
                      const void* h, void* a, void* dh, float* ds, const i64* counts, i64 experts, i64 F, i64 D, i64 R,
                      i64 name, i64 threads) {
  return with_types(half_rows, half_weights, [=](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    with_activation(name, [=](auto act) {
      down_gradient<T, W, decltype(act)::value>({(const T*)dy, index, D}, {(const W*)w2, experts, 1, F, D, false}, s,
                                                (const T*)h, (T*)a, (T*)dh, ds, counts, R, threads);
    });
  });
}

int moe_weight_gradient(i64 half_rows, i64 half_weights, const void* left, const i64* left_index, const void* right,
                        const i64* right_index, void* out, const i64* counts, i64 experts, i64 M, i64 N, i64 threads) {
  return with_types(half_rows, half_weights, [=](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    weight_gradient<T, W>({(const T*)left, left_index, M}, {(const T*)right, right_index, N}, (W*)out, counts, experts,
                          threads);
  });
}
}
