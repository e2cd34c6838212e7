// Dot products of rows with keys that lie side by side: kLanes keys in a register, one channel (or two, in bf16) after
// the other.
#ifndef KVC_PRODUCTS_H
#define KVC_PRODUCTS_H
#include "attention_core.h"

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kOnce = KVC_WIDTH == 64 ? 5 : 2;  // vectors of 16 keys whose products fit into registers

// Products of kHeads rows and N vectors of 16 keys, of which `part` says which lanes. Rows and keys are floats, or
// pairs of bf16.
template <bool PAIRS, int N>
KVC_INLINE void products(const char* const* keys, const char* const* rows, int d, int part, vf (&sum)[N][kHeads]) {
  KVC_UNROLL for (int b = 0; b < N; ++b) KVC_UNROLL for (int h = 0; h < kHeads; ++h) sum[b][h] = vf{};
  const int n = PAIRS ? d / 2 : d;
  for (int i = 0; i < n; ++i) {
#if KVC_ISA_avx512
    if (PAIRS) {
      __m512bh k[N];
      KVC_UNROLL for (int b = 0; b < N; ++b) k[b] = (__m512bh)_mm512_loadu_si512(keys[b] + 64 * i);
      KVC_UNROLL for (int h = 0; h < kHeads; ++h) {
        int32_t pair;
        memcpy(&pair, rows[h] + 4 * i, 4);
        const __m512bh q = (__m512bh)_mm512_set1_epi32(pair);
        KVC_UNROLL for (int b = 0; b < N; ++b) sum[b][h] = _mm512_dpbf16_ps(sum[b][h], k[b], q);
      }
      continue;
    }
#endif
    vf k[N];
    KVC_UNROLL for (int b = 0; b < N; ++b) k[b] = load(keys[b] + 64 * i + part * KVC_WIDTH);
    KVC_UNROLL for (int h = 0; h < kHeads; ++h) {
      const vf q = all(reinterpret_cast<const float*>(rows[h])[i]);
      KVC_UNROLL for (int b = 0; b < N; ++b) sum[b][h] = k[b] * q + sum[b][h];
    }
  }
}

// Four keys into neighbouring lanes of a vector of 16; `words` of each.
KVC_INLINE void put_four(char* out, const char* const* from, int words) {
  for (int w = 0; w < words; w += 4, out += 256) put_words(out, from, 4 * w);
}

// n floats, a multiple of 16, rounded to bf16 for products(). The instruction takes what is next to nothing for zero.
KVC_INLINE void put_pairs(char* out, const float* x, int n) {
#if KVC_ISA_avx512
  for (int i = 0; i < n; i += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(load(x + i));
    memcpy(out + 2 * i, &rounded, 32);
  }
#else
  store_floats(out, 0, x, n, KVC_BF16);
#endif
}

// How keys lie side by side, and rows that meet them: as floats, or pairs of bf16.
struct Form {
  bool pairs;
  int head_dim;
  int64_t row_bytes() const { return (int64_t)head_dim * (pairs ? 2 : 4); }
  void put_row(char* to, const float* x) const {
    if (pairs) put_pairs(to, x, head_dim);
    else store_floats(to, 0, x, head_dim, KVC_F32);
  }
  // Four vectors of floats to places i .. i + 4, where every 16 lie side by side.
  void put(char* vectors, int i, const float (*x)[KVC_MAX_HEAD_DIM]) const {
    alignas(64) char rows[4][4 * KVC_MAX_HEAD_DIM];
    const char* from[4];
    for (int r = 0; r < 4; ++r) {
      put_row(rows[r], x[r]);
      from[r] = rows[r];
    }
    put_four(vectors + i / 16 * 16 * row_bytes() + i % 16 * 4, from, pairs ? head_dim / 2 : head_dim);
  }
};

}  // namespace
}  // namespace KVC_ISA
}  // namespace kvc
#endif
