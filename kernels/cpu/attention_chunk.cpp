// chunk(): several queries per sequence over packed slots, the tail and the new keys, with online softmax. Queries
// of the heads of a group are rows of one matrix, in blocks of kQueryRows: a block reads the past once, codes as
// they are; products run in the integer units as in decode().
#include "attention_block.h"
#include "ops.h"
#include "tables.h"

namespace kvc {
namespace KVC_ISA {
namespace {

struct Worker {
  Tile tiles[2];
  Scratch scratch;
  Queries queries[kQueryGroups];
  Softmax states[kQueryGroups];
};

// Whether any of `n` flags is set.
static inline bool any_set(const uint8_t* flags, int n) {
  uint64_t all = 0;
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t eight;
    memcpy(&eight, flags + i, 8);
    all |= eight;
  }
  for (; i < n; ++i) all |= flags[i];
  return all != 0;
}

struct Chunk {
  const KvcChunk* a;
  const KvcLayout* layout;
  Past past;
  Logits logits;
  Forms forms;

  void block(int row, int first, Worker& w) const {
    const int b = row / a->kv_heads, h0 = (row % a->kv_heads) * a->group;
    const int rows = min_int(kQueryRows, (int64_t)a->n_q * a->group - first), groups = (rows + kHeads - 1) / kHeads;
    for (int c = 0; c < groups; ++c) {
      Queries& q = w.queries[c];
      q.count = min_int(kHeads, rows - c * kHeads);
      for (int i = 0; i < q.count; ++i) {
        const int r = first + c * kHeads + i, t = r / a->group, h = h0 + r % a->group;
        set_query(q, i, a->q, b * a->q_b + h * a->q_h + t * a->q_t, *layout, forms, logits);
      }
      clear(w.states[c], q.count, layout->head_dim);
      begin_with_evicted(w.states[c], q, a->rows, row, logits);
    }

    TileWalk walk(past, row, 0, past.tiles(row));
    Tile *tile = &w.tiles[0], *ahead = &w.tiles[1];
    for (bool more = walk.next(*tile); more;) {
      more = walk.next(*ahead);
      if (more) look_ahead(*tile, *ahead, past.pages);
      do_tile(*tile, b, first, groups, w);
      Tile* t = tile;
      tile = ahead;
      ahead = t;
    }

    for (int r = 0; r < rows; ++r) {
      const int t = (first + r) / a->group, h = h0 + (first + r) % a->group;
      Softmax& s = w.states[r / kHeads];
      finish_row(s, r % kHeads, layout->head_dim, a->sinks ? a->sinks + h : nullptr);
      store_floats(a->out, b * a->out_b + t * a->out_t + h * a->out_h, s.o[r % kHeads], layout->head_dim, layout->dtype);
    }
  }

  // Whether the mask lets any of `count` query rows see a tile of new keys.
  bool allows_any(const Tile& t, int b, int r0, int count) const {
    for (int at = r0 / a->group; at <= (r0 + count - 1) / a->group; ++at)
      if (any_set(a->allowed + ((int64_t)b * a->n_q + at) * a->n_k + t.start, t.n)) return true;
    return false;
  }

  void do_tile(Tile& t, int b, int first, int groups, Worker& w) const {
    const bool fresh = t.tier == layout->n_tiers + 1, causal = fresh && past.fresh.causal;
    open_tile(t, past.pages);
    if (t.value_bits) load_value_params(t);
    for (int c = 0; c < groups; ++c) {
      const Queries& q = w.queries[c];
      const int r0 = first + c * kHeads;
      if (causal && t.position[0] > a->position + (r0 + q.count - 1) / a->group) continue;
      if (fresh && a->window && t.position[t.n - 1] <= a->position + r0 / a->group - a->window) continue;
      if (fresh && a->allowed && !allows_any(t, b, r0, q.count)) continue;
      compute_logits(t, q, *layout, logits, w.scratch.s);
      float largest[kHeads];
      const bool plain = is_plain(t, logits) && !(fresh && (a->allowed || a->bias));
      if (plain) plain_largest(t, q.count, w.scratch.s, largest);
      for (int i = 0; i < q.count && !plain; ++i) {
        const int at = (r0 + i) / a->group, position = a->position + at;
        const int64_t mask = ((int64_t)b * a->n_q + at) * a->n_k + t.start;
        const Visible see = {a->window ? position - a->window : INT32_MIN, causal ? position : INT32_MAX,
                             fresh && a->allowed ? a->allowed + mask : nullptr,
                             fresh && a->bias ? a->bias + mask : nullptr};
        largest[i] = finish_logits(w.scratch.s[i], t, logits, see);
      }
      const bool pairs = softmax(t, w.states[c], q.count, largest, w.scratch);
      add_values(t, w.scratch, pairs, w.states[c], q.count, *layout);
    }
  }
};

thread_local Arena arena;

}  // namespace

int chunk(KvcChunk* a) {
  const KvcLayout& layout = *a->rows.layout;
  if (!all_known(a->rows)) return KVC_BAD_PAGE;
  if (!positions_fit(a->position, a->n_q) || !positions_fit(a->key_position, a->n_k)) return KVC_BAD_ARGUMENT;
  Chunk c;
  c.a = a;
  c.layout = &layout;
  c.logits = logits_of(a->scale, a->softcap);
  c.forms = forms_of(a->rows, false);
  c.past.pages = {&a->rows, &a->tail, a->kv_heads, a->position_field, a->window != 0, element_bytes(layout.dtype)};
  c.past.fresh = {static_cast<const char*>(a->k), static_cast<const char*>(a->v), a->k_b, a->k_h, a->k_t, a->v_b,
                  a->v_h, a->v_t, a->n_k, a->key_position, !a->allowed};
  c.past.measure();
  const int rows = a->batch * a->kv_heads;
  const int64_t query_rows = (int64_t)a->n_q * a->group, blocks = (query_rows + kQueryRows - 1) / kQueryRows;

  double slots = 0;
  for (int row = 0; row < rows; ++row) slots += (double)kTile * c.past.tiles(row);
  int threads = max_threads();
  if (slots * query_rows * layout.head_dim < 1.5e6 * threads) threads = 1;

  Carve carve = {nullptr};
  Worker* workers = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    workers = carve.take<Worker>(threads);
    c.past.interleaved = carve.take<char>(c.past.row_bytes * rows);
    if (pass == 0) {
      char* base = arena.reserve(carve.at);
      if (!base) return KVC_BAD_ARGUMENT;
      carve = {base};
    }
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row) c.past.prepare(row);
    // Later blocks see more keys: they come first, so that the last ones to finish are short.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks * rows; ++i)
      c.block((int)(i % rows), (int)((blocks - 1 - i / rows) * kQueryRows), workers[thread_index()]);
  }
  arena.trim();
  return KVC_OK;
}

}  // namespace KVC_ISA
}  // namespace kvc
