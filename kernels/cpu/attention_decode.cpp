// append() and decode(): one new token per sequence attends to every tier of its rows and to the tail, in one call.
//
// Work is a line of 16-slot blocks, all rows one after another, cut into equal pieces: few long rows keep all
// threads busy and many short ones waste none. A row that a cut goes through leaves one partial result per piece;
// partials are merged by log-sum-exp.
#include "attention_core.h"
#include "ops.h"
#include "tables.h"

namespace kvc {
namespace KVC_ISA {
namespace {

// ---- append ----------------------------------------------------------------------------------------------------
struct NewTokens {
  const char *k, *v;
  int64_t k_b, k_h, k_t, v_b, v_h, v_t;
  const uint8_t* valid;  // [batch, n] or null
  int32_t batch, kv_heads, n, head_dim, dtype, n_fields, position;
  const char* key_shift;  // [batch, kv_heads, head_dim], or null
  int32_t rotation;       // block of the transform of values; 0 = none
};

KVC_INLINE int count_valid(const NewTokens& x, int b) {
  if (!x.valid) return x.n;
  int count = 0;
  for (int t = 0; t < x.n; ++t) count += x.valid[(int64_t)b * x.n + t] != 0;
  return count;
}

// Whether the tail takes the tokens.
int tail_status(const KvcTail& tail, const NewTokens& x) {
  if (!positions_fit(x.position, x.n)) return KVC_BAD_ARGUMENT;
  for (int b = 0; b < x.batch; ++b) {
    const int64_t held = tail.capacity ? tail.length[b] : 0;
    if (held < 0) return KVC_BAD_ARGUMENT;
    if (held + count_valid(x, b) > tail.capacity) return KVC_TAIL_FULL;
  }
  return KVC_OK;
}

// A key less the shift of its row, rounded once.
template <int DTYPE>
KVC_INLINE void write_shifted(char* to, const char* key, const char* shift, int head_dim) {
  for (int i = 0; i < head_dim; i += kLanes) {
    const vf x = load_native<DTYPE>(key, i) - load_native<DTYPE>(shift, i);
    if (DTYPE == KVC_F32) store(to + 4 * i, x);
    else if (DTYPE == KVC_F16) to_f16(to + 2 * i, x);
    else to_bf16(to + 2 * i, x);
  }
}

void write_key(char* to, const char* key, int64_t row, const NewTokens& x) {
  const int64_t bytes = x.head_dim * element_bytes(x.dtype);
  if (!x.key_shift) {
    memcpy(to, key, bytes);
    return;
  }
  const char* shift = x.key_shift + row * bytes;
  if (x.dtype == KVC_F32) write_shifted<KVC_F32>(to, key, shift, x.head_dim);
  else if (x.dtype == KVC_F16) write_shifted<KVC_F16>(to, key, shift, x.head_dim);
  else write_shifted<KVC_BF16>(to, key, shift, x.head_dim);
}

void write_value(char* to, const char* value, const NewTokens& x) {
  if (!x.rotation) {
    memcpy(to, value, x.head_dim * element_bytes(x.dtype));
    return;
  }
  alignas(64) float v[KVC_MAX_HEAD_DIM];
  load_floats(v, value, 0, x.head_dim, x.dtype);
  rotate_value(v, x.head_dim, x.rotation);
  store_floats(to, 0, v, x.head_dim, x.dtype);
}

// Writes the tokens; tail_status() has been asked before.
void append_tokens(const KvcTail& tail, const NewTokens& x) {
  if (tail.capacity == 0) return;
  const int64_t elt = element_bytes(x.dtype), bytes = x.head_dim * elt;
  const int64_t rows = (int64_t)x.batch * x.kv_heads;
  for (int b = 0; b < x.batch; ++b) {
    int64_t slot = tail.length[b];
    for (int t = 0; t < x.n; ++t) {
      if (x.valid && !x.valid[(int64_t)b * x.n + t]) continue;
      for (int h = 0; h < x.kv_heads; ++h) {
        const int64_t row = (int64_t)b * x.kv_heads + h, at = row * tail.capacity + slot;
        write_key(static_cast<char*>(tail.k) + at * bytes, x.k + (b * x.k_b + h * x.k_h + t * x.k_t) * elt, row, x);
        write_value(static_cast<char*>(tail.v) + at * bytes, x.v + (b * x.v_b + h * x.v_h + t * x.v_t) * elt, x);
        for (int f = 0; f < x.n_fields; ++f)
          static_cast<int32_t*>(tail.fields)[f * rows * tail.capacity + at] = 0;
      }
      tail.position[b * tail.capacity + slot] = x.position + t;
      ++slot;
    }
    tail.length[b] = (int32_t)slot;
  }
}

// ---- the line of work ------------------------------------------------------------------------------------------
struct Cursor {
  int part, block;  // part: tier, or n_tiers for the tail
};

struct Line {
  const KvcDecode* a;
  Pages pages;
  int n_tiers, rows;
  int coming;                     // slots about to be appended to every row that has a new token
  int weight[KVC_MAX_TIERS + 1];  // relative cost of a block of each part
  int64_t* cost;                  // [rows + 1] work before each row; a row costs at least 1
  int64_t* blocks;                // [rows + 1] blocks before each row

