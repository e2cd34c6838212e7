// Storing and moving slots: pack, move, retier, fields, dense, slot_sums, hadamard, convert. Compiled once per
// instruction set.
//
// The unit of work is an aligned block of 16 slots of one page: keys are handled transposed, [dim][16 slots], which
// is how pages hold them, so that rotation, range and codes of 16 slots are computed side by side. Inner loops have
// 16 steps and no calls, for the compiler to vectorise. No multiply and add may be fused here (CMakeLists.txt):
// the codes must be those of quantize.py, bit for bit.
#include <cmath>

#include "ops.h"
#include "simd.h"
#include "tables.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kBlock = KVC_SLOT_MULTIPLE;  // slots in a block
constexpr float kHalfMax = 65504.f;
constexpr float kTwoBitKeys = 0.85f, kTwoBitValues = 0.8f, kTwoBitSearch = 0.9375f;  // quantize.py
constexpr int64_t kSerialElements = 1 << 14;  // smaller jobs are not worth waking threads for

#define KVC_LANES _Pragma("omp simd") for (int l = 0; l < kBlock; l++)

struct Tier {  // a tier of a layout with the numbers its inner loops need
  const KvcLayout* layout;
  const KvcTier* tier;
  int head_dim, n_fields, slots;
  bool native;
  int element;      // bytes of a native element
  int key_words;    // 32-bit words of keys per slot (they lie 16 words apart)
  int value_group;  // slots sharing a 32-bit word of values (quantised)

  Tier(const KvcLayout* l, int index)
      : layout(l),
        tier(&l->tier[index]),
        head_dim(l->head_dim),
        n_fields(l->n_fields),
        slots(tier->slots),
        native(tier->key_bits == 0),
        element(l->dtype == KVC_F32 ? 4 : 2),
        key_words(native ? head_dim * element / 4 : head_dim * tier->key_bits / 32),
        value_group(native ? 0 : 32 / tier->value_bits) {}

  // First key word of a slot; its others follow every kBlock words.
  uint32_t* key(uint8_t* page, int slot) const {
    return reinterpret_cast<uint32_t*>(page + tier->keys) + slot / kBlock * key_words * kBlock + slot % kBlock;
  }
  uint8_t* native_value(uint8_t* page, int slot) const {
    return page + tier->values + static_cast<int64_t>(slot) * head_dim * element;
  }
  // Value words of a slot, one per dim, shared with the other slots of its group.
  uint32_t* value(uint8_t* page, int slot) const {
    return reinterpret_cast<uint32_t*>(page + tier->values) + slot / value_group * head_dim;
  }
  int value_shift(int slot) const {
    const int in_group = slot % value_group;
    return in_group % 4 * 8 + in_group / 4 * tier->value_bits;
  }
  uint32_t value_mask() const { return (1u << tier->value_bits) - 1; }
  uint16_t* key_params(uint8_t* page) const { return reinterpret_cast<uint16_t*>(page + tier->key_params); }
  uint16_t* value_params(uint8_t* page) const { return reinterpret_cast<uint16_t*>(page + tier->value_params); }
  uint32_t* field(uint8_t* page, int index) const {
    return reinterpret_cast<uint32_t*>(page + tier->fields) + static_cast<int64_t>(index) * slots;
  }
};

uint8_t* page_address(const int64_t* slabs, int shift, int64_t page_bytes, int32_t id) {
  return reinterpret_cast<uint8_t*>(slabs[id >> shift]) + (id & ((1 << shift) - 1)) * page_bytes;
}

uint8_t* page_of(const KvcRows& rows, int tier, int row, int slot) {
  const int32_t id = rows.table[tier][row * rows.table_stride[tier] + slot / rows.layout->tier[tier].slots];
  return page_address(rows.slabs, rows.slab_shift, rows.layout->page_bytes, id);
}

float half_to_float(uint16_t h) {
  alignas(64) uint16_t in[kBlock] = {h};
  return from_f16(in)[0];
}

void to_floats(const void* from, int dtype, int n, float* to) {
  const char* p = static_cast<const char*>(from);
  for (int i = 0; i < n; i += kLanes) {
    if (dtype == KVC_F32) store(to + i, load(p + 4 * i));
    if (dtype == KVC_F16) store(to + i, from_f16(p + 2 * i));
    if (dtype == KVC_BF16) store(to + i, from_bf16(p + 2 * i));
  }
}

void from_floats(const float* from, int dtype, int n, void* to) {
  char* p = static_cast<char*>(to);
  for (int i = 0; i < n; i += kLanes) {
    if (dtype == KVC_F32) store(p + 4 * i, load(from + i));
    if (dtype == KVC_F16) to_f16(p + 2 * i, load(from + i));
    if (dtype == KVC_BF16) to_bf16(p + 2 * i, load(from + i));
  }
}

