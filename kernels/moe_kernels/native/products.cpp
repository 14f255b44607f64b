// The matrix products of an expert layer on CPU, each over all experts in one call; see native/experts.py.
//
// What is added to the product of two tiles is what costs time around it when experts are small: a matrix is put into the
// tiles' layout (and rounded to bfloat16, if wider) once for up to CHUNK rows, rows are gathered straight into scratch (or
// used where they are), what follows a product is done on its tile in the cache, and the work of all experts is shared out
// among the threads. A dense layer is one expert that has all rows.
// Every sum has one order, whatever the number of threads.

#include <functional>

#include "tiles.h"

namespace {

constexpr i64 CHUNK = 1024;      // rows for which a matrix is packed once, at most
constexpr i64 CACHED = 1 << 19;  // values of rows in a scratch, and of a matrix
constexpr i64 GROUP = 256;       // columns that are packed together, at most: whole cache lines are read, one after another
constexpr i64 FAR = 8 << 20;     // bytes of a result that does not stay in the cache
constexpr i64 INNER = 2 * WIDTH;  // of the inner dimension, what is multiplied at a time

// A tile's product, c (m, n), of which so much is done at a time that operands stay in the nearest cache.
template <class C>
void deep_product(i64 m, i64 n, i64 depth, const C* a, i64 lda, const C* b, float* c, bool add) {
  for (i64 k = 0; k < depth; k += INNER)
    tile_product<C>(m, n, std::min(INNER, depth - k), a + k, lda, b + k * n, n, c, n, add || k > 0);
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
  template <class F>
  void pack(i64 e, i64 part, i64 column, i64 columns, i64 depth, typename F::Cell* out) const {
    const W* matrix = data + (e * parts + part) * n * k;
    if (transposed)
      for (i64 c = 0; c < columns; c += COLS)
        pack_transposed<F>(matrix + (column + c) * k, k, k, std::min(COLS, columns - c), depth, out + c * depth);
    else
      pack_rows<F>([&](i64 r) { return matrix + r * n + column; }, k, columns, depth, out);
  }
};

struct Task {
  i64 expert, row, rows, column, end;
};

// Chunks of every expert's rows; columns are split as well where there are too few chunks for the threads.
i64 chunk_of(i64 width) { return std::clamp(CACHED / width / ROWS * ROWS, ROWS, CHUNK / 2); }

std::vector<Task> tasks_of(const i64* counts, i64 experts, i64 columns, i64 widest, i64 chunk, i64 threads) {
  i64 chunks = 0;
  for (i64 e = 0; e < experts; e++) chunks += (counts[e] + chunk - 1) / chunk;
  const i64 wanted = threads == 1 || chunks == 0 ? 1 : std::max<i64>(1, 16 * threads / chunks);
  const i64 width = std::min(up_to((columns + wanted - 1) / wanted, COLS), widest);
  std::vector<Task> tasks;
  for (i64 e = 0, row = 0; e < experts; row += counts[e++]) {
    const i64 parts = (counts[e] + chunk - 1) / chunk, rows = parts ? up_to((counts[e] + parts - 1) / parts, ROWS) : 1;
    for (i64 r = 0; r < counts[e]; r += rows)
      for (i64 c = 0; c < columns; c += width)
        tasks.push_back({e, row + r, std::min(rows, counts[e] - r), c, std::min(c + width, columns)});
  }
  return tasks;
}

struct Tile {  // products of ``rows`` rows from ``row`` on with ``columns`` columns from ``column`` on: one for each part
  i64 expert, row, rows, column, columns;
  const float* part[2];
};
using Then = std::function<void(const Tile&)>;  // what follows a product; a call costs nothing beside it

template <class F, class W>
void rows_product(Rows<typename F::Row> a, Matrices<W> w, const i64* counts, i64 threads, const Then& then) {
  using C = typename F::Cell;
  constexpr bool cells_are_rows = std::is_same_v<C, typename F::Row>;
  const bool in_place = cells_are_rows && a.index == nullptr && w.k % DEPTH == 0;  // only rows that fill no tile are copied
  const i64 depth = up_to(w.k, DEPTH), chunk = in_place ? CHUNK : chunk_of(depth);
  const i64 group_columns = std::clamp(CACHED / depth / COLS * COLS, COLS, GROUP);
  const auto tasks = tasks_of(counts, w.experts, w.n, up_to(w.n, COLS), chunk, threads);
#pragma omp parallel num_threads(threads)
  {
    Scratch<C> rows((in_place ? ROWS : chunk) * depth), packed(w.parts * depth * group_columns);
    Scratch<float> products(w.parts * ROWS * COLS);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); i++) {
      const Task& task = tasks[i];
      const i64 copied = in_place ? task.rows / ROWS * ROWS : 0;  // the first row that is copied
      for (i64 r = copied; r < task.rows; r++) {
        C* to = rows.data + (r - copied) * depth;
        convert(a[task.row + r], w.k, to);
        std::fill(to + w.k, to + depth, C{});
      }
      std::fill(rows.data + (task.rows - copied) * depth, rows.data + (up_to(task.rows, STEP) - copied) * depth, C{});
      for (i64 group = task.column; group < task.end; group += group_columns) {
        const i64 wide = std::min(group_columns, task.end - group);
        for (i64 p = 0; p < w.parts; p++)
          w.template pack<F>(task.expert, p, group, wide, depth, packed.data + p * depth * group_columns);
        for (i64 r = 0; r < task.rows; r += ROWS)
          for (i64 column = 0; column < wide; column += COLS) {
            const i64 n = std::min(ROWS, task.rows - r), m = up_to(n, STEP), columns = std::min(COLS, wide - column);
            Tile tile{task.expert, task.row + r, n, group + column, columns, {products.data, products.data + ROWS * COLS}};
            const C* left = rows.data + (r - copied) * depth;
            if constexpr (cells_are_rows)
              if (r < copied) left = a[task.row + r];
            for (i64 p = 0; p < w.parts; p++) {
              const C* right = packed.data + (p * group_columns + column) * depth;
              deep_product<C>(m, columns, depth, left, depth, right, products.data + p * ROWS * COLS, false);
            }
            then(tile);
          }
      }
    }
    streamed();
    at::native::cpublas::brgemm_release(PAIR<C> == 2);
  }
}

