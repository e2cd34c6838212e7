// Decode attention over plain contiguous bf16 keys and values, [kv_heads][slots][HEAD_DIM] each, with AVX512-BF16: what
// a careful kernel reaches without pages, tiers or per-row lengths. The yardstick of decode.py; compiled by
// dense_bf16.py with GROUP (query heads per KV head) and HEAD_DIM (a multiple of 64).
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <vector>

namespace {

constexpr int kTile = 64;              // slots per softmax step
constexpr int kVectors = HEAD_DIM / 32; // of 32 bf16 in a row
constexpr int kAhead = kTile * HEAD_DIM * 2;  // prefetch distance in bytes: the next tile, into the second-level cache

struct State {  // of the GROUP query heads over a part of the slots
  float m[GROUP], l[GROUP];
  alignas(64) float o[GROUP][HEAD_DIM];
};

inline __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.33335581e-3f);
  for (float c : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, whole);
}

// Sums of sixteen registers, one per lane of the result.
inline __m512 sums_of(const __m512* x) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[i], x[i + 8]), _mm512_unpackhi_ps(x[i], x[i + 8]));
  for (int i = 0; i < 4; ++i)
    b[i] = _mm512_add_ps(_mm512_shuffle_ps(a[i], a[i + 4], 0x44), _mm512_shuffle_ps(a[i], a[i + 4], 0xee));
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[i], b[i + 2], 0x44), _mm512_shuffle_f32x4(b[i], b[i + 2], 0xee));
  const __m512 s =
      _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
  // The bits of i say where its sum is now, from the highest on: which half each step above put it into.
  const __m512i order = _mm512_setr_epi32(0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15);
  return _mm512_permutexvar_ps(order, s);
}

void attend(const uint16_t* k, const uint16_t* v, const uint16_t* q, int n, float scale, State& state) {
  for (int h = 0; h < GROUP; ++h) {
    state.m[h] = -1e30f;
    state.l[h] = 0.f;
    memset(state.o[h], 0, sizeof state.o[h]);
  }
  alignas(64) float s[GROUP][kTile];
  alignas(64) uint16_t weights[GROUP][kTile];
  for (int start = 0; start < n; start += kTile) {
    const int count = n - start < kTile ? n - start : kTile;
    const uint16_t *keys = k + (int64_t)start * HEAD_DIM, *values = v + (int64_t)start * HEAD_DIM;
    for (int i = 0; i < count; i += 16)
      for (int h = 0; h < GROUP; ++h) {
        __m512bh x[kVectors];
        for (int j = 0; j < kVectors; ++j) x[j] = (__m512bh)_mm512_loadu_si512(q + h * HEAD_DIM + 32 * j);
        __m512 sum[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          const uint16_t* row = keys + (i + (i + r < count ? r : 0)) * HEAD_DIM;
          sum[r] = _mm512_setzero_ps();
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) {
            if (h == 0) _mm_prefetch((const char*)(row + 32 * j) + kAhead, _MM_HINT_T1);
            sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_loadu_si512(row + 32 * j), x[j]);
          }
        }
        const __m512 y = _mm512_mul_ps(sums_of(sum), _mm512_set1_ps(scale));
        const __mmask16 seen = count - i >= 16 ? 0xffff : (1 << (count - i)) - 1;
        _mm512_store_ps(s[h] + i, _mm512_mask_blend_ps(seen, _mm512_set1_ps(-3e38f), y));
      }
    for (int h = 0; h < GROUP; ++h) {
      __m512 top = _mm512_set1_ps(state.m[h]), total = _mm512_setzero_ps();
      for (int i = 0; i < count; i += 16) top = _mm512_max_ps(top, _mm512_load_ps(s[h] + i));
      const float m = _mm512_reduce_max_ps(top), alpha = exp2f(state.m[h] - m);
      for (int i = 0; i < count; i += 16) {
        const __m512 p = exp2_of(_mm512_sub_ps(_mm512_load_ps(s[h] + i), _mm512_set1_ps(m)));
        total = _mm512_add_ps(total, p);
        const __m256bh b = _mm512_cvtneps_pbh(p);
        memcpy(weights[h] + i, &b, 32);
      }
      state.m[h] = m;
      state.l[h] = state.l[h] * alpha + _mm512_reduce_add_ps(total);
      if (alpha != 1.f)
        for (int j = 0; j < HEAD_DIM; j += 16)
          _mm512_store_ps(state.o[h] + j, _mm512_mul_ps(_mm512_load_ps(state.o[h] + j), _mm512_set1_ps(alpha)));
    }
    for (int at = 0; at < kVectors; at += 2) {  // 64 dims at a time: sixteen sums
      __m512 sum[GROUP][4];
      for (auto& row : sum)
        for (auto& x : row) x = _mm512_setzero_ps();
      for (int i = 0; i < count; i += 2) {
        const uint16_t *a = values + i * HEAD_DIM + 32 * at, *b = i + 1 < count ? a + HEAD_DIM : a;
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          _mm_prefetch((const char*)(a + 32 * j) + kAhead, _MM_HINT_T1);
          _mm_prefetch((const char*)(b + 32 * j) + kAhead, _MM_HINT_T1);
          const __m512i x = _mm512_loadu_si512(a + 32 * j), y = _mm512_loadu_si512(b + 32 * j);
          const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(x, y), high = (__m512bh)_mm512_unpackhi_epi16(x, y);
#pragma GCC unroll 4
          for (int h = 0; h < GROUP; ++h) {
            int32_t pair;
            memcpy(&pair, weights[h] + i, 4);
            const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
            sum[h][2 * j] = _mm512_dpbf16_ps(sum[h][2 * j], low, w);
            sum[h][2 * j + 1] = _mm512_dpbf16_ps(sum[h][2 * j + 1], high, w);
          }
        }
      }
      // Lane 4 * i + j of the two sums of 32 dims are dims 8 * i + j and 8 * i + 4 + j.
      const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
      for (int h = 0; h < GROUP; ++h)
        for (int j = 0; j < 2; ++j) {
          float* o = state.o[h] + 32 * (at + j);
          const __m512 x = sum[h][2 * j], y = sum[h][2 * j + 1];
          _mm512_store_ps(o, _mm512_add_ps(_mm512_load_ps(o), _mm512_permutex2var_ps(x, first, y)));
          _mm512_store_ps(o + 16, _mm512_add_ps(_mm512_load_ps(o + 16), _mm512_permutex2var_ps(x, second, y)));
        }
    }
  }
}

}  // namespace