// Orthonormal Walsh-Hadamard transform of 16 slots side by side: x[head_dim][16].
void rotate(float* x, int head_dim, int block) {
  for (int half = 1; half < block; half *= 2) {
    for (int i = 0; i < head_dim; i += 2 * half) {
      for (int j = i; j < i + half; j++) {
        float* a = x + j * kBlock;
        float* b = x + (j + half) * kBlock;
        KVC_LANES {
          const float s = a[l], t = b[l];
          a[l] = s + t;
          b[l] = s - t;
        }
      }
    }
  }
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (int i = 0; i < head_dim * kBlock; i++) x[i] *= norm;
}

// Stored (fp16) scales and offsets of 16 slots from their ranges, and which of them had to be clamped.
struct Affines {
  alignas(64) uint16_t scale[kBlock], offset[kBlock];
  alignas(64) float step[kBlock], zero[kBlock];  // the stored numbers as floats
  uint32_t overflow;                             // bit = slot

  static vf clamped(vf x, float low) {  // NaN becomes 0
    x = x == x ? x : vf{};
    return min(max(x, all(low)), all(kHalfMax));
  }
  void set(const float* lows, const float* highs, int bits, float two_bit_range) {
    overflow = 0;
    for (int i = 0; i < kBlock; i += kLanes) {
      vf low = load(lows + i), high = load(highs + i);
      if (bits == 2) {
        const vf centre = low * all(0.5f) + high * all(0.5f);
        const vf half = (high * all(0.5f) - low * all(0.5f)) * all(two_bit_range);
        low = centre - half;
        high = centre + half;
      }
      const vf wide = (high - low) / all(static_cast<float>((1 << bits) - 1));
      const vi fits = (max(low, -low) <= all(kHalfMax)) & (max(high, -high) <= all(kHalfMax)) & (wide <= all(kHalfMax));
      for (int e = 0; e < kLanes; e++) overflow |= fits[e] ? 0u : 1u << (i + e);
      kvc::KVC_ISA::to_f16(scale + i, clamped(wide, 0.f));
      kvc::KVC_ISA::to_f16(offset + i, clamped(low, -kHalfMax) + vf{});  // + 0: no negative zero
      store(step + i, from_f16(scale + i));
      store(zero + i, from_f16(offset + i));
    }
  }
};

// Rounds to the nearest codes, half to even: adding 1.5 * 2^23 leaves the integer in the low bits.
KVC_INLINE vi codes_of(vf x, vf zero, vf step, float top) {
  vf t = step > vf{} ? (x - zero) / step : vf{};
  t = t > vf{} ? t : vf{};  // NaN too
  t = t < all(top) ? t : all(top);
  return (vi)(t + all(12582912.f)) - 0x4B400000;
}

// How channels of 16 keys are rounded one after the other, each making good the errors of those before it.
struct Feedback {
  alignas(64) float factors[2][KVC_FEEDBACK_RANK][KVC_MAX_HEAD_DIM];  // made good; collected
  alignas(64) float collected[KVC_FEEDBACK_RANK][kBlock];
  bool on;

  void set(const KvcRows& rows, const KvcLayout& layout, const KvcTier& tier, int row) {
    on = rows.key_feedback && tier.rotate_keys;
    if (!on) return;
    const int head_dim = layout.head_dim;
    const uint16_t* from = rows.key_feedback + static_cast<int64_t>(row) * 2 * KVC_FEEDBACK_RANK * head_dim;
    for (int i = 0; i < 2 * KVC_FEEDBACK_RANK; i++) {
      to_floats(from + i * head_dim, KVC_BF16, head_dim, factors[i / KVC_FEEDBACK_RANK][i % KVC_FEEDBACK_RANK]);
    }
    memset(collected, 0, sizeof collected);
  }

  // The codes of channel d, whose elements are x.
  void codes(int d, const float* x, const float* zero, const float* step, float top, uint32_t* code) {
    alignas(64) float wanted[kBlock], error[kBlock];
    for (int r = 0; r < KVC_FEEDBACK_RANK; r++) {
      const float factor = factors[0][r][d];
      const float* of = collected[r];
      KVC_LANES { wanted[l] = r ? wanted[l] + factor * of[l] : factor * of[l]; }
    }
    for (int i = 0; i < kBlock; i += kLanes)
      store(code + i, codes_of(load(x + i) - load(wanted + i), load(zero + i), load(step + i), top));
    KVC_LANES {
      const float e = static_cast<float>(static_cast<int32_t>(code[l])) * step[l] + zero[l] - x[l];
      error[l] = std::fabs(e) <= kHalfMax ? e : 0.f;  // of an infinity nothing can be made good
    }
    for (int r = 0; r < KVC_FEEDBACK_RANK; r++) {
      const float factor = factors[1][r][d];
      float* to = collected[r];
      KVC_LANES { to[l] = to[l] + factor * error[l]; }
    }
  }
};

