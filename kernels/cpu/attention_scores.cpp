// scores(): sums over the queries of p and of p^2, or the largest p, for every key and query head. Logits are computed
// twice, first for the normalisers of all queries, then for the sums: no queries x keys matrix is ever in memory, unless
// it is small, as with the last queries of a prompt. Then it is kept, as probabilities that lack their normaliser.
#include "attention_block.h"
#include "ops.h"
#include "tables.h"

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kLargest = 4;      // in KvcScores::powers
constexpr int kPieceTiles = 8;   // tiles per task of the second pass
constexpr int64_t kKept = 1 << 20;  // probabilities that are kept at most

struct Worker {
  Tile tiles[2];
  Scratch scratch;
  Queries queries[kQueryGroups];
  float m[kQueryRows];
  alignas(64) float l[kQueryRows][16];
};

struct Scores {
  const KvcScores* a;
  const KvcLayout* layout;
  Past past;
  Logits logits;
  Forms forms;
  float* norms;  // [rows][n_q * group] base-2 log of the denominators; +inf: the query adds nothing

  float* kept;   // [rows][n_q * group][tiles][kTile] 2^(logit - top), or null
  float* tops;   // [rows][n_q * group][tiles] what these are relative to; kMasked: the query sees nothing there
  int tiles;     // of the longest row

  int64_t kept_at(int row, int r, int tile) const { return (row * query_rows() + r) * tiles + tile; }
  int64_t query_rows() const { return (int64_t)a->n_q * a->group; }
  bool valid(int b, int t) const { return !a->query_valid || a->query_valid[(int64_t)b * a->n_q + t]; }

  int load_queries(int row, int first, Worker& w) const {
    const int b = row / a->kv_heads, h0 = (row % a->kv_heads) * a->group;
    const int rows = min_int(kQueryRows, query_rows() - first), groups = (rows + kHeads - 1) / kHeads;
    for (int c = 0; c < groups; ++c) {
      Queries& q = w.queries[c];
      q.count = min_int(kHeads, rows - c * kHeads);
      for (int i = 0; i < q.count; ++i) {
        const int r = first + c * kHeads + i, t = r / a->group, h = h0 + r % a->group;
        set_query(q, i, a->q, b * a->q_b + h * a->q_h + t * a->q_t, *layout, forms, logits);
      }
    }
    return groups;
  }

  // Whether a query at this position, and any later one, sees all of a tile, and its logits are what they are to be.
  bool all_seen(const Tile& t, int position) const {
    if (t.tier <= layout->n_tiers) return is_plain(t, logits);
    return logits.cap_out == 0.f && !a->window && !a->key_valid && t.n % 16 == 0 && t.position[t.n - 1] <= position;
  }

  // Calls f(tile, its number, row in block, logits, largest logit) for every query row of a block and tile; the `exclude`
  // newest positions are hidden.
  template <class F>
  void visit(int row, int first, int groups, int from, int to, int exclude, Worker& w, F f) const {
    const int b = row / a->kv_heads;
    TileWalk walk(past, row, from, to);
    Tile *tile = &w.tiles[0], *ahead = &w.tiles[1];
    for (bool more = walk.next(*tile); more; ++from) {
      more = walk.next(*ahead);
      if (more) look_ahead(*tile, *ahead, past.pages);
      Tile& t = *tile;
      open_tile(t, past.pages);
      const bool fresh = t.tier == layout->n_tiers + 1;
      for (int c = 0; c < groups; ++c) {
        const Queries& q = w.queries[c];
        const int r0 = first + c * kHeads;
        if (fresh && t.position[0] > a->position + (r0 + q.count - 1) / a->group - exclude) continue;
        compute_logits(t, q, *layout, logits, w.scratch.s);
        if (all_seen(t, a->position + r0 / a->group - exclude)) {
          float largest[kHeads];
          plain_largest(t, q.count, w.scratch.s, largest);
          for (int i = 0; i < q.count; ++i) f(t, from, c * kHeads + i, w.scratch.s[i], largest[i]);
          continue;
        }
        for (int i = 0; i < q.count; ++i) {
          const int position = a->position + (r0 + i) / a->group;
          const Visible see = {a->window ? position - a->window : INT32_MIN,
                               fresh || exclude ? position - exclude : INT32_MAX,
                               fresh && a->key_valid ? a->key_valid + (int64_t)b * a->n_k + t.start : nullptr, nullptr};
          f(t, from, c * kHeads + i, w.scratch.s[i], finish_logits(w.scratch.s[i], t, logits, see));
        }
      }
      Tile* other = tile;
      tile = ahead;
      ahead = other;
    }
  }