// q [kv_heads, GROUP, HEAD_DIM], k and v [kv_heads, slots, HEAD_DIM], all bf16; out [kv_heads, GROUP, HEAD_DIM] float.
extern "C" void dense_decode(const uint16_t* q, const uint16_t* k, const uint16_t* v, float* out, int kv_heads,
                             int slots, float scale) {
  const int splits = omp_get_max_threads() > 1 ? 4 : 1;
  const int part = ((slots + splits - 1) / splits + kTile - 1) / kTile * kTile;
  std::vector<State> states(kv_heads * splits);
#pragma omp parallel for schedule(dynamic, 1)
  for (int i = 0; i < kv_heads * splits; ++i) {
    const int head = i / splits, from = i % splits * part, n = slots - from < part ? slots - from : part;
    const int64_t at = ((int64_t)head * slots + from) * HEAD_DIM;
    attend(k + at, v + at, q + head * GROUP * HEAD_DIM, n > 0 ? n : 0, scale * 1.44269504f, states[i]);
  }
  for (int head = 0; head < kv_heads; ++head)
    for (int h = 0; h < GROUP; ++h) {
      const State* parts = &states[head * splits];
      float m = -1e30f, l = 0.f;
      for (int i = 0; i < splits; ++i) m = parts[i].m[h] > m ? parts[i].m[h] : m;
      float* o = out + (head * GROUP + h) * HEAD_DIM;
      memset(o, 0, HEAD_DIM * sizeof(float));
      for (int i = 0; i < splits; ++i) {
        const float alpha = exp2f(parts[i].m[h] - m);
        l += parts[i].l[h] * alpha;
        for (int j = 0; j < HEAD_DIM; ++j) o[j] += parts[i].o[h][j] * alpha;
      }
      for (int j = 0; j < HEAD_DIM; ++j) o[j] /= l;
    }
}