// What one thread needs to store a block.
struct Scratch {
  Feedback feedback;                                    // of the row whose keys are stored
  alignas(64) float keys[KVC_MAX_HEAD_DIM * kBlock];    // [dim][16 slots]
  alignas(64) float values[kBlock * KVC_MAX_HEAD_DIM];  // [16 slots][dim]
  alignas(64) uint32_t codes[kBlock * KVC_MAX_HEAD_DIM];
  alignas(64) float rows[kBlock * KVC_MAX_HEAD_DIM];    // keys as they come, [16 slots][dim]

  float* row(int lane, int head_dim) { return rows + lane * head_dim; }
  void set_keys(int head_dim) {  // from rows
    for (int lane = 0; lane < kBlock; lane += 4) {
      const char* from[4];
      for (int r = 0; r < 4; r++) from[r] = reinterpret_cast<const char*>(row(lane + r, head_dim));
      char* to = reinterpret_cast<char*>(keys + lane);
      for (int d = 0; d < head_dim; d += 4) put_words(to + d * kBlock * 4, from, 4 * d);
    }
  }
};

// Quantises scratch.keys of the slots in `active` (bit = lane) into a block; returns the lanes that overflowed.
template <int BITS>
uint32_t store_keys(const Tier& t, uint8_t* page, int first, uint32_t active, Scratch& scratch) {
  float* x = scratch.keys;
  alignas(64) float low[kBlock], high[kBlock];
  alignas(64) uint32_t keep[kBlock], nan[kBlock];
  KVC_LANES { low[l] = INFINITY, high[l] = -INFINITY, nan[l] = 0; }
  for (int d = 0; d < t.head_dim; d++) {
    float* row = x + d * kBlock;
    KVC_LANES {
      const float y = row[l] == row[l] ? row[l] : 0.f;
      nan[l] |= row[l] == row[l] ? 0u : 1u;
      row[l] = y;
      low[l] = y < low[l] ? y : low[l];
      high[l] = y > high[l] ? y : high[l];
    }
  }
  Affines a;
  a.set(low, high, BITS, kTwoBitKeys);
  uint32_t overflow = a.overflow;
  uint16_t* params = t.key_params(page) + first;
  for (int l = 0; l < kBlock; l++) {
    keep[l] = active >> l & 1 ? 0u : ~0u;
    if (keep[l]) continue;
    params[l] = a.scale[l];
    params[t.slots + l] = a.offset[l];
    if (nan[l]) overflow |= 1u << l;
  }
  constexpr int kPerByte = 8 / BITS;
  constexpr float kTop = (1 << BITS) - 1;
  uint32_t* words = t.key(page, first);
  for (int i = 0; i < t.key_words; i++) {
    alignas(64) uint32_t word[kBlock] = {};
    for (int j = 0; j < kPerByte; j++) {
      for (int e = 0; e < 4; e++) {
        const int d = 4 * (kPerByte * i + j) + e, shift = 8 * e + BITS * j;
        const float* row = x + d * kBlock;
        if (scratch.feedback.on) {
          alignas(64) uint32_t code[kBlock];
          scratch.feedback.codes(d, row, a.zero, a.step, kTop, code);
          KVC_LANES { word[l] |= code[l] << shift; }
          continue;
        }
        for (int l = 0; l < kBlock; l += kLanes) {
          const vi code = codes_of(load(row + l), load(a.zero + l), load(a.step + l), kTop);
          store(word + l, load_int(word + l) | code << shift);
        }
      }
    }
    uint32_t* to = words + i * kBlock;
    KVC_LANES { to[l] = (to[l] & keep[l]) | (word[l] & ~keep[l]); }
  }
  return overflow & active;
}

