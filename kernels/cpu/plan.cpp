// The arithmetic of plans over many rows of slots: order statistics, counts, and the rate-distortion plan. Each is one
// pass or two over scores where torch takes a pass per step; plans/ has the same in torch, which the tests compare with.
#include <stdlib.h>
#include <string.h>

#include "attention_core.h"
#include "ops.h"
#include "tables.h"

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int64_t kSerialSlots = 1 << 14;  // fewer are done before another thread has woken up

// Memory that is given back when the scope ends.
template <typename T>
struct Buffer {
  explicit Buffer(int64_t n) : at(static_cast<T*>(malloc(sizeof(T) * (n > 0 ? n : 1)))) {}
  ~Buffer() { free(at); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* at;
};

// Unsigned integers in the order of floats; -0 is 0, and NaN comes last.
inline uint32_t ordered(float x) {
  if (x != x) return 0xffffffffu;
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline float unordered(uint32_t key) {
  const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The k-th of n keys in ascending order, from the highest byte down; the keys are lost.
uint64_t select(uint64_t* keys, int64_t n, int64_t k) {
  for (int shift = 56; shift >= 0 && n > 1; shift -= 8) {
    int32_t count[256] = {0};
    for (int64_t i = 0; i < n; i++) count[keys[i] >> shift & 255]++;
    int digit = 0;
    while (k >= count[digit]) k -= count[digit++];
    if (count[digit] == n) continue;
    int64_t left = 0;
    for (int64_t i = 0; i < n; i++) {
      keys[left] = keys[i];
      left += static_cast<int>(keys[i] >> shift & 255) == digit;
    }
    n = left;
  }
  return keys[0];
}

// Sorts keys in ascending order, from the lowest byte up.
void sort(uint32_t* keys, uint32_t* spare, int64_t n) {
  for (int shift = 0; shift < 32; shift += 8) {
    int32_t place[256] = {0};
    for (int64_t i = 0; i < n; i++) place[keys[i] >> shift & 255]++;
    int32_t before = 0;
    for (int i = 0; i < 256; i++) {
      const int32_t own = place[i];
      place[i] = before;
      before += own;
    }
    for (int64_t i = 0; i < n; i++) spare[place[keys[i] >> shift & 255]++] = keys[i];
    uint32_t* other = keys;
    keys = spare;
    spare = other;
  }  // four times, so they are where they were
}

}  // namespace

int gather(KvcGather* args) {
  const KvcGather& a = *args;
  const KvcTier& t = a.rows.layout->tier[a.tier];
  if (!tier_known(a.rows, a.tier)) return KVC_BAD_PAGE;
#pragma omp parallel for schedule(static) if (a.rows.rows * a.width > kSerialSlots)
  for (int row = 0; row < a.rows.rows; row++) {
    const int64_t length = a.rows.length[a.tier][row], n = length < a.width ? length : a.width;
    const int64_t sequence = row / a.kv_heads;
    const int64_t place = a.place ? a.place[sequence % a.batch] : sequence % a.batch;
    if (place < 0) continue;
    uint32_t* values = a.values + sequence / a.batch * a.values_l + place * a.values_b + row % a.kv_heads * a.values_h;
    const int32_t* table = a.rows.table[a.tier] + row * a.rows.table_stride[a.tier];
    for (int64_t slot = 0; slot < n; slot += t.slots) {
      const int32_t id = table[slot / t.slots];
      const char* page = reinterpret_cast<const char*>(a.rows.slabs[id >> a.rows.slab_shift]) +
                         (id & ((1 << a.rows.slab_shift) - 1)) * a.rows.layout->page_bytes;
      memcpy(values + slot, page + t.fields + 4 * static_cast<int64_t>(a.field) * t.slots,
             4 * static_cast<size_t>(n - slot < t.slots ? n - slot : t.slots));
    }
  }
  return KVC_OK;
}

int lowest(KvcLowest* args) {
  const KvcLowest& a = *args;
  int failed = 0;
#pragma omp parallel if (a.rows * a.slots > kSerialSlots) reduction(| : failed)
  {
    Buffer<uint64_t> all(a.slots), kept(a.slots);
    if (!all.at || !kept.at) failed = 1;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.rows; row++) {
      const int64_t base = row * a.slots;
      uint8_t* chosen = a.chosen + base;
      const uint8_t* may = a.candidates + base;
      if (failed || a.count[row] <= 0) {
        memset(chosen, 0, a.slots);
        continue;
      }
      int64_t n = 0;
      for (int64_t i = 0; i < a.slots; i++) {
        const uint32_t position = static_cast<uint32_t>(a.positions[base + i]) ^ 0x80000000u;
        all.at[i] = static_cast<uint64_t>(ordered(a.scores[base + i])) << 32 | position;
        kept.at[n] = all.at[i];
        n += may[i] != 0;
      }
      if (a.count[row] >= n) {
        memcpy(chosen, may, a.slots);
        continue;
      }
      const uint64_t last = select(kept.at, n, a.count[row] - 1);
      int64_t equal = a.count[row];  // of those that equal the last one, the first so many
      for (int64_t i = 0; i < a.slots; i++) equal -= may[i] && all.at[i] < last;
      for (int64_t i = 0; i < a.slots; i++) {
        const bool tie = may[i] && all.at[i] == last && equal > 0;
        equal -= tie;
        chosen[i] = (may[i] && all.at[i] < last) || tie;
      }
    }
  }
  return failed ? KVC_NO_MEMORY : KVC_OK;
}

int prices(KvcPrices* args) {
  const KvcPrices& a = *args;
  int failed = 0;
#pragma omp parallel if (a.rows * a.slots > kSerialSlots) reduction(| : failed)
  {
    Buffer<uint32_t> keys(a.slots), spare(a.slots);
    if (!keys.at || !spare.at) failed = 1;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.rows; row++) {
      if (failed) continue;
      int64_t n = 0;
      for (int64_t i = 0; i < a.slots; i++) {
        keys.at[n] = ordered(a.scores[row * a.slots + i]);
        n += a.candidates[row * a.slots + i] != 0;
      }
      sort(keys.at, spare.at, n);
      for (int64_t page = 0; page < a.pages; page++) {
        const int64_t dropped = a.first[row] + page * a.step[row];
        const bool all = dropped < 1 || dropped > n;
        a.price[row * a.pages + page] = all ? __builtin_inff() : unordered(keys.at[dropped - 1]);
      }
    }
  }
  return failed ? KVC_NO_MEMORY : KVC_OK;
}

