// One decoding step on tensor cores, for head_dim 64, 128 or 256 in fp16 or bf16: append, attend to every tier and the
// tail, merge, all in one launch.
//
// A warp takes 16 slots at a time, and these are the 16 rows of m16n8k16, both times: logits are keys x queries (16
// slots, 8 heads), outputs are values x probabilities (16 dimensions, 8 heads). Codes become operands in registers
// (fragments.cuh); a key's scale and offset are applied to the logit, a value's to the probability. Queries are put in
// the order of the keys once per tier (`stage_queries`), outputs are put back at the end. Each warp has slots that
// follow each other, so that where they lie is found once per page.
//
// Work is a flat list of blocks of 16 slots over all rows; every thread block takes an equal part of it, wherever rows
// begin and end. Rows that several thread blocks share are merged by whichever of them finishes last.
//
// Statistics: where they are asked for, logits are kept as they are made. All thread blocks wait for each other, and so
// for the log-sum-exps; then each turns its own logits into probabilities and adds these to the fields of the slots.
//
// Compiled once for each head_dim, KVC_HEAD_DIM, and number of query heads handled together, KVC_HEADS: 8 or 16. Where
// all codes are of one tier, a kernel for that alone, KVC_CODED, takes fewer registers: more of its blocks run at once.
// Where KVC_RING is not 0, pages of codes come to each warp by bulk copies (ring.cuh); none may have more bytes of them.
#include "fragments.cuh"
#include "ring.cuh"

#ifndef KVC_CODED
#define KVC_CODED 0  // key bits * 10 + value bits
#endif
#ifndef KVC_RING
#define KVC_RING 0
#endif
#ifndef KVC_SUFFIX
#define KVC_SUFFIX
#endif
#undef KVC_BLOCKS  // that a multiprocessor holds
#if KVC_CODED == 84 && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define KVC_BLOCKS 3  // with four, 28 bytes would be spilled
#else
#define KVC_BLOCKS KVC_RESIDENT
#endif

namespace {

constexpr int kDim = KVC_HEAD_DIM, kHeads = KVC_HEADS;
constexpr int kTiles = kHeads / 8;  // of heads
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// Warps that take the same slots and share the dimensions of the output: 256 of them for 16 heads are 128 registers.
constexpr int kShare = kDim * kHeads > 2048 ? 2 : 1;
constexpr int kWalks = kWarps / kShare;       // warps, or pairs of them, that take different slots
constexpr int kSteps = kDim / 16;             // of 16 dimensions, from keys to logits
constexpr int kOutputs = kDim / 16 / kShare;  // tiles of 16 dimensions of the output, of one warp
// Sums that a logit is made in: where registers allow, two, so that products wait for each other half as often.
constexpr int kSums = kTiles == 1 && kDim <= 128 ? 2 : kTiles;
constexpr int kLeastBlocks = 8;               // of 16 slots, per thread block: less is not worth merging
constexpr int kSlabsInLine = 16;              // addresses of slabs that come with one line of memory
constexpr int kTail = KVC_MAX_TIERS;          // the section after the tiers
constexpr float kLowest = -1e30f;
// Powers of two that a logit may lie above the reference point before that is moved, and how far it then lies below.
// None in native sections, so that the largest probability is 1 and rounded to itself; with codes it is scaled anyway.
template <int kKeyBits>
constexpr float kSlack = kKeyBits == kNative ? 0.f : 1.f;
template <int kKeyBits>
constexpr float kRoom = kKeyBits == kNative ? 0.f : 7.f;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLeastScale = 5.9604644775390625e-8f;  // 2^-24, the least fp16 above zero

// Whether this is the first thread of its block. Asked anew each time: there is no register to keep the answer in.
KVC_DEVICE bool is_first() { return renewed(threadIdx.x) == 0; }

struct Row {  // a KV head of a sequence, and kHeads of its query heads
  int row, b, h, first_head, heads;
  int lengths[KVC_MAX_TIERS + 1];  // the tail is the last
  int valid, append;               // not bool: padding would be copied along, and take a register
};

struct Task {
  const KvcLayout& layout;
  const KvcDecode& a;
  const KvcWorkspace& w;

  KVC_DEVICE_METHOD int head_tiles() const { return (a.group + kHeads - 1) / kHeads; }
  KVC_DEVICE_METHOD int columns() const { return least(kHeads, a.group + a.group % 2); }  // of kept logits
  KVC_DEVICE_METHOD int rows() const { return a.batch * a.kv_heads * head_tiles(); }
  KVC_DEVICE_METHOD Row row(int index) const {
    Row r;
    r.row = index / head_tiles();
    r.b = r.row / a.kv_heads, r.h = r.row % a.kv_heads;
    r.first_head = index % head_tiles() * kHeads;
    r.heads = least(kHeads, a.group - r.first_head);
    r.valid = !a.valid || a.valid[r.b];
    KVC_UNROLL
    for (int t = 0; t < KVC_MAX_TIERS; t++) r.lengths[t] = r.valid && t < layout.n_tiers ? a.rows.length[t][r.row] : 0;
    const int tail = a.tail.capacity ? a.tail.length[r.b] : 0;
    r.append = a.append && r.valid && tail < a.tail.capacity;  // the caller has checked; never write outside
    r.lengths[kTail] = r.valid ? tail + r.append : 0;
    return r;
  }
  KVC_DEVICE_METHOD int blocks(const Row& r) const {  // at least one, so that every row is visited
    int n = 0;
    KVC_UNROLL
    for (int t = 0; t <= KVC_MAX_TIERS; t++) n += (r.lengths[t] + kBlock - 1) / kBlock;
    return n > 0 ? n : 1;
  }
};

// Blocks of the sections before one.
KVC_DEVICE int blocks_before(const Row& r, int tier) {
  int n = 0;
  for (int t = 0; t < tier; t++) n += (r.lengths[t] + kBlock - 1) / kBlock;
  return n;
}

// A row's pages, one after the other. A page's id is asked for two pages before it is needed and the slab's address one,
// so that neither is waited for.
struct Pages {
  const Task& task;
  const int32_t* ids;
  int page, last_page;            // of `later`; of the way
  const uint8_t* slab;            // of the next page
  uint32_t in_slab;               // its number there
  int32_t later;                  // the id of the page after that

  KVC_DEVICE_METHOD void begin(const Row& r, int tier, int first, int last) {
    page = first, last_page = last;
    ids = task.a.rows.table[tier] + r.row * task.a.rows.table_stride[tier];
    find_next(ids[page]);
    later = next_id();
  }
  KVC_DEVICE_METHOD int32_t next_id() {
    page = least(page + 1, last_page);
    return ids[page];
  }
  KVC_DEVICE_METHOD void find_next(int32_t id) {
    slab = reinterpret_cast<const uint8_t*>(task.a.rows.slabs[id >> task.a.rows.slab_shift]);
    in_slab = static_cast<uint32_t>(renewed(id & ((1 << task.a.rows.slab_shift) - 1)));
  }
  // The address of the next page.
  KVC_DEVICE_METHOD const uint8_t* next() const {
    return renewed(slab + static_cast<uint64_t>(in_slab) * static_cast<uint32_t>(task.layout.page_bytes));
  }
  KVC_DEVICE_METHOD void pass() {
    find_next(later);
    later = next_id();
  }
};

// Positions of a block of a tier or the tail; null where they do not matter.
KVC_DEVICE const int32_t* positions_of(const Task& task, const Row& r, int tier, int block) {
  const KvcDecode& a = task.a;
  const int slot = block * kBlock;
  if (tier == kTail) return a.tail.position + r.b * a.tail.capacity + slot;
  if (a.position_field < 0) return nullptr;
  const KvcTier& its = task.layout.tier[tier];
  uint8_t* page = page_of(task.layout, a.rows, tier, r.row, slot);
  return reinterpret_cast<const int32_t*>(field_of(its, page, a.position_field, slot % its.slots));
}

struct Shared;
#if KVC_RING
KVC_DEVICE Ring<KVC_RING>& ring_of(Shared& shared);  // of this warp
KVC_DEVICE uint4& ones_of(Shared& shared);
#endif

// The way of a warp over its blocks of a tier or the tail, one after the other.
template <int kKeyBits, int kValueBits>
struct Walk {
  static constexpr bool kRing = false;
  using Key = KeyRow<kDim, kKeyBits>;
  using Value = ValueRow<kDim, kValueBits, kShare>;
  static constexpr bool kCoded = kKeyBits != kNative;

