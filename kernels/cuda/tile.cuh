// Keys or values of some tens of slots in shared memory, as operands of the tensor cores, out of whichever section
// they lie in. All that these kernels know of the order inside a page is in fetch_codes and spread_codes.
//
// A tile is [slots][kDim] elements of two bytes: native ones, or codes less `kMiddle` as fp16, exactly. Its 16-byte
// chunks are shuffled within a slot so that neither ldmatrix nor the stores of spread_codes meet in a bank.
#ifndef KVC_TILE_CUH
#define KVC_TILE_CUH
#include "fragments.cuh"

constexpr int kTail = KVC_MAX_TIERS, kFresh = KVC_MAX_TIERS + 1;  // sections after the tiers
constexpr int kTileThreads = 128;                                  // of the thread blocks that use tiles
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -1e30f;
constexpr float kLeastScale = 5.9604644775390625e-8f;  // 2^-24, the least fp16 above zero
constexpr uint32_t kBytes1024 = 0x64646464u;           // 0x6400 is 1024 in fp16: its low mantissa bits take a code

// What is taken off codes, so that rounding costs no more than it would with the numbers they stand for.
KVC_DEVICE float middle_of(int bits) { return bits == 8 ? 128.f : bits == 4 ? 8.f : 2.f; }

// Where chunk c of a slot lies in a tile, in chunks: with the bits of a number that says so turned by others, so that
// where two numbers have no bit in common, turns are joined by exclusive or.
KVC_DEVICE constexpr int slot_turn(int slot) { return (slot & 3) << 1 | (slot >> 2 & 1); }
KVC_DEVICE constexpr int chunk_turn(int c) { return c ^ c >> 3; }
template <int kDim>
KVC_DEVICE int tile_at(int slot, int c) {
  return slot * (kDim / 8) + (chunk_turn(c) ^ slot_turn(slot));
}

// Eight codes -> eight fp16, less the middle. 8 bits: two words; 4 bits: one; 2 bits: the half of `a` that `b` says.
template <int kBits>
KVC_DEVICE uint4 codes_to_chunk(uint32_t a, uint32_t b) {
  uint32_t r[4];
  KVC_UNROLL
  for (int i = 0; i < 4; i++) {
    if (kBits == 8) {
      r[i] = half2_subtract(select_bytes(i < 2 ? a : b, kBytes1024, i % 2 ? 0x4342 : 0x4140), 0x64806480u);
    } else if (kBits == 4) {  // a byte in both halves, a nibble left in each; the upper one is 16 times too large
      const uint32_t both = select_bytes(a, kBytes1024, 0x4040 | i << 8 | i) & 0x64f0640fu;
      r[i] = half2_fma(both, 0x2c003c00u, 0xd480e408u);
    } else {
      const int byte = 2 * b + i / 2;
      const uint32_t both = select_bytes(a, kBytes1024, 0x4040 | byte << 8 | byte);
      r[i] = i % 2 ? half2_fma(both & 0x64c06430u, 0x24002c00u, 0xcc80d420u)
                   : half2_fma(both & 0x640c6403u, 0x34003c00u, 0xdc08e402u);
    }
  }
  return uint4{r[0], r[1], r[2], r[3]};
}

// How a warp shares kRows slots of codes: every lane has kCount pieces of kPiece bytes.
template <int kDim, int kRows, int kBits>
struct Pieces {
  static constexpr int kRowBytes = kDim * kBits / 8;
  static constexpr int kPiece = kRows * kRowBytes / 32 < 16 ? kRows * kRowBytes / 32 : 16;
  static constexpr int kCount = kRows * kRowBytes / 32 / kPiece;
  static constexpr int kOfRow = kRowBytes / kPiece;
  static constexpr int kChunks = kPiece / kBits;  // of a tile that a piece becomes
};

// Words of a warp on their way from a page to a tile; 8-bit codes take the most.
template <int kDim, int kRows>
struct Words {
  uint32_t word[kRows * kDim / 128];
};

// Asks for the codes of kRows slots of a page, `from` those of the first. Behind slot `last` anything may lie: that one
// is read again in their place.
template <int kDim, int kRows, int kBits>
KVC_DEVICE void fetch_codes(Words<kDim, kRows>& words, const uint8_t* from, int last) {
  using P = Pieces<kDim, kRows, kBits>;
  const int lane = renewed(thread_lane());
  KVC_UNROLL
  for (int i = 0; i < P::kCount; i++) {
    const int c = lane + 32 * i;
    const uint8_t* at = from + least(c / P::kOfRow, last) * P::kRowBytes + c % P::kOfRow * P::kPiece;
    if (P::kPiece == 8) {
      const uint2 x = *reinterpret_cast<const uint2*>(at);
      words.word[2 * i] = x.x, words.word[2 * i + 1] = x.y;
    } else {
      const uint4 x = *reinterpret_cast<const uint4*>(at);
      words.word[4 * i] = x.x, words.word[4 * i + 1] = x.y, words.word[4 * i + 2] = x.z, words.word[4 * i + 3] = x.w;
    }
  }
}