int holes(KvcHoles* args) {
  const KvcHoles& a = *args;
  int64_t found = 0;
  for (int64_t row = 0; row < a.rows; row++) {
    const int8_t* marks = a.marks + row * a.slots;
    const int64_t before = a.before[row], kept = a.kept[row];
    if (kept >= before || before > a.slots) continue;
    int64_t mover = before;
    for (int64_t hole = 0; hole < kept; hole++) {
      if (marks[hole] != a.gone) continue;
      do mover--;
      while (mover >= kept && marks[mover] == a.gone);
      if (mover < kept || found == a.room) return KVC_BAD_ARGUMENT;  // kept is not how many stay
      a.row[found] = static_cast<int32_t>(row);
      a.hole[found] = static_cast<int32_t>(hole);
      a.mover[found++] = static_cast<int32_t>(mover);
    }
  }
  args->found = found;
  return KVC_OK;
}

int places(KvcPlaces* args) {
  const KvcPlaces& a = *args;
  int64_t found = 0;
  for (int64_t row = 0; row < a.rows; row++) {
    const int8_t* marks = a.marks + row * a.slots;
    const int64_t length = a.length[row] < a.slots ? a.length[row] : a.slots;
    int32_t left = a.count[row];
    for (int64_t slot = 0, rank = 0; slot < length && left > 0; slot++) {
      if (marks[slot] != a.wanted) continue;
      if (found == a.room) return KVC_BAD_ARGUMENT;
      a.row[found] = static_cast<int32_t>(row);
      a.slot[found] = static_cast<int32_t>(slot);
      a.rank[found++] = static_cast<int32_t>(rank++);
      left--;
    }
  }
  args->found = found;
  return KVC_OK;
}

namespace {

// The slots of a row in one tier. Bytes might alias all else, so the compiler is told that they do not.
void tally_tier(const int8_t* __restrict in, const uint8_t* __restrict filled, int64_t n, int8_t from, int tiers,
                int8_t* __restrict out, int32_t* __restrict counts) {
  for (int64_t i = 0; i < n; i++) {
    const int8_t to = in[i] < from ? from : in[i];  // slots only move down
    out[i] = (in[i] < 0) | (filled[i] == 0) ? -1 : to;
  }
  for (int to = from; to < tiers; to++) {
    int32_t found = 0;
    for (int64_t i = 0; i < n;) {  // in bytes as long as they hold the sum
      const int64_t until = i + 240 < n ? i + 240 : n;
      uint8_t some = 0;
      for (; i < until; i++) some += out[i] == to;
      found += some;
    }
    counts[to] = found;
  }
}

}  // namespace

