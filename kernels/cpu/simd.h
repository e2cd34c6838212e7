// Vectors for kernels that are compiled once per instruction set (see ops.h). `vf` and `vi` are one hardware
// register of floats and of int32: 16 lanes with AVX-512, 8 with AVX2, 4 otherwise (SSE2, NEON), as GCC vector
// extensions, so that + - * and comparisons need no intrinsics. All sizes in pages are multiples of 16 elements, so
// that loops in steps of kLanes have no remainders.
#ifndef KVC_SIMD_H
#define KVC_SIMD_H
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593: false alarms from its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if KVC_ISA_avx512
#define KVC_WIDTH 64
#elif KVC_ISA_avx2
#define KVC_WIDTH 32
#else
#define KVC_WIDTH 16
#endif
#define KVC_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define KVC_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVC_UNROLL _Pragma("GCC unroll 16")
#endif

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kLanes = KVC_WIDTH / 4;
constexpr int kParts = 16 / kLanes;  // registers that hold one 16-lane (64 byte) vector of a page

typedef float vf __attribute__((vector_size(KVC_WIDTH)));
typedef int32_t vi __attribute__((vector_size(KVC_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(KVC_WIDTH)));
typedef uint16_t vus __attribute__((vector_size(KVC_WIDTH)));
typedef uint16_t vh __attribute__((vector_size(KVC_WIDTH / 2)));
typedef float vf_loose __attribute__((vector_size(KVC_WIDTH), aligned(1), may_alias));
typedef int32_t vi_loose __attribute__((vector_size(KVC_WIDTH), aligned(1), may_alias));
typedef uint16_t vh_loose __attribute__((vector_size(KVC_WIDTH / 2), aligned(1), may_alias));

KVC_INLINE vf load(const void* p) { return *static_cast<const vf_loose*>(p); }
KVC_INLINE vi load_int(const void* p) { return *static_cast<const vi_loose*>(p); }
KVC_INLINE void store(void* p, vf x) { *static_cast<vf_loose*>(p) = x; }
KVC_INLINE void store(void* p, vi x) { *static_cast<vi_loose*>(p) = x; }

KVC_INLINE vf all(float x) {
#if KVC_ISA_avx512
  return _mm512_set1_ps(x);
#elif KVC_ISA_avx2
  return _mm256_set1_ps(x);
#else
  return x - vf{};
#endif
}
KVC_INLINE vi all(int32_t x) { return x + vi{}; }

KVC_INLINE vf max(vf a, vf b) {
#if KVC_ISA_avx512
  return _mm512_max_ps(a, b);
#elif KVC_ISA_avx2
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
KVC_INLINE vf min(vf a, vf b) { return -max(-a, -b); }

KVC_INLINE float reduce_max(vf x) {
#if KVC_ISA_avx512
  return _mm512_reduce_max_ps(x);
#else
  float r = x[0];
  for (int i = 1; i < kLanes; ++i) r = x[i] > r ? x[i] : r;
  return r;
#endif
}
KVC_INLINE float reduce_add(vf x) {
#if KVC_ISA_avx512
  return _mm512_reduce_add_ps(x);
#elif KVC_ISA_avx2
  const __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 s = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// Four registers reduced together: out[i] = sum (or maximum) of x[i]. Costs little more than one alone.
KVC_INLINE void reduce_add4(const vf* x, float* out) {
#if KVC_ISA_avx512
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = reduce_add(x[i]);
#endif
}
KVC_INLINE void reduce_max4(const vf* x, float* out) {
#if KVC_ISA_avx512
  const __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512 s = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = reduce_max(x[i]);
#endif
}

// 2^x, relative error below 3e-7 for -126 <= x <= 127; 0 for masked logits. NaN stays NaN.
KVC_INLINE vf exp2(vf x) {
#if KVC_ISA_avx512
  const vf whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf f = x - whole;
#else
  x = max(all(-127.f), x);  // in this order a NaN stays a NaN
  const vf shifted = x + all(12582912.f);  // 1.5 * 2^23: the low bits now hold round(x)
  const vf f = x - (shifted - all(12582912.f));
#endif
  vf p = all(1.54353139e-4f);
  p = p * f + all(1.33335581e-3f);
  p = p * f + all(9.61812911e-3f);
  p = p * f + all(5.55041087e-2f);
  p = p * f + all(2.40226507e-1f);
  p = p * f + all(6.93147181e-1f);
  p = p * f + all(1.f);
#if KVC_ISA_avx512
  return _mm512_scalef_ps(p, whole);
#else
  const vi bits = (((vi)shifted) + (127 - 0x4B400000)) << 23;
  return p * (vf)bits;
#endif
}
// log2(x), 0.09 too small at most, for 0 < x < inf; -127 for 0.
KVC_INLINE vf rough_log2(vf x) { return __builtin_convertvector((vi)x, vf) * all(1.1920929e-7f) - all(127.f); }
KVC_INLINE float exp2(float x) { return exp2(all(x))[0]; }

// Words at .. at + 4 of four vectors, transposed: those with the same number side by side, 64 bytes apart.
KVC_INLINE void put_words(char* out, const char* const* from, int at) {
  typedef int32_t words __attribute__((vector_size(16)));
  words x[4];
  KVC_UNROLL for (int r = 0; r < 4; ++r) memcpy(&x[r], from[r] + at, 16);
  const words a0 = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
  const words a1 = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
  const words b0 = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
  const words b1 = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  x[0] = __builtin_shufflevector(a0, b0, 0, 1, 4, 5);
  x[1] = __builtin_shufflevector(a0, b0, 2, 3, 6, 7);
  x[2] = __builtin_shufflevector(a1, b1, 0, 1, 4, 5);
  x[3] = __builtin_shufflevector(a1, b1, 2, 3, 6, 7);
  KVC_UNROLL for (int r = 0; r < 4; ++r) memcpy(out + 64 * r, &x[r], 16);
}

// ---- 16-bit floats ---------------------------------------------------------------------------------------------
KVC_INLINE vf from_bf16(const void* p) {
  const vu u = __builtin_convertvector(*static_cast<const vh_loose*>(p), vu);
  return (vf)(u << 16);
}
KVC_INLINE vf from_f16_bits(vu h) {  // lanes hold an fp16 in their low half, zeros above
#if KVC_ISA_avx512
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)h));
#elif KVC_ISA_avx2
  const __m256i v = (__m256i)h;
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
  const vu em = (h & 0x7fffu) << 13;
  const vu wide = (vu)((vf)em * 5.192296858534828e33f);             // * 2^112: exact, subnormals included
  const vu special = (vu)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // inf and NaN
  return (vf)(wide | special | ((h & 0x8000u) << 16));
#endif
}
KVC_INLINE vf from_f16(const void* p) {
#if KVC_ISA_avx512
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif KVC_ISA_avx2
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  return from_f16_bits(__builtin_convertvector(*static_cast<const vh_loose*>(p), vu));
#endif
}
KVC_INLINE void to_bf16(void* p, vf x) {  // round to nearest even, NaN stays NaN
  const vu u = (vu)x;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (vu)(x != x);
  *static_cast<vh_loose*>(p) = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), vh);
}
KVC_INLINE uint16_t to_f16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and above round to infinity
  if (u < 0x38800000u) {                                    // subnormal: adding 0.5 puts the ulp at 2^-24
    float f;
    memcpy(&f, &u, 4);
    f += 0.5f;
    memcpy(&u, &f, 4);
    return (uint16_t)(sign | (u - 0x3f000000u));
  }
  u += 0xc8000fffu + ((u >> 13) & 1u);
  return (uint16_t)(sign | (u >> 13));
}
KVC_INLINE void to_f16(void* p, vf x) {
#if KVC_ISA_avx512
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif KVC_ISA_avx2
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint16_t h = to_f16(x[i]);
    memcpy(static_cast<char*>(p) + 2 * i, &h, 2);
  }
