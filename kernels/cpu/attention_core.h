// The engine shared by decode, chunk and window scores: logits, softmax and value products over one *tile* of at
// most kTile slots, for up to four query rows of a KV head at a time. Tiles are gathered from pages, 16-slot block by
// block, so that their size does not depend on the page's; codes are used where they lie, never expanded.
#ifndef KVC_ATTENTION_CORE_H
#define KVC_ATTENTION_CORE_H
#include <stdlib.h>
#include "abi.h"
#include "simd.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kTile = 128;          // slots
constexpr int kBlocks = kTile / 16;
constexpr int kHeads = 4;           // query rows handled together
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMasked = -3e38f;   // logit of a slot that may not be seen; exp2() makes it exactly 0
constexpr float kFloor = -1e30f;    // running maximum before anything was seen
constexpr float kByteHeadroom = 7.9f;    // log2(kValueByteLimit), less what rough_log2() is off by
constexpr float kLeastLogScale = -24.f;  // of fp16's smallest number; scales of 0 count as that
constexpr int32_t kNowhere = INT32_MIN;    // position of a lane that holds no slot: outside of every range
constexpr int32_t kOldest = INT32_MIN + 1; // position of a slot that stores none: inside of every range

// ---- memory ----------------------------------------------------------------------------------------------------
// Scratch memory of a thread, kept between calls: the kernel would otherwise spend its time in page faults.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { free(base_); }
  char* reserve(int64_t bytes) {  // null when there is no memory
    if (bytes > size_) {
      free(base_);
      size_ = (bytes + bytes / 4 + 4095) & ~int64_t(4095);
      base_ = static_cast<char*>(aligned_alloc(4096, size_));
      if (!base_) size_ = 0;
    }
    return base_;
  }
  void trim() {  // gives much memory back: only calls that take long need so much
    if (size_ < (int64_t(32) << 20)) return;
    free(base_);
    base_ = nullptr;
    size_ = 0;
  }

 private:
  char* base_ = nullptr;
  int64_t size_ = 0;
};

struct Carve {  // hands out 64-byte aligned parts of a block; with base 0 it only counts
  char* base;
  int64_t at = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + at);
    at += (n * (int64_t)sizeof(T) + 63) & ~int64_t(63);
    return p;
  }
};

KVC_INLINE int64_t element_bytes(int dtype) { return dtype == KVC_F32 ? 4 : 2; }
KVC_INLINE int min_int(int64_t a, int64_t b) { return (int)(a < b ? a : b); }
KVC_INLINE int max_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}
KVC_INLINE int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <int DTYPE>
KVC_INLINE vf load_native(const void* p, int64_t at) {
  const char* c = static_cast<const char*>(p);
  if (DTYPE == KVC_F32) return load(c + 4 * at);
  if (DTYPE == KVC_F16) return from_f16(c + 2 * at);
  return from_bf16(c + 2 * at);
}
static inline void load_floats(float* out, const void* p, int64_t at, int n, int dtype) {
  for (int i = 0; i < n; i += kLanes)
    store(out + i, dtype == KVC_F32   ? load_native<KVC_F32>(p, at + i)
                   : dtype == KVC_F16 ? load_native<KVC_F16>(p, at + i)
                                      : load_native<KVC_BF16>(p, at + i));
}
static inline void store_floats(void* p, int64_t at, const float* x, int n, int dtype) {
  char* c = static_cast<char*>(p) + at * element_bytes(dtype);
  for (int i = 0; i < n; i += kLanes) {
    if (dtype == KVC_F32) store(c + 4 * i, load(x + i));
    else if (dtype == KVC_F16) to_f16(c + 2 * i, load(x + i));
    else to_bf16(c + 2 * i, load(x + i));
  }
}

// ---- tiles -----------------------------------------------------------------------------------------------------
enum TileKind { kNative, kRows, kCodes };  // keys in blocks of 16; keys row-major (the tail); codes

struct Tile {
  TileKind kind;
  int row, tier;                // tier: index, or n_tiers for the tail, n_tiers + 1 for new keys
  int dtype, key_bits, value_bits;  // bits 0: native
  bool rotated;                 // keys are
  bool masked;                  // some lane may be unseen, look at position
  int start, n, blocks;         // first slot, slots, ceil(n / 16)
  const uint8_t *keys[kBlocks], *values[kBlocks];
  const uint8_t *key_params[kBlocks], *value_params[kBlocks];
  int64_t param_bytes;          // from scale to offset
  // What to prefetch while the tile is worked on; never null.
  const uint8_t *next_keys[kBlocks], *next_values[kBlocks], *next_key_params[kBlocks], *next_value_params[kBlocks];
  int64_t next_param_bytes;
  int64_t value_stride;         // native: elements from slot to slot
  char* fields[kBlocks];        // field f of a block is at fields + f * field_bytes
  int64_t field_bytes;
  alignas(64) int32_t position[kTile];
  // A slot's weight is its probability times its value scale, as an integer. 8-bit values: `weight` holds the scales
  // with the largest made kWeightLimit, weight_step is the size of one unit. Fewer bits: the scales as they are, and
  // roughly their log2; value_offset belongs to the middle of the codes, which are made signed.
  alignas(64) float weight[kTile], value_offset[kTile], log_scale[kTile];
  float weight_step;
};

// Precision of the integer weights. Next to 8-bit codes, queries (but see mix_queries()) and probabilities have 16
// bits: what they lose is far below the codes' own error. Next to codes of 4 and 2 bits, probabilities have 8. Rounding a slot's weight costs at most
// 1/510 of the tile's largest weight w, times the spread of a code (below 3 steps of 4 bits, 0.9 of 2 bits), for each
// of kTile slots: together below w * 0.29 / 255 * 3 * sqrt(128) steps. The slot with that weight alone already has an
// error of w * 0.29 steps from quantising its value, so that the sum is off by an eighth of that at worst, and by a
// twentieth where weights are spread out. Queries of rotated keys are rotated too, hence without outliers, and fare
// alike in decode(); chunk() and scores() give them 16 bits, for the sake of the sums that they return.
KVC_INLINE bool is_narrow(int bits) { return bits == 4 || bits == 2; }

struct Pages {  // how to reach the slots of a call's rows
  const KvcRows* rows;
  const KvcTail* tail;
  int kv_heads, position_field;
  bool need_position;           // a window or exclusion looks at positions
  int64_t elt;

  int length(int row, int tier) const { return rows->length[tier][row]; }
  char* page(int row, int tier, int index) const {
    const int32_t id = rows->table[tier][row * rows->table_stride[tier] + index];
    const int32_t slab = id >> rows->slab_shift, inside = id & ((1 << rows->slab_shift) - 1);
    return reinterpret_cast<char*>(rows->slabs[slab]) + inside * rows->layout->page_bytes;
  }
};

KVC_INLINE void clear_next(Tile& t) {
  for (int b = 0; b < kBlocks; ++b) {
    const int from = b < t.blocks ? b : 0;
    t.next_keys[b] = t.keys[from];
    t.next_values[b] = t.values[from];
    t.next_key_params[b] = t.next_value_params[b] = t.keys[from];
  }
  t.next_param_bytes = 0;
}

// Marks the lanes past the last slot; positions of the others must be set.
KVC_INLINE void close_positions(Tile& t) {
  for (int i = t.n; i < t.blocks * 16; ++i) t.position[i] = kNowhere;
}

