// One decoding step on tensor cores, for head_dim 64, 128 or 256 in fp16 or bf16: append, attend to every tier and the
// tail, merge, all in one launch.
//
// Up to 16 query heads of a KV head are the 16 rows of m16n8k16. A warp takes 16 slots at a time. Codes become operands
// in registers: lanes load words of a slot's row as they lie, so a fragment holds the head dimensions in an order of
// its own; queries are put in the same order once per tier (`stage_queries`), and outputs are put back at the end.
// Codes stay integers (exact in fp16); a key's scale and offset are applied to the logit, a value's to the probability.
//
// Work is a flat list of blocks of 16 slots over all rows; every thread block takes an equal part of it, wherever rows
// begin and end. Rows that several thread blocks share are merged by whichever of them finishes last.
//
// Compiled once for each head_dim, KVC_HEAD_DIM.
#include "pages.cuh"

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kHeads = 16;       // query heads handled together
// Warps that take the same slots and share the dimensions of the output: 256 of them for 16 heads are 128 registers.
template <int kDim>
constexpr int kShare = kDim > 128 ? 2 : 1;
constexpr int kNative = 16;      // bits of a native element
constexpr int kLeastBlocks = 8;  // of 16 slots, per thread block: less is not worth merging
constexpr float kLowest = -1e30f;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLeastScale = 5.9604644775390625e-8f;  // 2^-24, the least fp16 above zero

constexpr uint32_t kHalf1024 = 0x64006400u;  // 1024 in both halves: its low mantissa bits take a code as it is

// Codes that lie at bit 2 * kShift of both halves -> (code - kMiddle) in fp16, exactly: 1024 + 4^kShift * code, divided
// and brought down by one instruction.
template <int kShift, int kMiddle>
KVC_DEVICE uint32_t codes_to_halves(uint32_t masked) {
  constexpr uint32_t both = 0x00010001u;
  constexpr uint32_t down = (static_cast<uint32_t>(25 - 2 * kShift) << 10) + (kMiddle << 2 * kShift);
  const uint32_t biased = masked | kHalf1024;
  if (kShift == 0) return half2_subtract(biased, down * both);
  return half2_fma(biased, (static_cast<uint32_t>(15 - 2 * kShift) << 10) * both, (down | 0x8000u) * both);
}

// Codes r and r + 16 / kBits of a word, as a register of two fp16; a native word is one already.
template <int kBits, int r>
KVC_DEVICE uint32_t key_pair(uint32_t word) {
  if (kBits == kNative) return word;
  if (kBits == 8) return half2_subtract(select_bytes(word, 0x64646464u, r ? 0x4341 : 0x4240), kHalf1024);
  if (kBits == 4) return codes_to_halves<r % 2 * 2, 0>((r < 2 ? word : word >> 8) & (r % 2 ? 0x00f000f0u : 0x000f000fu));
  return codes_to_halves<r % 4, 0>((r < 4 ? word : word >> 8) & (0x00030003u << 2 * (r % 4)));
}

// What is taken off value codes, so that rounding a probability costs no more than it would with the values themselves.
template <int kBits>
constexpr int kMiddle = kBits == 8 ? 128 : kBits == 4 ? 8 : kBits == 2 ? 2 : 0;

// Code c of two words of different slots, less the middle, as a register of two fp16 (native: element c).
template <int kBits, int c>
KVC_DEVICE uint32_t value_pair(uint32_t a, uint32_t b) {
  if (kBits == kNative) return select_bytes(a, b, c ? 0x7632 : 0x5410);
  constexpr int byte = c * kBits / 8;
  const uint32_t both = select_bytes(a, b, byte | (byte + 4) << 8);  // code bytes in bits 0..7 and 16..23
  if (kBits == 8) return codes_to_halves<0, kMiddle<kBits>>(both & 0x00ff00ffu);
  if (kBits == 4) return codes_to_halves<c % 2 * 2, kMiddle<kBits>>(both & (c % 2 ? 0x00f000f0u : 0x000f000fu));
  return codes_to_halves<c % 4, kMiddle<kBits>>(both & (0x00030003u << 2 * (c % 4)));
}

template <int kBytes>
KVC_DEVICE void load_bytes(uint32_t* to, const uint8_t* from) {
  if (kBytes == 2) to[0] = *reinterpret_cast<const uint16_t*>(from);
  if (kBytes == 4) to[0] = *reinterpret_cast<const uint32_t*>(from);
  if (kBytes == 8) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    to[0] = x.x, to[1] = x.y;
  }
  if (kBytes >= 16) {
    KVC_UNROLL
    for (int i = 0; i < kBytes / 16; i++) {
      const uint4 x = reinterpret_cast<const uint4*>(from)[i];
      to[4 * i] = x.x, to[4 * i + 1] = x.y, to[4 * i + 2] = x.z, to[4 * i + 3] = x.w;
    }
  }
}