#endif
}

// ---- Walsh-Hadamard --------------------------------------------------------------------------------------------
// One butterfly stage inside a register: lane i becomes x[i] + x[i ^ step], or x[i ^ step] - x[i] where bit `step`
// of i is set.
template <int STEP>
KVC_INLINE vf butterfly(vf x) {
#if KVC_WIDTH == 64
#define KVC_SHUFFLE(s)                                                                                               \
  __builtin_shufflevector(x, x, 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s, 4 ^ s, 5 ^ s, 6 ^ s, 7 ^ s, 8 ^ s, 9 ^ s, 10 ^ s, 11 ^ s, \
                          12 ^ s, 13 ^ s, 14 ^ s, 15 ^ s)
#elif KVC_WIDTH == 32
#define KVC_SHUFFLE(s) __builtin_shufflevector(x, x, 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s, 4 ^ s, 5 ^ s, 6 ^ s, 7 ^ s)
#else
#define KVC_SHUFFLE(s) __builtin_shufflevector(x, x, 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s)
#endif
  vf sign;
  for (int i = 0; i < kLanes; ++i) sign[i] = (i & STEP) ? -1.f : 1.f;
  return KVC_SHUFFLE(STEP) + sign * x;
#undef KVC_SHUFFLE
}

// Sums and differences of consecutive blocks of x[n], times a factor; block is a power of two, at least 16.
KVC_INLINE void butterflies(float* x, int n, int block, float factor) {
  for (int i = 0; i < n; i += kLanes) {
    vf v = load(x + i);
    v = butterfly<1>(v);
    v = butterfly<2>(v);
#if KVC_WIDTH >= 32
    v = butterfly<4>(v);
#endif
#if KVC_WIDTH >= 64
    v = butterfly<8>(v);
#endif
    store(x + i, v * all(factor));
  }
  for (int step = kLanes; step < block; step *= 2)
    for (int i = 0; i < n; i += 2 * step)
      for (int j = i; j < i + step; j += kLanes) {
        const vf a = load(x + j), b = load(x + j + step);
        store(x + j, a + b);
        store(x + j + step, a - b);
      }
}