// Slots start .. start + n of a tier; start is a multiple of 16, n at most kTile.
static inline void packed_tile(Tile& t, const Pages& p, int row, int tier, int start, int n) {
  const KvcLayout& layout = *p.rows->layout;
  const KvcTier& f = layout.tier[tier];
  const int d = layout.head_dim;
  t.kind = f.key_bits ? kCodes : kNative;
  t.dtype = layout.dtype;
  t.row = row;
  t.tier = tier;
  t.key_bits = f.key_bits;
  t.value_bits = f.value_bits;
  t.rotated = f.rotate_keys;
  t.start = start;
  t.n = n;
  t.blocks = (n + 15) / 16;
  t.param_bytes = 2 * f.slots;
  t.field_bytes = 4 * f.slots;
  t.value_stride = d;
  const int64_t key_block = f.key_bits ? 2 * d * f.key_bits : 16 * d * p.elt;
  const int64_t value_block = f.key_bits ? 2 * d * f.value_bits : 16 * d * p.elt;
  int index = start / f.slots, block = (start - index * f.slots) / 16;
  char* page = p.page(row, tier, index);
  for (int b = 0; b < t.blocks; ++b) {
    if (block == f.slots / 16) {
      page = p.page(row, tier, ++index);
      block = 0;
    }
    const uint8_t* u = reinterpret_cast<const uint8_t*>(page);
    t.keys[b] = u + f.keys + block * key_block;
    t.values[b] = u + f.values + block * value_block;
    t.key_params[b] = u + f.key_params + 32 * block;
    t.value_params[b] = u + f.value_params + 32 * block;
    t.fields[b] = page + f.fields + 64 * block;
    ++block;
  }
  clear_next(t);
  const bool positions = p.need_position && p.position_field >= 0;
  t.masked = positions || n % 16;
}
// The part that reads page memory, left until the tile is about to be used (its lines were prefetched meanwhile).
static inline void open_tile(Tile& t, const Pages& p) {
  if (t.masked && t.tier < p.rows->layout->n_tiers) {
    if (p.need_position && p.position_field >= 0)
      for (int b = 0; b < t.blocks; ++b) memcpy(t.position + 16 * b, t.fields[b] + p.position_field * t.field_bytes, 64);
    else
      for (int i = 0; i < t.n; ++i) t.position[i] = kOldest;
    close_positions(t);
  }
}
KVC_INLINE void load_value_params(const Tile& t, int b, int i, vf& scale, vf& offset) {
  scale = from_f16(t.value_params[b] + 2 * i);
  offset = from_f16(t.value_params[b] + t.param_bytes + 2 * i);
  if (16 * b + i + kLanes > t.n)  // past the end lies garbage, perhaps NaN
    for (int e = 0; e < kLanes; ++e)
      if (16 * b + i + e >= t.n) scale[e] = offset[e] = 0.f;
}
static inline void load_narrow_value_params(Tile& t) {
  const vf middle = all((float)(1 << (t.value_bits - 1)));
  for (int b = 0; b < t.blocks; ++b)
    for (int i = 0; i < 16; i += kLanes) {
      vf scale, offset;
      load_value_params(t, b, i, scale, offset);
      store(t.weight + 16 * b + i, scale);
      store(t.value_offset + 16 * b + i, scale * middle + offset);
      store(t.log_scale + 16 * b + i, max(rough_log2(scale), all(kLeastLogScale)));
    }
}
static inline void load_value_params(Tile& t) {
  if (is_narrow(t.value_bits)) return load_narrow_value_params(t);
  vf largest = vf{};
  for (int b = 0; b < t.blocks; ++b)
    for (int i = 0; i < 16; i += kLanes) {
      const int at = 16 * b + i;
      vf scale, offset;
      load_value_params(t, b, i, scale, offset);
      store(t.weight + at, scale);
      store(t.value_offset + at, offset);
      largest = max(largest, scale);
    }
  const float peak = reduce_max(largest);
  t.weight_step = peak / kWeightLimit;
  const vf unit = all(peak > 0.f ? kWeightLimit / peak : 0.f);
  for (int i = 0; i < 16 * t.blocks; i += kLanes) store(t.weight + i, load(t.weight + i) * unit);
}

// Slots of the tail, keys row-major.
static inline void tail_tile(Tile& t, const Pages& p, int row, int start, int n) {
  const KvcLayout& layout = *p.rows->layout;
  const KvcTail& tail = *p.tail;
  const int64_t batch = row / p.kv_heads, d = layout.head_dim, first = row * tail.capacity + start;
  t.kind = kRows;
  t.dtype = layout.dtype;
  t.row = row;
  t.tier = layout.n_tiers;
  t.key_bits = t.value_bits = 0;
  t.rotated = false;
  t.start = start;
  t.n = n;
  t.blocks = (n + 15) / 16;
  t.value_stride = d;
  for (int b = 0; b < t.blocks; ++b) {
    const int64_t at = (first + 16 * b) * d * p.elt;
    t.keys[b] = static_cast<const uint8_t*>(tail.k) + at;
    t.values[b] = static_cast<const uint8_t*>(tail.v) + at;
    t.fields[b] = static_cast<char*>(tail.fields) + (first + 16 * b) * 4;
  }
  t.field_bytes = (int64_t)p.rows->rows * tail.capacity * 4;
  clear_next(t);
  t.masked = p.need_position || n % 16;
  if (t.masked) {
    memcpy(t.position, tail.position + batch * tail.capacity + start, 4 * n);
    close_positions(t);
  }
}

// Makes `t` prefetch the tile that follows it.
static inline void look_ahead(Tile& t, const Tile& ahead, const Pages& pages) {
  for (int b = 0; b < ahead.blocks; ++b) {
    t.next_keys[b] = ahead.keys[b];
    t.next_values[b] = ahead.values[b];
    if (ahead.kind == kCodes) {
      t.next_key_params[b] = ahead.key_params[b];
      t.next_value_params[b] = ahead.value_params[b];
      t.next_param_bytes = ahead.param_bytes;
    }
    if (pages.need_position && pages.position_field >= 0 && ahead.tier < pages.rows->layout->n_tiers)
      prefetch(ahead.fields[b] + pages.position_field * ahead.field_bytes);
  }
}

// ---- query rows ------------------------------------------------------------------------------------------------
struct Queries {  // up to kHeads query rows of one KV head, in every form that the row's tiers ask for
  int count;
  alignas(64) float q[kHeads][KVC_MAX_HEAD_DIM];
  alignas(64) int32_t pairs[kHeads][KVC_MAX_HEAD_DIM / 2];  // two bf16 dims per lane
  bool narrow;                                              // rotated queries are `bytes`, not words[1]
  Words words[2];                                           // codes; [1]: Hadamard-rotated
  Bytes bytes;                                              // Hadamard-rotated
#if KVC_ISA_avx512
  Words mixed;                                              // plain; see mix_queries()
  int32_t order[kMaxQuads], one_byte;                       // quads, those of one byte first; and how many those are
#endif
  // Plain, rotated, mixed: logit = step * scale * dot + sum * offset.
  float step[3][kHeads], sum[3][kHeads];
};
struct Softmax {  // running state of the same rows
  float m[kHeads], l[kHeads], z[kHeads];  // maximum; sums of p, and of p * value offset
  float alpha[kHeads], step[kHeads];      // o = o * alpha + product of the tile * step
  alignas(64) float o[kHeads][KVC_MAX_HEAD_DIM];
};
struct Scratch {
  alignas(64) float s[kHeads][kTile];
  Words weights;
  Bytes bytes;
};
struct Visible {  // what one query row may see: first < position <= last, and more for new keys
  int32_t first, last;
  const uint8_t* allowed;  // by slot, or null
  const float* bias;       // by slot, or null
};
struct Logits {  // how dot products become base-2 logits
  float scale;   // scale * log2(e)
  float cap_in, cap_out;  // soft-cap; cap_out 0 = none
};
static inline Logits logits_of(float scale, float softcap) {
  return {scale * kLog2e, softcap > 0 ? 2.f / softcap : 0.f, softcap > 0 ? softcap * kLog2e : 0.f};
}