  const Task& task;
  const Row& r;
  const int tier;
  int left;                       // slots from the block at hand to the end of the way
  const uint8_t *k, *v;           // the lane's words of the first slot of the block that is asked for next
  const uint8_t* params;          // its two of that section's parameters: of slots 2g and 2g + 1
  int on_page;                    // slots from there to the end of the page
  int slots;                      // of a page
  uint32_t keys, values, offset;  // from a page to the lane's words and parameters of its first slot
  Pages pages;

  // Blocks first .. until, one at least.
  KVC_DEVICE_METHOD Walk(const Task& task, const Row& r, int tier, int first, int until, Shared&)
      : task(task),
        r(r),
        tier(tier),
        left(least(r.lengths[tier], until * kBlock) - first * kBlock),
        pages{task} {
    const int g = thread_lane() >> 2, t = thread_lane() & 3;
    // Coded slots are read in pairs, 2g and 2g + 1, native ones one by one: see load_keys.
    keys = Key::kPiece * t + (kCoded ? 2 * g * Key::kBytes : 0);
    values = (g * kShare + thread_warp() % kShare) * Value::kPiece + (kCoded ? 4 * t * Value::kBytes : 0);
    if (!kCoded && tier == kTail) {
      const KvcTail& tail = task.a.tail;
      const int64_t from = (r.row * tail.capacity + first * kBlock) * Key::kBytes;
      k = static_cast<const uint8_t*>(tail.k) + from + keys;
      v = static_cast<const uint8_t*>(tail.v) + from + values;
      on_page = 0x7ffffff0;
      return;
    }
    const KvcTier& its = task.layout.tier[tier];
    slots = its.slots;
    keys += static_cast<uint32_t>(its.keys);
    values += static_cast<uint32_t>(its.values);
    if (kCoded) offset = static_cast<uint32_t>(t < 2 ? its.key_params : its.value_params) + 2 * (t % 2) * slots + 4 * g;
    const int page = first * kBlock / slots, inside = first * kBlock - page * slots;
    pages.begin(r, tier, page, page + (inside + left - 1) / slots);
    open_page();
    k += inside * Key::kBytes, v += inside * Value::kBytes, params += 2 * inside;
    on_page -= inside;
  }
  KVC_DEVICE_METHOD void open_page() {
    const uint8_t* at = pages.next();
    k = at + keys, v = at + values;
    if (kCoded) params = at + offset;
    on_page = slots;
    pages.pass();
  }
  KVC_DEVICE_METHOD void advance() {
    on_page -= kBlock;
    if (on_page == 0) {
      open_page();
    } else {
      k += kBlock * Key::kBytes, v += kBlock * Value::kBytes;
      if (kCoded) params += 2 * kBlock;
    }
  }
  // Which slot of a block row g + 8i of a fragment has.
  KVC_DEVICE_METHOD static int slot(int g, int i) { return 2 * g + i; }
};

// The slot that a native row is read from: behind the last in use there may be no memory, so that one is read again.
KVC_DEVICE int native_slot(int slot, int in_use) { return least(slot, in_use - 1); }

template <int kKeyBits, int kValueBits>
struct Loaded {
  using Key = KeyRow<kDim, kKeyBits>;
  using Value = ValueRow<kDim, kValueBits, kShare>;
  static constexpr bool kCoded = kKeyBits != kNative;
  uint32_t k[2][Key::kWords];    // rows g and g + 8 of a fragment: slots 2g and 2g + 1, or as Way::slot says
  uint32_t v[4][Value::kWords];  // slots of rows 2t, 2t + 1, 2t + 8, 2t + 9
  uint32_t params;               // fp16 of the slots of keys, by t: key scale, key offset, value scale, value offset

  // `in_use` is how many slots are, from the block's first on.
  KVC_DEVICE_METHOD void load_keys(const uint8_t* from, int in_use) {
    KVC_UNROLL
    for (int i = 0; i < 2; i++) {
      const uint8_t* row = from + (kCoded ? i : native_slot(thread_lane() / 4 * 2 + i, in_use)) * Key::kBytes;
      KVC_UNROLL
      for (int w = 0; w < Key::kWords; w += Key::kPiece / 4) load_bytes<Key::kPiece>(&k[i][w], row + Key::offset(0, w));
    }
  }
  KVC_DEVICE_METHOD void load_values(const uint8_t* from, int in_use) {
    KVC_UNROLL
    for (int i = 0; i < 4; i++) {
      const int slot = i % 2 * 2 + i / 2, row = kCoded ? slot : native_slot(thread_lane() % 4 * 4 + slot, in_use);
      load_bytes<Value::kPiece>(v[i], from + row * Value::kBytes);
    }
  }
  KVC_DEVICE_METHOD void load_params(const uint8_t* from) {
    if (kCoded) load_bytes<4>(&params, from);
  }
};

#if KVC_RING
// The same through the warp's ring, of coded slots. A page comes with one copy or, where only a part of it is on the way,
// with one for each of its sections. When it has been gone over, another is asked for in its place.
template <int kKeyBits, int kValueBits>
struct RingWalk {
  using Key = KeyRow<kDim, kKeyBits>;
  using Value = ValueRow<kDim, kValueBits, 1>;
  static constexpr bool kRing = true;

  const Task& task;
  const Row& r;
  const int tier;
  int left;                             // slots from the block at hand to the end of the way
  int to_ask;                           // slots from the page that is asked for next to there
  int inside;                           // where on the first page the way begins
  int slots, bytes;                     // of a page, without slot fields
  int other;                            // the second stage of the ring, or 0: there is only one
  int stage;                            // at hand
  uint32_t phase;                       // of its gate
  uint32_t keys, values, back, offset;  // from a page to the lane's words of its first slot
  const uint8_t *k, *v, *w, *params;    // the lane's words of the block at hand: see load_values
  int left_then;                        // what is left at the last block of the page
  Ring<KVC_RING>& ring;
  uint4& ones;                          // in shared memory, see Usual
  Pages pages;

  KVC_DEVICE_METHOD RingWalk(const Task& task, const Row& r, int tier, int first, int until, Shared& shared)
      : task(task), r(r), tier(tier), ring(ring_of(shared)), ones(ones_of(shared)), pages{task} {
    const KvcTier& its = task.layout.tier[tier];
    const int g = thread_lane() >> 2, t = thread_lane() & 3;
    slots = its.slots, bytes = static_cast<int>(its.fields), other = 2 * bytes <= KVC_RING;
    keys = static_cast<uint32_t>(its.keys) + slot(g, 0) * Key::kBytes + Key::kPiece * t;
    values = static_cast<uint32_t>(its.values) + t * Value::kBytes + g * Value::kPiece;
    back = values + (7 - 2 * t) * Value::kBytes;
    offset = static_cast<uint32_t>(t < 2 ? its.key_params : its.value_params) + 2 * (t % 2 * slots + slot(g, 0));
    const int page = first * kBlock / slots;
    left = least(r.lengths[tier], until * kBlock) - first * kBlock;
    inside = first * kBlock - page * slots;
    to_ask = inside + left;
    pages.begin(r, tier, page, page + (to_ask - 1) / slots);
  }
  // As in Walk. In this order, as pages of 128 dimensions lie, no lanes of a load meet in a bank for keys of 4 or 2 bits
  // and values of 2, two do for keys of 8 bits and values of 4, and up to four for values of 8 and parameters.
  KVC_DEVICE_METHOD static int slot(int g, int i) { return 8 * i + (g % 2 ? 7 - g / 2 : g / 2); }

