// What the compiled CPU kernels share: numbers, layouts, and the product of two tiles.
//
// Tiles are multiplied by oneDNN's batch-reduce kernel (AMX, AVX-512 or AVX2, whichever the machine has), which torch
// exports; it is declared here, so that no header of torch is needed. T is the type of rows, W of weights: float, or
// bfloat16 with sums in float. A processor without products of bfloat16, or with slow ones, multiplies the same numbers
// as float.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __AVX__
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

inline bool half_cells = false;  // whether tiles may hold bfloat16, in all files of the library

namespace {

#ifdef __AVX512F__
constexpr i64 WIDTH = 512;  // bits of a vector
#else
constexpr i64 WIDTH = 256;
#endif

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

#ifdef __AVX512BF16__
// 16 numbers of each, as one vector of bfloat16.
inline __m512i rounded(const float* first, const float* second) {
  return __m512i(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(second), _mm512_loadu_ps(first)));
}
#endif

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

// Likewise, past the cache, for what is so large that it would have left it before it is read: memory is then not read
// before it is written.
template <class T>
void stream(const float* from, i64 n, T* to) {
#ifdef __AVX__
  constexpr i64 LINE = 64 / sizeof(T);
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && n % LINE == 0) {
    for (i64 c = 0; c < n; c += LINE) {
#if defined(__AVX512BF16__)
      __m512i line;
      if constexpr (sizeof(T) == 2)
        line = rounded(from + c, from + c + 16);
      else
        line = _mm512_loadu_si512(from + c);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + c), line);
#else
      alignas(64) T line[LINE];
      convert(from + c, LINE, line);
      auto* halves = reinterpret_cast<const __m256i*>(line);
      for (i64 i = 0; i < 2; i++) _mm256_stream_si256(reinterpret_cast<__m256i*>(to + c) + i, halves[i]);
#endif
    }
    return;
  }
#endif
  convert(from, n, to);
}

// Once a thread has streamed: others see it.
inline void streamed() {
#ifdef __AVX__
  _mm_sfence();
#endif
}

// How numbers are kept: Row in memory, Cell in tiles.
template <class R, class C>
struct Format {
  using Row = R;
  using Cell = C;
};
using Float = Format<float, float>;
using Half = Format<bf16, bf16>;
using Widened = Format<bf16, float>;

// Runs ``call`` with the format of rows in float or bfloat16.
template <class Call>
void with_format(i64 half, Call call) {
  if (!half)
    call(Float{});
  else if (half_cells)
    call(Half{});
  else
    call(Widened{});
}

// A cell from a number of memory, rounded as rows are.
template <class F, class From>
typename F::Cell cell(From x) {
  return as<typename F::Cell>(as<typename F::Row>(x));
}