// Orthonormal transform of consecutive blocks of x[n], of queries.
KVC_INLINE void hadamard(float* x, int n, int block) {
  float norm = 1.f;
  for (int b = block; b > 1; b >>= 1) norm *= 0.70710678118654752f;
  butterflies(x, n, block, norm);
}

// The same for values and attention's output, to the bit as in quantize.py: the norm comes last, rounded once.
KVC_INLINE void rotate_value(float* x, int n, int block) {
  float norm = 1.f;
  for (int b = block; b > 1; b /= 4) norm *= b == 2 ? 0.70710678118654752f : 0.5f;
  butterflies(x, n, block, 1.f);
  for (int i = 0; i < n; i += kLanes) store(x + i, load(x + i) * all(norm));
}

// ---- integer dots ----------------------------------------------------------------------------------------------
// Pages hold unsigned codes so that one 32-bit lane has four of them: four dims of a slot (keys) or four slots of
// a dim (values). dot() adds, in every lane, the four codes times four weights that all lanes share. Weights
// (a query, or probabilities times value scales) are kept to 16 bits as Words:
//   AVX-512: two signed bytes, weight = 256 * high + low; vpdpbusd takes one of them at a time
//   AVX2:    one int16; vpmaddwd takes codes 0 and 2, then 1 and 3 (vpmaddubsw would saturate)
//   others:  floats, not rounded
// Codes of 4 and 2 bits take weights of one byte, Bytes, at half the cost or less; attention_core.h says why that is
// enough. Keys' weights are signed. Values' weights are not negative, hence unsigned, and their codes are
// made signed by taking half of their range off.
constexpr int kMaxQuads = 64;
constexpr float kWeightLimit = 32512.f;  // 127 * 256: the high byte stays in range after rounding
constexpr float kKeyByteLimit = 127.f, kValueByteLimit = 255.f;
template <int BITS>
constexpr int half_range() {
  return 1 << (BITS - 1);
}
#if KVC_ISA_avx512
struct Words {  // weights of up to four heads
  alignas(64) int32_t high[4][kMaxQuads];
  alignas(64) int32_t low[4][kMaxQuads];
};
struct Dot {
  __m512i high, low;
};
typedef __m512i Raw;
typedef __m512i Codes;
KVC_INLINE Raw load_raw(const void* p) { return _mm512_loadu_si512(p); }
template <int BITS>
KVC_INLINE Codes codes(Raw x, int j) {
  if (BITS == 8) return x;
  return _mm512_and_si512((__m512i)((vus)x >> (j * BITS)), _mm512_set1_epi8((char)((1 << BITS) - 1)));
}
// GCC 12 keeps copies of every sum when the intrinsic is used in a loop, and spills; written out, it does not.
KVC_INLINE void dpbusd(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}
KVC_INLINE Dot dot_zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
KVC_INLINE void dot(Dot& s, Codes c, const Words& w, int head, int quad) {
  dpbusd(s.high, c, _mm512_set1_epi32(w.high[head][quad]));
  dpbusd(s.low, c, _mm512_set1_epi32(w.low[head][quad]));
}
KVC_INLINE vf value(const Dot& s) {
  const vf high = _mm512_cvtepi32_ps(s.high), low = _mm512_cvtepi32_ps(s.low);
  return high * all(256.f) + low;
}
// Rounds kLanes weights, already scaled to +-kWeightLimit, from lane `at` on; returns what they now are.
KVC_INLINE vf put(Words& w, int head, int at, vf x) {
  const __m512i r = _mm512_cvtps_epi32(x);
  const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(r, _mm512_set1_epi32(128)), 8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(&w.high[head][at / 4]), _mm512_cvtepi32_epi8(h));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(&w.low[head][at / 4]), _mm512_cvtepi32_epi8(r));
  return _mm512_cvtepi32_ps(r);
}