static inline void clear(Softmax& s, int count, int d) {
  for (int h = 0; h < count; ++h) {
    s.m[h] = kFloor;
    s.l[h] = s.z[h] = 0.f;
    memset(s.o[h], 0, d * sizeof(float));
  }
}

static inline void quantise_query(Queries& q, bool rotated, bool narrow, int h, const float* x, int d, float scale) {
  vf largest = vf{};
  for (int i = 0; i < d; i += kLanes) largest = max(largest, max(load(x + i), -load(x + i)));
  const float peak = reduce_max(largest), limit = narrow ? kKeyByteLimit : kWeightLimit;
  const float inverse = peak > 1e-30f ? limit / peak : 0.f, step = peak / limit;
  vf sum = vf{};
  for (int i = 0; i < d; i += kLanes) {
    const vf y = load(x + i) * all(inverse);
    sum = sum + (narrow ? put_signed(q.bytes, h, i, y) : put(q.words[rotated], h, i, y));
  }
  q.step[rotated][h] = step * scale;
  q.sum[rotated][h] = reduce_add(sum) * step * scale;
}

struct Forms {  // which forms of a query the layout's tiers need; narrow: in 8 bits for keys of 4 and 2 bits
  bool plain, rotated, mixed, narrow;
};
// Whether queries of 8-bit keys are mixed, where queries may be narrow at all.
KVC_INLINE bool is_mixed(int key_bits, int value_bits) {
  return KVC_WIDTH == 64 && key_bits == 8 && is_narrow(value_bits);
}
static inline Forms forms_of(const KvcRows& rows, bool narrow) {
  Forms f = {false, false, false, narrow};
  for (int t = 0; t < rows.layout->n_tiers; ++t) {
    const KvcTier& tier = rows.layout->tier[t];
    int row = 0;
    while (row < rows.rows && rows.length[t][row] <= 0) ++row;
    if (!tier.key_bits || row == rows.rows) continue;  // nobody asks for it
    if (tier.rotate_keys) f.rotated = true;
    else if (narrow && is_mixed(tier.key_bits, tier.value_bits)) f.mixed = true;
    else f.plain = true;
  }
  return f;
}

#if KVC_ISA_avx512
// Queries of 8-bit keys whose values have 4 or 2 bits, all rows at once: most quads of dims in one byte, an eighth of
// them, where the outliers are, in two of the same unit. Logits are then off by about as much as the keys' codes make
// them, and by far less than the values' codes are.
static inline void mix_queries(Queries& q, int d, float scale) {
  const int quads = d / 4, two_bytes = (quads + 7) / 8;
  alignas(64) float peak[kHeads][kMaxQuads];
  alignas(64) float worst[kMaxQuads] = {};  // over the rows, each relative to its own mean
  float total[kHeads];
  for (int h = 0; h < q.count; ++h) {
    vf sum = vf{};
    for (int i = 0; i < d; i += kLanes) {
      vf x = _mm512_abs_ps(load(q.q[h] + i));
      sum = sum + x;
      x = max(x, _mm512_permute_ps(x, 0xb1));
      x = max(x, _mm512_permute_ps(x, 0x4e));
      _mm_store_ps(peak[h] + i / 4, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, x)));
    }
    total[h] = reduce_add(sum);
    const __m128 inverse = _mm_set1_ps(total[h] > 1e-30f ? 1.f / total[h] : 0.f);
    for (int i = 0; i < quads; i += 4)
      _mm_store_ps(worst + i, _mm_max_ps(_mm_mul_ps(_mm_load_ps(peak[h] + i), inverse), _mm_load_ps(worst + i)));
  }
  // The largest are found as integers, with the quad's number in the lowest bits.
  const vi number = (vi)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  vi rank[kMaxQuads / kLanes];
  const int vectors = (quads + kLanes - 1) / kLanes;
  for (int i = 0; i < vectors; ++i) {
    const vi at = number + i * kLanes;
    rank[i] = at < quads ? (load_int(worst + i * kLanes) & ~63) | at : all(-1);
  }
  uint64_t wide = 0;
  for (int n = 0; n < two_bytes; ++n) {
    vi most = rank[0];
    for (int i = 1; i < vectors; ++i) most = (vi)_mm512_max_epi32((__m512i)most, (__m512i)rank[i]);
    const vi largest = all(_mm512_reduce_max_epi32((__m512i)most));
    for (int i = 0; i < vectors; ++i) rank[i] = rank[i] == largest ? all(-1) : rank[i];
    wide |= uint64_t(1) << (largest[0] & 63);
  }
  q.one_byte = quads - two_bytes;
  for (int i = 0, narrow = 0, rest = q.one_byte; i < quads; ++i) q.order[wide >> i & 1 ? rest++ : narrow++] = i;
  for (int h = 0; h < q.count; ++h) {
    float narrow_peak = 0.f, wide_peak = 0.f;
    for (int i = 0; i < q.one_byte; ++i) narrow_peak = __builtin_fmaxf(narrow_peak, peak[h][q.order[i]]);
    for (int i = q.one_byte; i < quads; ++i) wide_peak = __builtin_fmaxf(wide_peak, peak[h][q.order[i]]);
    const float a = narrow_peak / kKeyByteLimit, b = wide_peak / kWeightLimit;
    const float step = (a > b ? a : b) + 0.f * total[h];  // NaN stays NaN
    const float inverse = step > 1e-32f ? 1.f / step : 0.f;
    vf sum = vf{};
    for (int i = 0; i < d; i += kLanes) sum = sum + put(q.mixed, h, i, load(q.q[h] + i) * all(inverse));
    q.step[2][h] = step * scale;
    q.sum[2][h] = reduce_add(sum) * step * scale;
  }
}
#endif

// One query row at element `at` of p, native dtype.
static inline void set_query(Queries& q, int h, const void* p, int64_t at, const KvcLayout& layout, Forms forms,
                             const Logits& logits) {
  const int d = layout.head_dim;
  load_floats(q.q[h], p, at, d, layout.dtype);
#if KVC_ISA_avx512
  if (layout.dtype == KVC_BF16) memcpy(q.pairs[h], static_cast<const char*>(p) + 2 * at, 2 * d);
#endif
  q.narrow = forms.narrow;
  if (forms.plain) quantise_query(q, false, false, h, q.q[h], d, logits.scale);
  if (forms.rotated) {
    alignas(64) float r[KVC_MAX_HEAD_DIM];
    memcpy(r, q.q[h], d * sizeof(float));
    hadamard(r, d, layout.rotation_block);
    quantise_query(q, true, forms.narrow, h, r, d, logits.scale);
  }
}