// Puts what fetch_codes brought into kRows slots of a tile, which begins at a multiple of eight.
template <int kDim, int kRows, int kBits>
KVC_DEVICE void spread_codes(uint4* tile, const Words<kDim, kRows>& words) {
  using P = Pieces<kDim, kRows, kBits>;
  const int lane = renewed(thread_lane());
  const int at = tile_at<kDim>(lane / P::kOfRow, lane % P::kOfRow * P::kChunks);
  KVC_UNROLL
  for (int i = 0; i < P::kCount; i++) {
    const int more = i * (32 / P::kOfRow);  // slots from the first piece to this one
    const uint32_t* from = words.word + i * P::kPiece / 4;
    KVC_UNROLL
    for (int j = 0; j < P::kChunks; j++) {
      uint4 x;
      if (kBits == 8) x = codes_to_chunk<8>(from[2 * j], from[2 * j + 1]);
      if (kBits == 4) x = codes_to_chunk<4>(from[j], 0);
      if (kBits == 2) x = codes_to_chunk<2>(from[j / 2], j % 2);
      tile[(at ^ j ^ slot_turn(more)) + more * (kDim / 8)] = x;
    }
  }
}

// Native elements of kRows slots, `stride` bytes apart, straight into a tile. They are there after copies_done().
template <int kDim, int kRows>
KVC_DEVICE void copy_slots(uint4* tile, const uint8_t* from, int stride, int last) {
  const int lane = renewed(thread_lane());
  const int at = tile_at<kDim>(lane / (kDim / 8), lane % (kDim / 8));
  KVC_UNROLL
  for (int i = 0; i < kRows * kDim / 256; i++) {
    const int more = i * (256 / kDim);  // slots from the first chunk to this one
    copy_async(tile + ((at ^ slot_turn(more)) + more * (kDim / 8)),
               from + least(lane / (kDim / 8) + more, last) * stride + lane % (kDim / 8) * 16);
  }
}

// What dot products are multiplied with, and what `capped` makes of that: logits in powers of two.
KVC_DEVICE float dot_factor(float scale, float softcap) {
  return softcap > 0.f ? 2.f * kLog2E * scale / softcap : kLog2E * scale;
}
KVC_DEVICE float capped(float x, float softcap) {  // softcap * tanh(x / (2 log2 e))
  return kLog2E * softcap - 2.f * kLog2E * softcap * fast_reciprocal(fast_exp2(x) + 1.f);
}

struct SlotParams {  // of one slot, for logits and probabilities
  float4 key;    // scale, offset, logarithm of the value's scale (-infinity: not there), position as bits
  float2 value;  // what one over the value's scale is, and its offset in that measure
};

struct Place {  // slots of a section that a warp brings, none of them beyond a page
  const uint8_t* page;
  int slot, inside;  // the first: of the section, of the page
  int last;          // of them that is in use
};

// All that the queries of a KV head may meet: the tiers, the tail and the new tokens. The pointers are those of the
// arguments, whichever operation they came with.
template <int kDim>
struct Sections {
  const KvcLayout& layout;
  const KvcRows& rows;
  const KvcTail& tail;
  const void *k, *v;  // new tokens
  int64_t k_b, k_h, k_t, v_b, v_h, v_t;
  const uint8_t* key_valid;
  int n_k, key_position, position_field;
  bool positions;     // whether they matter
  int b, h;
  int64_t row;

  KVC_DEVICE_METHOD int length(int section) const {
    if (section == kFresh) return n_k;
    if (section == kTail) return tail.capacity ? tail.length[b] : 0;
    return section < layout.n_tiers ? rows.length[section][row] : 0;
  }
  KVC_DEVICE_METHOD int bits(int section, bool key) const {  // 0 = native
    if (section >= KVC_MAX_TIERS) return 0;
    return key ? layout.tier[section].key_bits : layout.tier[section].value_bits;
  }
  KVC_DEVICE_METHOD bool rotated(int section) const {
    return section < KVC_MAX_TIERS && layout.tier[section].rotate_keys;
  }
  // Whether slots of a section have positions; one without is always old enough and never too old.
  KVC_DEVICE_METHOD bool placed(int section) const { return section >= KVC_MAX_TIERS || position_field >= 0; }