struct Bytes {  // weights of up to four heads
  alignas(64) int32_t quad[4][kMaxQuads];
};
struct ByteDot {
  __m512i sum;
};
KVC_INLINE ByteDot byte_dot_zero() { return {_mm512_setzero_si512()}; }
template <int BITS>
KVC_INLINE Codes byte_codes(Raw x, int j) {
  return codes<BITS>(x, j);
}
template <int BITS>
KVC_INLINE Codes signed_codes(Raw x, int j) {
  return _mm512_sub_epi8(codes<BITS>(x, j), _mm512_set1_epi8(half_range<BITS>()));
}
KVC_INLINE Raw byte_weights(const Bytes& w, int head, int quad) { return _mm512_set1_epi32(w.quad[head][quad]); }
KVC_INLINE void dot_key(ByteDot& s, Codes c, Raw weights) { dpbusd(s.sum, c, weights); }
KVC_INLINE void dot_value(ByteDot& s, Codes c, Raw weights) { dpbusd(s.sum, weights, c); }
KVC_INLINE void settle(ByteDot&) {}  // to be called at least after every eight dots
KVC_INLINE vf value(const ByteDot& s) { return _mm512_cvtepi32_ps(s.sum); }
KVC_INLINE vf put_signed(Bytes& w, int head, int at, vf x) {  // as put(), scaled to +-kKeyByteLimit
  const __m512i r = _mm512_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(&w.quad[head][at / 4]), _mm512_cvtepi32_epi8(r));
  return _mm512_cvtepi32_ps(r);
}
KVC_INLINE void put_unsigned(Bytes& w, int head, int at, vf x) {  // scaled to 0 .. kValueByteLimit
  _mm_storeu_si128(reinterpret_cast<__m128i*>(&w.quad[head][at / 4]), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x)));
}
#elif KVC_ISA_avx2
struct Words {
  alignas(64) int32_t pair[4][kMaxQuads][2];
};
struct Dot {
  __m256i sum;
};
typedef __m256i Raw;
struct Codes {
  __m256i even, odd;
};
KVC_INLINE Raw load_raw(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
template <int BITS>
KVC_INLINE Codes codes(Raw x, int j) {
  const __m256i mask = _mm256_set1_epi16((1 << BITS) - 1);
  return {_mm256_and_si256((__m256i)((vus)x >> (j * BITS)), mask),
          _mm256_and_si256((__m256i)((vus)x >> (8 + j * BITS)), mask)};
}
KVC_INLINE Dot dot_zero() { return {_mm256_setzero_si256()}; }
KVC_INLINE void dot(Dot& s, const Codes& c, const Words& w, int head, int quad) {
  const __m256i a = _mm256_madd_epi16(c.even, _mm256_set1_epi32(w.pair[head][quad][0]));
  const __m256i b = _mm256_madd_epi16(c.odd, _mm256_set1_epi32(w.pair[head][quad][1]));
  s.sum = _mm256_add_epi32(s.sum, _mm256_add_epi32(a, b));
}
KVC_INLINE vf value(const Dot& s) {
  return _mm256_cvtepi32_ps(s.sum);
}
KVC_INLINE vf put(Words& w, int head, int at, vf x) {
  const __m256i r = _mm256_cvtps_epi32(x);
  const __m256i order = _mm256_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i p = _mm256_shuffle_epi8(r, order);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(w.pair[head][at / 4]), _mm256_castsi256_si128(p));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(w.pair[head][at / 4 + 1]), _mm256_extracti128_si256(p, 1));
  return _mm256_cvtepi32_ps(r);
}