  // Asks for as many pages as the ring holds.
  KVC_DEVICE_METHOD void begin() {
    ring.make_gates();
    stage = 0, phase = 0;
    ask(inside);
    if (other) {
      stage = other;
      ask(0);
      stage = 0;
    }
  }
  // Asks for the next page, from a slot on, if there is one.
  KVC_DEVICE_METHOD void ask(int from) {
    if (to_ask <= 0) return;
    const uint8_t* page = pages.next();
    if (elected()) {
      if (from == 0 && to_ask >= slots) {
        expect_bytes(&ring.gates[stage], bytes);
        copy_bulk(ring.bytes + stage * bytes, page, bytes, &ring.gates[stage]);
      } else {
        ask_part(page, from);
      }
    }
    pages.pass();
    to_ask -= slots;
  }
  KVC_DEVICE_METHOD void ask_part(const uint8_t* page, int from) {
    const KvcTier& its = task.layout.tier[tier];
    const int count = (least(to_ask, slots) - from + kBlock - 1) / kBlock * kBlock, params = 4 * slots;
    uint8_t* to = ring.bytes + stage * bytes;
    uint64_t* gate = &ring.gates[stage];
    expect_bytes(gate, count * (Key::kBytes + Value::kBytes) + 2 * params);
    const auto ask_section = [&](int64_t section, int start, int size) {
      copy_bulk(to + section + start, page + section + start, size, gate);
    };
    ask_section(its.keys, from * Key::kBytes, count * Key::kBytes);
    ask_section(its.key_params, 0, params);
    ask_section(its.values, from * Value::kBytes, count * Value::kBytes);
    ask_section(its.value_params, 0, params);
  }
  // Waits for the page at hand.
  KVC_DEVICE_METHOD void arrive() {
    pass_gate(&ring.gates[stage], phase);
    const uint8_t* at = ring.bytes + stage * bytes;
    k = at + keys, v = at + values, w = at + back, params = at + offset;
    left_then -= slots;
  }
  // To the first block.
  KVC_DEVICE_METHOD void enter() {
    left_then = left + inside + kBlock;
    arrive();
    k += inside * Key::kBytes, v += inside * Value::kBytes, w += inside * Value::kBytes, params += 2 * inside;
  }
  // To the next block; there must be one.
  KVC_DEVICE_METHOD void advance() {
    if (left != left_then) {
      k += kBlock * Key::kBytes, v += kBlock * Value::kBytes, w += kBlock * Value::kBytes, params += 2 * kBlock;
      return;
    }
    __syncwarp();  // all lanes are done with what is overwritten
    ask(0);
    stage ^= other;
    phase ^= 1 ^ stage;  // once around
    arrive();
  }
  KVC_DEVICE_METHOD void end() { ring.unmake_gates(); }

  KVC_DEVICE_METHOD void load_keys(Loaded<kKeyBits, kValueBits>& words) const {
    KVC_UNROLL
    for (int i = 0; i < 2; i++) {
      KVC_UNROLL
      for (int n = 0; n < Key::kWords; n += Key::kPiece / 4) {
        load_bytes<Key::kPiece, false>(&words.k[i][n], k + 8 * i * Key::kBytes + Key::offset(0, n));
      }
    }
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(params);
    words.params = halves[0] | static_cast<uint32_t>(halves[8]) << 16;
  }
  KVC_DEVICE_METHOD void load_values(Loaded<kKeyBits, kValueBits>& words) const {  // slots t, 7 - t, 8 + t, 15 - t
    KVC_UNROLL
    for (int i = 0; i < 4; i++) {
      load_bytes<Value::kPiece, false>(words.v[i], (i % 2 ? w : v) + i / 2 * 8 * Value::kBytes);
    }
  }
};
#endif

template <int kKeyBits, int kValueBits, bool kRing = KVC_RING && kKeyBits != kNative>
struct WayOf {  // of a warp over a section
  using Type = Walk<kKeyBits, kValueBits>;
};
#if KVC_RING
template <int kKeyBits, int kValueBits>
struct WayOf<kKeyBits, kValueBits, true> {
  using Type = RingWalk<kKeyBits, kValueBits>;
};
#endif

// Registers that loads may wait in: the words of a block, or first its keys and then its values in their place. With a
// ring the latter, as these wait elsewhere.
template <int kKeyBits, int kValueBits>
constexpr bool kBoth = !WayOf<kKeyBits, kValueBits>::Type::kRing &&
                       2 * KeyRow<kDim, kKeyBits>::kWords + 4 * ValueRow<kDim, kValueBits, kShare>::kWords < 64;

template <int kKeyBits, int kValueBits, bool kBfloat>
struct Logits {  // as many k-steps of keys x queries as four registers of queries serve
  static constexpr int kServed = 2 / kTiles;
  const Loaded<kKeyBits, kValueBits>& words;
  const uint4 (*queries)[32];  // [kSteps / kServed]
  float (*c)[4];               // [kSums]

  template <int kQuad>
  KVC_DEVICE_METHOD void step() const {
    const uint4 q = queries[kQuad][thread_lane()];
    part<kQuad * kServed>(0, q.x, q.y);
    part<kQuad * kServed + (kServed - 1)>(kSums - 1, q.z, q.w);
  }
  template <int kStep>
  KVC_DEVICE_METHOD void part(int tile, uint32_t b0, uint32_t b1) const {
    constexpr int pairs = KeyRow<kDim, kKeyBits>::kPairs, p0 = 2 * kStep, p1 = 2 * kStep + 1;
    const uint32_t a[4] = {
        key_pair<kKeyBits, p0 % pairs>(words.k[0][p0 / pairs]), key_pair<kKeyBits, p0 % pairs>(words.k[1][p0 / pairs]),
        key_pair<kKeyBits, p1 % pairs>(words.k[0][p1 / pairs]), key_pair<kKeyBits, p1 % pairs>(words.k[1][p1 / pairs])};
    multiply<kBfloat && kKeyBits == kNative>(c[tile], a, b0, b1);
  }
};

template <int kKeyBits, int kValueBits, bool kBfloat>
struct Outputs {  // sixteen dimensions of values x probabilities
  const Loaded<kKeyBits, kValueBits>& words;
  const uint32_t (*p)[2];     // [kTiles]
  float (*o)[kTiles][4];
  uint32_t (&a)[4];           // a tile of values

  template <int kTile>
  KVC_DEVICE_METHOD void step() const {
    constexpr int per_word = ValueRow<kDim, kValueBits, kShare>::kPerWord, c = 2 * kTile % per_word;
    constexpr int w = 2 * kTile / per_word;
    const auto& v = words.v;
    a[0] = value_pair<kValueBits, c>(v[0][w], v[1][w]), a[1] = value_pair<kValueBits, c + 1>(v[0][w], v[1][w]);
    a[2] = value_pair<kValueBits, c>(v[2][w], v[3][w]), a[3] = value_pair<kValueBits, c + 1>(v[2][w], v[3][w]);
    KVC_UNROLL
    for (int j = 0; j < kTiles; j++) multiply<kBfloat && kValueBits == kNative>(o[kTile][j], a, p[j][0], p[j][1]);
  }
};

// Running softmax of one warp. Lane (g, t) has heads 2t and 2t + 1 of each tile of eight, and of each tile of 16
// dimensions those of two rows: dimensions g * kDim / 8 + 2 * tile and the next one, tiles counting on from warp to
// warp that share them.
struct Running {
  float o[kOutputs][kTiles][4];  // dimension, head; dimension, next head; next dimension, head; both next
  float top[kTiles][2], sum[kTiles][2];
  float offset[kTiles][2];       // sum of probability x value offset, the same for every dimension
  // In a section of codes, where outputs are sums of probability x value scale, rounded, x code x 2^(place - 24): the
  // sum of the first two, of both heads; the rest is of no use.
  float weight[kTiles][4];

