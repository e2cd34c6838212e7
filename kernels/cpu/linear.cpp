// linear(): a few rows times the transposed weight of a linear layer (kernels/linear.py). Each weight is used once per
// row of x, so that reading it is all that takes time. A thread reads its part of the weight in several streams that are
// far from each other: on Zen 5 that is a little quicker than a plain read, which is one stream, and much quicker than
// four neighbouring rows at a time. Sums are float32, one vector per row of the weight and row of x.
#include "attention_core.h"
#include "ops.h"

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kMaxRows = 4;            // of x
constexpr int kStep = 2 * kLanes;      // 16-bit numbers of one register
constexpr int64_t kAhead = 1024;       // bytes of a stream that are fetched before they are needed
constexpr int64_t kWorthThread = 48 << 10;  // bytes of weight: waking a thread takes as long as reading some of this

// The registers of x that belong to one register of weights: the numbers at even places and those at odd ones with bf16,
// the first half and the second with fp16. AVX-512 multiplies bf16 as they are, in pairs.
#if KVC_ISA_avx512
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

template <int DTYPE>
constexpr int64_t step_bytes() {  // of x, prepared
  return kPairs && DTYPE == KVC_BF16 ? KVC_WIDTH : 2 * KVC_WIDTH;
}

struct Weights {
#if KVC_ISA_avx512
  __m512i raw;
#endif
  vf low, high;
};
template <int DTYPE>
KVC_INLINE Weights unpack(const void* p) {
  Weights w;
#if KVC_ISA_avx512
  if (DTYPE == KVC_BF16) {
    w.raw = _mm512_loadu_si512(p);
    return w;
  }
#endif
  if (DTYPE == KVC_BF16) {
    const vu u = (vu)load_int(p);
    w.low = (vf)(u << 16);
    w.high = (vf)(u & 0xffff0000u);
  } else {
    w.low = from_f16(p);
    w.high = from_f16(static_cast<const char*>(p) + KVC_WIDTH / 2);
  }
  return w;
}
template <int DTYPE>
KVC_INLINE vf add_product(vf sum, const Weights& w, const char* x) {
#if KVC_ISA_avx512
  if (DTYPE == KVC_BF16) return _mm512_dpbf16_ps(sum, (__m512bh)w.raw, (__m512bh)_mm512_loadu_si512(x));
#endif
  sum = w.low * load(x) + sum;
  return w.high * load(x + KVC_WIDTH) + sum;
}

template <int DTYPE>
static inline void prepare(const KvcLinear& a, int64_t steps, char* to) {
  for (int row = 0; row < a.rows; ++row) {
    const char* from = static_cast<const char*>(a.x) + 2 * row * a.x_stride;
    for (int64_t i = 0; i < steps; ++i, to += step_bytes<DTYPE>()) {
      const int64_t left = a.in_features - i * kStep;
      alignas(64) char whole[KVC_WIDTH] = {};
      memcpy(whole, from + i * KVC_WIDTH, left < kStep ? 2 * left : KVC_WIDTH);
      if (step_bytes<DTYPE>() == KVC_WIDTH) {
        memcpy(to, whole, KVC_WIDTH);
        continue;
      }
      const Weights w = unpack<DTYPE>(whole);
      store(to, w.low);
      store(to + KVC_WIDTH, w.high);
    }
  }
}

struct Linear {
  const KvcLinear* a;
  const char* x;        // [rows][steps] registers, zeros behind the end
  int64_t steps, whole;  // registers of a row of the weight, and those of them that it fills

  const char* weight(int64_t output) const {
    return static_cast<const char*>(a->weight) + 2 * output * a->weight_stride;
  }

