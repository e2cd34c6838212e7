// The queries of a prompt as if each token knew the next one (observers/foreseen.py, whose torch forms are the oracles).
// foresee(): each token's query, made from the next one's key. Tokens go in blocks; all query heads of a KV head share a
// block's keys, turned back to position 0. With bf16 keys and AVX-512 these and the maps are rounded to bf16, as in torch.
#include "ops.h"
#include "products.h"
#include "turns.h"

namespace kvc {
namespace KVC_ISA {
namespace {

constexpr int kBlock = 32;                        // tokens
constexpr int kSome = KVC_WIDTH == 64 ? 4 : 2;    // vectors of 16 that are made at once
static_assert(kBlock % kHeads == 0, "tokens come in fours");

thread_local Arena arena;

struct Worker {
  int block;  // whose turns are in cos and sin
  alignas(64) float cos[(kBlock + 1) * kMaxPairs];
  alignas(64) float sin[(kBlock + 1) * kMaxPairs];
  alignas(64) char keys[kBlock * KVC_MAX_HEAD_DIM * 4];  // [kBlock][D] floats, or bf16
  alignas(64) float queries[kBlock][KVC_MAX_HEAD_DIM];
};

struct Foresee {
  const KvcForesee* a;
  Form form;
  Turns turns;
  char* maps;  // [batch * q_heads][D / 16][D][16], or [D / 2][16][2] of bf16: what each 16 channels are made from

  int64_t map_bytes() const { return a->head_dim * form.row_bytes(); }

  void put_map(int64_t head) const {
    const int d = a->head_dim;
    const float* from = a->mapping + head * d * d;
    for (int c = 0; c < d; c += 4) {
      alignas(64) float x[4][KVC_MAX_HEAD_DIM];
      for (int i = 0; i < d; ++i)
        for (int r = 0; r < 4; ++r) x[r][i] = from[i * d + c + r];
      form.put(maps + head * map_bytes(), c, x);
    }
  }

  // The keys after tokens t0 .. t0 + used, turned back; zeros up to a multiple of four.
  void put_keys(int row, int t0, int used, Worker& w) const {
    alignas(64) float x[KVC_MAX_HEAD_DIM];
    const int64_t at = row / a->kv_heads * a->k_b + row % a->kv_heads * a->k_h;
    for (int i = 0; i < used; ++i) {
      load_floats(x, a->k, at + (t0 + i + 1) * a->k_t, a->head_dim, a->dtype);
      turns.turn<true>(x, w.cos + (i + 1) * turns.pairs, w.sin + (i + 1) * turns.pairs);
      form.put_row(w.keys + i * form.row_bytes(), x);
    }
    for (int i = used; i % kHeads; ++i) memset(w.keys + i * form.row_bytes(), 0, form.row_bytes());
  }

  // Channels 16 * at .. 16 * (at + N) of a block's queries.
  template <bool PAIRS, int N>
  void make(const char* map, const float* offset, int at, int used, Worker& w) const {
    const char *channels[N], *rows[kHeads];
    for (int i = 0; i < N; ++i) channels[i] = map + (at + i) * 16 * form.row_bytes();
    for (int t = 0; t < used; t += kHeads) {
      for (int h = 0; h < kHeads; ++h) rows[h] = w.keys + (t + h) * form.row_bytes();
      for (int part = 0; part < kParts; ++part) {
        vf sum[N][kHeads];
        products<PAIRS, N>(channels, rows, a->head_dim, part, sum);
        KVC_UNROLL for (int b = 0; b < N; ++b) {
          const int c = 16 * (at + b) + part * kLanes;
          KVC_UNROLL for (int h = 0; h < kHeads; ++h) store(w.queries[t + h] + c, sum[b][h] + load(offset + c));
        }
      }
    }
  }
  template <bool PAIRS>
  void make_all(int64_t head, int used, Worker& w) const {
    const char* map = maps + head * map_bytes();
    const float* offset = a->offset + head * a->head_dim;
    const int vectors = a->head_dim / 16;
    int at = 0;
    for (; at + kSome <= vectors; at += kSome) make<PAIRS, kSome>(map, offset, at, used, w);
    for (; at < vectors; ++at) make<PAIRS, 1>(map, offset, at, used, w);
  }

  void block(int row, int block, Worker& w) const {
    const int t0 = block * kBlock, used = min_int(kBlock, a->n - 1 - t0), d = a->head_dim;
    if (w.block != block) turns.table(t0, 1, used + 1, w.cos, w.sin);
    w.block = block;
    put_keys(row, t0, used, w);
    for (int g = 0; g < a->group; ++g) {
      const int64_t head = (int64_t)row * a->group + g;
      if (form.pairs) make_all<true>(head, used, w);
      else make_all<false>(head, used, w);
      for (int i = 0; i < used; ++i) {
        turns.turn(w.queries[i], w.cos + i * turns.pairs, w.sin + i * turns.pairs);
        store_floats(a->out, (head * a->n + t0 + i) * d, w.queries[i], d, a->dtype);
      }
    }
  }
};

}  // namespace

int foresee(KvcForesee* a) {
  Foresee c;
  c.a = a;
  c.form = {KVC_WIDTH == 64 && a->dtype == KVC_BF16, a->head_dim};
  const int rows = a->batch * a->kv_heads, blocks = (a->n - 1 + kBlock - 1) / kBlock;
  int threads = max_threads();
  if ((double)a->n * rows * a->group * a->head_dim * a->head_dim < 1.5e6 * threads) threads = 1;
  Worker* workers = nullptr;
  Carve carve = {nullptr};
  for (int pass = 0; pass < 2; ++pass) {
    workers = carve.take<Worker>(threads);
    c.turns.cos = carve.take<double>(a->pairs);
    c.turns.sin = carve.take<double>(a->pairs);
    c.maps = carve.take<char>(c.map_bytes() * rows * a->group);
    if (pass == 0) {
      char* base = arena.reserve(carve.at);
      if (!base) return KVC_NO_MEMORY;
      carve = {base};
    }
  }
  c.turns.set(a->inv_freq, a->pairs, a->start, a->interleaved);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Worker& w = workers[thread_index()];
    w.block = -1;
#pragma omp for schedule(static)
    for (int head = 0; head < rows * a->group; ++head) c.put_map(head);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < (int64_t)blocks * rows; ++i) c.block((int)(i % rows), (int)(i / rows), w);
  }
  arena.trim();
  return KVC_OK;
}

}  // namespace KVC_ISA
}  // namespace kvc