  KVC_DEVICE_METHOD void clear() {
    KVC_UNROLL
    for (int j = 0; j < kTiles; j++) {
      KVC_UNROLL
      for (int e = 0; e < 2; e++) top[j][e] = kLowest, sum[j][e] = offset[j][e] = 0.f;
      KVC_UNROLL
      for (int i = 0; i < kOutputs; i++) o[i][j][0] = o[i][j][1] = o[i][j][2] = o[i][j][3] = 0.f;
    }
  }
};

struct Place {  // where a thread block is, the same for all its threads, which have no registers to spare for it
  int blocks, parts;             // blocks of the list; thread blocks that share it
  int my_begin, my_end;          // what this one takes of it
  int first_index, first_begin;  // its first row
  int index, begin, here;        // the row at hand: its number, its first block in the list, how many it has
  int from, until;               // those of them that this thread block takes
  float* logits;                 // where those of the section at hand are kept: [its blocks][16 slots][columns]
  int columns;                   // heads of a slot whose logits are kept
  int position;                  // of the new token
  Row row;
};

// Outputs are summed up with dimension g * kDim / 8 + i at 8 i + g, and heads four words apart in the banks, so that
// the lanes of a warp, which have one i at a time, meet different banks.
constexpr int kPitch = kDim + 4;
KVC_DEVICE int place_of(int d) { return d % (kDim / 8) * 8 + d / (kDim / 8); }

struct Shared {
#if KVC_RING
  Ring<KVC_RING> rings[kWarps];
  uint4 ones;  // of fp16
#endif
  float q[kHeads][kPitch];                   // queries; outputs, each at its place_of, when the row is finished
  uint4 queries[kSteps * kTiles / 2][32];    // fragments for the tier at hand
  float query[kHeads];                       // sum over the dimensions, as rounded, times the factor of the logits
  float top[kWalks][kHeads], sum[kWalks][kHeads];
  int scan[kWarps];
  int until[kWalks];                         // where the ways of the warps end
  int last;
  bool busy;                                 // there is something for this thread block to do
  bool fresh, rotated;                       // the queries: not in `q` yet; in there, rotated
  Place place;
};

#if KVC_RING
KVC_DEVICE Ring<KVC_RING>& ring_of(Shared& shared) { return shared.rings[thread_warp()]; }
KVC_DEVICE uint4& ones_of(Shared& shared) { return shared.ones; }
#endif

// Largest logits seen by any lane, and what has been summed up is to be multiplied by.
template <int kKeyBits>
KVC_DEVICE void move_top(Running& run, const float (&high)[kTiles][2]) {
  KVC_UNROLL
  for (int j = 0; j < kTiles; j++) {
    float fade[2];
    KVC_UNROLL
    for (int e = 0; e < 2; e++) {
      float x = high[j][e];
      KVC_UNROLL
      for (int bit = 4; bit < 32; bit *= 2) x = larger(x, __shfl_xor_sync(kAllLanes, x, bit));
      x = x > run.top[j][e] + kSlack<kKeyBits> ? x + kRoom<kKeyBits> : run.top[j][e];
      fade[e] = fast_exp2(run.top[j][e] - x);
      run.top[j][e] = x;
      run.sum[j][e] *= fade[e], run.offset[j][e] *= fade[e];
    }
    KVC_UNROLL
    for (int i = 0; i < kOutputs; i++) {
      KVC_UNROLL
      for (int e = 0; e < 4; e++) run.o[i][j][e] *= fade[e % 2];
    }
    KVC_UNROLL
    for (int e = 0; e < 4 && kKeyBits != kNative; e++) run.weight[j][e] *= fade[e % 2];
  }
}

// Where the logits of a section of the row at hand are kept.
KVC_DEVICE float* logits_of(const KvcWorkspace& w, const Place& at, int tier, int columns) {
  return w.logits + static_cast<int64_t>(at.begin + blocks_before(at.row, tier)) * (kBlock * columns);
}

// What few steps need, done to the logits of a block: soft caps, slots that are not seen, logits to be kept.
template <class Way>
KVC_DEVICE void settle(float (&c)[kSums][4], float (&scale)[2], float (&zero)[2], const Way& walk,
                       const Shared& shared) {
  const KvcDecode& a = walk.task.a;
  const int lane = renewed(thread_lane()), g = lane >> 2, t = lane & 3;
  const int block = shared.until[renewed(thread_warp()) / kShare] - (walk.left + kBlock - 1) / kBlock;
  if (a.softcap > 0.f) {
    KVC_UNROLL
    for (int i = 0; i < 4 * kTiles; i++) c[i / 4][i % 4] = a.softcap * kLog2E * tanhf(c[i / 4][i % 4]);
  }
  const int32_t* position = a.window > 0 ? positions_of(walk.task, walk.r, walk.tier, block) : nullptr;
  KVC_UNROLL
  for (int i = 0; i < 2; i++) {
    const int slot = Way::slot(g, i);
    bool seen = slot < walk.left;
    if (!seen) scale[i] = zero[i] = 0.f;  // behind the last slot anything may lie in place of these, NaN too
    if (seen && position) seen = shared.place.position - position[slot] < a.window;
    KVC_UNROLL
    for (int j = 0; j < kTiles && !seen; j++) c[j][2 * i] = c[j][2 * i + 1] = -infinity();
  }
  if (walk.task.w.logits && thread_warp() % kShare == 0) {
    const int columns = shared.place.columns;
    float* to = shared.place.logits + (block * kBlock + Way::slot(g, 0)) * static_cast<int64_t>(columns) + 2 * t;
    KVC_UNROLL
    for (int i = 0; i < 2 * kTiles; i++) {
      const float* x = &c[i / 2][i % 2 * 2];
      float2* there = reinterpret_cast<float2*>(to + Way::slot(0, i % 2) * columns + i / 2 * 8);
      if (i / 2 * 8 + 2 * t < columns) *there = float2{x[0], x[1]};
    }
  }
}

// The logits of a block, as they are made of products with codes.
struct Affine {
  const float (*c)[4];            // [kTiles]
  const float (*query_sum)[2];    // [kTiles]
  float scale[2], zero[2];        // of the keys of rows g and g + 8

  // That of row g + 8i and head e of tile j, less a number.
  template <bool kCoded>
  KVC_DEVICE_METHOD float logit(int j, int i, int e, float less) const {
    return fmaf(c[j][2 * i + e], scale[i], kCoded ? fmaf(query_sum[j][e], zero[i], -less) : -less);
  }
};

struct Usual {  // what is the same for all blocks of a section
  float factor;                // of the products with keys
  int slots;                   // a block with fewer to come than this needs `settle`
  float query_sum[kTiles][2];  // of this lane's heads, see Shared
  uint4 ones;                  // an operand; read from shared memory, as the compiler makes a constant anew every time
};

// Attends to the block whose words are in `words`. As soon as some of these have served, those of the next are asked
// for in their place, where there are `more`, so that loads are always under way. Without room for both keys and
// values, values take the place of the keys they belong to.
template <int kKeyBits, int kValueBits, bool kBfloat, class Way>
KVC_DEVICE void attend(Running& run, Loaded<kKeyBits, kValueBits>& words, const Way& walk, bool more,
                       const Usual& usual, const Shared& shared) {
  constexpr bool coded = kKeyBits != kNative;
  const int to_come = walk.left - kBlock;
  float c[kSums][4];  // row g, see Way::slot: heads 2t and 2t + 1; row g + 8: the same
  Affine logits{c, usual.query_sum, {usual.factor, usual.factor}, {0.f, 0.f}};
  KVC_UNROLL
  for (int i = 0; i < 4 * kSums; i++) c[i / 4][i % 4] = 0.f;
  const Logits<kKeyBits, kValueBits, kBfloat> products{words, shared.queries, c};
  Repeat<0, kSteps * kTiles / 2>::run(products);
  KVC_UNROLL
  for (int e = 0; e < 4 && kSums > kTiles; e++) c[0][e] += c[kSums - 1][e];
  if constexpr (Way::kRing) {
    walk.load_values(words);
  } else if (!kBoth<kKeyBits, kValueBits>) {
    words.load_values(walk.v, walk.left);  // in the registers that the keys leave
  }
  if (more) words.load_keys(walk.k, to_come);

  float scale[2] = {1.f, 1.f}, zero[2] = {0.f, 0.f};  // of the values of rows g and g + 8
  if (coded) {
    const uint32_t key_scale = __shfl_sync(kAllLanes, words.params, 0, 4);
    const uint32_t key_zero = __shfl_sync(kAllLanes, words.params, 1, 4);
    // A slot whose codes are all 0 may have the scale 0. With it a probability could grow beyond all bounds unnoticed.
    const uint32_t value_scale = half2_larger(__shfl_sync(kAllLanes, words.params, 2, 4), 0x00010001u);
    const uint32_t value_zero = __shfl_sync(kAllLanes, words.params, 3, 4);
    KVC_UNROLL
    for (int i = 0; i < 2; i++) {
      logits.scale[i] = usual.factor * half_of_pair(key_scale, i), logits.zero[i] = half_of_pair(key_zero, i);
      scale[i] = half_of_pair(value_scale, i);
      zero[i] = half_of_pair(value_zero, i) + kMiddle<kValueBits> * scale[i];
    }
  }
  if (more) words.load_params(walk.params);
  if (walk.left < usual.slots) {
    KVC_UNROLL
    for (int i = 0; i < 4 * kTiles; i++) c[i / 4][i % 4] = logits.logit<coded>(i / 4, i / 2 % 2, i % 2, 0.f);
    settle(c, scale, zero, walk, shared);
    KVC_UNROLL
    for (int i = 0; i < 2; i++) logits.scale[i] = 1.f, logits.zero[i] = 0.f;
  }
  float x[kTiles][2][2];  // probabilities: [head tile][slot][head]
  uint32_t p[kTiles][2];  // times the value's scale, of two heads
  // Makes them, and says whether the reference point is too low for that.
  const auto weigh = [&]() {
    uint32_t all = 0;
    bool above = false;
    KVC_UNROLL
    for (int i = 0; i < 2 * kTiles; i++) {
      const int j = i / 2, slot = i % 2;
      KVC_UNROLL
      for (int e = 0; e < 2; e++) {
        x[j][slot][e] = fast_exp2(logits.logit<coded>(j, slot, e, run.top[j][e]));
        above = above || !(x[j][slot][e] <= 1.f);
      }
      const float a = coded ? x[j][slot][0] * scale[slot] : x[j][slot][0];
      const float b = coded ? x[j][slot][1] * scale[slot] : x[j][slot][1];
      p[j][slot] = kBfloat && !coded ? pack_bfloats(a, b) : pack_halves(a, b);
      all |= p[j][slot];
    }
    return coded ? (all & 0x40004000u) != 0 : above;  // 2 and more, infinite, no number
  };
  if (__any_sync(kAllLanes, weigh())) {
    float high[kTiles][2];
    KVC_UNROLL
    for (int i = 0; i < 2; i++) {
      // The reference point includes the value's scale, so that scaled probabilities use the range of fp16 well.
      const float level = coded ? fast_log2(larger(scale[i], kLeastScale)) : 0.f;
      KVC_UNROLL
      for (int j = 0; j < kTiles; j++) {
        KVC_UNROLL
        for (int e = 0; e < 2; e++) {
          const float y = logits.logit<coded>(j, i, e, 0.f) + level;
          high[j][e] = i ? larger(y, high[j][e]) : y;
        }
      }
    }
    move_top<kKeyBits>(run, high);
    weigh();
  }
  KVC_UNROLL
  for (int j = 0; j < kTiles; j++) {
    KVC_UNROLL
    for (int i = 0; i < 2; i++) {
      KVC_UNROLL
      for (int e = 0; e < 2; e++) {
        run.sum[j][e] += x[j][i][e];
        if (coded) run.offset[j][e] += x[j][i][e] * zero[i];
      }
      p[j][i] = transpose(p[j][i]);  // from (slot, heads) of logits to (head, slots)
    }
  }
  uint32_t values[4];
  const Outputs<kKeyBits, kValueBits, kBfloat> outputs{words, p, run.o, values};
  Repeat<0, kOutputs>::run(outputs);
  if (coded) {
    if constexpr (Way::kRing) {
      values[0] = usual.ones.x, values[1] = usual.ones.y, values[2] = usual.ones.z, values[3] = usual.ones.w;
    } else {
      values[0] = values[2] = 0x3c003c00u;  // a row of ones; of the other eight rows' sums nobody takes notice
    }
    KVC_UNROLL
    for (int j = 0; j < kTiles; j++) mma_f16(run.weight[j], values, p[j][0], p[j][1]);
  }
  if (more) words.load_values(walk.v, to_come);
}

// Sum of the threads' numbers up to this thread's; in `all` that of all.
KVC_DEVICE int scan(int mine, int& all, Shared& shared) {
  int running = mine;
  KVC_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_sync(kAllLanes, running, thread_lane() - step);
    if (thread_lane() >= step) running += other;
  }
  if (thread_lane() == 31) shared.scan[thread_warp()] = running;
  __syncthreads();
  all = 0;
  KVC_UNROLL
  for (int w = 0; w < kWarps; w++) {
    if (w < thread_warp()) running += shared.scan[w];
    all += shared.scan[w];
  }
  return running;
}