  int length(int row, int part) const {
    const int b = row / a->kv_heads;
    if (a->valid && !a->valid[b]) return 0;
    if (part < n_tiers) return pages.length(row, part);
    return a->tail.capacity ? a->tail.length[b] + coming : 0;
  }
  int part_blocks(int row, int part) const { return (length(row, part) + 15) / 16; }

  // Where in the row its work unit `at` lies; a cut never splits a tile.
  Cursor locate(int row, int64_t at) const {
    at -= 1;
    for (int part = 0; part <= n_tiers; ++part) {
      const int64_t cost = (int64_t)part_blocks(row, part) * weight[part];
      if (at < cost) return {part, (int)(at > 0 ? at / weight[part] / kBlocks * kBlocks : 0)};
      at -= cost;
    }
    return {n_tiers + 1, 0};
  }
  Cursor begin(int row, int64_t low) const { return cost[row] >= low ? Cursor{0, 0} : locate(row, low - cost[row]); }
  Cursor end(int row, int64_t high) const {
    return cost[row + 1] <= high ? Cursor{n_tiers + 1, 0} : locate(row, high - cost[row]);
  }
  int row_at(int64_t at) const {
    int low = 0, high = rows;
    while (high - low > 1) {
      const int mid = low + (high - low) / 2;
      (cost[mid] <= at ? low : high) = mid;
    }
    return low;
  }
};

// Walks the tiles of a piece of the line in order.
struct Walk {
  const Line& line;
  int64_t low, high;
  int row;
  Cursor at, stop;

  Walk(const Line& l, int64_t lo, int64_t hi) : line(l), low(lo), high(hi) {
    row = line.row_at(lo);
    at = line.begin(row, low);
    stop = line.end(row, high);
  }
  bool next(Tile& t) {
    for (;;) {
      while (at.part < stop.part || (at.part == stop.part && at.block < stop.block)) {
        const int length = line.length(row, at.part), blocks = (length + 15) / 16;
        const int last = at.part == stop.part ? min_int(stop.block, blocks) : blocks;
        if (at.part > line.n_tiers || at.block >= last) {
          ++at.part;
          at.block = 0;
          continue;
        }
        const int take = min_int(kBlocks, last - at.block), start = at.block * 16;
        const int n = min_int(take * 16, length - start);
        if (at.part < line.n_tiers) packed_tile(t, line.pages, row, at.part, start, n);
        else tail_tile(t, line.pages, row, start, n);
        at.block += take;
        return true;
      }
      if (row + 1 >= line.rows || line.cost[row + 1] >= high) return false;
      ++row;
      at = {0, 0};
      stop = line.end(row, high);
    }
  }
};

struct Worker {  // per thread
  Tile tiles[2];
  Scratch scratch;
};

struct Decode {
  const KvcDecode* a;
  const KvcLayout* layout;
  Line line;
  Logits logits;
  Forms forms;
  int heads4;         // groups of up to 4 query heads per KV head
  int64_t pieces;
  bool statistics;
  float* kept;        // [blocks][group][16] base-2 logits, for statistics
  Softmax* partial;   // [pieces][2][heads4]
  Worker* workers;    // [threads]
  Queries* queries;   // [threads][heads4]
  Softmax* states;    // [threads][heads4]
  float* lse;         // [rows][group]