// How the row of a slot is spread over the four lanes t that hold a column of keys.
template <int kDim, int kBits>
struct KeyRow {
  static constexpr int kBytes = kDim * kBits / 8;
  static constexpr int kPiece = kBytes / 4 < 16 ? kBytes / 4 : 16;  // bytes a lane loads at once
  static constexpr int kWords = kBytes / 16;                        // of one lane
  static constexpr int kPairs = 16 / kBits;                         // registers that a word becomes
  // Byte of the row where word w of lane t lies: four pieces next to each other, then the next four.
  KVC_DEVICE_METHOD static int offset(int t, int w) {
    return 4 * w / kPiece * 4 * kPiece + t * kPiece + 4 * w % kPiece;
  }
};

template <int kDim, int kBits>
struct ValueRow {  // over the eight lanes g that hold a row of values: each has kDim / 8 dimensions running
  static constexpr int kBytes = kDim * kBits / 8;
  static constexpr int kPiece = kBytes / 8 / kShare<kDim>;  // of one of the warps that share them
  static constexpr int kWords = kPiece < 4 ? 1 : kPiece / 4;
  static constexpr int kPerWord = 32 / kBits;
};

struct Where {  // 16 slots of a section
  const uint8_t *k, *v;
  const uint16_t* key_params;  // null in native sections
  const int32_t* position;     // null where positions do not matter
  int value_params;            // from those of keys to those of values
  int param_stride;            // from scales to offsets
  int n;                       // slots in use, 1 to 16
  int fresh;                   // which of them is the new token; -1 = none
};

template <int kDim, int kKeyBits, int kValueBits>
struct Loaded {
  static constexpr int kKeyWords = KeyRow<kDim, kKeyBits>::kWords;
  static constexpr int kValueWords = ValueRow<kDim, kValueBits>::kWords;
  // Whether there are registers for the keys of a block and the values of another.
  static constexpr bool kBoth = kDim <= 128;
  uint32_t k[2][kKeyWords];    // slots g and g + 8
  uint32_t v[4][kValueWords];  // slots 2t, 2t + 1, 2t + 8, 2t + 9
  uint32_t key_scale[2], key_offset[2], value_scale[2], value_offset[2];  // fp16 pairs of slots 2t and 2t + 8

  KVC_DEVICE_METHOD void load_keys(const Where& at, int g, int t) {
    using Key = KeyRow<kDim, kKeyBits>;
    KVC_UNROLL
    for (int i = 0; i < 2; i++) {
      // Behind the last slot in use anything may lie: the last one is read again and then not counted.
      const uint8_t* row = at.k + least(8 * i + g, at.n - 1) * Key::kBytes;
      KVC_UNROLL
      for (int w = 0; w < kKeyWords; w += Key::kPiece / 4) {
        load_bytes<Key::kPiece>(&k[i][w], row + Key::offset(t, w));
      }
    }
  }
  KVC_DEVICE_METHOD void load_values(const Where& at, int g, int t) {
    using Value = ValueRow<kDim, kValueBits>;
    KVC_UNROLL
    for (int i = 0; i < 4; i++) {
      const uint8_t* row = at.v + least(2 * t + i % 2 + i / 2 * 8, at.n - 1) * Value::kBytes;
      load_bytes<Value::kPiece>(v[i], row + (g * kShare<kDim> + thread_warp() % kShare<kDim>) * Value::kPiece);
    }
  }
  KVC_DEVICE_METHOD void load_params(const Where& at, int t) {
    KVC_UNROLL
    for (int i = 0; i < 2 && kKeyBits != kNative; i++) {
      const uint16_t *key = at.key_params + 2 * t + 8 * i, *value = key + at.value_params;
      key_scale[i] = *reinterpret_cast<const uint32_t*>(key);
      key_offset[i] = *reinterpret_cast<const uint32_t*>(key + at.param_stride);
      value_scale[i] = *reinterpret_cast<const uint32_t*>(value);
      value_offset[i] = *reinterpret_cast<const uint32_t*>(value + at.param_stride);
    }
  }
};

KVC_DEVICE float half_of_pair(uint32_t pair, int which) {
  return half_to_float(static_cast<uint16_t>(which ? pair >> 16 : pair));
}

// Loops over compile-time numbers, so that byte selectors and masks are constants.
template <int kFrom, int kTo>
struct Repeat {
  template <class Body>
  KVC_DEVICE_METHOD static void run(const Body& body) {
    body.template step<kFrom>();
    Repeat<kFrom + 1, kTo>::run(body);
  }
};
template <int kTo>
struct Repeat<kTo, kTo> {
  template <class Body>
  KVC_DEVICE_METHOD static void run(const Body&) {}
};

template <bool kBfloat>
KVC_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (kBfloat) mma_bf16(c, a, b0, b1);
  else mma_f16(c, a, b0, b1);
}

template <int kDim, int kKeyBits, int kValueBits, bool kBfloat>
struct Logits {  // one k-step of queries x keys
  const Loaded<kDim, kKeyBits, kValueBits>& words;
  const uint4* queries;  // [kDim / 16][32]
  float (*c)[4];