int tally(KvcTally* args) {
  const KvcTally& a = *args;
  const int64_t rows = static_cast<int64_t>(a.batch) * a.rows;
#pragma omp parallel for schedule(static) if (rows * a.slots > kSerialSlots)
  for (int64_t row = 0; row < rows; row++) {
    int32_t* counts = a.counts + row * a.tiers * a.tiers;
    memset(counts, 0, sizeof(int32_t) * a.tiers * a.tiers);
    for (int from = 0; from < a.tiers; from++) {
      const int64_t begin = a.begin[from], at = row * a.slots + begin;
      tally_tier(a.targets + at, a.filled + at, a.begin[from + 1] - begin, static_cast<int8_t>(from), a.tiers,
                 a.out + at, counts + from * a.tiers);
    }
  }
  return KVC_OK;
}

namespace {

constexpr int kBins = KVC_PLAN_BINS, kSteps = KVC_MAX_TIERS, kPerRow = kBins + 1;

// One sequence of the rate-distortion plan: plans/rate_distortion.py says what is done, and does the same in torch.
struct Shares {
  const KvcShares& a;
  int64_t b;
  int steps, tiers, last;
  const int32_t *tier, *offset;
  int32_t* below;    // [rows, tiers, 2, kPerRow]: slots less than k bins below the top, and of these those that are free,
                     // with all that are protected
  int32_t* pages;    // [rows, last + 1]: pages of a row for each multiplier
  uint16_t* depth;   // [rows, slots]
  bool whole = false;

  const int32_t* counts(int64_t row, int of_tier, bool stored) const {
    return below + ((row * tiers + of_tier) * 2 + stored) * kPerRow;
  }
  int64_t spp(int64_t row, int of_tier) const { return a.slots_per_page[row * tiers + of_tier]; }
  int32_t room(int of_tier) const { return a.room[b * tiers + of_tier]; }