struct Bytes {
  alignas(64) int32_t quad[4][kMaxQuads];
};
struct ByteDot {
  __m256i sum, part;  // part: int16, of at most eight dots, 8 * 2 * 255 * 8 = 32640 at most
};
KVC_INLINE ByteDot byte_dot_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
template <int BITS>
KVC_INLINE Raw byte_codes(Raw x, int j) {
  return _mm256_and_si256((__m256i)((vus)x >> (j * BITS)), _mm256_set1_epi8((1 << BITS) - 1));
}
template <int BITS>
KVC_INLINE Raw signed_codes(Raw x, int j) {
  return _mm256_sub_epi8(byte_codes<BITS>(x, j), _mm256_set1_epi8(half_range<BITS>()));
}
KVC_INLINE Raw byte_weights(const Bytes& w, int head, int quad) { return _mm256_set1_epi32(w.quad[head][quad]); }
KVC_INLINE void dot_key(ByteDot& s, Raw c, Raw weights) {
  s.part = _mm256_add_epi16(s.part, _mm256_maddubs_epi16(c, weights));
}
KVC_INLINE void dot_value(ByteDot& s, Raw c, Raw weights) {
  s.part = _mm256_add_epi16(s.part, _mm256_maddubs_epi16(weights, c));
}
KVC_INLINE void settle(ByteDot& s) {
  s.sum = _mm256_add_epi32(s.sum, _mm256_madd_epi16(s.part, _mm256_set1_epi16(1)));
  s.part = _mm256_setzero_si256();
}
KVC_INLINE vf value(const ByteDot& s) { return _mm256_cvtepi32_ps(s.sum); }
KVC_INLINE void put_bytes(Bytes& w, int head, int at, __m256i r) {  // the low bytes of eight lanes
  const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i p = _mm256_shuffle_epi8(r, order);
  w.quad[head][at / 4] = _mm256_extract_epi32(p, 0);
  w.quad[head][at / 4 + 1] = _mm256_extract_epi32(p, 4);
}
KVC_INLINE vf put_signed(Bytes& w, int head, int at, vf x) {
  const __m256i r = _mm256_cvtps_epi32(x);
  put_bytes(w, head, at, r);
  return _mm256_cvtepi32_ps(r);
}
KVC_INLINE void put_unsigned(Bytes& w, int head, int at, vf x) {
  put_bytes(w, head, at, _mm256_min_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(255)));
}
#else
struct Words {
  alignas(64) float weight[4][kMaxQuads * 4];
};
struct Dot {
  vf sum;
};
typedef vi Raw;
struct Codes {
  vf c[4];
};
KVC_INLINE Raw load_raw(const void* p) { return load_int(p); }
template <int BITS>
KVC_INLINE Codes codes(Raw x, int j) {
  Codes r;
  KVC_UNROLL for (int e = 0; e < 4; ++e)
    r.c[e] = __builtin_convertvector((vi)((vu)x >> (8 * e + j * BITS)) & ((1 << BITS) - 1), vf);
  return r;
}
KVC_INLINE Dot dot_zero() { return {vf{}}; }
KVC_INLINE void dot(Dot& s, const Codes& c, const Words& w, int head, int quad) {
  KVC_UNROLL for (int e = 0; e < 4; ++e) s.sum = c.c[e] * all(w.weight[head][quad * 4 + e]) + s.sum;
}
KVC_INLINE vf value(const Dot& s) {
  return s.sum;
}
KVC_INLINE vf put(Words& w, int head, int at, vf x) {
  store(&w.weight[head][at], x);
  return x;
}

typedef Words Bytes;  // floats cost the same either way
typedef Dot ByteDot;
KVC_INLINE ByteDot byte_dot_zero() { return dot_zero(); }
template <int BITS>
KVC_INLINE Codes byte_codes(Raw x, int j) {
  return codes<BITS>(x, j);
}
template <int BITS>
KVC_INLINE Codes signed_codes(Raw x, int j) {
  Codes r = codes<BITS>(x, j);
  KVC_UNROLL for (int e = 0; e < 4; ++e) r.c[e] = r.c[e] - all((float)half_range<BITS>());
  return r;
}
KVC_INLINE const float* byte_weights(const Bytes& w, int head, int quad) { return &w.weight[head][4 * quad]; }
KVC_INLINE void dot_key(ByteDot& s, const Codes& c, const float* weights) {
  KVC_UNROLL for (int e = 0; e < 4; ++e) s.sum = c.c[e] * all(weights[e]) + s.sum;
}
KVC_INLINE void dot_value(ByteDot& s, const Codes& c, const float* weights) { dot_key(s, c, weights); }
KVC_INLINE void settle(ByteDot&) {}
KVC_INLINE vf put_signed(Bytes& w, int head, int at, vf x) { return put(w, head, at, x); }
KVC_INLINE void put_unsigned(Bytes& w, int head, int at, vf x) { put(w, head, at, x); }
#endif

// Into L2: L1 can wait for only some 24 lines at a time, which makes a third of the bandwidth.
KVC_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
}  // namespace KVC_ISA
}  // namespace kvc
#endif