  template <int kStep>
  KVC_DEVICE_METHOD void step() const {
    constexpr int pairs = KeyRow<kDim, kKeyBits>::kPairs, p0 = 2 * kStep, p1 = 2 * kStep + 1;
    const uint4 q = queries[kStep * 32 + thread_lane()];
    const uint32_t a[4] = {q.x, q.y, q.z, q.w};
    KVC_UNROLL
    for (int i = 0; i < 2; i++) {
      multiply<kBfloat && kKeyBits == kNative>(c[i], a, key_pair<kKeyBits, p0 % pairs>(words.k[i][p0 / pairs]),
                                               key_pair<kKeyBits, p1 % pairs>(words.k[i][p1 / pairs]));
    }
  }
};

template <int kDim, int kKeyBits, int kValueBits, bool kBfloat>
struct Outputs {  // eight dimensions of probabilities x values
  const Loaded<kDim, kKeyBits, kValueBits>& words;
  const uint32_t (&p)[4];
  float (*o)[4];

  template <int kTile>
  KVC_DEVICE_METHOD void step() const {
    constexpr int per_word = ValueRow<kDim, kValueBits>::kPerWord, c = kTile % per_word;
    constexpr int w = kTile / per_word;
    multiply<kBfloat && kValueBits == kNative>(o[kTile], p, value_pair<kValueBits, c>(words.v[0][w], words.v[1][w]),
                                               value_pair<kValueBits, c>(words.v[2][w], words.v[3][w]));
  }
};

// Running softmax of one warp. Lane (g, t) holds heads g and g + 8, and of the output columns 2t and 2t + 1 of each
// tile of eight: dimension column * kDim / 8 + tile, the tiles counting on from warp to warp that share them.
template <int kDim>
struct Running {
  static constexpr int kTiles = kDim / 8 / kShare<kDim>;
  float o[kTiles][4];
  float top[2], sum[2], offset[2];  // offset: sum of probability x value offset, the same for every dimension