  // Where slots first .. first + kRows of a section lie; behind its end the last ones come again.
  template <int kRows>
  KVC_DEVICE_METHOD Place find(int section, int length, int first) const {
    Place at;
    at.slot = least(first, (length - 1) / kRows * kRows);
    at.last = least(kRows, length - at.slot) - 1;
    at.page = nullptr;
    at.inside = 0;
    if (section < KVC_MAX_TIERS) {
      at.page = page_of(layout, rows, section, row, at.slot);
      at.inside = at.slot % layout.tier[section].slots;
    }
    return at;
  }
  KVC_DEVICE_METHOD const uint8_t* address(int section, const Place& at, bool key) const {
    if (section == kFresh) {
      const int64_t index = key ? b * k_b + h * k_h + at.slot * k_t : b * v_b + h * v_h + at.slot * v_t;
      return static_cast<const uint8_t*>(key ? k : v) + 2 * index;
    }
    if (section == kTail) {
      return static_cast<const uint8_t*>(key ? tail.k : tail.v) + 2 * (row * tail.capacity + at.slot) * kDim;
    }
    const KvcTier& tier = layout.tier[section];
    const int n = bits(section, key);
    return at.page + (key ? tier.keys : tier.values) + at.inside * (n ? kDim * n / 8 : 2 * kDim);
  }
  // Asks for kRows slots' keys or values: codes into registers, native elements straight into the tile.
  template <int kRows>
  KVC_DEVICE_METHOD void fetch(Words<kDim, kRows>& words, uint4* tile, int section, const Place& at, bool key) const {
    const uint8_t* from = address(section, at, key);
    switch (bits(section, key)) {
      case 8: fetch_codes<kDim, kRows, 8>(words, from, at.last); break;
      case 4: fetch_codes<kDim, kRows, 4>(words, from, at.last); break;
      case 2: fetch_codes<kDim, kRows, 2>(words, from, at.last); break;
      default:
        copy_slots<kDim, kRows>(tile, from, 2 * static_cast<int>(section == kFresh ? key ? k_t : v_t : kDim), at.last);
    }
  }
  template <int kRows>
  KVC_DEVICE_METHOD void spread(const Words<kDim, kRows>& words, uint4* tile, int section, bool key) const {
    switch (bits(section, key)) {
      case 8: spread_codes<kDim, kRows, 8>(tile, words); break;
      case 4: spread_codes<kDim, kRows, 4>(tile, words); break;
      case 2: spread_codes<kDim, kRows, 2>(tile, words); break;
    }
  }

  struct Raw {  // what there is to know of a slot, as it lies in memory
    uint32_t key, value;  // fp16 scale, then offset
    int position;
    bool valid;
  };
  // Of the slot `lane` of those at a place.
  KVC_DEVICE_METHOD Raw fetch_params(int section, const Place& at, int lane) const {
    Raw raw{0, 0, 0, true};
    const int slot = at.slot + least(lane, at.last);
    if (section == kFresh) {
      raw.position = key_position + slot;
      raw.valid = !key_valid || key_valid[static_cast<int64_t>(b) * n_k + slot];
    } else if (section == kTail) {
      if (positions) raw.position = tail.position[b * tail.capacity + slot];
    } else {
      const KvcTier& tier = layout.tier[section];
      const int inside = at.inside + least(lane, at.last);
      if (tier.key_bits) {
        const uint16_t* keys = reinterpret_cast<const uint16_t*>(at.page + tier.key_params) + inside;
        const uint16_t* values = reinterpret_cast<const uint16_t*>(at.page + tier.value_params) + inside;
        raw.key = keys[0] | static_cast<uint32_t>(keys[tier.slots]) << 16;
        raw.value = values[0] | static_cast<uint32_t>(values[tier.slots]) << 16;
      }
      if (positions && position_field >= 0) {
        raw.position = reinterpret_cast<const int32_t*>(at.page + tier.fields)[position_field * tier.slots + inside];
      }
    }
    return raw;
  }
  // `factor` is on the dot products; `there`: the slot is in use.
  KVC_DEVICE_METHOD SlotParams params(int section, const Raw& raw, float factor, bool there) const {
    SlotParams p{float4{0.f, 0.f, -infinity(), bits_float(raw.position)}, float2{0.f, 0.f}};
    if (!there || !raw.valid) return p;
    p.key.x = factor, p.key.z = 0.f, p.value.x = 1.f;
    if (bits(section, true)) {
      p.key.x = half_to_float(static_cast<uint16_t>(raw.key)) * factor;
      p.key.y = half_to_float(static_cast<uint16_t>(raw.key >> 16)) * factor + middle_of(bits(section, true)) * p.key.x;
      const float own = half_to_float(static_cast<uint16_t>(raw.value)), scale = own > kLeastScale ? own : kLeastScale;
      p.key.z = fast_log2(scale);
      p.value.x = 1.f / scale;
      p.value.y = half_to_float(static_cast<uint16_t>(raw.value >> 16)) * p.value.x + middle_of(bits(section, false));
    }
    return p;
  }
};