  void count() {
    const int64_t n = static_cast<int64_t>(a.rows) * a.slots, base = b * n;
    const int32_t top = highest(a.importance + base, a.filled + base, n);
    for (int64_t row = 0; row < a.rows; row++) {
      int32_t* mine = below + row * tiers * 2 * kPerRow;
      uint16_t* deep = depth + row * a.slots;
      const uint8_t* filled = a.filled + base + row * a.slots;
      const uint8_t* protects = a.protects + base + row * a.slots;
      memset(mine, 0, sizeof(int32_t) * tiers * 2 * kPerRow);
      look_up(a.importance + base + row * a.slots, filled, a.slots, top, a.shift, deep);
      for (int64_t i = 0; i < a.slots; i++)
        if (filled[i]) mine[(a.tier_of[i] * 2 + !protects[i]) * kPerRow + deep[i] + 1]++;
      for (int t = 0; t < tiers; t++) {  // [protected, free] to [both, free and all protected]
        int32_t *kept = mine + t * 2 * kPerRow, *free = kept + kPerRow;
        for (int k = 1; k < kPerRow; k++) kept[k] += kept[k - 1], free[k] += free[k - 1];
        const int32_t every = kept[kBins];
        for (int k = 0; k < kPerRow; k++) kept[k] += free[k], free[k] += every;
      }
    }
  }
  // In the order of numbers; below zero and NaN count as zero, infinity as the largest number.
  static int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    bits = bits > 0x7f800000 ? 0 : bits < 0 ? 0 : bits;
    return bits > 0x7f7fffff ? 0x7f7fffff : bits;
  }
  static int32_t highest(const float* __restrict importance, const uint8_t* __restrict filled, int64_t n) {
    int32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
      const int32_t bits = filled[i] ? bits_of(importance[i]) : 0;
      top = bits > top ? bits : top;
    }
    return top;
  }
  // How many bins each slot lies below the top.
  static void look_up(const float* __restrict importance, const uint8_t* __restrict filled, int64_t n, int32_t top,
                      int shift, uint16_t* __restrict deep) {
    for (int64_t i = 0; i < n; i++) {
      const int32_t bins = (top - (filled[i] ? bits_of(importance[i]) : 0)) >> shift;
      deep[i] = static_cast<uint16_t>(bins < kBins - 1 ? bins : kBins - 1);
    }
  }

  int threshold(int c, int step) const {
    if (step == 0 && whole) return kBins;
    const int k = c - offset[step];
    return k < 0 ? 0 : k > kBins ? kBins : k;
  }

  // Slots of a row in each tier.
  void occupancy(int64_t row, const int* threshold, int32_t* slots) const {
    for (int t = 0; t < tiers; t++) {
      int step = 0;
      while (step < steps && tier[step] > t) step++;
      slots[t] = 0;
      if (step == steps) continue;
      slots[t] = counts(row, t, step == 0)[threshold[step]];
      if (tier[step] != t) continue;
      for (int other = 0; other < t; other++) {
        slots[t] += counts(row, other, step == 0)[threshold[step]];
        if (step + 1 < steps) slots[t] -= counts(row, other, false)[threshold[step + 1]];
      }
    }
  }
  int32_t pages_of(int64_t row, const int32_t* slots) const {
    int64_t total = 0;
    for (int t = 0; t < tiers; t++) total += (slots[t] + room(t) + spp(row, t) - 1) / spp(row, t);
    return static_cast<int32_t>(total);
  }
  int32_t pages_at(int64_t row, const int* threshold) const {
    int32_t slots[kSteps];
    occupancy(row, threshold, slots);
    return pages_of(row, slots);
  }
  // Adds to slots[last + 1] how many pass a step at every multiplier, `sign` times.
  void add_passing(const int32_t* __restrict passing, int step, int32_t sign, int32_t* __restrict slots) const {
    const int n = last + 1, first = step == 0 && whole ? 0 : offset[step];
    const int end = step == 0 && whole ? 0 : first + kBins < n ? first + kBins : n;  // as threshold() has it
    const int32_t none = sign * passing[0], all = sign * passing[kBins];
    for (int c = 0; c < first; c++) slots[c] += none;
    for (int c = first; c < end; c++) slots[c] += sign * passing[c - first];
    for (int c = end; c < n; c++) slots[c] += all;
  }
  // The same for every multiplier: [last + 1], with as many integers to work in.
  void pages_at_all(int64_t row, int32_t* result, int32_t* slots) const {
    const int n = last + 1;
    memset(result, 0, sizeof(int32_t) * n);
    for (int t = 0; t < tiers; t++) {
      int step = 0;
      while (step < steps && tier[step] > t) step++;
      memset(slots, 0, sizeof(int32_t) * n);
      if (step < steps) {
        const bool all = tier[step] == t;
        for (int other = all ? 0 : t; other <= t; other++) add_passing(counts(row, other, step == 0), step, 1, slots);
        for (int other = 0; all && step + 1 < steps && other < t; other++)
          add_passing(counts(row, other, false), step + 1, -1, slots);
      }
      const double per_page = static_cast<double>(spp(row, t));
      const int32_t more = room(t) + static_cast<int32_t>(spp(row, t)) - 1;
      for (int c = 0; c < n; c++) result[c] += static_cast<int32_t>((slots[c] + more) / per_page);
    }
  }

  // Lowers thresholds as far as pages that are started anyway have room, from the best tier down.
  void fill_pages(int64_t row, int* at) const {
    int32_t slots[kSteps];
    occupancy(row, at, slots);
    for (int step = steps - 1; step >= 0; step--) {
      const int into = tier[step];
      const int64_t kept_free = room(into);
      const int64_t most = (slots[into] + kept_free + spp(row, into) - 1) / spp(row, into) * spp(row, into) - kept_free;
      int64_t taken = 0;
      if (step + 1 < steps)
        for (int t = 0; t < into; t++) taken += counts(row, t, false)[at[step + 1]];
      int low = -1, high = kBins;  // the last threshold that has room; none if low stays
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        int64_t sum = -taken;
        for (int t = 0; t <= into; t++) sum += counts(row, t, step == 0)[middle];
        if (sum <= most) low = middle;
        else high = middle - 1;
      }
      if (step && low > at[step - 1]) low = at[step - 1];
      if (low > at[step]) at[step] = low;
    }
  }

  bool solve(int* thresholds) {  // [rows, kSteps]; false if memory has run out
    const int64_t allowed = a.allowed[b];
    if (a.guesses) {
      int64_t bytes = 0;
      int at[kSteps] = {kBins};
      for (int64_t row = 0; row < a.rows; row++) bytes += pages_at(row, at) * a.page_bytes[row];
      whole = bytes <= allowed;
    }
    const int n = last + 1;
    Buffer<int64_t> total(n);
    Buffer<int32_t> spare(n);
    Buffer<int> following(a.rows), filled(a.rows * kSteps);
    if (!total.at || !spare.at || !following.at || !filled.at) return false;
    memset(total.at, 0, sizeof(int64_t) * n);
    for (int64_t row = 0; row < a.rows; row++) {
      int32_t* mine = pages + row * n;
      pages_at_all(row, mine, spare.at);
      for (int c = 0; c < n; c++) total.at[c] += mine[c] * a.page_bytes[row];
    }
    int best = 0;
    for (int c = 0; c < n; c++) best = total.at[c] <= allowed ? c : best;
    // What is left buys one more page each for the rows whose next slots are the most important.
    for (int64_t row = 0; row < a.rows; row++) {
      const int32_t* mine = pages + row * n;
      int c = best + 1;
      while (c <= last && mine[c] <= mine[best]) c++;
      following.at[row] = c;
      for (int step = 0; step < steps; step++) thresholds[row * kSteps + step] = threshold(best, step);
    }
    int64_t left = allowed - total.at[best];
    for (int c = best + 1; c <= last && left >= 0; c++)
      for (int64_t row = 0; row < a.rows && left >= 0; row++) {
        if (following.at[row] != c) continue;
        left -= (pages[row * n + c] - pages[row * n + best]) * a.page_bytes[row];
        if (left < 0) break;
        for (int step = 0; step < steps; step++) thresholds[row * kSteps + step] = threshold(c, step);
      }
    int64_t before = 0, after = 0;
    for (int64_t row = 0; row < a.rows; row++) {
      int* mine = filled.at + row * kSteps;
      memcpy(mine, thresholds + row * kSteps, sizeof(int) * kSteps);
      before += pages_at(row, mine) * a.page_bytes[row];
      fill_pages(row, mine);
      after += pages_at(row, mine) * a.page_bytes[row];
    }
    if (after <= before) memcpy(thresholds, filled.at, sizeof(int) * a.rows * kSteps);
    return true;
  }

  void share_out(const int* thresholds) const {
    for (int64_t row = 0; row < a.rows; row++) {
      const int64_t slot = (b * a.rows + row) * a.slots;
      share_row(thresholds + row * kSteps, depth + row * a.slots, a.filled + slot, a.protects + slot, a.tier_of,
                a.slots, a.targets + slot);
    }
  }
  void share_row(const int* at, const uint16_t* __restrict deep, const uint8_t* __restrict filled,
                 const uint8_t* __restrict protects, const int32_t* __restrict tier_of, int64_t n,
                 int8_t* __restrict out) const {
    const int8_t cheapest = static_cast<int8_t>(tier[0]);
    for (int64_t i = 0; i < n; i++) out[i] = (deep[i] < at[0]) | (protects[i] != 0) ? cheapest : -1;
    for (int step = 1; step < steps; step++) {
      const uint16_t least = static_cast<uint16_t>(at[step]);
      const int8_t better = static_cast<int8_t>(tier[step]);
      for (int64_t i = 0; i < n; i++) out[i] = deep[i] < least ? better : out[i];
    }
    for (int64_t i = 0; i < n; i++) {
      const int8_t lowest = static_cast<int8_t>(tier_of[i]), result = out[i];
      out[i] = (result < 0) | (filled[i] == 0) ? -1 : result < lowest ? lowest : result;
    }
  }
};