// Whether a result of so many bytes a row is larger than what stays in the cache.
bool is_far(const i64* counts, i64 experts, i64 bytes) {
  i64 rows = 0;
  for (i64 e = 0; e < experts; e++) rows += counts[e];
  return rows * bytes >= FAR;
}

template <class T>
void put(bool far, const float* from, i64 n, T* to) {
  if (far)
    stream(from, n, to);
  else
    convert(from, n, to);
}

// ---- activations: moe_kernels.activation ------------------------------------------------------------------------------

enum { SWIGLU, GEGLU, REGLU, GPT_OSS, SWIGLU_CLAMPED, GELU, RELU2 };

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// f(x) and f'(x) of the function inside the activation.
template <int ACT>
inline Floats function(Floats x, Floats& slope) {
  if constexpr (ACT == SWIGLU) {
    const Floats s = sigmoid(x);
    slope = s * (1.0f + x * (1.0f - s));
    return x * s;
  } else if constexpr (ACT == GEGLU || ACT == GELU) {  // (1 + tanh(z)) / 2 = sigmoid(2 z)
    const Floats s = sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    slope = s + x * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
    return x * s;
  } else if constexpr (ACT == REGLU) {
    slope = x <= 0.0f ? Floats{} : Floats{} + 1.0f;
    return x < 0.0f ? Floats{} : x;
  } else {
    const Floats r = x < 0.0f ? Floats{} : x;
    slope = 2.0f * r;
    return r * r;
  }
}