// ---- logits ----------------------------------------------------------------------------------------------------
// Logits of NB blocks from their dot products, a Dot or ByteDot per block and row of q.
template <int G, int NB, class D>
KVC_INLINE void store_logits(const Tile& t, const Queries& q, int form, int b0, int part, const D (&sum)[NB][G],
                             float (*s)[kTile]) {
  KVC_UNROLL for (int b = 0; b < NB; ++b) {
    const uint8_t* params = t.key_params[b0 + b] + 2 * kLanes * part;
    const vf scale = from_f16(params), offset = from_f16(params + t.param_bytes);
    KVC_UNROLL for (int h = 0; h < G; ++h)
      store(s[h] + 16 * (b0 + b) + kLanes * part,
            value(sum[b][h]) * (scale * all(q.step[form][h])) + offset * all(q.sum[form][h]));
  }
}
template <int NB>
KVC_INLINE void prefetch_key_params(const Tile& t, int b0) {
  for (int b = 0; b < NB; ++b) {  // a few lines at a time: many at once would wait for each other
    prefetch(t.next_key_params[b0 + b]);
    prefetch(t.next_key_params[b0 + b] + t.next_param_bytes);
  }
}

template <int BITS, int G, int NB>
KVC_INLINE void byte_logits(const Tile& t, const Queries& q, int b0, int d, float (*s)[kTile]) {
  constexpr int kPer = 8 / BITS, kRun = 8 / kPer;  // vectors between two settle()
  const int n = d / (4 * kPer);
  prefetch_key_params<NB>(t, b0);
  for (int part = 0; part < kParts; ++part) {
    ByteDot sum[NB][G];
    KVC_UNROLL for (int b = 0; b < NB; ++b) KVC_UNROLL for (int h = 0; h < G; ++h) sum[b][h] = byte_dot_zero();
    for (int run = 0; run < n; run += kRun) {
      for (int i = run; i < run + kRun && i < n; ++i) {
        const int64_t at = 64 * i + part * KVC_WIDTH;
        Raw x[NB];
        KVC_UNROLL for (int b = 0; b < NB; ++b) {
          if (part == 0) prefetch(t.next_keys[b0 + b] + at);
          x[b] = load_raw(t.keys[b0 + b] + at);
        }
        KVC_UNROLL for (int j = 0; j < kPer; ++j) {
          KVC_UNROLL for (int b = 0; b < NB; ++b) {
            const auto c = byte_codes<BITS>(x[b], j);
            KVC_UNROLL for (int h = 0; h < G; ++h) dot_key(sum[b][h], c, byte_weights(q.bytes, h, i * kPer + j));
          }
        }
      }
      KVC_UNROLL for (int b = 0; b < NB; ++b) KVC_UNROLL for (int h = 0; h < G; ++h) settle(sum[b][h]);
    }
    store_logits<G, NB>(t, q, t.rotated, b0, part, sum, s);
  }
}

template <int BITS, int G, int NB>
KVC_INLINE void word_logits(const Tile& t, const Queries& q, int b0, int d, float (*s)[kTile]) {
  constexpr int kPer = 8 / BITS;
  const Words& w = q.words[t.rotated];
  const int n = d / (4 * kPer);
  prefetch_key_params<NB>(t, b0);
  for (int part = 0; part < kParts; ++part) {
    Dot sum[NB][G];
    KVC_UNROLL for (int b = 0; b < NB; ++b) KVC_UNROLL for (int h = 0; h < G; ++h) sum[b][h] = dot_zero();
    for (int i = 0; i < n; ++i) {
      KVC_UNROLL for (int b = 0; b < NB; ++b) {
        const int64_t at = 64 * i + part * KVC_WIDTH;
        if (part == 0) prefetch(t.next_keys[b0 + b] + at);
        const Raw x = load_raw(t.keys[b0 + b] + at);
        KVC_UNROLL for (int j = 0; j < kPer; ++j) {
          const Codes c = codes<BITS>(x, j);
          KVC_UNROLL for (int h = 0; h < G; ++h) dot(sum[b][h], c, w, h, i * kPer + j);
        }
      }
    }
    store_logits<G, NB>(t, q, t.rotated, b0, part, sum, s);
  }
}

#if KVC_ISA_avx512
template <int G, int NB>
KVC_INLINE void mixed_logits(const Tile& t, const Queries& q, int b0, int d, float (*s)[kTile]) {
  const int n = d / 4;
  prefetch_key_params<NB>(t, b0);
  Dot sum[NB][G];
  KVC_UNROLL for (int b = 0; b < NB; ++b) KVC_UNROLL for (int h = 0; h < G; ++h) sum[b][h] = dot_zero();
  int i = 0;
  for (; i < q.one_byte; ++i) {
    const int quad = q.order[i];
    KVC_UNROLL for (int b = 0; b < NB; ++b) {
      prefetch(t.next_keys[b0 + b] + 64 * i);
      const Raw x = load_raw(t.keys[b0 + b] + 64 * quad);
      KVC_UNROLL for (int h = 0; h < G; ++h) dpbusd(sum[b][h].low, x, _mm512_set1_epi32(q.mixed.low[h][quad]));
    }
  }
  for (; i < n; ++i) {
    const int quad = q.order[i];
    KVC_UNROLL for (int b = 0; b < NB; ++b) {
      prefetch(t.next_keys[b0 + b] + 64 * i);
      const Raw x = load_raw(t.keys[b0 + b] + 64 * quad);
      KVC_UNROLL for (int h = 0; h < G; ++h) dot(sum[b][h], x, q.mixed, h, quad);
    }
  }
  store_logits<G, NB>(t, q, 2, b0, 0, sum, s);
}
#endif

template <int DTYPE, int G, int NB>
KVC_INLINE void native_logits(const Tile& t, const Queries& q, int b0, int d, float scale, float (*s)[kTile]) {
  for (int part = 0; part < kParts; ++part) {
    vf sum[NB][G];
    KVC_UNROLL for (int b = 0; b < NB; ++b) KVC_UNROLL for (int h = 0; h < G; ++h) sum[b][h] = vf{};
    const int n = DTYPE == KVC_F32 ? d : d / 2;  // 64-byte vectors of a block
    for (int i = 0; i < n; ++i) {
      KVC_UNROLL for (int b = 0; b < NB; ++b) {
        const int64_t at = 64 * i + part * KVC_WIDTH;
        if (part == 0) prefetch(t.next_keys[b0 + b] + at);
        const uint8_t* p = t.keys[b0 + b] + at;
        if (DTYPE == KVC_F32) {
          const vf k = load(p);
          KVC_UNROLL for (int h = 0; h < G; ++h) sum[b][h] = k * all(q.q[h][i]) + sum[b][h];
        } else {
          const vu pair = (vu)load_int(p);
#if KVC_ISA_avx512
          if (DTYPE == KVC_BF16) {
            KVC_UNROLL for (int h = 0; h < G; ++h)
              sum[b][h] = _mm512_dpbf16_ps(sum[b][h], (__m512bh)pair, (__m512bh)_mm512_set1_epi32(q.pairs[h][i]));
            continue;
          }
#endif
          const vf k0 = DTYPE == KVC_BF16 ? (vf)(pair << 16) : from_f16_bits(pair & 0xffffu);
          const vf k1 = DTYPE == KVC_BF16 ? (vf)(pair & 0xffff0000u) : from_f16_bits(pair >> 16);
          KVC_UNROLL for (int h = 0; h < G; ++h)
            sum[b][h] = k1 * all(q.q[h][2 * i + 1]) + (k0 * all(q.q[h][2 * i]) + sum[b][h]);
        }
      }
    }
    KVC_UNROLL for (int b = 0; b < NB; ++b) KVC_UNROLL for (int h = 0; h < G; ++h)
      store(s[h] + 16 * (b0 + b) + kLanes * part, sum[b][h] * all(scale));
  }
}