  KVC_DEVICE_METHOD void clear() {
    KVC_UNROLL
    for (int i = 0; i < kTiles; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    KVC_UNROLL
    for (int i = 0; i < 2; i++) top[i] = kLowest, sum[i] = offset[i] = 0.f;
  }
};

struct Step {  // what a warp needs to know of the row it works on
  float factor;   // on the dot products: to powers of two, or to the argument of tanh
  float softcap;  // in powers of two; 0 = none
  int window, position;
  const uint4* queries;   // fragments
  const float* query_sum; // [kHeads] sums over the dimensions, of the queries as rounded
};

// Attends to the 16 slots whose words are in `words`. As soon as some of these have served, those of `next` are asked
// for in their place, where there are `more`, so that loads are always under way. Without room for `kBoth`, values take
// the place of the keys they belong to.
template <int kDim, int kKeyBits, int kValueBits, bool kBfloat>
KVC_DEVICE void attend(Running<kDim>& run, Loaded<kDim, kKeyBits, kValueBits>& words, const Where& at,
                       const Where& next, bool more, const Step& step) {
  using Words = Loaded<kDim, kKeyBits, kValueBits>;
  const int lane = thread_lane(), g = lane >> 2, t = lane & 3;
  const float query_sum[2] = {step.query_sum[g], step.query_sum[g + 8]};
  float c[2][4];
  KVC_UNROLL
  for (int i = 0; i < 2; i++) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.f;
  const Logits<kDim, kKeyBits, kValueBits, kBfloat> logits{words, step.queries, c};
  Repeat<0, kDim / 16>::run(logits);
  if (!Words::kBoth) words.load_values(at, g, t);  // in the registers that the keys leave
  if (more) words.load_keys(next, g, t);

  float high[2] = {run.top[0], run.top[1]};
  float scale[2][2], zero[2][2];  // of values
  KVC_UNROLL
  for (int i = 0; i < 2; i++) {
    KVC_UNROLL
    for (int e = 0; e < 2; e++) {
      const float key_scale = kKeyBits == kNative ? step.factor : half_of_pair(words.key_scale[i], e) * step.factor;
      const float key_zero = kKeyBits == kNative ? 0.f : half_of_pair(words.key_offset[i], e) * step.factor;
      KVC_UNROLL
      for (int m = 0; m < 2; m++) {
        c[i][2 * m + e] *= key_scale;
        if (kKeyBits != kNative) c[i][2 * m + e] += query_sum[m] * key_zero;
      }
      if (kValueBits != kNative) {
        scale[i][e] = half_of_pair(words.value_scale[i], e);
        zero[i][e] = half_of_pair(words.value_offset[i], e) + kMiddle<kValueBits> * scale[i][e];
      }
    }
  }
  if (more) words.load_params(next, t);
  if (step.softcap > 0.f) {
    KVC_UNROLL
    for (int i = 0; i < 8; i++) c[i / 4][i % 4] = step.softcap * tanhf(c[i / 4][i % 4]);
  }
  if (at.n < kBlock || at.position) {
    KVC_UNROLL
    for (int i = 0; i < 2; i++) {
      KVC_UNROLL
      for (int e = 0; e < 2; e++) {
        const int slot = 8 * i + 2 * t + e;
        bool seen = slot < at.n;
        if (at.position) {
          const int position = slot == at.fresh ? step.position : at.position[least(slot, at.n - 1)];
          seen = seen && step.position - position < step.window;
        }
        // Behind the last slot anything may lie in place of scales, NaN too.
        if (slot >= at.n && kValueBits != kNative) scale[i][e] = zero[i][e] = 0.f;
        if (!seen) c[i][e] = c[i][2 + e] = -infinity();
      }
    }
  }
  KVC_UNROLL
  for (int i = 0; i < 2; i++) {
    KVC_UNROLL
    for (int e = 0; e < 2; e++) {
      // The reference point includes the value's scale, so that scaled probabilities use the range of fp16 well.
      float level = 0.f;
      if (kValueBits != kNative) level = fast_log2(scale[i][e] > kLeastScale ? scale[i][e] : kLeastScale);
      KVC_UNROLL
      for (int m = 0; m < 2; m++) {
        const float x = c[i][2 * m + e] + level;
        high[m] = x > high[m] ? x : high[m];
      }
    }
  }
  bool moved = false;
  float fade[2];
  KVC_UNROLL
  for (int m = 0; m < 2; m++) {
    KVC_UNROLL
    for (int bit = 1; bit < 4; bit *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, high[m], bit);
      high[m] = other > high[m] ? other : high[m];
    }
    moved = moved || high[m] > run.top[m];
    fade[m] = fast_exp2(run.top[m] - high[m]);
    run.top[m] = high[m];
  }
  if (__any_sync(kAllLanes, moved)) {
    KVC_UNROLL
    for (int m = 0; m < 2; m++) run.sum[m] *= fade[m], run.offset[m] *= fade[m];
    KVC_UNROLL
    for (int j = 0; j < Running<kDim>::kTiles; j++) {
      KVC_UNROLL
      for (int e = 0; e < 4; e++) run.o[j][e] *= fade[e / 2];
    }
  }
  uint32_t p[4];
  KVC_UNROLL
  for (int i = 0; i < 2; i++) {
    KVC_UNROLL
    for (int m = 0; m < 2; m++) {
      float p0 = fast_exp2(c[i][2 * m] - high[m]), p1 = fast_exp2(c[i][2 * m + 1] - high[m]);
      run.sum[m] += p0 + p1;
      if (kValueBits != kNative) {
        run.offset[m] += p0 * zero[i][0] + p1 * zero[i][1];
        p0 *= scale[i][0], p1 *= scale[i][1];
      }
      p[2 * i + m] = kBfloat && kValueBits == kNative ? pack_bfloats(p0, p1) : pack_halves(p0, p1);
    }
  }
  const Outputs<kDim, kKeyBits, kValueBits, kBfloat> outputs{words, p, run.o};
  Repeat<0, Running<kDim>::kTiles>::run(outputs);
  if (more) words.load_values(next, g, t);
}

template <int kDim>
struct Shared {
  float q[kHeads][kDim];            // queries; outputs when the row is finished
  uint4 queries[kDim / 16][32];     // fragments for the tier at hand
  float query_sum[kHeads];
  float top[kWarps][kHeads], sum[kWarps][kHeads];
  int scan[kWarps];
  int64_t row, begin;               // found by locate
  int last;
};

struct Row {  // a KV head of a sequence, and 16 of its query heads
  int64_t row;
  int b, h, first_head, heads;
  int lengths[KVC_MAX_TIERS + 1];   // the tail is the last
  bool valid, append;
};

struct Task {
  const KvcLayout& layout;
  const KvcDecode& a;
  int head_tiles;
  int position;  // of the new token

  KVC_DEVICE_METHOD Row row(int64_t index) const {
    Row r;
    r.row = index / head_tiles;
    r.b = static_cast<int>(r.row / a.kv_heads), r.h = static_cast<int>(r.row % a.kv_heads);
    r.first_head = static_cast<int>(index % head_tiles) * kHeads;
    r.heads = least(kHeads, a.group - r.first_head);
    r.valid = !a.valid || a.valid[r.b];
    KVC_UNROLL
    for (int t = 0; t < KVC_MAX_TIERS; t++) r.lengths[t] = r.valid && t < layout.n_tiers ? a.rows.length[t][r.row] : 0;
    const int tail = a.tail.capacity ? a.tail.length[r.b] : 0;
    r.append = a.append && r.valid && tail < a.tail.capacity;  // the caller has checked; never write outside
    r.lengths[KVC_MAX_TIERS] = r.valid ? tail + r.append : 0;
    return r;
  }
  KVC_DEVICE_METHOD int blocks(const Row& r) const {  // at least one, so that every row is visited
    int n = 0;
    KVC_UNROLL
    for (int t = 0; t <= KVC_MAX_TIERS; t++) n += (r.lengths[t] + kBlock - 1) / kBlock;
    return n > 0 ? n : 1;
  }
};