// Asks for the queries of a row; they lie in shared.queries, as they came, when all threads' copies are done.
KVC_DEVICE void ask_queries(const KvcDecode& a, const Row& r, Shared& shared) {
  const uint16_t* q = static_cast<const uint16_t*>(a.q) + r.b * a.q_b +
                      (static_cast<int64_t>(r.h) * a.group + r.first_head) * a.q_h;
  uint4* to = &shared.queries[0][0];
  KVC_UNROLL_BY(1)
  for (int i = threadIdx.x; i < r.heads * kDim / 8; i += kThreads) {
    copy_async(to + i, q + i / (kDim / 8) * a.q_h + i % (kDim / 8) * 8);
  }
}

// Puts the queries into shared.q, rotated or not: from where `ask_queries` put them, or from there. The rotation, its
// own inverse, is that of `rotate`, with the same additions in the same order, a head in the registers of a warp.
template <bool kBfloat>
KVC_DEVICE void bring_queries(int heads, bool turn, Shared& shared) {
  constexpr int n = kDim / 32;  // dimensions of a lane: l, l + 32, ...
  constexpr float norm = kDim == 64 ? 0.125f : kDim == 128 ? 0.088388347648318447f : 0.0625f;
  const uint16_t* raw = reinterpret_cast<const uint16_t*>(shared.queries);
  const bool fresh = shared.fresh;
  const int lane = renewed(thread_lane());
  if (fresh) {
    copies_done();
    __syncthreads();
  }
  KVC_UNROLL_BY(1)
  for (int m = renewed(thread_warp()); m < kHeads; m += kWarps) {
    float* q = &shared.q[m][lane];
    float x[n];
    KVC_UNROLL
    for (int i = 0; i < n; i++) {
      if (!fresh) {
        x[i] = q[32 * i];
        continue;
      }
      const uint16_t half = m < heads ? raw[m * kDim + lane + 32 * i] : 0;
      x[i] = kBfloat ? bfloat_to_float(half) : half_to_float(half);
    }
    if (turn != (!fresh && shared.rotated)) {
      KVC_UNROLL
      for (int bit = 1; bit < 32; bit *= 2) {
        KVC_UNROLL
        for (int i = 0; i < n; i++) {
          const float other = __shfl_xor_sync(kAllLanes, x[i], bit);
          x[i] = lane & bit ? other - x[i] : x[i] + other;
        }
      }
      KVC_UNROLL
      for (int half = 1; half < n; half *= 2) {
        KVC_UNROLL
        for (int i = 0; i < n; i++) {
          if (i & half) continue;
          const float a = x[i], b = x[i + half];
          x[i] = a + b, x[i + half] = a - b;
        }
      }
      KVC_UNROLL
      for (int i = 0; i < n; i++) x[i] *= norm;
    }
    KVC_UNROLL
    for (int i = 0; i < n; i++) q[32 * i] = x[i];
  }
  __syncthreads();
  if (is_first()) shared.fresh = false, shared.rotated = turn;
}

// Puts the queries in the order of a tier's keys, as operands of the tensor cores.
template <int kBits, bool kBfloat>
KVC_DEVICE void stage_queries(float factor, Shared& shared) {
  using Key = KeyRow<kDim, kBits>;
  constexpr int other = 16 / kBits;  // from a dimension of a register to the other one
  const int thread = renewed(threadIdx.x), lane = renewed(thread_lane());
  KVC_UNROLL_BY(1)
  for (int i = thread; i < kSteps * kTiles / 2 * 32; i += kThreads) {
    const int quad = i / 32, g = i % 32 >> 2, t = i & 3;
    uint32_t words[4];
    KVC_UNROLL
    for (int n = 0; n < 4; n++) {  // see Logits::step
      const int pair = kTiles == 1 ? 4 * quad + n : 2 * quad + n % 2;
      const float* from = &shared.q[g + (kTiles == 1 ? 0 : n / 2 * 8)][Key::dimension(t, pair)];
      const float by = power_of_two(-key_place<kBits>(pair % Key::kPairs));
      const float a = from[0] * by, b = from[other] * by;
      words[n] = kBfloat && kBits == kNative ? pack_bfloats(a, b) : pack_halves(a, b);
    }
    shared.queries[quad][i % 32] = uint4{words[0], words[1], words[2], words[3]};
  }
  KVC_UNROLL_BY(1)
  for (int m = thread / 32; m < kHeads; m += kWarps) {
    float sum = 0.f;
    for (int d = lane; d < kDim && kBits != kNative; d += 32) {
      const int place = key_place<kBits>(d % other);
      sum += half_to_float(float_to_half(shared.q[m][d] * power_of_two(-place))) * power_of_two(place);
    }
    for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    if (thread_lane() == 0) shared.query[m] = sum * factor;
  }
  __syncthreads();
}