  int64_t cut(int64_t piece) const { return line.cost[line.rows] * piece / pieces; }
  int count(int c) const { return min_int(kHeads, a->group - c * kHeads); }

  // `first`: the row begins in the piece at hand, which then also has what was evicted from it.
  void start_row(int row, bool first, Queries* q, Softmax* s) const {
    const int b = row / a->kv_heads, h0 = (row % a->kv_heads) * a->group;
    for (int c = 0; c < heads4; ++c) {
      q[c].count = count(c);
      for (int i = 0; i < q[c].count; ++i)
        set_query(q[c], i, a->q, b * a->q_b + (h0 + c * kHeads + i) * a->q_h, *layout, forms, logits);
#if KVC_ISA_avx512
      if (forms.mixed) mix_queries(q[c], layout->head_dim, logits.scale);
#endif
      clear(s[c], q[c].count, layout->head_dim);
      if (first && (!a->valid || a->valid[b])) begin_with_evicted(s[c], q[c], a->rows, row, logits);
    }
  }

  void do_tile(Tile& t, Queries* q, Softmax* s, Scratch& w) const {
    open_tile(t, line.pages);
    if (t.value_bits) load_value_params(t);
    const Visible see = {a->window ? a->position - a->window : INT32_MIN, INT32_MAX, nullptr, nullptr};
    if (t.masked && a->window) {
      bool any = false;
      for (int i = 0; i < t.n; ++i) any |= t.position[i] > see.first;
      if (!any && !statistics) return;
    }
    for (int c = 0; c < heads4; ++c) {
      compute_logits(t, q[c], *layout, logits, w.s);
      float largest[kHeads];
      if (is_plain(t, logits)) plain_largest(t, q[c].count, w.s, largest);
      else
        for (int h = 0; h < q[c].count; ++h) largest[h] = finish_logits(w.s[h], t, logits, see);
      if (statistics) keep(t, c, q[c].count, w);
      const bool pairs = softmax(t, s[c], q[c].count, largest, w);
      add_values(t, w, pairs, s[c], q[c].count, *layout);
    }
  }

  float* kept_at(int row, int part, int block) const {
    int64_t at = line.blocks[row] + block;
    for (int p = 0; p < part; ++p) at += line.part_blocks(row, p);
    return kept + at * a->group * 16;
  }
  void keep(const Tile& t, int c, int count, const Scratch& w) const {
    float* out = kept_at(t.row, t.tier, t.start / 16) + c * kHeads * 16;
    for (int b = 0; b < t.blocks; ++b)
      for (int h = 0; h < count; ++h) memcpy(out + (b * a->group + h) * 16, w.s[h] + 16 * b, 64);
  }

  // Adds p and p^2 of the tiles of one row's piece to their fields; lse is final by now.
  void add_statistics(int row, int64_t low, int64_t high, Tile& t) const {
    Walk walk(line, low, high);
    walk.row = row;
    walk.at = line.begin(row, low);
    walk.stop = line.end(row, high);
    const float* norm = lse + (int64_t)row * a->group;
    while (walk.next(t) && t.row == row) {
      const float* s = kept_at(row, t.tier, t.start / 16);
      for (int b = 0; b < t.blocks; ++b)
        for (int i = 0; i < 16; i += kLanes) {
          vf sum = vf{}, square = vf{};
          for (int h = 0; h < a->group; ++h) {
            const vf p = exp2(load(s + (b * a->group + h) * 16 + i) - all(norm[h]));
            sum = sum + p;
            square = square + p * p;
          }
          const int n = min_int(kLanes, t.n - 16 * b - i);
          add_field(t, a->sum_field, b, i, n, sum);
          add_field(t, a->square_field, b, i, n, square);
        }
    }
  }
  static void add_field(const Tile& t, int field, int block, int at, int n, vf x) {
    if (field < 0 || n <= 0) return;
    char* p = t.fields[block] + field * t.field_bytes + 4 * at;
    if (n == kLanes) {
      store(p, load(p) + x);
      return;
    }
    for (int e = 0; e < n; ++e) {  // the tail's next slots may belong to nobody, or to another row
      float f;
      memcpy(&f, p + 4 * e, 4);
      f += x[e];
      memcpy(p + 4 * e, &f, 4);
    }
  }