// Row-major keys, four slots at a time.
template <int DTYPE, int G>
KVC_INLINE void row_logits(const Tile& t, const Queries& q, int d, float scale, float (*s)[kTile]) {
  for (int i = 0; i < t.n; i += 4) {
    const uint8_t* p[4];
    KVC_UNROLL for (int r = 0; r < 4; ++r) {
      const int slot = i + r < t.n ? i + r : t.n - 1;  // lanes past the end are masked later
      p[r] = t.keys[slot / 16] + (slot % 16) * d * (DTYPE == KVC_F32 ? 4 : 2);
    }
    vf sum[G][4];
    KVC_UNROLL for (int h = 0; h < G; ++h) KVC_UNROLL for (int r = 0; r < 4; ++r) sum[h][r] = vf{};
#if KVC_ISA_avx512
    if (DTYPE == KVC_BF16) {
      for (int j = 0; j < d; j += 32) {
        const __mmask16 mask = j + 32 <= d ? 0xffff : 0xff;  // perhaps 16 dims are left
        __m512bh k[4];
        KVC_UNROLL for (int r = 0; r < 4; ++r) k[r] = (__m512bh)_mm512_maskz_loadu_epi32(mask, p[r] + 2 * j);
        KVC_UNROLL for (int h = 0; h < G; ++h) {
          const __m512bh x = (__m512bh)_mm512_maskz_loadu_epi32(mask, q.pairs[h] + j / 2);
          KVC_UNROLL for (int r = 0; r < 4; ++r) sum[h][r] = _mm512_dpbf16_ps(sum[h][r], k[r], x);
        }
      }
    } else
#endif
      for (int j = 0; j < d; j += kLanes) {
        vf k[4];
        KVC_UNROLL for (int r = 0; r < 4; ++r) k[r] = load_native<DTYPE>(p[r], j);
        KVC_UNROLL for (int h = 0; h < G; ++h) {
          const vf x = load(q.q[h] + j);
          KVC_UNROLL for (int r = 0; r < 4; ++r) sum[h][r] = k[r] * x + sum[h][r];
        }
      }
    KVC_UNROLL for (int h = 0; h < G; ++h) {
      float dots[4];
      reduce_add4(sum[h], dots);
      for (int r = 0; r < 4; ++r) s[h][i + r] = dots[r] * scale;
    }
  }
}

// Blocks of 16 slots that share one pass over the query, so that about eight sums are alive.
template <int G>
constexpr int blocks_at_once() {
  return G >= 3 ? 2 : 4;
}

template <int BITS, int G>
static void all_word_logits(const Tile& t, const Queries& q, int d, float (*s)[kTile]) {
  constexpr int kOnce = blocks_at_once<G>();
  int b = 0;
  for (; b + kOnce <= t.blocks; b += kOnce) word_logits<BITS, G, kOnce>(t, q, b, d, s);
  for (; b < t.blocks; ++b) word_logits<BITS, G, 1>(t, q, b, d, s);
}
template <int BITS, int G>
static void all_byte_logits(const Tile& t, const Queries& q, int d, float (*s)[kTile]) {
  constexpr int kOnce = KVC_WIDTH == 64 ? 4 : blocks_at_once<G>();
  int b = 0;
  for (; b + kOnce <= t.blocks; b += kOnce) byte_logits<BITS, G, kOnce>(t, q, b, d, s);
  for (; b < t.blocks; ++b) byte_logits<BITS, G, 1>(t, q, b, d, s);
}
#if KVC_ISA_avx512
template <int G>
static void all_mixed_logits(const Tile& t, const Queries& q, int d, float (*s)[kTile]) {
  constexpr int kOnce = blocks_at_once<G>();
  int b = 0;
  for (; b + kOnce <= t.blocks; b += kOnce) mixed_logits<G, kOnce>(t, q, b, d, s);
  for (; b < t.blocks; ++b) mixed_logits<G, 1>(t, q, b, d, s);
}
#endif
template <int DTYPE, int G>
static void all_native_logits(const Tile& t, const Queries& q, int d, float scale, float (*s)[kTile]) {
  constexpr int kOnce = blocks_at_once<G>();
  if (t.kind == kRows) {
    row_logits<DTYPE, G>(t, q, d, scale, s);
    return;
  }
  int b = 0;
  for (; b + kOnce <= t.blocks; b += kOnce) native_logits<DTYPE, G, kOnce>(t, q, b, d, scale, s);
  for (; b < t.blocks; ++b) native_logits<DTYPE, G, 1>(t, q, b, d, scale, s);
}

template <int G>
static void tile_logits(const Tile& t, const Queries& q, const KvcLayout& layout, float scale, float (*s)[kTile]) {
  const int d = layout.head_dim;
  if (t.kind == kCodes) {
    const bool narrow = q.narrow && t.rotated;
#if KVC_ISA_avx512
    if (q.narrow && is_mixed(t.key_bits, t.value_bits)) return all_mixed_logits<G>(t, q, d, s);
#endif
    if (t.key_bits == 8) all_word_logits<8, G>(t, q, d, s);
    else if (t.key_bits == 4) narrow ? all_byte_logits<4, G>(t, q, d, s) : all_word_logits<4, G>(t, q, d, s);
    else narrow ? all_byte_logits<2, G>(t, q, d, s) : all_word_logits<2, G>(t, q, d, s);
  } else {
    if (layout.dtype == KVC_F32) all_native_logits<KVC_F32, G>(t, q, d, scale, s);
    else if (layout.dtype == KVC_F16) all_native_logits<KVC_F16, G>(t, q, d, scale, s);
    else all_native_logits<KVC_BF16, G>(t, q, d, scale, s);
  }
}

// Base-2 logits of a tile for all rows of q, before soft-cap and masks.
static inline void compute_logits(const Tile& t, const Queries& q, const KvcLayout& layout, const Logits& logits,
                                  float (*s)[kTile]) {
  switch (q.count) {
    case 1: return tile_logits<1>(t, q, layout, logits.scale, s);
    case 2: return tile_logits<2>(t, q, layout, logits.scale, s);
    case 3: return tile_logits<3>(t, q, layout, logits.scale, s);
    default: return tile_logits<4>(t, q, layout, logits.scale, s);
  }
}

// The first n lanes from memory, zeros after them.
KVC_INLINE vf load_first(const float* p, int n) {
  if (n >= kLanes) return load(p);
  alignas(64) float x[kLanes] = {};
  for (int e = 0; e < n; ++e) x[e] = p[e];
  return load(x);
}
KVC_INLINE vi load_flags(const uint8_t* p, int n) {
  typedef uint8_t flags __attribute__((vector_size(kLanes)));
  flags f = {};
  memcpy(&f, p, n >= kLanes ? kLanes : n > 0 ? n : 0);
  return __builtin_convertvector(f, vi);
}