// A row of queries as operands of m16n8k16: word 2 * step + half of lane t is of dimensions 16 * step + 8 * half + 2t and
// the next; pair(i) gives these two, put(i, word) takes the word. Returns the sum of the row as rounded to fp16.
template <int kDim, class Pair, class Put>
KVC_DEVICE float pack_query(bool as_bfloat, const Pair& pair, const Put& put) {
  float sum = 0.f;
  KVC_UNROLL
  for (int i = 0; i < kDim / 8; i++) {
    const float2 x = pair(i);
    const uint32_t word = pack_halves(x.x, x.y);
    sum += half_to_float(static_cast<uint16_t>(word)) + half_to_float(static_cast<uint16_t>(word >> 16));
    put(i, as_bfloat ? pack_bfloats(x.x, x.y) : word);
  }
  KVC_UNROLL
  for (int bit = 1; bit < 4; bit *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
  return sum;
}

template <bool kBfloat>
KVC_DEVICE float2 unpack_pair(uint32_t pair) {
  if (kBfloat) return float2{bits_float(pair << 16), bits_float(pair & 0xffff0000u)};
  return float2{half_to_float(static_cast<uint16_t>(pair)), half_to_float(static_cast<uint16_t>(pair >> 16))};
}

// The row at `from` (null: zeros), rotated where wanted, by the four lanes t that have it in their registers.
template <int kDim, bool kBfloat, class Put>
KVC_DEVICE float stage_query(const uint16_t* from, bool rotated, bool as_bfloat, const Put& put) {
  constexpr int n = kDim / 4;
  const int t = thread_lane() & 3;
  float x[n];
  KVC_UNROLL
  for (int i = 0; i < n / 2; i++) {
    const float2 pair = unpack_pair<kBfloat>(from ? reinterpret_cast<const uint32_t*>(from)[4 * i + t] : 0);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
  if (rotated) {  // the additions of `rotate`, in the same order: within a pair, over lanes, over registers
    KVC_UNROLL
    for (int half = 1; half < n; half *= 2) {
      KVC_UNROLL
      for (int i = 0; i < n; i++) {
        if (i & half) continue;
        const float a = x[i], b = x[i + half];
        x[i] = a + b, x[i + half] = a - b;
      }
      if (half > 1) continue;
      KVC_UNROLL
      for (int bit = 1; bit < 4; bit *= 2) {
        KVC_UNROLL
        for (int i = 0; i < n; i++) {
          const float other = __shfl_xor_sync(kAllLanes, x[i], bit);
          x[i] = t & bit ? other - x[i] : x[i] + other;
        }
      }
    }
    constexpr float norm = kDim == 64 ? 0.125f : 0.088388347648318447f;
    KVC_UNROLL
    for (int i = 0; i < n; i++) x[i] *= norm;
  }
  return pack_query<kDim>(as_bfloat, [&](int i) { return float2{x[2 * i], x[2 * i + 1]}; }, put);
}

// Where there are no registers for that: sixteen rows at from(m), in shared memory, by the whole thread block.
template <int kDim, bool kBfloat, class From>
KVC_DEVICE void spread_queries(float (*rows)[kDim], bool rotated, const From& from) {
  __syncthreads();  // what was there is done with
  KVC_UNROLL_BY(1)
  for (int m = 0; m < 16; m++) {
    const uint16_t* row = from(m);
    for (int i = threadIdx.x; i < kDim / 2; i += kTileThreads) {
      const float2 pair = unpack_pair<kBfloat>(row ? reinterpret_cast<const uint32_t*>(row)[i] : 0);
      rows[m][2 * i] = pair.x, rows[m][2 * i + 1] = pair.y;
    }
  }
  __syncthreads();
  for (int m = thread_warp(); m < 16 && rotated; m += kTileThreads / 32) rotate(rows[m], kDim, kDim);
  __syncthreads();
}
template <int kDim, class Put>
KVC_DEVICE float stage_spread_query(const float* row, bool as_bfloat, const Put& put) {
  const float2* pairs = reinterpret_cast<const float2*>(row) + (thread_lane() & 3);
  return pack_query<kDim>(as_bfloat, [&](int i) { return pairs[4 * i]; }, put);
}

// Operands for 16 slots x 16 dimensions of keys (`step`-th) out of a tile that begins with them: two for each eight
// slots.
template <int kDim>
KVC_DEVICE void key_operands(uint32_t (&b)[4], const uint4* tile, int step, int lane) {
  load_matrices(b, tile + (tile_at<kDim>((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1) ^ chunk_turn(2 * step)));
}
// The same of values: two for each eight dimensions.
template <int kDim>
KVC_DEVICE void value_operands(uint32_t (&b)[4], const uint4* tile, int step, int lane) {
  load_matrices_transposed(b, tile + (tile_at<kDim>(lane & 15, lane >> 4) ^ chunk_turn(2 * step)));
}
#endif