  // Final output of a row whose state is complete.
  void finish(int row, Softmax* s) const {
    const int b = row / a->kv_heads, h0 = (row % a->kv_heads) * a->group;
    for (int c = 0; c < heads4; ++c)
      for (int i = 0; i < count(c); ++i) {
        const int h = h0 + c * kHeads + i;
        float norm = finish_row(s[c], i, layout->head_dim, a->sinks ? a->sinks + h : nullptr);
        if (!(norm > kFloor)) norm = norm != norm ? norm : 0.f;  // nothing seen: every logit is masked
        lse[(int64_t)row * a->group + c * kHeads + i] = norm;
        if (a->rotates_values) rotate_value(s[c].o[i], layout->head_dim, layout->rotation_block);
        store_floats(a->out, b * a->out_b + h * a->out_h, s[c].o[i], layout->head_dim, layout->dtype);
      }
  }

  void piece(int64_t index, int thread) const {
    const int64_t low = cut(index), high = cut(index + 1);
    if (low >= high) return;
    Worker& w = workers[thread];
    Queries* q = queries + (int64_t)thread * heads4;
    Softmax* own = states + (int64_t)thread * heads4;
    Walk walk(line, low, high);
    Tile *tile = &w.tiles[0], *ahead = &w.tiles[1];
    bool more = walk.next(*tile);
    for (int row = line.row_at(low); row < line.rows && line.cost[row] < high; ++row) {
      const bool before = line.cost[row] < low, after = line.cost[row + 1] > high;
      Softmax* s = before || after ? partial + (index * 2 + !before) * heads4 : own;
      start_row(row, !before, q, s);
      while (more && tile->row == row) {
        more = walk.next(*ahead);
        if (more) look_ahead(*tile, *ahead, line.pages);
        do_tile(*tile, q, s, w.scratch);
        Tile* t = tile;
        tile = ahead;
        ahead = t;
      }
      if (before || after) continue;
      finish(row, s);
      if (statistics) add_statistics(row, low, high, *ahead);
    }
  }