  // Outputs first, first + apart, first + 2 * apart ...
  template <int DTYPE, int N, int ROWS>
  void together(int64_t first, int64_t apart) const {
    const char* w[N];
    KVC_UNROLL for (int n = 0; n < N; ++n) w[n] = weight(first + n * apart);
    vf sum[N][ROWS];
    KVC_UNROLL for (int n = 0; n < N; ++n) KVC_UNROLL for (int r = 0; r < ROWS; ++r) sum[n][r] = vf{};
    const int64_t row_bytes = steps * step_bytes<DTYPE>();
    for (int64_t i = 0; i < whole; ++i) {
      const bool line = KVC_WIDTH == 64 || i % (64 / KVC_WIDTH) == 0;
      KVC_UNROLL for (int n = 0; n < N; ++n) {
        if (line) __builtin_prefetch(w[n] + i * KVC_WIDTH + kAhead, 0, 3);
        const Weights part = unpack<DTYPE>(w[n] + i * KVC_WIDTH);
        KVC_UNROLL for (int r = 0; r < ROWS; ++r)
          sum[n][r] = add_product<DTYPE>(sum[n][r], part, x + r * row_bytes + i * step_bytes<DTYPE>());
      }
    }
    if (whole < steps) {
      KVC_UNROLL for (int n = 0; n < N; ++n) {
        alignas(64) char end[KVC_WIDTH] = {};
        memcpy(end, w[n] + whole * KVC_WIDTH, 2 * (a->in_features - whole * kStep));
        const Weights part = unpack<DTYPE>(end);
        KVC_UNROLL for (int r = 0; r < ROWS; ++r)
          sum[n][r] = add_product<DTYPE>(sum[n][r], part, x + r * row_bytes + whole * step_bytes<DTYPE>());
      }
    }
    KVC_UNROLL for (int r = 0; r < ROWS; ++r) {
      vf sums[4] = {};
      KVC_UNROLL for (int n = 0; n < N; ++n) sums[n] = sum[n][r];
      alignas(64) float reduced[kLanes] = {};
      if (N == 1) reduced[0] = reduce_add(sums[0]);
      else reduce_add4(sums, reduced);
      finish<DTYPE, N>(r, first, apart, reduced);
    }
  }

  template <int DTYPE, int N>
  void finish(int r, int64_t first, int64_t apart, const float* sums) const {
    alignas(64) uint16_t narrow[kLanes] = {};
    vf sum = load(sums);
    if (a->bias) {
      const uint16_t* bias = static_cast<const uint16_t*>(a->bias) + first;
      KVC_UNROLL for (int n = 0; n < N; ++n) narrow[n] = bias[n * apart];
      sum = sum + load_native<DTYPE>(narrow, 0);
    }
    if (DTYPE == KVC_BF16) to_bf16(narrow, sum);
    else to_f16(narrow, sum);
    uint16_t* out = static_cast<uint16_t*>(a->out) + r * a->out_stride + first;
    KVC_UNROLL for (int n = 0; n < N; ++n) out[n * apart] = narrow[n];
  }

  template <int DTYPE, int ROWS>
  void outputs(int64_t first, int64_t end) const {
    constexpr int kStreams = KVC_WIDTH == 64 || ROWS <= 2 ? 4 : 2;  // as many sums as there are registers for
    const int64_t apart = (end - first) / kStreams;
    for (int64_t i = 0; i < apart; ++i) together<DTYPE, kStreams, ROWS>(first + i, apart);
    for (int64_t i = first + kStreams * apart; i < end; ++i) together<DTYPE, 1, ROWS>(i, 0);
  }

  template <int DTYPE>
  void outputs(int64_t first, int64_t end) const {
    switch (a->rows) {
      case 1: return outputs<DTYPE, 1>(first, end);
      case 2: return outputs<DTYPE, 2>(first, end);
      case 3: return outputs<DTYPE, 3>(first, end);
      default: return outputs<DTYPE, 4>(first, end);
    }
  }
};

thread_local Arena arena;

template <int DTYPE>
int run(const KvcLinear& a) {
  Linear c;
  c.a = &a;
  c.whole = a.in_features / kStep;
  c.steps = (a.in_features + kStep - 1) / kStep;
  char* x = arena.reserve(c.steps * step_bytes<DTYPE>() * a.rows + 64);
  if (!x) return KVC_BAD_ARGUMENT;
  prepare<DTYPE>(a, c.steps, x);
  c.x = x;
  const int64_t bytes = 2 * (int64_t)a.in_features * a.out_features;
  int64_t threads = max_threads();
  if (bytes / kWorthThread < threads) threads = bytes / kWorthThread;
  if (threads < 1) threads = 1;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
  {
    const int64_t me = thread_index();
    c.outputs<DTYPE>(a.out_features * me / threads, a.out_features * (me + 1) / threads);
  }
  return KVC_OK;
}

}  // namespace

int linear(KvcLinear* a) {
  if (a->rows < 1 || a->rows > kMaxRows || a->in_features < 1) return KVC_BAD_ARGUMENT;
  if (a->dtype == KVC_BF16) return run<KVC_BF16>(*a);
  if (a->dtype == KVC_F16) return run<KVC_F16>(*a);
  return KVC_BAD_ARGUMENT;
}

}  // namespace KVC_ISA
}  // namespace kvc