// Soft-cap of base-2 logits: cap * tanh(y / cap), tanh(u) = 1 - 2 / (e^2u + 1).
KVC_INLINE vf capped(vf x, const Logits& logits) {
  const vf e = exp2(min(x * all(logits.cap_in), all(64.f)));
  return all(logits.cap_out) * (all(1.f) - all(2.f) / (e + all(1.f)));
}

// Soft-cap, bias and masks in place; returns the largest logit.
static inline float finish_logits(float* s, const Tile& t, const Logits& logits, const Visible& see) {
  vf largest = all(kMasked);
  const int n = 16 * t.blocks;
  for (int i = 0; i < n; i += kLanes) {
    vf x = load(s + i);
    if (logits.cap_out != 0.f) x = capped(x, logits);
    if (see.bias) x = x + load_first(see.bias + i, t.n - i) * all(kLog2e);
    if (t.masked) {
      const vi at = load_int(t.position + i);
      x = ((at > all(see.first)) & (at <= all(see.last))) ? x : all(kMasked);
    }
    if (see.allowed) x = load_flags(see.allowed + i, t.n - i) != 0 ? x : all(kMasked);
    store(s + i, x);
    largest = max(largest, x);
  }
  return reduce_max(largest);
}

// Whether finish_logits() would change nothing, whatever the query may see of past slots.
KVC_INLINE bool is_plain(const Tile& t, const Logits& logits) { return !t.masked && logits.cap_out == 0.f; }

// The largest logits of all rows of a plain tile.
static inline void plain_largest(const Tile& t, int count, const float (*s)[kTile], float* largest) {
  vf m[kHeads];
  KVC_UNROLL for (int h = 0; h < kHeads; ++h) m[h] = load(s[h < count ? h : 0]);
  for (int i = kLanes; i < 16 * t.blocks; i += kLanes)
    KVC_UNROLL for (int h = 0; h < kHeads; ++h) m[h] = max(m[h], load(s[h < count ? h : 0] + i));
  reduce_max4(m, largest);
}

// ---- softmax and values ----------------------------------------------------------------------------------------
// Logits become probabilities relative to the tile's own maximum `base`: floats in w.s for native values, words (times
// the value scale) for codes. Also their sums, and the part of the output that all dims share.
template <int G>
static void native_softmax(const Tile& t, bool pairs, const float* base, Scratch& w, float* sum) {
  vf l[kHeads] = {};
  for (int i = 0; i < 16 * t.blocks; i += kLanes)
    KVC_UNROLL for (int h = 0; h < G; ++h) {
      const vf p = exp2(load(w.s[h] + i) - all(base[h]));
      l[h] = l[h] + p;
      store(w.s[h] + i, p);
#if KVC_ISA_avx512
      if (pairs) {
        const __m256bh b = _mm512_cvtneps_pbh(p);
        memcpy(&w.weights.high[h][i / 2], &b, 32);
      }
#else
      (void)pairs;
#endif
    }
  reduce_add4(l, sum);
}
// Values of 4 and 2 bits: probabilities relative to 2^base, chosen so that the largest weight is close to, and not
// above, kValueByteLimit.
template <int G>
static void byte_softmax(const Tile& t, const float* base, Scratch& w, float* sum, float* shared) {
  vf l[kHeads] = {}, z[kHeads] = {};
  for (int i = 0; i < 16 * t.blocks; i += kLanes) {
    const vf scale = load(t.weight + i), offset = load(t.value_offset + i);
    KVC_UNROLL for (int h = 0; h < G; ++h) {
      const vf p = exp2(load(w.s[h] + i) - all(base[h]));
      l[h] = l[h] + p;
      z[h] = p * offset + z[h];
      put_unsigned(w.bytes, h, i, p * scale);
    }
  }
  reduce_add4(l, sum);
  reduce_add4(z, shared);
}
// Log2 of the largest weight of every row, 0.09 too small at most.
template <int G>
KVC_INLINE void largest_weights(const Tile& t, const Scratch& w, float* largest) {
  vf m[kHeads] = {};
  KVC_UNROLL for (int h = 0; h < G; ++h) m[h] = all(kMasked);
  for (int i = 0; i < 16 * t.blocks; i += kLanes) {
    const vf scale = load(t.log_scale + i);
    KVC_UNROLL for (int h = 0; h < G; ++h) m[h] = max(m[h], load(w.s[h] + i) + scale);
  }
  reduce_max4(m, largest);
}
template <int G>
static void word_softmax(const Tile& t, const float* base, Scratch& w, float* sum, float* shared) {
  vf l[kHeads] = {}, z[kHeads] = {}, lost[kHeads] = {};
  for (int i = 0; i < 16 * t.blocks; i += kLanes) {
    const vf scale = load(t.weight + i), offset = load(t.value_offset + i);
    KVC_UNROLL for (int h = 0; h < G; ++h) {
      const vf p = exp2(load(w.s[h] + i) - all(base[h]));
      const vf x = p * scale;
      l[h] = l[h] + p;
      z[h] = p * offset + z[h];
      lost[h] = lost[h] + (x - put(w.weights, h, i, x));
    }
  }
  // Weights rounded down to nothing would lose their share of the values' mean, as codes are not negative: what
  // rounding took away is given back times the middle code.
  const vf middle = all(((1 << t.value_bits) - 1) * 0.5f * t.weight_step);
  KVC_UNROLL for (int h = 0; h < G; ++h) z[h] = lost[h] * middle + z[h];
  reduce_add4(l, sum);
  reduce_add4(z, shared);
}

// Takes a tile's logits (w.s, with their largest, of no use where is_narrow(value_bits)) into the running state. Returns whether probabilities are pairs of
// bf16 in w.weights (only for bf16 values). Each is then off by up to 0.2 %, which in tiles where none is above an
// eighth of the sum so far changes the output by less than a third of what rounding it to bf16 does.
template <int G>
static bool softmax_of(const Tile& t, Softmax& r, const float* largest, Scratch& w) {
  alignas(64) float change[2 * kHeads < kLanes ? kLanes : 2 * kHeads] = {};  // to alpha, then beta
  float base[kHeads];
  const bool narrow = is_narrow(t.value_bits);
  if (narrow) largest_weights<G>(t, w, base);
  KVC_UNROLL for (int h = 0; h < G; ++h) {
    base[h] = narrow ? base[h] - kByteHeadroom : largest[h];
    base[h] = base[h] > kFloor ? base[h] : kFloor;
    const float m = base[h] > r.m[h] ? base[h] : r.m[h];
    change[h] = r.m[h] - m;
    change[kHeads + h] = base[h] - m;
    r.m[h] = m;
  }
  for (int i = 0; i < 2 * kHeads; i += kLanes) store(change + i, exp2(load(change + i)));
  const float *alpha = change, *beta = change + kHeads;
  bool pairs = KVC_WIDTH == 64 && t.value_bits == 0 && t.dtype == KVC_BF16 && t.n % 2 == 0;
  KVC_UNROLL for (int h = 0; h < G; ++h) pairs &= beta[h] * 8.f <= r.l[h] * alpha[h];
  float sum[kHeads], shared[kHeads] = {};
  if (t.value_bits == 0) native_softmax<G>(t, pairs, base, w, sum);
  else if (narrow) byte_softmax<G>(t, base, w, sum, shared);
  else word_softmax<G>(t, base, w, sum, shared);
  const float unit = t.value_bits == 8 ? t.weight_step : 1.f;
  KVC_UNROLL for (int h = 0; h < G; ++h) {
    r.l[h] = r.l[h] * alpha[h] + sum[h] * beta[h];
    r.z[h] = r.z[h] * alpha[h] + shared[h] * beta[h];
    r.alpha[h] = alpha[h];
    r.step[h] = unit * beta[h];
  }
  return pairs;
}
static inline bool softmax(const Tile& t, Softmax& r, int count, const float* largest, Scratch& w) {
  switch (count) {
    case 1: return softmax_of<1>(t, r, largest, w);
    case 2: return softmax_of<2>(t, r, largest, w);
    case 3: return softmax_of<3>(t, r, largest, w);
    default: return softmax_of<4>(t, r, largest, w);
  }
}