  void normalise(int row, int first, Worker& w) const {
    const int groups = load_queries(row, first, w), b = row / a->kv_heads, h0 = (row % a->kv_heads) * a->group;
    for (int r = 0; r < kQueryRows; ++r) {
      w.m[r] = kFloor;
      memset(w.l[r], 0, sizeof w.l[r]);
    }
    for (int c = 0; c < groups && has_evicted(a->rows, row); ++c)
      for (int i = 0; i < w.queries[c].count; ++i) {
        w.m[c * kHeads + i] = evicted_logit(a->rows, row, w.queries[c].q[i], logits);
        w.l[c * kHeads + i][0] = 1.f;
      }
    const int rows = min_int(kQueryRows, query_rows() - first);
    for (int64_t i = kept_at(row, first, 0); kept && i < kept_at(row, first + rows, 0); ++i) tops[i] = kMasked;
    const int all_tiles = past.tiles(row);
    visit(row, first, groups, 0, all_tiles, 0, w, [&](const Tile& t, int tile, int r, const float* s, float largest) {
      const float m = largest > w.m[r] ? largest : w.m[r];
      const vf alpha = all(exp2(w.m[r] - m));
      w.m[r] = m;
      vf l[kParts];
      KVC_UNROLL for (int k = 0; k < kParts; ++k) l[k] = load(w.l[r] + k * kLanes) * alpha;
      const auto add_up = [&](float* out) {
        for (int i = 0; i < 16 * t.blocks; i += 16)
          KVC_UNROLL for (int k = 0; k < kParts; ++k) {
            const vf p = exp2(load(s + i + k * kLanes) - all(m));
            l[k] = l[k] + p;
            if (out) store(out + i + k * kLanes, p);
          }
      };
      if (kept) {
        const int64_t at = kept_at(row, first + r, tile);
        tops[at] = m;
        add_up(kept + at * kTile);
      } else add_up(nullptr);
      KVC_UNROLL for (int k = 0; k < kParts; ++k) store(w.l[r] + k * kLanes, l[k]);
    });
    for (int r = 0; r < rows; ++r) {
      float l = 0.f, m = w.m[r];
      for (int i = 0; i < 16; i += kLanes) l += reduce_add(load(w.l[r] + i));
      if (a->sinks) {
        const float s = a->sinks[h0 + (first + r) % a->group] * kLog2e, top = s > m ? s : m;
        l = l * exp2(m - top) + exp2(s - top);
        m = top;
      }
      const bool used = valid(b, (first + r) / a->group) && !(l <= 0.f);
      norms[row * query_rows() + first + r] = used ? m + log2_of(l) : __builtin_inff();
    }
  }

  // Where the tile's sums of p^power of query head h go; null = they are not wanted.
  float* destination(int power, const Tile& t, int b, int h) const {
    if (!(a->powers & power)) return nullptr;
    const KvcSums& sums = power == 1 ? a->sum : a->square;
    const int64_t row = (int64_t)b * a->kv_heads * a->group + h;
    if (t.tier < layout->n_tiers) return sums.past[t.tier] + row * a->past_stride[t.tier] + t.start;
    if (t.tier == layout->n_tiers) return sums.tail ? sums.tail + row * a->tail.capacity + t.start : nullptr;
    return sums.fresh + row * a->n_k + t.start;
  }

  void clear(int row, int from, int to, Tile& t) const {
    const int b = row / a->kv_heads, h0 = (row % a->kv_heads) * a->group;
    TileWalk walk(past, row, from, to);
    while (walk.next(t))
      for (int g = 0; g < a->group; ++g)
        for (int power = 1; power <= 2; ++power)
          if (float* out = destination(power, t, b, h0 + g)) memset(out, 0, t.n * sizeof(float));
  }