// The activation and its derivatives in gate and up; plain ones take ``up`` alone.
template <int ACT>
inline Floats activation(Floats gate, Floats up, Floats& in_gate, Floats& in_up) {
  if constexpr (ACT == GPT_OSS || ACT == SWIGLU_CLAMPED) {
    // A clamped value passes no gradient; at the limit itself it does.
    constexpr bool oss = ACT == GPT_OSS;
    constexpr float top = oss ? 7.0f : 10.0f, alpha = oss ? 1.702f : 1.0f, shift = oss ? 1.0f : 0.0f;
    const Floats limit = Floats{} + top;
    const Floats capped = gate > limit ? limit : gate, held = up > limit ? limit : up < -limit ? -limit : up;
    const Floats s = sigmoid(alpha * capped);
    in_gate = gate > limit ? Floats{} : (held + shift) * s * (1.0f + alpha * capped * (1.0f - s));
    in_up = (up > limit) | (up < -limit) ? Floats{} : capped * s;
    return capped * s * (held + shift);
  } else if constexpr (ACT == GELU || ACT == RELU2) {
    return function<ACT>(up, in_up);
  } else {
    Floats slope;
    in_up = function<ACT>(gate, slope);
    in_gate = up * slope;
    return in_up * up;
  }
}

template <class Do>
Then with_activation(i64 name, Do run) {
  switch (name) {
    case SWIGLU: return run(std::integral_constant<int, SWIGLU>());
    case GEGLU: return run(std::integral_constant<int, GEGLU>());
    case REGLU: return run(std::integral_constant<int, REGLU>());
    case SWIGLU_CLAMPED: return run(std::integral_constant<int, SWIGLU_CLAMPED>());
    case GPT_OSS: return run(std::integral_constant<int, GPT_OSS>());
    case GELU: return run(std::integral_constant<int, GELU>());
    default: return run(std::integral_constant<int, RELU2>());
  }
}

// ---- what follows a product of rows -------------------------------------------------------------------------------------

// h (R, n F) = rows W13^T + b13 and a (R, F) = s * act(h), of the rounded h, which backward will see.
template <class T, int ACT>
Then up_projection(const T* b13, const float* s, T* h, T* a, i64 parts, i64 width, bool far) {
  return [=](const Tile& t) {
    float room[2][COLS], value[COLS];
    for (i64 r = 0; r < t.rows; r++) {
      T* row_h = h + (t.row + r) * parts * width + t.column;
      const float* part[2];
      for (i64 p = 0; p < parts; p++) {
        part[p] = t.part[p] + r * t.columns;
        if (b13) {
          for (i64 c = 0; c < t.columns; c++)
            room[p][c] = part[p][c] + wide(b13[(t.expert * parts + p) * width + t.column + c]);
          part[p] = room[p];
        }
        put(far, part[p], t.columns, row_h + p * width);
        if (sizeof(T) == 2) {
          T rounded[COLS];
          convert(part[p], t.columns, rounded);
          for (i64 c = 0; c < t.columns; c++) room[p][c] = wide(rounded[c]);
          part[p] = room[p];
        }
      }
      const float weight = s ? s[t.row + r] : 1.0f;
      const float *gate = part[0], *up = part[parts - 1];
      for (i64 c = 0; c < t.columns; c += B) {
        Floats in_gate, in_up;
        store(value + c, weight * activation<ACT>(load(gate + c), load(up + c), in_gate, in_up));
      }
      put(far, value, t.columns, a + (t.row + r) * width + t.column);
    }
  };
}

// out (R, n) = rows W (+ s * bias).
template <class T>
Then rows_times_weights(const T* bias, const float* s, T* out, i64 n, bool far) {
  return [=](const Tile& t) {
    for (i64 r = 0; r < t.rows; r++) {
      const float* from = t.part[0] + r * t.columns;
      T* to = out + (t.row + r) * n + t.column;
      if (bias == nullptr) {
        put(far, from, t.columns, to);
      } else {
        const float weight = s ? s[t.row + r] : 1.0f;
        const T* b = bias + t.expert * n + t.column;
        float value[COLS];
        for (i64 c = 0; c < t.columns; c++) value[c] = from[c] + weight * wide(b[c]);
        convert(value, t.columns, to);
      }
    }
  };
}