// Brings outputs into the scale of a section's codes, or back out of it.
template <int kBits>
KVC_DEVICE void scale_outputs(Running& run, bool back) {
  KVC_UNROLL
  for (int n = 0; n < kOutputs * kTiles * 4; n++) {
    const int i = n / (kTiles * 4), j = n / 4 % kTiles, e = n % 4;
    const int place = value_place<kBits>((2 * i + e / 2) % (32 / kBits));
    float& o = run.o[i][j][e];
    o = back ? o * power_of_two(24 - place) - kMiddle<kBits> * run.weight[j][e % 2] : o * power_of_two(place - 24);
  }
}

// Blocks from .. until of one tier; each warp takes some of them that follow each other.
template <int kKeyBits, int kValueBits, bool kBfloat>
KVC_DEVICE void attend_tier(const Task& task, const Row& r, int tier, int from, int until, float factor,
                            Shared& shared, Running& run) {
  constexpr bool both = kBoth<kKeyBits, kValueBits>, coded = kKeyBits != kNative;
  const int mine = renewed(thread_warp()) / kShare, first = from + (until - from) * mine / kWalks;
  const int last = from + (until - from) * (mine + 1) / kWalks;
  using Way = typename WayOf<kKeyBits, kValueBits>::Type;
  Way walk(task, r, tier, least(first, until - 1), most(last, least(first, until - 1) + 1), shared);
  Loaded<kKeyBits, kValueBits> words;
  if constexpr (Way::kRing) {
    if (first < last) walk.begin();
    if (threadIdx.x == 0) walk.ones = uint4{0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
  }
  if (both) {  // these are under way while the queries are made ready
    words.load_keys(walk.k, walk.left), words.load_params(walk.params), words.load_values(walk.v, walk.left);
  }
  if (thread_lane() == 0) shared.until[mine] = last;
  stage_queries<kKeyBits, kBfloat>(factor, shared);
  if (first < last) {
    const KvcDecode& a = task.a;
    const int t = thread_lane() & 3;
    Usual usual;
    usual.factor = coded ? bits_float(renewed(float_bits(factor * power_of_two(24)))) : factor;
    usual.slots = renewed(a.softcap > 0.f || a.window > 0 || task.w.logits ? 0x7fffffff : kBlock);
    KVC_UNROLL
    for (int i = 0; i < 2 * kTiles && coded; i++) {
      usual.query_sum[i / 2][i % 2] = shared.query[i / 2 * 8 + 2 * t + i % 2];
    }
    if (coded) {
      scale_outputs<kValueBits>(run, false);
      KVC_UNROLL
      for (int i = 0; i < 4 * kTiles; i++) run.weight[i / 4][i % 4] = 0.f;
    }
    if constexpr (Way::kRing) {
      usual.ones = walk.ones;
      walk.enter();
    }
    bool more;
    do {
      more = walk.left > kBlock;
      if (both) walk.advance();
      if constexpr (Way::kRing) {
        walk.load_keys(words);
      } else if (!both) {
        words.load_keys(walk.k, walk.left), words.load_params(walk.params);
      }
      attend<kKeyBits, kValueBits, kBfloat>(run, words, walk, both && more, usual, shared);
      if (!both && (more || !Way::kRing)) walk.advance();
      walk.left -= kBlock;
    } while (more);
    if constexpr (Way::kRing) walk.end();
    if (coded) scale_outputs<kValueBits>(run, true);
  }
  __syncthreads();  // the staged queries are done with
}

// Whether this kernel knows a tier, its bits as one number: all of them, or native sections and one with codes.
KVC_DEVICE constexpr bool takes(int bits) { return !KVC_CODED || !bits || bits == KVC_CODED; }

template <bool kBfloat>
KVC_DEVICE void attend_section(const Task& task, const Row& r, int tier, int from, int until, float factor,
                               Shared& shared, Running& run) {
  const int bits = tier == kTail ? 0 : task.layout.tier[tier].key_bits * 10 + task.layout.tier[tier].value_bits;
#define KVC_TIER(key, value)                                                                       \
  case key % 16 * 10 + value % 16:                                                                 \
    if constexpr (takes(key % 16 * 10 + value % 16)) {                                             \
      attend_tier<key, value, kBfloat>(task, r, tier, from, until, factor, shared, run);           \
    }                                                                                              \
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
KVC_DEVICE void append(const Task& task, const Row& r, int position) {
  const KvcDecode& a = task.a;
  const int64_t slot = r.lengths[kTail] - 1, to = (r.row * a.tail.capacity + slot) * kDim;
  const uint16_t* k = static_cast<const uint16_t*>(a.k) + r.b * a.k_b + r.h * a.k_h;
  const uint16_t* v = static_cast<const uint16_t*>(a.v) + r.b * a.v_b + r.h * a.v_h;
  KVC_UNROLL_BY(1)
  for (int d = renewed(threadIdx.x); d < kDim; d += kThreads) {
    static_cast<uint16_t*>(a.tail.k)[to + d] = k[d];
    static_cast<uint16_t*>(a.tail.v)[to + d] = v[d];
  }
  const int64_t rows = static_cast<int64_t>(a.batch) * a.kv_heads;
  if (a.tail.fields && threadIdx.x < task.layout.n_fields) {
    static_cast<uint32_t*>(a.tail.fields)[(threadIdx.x * rows + r.row) * a.tail.capacity + slot] = 0;
  }
  if (is_first()) a.tail.position[r.b * a.tail.capacity + slot] = position;
}

// Joins the warps: sums into shared.q, largest logits and denominators into row 0 of shared.top and shared.sum.
KVC_DEVICE void join_warps(Running& run, Shared& shared) {
  const int warp = renewed(thread_warp()), lane = renewed(thread_lane());
  const int walk = warp / kShare, share = warp % kShare, g = lane >> 2, t = lane & 3;
  KVC_UNROLL
  for (int i = 0; i < 2 * kTiles; i++) {
    float &sum = run.sum[i / 2][i % 2], &offset = run.offset[i / 2][i % 2];
    KVC_UNROLL
    for (int bit = 4; bit < 32; bit *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, bit);
      offset += __shfl_xor_sync(kAllLanes, offset, bit);
    }
    const int head = i / 2 * 8 + 2 * t + i % 2;
    if (g == 0 && share == 0) shared.top[walk][head] = run.top[i / 2][i % 2], shared.sum[walk][head] = sum;
  }
  __syncthreads();
  float fade[kTiles][2];
  KVC_UNROLL
  for (int i = 0; i < 2 * kTiles; i++) {
    float top = kLowest;
    for (int w = 0; w < kWalks; w++) top = larger(top, shared.top[w][i / 2 * 8 + 2 * t + i % 2]);
    fade[i / 2][i % 2] = fast_exp2(run.top[i / 2][i % 2] - top);
  }
  for (int w = 0; w < kWalks; w++) {
    if (walk == w) {
      KVC_UNROLL
      for (int i = 0; i < kOutputs; i++) {
        KVC_UNROLL
        for (int j = 0; j < kTiles; j++) {
          KVC_UNROLL
          for (int e = 0; e < 4; e++) {
            float& to = shared.q[8 * j + 2 * t + e % 2][((share * kOutputs + i) * 2 + e / 2) * 8 + g];
            const float x = (run.o[i][j][e] + run.offset[j][e % 2]) * fade[j][e % 2];
            to = w == 0 ? x : to + x;
          }
        }
      }
    }
    __syncthreads();
  }
  if (threadIdx.x < kHeads) {
    const int m = threadIdx.x;
    float top = kLowest, sum = 0.f;
    for (int w = 0; w < kWalks; w++) top = larger(top, shared.top[w][m]);
    for (int w = 0; w < kWalks; w++) sum += shared.sum[w][m] * fast_exp2(shared.top[w][m] - top);
    shared.top[0][m] = top, shared.sum[0][m] = sum;
  }
  __syncthreads();
}

// Adds what was evicted from a row, as one slot, to the sums over all others; a warp for each head.
template <bool kBfloat>
KVC_DEVICE void add_evicted(const Task& task, const Row& r, Shared& shared) {
  const KvcDecode& a = task.a;
  const int count = a.rows.evicted_counts && r.valid ? a.rows.evicted_counts[r.row] : 0;
  if (count <= 0) return;
  const auto as_float = [](uint16_t x) { return kBfloat ? bfloat_to_float(x) : half_to_float(x); };
  const uint16_t* mean =
      static_cast<const uint16_t*>(a.rows.evicted_means) + static_cast<int64_t>(renewed(r.row)) * 2 * kDim;
  const int warp = renewed(thread_warp()), lane = renewed(thread_lane());
  KVC_UNROLL_BY(1)
  for (int m = warp; m < r.heads; m += kWarps) {
    const int64_t head = static_cast<int64_t>(r.h) * a.group + r.first_head + m;
    const uint16_t* q = static_cast<const uint16_t*>(a.q) + r.b * a.q_b + head * a.q_h;
    float x = 0.f;
    KVC_UNROLL_BY(1)
    for (int d = lane; d < kDim; d += 32) x += as_float(q[d]) * as_float(mean[d]);
    KVC_UNROLL
    for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
    x = kLog2E * (a.softcap > 0.f ? a.softcap * tanhf(x * a.scale / a.softcap) : x * a.scale);
    x += fast_log2(static_cast<float>(count));
    const float top = shared.top[0][m], sum = shared.sum[0][m], high = larger(x, top);
    const float fade = fast_exp2(top - high), weight = fast_exp2(x - high);
    KVC_UNROLL_BY(1)
    for (int d = lane; d < kDim; d += 32) {
      float& o = shared.q[m][place_of(d)];
      o = o * fade + weight * as_float(mean[kDim + d]);
    }
    __syncwarp();  // all have read what changes
    if (lane == 0) shared.top[0][m] = high, shared.sum[0][m] = sum * fade + weight;
  }
  __syncthreads();
}

// Divides by the denominators (sinks included) and writes the heads of a row.
template <bool kBfloat>
KVC_DEVICE void finish(const Task& task, const Row& r, Shared& shared) {
  const KvcDecode& a = task.a;
  add_evicted<kBfloat>(task, r, shared);
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
    task.w.lse[r.b * static_cast<int64_t>(a.kv_heads) * a.group + head + m] =
        sum > 0.f ? (top + fast_log2(sum)) * kLn2 : -infinity();
  }
  __syncthreads();
  uint16_t* out = static_cast<uint16_t*>(a.out) + r.b * a.out_b + head * a.out_h;
  for (int i = threadIdx.x; i < r.heads * kDim; i += kThreads) {
    const int m = i / kDim, d = i % kDim;
    const float x = shared.q[m][place_of(d)] * shared.sum[0][m];
    out[m * a.out_h + d] = kBfloat ? float_to_bfloat(x) : float_to_half(x);
  }
  __syncthreads();
}