  // Adds up n probabilities; `of`: those of kLanes keys, from the first on.
  template <int SUM, int SQUARE, class P>
  static void add(float* sum, float* square, int n, P of) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const vf p = of(i);
      if (SUM) store(sum + i, load(sum + i) + p);
      if (SQUARE) store(square + i, p * p + load(square + i));
    }
    if (i == n) return;
    const vf p = of(i);
    for (int e = 0; i + e < n; ++e) {
      if (SUM) sum[i + e] += p[e];
      if (SQUARE) square[i + e] += p[e] * p[e];
    }
  }
  template <class P>
  static void keep_largest(float* out, int n, P of) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, max(load(out + i), of(i)));
    if (i == n) return;
    const vf p = of(i);
    for (int e = 0; i + e < n; ++e)
      if (p[e] > out[i + e]) out[i + e] = p[e];
  }
  template <class P>
  void take(const Tile& t, int b, int h, P of) const {
    float *sum = destination(1, t, b, h), *square = destination(2, t, b, h);
    if (a->powers & kLargest) {
      if (sum) keep_largest(sum, t.n, of);
    } else if (sum && square) add<1, 1>(sum, square, t.n, of);
    else if (sum) add<1, 0>(sum, square, t.n, of);
    else if (square) add<0, 1>(sum, square, t.n, of);
  }

  void accumulate_kept(int row, int from, int to, Tile& t) const {
    const int b = row / a->kv_heads, h0 = (row % a->kv_heads) * a->group;
    TileWalk walk(past, row, from, to);
    for (; walk.next(t); ++from)
      for (int r = 0; r < query_rows(); ++r) {
        const int64_t at = kept_at(row, r, from);
        if (tops[at] <= kMasked) continue;  // NaN goes through
        const vf factor = all(exp2(tops[at] - norms[row * query_rows() + r]));
        const float* p = kept + at * kTile;
        take(t, b, h0 + r % a->group, [&](int i) {
          vf x = load(p + i) * factor;
          asm("" : "+m"(x));  // rounded here: sums of p are the same with and without those of p^2
          return x;
        });
      }
  }

  void accumulate(int row, int from, int to, Worker& w) const {
    const int b = row / a->kv_heads, h0 = (row % a->kv_heads) * a->group;
    clear(row, from, to, w.tiles[0]);
    if (kept) return accumulate_kept(row, from, to, w.tiles[0]);
    for (int first = 0; first < query_rows(); first += kQueryRows) {
      const int groups = load_queries(row, first, w);
      const float* norm = norms + row * query_rows() + first;
      visit(row, first, groups, from, to, a->exclude, w, [&](const Tile& t, int, int r, const float* s, float) {
        const int h = h0 + (first + r) % a->group;
        take(t, b, h, [&](int i) { return exp2(load(s + i) - all(norm[r])); });
      });
    }
  }
};

thread_local Arena arena;

}  // namespace

int scores(KvcScores* a) {
  const KvcLayout& layout = *a->rows.layout;
  if (!all_known(a->rows)) return KVC_BAD_PAGE;
  if (!positions_fit(a->position, a->n_q) || !positions_fit(a->key_position, a->n_k)) return KVC_BAD_ARGUMENT;
  Scores s;
  s.a = a;
  s.layout = &layout;
  s.logits = logits_of(a->scale, a->softcap);
  s.forms = forms_of(a->rows, false);
  s.past.pages = {&a->rows, &a->tail, a->kv_heads, a->position_field, a->window != 0 || a->exclude != 0,
                  element_bytes(layout.dtype)};
  s.past.fresh = {static_cast<const char*>(a->k), static_cast<const char*>(a->k), a->k_b, a->k_h, a->k_t, a->k_b,
                  a->k_h, a->k_t, a->n_k, a->key_position, true};
  s.past.measure();
  const int rows = a->batch * a->kv_heads;
  const int64_t blocks = (s.query_rows() + kQueryRows - 1) / kQueryRows;

  double slots = 0;
  int most = 0;
  for (int row = 0; row < rows; ++row) {
    const int tiles = s.past.tiles(row);
    slots += (double)kTile * tiles;
    if (tiles > most) most = tiles;
  }
  const int pieces = (most + kPieceTiles - 1) / kPieceTiles;
  s.tiles = most;
  const bool keeps = !a->exclude && (int64_t)kTile * most * s.query_rows() * rows <= kKept;
  int threads = max_threads();
  if (slots * s.query_rows() * layout.head_dim < 1.5e6 * threads) threads = 1;

  Carve carve = {nullptr};
  Worker* workers = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    workers = carve.take<Worker>(threads);
    s.norms = carve.take<float>(s.query_rows() * rows);
    s.past.interleaved = carve.take<char>(s.past.row_bytes * rows);
    s.tops = carve.take<float>(keeps ? s.kept_at(rows, 0, 0) : 0);
    s.kept = carve.take<float>(keeps ? s.kept_at(rows, 0, 0) * kTile : 0);
    if (pass == 0) {
      char* base = arena.reserve(carve.at);
      if (!base) return KVC_BAD_ARGUMENT;
      carve = {base};
    } else if (!keeps) s.kept = nullptr;
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row) s.past.prepare(row);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks * rows; ++i)
      s.normalise((int)(i % rows), (int)((blocks - 1 - i / rows) * kQueryRows), workers[thread_index()]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (int64_t)pieces * rows; ++i) {
      const int row = (int)(i % rows), from = (int)(i / rows) * kPieceTiles;
      s.accumulate(row, from, from + kPieceTiles, workers[thread_index()]);
    }
  }
  arena.trim();
  return KVC_OK;
}

}  // namespace KVC_ISA
}  // namespace kvc