// With da = dy W2: a = s * act(h) again, dh = s * da * act'(h), ds (blocks of COLS columns, R) = sums of da * act(h).
template <class T, int ACT>
Then down_gradient(const float* s, const T* h, T* a, T* dh, float* ds, i64 width, i64 R, bool far) {
  constexpr bool gated = ACT != GELU && ACT != RELU2;
  const i64 n_F = gated ? 2 * width : width, UP = n_F - width;
  return [=](const Tile& t) {
    float gate[COLS] = {}, up[COLS] = {}, da[COLS] = {}, value[COLS], in_gate[COLS], in_up[COLS];
    for (i64 r = 0; r < t.rows; r++) {
      std::copy_n(t.part[0] + r * t.columns, t.columns, da);
      const i64 row = t.row + r;
      const T* row_h = h + row * n_F + t.column;
      T* row_dh = dh + row * n_F + t.column;
      if (r + 8 < t.rows) prefetch(row_h + 8 * n_F, t.columns), prefetch(row_h + 8 * n_F + UP, t.columns);
      for (i64 c = 0; c < t.columns; c++) gate[c] = wide(row_h[c]), up[c] = wide(row_h[UP + c]);
      const float weight = s ? s[row] : 1.0f;
      Floats sums{};
      for (i64 c = 0; c < t.columns; c += B) {
        Floats slope_gate{}, slope_up;
        const Floats x = activation<ACT>(load(gate + c), load(up + c), slope_gate, slope_up), slope = load(da + c);
        sums += slope * x;
        store(value + c, weight * x);
        store(in_gate + c, weight * slope * slope_gate);
        store(in_up + c, weight * slope * slope_up);
      }
      put(far, value, t.columns, a + row * width + t.column);
      if (gated) put(far, in_gate, t.columns, row_dh);
      put(far, in_up, t.columns, row_dh + UP);
      ds[t.column / COLS * R + row] = sum(sums);
    }
  };
}

// ---- gradients of matrices --------------------------------------------------------------------------------------------

// A finished tile of a matrix's gradient goes to ``out``, whose rows are N apart. add: to what is there (float only).
template <class W>
void put_tile(const float* tile, i64 high, i64 columns, W* out, i64 N, bool add, bool far) {
  for (i64 i = 0; i < high; i++) {
    const float* __restrict from = tile + i * columns;
    W* __restrict to = out + i * N;
    if (add)
      for (i64 c = 0; c < columns; c++) to[c] = narrow<W>(wide(to[c]) + from[c]);
    else
      put(far, from, columns, to);
  }
}

// out (experts, M, N): of each expert left^T right, over its rows. add: to what is there (float only).
template <class F, class W, class T = typename F::Row>
void weight_gradient(Rows<T> left, Rows<T> right, W* out, bool add, const i64* counts, i64 experts, i64 threads) {
  using C = typename F::Cell;
  const i64 M = left.width, N = right.width;
  const bool far = experts * M * N * i64(sizeof(W)) >= FAR;
  const i64 tallest = *std::max_element(counts, counts + experts), chunk = chunk_of(N), whole_N = up_to(N, COLS);
  const i64 widest = std::clamp(4 * CACHED / whole_N / ROWS * ROWS, ROWS, up_to(M, ROWS));
  const auto tasks = tasks_of(counts, experts, M, widest, std::max<i64>(tallest, 1), threads);  // of rows of the matrices
  for (i64 e = 0; e < experts; e++)
    if (counts[e] == 0 && !add) std::fill(out + e * M * N, out + (e + 1) * M * N, W{});
#pragma omp parallel num_threads(threads)
  {
    const i64 deepest = std::min(up_to(tallest, DEPTH), chunk);
    Scratch<C> lefts(deepest * ROWS), rights(deepest * whole_N);
    // Tiles, each by itself: rows of ``out`` may be so far apart that they would push each other out of the cache.
    Scratch<float> sums(tallest <= chunk ? ROWS * COLS : widest * whole_N);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); i++) {
      const Task& task = tasks[i];
      for (i64 r = 0; r < task.rows; r += chunk) {
        const i64 rows = std::min(chunk, task.rows - r), depth = up_to(rows, DEPTH);
        pack_rows<F>([&](i64 k) { return right[task.row + r + k]; }, rows, N, depth, rights.data);
        for (i64 m = task.column; m < task.end; m += ROWS) {
          const i64 high = std::min(ROWS, task.end - m);
          pack_columns<F>([&](i64 k) { return left[task.row + r + k] + m; }, rows, high, depth, lefts.data);
          for (i64 column = 0; column < N; column += COLS) {
            const i64 columns = std::min(COLS, N - column);
            float* tile = sums.data + (task.rows <= chunk ? 0 : (m - task.column) * whole_N + column * ROWS);
            deep_product<C>(high, columns, depth, lefts.data, depth, rights.data + column * depth, tile, r > 0);
            if (r + rows == task.rows)
              put_tile(tile, high, columns, out + (task.expert * M + m) * N + column, N, add, far);
          }
        }
      }
    }
    streamed();
    at::native::cpublas::brgemm_release(PAIR<C> == 2);
  }
}