// Quantises scratch.values of the slots in `active` into a block; returns the lanes that overflowed.
template <int BITS>
uint32_t store_values(const Tier& t, uint8_t* page, int first, uint32_t active, Scratch& scratch) {
  alignas(64) float lows[kBlock] = {}, highs[kBlock] = {};
  uint32_t nans = 0;
  constexpr float kTop = (1 << BITS) - 1;
  for (int s = 0; s < kBlock; s++) {
    if (!(active >> s & 1)) continue;
    float* x = scratch.values + s * t.head_dim;
    vf low = all(INFINITY), high = all(-INFINITY);
    vi nan = vi{};
    for (int d = 0; d < t.head_dim; d += kLanes) {
      const vf y = load(x + d);
      const vi is = y == y;
      nan = nan | ~is;
      const vf clean = is ? y : vf{};
      store(x + d, clean);
      low = min(low, clean);
      high = max(high, clean);
    }
    lows[s] = -reduce_max(-low);
    highs[s] = reduce_max(high);
    alignas(64) int32_t any[kLanes];
    store(any, nan);
    for (int l = 0; l < kLanes; l++) nans |= any[l] ? 1u << s : 0u;
  }
  Affines a;
  a.set(lows, highs, BITS, kTwoBitValues);
  const uint32_t overflow = (a.overflow | nans) & active;
  uint16_t* params = t.value_params(page) + first;
  for (int s = 0; s < kBlock; s++) {
    if (!(active >> s & 1)) continue;
    params[s] = a.scale[s];
    params[t.slots + s] = a.offset[s];
    const float* x = scratch.values + s * t.head_dim;
    uint32_t* codes = scratch.codes + s * t.head_dim;
    const int shift = t.value_shift(s);
    // About the same centre, 1.5 steps from either end.
    const float zero = BITS == 2 ? a.zero[s] + a.step[s] * (1.5f * (1.f - kTwoBitSearch)) : a.zero[s];
    const float step = BITS == 2 ? a.step[s] * kTwoBitSearch : a.step[s];
    for (int d = 0; d < t.head_dim; d += kLanes)
      store(codes + d, codes_of(load(x + d), all(zero), all(step), kTop) << shift);
  }
  constexpr int kGroup = 32 / BITS;
  for (int g = 0; g < kBlock; g += kGroup) {
    uint32_t written = 0;
    for (int s = g; s < g + kGroup; s++) {
      if (active >> s & 1) written |= t.value_mask() << t.value_shift(s);
    }
    if (!written) continue;
    uint32_t* to = t.value(page, first + g);
    for (int d = 0; d < t.head_dim; d += kBlock) {
      alignas(64) uint32_t word[kBlock] = {};
      for (int s = g; s < g + kGroup; s++) {
        if (!(active >> s & 1)) continue;
        const uint32_t* codes = scratch.codes + s * t.head_dim + d;
        KVC_LANES { word[l] |= codes[l]; }
      }
      KVC_LANES { to[d + l] = (to[d + l] & ~written) | word[l]; }
    }
  }
  return overflow;
}

uint32_t store_block(const Tier& t, uint8_t* page, int first, uint32_t active, Scratch& scratch) {
  uint32_t overflow = 0;
  switch (t.tier->key_bits) {
    case 8: overflow = store_keys<8>(t, page, first, active, scratch); break;
    case 4: overflow = store_keys<4>(t, page, first, active, scratch); break;
    default: overflow = store_keys<2>(t, page, first, active, scratch);
  }
  switch (t.tier->value_bits) {
    case 8: return overflow | store_values<8>(t, page, first, active, scratch);
    case 4: return overflow | store_values<4>(t, page, first, active, scratch);
    default: return overflow | store_values<2>(t, page, first, active, scratch);
  }
}

void store_native(const Tier& t, uint8_t* page, int slot, const void* k, const void* v) {
  uint32_t* words = t.key(page, slot);
  const char* from = static_cast<const char*>(k);
  for (int w = 0; w < t.key_words; w++) memcpy(words + w * kBlock, from + 4 * w, 4);
  memcpy(t.native_value(page, slot), v, static_cast<size_t>(t.head_dim) * t.element);
}

// One slot as floats, keys as stored (still rotated).
void read_key(const Tier& t, uint8_t* page, int slot, float* out) {
  const uint32_t* words = t.key(page, slot);
  if (t.native) {
    alignas(64) uint32_t raw[KVC_MAX_HEAD_DIM];
    for (int w = 0; w < t.key_words; w++) raw[w] = words[w * kBlock];
    to_floats(raw, t.layout->dtype, t.head_dim, out);
    return;
  }
  const int bits = t.tier->key_bits, per_byte = 8 / bits;
  const uint32_t mask = (1u << bits) - 1;
  const float scale = half_to_float(t.key_params(page)[slot]);
  const float offset = half_to_float(t.key_params(page)[t.slots + slot]);
  for (int i = 0; i < t.key_words; i++) {
    const uint32_t word = words[i * kBlock];
    for (int j = 0; j < per_byte; j++) {
      for (int e = 0; e < 4; e++) {
        const float code = static_cast<float>(static_cast<int32_t>(word >> (8 * e + bits * j) & mask));
        out[4 * (per_byte * i + j) + e] = code * scale + offset;
      }
    }
  }
}

void read_value(const Tier& t, uint8_t* page, int slot, float* out) {
  if (t.native) {
    to_floats(t.native_value(page, slot), t.layout->dtype, t.head_dim, out);
    return;
  }
  const uint32_t* words = t.value(page, slot);
  const uint32_t mask = t.value_mask();
  const int shift = t.value_shift(slot);
  const float scale = half_to_float(t.value_params(page)[slot]);
  const float offset = half_to_float(t.value_params(page)[t.slots + slot]);
  for (int d = 0; d < t.head_dim; d++) {
    out[d] = static_cast<float>(static_cast<int32_t>(words[d] >> shift & mask)) * scale + offset;
  }
}