// Blocks of rows 0 .. rows; where `target` is given, also the row it falls into and where that row begins.
template <int kDim>
KVC_DEVICE int64_t count_blocks(const Task& task, int64_t rows, int64_t target, Shared<kDim>& shared) {
  int64_t before = 0;
  for (int64_t first = 0; first < rows; first += kThreads) {
    const int64_t index = first + threadIdx.x;
    const int mine = index < rows ? task.blocks(task.row(index)) : 0;
    int running = mine;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_sync(kAllLanes, running, thread_lane() - step);
      if (thread_lane() >= step) running += other;
    }
    if (thread_lane() == 31) shared.scan[thread_warp()] = running;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < kWarps; w++) {
      if (w < thread_warp()) running += shared.scan[w];
      all += shared.scan[w];
    }
    const int64_t end = before + running;
    if (mine && target >= end - mine && target < end) shared.row = index, shared.begin = end - mine;
    before += all;
    __syncthreads();
  }
  return before;
}

// Puts the queries in the order of a tier's keys, as operands of the tensor cores.
template <int kDim, int kBits, bool kBfloat>
KVC_DEVICE void stage_queries(Shared<kDim>& shared) {
  using Key = KeyRow<kDim, kBits>;
  for (int i = threadIdx.x; i < kDim / 16 * 32; i += kThreads) {
    const int step = i / 32, g = i % 32 >> 2, t = i & 3;
    uint32_t words[4];
    KVC_UNROLL
    for (int half = 0; half < 2; half++) {
      const int pair = 2 * step + half;
      const int d = Key::offset(t, pair / Key::kPairs) * 8 / kBits + pair % Key::kPairs;
      KVC_UNROLL
      for (int m = 0; m < 2; m++) {
        const float x = shared.q[g + 8 * m][d], y = shared.q[g + 8 * m][d + 16 / kBits];
        words[2 * half + m] = kBfloat && kBits == kNative ? pack_bfloats(x, y) : pack_halves(x, y);
      }
    }
    shared.queries[step][i % 32] = uint4{words[0], words[1], words[2], words[3]};
  }
  for (int m = thread_warp(); m < kHeads; m += kWarps) {
    float sum = 0.f;
    for (int d = thread_lane(); d < kDim; d += 32) sum += half_to_float(float_to_half(shared.q[m][d]));
    for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    if (thread_lane() == 0) shared.query_sum[m] = sum;
  }
  __syncthreads();
}

// The way of a warp over the blocks of a tier, or of the tail (tier = KVC_MAX_TIERS), a step ahead with page ids.
template <int kDim>
struct Walk {
  const Task& task;
  const Row& r;
  int tier, slots;         // slots of a page
  int page, inside, left;  // of the block: its page, its first slot there, slots from there to the end
  int32_t id;              // of that page

  KVC_DEVICE_METHOD Walk(const Task& task, const Row& r, int tier, int block) : task(task), r(r), tier(tier) {
    slots = tier == KVC_MAX_TIERS ? 0x7fffffff : task.layout.tier[tier].slots;
    page = block * kBlock / slots;
    inside = block * kBlock - page * slots;
    left = r.lengths[tier] - block * kBlock;
    find_page();
  }
  KVC_DEVICE_METHOD void find_page() {
    const KvcRows& rows = task.a.rows;
    id = tier < KVC_MAX_TIERS && left > 0 ? rows.table[tier][r.row * rows.table_stride[tier] + page] : 0;
  }
  KVC_DEVICE_METHOD void advance(int blocks) {
    left -= blocks * kBlock;
    inside += blocks * kBlock;
    while (inside >= slots) inside -= slots, page++;
    find_page();
  }
  KVC_DEVICE_METHOD Where here() const {
    const KvcDecode& a = task.a;
    Where at;
    at.n = least(kBlock, left);
    at.fresh = -1;
    at.key_params = nullptr;
    at.position = nullptr;
    at.value_params = at.param_stride = 0;
    if (tier == KVC_MAX_TIERS) {
      const int64_t first = r.row * a.tail.capacity + inside;
      at.k = static_cast<const uint8_t*>(a.tail.k) + first * kDim * 2;
      at.v = static_cast<const uint8_t*>(a.tail.v) + first * kDim * 2;
      if (r.append && left <= kBlock) at.fresh = at.n - 1;
      if (a.window > 0) at.position = a.tail.position + r.b * a.tail.capacity + inside;
      return at;
    }
    const KvcTier& t = task.layout.tier[tier];
    const uint8_t* base = page_address(a.rows.slabs, a.rows.slab_shift, task.layout.page_bytes, id);
    at.k = base + t.keys + inside * (t.key_bits ? kDim * t.key_bits / 8 : kDim * 2);
    at.v = base + t.values + inside * (t.key_bits ? kDim * t.value_bits / 8 : kDim * 2);
    if (t.key_bits) {
      at.key_params = reinterpret_cast<const uint16_t*>(base + t.key_params) + inside;
      at.value_params = static_cast<int>(t.value_params - t.key_params) / 2;
      at.param_stride = t.slots;
    }
    if (a.window > 0 && a.position_field >= 0) {
      at.position = reinterpret_cast<const int32_t*>(base + t.fields) + a.position_field * t.slots + inside;
    }
    return at;
  }
};