// First block of the list that thread block c takes, of `parts` thread blocks.
KVC_DEVICE int part_begin(int c, int blocks, int parts) {
  return static_cast<int>(static_cast<int64_t>(c) * blocks / parts);
}
// The thread block that takes a block of the list.
KVC_DEVICE int part_of(int block, int blocks, int parts) {
  return static_cast<int>((static_cast<int64_t>(block + 1) * parts - 1) / blocks);
}

// Notes a row as the one at hand.
KVC_DEVICE void put_row(const Task& task, int index, int begin, const Row& r, Shared& shared) {
  Place& at = shared.place;
  at.index = index, at.begin = begin, at.row = r;
  at.here = task.blocks(r);
  at.from = most(at.my_begin - begin, 0), at.until = least(at.my_end - begin, at.here);
  shared.fresh = true;
}

// Finds what a thread block takes of the list, if anything (`busy`), and its first row. Each thread looks a row up, so
// that lengths are asked for once, all together, and with them what does not depend on them.
KVC_DEVICE void find_place(const Task& task, Shared& shared) {
  const int rows = task.rows(), me = blockIdx.x;
  if (threadIdx.x * kSlabsInLine < task.a.rows.n_slabs) prefetch(task.a.rows.slabs + threadIdx.x * kSlabsInLine);
  const int position = position_at(task.w.clock, task.a.position);
  Row r;
  int blocks = 0, mine = 0, end = 0;  // of the list so far; of the thread's row, and where that ends
  const auto look = [&](int first, int before) {
    int all;
    const int index = first + threadIdx.x;
    mine = 0;
    if (index < rows) r = task.row(index), mine = task.blocks(r);
    end = before + scan(mine, all, shared);
    return before + all;
  };
  KVC_UNROLL_BY(1)
  for (int first = 0; first < rows; first += kThreads) {
    blocks = look(first, blocks);
    __syncthreads();
  }
  const int parts = least(gridDim.x, most(blocks / kLeastBlocks, 1));
  if (is_first()) shared.busy = me < parts;
  const int my_begin = part_begin(me, blocks, parts);
  int before = 0;
  KVC_UNROLL_BY(1)
  for (int first = 0; first < rows; first += kThreads) {
    if (rows > kThreads) before = look(first, before);
    if (mine && my_begin >= end - mine && my_begin < end) {
      Place& at = shared.place;
      at.blocks = blocks, at.parts = parts, at.position = position, at.columns = task.columns();
      at.my_begin = my_begin, at.my_end = part_begin(me + 1, blocks, parts);
      at.first_index = first + threadIdx.x, at.first_begin = end - mine;
      put_row(task, at.first_index, at.first_begin, r, shared);
    }
    __syncthreads();
  }
}

// Makes a row the one at hand.
KVC_DEVICE void enter_row(const Task& task, int index, int begin, Shared& shared) {
  __syncthreads();  // everyone is done with the one before
  if (is_first()) put_row(task, index, begin, task.row(index), shared);
  __syncthreads();
}

// On to the next row; false at the end.
KVC_DEVICE bool next_row(const Task& task, Shared& shared) {
  const Place& at = shared.place;
  const int index = at.index + 1, begin = at.begin + at.here;
  if (begin >= at.my_end) return false;
  enter_row(task, index, begin, shared);
  return true;
}

// Sums over this thread block's part of the row at hand, in the places that join_warps names.
template <bool kBfloat>
KVC_DEVICE void attend_row(const Task& task, Shared& shared) {
  const KvcDecode& a = task.a;
  const Place& at = shared.place;
  ask_queries(a, at.row, shared);
  if (at.row.append && at.until == at.here) {
    append(task, at.row, at.position);
    __syncthreads();
  }

  // On the dot products: to powers of two, or to the argument of tanh.
  const float factor = a.softcap > 0.f ? a.scale / a.softcap : a.scale * kLog2E;
  Running run;
  run.clear();
  for (int tier = 0; tier <= kTail; tier++) {
    const int passed = blocks_before(at.row, tier);
    const int n = (at.row.lengths[tier] + kBlock - 1) / kBlock;
    const int first = most(at.from - passed, 0), last = least(at.until - passed, n);
    if (first >= last) continue;
    if (renewed(threadIdx.x) == 0) shared.place.logits = logits_of(task.w, at, tier, task.columns());
    const bool turn = tier != kTail && task.layout.tier[tier].rotate_keys;
    if (shared.fresh || turn != shared.rotated) bring_queries<kBfloat>(at.row.heads, turn, shared);
    attend_section<kBfloat>(task, at.row, tier, first, last, factor, shared, run);
  }
  copies_done();  // of a row without slots, nobody has waited for its queries
  join_warps(run, shared);
}