// Adds the dot products of a tile, a Dot or ByteDot per row and vector of dims, to the output.
template <int G, int NV, class D>
KVC_INLINE void add_dots(Softmax& r, int v0, const D (&sum)[G][NV]) {
  KVC_UNROLL for (int h = 0; h < G; ++h) KVC_UNROLL for (int v = 0; v < NV; ++v) {
    float* o = r.o[h] + (v0 + v) * kLanes;
    store(o, value(sum[h][v]) * all(r.step[h]) + load(o) * all(r.alpha[h]));
  }
}
KVC_INLINE void prefetch_value_params(const Tile& t, int b) {
  prefetch(t.next_value_params[b]);
  prefetch(t.next_value_params[b] + t.next_param_bytes);
}

// Values of 4 and 2 bits.
template <int BITS, int G, int NV>
KVC_INLINE void byte_values(const Tile& t, const Scratch& w, Softmax& r, int v0, int d) {
  constexpr int kPer = 8 / BITS, kGroups = 4 / kPer;  // 64-byte vectors per 16 slots and 16 dims
  ByteDot sum[G][NV];
  KVC_UNROLL for (int h = 0; h < G; ++h) KVC_UNROLL for (int v = 0; v < NV; ++v) sum[h][v] = byte_dot_zero();
  for (int b = 0; b < t.blocks; ++b) {
    if (v0 == 0) prefetch_value_params(t, b);
    const uint8_t *p = t.values[b] + v0 * KVC_WIDTH, *next = t.next_values[b] + v0 * KVC_WIDTH;
    KVC_UNROLL for (int g = 0; g < kGroups; ++g) {
      Raw x[NV];
      KVC_UNROLL for (int v = 0; v < NV; ++v) {
        x[v] = load_raw(p + (int64_t)g * d * 4 + v * KVC_WIDTH);
        if (v % kParts == 0) prefetch(next + (int64_t)g * d * 4 + v * KVC_WIDTH);
      }
      KVC_UNROLL for (int j = 0; j < kPer; ++j) {
        KVC_UNROLL for (int v = 0; v < NV; ++v) {
          const auto c = signed_codes<BITS>(x[v], j);
          KVC_UNROLL for (int h = 0; h < G; ++h)
            dot_value(sum[h][v], c, byte_weights(w.bytes, h, b * 4 + g * kPer + j));
        }
      }
    }
    KVC_UNROLL for (int h = 0; h < G; ++h) KVC_UNROLL for (int v = 0; v < NV; ++v) settle(sum[h][v]);
  }
  add_dots<G, NV>(r, v0, sum);
}

// Values of 8 bits.
template <int G, int NV>
KVC_INLINE void word_values(const Tile& t, const Scratch& w, Softmax& r, int v0, int d) {
  Dot sum[G][NV];
  KVC_UNROLL for (int h = 0; h < G; ++h) KVC_UNROLL for (int v = 0; v < NV; ++v) sum[h][v] = dot_zero();
  for (int b = 0; b < t.blocks; ++b) {
    if (v0 == 0) prefetch_value_params(t, b);
    const uint8_t *p = t.values[b] + v0 * KVC_WIDTH, *next = t.next_values[b] + v0 * KVC_WIDTH;
    KVC_UNROLL for (int g = 0; g < 4; ++g) {
      KVC_UNROLL for (int v = 0; v < NV; ++v) {
        if (v % kParts == 0) prefetch(next + (int64_t)g * d * 4 + v * KVC_WIDTH);
        const Codes c = codes<8>(load_raw(p + (int64_t)g * d * 4 + v * KVC_WIDTH), 0);
        KVC_UNROLL for (int h = 0; h < G; ++h) dot(sum[h][v], c, w.weights, h, b * 4 + g);
      }
    }
  }
  add_dots<G, NV>(r, v0, sum);
}

template <int DTYPE, int G, int NV>
KVC_INLINE void native_values(const Tile& t, const Scratch& w, Softmax& r, int v0) {
  constexpr int kElt = DTYPE == KVC_F32 ? 4 : 2;
  vf sum[G][NV];
  KVC_UNROLL for (int h = 0; h < G; ++h) KVC_UNROLL for (int v = 0; v < NV; ++v) sum[h][v] = vf{};
  for (int b = 0; b < t.blocks; ++b) {
    const uint8_t* p = t.values[b] + (int64_t)v0 * kLanes * kElt;
    const uint8_t* next = t.next_values[b] + (int64_t)v0 * kLanes * kElt;
    const int n = min_int(16, t.n - 16 * b);
    const int64_t stride = t.value_stride * kElt;
    for (int i = 0; i < n; ++i) {
      KVC_UNROLL for (int v = 0; v < NV; ++v) {
        if (v * kLanes * kElt % 64 == 0) prefetch(next + i * stride + v * kLanes * kElt);
        const vf x = load_native<DTYPE>(p + i * stride, v * kLanes);
        KVC_UNROLL for (int h = 0; h < G; ++h) sum[h][v] = x * all(w.s[h][16 * b + i]) + sum[h][v];
      }
    }
  }
  KVC_UNROLL for (int h = 0; h < G; ++h) KVC_UNROLL for (int v = 0; v < NV; ++v) {
    float* o = r.o[h] + (v0 + v) * kLanes;
    store(o, sum[h][v] * all(r.step[h]) + load(o) * all(r.alpha[h]));
  }
}