template <class F, class From>
void to_cells(const From* __restrict from, i64 n, typename F::Cell* __restrict to) {
  if constexpr (std::is_same_v<F, Widened>) {
    i64 c = 0;
#ifdef __AVX512BF16__
    if constexpr (sizeof(From) == 4)
      for (; c + 16 <= n; c += 16) {
        const auto rounded = __m256i(_mm512_cvtneps_pbh(_mm512_loadu_ps(from + c)));
        _mm512_storeu_si512(to + c, _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
      }
#endif
    for (; c < n; c++) to[c] = cell<F>(from[c]);
  } else {
    convert(from, n, to);
  }
}

// Likewise: where they are, or in ``room``.
template <class F, class From>
const typename F::Cell* cells(const From* from, i64 n, typename F::Cell* room) {
  if constexpr (std::is_same_v<typename F::Cell, From> && !std::is_same_v<F, Widened>) {
    return from;
  } else {
    to_cells<F>(from, n, room);
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
template <class C>
constexpr i64 PAIR = sizeof(C) == 2 ? 2 : 1;

// Cells of the two rows of a pair, or of a single row, as one word.
inline uint32_t word(bf16 first, bf16 second) { return first.bits | uint32_t(second.bits) << 16; }
inline uint32_t word(float first, float) {
  uint32_t out;
  memcpy(&out, &first, 4);
  return out;
}

constexpr i64 B = WIDTH / 32;  // words of a vector
typedef uint32_t Vector __attribute__((vector_size(4 * B), aligned(4)));

// Blocks of W words change places: those of ``a`` at odd places with those of ``b`` at even ones.
template <i64 W, size_t... Lane>
void exchange(Vector& a, Vector& b, std::index_sequence<Lane...>) {
  const Vector x = a, y = b;
  a = __builtin_shuffle(x, y, Vector{uint32_t(Lane & W ? Lane - W + B : Lane)...});
  b = __builtin_shuffle(x, y, Vector{uint32_t(Lane & W ? Lane + B : Lane + W)...});
}

// The transpose of B vectors: log2(B) rounds, each of which exchanges blocks of half the size.
template <i64 W = B / 2>
void transpose(Vector (&v)[B]) {
  for (i64 i = 0; i < B; i++)
    if (!(i & W)) exchange<W>(v[i], v[i + W], std::make_index_sequence<B>());
  if constexpr (W > 1) transpose<W / 2>(v);
}

constexpr i64 AHEAD = 4;  // so many words of the inner dimension before their turn, rows are asked for

template <class T>
void prefetch(const T* from, i64 n) {
  for (i64 c = 0; c < n; c += 64 / i64(sizeof(T))) __builtin_prefetch(from + c);
}

// Two rows of n numbers as words.
template <class F, class From>
void interleave(const From* __restrict a, const From* __restrict b, i64 n, uint32_t* __restrict words) {
  i64 c = 0;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<F, Half> && sizeof(From) == 4) {
    alignas(64) constexpr uint16_t order[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (; c + 16 <= n; c += 16) {
      const __m512i pairs = _mm512_permutexvar_epi16(_mm512_load_si512(order), rounded(a + c, b + c));
      _mm512_storeu_si512(words + c, pairs);
    }
  }
#endif
  for (; c < n; c++) words[c] = word(cell<F>(a[c]), cell<F>(b[c]));
}

// A vector of cells.
template <class F, class From>
Vector line_of(const From* from) {
  constexpr i64 n = sizeof(Vector) / sizeof(typename F::Cell);
  Vector out;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<F, Half> && sizeof(From) == 4) return Vector(rounded(from, from + 16));
#endif
  typename F::Cell room[n];
  memcpy(&out, cells<F>(from, n, room), sizeof(out));
  return out;
}

// out (depth, n), from w (n, k) whose rows are ld apart. Rows of out past k are zeros.
template <class F, class W>
void pack_transposed(const W* w, i64 ld, i64 k, i64 n, i64 depth, typename F::Cell* out) {
  using C = typename F::Cell;
  constexpr i64 pair = PAIR<C>;
  auto* words = reinterpret_cast<uint32_t*>(out);
  const i64 whole_n = n / B * B, whole_k = k / pair / B * B;
  for (i64 j = 0; j < whole_n; j += B)
    for (i64 i = 0; i < whole_k; i += B) {
      Vector block[B];
      for (i64 c = 0; c < B; c++) {
        const W* from = w + (j + c) * ld + i * pair;
        block[c] = line_of<F>(from);
        prefetch(from + B * ld, B * pair);  // B rows are too many streams for the processor to foresee
      }
      transpose(block);
      for (i64 r = 0; r < B; r++) memcpy(words + (i + r) * n + j, &block[r], sizeof(Vector));
    }
  for (i64 i = 0; i < depth / pair; i++)
    for (i64 c = i < whole_k ? whole_n : 0; c < n; c++) {
      const W* at = w + c * ld + i * pair;
      words[i * n + c] = word(i * pair < k ? cell<F>(at[0]) : C{}, i * pair + pair - 1 < k ? cell<F>(at[pair - 1]) : C{});
    }
}

// Likewise from k rows of n values, for blocks of COLS columns, each (depth, COLS), the last one narrower.
template <class F, class Row>
void pack_rows(Row row, i64 k, i64 n, i64 depth, typename F::Cell* out) {
  using C = typename F::Cell;
  constexpr i64 pair = PAIR<C>;
  for (i64 i = 0; i < depth / pair; i++)
    for (i64 j = 0; j < n; j += COLS) {
      const i64 columns = std::min(COLS, n - j);
      C* __restrict to = out + j * depth + i * pair * columns;
      for (i64 r = (i + AHEAD) * pair; r < std::min(k, (i + AHEAD + 1) * pair); r++) prefetch(row(r) + j, columns);
      if (i * pair >= k) {
        std::fill(to, to + pair * columns, C{});
      } else if constexpr (pair == 1) {
        to_cells<F>(row(i) + j, columns, to);
      } else {
        static const std::decay_t<decltype(*row(0))> zeros[COLS] = {};
        const auto* second = i * pair + 1 < k ? row(i * pair + 1) + j : zeros;
        interleave<F>(row(i * pair) + j, second, columns, reinterpret_cast<uint32_t*>(to));
      }
    }
}

// out (n, depth): the transpose of k rows of n values and, from there on, of zeros.
template <class F, class Row>
void pack_columns(Row row, i64 k, i64 n, i64 depth, typename F::Cell* out) {
  using C = typename F::Cell;
  constexpr i64 pair = PAIR<C>;
  auto* words = reinterpret_cast<uint32_t*>(out);
  const i64 width = depth / pair;
  static const std::decay_t<decltype(*row(0))> zeros[B] = {};
  for (i64 i = 0; i < width; i += B)
    for (i64 j = 0; j < n; j += B) {
      const i64 columns = std::min(B, n - j);
      Vector block[B];
      for (i64 r = 0; r < B; r++) {
        const i64 at = (i + r) * pair;
        uint32_t line[B] = {};
        const auto* second = at + pair <= k ? row(at + pair - 1) + j : zeros;
        if (at < k && columns == B)
          interleave<F>(row(at) + j, second, B, line);  // of a size that the compiler knows
        else if (at < k)
          interleave<F>(row(at) + j, second, columns, line);
        memcpy(&block[r], line, sizeof(line));
      }
      transpose(block);
      for (i64 c = 0; c < columns; c++) memcpy(words + (j + c) * width + i, &block[c], sizeof(Vector));
    }
}

template <class C>
void tile_product(i64 m, i64 n, i64 k, const C* a, i64 lda, const C* b, i64 ldb, float* c, i64 ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, PAIR<C> == 2);
}

// ---- vectors of floats -----------------------------------------------------------------------------------------------

// Written out where loops are too long for the compiler to vectorise.
typedef float Floats __attribute__((vector_size(4 * B), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * B), aligned(4)));

inline Floats load(const float* from) {
  Floats v;
  memcpy(&v, from, sizeof(v));
  return v;
}
inline void store(float* to, Floats v) { memcpy(to, &v, sizeof(v)); }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // b where either is NaN

inline float largest(Floats v) {
  float out = v[0];
  for (i64 i = 1; i < B; i++) out = std::max(out, v[i]);
  return out;
}

inline float sum(Floats v) {  // halves of it first
  for (i64 half = B / 2; half > 0; half /= 2)
    for (i64 i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

// e^x to about one unit in the last place, as a polynomial; 0 below -87.7, e^88 above 88. NaN stays.
inline Floats exponential(Floats x) {
  constexpr float shift = 12582912.0f;  // 1.5 2^23: a sum with it is rounded to a whole number, which is in its last bits
  x = x < -88.0f ? -88.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const Floats shifted = x * 1.44269504f + shift, n = shifted - shift;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints scale = (Ints(shifted) + 127) << 23;  // 2^n; 0 for n = -127
  return p * Floats(scale);
}

}  // namespace