// Leaves this thread block's sums for the others that share the row; whoever comes last merges all and returns true.
KVC_DEVICE bool merge(const Task& task, Shared& shared) {
  constexpr int batch = 8;  // parts whose loads are under way at once
  const KvcWorkspace& w = task.w;
  const Place& at = shared.place;
  const int heads = at.row.heads;
  const int first = part_of(at.begin, at.blocks, at.parts), last = part_of(at.begin + at.here - 1, at.blocks, at.parts);
  // Of the rows a thread block works on, only its first and its last are shared with others: they have a place each.
  const int begun = at.begin > part_begin(first, at.blocks, at.parts);
  const auto place = [&](int p) { return static_cast<int64_t>(2 * p + (p == first ? begun : 0)) * kHeads; };
  const int64_t mine = place(blockIdx.x);
  float4* partial = reinterpret_cast<float4*>(w.partial);  // [][kHeads][kDim / 4]
  KVC_UNROLL_BY(1)
  for (int i = threadIdx.x; i < heads * kDim / 4; i += kThreads) {
    partial[mine * kDim / 4 + i] = *reinterpret_cast<const float4*>(&shared.q[i / (kDim / 4)][i % (kDim / 4) * 4]);
  }
  if (threadIdx.x < heads) {
    w.partial_max[mine + threadIdx.x] = shared.top[0][threadIdx.x];
    w.partial_sum[mine + threadIdx.x] = shared.sum[0][threadIdx.x];
  }
  __syncthreads();
  if (is_first()) shared.last = add_in_order(&w.arrived[at.index], 1) == last - first;
  __syncthreads();
  if (!shared.last) return false;
  const int warp = renewed(thread_warp()), lane = renewed(thread_lane());
  KVC_UNROLL_BY(1)
  for (int m = warp; m < heads; m += kWarps) {  // a warp for each head, a lane for each part
    float top = kLowest, sum = 0.f;
    KVC_UNROLL_BY(2)
    for (int p = first + lane; p <= last; p += 32) {
      const float high = w.partial_max[place(p) + m], add = w.partial_sum[place(p) + m];
      const float now = larger(top, high);
      sum = sum * fast_exp2(top - now) + add * fast_exp2(high - now);
      top = now;
    }
    float highest = top;
    KVC_UNROLL
    for (int bit = 16; bit; bit /= 2) highest = larger(highest, __shfl_xor_sync(kAllLanes, highest, bit));
    sum *= fast_exp2(top - highest);
    KVC_UNROLL
    for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    if (lane == 0) shared.top[0][m] = highest, shared.sum[0][m] = sum;
  }
  __syncthreads();
  KVC_UNROLL_BY(1)
  for (int i = threadIdx.x; i < heads * kDim / 4; i += kThreads) {
    const int m = i / (kDim / 4);
    const float top = shared.top[0][m];
    float4 sum{0.f, 0.f, 0.f, 0.f};
    for (int from = first; from <= last; from += batch) {
      float4 x[batch];
      float fade[batch];
      KVC_UNROLL
      for (int n = 0; n < batch; n++) {
        const int p = least(from + n, last);
        const int64_t there = place(p);
        x[n] = partial[there * kDim / 4 + i], fade[n] = w.partial_max[there + m];
      }
      KVC_UNROLL
      for (int n = 0; n < batch; n++) {
        const float by = from + n <= last ? fast_exp2(fade[n] - top) : 0.f;
        sum.x += x[n].x * by, sum.y += x[n].y * by, sum.z += x[n].z * by, sum.w += x[n].w * by;
      }
    }
    *reinterpret_cast<float4*>(&shared.q[m][i % (kDim / 4) * 4]) = sum;
  }
  if (is_first()) w.arrived[at.index] = 0;
  __syncthreads();
  return true;
}

// Adds the probabilities of this thread block's blocks, and their squares, to the fields of the slots. Blocks whose
// heads are further tiles of the same group may add to the same slots at the same time.
KVC_DEVICE void add_statistics(const Task& task, Shared& shared) {
  const KvcDecode& a = task.a;
  const int g = thread_lane() >> 2, t = thread_lane() & 3;
  const int columns = task.columns();
  const int i = t % 2, field = t < 2 ? a.sum_field : a.square_field;  // this lane adds to slot 2g + i
  enter_row(task, shared.place.first_index, shared.place.first_begin, shared);
  do {
    const Place& at = shared.place;
    const Row& r = at.row;
    float lse[kTiles][2];  // in powers of two; infinite where there is no such head, or it saw nothing
    KVC_UNROLL
    for (int n = 0; n < 2 * kTiles; n++) {
      const int m = n / 2 * 8 + 2 * t + n % 2;
      const int64_t head = (static_cast<int64_t>(r.b) * a.kv_heads + r.h) * a.group + r.first_head + m;
      const float x = m < r.heads ? task.w.lse[head] * kLog2E : -infinity();
      lse[n / 2][n % 2] = x > -infinity() ? x : infinity();
    }
    for (int tier = 0; tier <= kTail; tier++) {
      const int passed = blocks_before(r, tier), n = (r.lengths[tier] + kBlock - 1) / kBlock;
      const int last = least(at.until - passed, n);
      const float* logits = logits_of(task.w, at, tier, columns);
      for (int block = most(at.from - passed, 0) + thread_warp(); block < last; block += kWarps) {
        const float* from = logits + (block * kBlock + 2 * g) * static_cast<int64_t>(columns) + 2 * t;
        float sums[2][2] = {{0.f, 0.f}, {0.f, 0.f}};  // of probabilities and of squares, for both slots
        KVC_UNROLL
        for (int k = 0; k < 2 * kTiles; k++) {
          if (k / 2 * 8 + 2 * t >= columns) continue;  // there are no such heads
          const float2 x = *reinterpret_cast<const float2*>(from + k % 2 * columns + k / 2 * 8);
          const float p0 = fast_exp2(x.x - lse[k / 2][0]), p1 = fast_exp2(x.y - lse[k / 2][1]);
          sums[0][k % 2] += p0 + p1, sums[1][k % 2] += p0 * p0 + p1 * p1;
        }
        KVC_UNROLL
        for (int k = 0; k < 4; k++) {
          float& x = sums[k / 2][k % 2];
          x += __shfl_xor_sync(kAllLanes, x, 1);
          x += __shfl_xor_sync(kAllLanes, x, 2);
        }
        const int slot = block * kBlock + 2 * g + i;
        if (field < 0 || slot >= r.lengths[tier]) continue;
        float* to;
        if (tier == kTail) {
          const int64_t rows = static_cast<int64_t>(a.batch) * a.kv_heads;
          to = static_cast<float*>(a.tail.fields) + (field * rows + r.row) * a.tail.capacity + slot;
        } else {
          const KvcTier& its = task.layout.tier[tier];
          uint8_t* page = page_of(task.layout, a.rows, tier, r.row, slot);
          to = reinterpret_cast<float*>(field_of(its, page, field, slot % its.slots));
        }
        const float add0 = t < 2 ? sums[0][0] : sums[1][0], add1 = t < 2 ? sums[0][1] : sums[1][1];
        atomicAdd(to, i ? add1 : add0);
      }
    }
  } while (next_row(task, shared));
}

// Waits until all thread blocks have come here; the launch has to be cooperative.
KVC_DEVICE void wait_for_all(int32_t* arrived) {
  __syncthreads();
  if (is_first()) {
    add_in_order(arrived, 1);
    wait_for_value(arrived, gridDim.x);
  }
  __syncthreads();
}

template <bool kBfloat>
KVC_DEVICE void decode(const KvcLayout& layout, const KvcDecode& a, const KvcWorkspace& w, Shared& shared) {
  const Task task{layout, a, w};
  find_place(task, shared);
  if (shared.busy) {
    do {
      attend_row<kBfloat>(task, shared);
      const Place& at = shared.place;
      if ((at.from == 0 && at.until == at.here) || merge(task, shared)) finish<kBfloat>(task, at.row, shared);
    } while (next_row(task, shared));
  }
  int32_t* arrived = w.arrived + task.rows();  // at the end, and where all wait
  if (w.logits) {
    wait_for_all(arrived + 1);
    if (shared.busy) add_statistics(task, shared);
  }
  if (!a.append && !w.logits) return;
  // Lengths and the clock move on when everyone has read them.
  __syncthreads();
  if (is_first()) shared.last = add_in_order(arrived, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (!shared.last) return;
  for (int b = threadIdx.x; b < a.batch && a.append; b += kThreads) {
    if ((!a.valid || a.valid[b]) && a.tail.length[b] < a.tail.capacity) a.tail.length[b]++;
  }
  if (is_first()) {
    arrived[0] = arrived[1] = 0;
    if (a.append) ++*w.clock;
  }
}

}  // namespace

#define KVC_JOIN_(a, b, c, d, e, f) a##b##c##d##e##f
#define KVC_JOIN(a, b, c, d, e, f) KVC_JOIN_(a, b, c, d, e, f)
// Shared memory is declared here: g++ forgets the section of the shim's in a template.
#define KVC_DECODE(bfloat, type)                                                              \
  KVC_KERNEL __launch_bounds__(kThreads, KVC_BLOCKS)                                          \
  KVC_JOIN(kvc_decode_, KVC_HEAD_DIM, type, _, KVC_HEADS, KVC_SUFFIX)                         \
  (KVC_PARAMETER KvcLayout layout, KVC_PARAMETER KvcDecode a, KVC_PARAMETER KvcWorkspace w) { \
    __shared__ Shared shared;                                                                 \
    decode<bfloat>(layout, a, w, shared);                                                     \
  }
KVC_DECODE(false, _f16)
KVC_DECODE(true, _bf16)
#undef KVC_DECODE
#undef KVC_JOIN
#undef KVC_JOIN_