#if KVC_ISA_avx512
// The same with pairs of bf16 probabilities, two slots and 32 dims at a time, from v0 * 32 on.
template <int G, int NV>
KVC_INLINE void pair_values(const Tile& t, const Scratch& w, Softmax& r, int v0) {
  vf sum[G][NV][2];
  KVC_UNROLL for (int h = 0; h < G; ++h) KVC_UNROLL for (int v = 0; v < NV; ++v) sum[h][v][0] = sum[h][v][1] = vf{};
  const int64_t stride = t.value_stride * 2;
  for (int b = 0; b < t.blocks; ++b) {
    const uint8_t *p = t.values[b] + v0 * 64, *next = t.next_values[b] + v0 * 64;
    const int n = min_int(16, t.n - 16 * b);
    for (int i = 0; i < n; i += 2, p += 2 * stride, next += 2 * stride) {
      KVC_UNROLL for (int v = 0; v < NV; ++v) {
        prefetch(next + 64 * v);
        prefetch(next + stride + 64 * v);
        const __m512i x = _mm512_loadu_si512(p + 64 * v), y = _mm512_loadu_si512(p + stride + 64 * v);
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(x, y), high = (__m512bh)_mm512_unpackhi_epi16(x, y);
        KVC_UNROLL for (int h = 0; h < G; ++h) {
          const __m512bh weight = (__m512bh)_mm512_set1_epi32(w.weights.high[h][8 * b + i / 2]);
          sum[h][v][0] = _mm512_dpbf16_ps(sum[h][v][0], low, weight);
          sum[h][v][1] = _mm512_dpbf16_ps(sum[h][v][1], high, weight);
        }
      }
    }
  }
  // Lane 4 * i + j of `low` and `high` are dims 8 * i + j and 8 * i + 4 + j.
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  KVC_UNROLL for (int h = 0; h < G; ++h) KVC_UNROLL for (int v = 0; v < NV; ++v) {
    float* o = r.o[h] + (v0 + v) * 32;
    const vf a = _mm512_permutex2var_ps(sum[h][v][0], first, sum[h][v][1]);
    const vf b = _mm512_permutex2var_ps(sum[h][v][0], second, sum[h][v][1]);
    store(o, a * all(r.step[h]) + load(o) * all(r.alpha[h]));
    store(o + 16, b * all(r.step[h]) + load(o + 16) * all(r.alpha[h]));
  }
}
template <int G>
static void all_pair_values(const Tile& t, const Scratch& w, Softmax& r, int d) {
  int v = 0;
  for (; v + 2 <= d / 32; v += 2) pair_values<G, 2>(t, w, r, v);
  if (v < d / 32) pair_values<G, 1>(t, w, r, v);
  if (d % 32) native_values<KVC_BF16, G, 1>(t, w, r, d / 16 - 1);
}
#endif

template <int BITS, int G>
static void all_code_values(const Tile& t, const Scratch& w, Softmax& r, int d) {
  constexpr int kOnce = G < 3 || (BITS < 8 && KVC_WIDTH == 64) ? 4 : 2;
  const int n = d / kLanes;
  int v = 0;
  for (; v + kOnce <= n; v += kOnce) {
    if constexpr (BITS == 8) word_values<G, kOnce>(t, w, r, v, d);
    else byte_values<BITS, G, kOnce>(t, w, r, v, d);
  }
  for (; v < n; ++v) {
    if constexpr (BITS == 8) word_values<G, 1>(t, w, r, v, d);
    else byte_values<BITS, G, 1>(t, w, r, v, d);
  }
}
template <int DTYPE, int G>
static void all_native_values(const Tile& t, const Scratch& w, Softmax& r, int d) {
  constexpr int kOnce = KVC_WIDTH == 64 || G < 3 ? 4 : 2;
  const int n = d / kLanes;
  int v = 0;
  for (; v + kOnce <= n; v += kOnce) native_values<DTYPE, G, kOnce>(t, w, r, v);
  for (; v < n; ++v) native_values<DTYPE, G, 1>(t, w, r, v);
}

template <int G>
static void tile_values(const Tile& t, const Scratch& w, bool pairs, Softmax& r, const KvcLayout& layout) {
  const int d = layout.head_dim;
  (void)pairs;
  if (t.value_bits == 8) all_code_values<8, G>(t, w, r, d);
  else if (t.value_bits == 4) all_code_values<4, G>(t, w, r, d);
  else if (t.value_bits == 2) all_code_values<2, G>(t, w, r, d);
  else if (layout.dtype == KVC_F32) all_native_values<KVC_F32, G>(t, w, r, d);
  else if (layout.dtype == KVC_F16) all_native_values<KVC_F16, G>(t, w, r, d);
#if KVC_ISA_avx512
  else if (pairs) all_pair_values<G>(t, w, r, d);
#endif
  else all_native_values<KVC_BF16, G>(t, w, r, d);
}
static inline void add_values(const Tile& t, const Scratch& w, bool pairs, Softmax& r, int count,
                              const KvcLayout& layout) {
  switch (count) {
    case 1: return tile_values<1>(t, w, pairs, r, layout);
    case 2: return tile_values<2>(t, w, pairs, r, layout);
    case 3: return tile_values<3>(t, w, pairs, r, layout);
    default: return tile_values<4>(t, w, pairs, r, layout);
  }
}

// ---- evicted slots ---------------------------------------------------------------------------------------------
// The base-2 logit of what was evicted from a row, taken as one slot as often as there were of them.
static inline float evicted_logit(const KvcRows& rows, int row, const float* q, const Logits& logits) {
  const int d = rows.layout->head_dim;
  alignas(64) float key[KVC_MAX_HEAD_DIM];
  load_floats(key, rows.evicted_means, (int64_t)row * 2 * d, d, rows.layout->dtype);
  vf sum = vf{};
  for (int i = 0; i < d; i += kLanes) sum = load(key + i) * load(q + i) + sum;
  vf x = all(reduce_add(sum) * logits.scale);
  if (logits.cap_out != 0.f) x = capped(x, logits);
  return x[0] + __builtin_log2f((float)rows.evicted_counts[row]);
}
KVC_INLINE bool has_evicted(const KvcRows& rows, int row) {
  return rows.evicted_counts && rows.evicted_counts[row] > 0;
}
// Begins the running state of rows of queries with it; as clear() left it where nothing was evicted.
static inline void begin_with_evicted(Softmax& s, const Queries& q, const KvcRows& rows, int row,
                                      const Logits& logits) {
  if (!has_evicted(rows, row)) return;
  const int d = rows.layout->head_dim;
  for (int h = 0; h < q.count; ++h) {
    s.m[h] = evicted_logit(rows, row, q.q[h], logits);
    s.l[h] = 1.f;
    load_floats(s.o[h], rows.evicted_means, ((int64_t)row * 2 + 1) * d, d, rows.layout->dtype);
  }
}

// ---- results ---------------------------------------------------------------------------------------------------
// Adds the state b (o, l, z relative to its own maximum) of the same rows to a.
static inline void merge(Softmax& a, const Softmax& b, int count, int d) {
  for (int h = 0; h < count; ++h) {
    const float m = a.m[h] > b.m[h] ? a.m[h] : b.m[h];
    const float x = exp2(a.m[h] - m), y = exp2(b.m[h] - m);
    const vf fa = all(x), fb = all(y);
    a.m[h] = m;
    a.l[h] = a.l[h] * x + b.l[h] * y;
    a.z[h] = a.z[h] * x + b.z[h] * y;
    for (int i = 0; i < d; i += kLanes) store(a.o[h] + i, load(a.o[h] + i) * fa + load(b.o[h] + i) * fb);
  }
}

// log2 of a positive number, to float precision.
static inline float log2_of(float x) {
  return __builtin_log2f(x);
}

// Normalises row h into o; returns the base-2 log of the denominator, sink included (-inf: nothing seen, no sink).
static inline float finish_row(Softmax& r, int h, int d, const float* sink) {
  float l = r.l[h], m = r.m[h], alpha = 1.f;
  if (sink) {
    const float s = *sink * kLog2e, top = s > m ? s : m;
    alpha = exp2(m - top);
    l = l * alpha + exp2(s - top);
    m = top;
  }
  const float scale = l > 0.f || l != l ? alpha / l : 0.f;  // NaN goes through
  for (int i = 0; i < d; i += kLanes) store(r.o[h] + i, (load(r.o[h] + i) + all(r.z[h])) * all(scale));
  return l > 0.f || l != l ? m + log2_of(l) : -__builtin_inff();
}

}  // namespace
}  // namespace KVC_ISA
}  // namespace kvc
#endif