  // Merges the partials of every row that a cut went through.
  void finish_split_rows() const {
    for (int64_t i = 0; i < pieces;) {
      const int64_t high = cut(i + 1);
      int64_t next = i + 1;
      if (cut(i) < high && high < line.cost[line.rows]) {
        const int row = line.row_at(high);
        if (line.cost[row] < high) {  // continues in the next pieces; began in this one
          Softmax* s = partial + (i * 2 + 1) * heads4;
          for (; next < pieces && cut(next) < line.cost[row + 1]; ++next) {
            if (cut(next) == cut(next + 1)) continue;
            for (int c = 0; c < heads4; ++c) merge(s[c], partial[next * 2 * heads4 + c], count(c), layout->head_dim);
          }
          finish(row, s);
          if (next > i + 1) --next;  // the last piece may begin another split row
        }
      }
      i = next;
    }
  }
  void statistics_of_split_rows(int64_t index, Tile& t) const {
    const int64_t low = cut(index), high = cut(index + 1);
    if (low >= high) return;
    const int first = line.row_at(low), last = line.row_at(high - 1);
    if (line.cost[first] < low || line.cost[first + 1] > high) add_statistics(first, low, high, t);
    if (last != first && line.cost[last + 1] > high) add_statistics(last, low, high, t);
  }
};

thread_local Arena arena;

}  // namespace

int append(KvcAppend* a) {
  const NewTokens fresh = {static_cast<const char*>(a->k), static_cast<const char*>(a->v), a->k_b, a->k_h, a->k_t,
                           a->v_b, a->v_h, a->v_t, a->valid, a->batch, a->kv_heads, a->n_k, a->head_dim, a->dtype,
                           a->n_fields, a->position, nullptr, 0};
  const int status = tail_status(a->tail, fresh);
  if (status == KVC_OK) append_tokens(a->tail, fresh);
  return status;
}

int decode(KvcDecode* a) {
  const KvcLayout& layout = *a->rows.layout;
  const NewTokens fresh = {static_cast<const char*>(a->k), static_cast<const char*>(a->v), a->k_b, a->k_h, 0,
                           a->v_b, a->v_h, 0, a->valid, a->batch, a->kv_heads, 1, layout.head_dim, layout.dtype,
                           a->tail.fields ? layout.n_fields : 0, a->position,
                           static_cast<const char*>(a->key_shift),
                           a->rotates_values ? layout.rotation_block : 0};
  // Everything that may fail comes before the token is appended: it must not be there twice when it is tried again.
  if (!all_known(a->rows)) return KVC_BAD_PAGE;
  if (!positions_fit(a->position, 1)) return KVC_BAD_ARGUMENT;
  if (a->append) {
    const int status = tail_status(a->tail, fresh);
    if (status != KVC_OK) return status;
  }
  Decode d;
  d.a = a;
  d.layout = &layout;
  d.logits = logits_of(a->scale, a->softcap);
  d.forms = forms_of(a->rows, true);
  d.heads4 = (a->group + kHeads - 1) / kHeads;
  d.statistics = a->sum_field >= 0 || a->square_field >= 0;
  Line& line = d.line;
  line.a = a;
  line.pages = {&a->rows, &a->tail, a->kv_heads, a->position_field, a->window != 0, element_bytes(layout.dtype)};
  line.n_tiers = layout.n_tiers;
  line.coming = a->append ? 1 : 0;
  line.rows = a->batch * a->kv_heads;
  for (int t = 0; t < layout.n_tiers; ++t)
    line.weight[t] = layout.tier[t].key_bits ? 2 : layout.dtype == KVC_F32 ? 5 : 3;
  line.weight[layout.n_tiers] = 5;

  int64_t cost = line.rows, blocks = 0;
  for (int row = 0; row < line.rows; ++row)
    for (int p = 0; p <= line.n_tiers; ++p) {
      const int64_t n = line.part_blocks(row, p);
      blocks += n;
      cost += n * line.weight[p];
    }
  // Waking a thread costs about as much as this many multiply-adds; below it one thread is faster.
  const double work = (double)cost * 8 * layout.head_dim * (a->group + 2);
  const double piece_work = 1.5e6;
  const int most = max_threads();
  int threads = most;
  if (work < threads * piece_work) threads = (int)(work / piece_work);
  if (threads < 1) threads = 1;
  // Three pieces per thread even out what other programs take of a core.
  d.pieces = threads == 1 ? 1 : threads * 3;
  if (d.pieces > 1 && work < d.pieces * piece_work) d.pieces = threads;

  Carve carve = {nullptr};
  for (int pass = 0; pass < 2; ++pass) {
    line.cost = carve.take<int64_t>(line.rows + 1);
    line.blocks = carve.take<int64_t>(line.rows + 1);
    d.partial = carve.take<Softmax>(d.pieces > 1 ? d.pieces * 2 * d.heads4 : 0);
    d.workers = carve.take<Worker>(threads);
    d.queries = carve.take<Queries>((int64_t)threads * d.heads4);
    d.states = carve.take<Softmax>((int64_t)threads * d.heads4);
    d.lse = carve.take<float>((int64_t)line.rows * a->group);
    d.kept = carve.take<float>(d.statistics ? blocks * 16 * a->group : 0);
    if (pass == 0) {
      char* base = arena.reserve(carve.at);
      if (!base) return KVC_BAD_ARGUMENT;
      carve = {base};
    }
  }
  if (a->append) append_tokens(a->tail, fresh);
  line.coming = 0;
  cost = blocks = 0;
  for (int row = 0; row < line.rows; ++row) {
    line.cost[row] = cost;
    line.blocks[row] = blocks;
    cost += 1;
    for (int p = 0; p <= line.n_tiers; ++p) {
      const int64_t n = line.part_blocks(row, p);
      blocks += n;
      cost += n * line.weight[p];
    }
  }
  line.cost[line.rows] = cost;
  line.blocks[line.rows] = blocks;

  if (d.pieces == 1) {
    d.piece(0, 0);
    return KVC_OK;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < d.pieces; ++i) d.piece(i, thread_index());
  d.finish_split_rows();
  if (d.statistics) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < d.pieces; ++i) d.statistics_of_split_rows(i, d.workers[thread_index()].tiles[0]);
  }
  return KVC_OK;
}

}  // namespace KVC_ISA
}  // namespace kvc