thread_local Arena arena;

}  // namespace

int shares(KvcShares* args) {
  const KvcShares& a = *args;
  int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) if (a.batch * a.rows * a.slots > kSerialSlots) reduction(| : failed)
  for (int64_t b = 0; b < a.batch; b++) {
    Shares one{a, b, a.steps[b], a.tiers, 0, a.hull_tier + b * kSteps, a.offset + b * kSteps, nullptr, nullptr, nullptr};
    one.last = kBins + one.offset[one.steps - 1];
    int* thresholds = nullptr;
    Carve carve = {nullptr};
    for (int pass = 0; pass < 2; pass++) {
      one.below = carve.take<int32_t>(a.rows * a.tiers * 2 * kPerRow);
      one.pages = carve.take<int32_t>(a.rows * (one.last + 1));
      one.depth = carve.take<uint16_t>(a.rows * a.slots);
      thresholds = carve.take<int>(a.rows * kSteps);
      if (pass == 0) carve = {arena.reserve(carve.at)};
      if (!carve.base) break;
    }
    if (!carve.base) {
      failed = 1;
      continue;
    }
    one.count();
    if (one.solve(thresholds)) one.share_out(thresholds);
    else failed = 1;
    arena.trim();
  }
  return failed ? KVC_NO_MEMORY : KVC_OK;
}

}  // namespace KVC_ISA
}  // namespace kvc