// The same for one matrix: all threads bring ``right`` into its layout once, and each ``left`` for the tiles it works on.
template <class F, class W, class T = typename F::Row>
void dense_weight_gradient(Rows<T> left, Rows<T> right, W* out, bool add, i64 rows, i64 threads) {
  using C = typename F::Cell;
  const i64 M = left.width, N = right.width, depth = up_to(rows, DEPTH);
  const bool far = M * N * i64(sizeof(W)) >= FAR;
  const i64 high_tiles = (M + ROWS - 1) / ROWS, column_tiles = (N + COLS - 1) / COLS;
  const i64 splits = threads == 1 ? 1 : std::clamp<i64>(4 * threads / high_tiles, 1, column_tiles);
  const i64 width = (column_tiles + splits - 1) / splits * COLS;
  const auto deep = [=](i64 r) { return std::min(CHUNK, depth - r); };
  Scratch<C> rights(depth * N);  // for each CHUNK rows, blocks of COLS columns
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(2) schedule(static)
    for (i64 r = 0; r < rows; r += CHUNK)
      for (i64 tile = 0; tile < column_tiles; tile++) {
        const i64 column = tile * COLS;
        pack_rows<F>([&](i64 k) { return right[r + k] + column; }, std::min(CHUNK, rows - r), std::min(COLS, N - column),
                     deep(r), rights.data + r * N + column * deep(r));
      }
    Scratch<C> lefts(ROWS * std::min(CHUNK, depth));
    Scratch<float> sums(ROWS * width);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (i64 m = 0; m < M; m += ROWS)
      for (i64 first = 0; first < N; first += width) {
        const i64 high = std::min(ROWS, M - m), end = std::min(first + width, N);
        for (i64 r = 0; r < rows; r += CHUNK) {
          pack_columns<F>([&](i64 k) { return left[r + k] + m; }, std::min(CHUNK, rows - r), high, deep(r), lefts.data);
          for (i64 column = first; column < end; column += COLS) {
            const i64 columns = std::min(COLS, end - column);
            float* tile = sums.data + (column - first) * ROWS;
            deep_product<C>(high, columns, deep(r), lefts.data, deep(r), rights.data + r * N + column * deep(r), tile, r > 0);
            if (r + CHUNK >= rows) put_tile(tile, high, columns, out + m * N + column, N, add, far);
          }
        }
      }
    streamed();
    at::native::cpublas::brgemm_release(PAIR<C> == 2);
  }
}

// Runs ``call`` with the format and the type of weights that the flags name.
template <class Call>
void with_types(i64 half_rows, i64 half_weights, Call call) {
  with_format(half_rows, [=](auto format) {
    if constexpr (std::is_same_v<decltype(format), Float>)
      call(format, float{});
    else
      half_weights ? call(format, bf16{}) : call(format, float{});
  });
}

// Whether the tiles' product works for T on this processor. It throws where it does not.
template <class T>
bool works() {
  Scratch<T> a(STEP * DEPTH), b(DEPTH * COLS);
  Scratch<float> c(STEP * COLS);
  std::fill(a.data, a.data + STEP * DEPTH, narrow<T>(1.0f));
  std::fill(b.data, b.data + DEPTH * COLS, narrow<T>(1.0f));
  try {
    tile_product(STEP, COLS, DEPTH, a.data, DEPTH, b.data, COLS, c.data, COLS, false);
    at::native::cpublas::brgemm_release(PAIR<T> == 2);
  } catch (...) {
    return false;
  }
  return c.data[0] == float(DEPTH);
}