// Blocks from .. until of one tier, the warps taking turns.
template <int kDim, int kKeyBits, int kValueBits, bool kBfloat>
KVC_DEVICE void attend_tier(const Task& task, const Row& r, int tier, int from, int until, Shared<kDim>& shared,
                            const Step& step, Running<kDim>& run) {
  using Words = Loaded<kDim, kKeyBits, kValueBits>;
  constexpr int warps = kWarps / kShare<kDim>;
  const int g = thread_lane() >> 2, t = thread_lane() & 3;
  stage_queries<kDim, kKeyBits, kBfloat>(shared);
  int block = from + thread_warp() / kShare<kDim>;
  if (block < until) {
    Walk<kDim> walk(task, r, tier, block);
    Where at = walk.here();
    Words words;
    if (Words::kBoth) {
      words.load_keys(at, g, t), words.load_params(at, t), words.load_values(at, g, t);
      walk.advance(warps);
    }
    for (; block < until; block += warps) {
      const bool more = Words::kBoth && block + warps < until;
      Where next = at;
      if (more || !Words::kBoth) next = walk.here();
      walk.advance(warps);
      if (!Words::kBoth) at = next, words.load_keys(at, g, t), words.load_params(at, t);
      attend<kDim, kKeyBits, kValueBits, kBfloat>(run, words, at, next, more, step);
      at = next;
    }
  }
  __syncthreads();  // the staged queries are done with
}

template <int kDim, bool kBfloat>
KVC_DEVICE void attend_section(const Task& task, const Row& r, int tier, int from, int until, Shared<kDim>& shared,
                               const Step& step, Running<kDim>& run) {
  const int bits = tier == KVC_MAX_TIERS ? 0 : task.layout.tier[tier].key_bits * 10 + task.layout.tier[tier].value_bits;
#define KVC_TIER(key, value)                                                                       \
  case key % 16 * 10 + value % 16:                                                                 \
    attend_tier<kDim, key, value, kBfloat>(task, r, tier, from, until, shared, step, run); \
    break;
  switch (bits) {
    KVC_TIER(16, 16)
    KVC_TIER(8, 8)
    KVC_TIER(8, 4)
    KVC_TIER(4, 4)
    KVC_TIER(4, 2)
    KVC_TIER(2, 2)
  }
#undef KVC_TIER
}

// Writes the new token of a row to its tail; blocks that work on the same row write the same.
template <int kDim>
KVC_DEVICE void append(const Task& task, const Row& r) {
  const KvcDecode& a = task.a;
  const int64_t slot = r.lengths[KVC_MAX_TIERS] - 1, to = (r.row * a.tail.capacity + slot) * kDim;
  const uint16_t* k = static_cast<const uint16_t*>(a.k) + r.b * a.k_b + r.h * a.k_h;
  const uint16_t* v = static_cast<const uint16_t*>(a.v) + r.b * a.v_b + r.h * a.v_h;
  for (int d = threadIdx.x; d < kDim; d += kThreads) {
    static_cast<uint16_t*>(a.tail.k)[to + d] = k[d];
    static_cast<uint16_t*>(a.tail.v)[to + d] = v[d];
  }
  const int64_t rows = static_cast<int64_t>(a.batch) * a.kv_heads;
  if (a.tail.fields && threadIdx.x < task.layout.n_fields) {
    static_cast<uint32_t*>(a.tail.fields)[(threadIdx.x * rows + r.row) * a.tail.capacity + slot] = 0;
  }
  if (threadIdx.x == 0) a.tail.position[r.b * a.tail.capacity + slot] = task.position;
}