int thread_count() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Packs source tokens from..until of a row into its slots start + from.. in one block.
int pack_block(const KvcPack& a, const Tier& t, int b, int h, int from, int until, Scratch& scratch) {
  const int row = b * a.kv_heads + h;
  const int start = a.rows.length[a.tier][row];
  const int slot = (start + from) % t.slots;  // inside the page
  const int first = slot / kBlock * kBlock;
  uint8_t* page = page_of(a.rows, a.tier, row, start + from);
  const char* k = static_cast<const char*>(a.k) + (b * a.k_b + h * a.k_h) * t.element;
  const char* v = static_cast<const char*>(a.v) + (b * a.v_b + h * a.v_h) * t.element;
  const int32_t* index = a.index ? a.index + b * a.index_b + h * a.index_h : nullptr;
  uint32_t active = 0;
  if (!t.native && until - from < kBlock) memset(scratch.rows, 0, sizeof(float) * t.head_dim * kBlock);
  for (int i = from; i < until; i++) {
    const int token = index ? index[i] : i;
    const int lane = slot - first + i - from;
    const char* key = k + token * a.k_t * t.element;
    const char* value = v + token * a.v_t * t.element;
    for (int f = 0; f < t.n_fields; f++) {
      t.field(page, f)[first + lane] = static_cast<uint32_t>(a.field[f][b * a.field_b[f] + h * a.field_h[f] + token]);
    }
    if (t.native) {
      store_native(t, page, first + lane, key, value);
      continue;
    }
    active |= 1u << lane;
    to_floats(key, t.layout->dtype, t.head_dim, scratch.row(lane, t.head_dim));
    to_floats(value, t.layout->dtype, t.head_dim, scratch.values + lane * t.head_dim);
  }
  if (t.native) return 0;
  scratch.set_keys(t.head_dim);
  if (t.tier->rotate_keys) rotate(scratch.keys, t.head_dim, t.layout->rotation_block);
  scratch.feedback.set(a.rows, *t.layout, *t.tier, row);
  return __builtin_popcount(store_block(t, page, first, active, scratch));
}

void move_slot(const KvcMove& a, const Tier& t, int row, int dst, int src) {
  uint8_t* to = page_of(a.rows, a.tier, row, dst);
  uint8_t* of = page_of(a.rows, a.tier, row, src);
  dst %= t.slots, src %= t.slots;
  uint32_t* to_key = t.key(to, dst);
  const uint32_t* of_key = t.key(of, src);
  for (int w = 0; w < t.key_words; w++) to_key[w * kBlock] = of_key[w * kBlock];
  for (int f = 0; f < t.n_fields; f++) t.field(to, f)[dst] = t.field(of, f)[src];
  if (t.native) {
    memcpy(t.native_value(to, dst), t.native_value(of, src), static_cast<size_t>(t.head_dim) * t.element);
    return;
  }
  for (int p = 0; p < 2; p++) {
    t.key_params(to)[p * t.slots + dst] = t.key_params(of)[p * t.slots + src];
    t.value_params(to)[p * t.slots + dst] = t.value_params(of)[p * t.slots + src];
  }
  uint32_t* to_value = t.value(to, dst);
  const uint32_t* of_value = t.value(of, src);
  const int to_shift = t.value_shift(dst), of_shift = t.value_shift(src);
  const uint32_t mask = t.value_mask();
  for (int d = 0; d < t.head_dim; d++) {  // the two may be the same words
    to_value[d] = (to_value[d] & ~(mask << to_shift)) | ((of_value[d] >> of_shift & mask) << to_shift);
  }
}

// Quantised keys of some slots, still rotated, as floats side by side: only their words are looked for one by one.
struct CodedKeys {
  alignas(64) uint32_t words[KVC_MAX_HEAD_DIM / 4 * kBlock];
  alignas(64) float scale[kBlock] = {}, offset[kBlock] = {};

  void add(const Tier& t, uint8_t* page, int slot, int lane) {
    const uint32_t* from = t.key(page, slot);
    for (int w = 0; w < t.key_words; w++) words[w * kBlock + lane] = from[w * kBlock];
    scale[lane] = half_to_float(t.key_params(page)[slot]);
    offset[lane] = half_to_float(t.key_params(page)[t.slots + slot]);
  }
  void read(const Tier& t, float* keys) const {
    const int bits = t.tier->key_bits, per_byte = 8 / bits;
    const uint32_t mask = (1u << bits) - 1;
    for (int i = 0; i < t.key_words; i++) {
      const uint32_t* word = words + i * kBlock;
      for (int j = 0; j < per_byte; j++) {
        for (int e = 0; e < 4; e++) {
          const int shift = 8 * e + bits * j;
          float* to = keys + (4 * (per_byte * i + j) + e) * kBlock;
          KVC_LANES { to[l] = static_cast<float>(static_cast<int32_t>(word[l] >> shift & mask)) * scale[l] + offset[l]; }
        }
      }
    }
  }
};