// Whether bfloat16 is multiplied faster than the same numbers as float. Intel's processors without AMX for it (or whose
// system or virtual machine keeps it back) that are younger than Cooper Lake take twice as long over it.
bool halves_are_faster() {
#if defined(__AVX512FP16__) && !defined(__AMX_BF16__)
  return !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

}  // namespace

// ---- what Python calls -----------------------------------------------------------------------------------------------

extern "C" {

// Whether anything here can run; it has to be asked first, since it finds out what tiles may hold.
int moe_works() {
  half_cells = halves_are_faster() && works<bf16>();
  return works<float>();
}

int moe_half_cells() { return half_cells; }

void moe_use_half_cells(i64 use) { half_cells = use && works<bf16>(); }  // for tests

void moe_up_projection(i64 half_rows, i64 half_weights, const void* x, const i64* index, const void* w13,
                      const void* b13, const float* s, void* h, void* a, const i64* counts, i64 experts, i64 parts,
                      i64 width, i64 D, i64 name, i64 threads) {
  with_types(half_rows, half_weights, [=](auto format, auto w) {
    using T = typename decltype(format)::Row;
    const bool far = is_far(counts, experts, width * sizeof(T));
    const auto then = with_activation(name, [=](auto act) {
      return up_projection<T, decltype(act)::value>((const T*)b13, s, (T*)h, (T*)a, parts, width, far);
    });
    const Matrices<decltype(w)> matrices{(const decltype(w)*)w13, experts, parts, width, D, true};
    rows_product<decltype(format)>({(const T*)x, index, D}, matrices, counts, threads, then);
  });
}

void moe_rows_times_weights(i64 half_rows, i64 half_weights, const void* rows, const i64* index, const void* weights,
                           const void* bias, const float* s, void* out, const i64* counts, i64 experts, i64 n, i64 k,
                           i64 transposed, i64 threads) {
  with_types(half_rows, half_weights, [=](auto format, auto w) {
    using T = typename decltype(format)::Row;
    const auto then = rows_times_weights((const T*)bias, s, (T*)out, n, is_far(counts, experts, n * sizeof(T)));
    const Matrices<decltype(w)> matrices{(const decltype(w)*)weights, experts, 1, n, k, transposed != 0};
    rows_product<decltype(format)>({(const T*)rows, index, k}, matrices, counts, threads, then);
  });
}

void moe_down_gradient(i64 half_rows, i64 half_weights, const void* dy, const i64* index, const void* w2, const float* s,
                      const void* h, void* a, void* dh, float* ds, const i64* counts, i64 experts, i64 width, i64 D,
                      i64 R, i64 name, i64 threads) {
  with_types(half_rows, half_weights, [=](auto format, auto w) {
    using T = typename decltype(format)::Row;
    const bool far = is_far(counts, experts, width * sizeof(T));
    const auto then = with_activation(name, [=](auto act) {
      return down_gradient<T, decltype(act)::value>(s, (const T*)h, (T*)a, (T*)dh, ds, width, R, far);
    });
    const Matrices<decltype(w)> matrices{(const decltype(w)*)w2, experts, 1, width, D, false};
    rows_product<decltype(format)>({(const T*)dy, index, D}, matrices, counts, threads, then);
  });
}

void moe_weight_gradient(i64 half_rows, i64 half_weights, const void* left, const i64* left_index, const void* right,
                        const i64* right_index, void* out, i64 add, const i64* counts, i64 experts, i64 M, i64 N,
                        i64 threads) {
  with_types(half_rows, half_weights, [=](auto format, auto w) {
    using F = decltype(format);
    using T = typename F::Row;
    using W = decltype(w);
    const Rows<T> l{(const T*)left, left_index, M}, r{(const T*)right, right_index, N};
    if (experts == 1 && counts[0] > 0)
      dense_weight_gradient<F, W>(l, r, (W*)out, add != 0, counts[0], threads);
    else
      weight_gradient<F, W>(l, r, (W*)out, add != 0, counts, experts, threads);
  });
}
}