// Joins the warps: sums into shared.q, largest logits and denominators into row 0 of shared.top and shared.sum.
template <int kDim>
KVC_DEVICE void join_warps(Running<kDim>& run, Shared<kDim>& shared) {
  constexpr int warps = kWarps / kShare<kDim>;
  const int warp = thread_warp() / kShare<kDim>, share = thread_warp() % kShare<kDim>;
  const int g = thread_lane() >> 2, t = thread_lane() & 3;
  float fade[2];
  KVC_UNROLL
  for (int m = 0; m < 2; m++) {
    KVC_UNROLL
    for (int bit = 1; bit < 4; bit *= 2) {
      run.sum[m] += __shfl_xor_sync(kAllLanes, run.sum[m], bit);
      run.offset[m] += __shfl_xor_sync(kAllLanes, run.offset[m], bit);
    }
    if (t == 0 && share == 0) shared.top[warp][g + 8 * m] = run.top[m], shared.sum[warp][g + 8 * m] = run.sum[m];
  }
  __syncthreads();
  KVC_UNROLL
  for (int m = 0; m < 2; m++) {
    float top = kLowest;
    for (int w = 0; w < warps; w++) top = shared.top[w][g + 8 * m] > top ? shared.top[w][g + 8 * m] : top;
    fade[m] = fast_exp2(run.top[m] - top);
  }
  for (int w = 0; w < warps; w++) {
    if (warp == w) {
      KVC_UNROLL
      for (int j = 0; j < Running<kDim>::kTiles; j++) {
        KVC_UNROLL
        for (int e = 0; e < 4; e++) {
          const int d = (2 * t + e % 2) * (kDim / 8) + share * Running<kDim>::kTiles + j;
          float& to = shared.q[g + 8 * (e / 2)][d];
          const float x = (run.o[j][e] + run.offset[e / 2]) * fade[e / 2];
          to = w == 0 ? x : to + x;
        }
      }
    }
    __syncthreads();
  }
  if (threadIdx.x < kHeads) {
    const int m = threadIdx.x;
    float top = kLowest, sum = 0.f;
    for (int w = 0; w < warps; w++) top = shared.top[w][m] > top ? shared.top[w][m] : top;
    for (int w = 0; w < warps; w++) sum += shared.sum[w][m] * fast_exp2(shared.top[w][m] - top);
    shared.top[0][m] = top, shared.sum[0][m] = sum;
  }
  __syncthreads();
}

// Divides by the denominators (sinks included) and writes the heads of a row.
template <int kDim, bool kBfloat>
KVC_DEVICE void finish(const Task& task, const Row& r, const KvcWorkspace& w, Shared<kDim>& shared) {
  const KvcDecode& a = task.a;
  const int64_t head = static_cast<int64_t>(r.h) * a.group + r.first_head;
  if (threadIdx.x < r.heads) {
    const int m = threadIdx.x;
    float top = shared.top[0][m], sum = shared.sum[0][m], fade = 1.f;
    if (a.sinks && r.valid) {
      const float sink = a.sinks[head + m] * kLog2E, high = sink > top ? sink : top;
      fade = fast_exp2(top - high);
      sum = sum * fade + fast_exp2(sink - high);
      top = high;
    }
    shared.sum[0][m] = sum > 0.f ? fade / sum : 0.f;
    w.lse[r.b * static_cast<int64_t>(a.kv_heads) * a.group + head + m] =
        sum > 0.f ? (top + fast_log2(sum)) * kLn2 : -infinity();
  }
  __syncthreads();
  uint16_t* out = static_cast<uint16_t*>(a.out) + r.b * a.out_b + head * a.out_h;
  for (int i = threadIdx.x; i < r.heads * kDim; i += kThreads) {
    const int m = i / kDim, d = i % kDim;
    const float x = shared.q[m][d] * shared.sum[0][m];
    out[m * a.out_h + d] = kBfloat ? float_to_bfloat(x) : float_to_half(x);
  }
  __syncthreads();
}

// First block of the list that thread block c takes, of `parts` thread blocks.
KVC_DEVICE int64_t part_begin(int64_t c, int64_t blocks, int64_t parts) { return c * blocks / parts; }
// The thread block that takes a block of the list.
KVC_DEVICE int64_t part_of(int64_t block, int64_t blocks, int64_t parts) { return ((block + 1) * parts - 1) / blocks; }