// Re-quantises entries from..until, all of one row and one block of the destination tier.
int retier_block(const KvcRetier& a, const Tier& s, const Tier& d, int from, int until, Scratch& scratch) {
  const int row = a.row[from];
  uint8_t* to = page_of(a.rows, a.dst_tier, row, a.dst[from]);
  const int first = a.dst[from] % d.slots / kBlock * kBlock;
  uint32_t active = 0;
  CodedKeys coded;
  if (until - from < kBlock) {
    memset(scratch.rows, 0, sizeof(float) * d.head_dim * kBlock);
    memset(coded.words, 0, sizeof coded.words);
  }
  for (int i = from; i < until; i++) {
    uint8_t* of = page_of(a.rows, a.src_tier, row, a.src[i]);
    const int slot = a.src[i] % s.slots;
    const int lane = a.dst[i] % d.slots - first;
    active |= 1u << lane;
    if (s.native) read_key(s, of, slot, scratch.row(lane, d.head_dim));
    else coded.add(s, of, slot, lane);
    read_value(s, of, slot, scratch.values + lane * d.head_dim);
    for (int f = 0; f < d.n_fields; f++) d.field(to, f)[first + lane] = s.field(of, f)[slot];
  }
  if (s.native) scratch.set_keys(d.head_dim);
  else coded.read(s, scratch.keys);
  if (s.tier->rotate_keys != d.tier->rotate_keys) {  // the transform is its own inverse
    rotate(scratch.keys, d.head_dim, d.layout->rotation_block);
  }
  scratch.feedback.set(a.rows, *d.layout, *d.tier, row);
  if (!d.native) return __builtin_popcount(store_block(d, to, first, active, scratch));
  alignas(64) char k[4 * KVC_MAX_HEAD_DIM], v[4 * KVC_MAX_HEAD_DIM];
  for (int lane = 0; lane < kBlock; lane++) {
    if (!(active >> lane & 1)) continue;
    for (int i = 0; i < d.head_dim; i++) scratch.rows[i] = scratch.keys[i * kBlock + lane];
    from_floats(scratch.rows, d.layout->dtype, d.head_dim, k);
    from_floats(scratch.values + lane * d.head_dim, d.layout->dtype, d.head_dim, v);
    store_native(d, to, first + lane, k, v);
  }
  return 0;
}

// Keys or values of a page <-> canonical order. Codes go through one row of bytes.
void convert_page(const Tier& t, uint8_t* from, uint8_t* to, bool to_canonical) {
  uint8_t* cpu = to_canonical ? from : to;
  uint8_t* canonical = to_canonical ? to : from;
  const int head_dim = t.head_dim;
  for (int slot = 0; slot < t.slots; slot++) {
    uint32_t* words = t.key(cpu, slot);
    const int key_bytes = 4 * t.key_words;
    uint8_t* row = canonical + t.tier->keys + static_cast<int64_t>(slot) * key_bytes;
    if (t.native) {
      for (int w = 0; w < t.key_words; w++) {
        if (to_canonical) memcpy(row + 4 * w, words + w * kBlock, 4);
        else memcpy(words + w * kBlock, row + 4 * w, 4);
      }
      continue;  // values are row-major in both orders
    }
    {
      const int bits = t.tier->key_bits, per_byte = 8 / bits;
      const uint32_t mask = (1u << bits) - 1;
      if (to_canonical) memset(row, 0, key_bytes);
      for (int w = 0; w < t.key_words; w++) {
        uint32_t word = 0;
        for (int j = 0; j < per_byte; j++) {
          for (int e = 0; e < 4; e++) {
            const int d = 4 * (per_byte * w + j) + e;
            const int at = 8 * e + bits * j, canonical_at = d * bits % 8;
            uint8_t& byte = row[d * bits / 8];
            if (to_canonical) byte |= (words[w * kBlock] >> at & mask) << canonical_at;
            else word |= (byte >> canonical_at & mask) << at;
          }
        }
        if (!to_canonical) words[w * kBlock] = word;
      }
    }
    const int bits = t.tier->value_bits;
    const uint32_t mask = t.value_mask();
    uint32_t* value = t.value(cpu, slot);
    const int shift = t.value_shift(slot), value_bytes = head_dim * bits / 8;
    row = canonical + t.tier->values + static_cast<int64_t>(slot) * value_bytes;
    if (to_canonical) memset(row, 0, value_bytes);
    for (int d = 0; d < head_dim; d++) {
      uint8_t& byte = row[d * bits / 8];
      const int at = d * bits % 8;
      if (to_canonical) byte |= (value[d] >> shift & mask) << at;
      else value[d] = (value[d] & ~(mask << shift)) | (byte >> at & mask) << shift;
    }
  }
}

}  // namespace

