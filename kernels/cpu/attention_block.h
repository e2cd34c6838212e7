// What chunk and window scores share: blocks of query rows, and a walk over everything that they may see: packed
// slots, the tail, new keys.
#ifndef KVC_ATTENTION_BLOCK_H
#define KVC_ATTENTION_BLOCK_H
#include "attention_core.h"

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kQueryRows = 64;  // query rows (query x head of the group) per block; their state stays in L2
constexpr int kQueryGroups = kQueryRows / kHeads;

struct NewKeys {
  const char *k, *v;  // v may be null
  int64_t k_b, k_h, k_t, v_b, v_h, v_t;
  int32_t n, position;
  bool causal;
};

// Native keys in the order of pages (16 slots side by side): `words` 4-byte words per slot.
static inline void interleave(char* out, const char* in, int64_t stride, int n, int words) {
  static const char nothing[KVC_MAX_HEAD_DIM * 4] = {};
  for (int first = 0; first < n; first += 16, out += 64 * words)
    for (int s = 0; s < 16; s += 4) {
      const char* from[4];
      for (int r = 0; r < 4; ++r) from[r] = first + s + r < n ? in + (first + s + r) * stride : nothing;
      for (int w = 0; w < words; w += 4) put_words(out + 64 * w + 4 * s, from, 4 * w);
    }
}

struct Past {  // everything a row's queries may look at; the tail's and the new keys are interleaved once per call
  Pages pages;
  NewKeys fresh;
  char* interleaved;
  int64_t row_bytes, tail_bytes;  // of `interleaved`: per row, and of these the tail's

  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  void measure() {
    const KvcLayout& layout = *pages.rows->layout;
    int64_t longest = 0;
    const int batch = pages.rows->rows / pages.kv_heads;
    for (int b = 0; b < batch && pages.tail->capacity; ++b)
      if (pages.tail->length[b] > longest) longest = pages.tail->length[b];
    tail_bytes = padded(longest) * layout.head_dim * pages.elt;
    row_bytes = tail_bytes + padded(fresh.n) * layout.head_dim * pages.elt;
  }
  int tail_length(int row) const { return pages.tail->capacity ? pages.tail->length[row / pages.kv_heads] : 0; }
  void prepare(int row) const {
    const int64_t bytes = pages.rows->layout->head_dim * pages.elt, b = row / pages.kv_heads, h = row % pages.kv_heads;
    char* out = interleaved + row * row_bytes;
    interleave(out, static_cast<const char*>(pages.tail->k) + row * pages.tail->capacity * bytes, bytes,
               tail_length(row), (int)(bytes / 4));
    interleave(out + tail_bytes, fresh.k + (b * fresh.k_b + h * fresh.k_h) * pages.elt, fresh.k_t * pages.elt, fresh.n,
               (int)(bytes / 4));
  }
  int part_length(int row, int part) const {
    const int n_tiers = pages.rows->layout->n_tiers;
    return part < n_tiers ? pages.length(row, part) : part == n_tiers ? tail_length(row) : fresh.n;
  }
  int parts() const { return pages.rows->layout->n_tiers + 2; }
  int tiles(int row) const {
    int n = 0;
    for (int p = 0; p < parts(); ++p) n += (part_length(row, p) + kTile - 1) / kTile;
    return n;
  }

  void native_tile(Tile& t, int row, int part, int start, int n) const {
    const KvcLayout& layout = *pages.rows->layout;
    const int64_t d = layout.head_dim, bytes = d * pages.elt, b = row / pages.kv_heads, h = row % pages.kv_heads;
    const bool is_tail = part == layout.n_tiers;
    t.kind = kNative;
    t.dtype = layout.dtype;
    t.row = row;
    t.tier = part;
    t.key_bits = t.value_bits = 0;
    t.rotated = false;
    t.start = start;
    t.n = n;
    t.blocks = (n + 15) / 16;
    const char* keys = interleaved + row * row_bytes + (is_tail ? 0 : tail_bytes) + start * bytes;
    const char* values = is_tail ? static_cast<const char*>(pages.tail->v) + row * pages.tail->capacity * bytes
                                 : fresh.v + (b * fresh.v_b + h * fresh.v_h) * pages.elt;
    t.value_stride = is_tail ? d : fresh.v_t;
    for (int i = 0; i < t.blocks; ++i) {
      t.keys[i] = reinterpret_cast<const uint8_t*>(keys + 16 * i * bytes);
      t.values[i] = reinterpret_cast<const uint8_t*>(values + (start + 16 * i) * t.value_stride * pages.elt);
    }
    clear_next(t);
    t.masked = pages.need_position || n % 16 || (!is_tail && fresh.causal);
    if (!t.masked) return;
    if (is_tail) memcpy(t.position, pages.tail->position + b * pages.tail->capacity + start, 4 * n);
    else
      for (int i = 0; i < n; ++i) t.position[i] = fresh.position + start + i;
    close_positions(t);
  }
};

// The tiles first .. last of a row, in order.
struct TileWalk {
  const Past& past;
  int row, part, start, left;
  TileWalk(const Past& p, int r, int first, int last) : past(p), row(r), part(0), start(0), left(last - first) {
    for (; part < past.parts(); ++part) {
      const int n = (past.part_length(row, part) + kTile - 1) / kTile;
      if (first < n) break;
      first -= n;
    }
    start = first * kTile;
  }
  bool next(Tile& t) {
    if (left <= 0) return false;
    while (part < past.parts() && start >= past.part_length(row, part)) {
      ++part;
      start = 0;
    }
    if (part >= past.parts()) return false;
    const int n = min_int(kTile, past.part_length(row, part) - start);
    if (part < past.pages.rows->layout->n_tiers) packed_tile(t, past.pages, row, part, start, n);
    else past.native_tile(t, row, part, start, n);
    start += kTile;
    --left;
    return true;
  }
};

}  // namespace
}  // namespace KVC_ISA
}  // namespace kvc
#endif