template <int kDim, bool kBfloat>
KVC_DEVICE void decode(const KvcLayout& layout, const KvcDecode& a, const KvcWorkspace& w) {
  __shared__ Shared<kDim> shared;
  const Task task{layout, a, (a.group + kHeads - 1) / kHeads, position_at(w.clock, a.position)};
  const int64_t rows = static_cast<int64_t>(a.batch) * a.kv_heads * task.head_tiles;
  const int64_t blocks = count_blocks<kDim>(task, rows, -1, shared);
  const int64_t useful = blocks / kLeastBlocks > 1 ? blocks / kLeastBlocks : 1;
  const int64_t parts = gridDim.x < useful ? gridDim.x : useful, me = blockIdx.x;
  int64_t block = part_begin(me < parts ? me : parts, blocks, parts);
  const int64_t my_begin = block, my_end = part_begin(me < parts ? me + 1 : parts, blocks, parts);
  if (block < my_end) count_blocks<kDim>(task, rows, block, shared);
  int64_t index = shared.row, begin = shared.begin;
  __syncthreads();
  for (; block < my_end; index++) {
    const Row r = task.row(index);
    const int here = task.blocks(r);
    const int from = static_cast<int>(block - begin);
    const int64_t row_end = begin + here, end = row_end < my_end ? row_end : my_end;
    const int until = static_cast<int>(end - begin);

    for (int i = threadIdx.x; i < kHeads * kDim; i += kThreads) {
      const int m = i / kDim, d = i % kDim;
      const int64_t head = static_cast<int64_t>(r.h) * a.group + r.first_head + m;
      shared.q[m][d] = m < r.heads ? load_element(a.q, r.b * a.q_b + head * a.q_h + d, layout.dtype) : 0.f;
    }
    if (r.append && until == here) append<kDim>(task, r);
    __syncthreads();

    const float softcap = a.softcap * kLog2E;
    const Step step{a.softcap > 0.f ? a.scale / a.softcap : a.scale * kLog2E, softcap, a.window, task.position,
                    &shared.queries[0][0], shared.query_sum};
    Running<kDim> run;
    run.clear();
    bool rotated = false;
    int passed = 0;  // blocks of the sections before
    for (int tier = 0; tier <= KVC_MAX_TIERS; tier++) {
      const int n = (r.lengths[tier] + kBlock - 1) / kBlock;
      const int first = most(from - passed, 0), last = least(until - passed, n);
      passed += n;
      if (first >= last) continue;
      const bool turn = tier < KVC_MAX_TIERS && layout.tier[tier].rotate_keys;
      if (turn != rotated) {  // the transform is its own inverse
        rotated = turn;
        for (int m = thread_warp(); m < kHeads; m += kWarps) rotate(shared.q[m], kDim, kDim);
        __syncthreads();
      }
      attend_section<kDim, kBfloat>(task, r, tier, first, last, shared, step, run);
    }
    join_warps<kDim>(run, shared);

    if (from == 0 && until == here) {
      finish<kDim, kBfloat>(task, r, w, shared);
    } else {
      // Of the rows a thread block works on, only its first and its last are shared with others.
      const int64_t mine = 2 * me + (begin > my_begin);
      for (int i = threadIdx.x; i < r.heads * kDim; i += kThreads) {
        w.partial[mine * kHeads * kDim + i] = shared.q[i / kDim][i % kDim];
      }
      if (threadIdx.x < r.heads) {
        w.partial_max[mine * kHeads + threadIdx.x] = shared.top[0][threadIdx.x];
        w.partial_sum[mine * kHeads + threadIdx.x] = shared.sum[0][threadIdx.x];
      }
      const int64_t first_part = part_of(begin, blocks, parts), last_part = part_of(row_end - 1, blocks, parts);
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) shared.last = atomicAdd(&w.arrived[index], 1) == last_part - first_part;
      __syncthreads();
      if (shared.last) {
        __threadfence();
        if (threadIdx.x < r.heads) {
          float top = kLowest, sum = 0.f;
          for (int64_t p = first_part; p <= last_part; p++) {
            const float other = w.partial_max[(2 * p + (begin > part_begin(p, blocks, parts))) * kHeads + threadIdx.x];
            top = other > top ? other : top;
          }
          for (int64_t p = first_part; p <= last_part; p++) {
            const int64_t at = (2 * p + (begin > part_begin(p, blocks, parts))) * kHeads + threadIdx.x;
            sum += w.partial_sum[at] * fast_exp2(w.partial_max[at] - top);
          }
          shared.top[0][threadIdx.x] = top, shared.sum[0][threadIdx.x] = sum;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < r.heads * kDim; i += kThreads) {
          float x = 0.f;
          for (int64_t p = first_part; p <= last_part; p++) {
            const int64_t at = 2 * p + (begin > part_begin(p, blocks, parts));
            x += w.partial[at * kHeads * kDim + i] * fast_exp2(w.partial_max[at * kHeads + i / kDim] - shared.top[0][i / kDim]);
          }
          shared.q[i / kDim][i % kDim] = x;
        }
        if (threadIdx.x == 0) w.arrived[index] = 0;
        __syncthreads();
        finish<kDim, kBfloat>(task, r, w, shared);
      }
    }
    block = end, begin = row_end;
    __syncthreads();
  }
  if (!a.append) return;
  // Lengths and the clock move on when everyone has read them.
  if (threadIdx.x == 0) {
    __threadfence();
    shared.last = atomicAdd(&w.arrived[rows], 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!shared.last) return;
  for (int b = threadIdx.x; b < a.batch; b += kThreads) {
    if ((!a.valid || a.valid[b]) && a.tail.length[b] < a.tail.capacity) a.tail.length[b]++;
  }
  if (threadIdx.x == 0) {
    w.arrived[rows] = 0;
    ++*w.clock;
  }
}

}  // namespace

#define KVC_JOIN_(a, b, c) a##b##c
#define KVC_JOIN(a, b, c) KVC_JOIN_(a, b, c)
#define KVC_DECODE(bfloat, type)                                                                \
  KVC_KERNEL __launch_bounds__(kThreads, 2)                                                    \
  KVC_JOIN(kvc_decode_, KVC_HEAD_DIM, type)                                                     \
  (KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcDecode a, KVC_PARAMETER KvcWorkspace w) {   \
    decode<KVC_HEAD_DIM, bfloat>(layout, a, w);                                                 \
  }
KVC_DECODE(false, _f16)
KVC_DECODE(true, _bf16)
#undef KVC_DECODE
#undef KVC_JOIN
#undef KVC_JOIN_