int pack(KvcPack* args) {
  const KvcPack& a = *args;
  const Tier t(a.rows.layout, a.tier);
  const int rows = a.batch * a.kv_heads;
  int64_t total = 0;
  int most = 0;  // blocks a row touches
  for (int row = 0; row < rows; row++) {
    const int b = row / a.kv_heads, h = row % a.kv_heads;
    const int count = a.count[b * a.count_b + h * a.count_h];
    if (count <= 0) continue;
    const int start = a.rows.length[a.tier][row];
    if (!slots_known(a.rows, a.tier, row, start, static_cast<int64_t>(start) + count)) return KVC_BAD_PAGE;
    const int blocks = (start + count + kBlock - 1) / kBlock - start / kBlock;
    most = blocks > most ? blocks : most;
    total += count;
  }
  int overflow = 0;
  // Blocks are the outer loop, so that rows of different lengths spread evenly over the threads.
#pragma omp parallel if (total * t.head_dim > kSerialElements) reduction(+ : overflow)
  {
    Scratch scratch;
#pragma omp for schedule(static, 1)
    for (int64_t unit = 0; unit < static_cast<int64_t>(most) * rows; unit++) {
      const int row = static_cast<int>(unit % rows), block = static_cast<int>(unit / rows);
      const int b = row / a.kv_heads, h = row % a.kv_heads;
      const int count = a.count[b * a.count_b + h * a.count_h];
      const int start = a.rows.length[a.tier][row];
      int from = (start / kBlock + block) * kBlock - start, until = from + kBlock;
      from = from < 0 ? 0 : from;
      until = until > count ? count : until;
      if (from < until) overflow += pack_block(a, t, b, h, from, until, scratch);
    }
  }
  args->overflow = overflow;
  return KVC_OK;
}

int move(KvcMove* args) {
  const KvcMove& a = *args;
  const Tier t(a.rows.layout, a.tier);
  for (int i = 0; i < a.n; i++) {
    if (!slot_known(a.rows, a.tier, a.row[i], a.src[i]) || !slot_known(a.rows, a.tier, a.row[i], a.dst[i])) {
      return KVC_BAD_PAGE;
    }
  }
  // Slots share bytes with their neighbours, so a row belongs to one thread.
#pragma omp parallel if (static_cast<int64_t>(a.n) * t.head_dim > kSerialElements)
  {
    const int threads = thread_count(), thread = thread_index();
    for (int i = 0; i < a.n; i++) {
      if (a.row[i] % threads == thread) move_slot(a, t, a.row[i], a.dst[i], a.src[i]);
    }
  }
  return KVC_OK;
}

int retier(KvcRetier* args) {
  const KvcRetier& a = *args;
  const Tier s(a.rows.layout, a.src_tier), d(a.rows.layout, a.dst_tier);
  for (int i = 0; i < a.n; i++) {
    if (!slot_known(a.rows, a.src_tier, a.row[i], a.src[i]) || !slot_known(a.rows, a.dst_tier, a.row[i], a.dst[i])) {
      return KVC_BAD_PAGE;
    }
  }
  int overflow = 0;
#pragma omp parallel if (static_cast<int64_t>(a.n) * d.head_dim > kSerialElements) reduction(+ : overflow)
  {
    Scratch scratch;
    const int threads = thread_count(), thread = thread_index();
    for (int i = 0; i < a.n;) {  // neighbours in the list that share a row and a destination block go together
      int until = i + 1;
      while (until < a.n && a.row[until] == a.row[i] && a.dst[until] / kBlock == a.dst[i] / kBlock) until++;
      if (a.row[i] % threads == thread) overflow += retier_block(a, s, d, i, until, scratch);
      i = until;
    }
  }
  args->overflow = overflow;
  return KVC_OK;
}

int fields(KvcFields* args) {
  const KvcFields& a = *args;
  const Tier t(a.rows.layout, a.tier);
  if (!tier_known(a.rows, a.tier)) return KVC_BAD_PAGE;
#pragma omp parallel for schedule(static) if (a.rows.rows * a.stride > kSerialElements * 4)
  for (int row = 0; row < a.rows.rows; row++) {
    uint32_t* values = static_cast<uint32_t*>(a.values) + row * a.stride;
    const int64_t length = a.rows.length[a.tier][row];
    const int64_t n = length < a.stride ? length : a.stride;
    for (int64_t slot = 0; slot < n; slot += t.slots) {
      const size_t bytes = 4 * static_cast<size_t>(n - slot < t.slots ? n - slot : t.slots);
      uint32_t* field = t.field(page_of(a.rows, a.tier, row, static_cast<int>(slot)), a.field);
      if (a.write) memcpy(field, values + slot, bytes);
      else memcpy(values + slot, field, bytes);
    }
  }
  return KVC_OK;
}

int dense(KvcDense* args) {
  const KvcDense& a = *args;
  const Tier t(a.rows.layout, a.tier);
  if (!tier_known(a.rows, a.tier)) return KVC_BAD_PAGE;
  const int64_t blocks = (a.stride + kBlock - 1) / kBlock, units = blocks * a.rows.rows;
#pragma omp parallel if (units * kBlock * t.head_dim > kSerialElements)
  {
    Scratch scratch;
#pragma omp for schedule(static, 1)
    for (int64_t unit = 0; unit < units; unit++) {
      const int row = static_cast<int>(unit % a.rows.rows);
      const int first = static_cast<int>(unit / a.rows.rows) * kBlock;
      const int64_t length = a.rows.length[a.tier][row] < a.stride ? a.rows.length[a.tier][row] : a.stride;
      const int n = static_cast<int>(length - first < kBlock ? length - first : kBlock);
      if (n <= 0) continue;
      uint8_t* page = page_of(a.rows, a.tier, row, first);
      float* k = a.k + (row * a.stride + first) * t.head_dim;
      float* v = a.v + (row * a.stride + first) * t.head_dim;
      if (n < kBlock) memset(scratch.rows, 0, sizeof(float) * t.head_dim * kBlock);
      for (int lane = 0; lane < n; lane++) {
        const int slot = first % t.slots + lane;
        read_value(t, page, slot, v + lane * t.head_dim);
        read_key(t, page, slot, t.tier->rotate_keys ? scratch.row(lane, t.head_dim) : k + lane * t.head_dim);
      }
      if (!t.tier->rotate_keys) continue;
      scratch.set_keys(t.head_dim);
      rotate(scratch.keys, t.head_dim, t.layout->rotation_block);
      for (int lane = 0; lane < n; lane++) {
        for (int d = 0; d < t.head_dim; d++) k[lane * t.head_dim + d] = scratch.keys[d * kBlock + lane];
      }
    }
  }
  return KVC_OK;
}

int slot_sums(KvcSlotSums* args) {
  const KvcSlotSums& a = *args;
  const Tier t(a.rows.layout, a.tier);
  if (!tier_known(a.rows, a.tier)) return KVC_BAD_PAGE;
#pragma omp parallel for schedule(dynamic, 8) if (a.rows.rows * a.stride > kSerialElements)
  for (int row = 0; row < a.rows.rows; row++) {
    alignas(64) float x[KVC_MAX_HEAD_DIM], keys[KVC_MAX_HEAD_DIM] = {};
    float *k = a.sums + static_cast<int64_t>(row) * 2 * t.head_dim, *v = k + t.head_dim;
    const uint8_t* chosen = a.chosen + row * a.stride;
    const int64_t length = a.rows.length[a.tier][row] < a.stride ? a.rows.length[a.tier][row] : a.stride;
    for (int slot = 0; slot < length; slot++) {
      if (!chosen[slot]) continue;
      uint8_t* page = page_of(a.rows, a.tier, row, slot);
      read_key(t, page, slot % t.slots, x);
      for (int d = 0; d < t.head_dim; d++) keys[d] += x[d];
      read_value(t, page, slot % t.slots, x);
      for (int d = 0; d < t.head_dim; d++) v[d] += x[d];
    }
    if (t.tier->rotate_keys) rotate_value(keys, t.head_dim, t.layout->rotation_block);  // linear: once will do
    for (int d = 0; d < t.head_dim; d++) k[d] += keys[d];
  }
  return KVC_OK;
}

int hadamard(KvcHadamard* args) {
  const KvcHadamard& a = *args;
  const int element = a.dtype == KVC_F32 ? 4 : 2;
  const int64_t vectors = static_cast<int64_t>(a.batch) * a.outer * a.inner;
#pragma omp parallel for schedule(static) if (vectors * a.head_dim > kSerialElements)
  for (int64_t i = 0; i < vectors; i++) {
    alignas(64) float x[KVC_MAX_HEAD_DIM];
    const int64_t b = i / a.inner / a.outer, h = i / a.inner % a.outer, t = i % a.inner;
    const char* from = static_cast<const char*>(a.x) + (b * a.x_b + h * a.x_h + t * a.x_t) * element;
    to_floats(from, a.dtype, a.head_dim, x);
    rotate_value(x, a.head_dim, a.block);
    from_floats(x, a.dtype, a.head_dim, static_cast<char*>(a.out) + i * a.head_dim * element);
  }
  return KVC_OK;
}

int convert(KvcConvert* args) {
  const KvcConvert& a = *args;
  const Tier t(a.layout, a.tier);
  const int64_t bytes = a.layout->page_bytes;
#pragma omp parallel for schedule(static) if (a.n * bytes > kSerialElements)
  for (int i = 0; i < a.n; i++) {
    uint8_t* from = const_cast<uint8_t*>(a.from) + i * bytes;
    memcpy(a.to + i * bytes, from, static_cast<size_t>(bytes));
    convert_page(t, from, a.to + i * bytes, a.to_canonical);
  }
  return KVC_OK;
}

}  // namespace KVC_ISA
}  // namespace kvc
