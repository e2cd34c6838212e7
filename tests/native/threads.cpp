// Forks at work in the native library, for ThreadSanitizer (`make tsan`): every thread appends to its own tail, packs,
// moves and lowers slots in pages of its own, and attends to those and to pages that all threads read.
//
// One layer of one sequence per thread; slab 0 is shared and only read, slab 1 + i belongs to thread i. With the argument
// `race` all threads write to the pages of the first, as forks would that did not copy shared pages before they write:
// ThreadSanitizer must see that.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <thread>
#include <vector>

#include "../../kernels/include/abi.h"

extern "C" {
int kvc_layout(KvcLayout*);
int kvc_isa_best();
int kvc_append(int, KvcAppend*);
int kvc_pack(int, KvcPack*);
int kvc_move(int, KvcMove*);
int kvc_retier(int, KvcRetier*);
int kvc_fields(int, KvcFields*);
int kvc_decode(int, KvcDecode*);
int kvc_chunk(int, KvcChunk*);
int kvc_scores(int, KvcScores*);
}

namespace {

constexpr int kThreads = 8, kHeads = 2, kGroup = 2, kDim = 32, kCapacity = 32, kShift = 3, kPages = 1 << kShift;
constexpr int kChunk = 16, kTiers = 2;

void must(int status, const char* what) {
  if (status == KVC_OK) return;
  fprintf(stderr, "%s: status %d\n", what, status);
  exit(2);
}

struct Memory {  // what all threads know
  KvcLayout layout = {};
  std::vector<std::vector<uint8_t>> slabs;
  std::vector<int64_t> addresses;
  std::vector<int32_t> pages;
};

struct Fork {
  Memory& memory;
  int isa, thread;
  std::vector<int32_t> table[kTiers], length[kTiers];
  std::vector<float> tail_k, tail_v, fresh, out, lse, past[kTiers], in_tail, of_new;
  std::vector<int32_t> tail_fields, tail_positions, positions, counts, values;
  int32_t tail_length = 0, position = 0;

  Fork(Memory& m, int i, int slab, int set) : memory(m), isa(set), thread(i) {
    for (int t = 0; t < kTiers; ++t) {
      // Column 0 of the first tier is a shared page, full already; the others are the thread's own.
      table[t].resize(kHeads * 2);
      for (int h = 0; h < kHeads; ++h)
        for (int c = 0; c < 2; ++c) table[t][h * 2 + c] = (slab << kShift) + (t * kHeads + h) * 2 + c;
      length[t].assign(kHeads, 0);
      past[t].resize(kHeads * kGroup * 2 * memory.layout.tier[t].slots);
    }
    for (int h = 0; h < kHeads; ++h) {
      table[0][h * 2] = h;
      length[0][h] = memory.layout.tier[0].slots;
    }
    tail_k.resize(kHeads * kCapacity * kDim), tail_v.resize(tail_k.size());
    tail_fields.resize(memory.layout.n_fields * kHeads * kCapacity), tail_positions.resize(kCapacity);
    fresh.resize(kHeads * kGroup * kChunk * kDim), out.resize(fresh.size()), lse.resize(kHeads * kGroup * kChunk);
    in_tail.resize(kHeads * kGroup * kCapacity), of_new.resize(kHeads * kGroup * kChunk);
    positions.resize(kHeads * kCapacity), counts.resize(kHeads);
    values.resize(kHeads * 2 * memory.layout.tier[0].slots);
    for (size_t j = 0; j < fresh.size(); ++j) fresh[j] = 0.01f * static_cast<float>((j * 37 + i) % 101) - 0.5f;
  }

  void fill(KvcRows& rows) {
    rows.layout = &memory.layout;
    rows.slabs = memory.addresses.data(), rows.slab_pages = memory.pages.data();
    rows.n_slabs = static_cast<int32_t>(memory.addresses.size());
    rows.slab_shift = kShift, rows.rows = kHeads;
    for (int t = 0; t < kTiers; ++t)
      rows.table[t] = table[t].data(), rows.table_stride[t] = 2, rows.length[t] = length[t].data();
  }
  void fill(KvcTail& tail) {
    tail.k = tail_k.data(), tail.v = tail_v.data(), tail.fields = tail_fields.data();
    tail.length = &tail_length, tail.position = tail_positions.data(), tail.capacity = kCapacity;
  }

  void decode() {
    KvcDecode a = {};
    fill(a.rows), fill(a.tail);
    a.q = a.k = a.v = fresh.data(), a.q_b = a.k_b = a.v_b = 0, a.q_h = a.k_h = a.v_h = kDim;
    a.out = out.data(), a.out_h = kDim, a.scale = 0.2f, a.position_field = -1, a.position = position++;
    a.batch = 1, a.kv_heads = kHeads, a.group = kGroup, a.append = 1, a.sum_field = a.square_field = -1;
    must(kvc_decode(isa, &a), "decode");
  }
  void append() {
    KvcAppend a = {};
    fill(a.tail);
    a.k = a.v = fresh.data(), a.k_h = a.v_h = kDim, a.k_t = a.v_t = kDim, a.position = position++;
    a.batch = 1, a.kv_heads = kHeads, a.n_k = 1, a.head_dim = kDim, a.dtype = KVC_F32, a.n_fields = 2;
    must(kvc_append(isa, &a), "append");
  }
  void chunk() {
    KvcChunk a = {};
    fill(a.rows), fill(a.tail);
    a.q = a.k = a.v = fresh.data(), a.q_h = a.k_h = a.v_h = kChunk * kDim, a.q_t = a.k_t = a.v_t = kDim;
    a.out = out.data(), a.out_t = kHeads * kGroup * kDim, a.out_h = kDim, a.lse = lse.data(), a.scale = 0.2f;
    a.position_field = -1, a.position = a.key_position = position, a.batch = 1, a.kv_heads = kHeads;
    a.group = kGroup, a.n_q = a.n_k = kChunk;
    must(kvc_chunk(isa, &a), "chunk");
  }
  void scores() {
    KvcScores a = {};
    fill(a.rows), fill(a.tail);
    a.q = a.k = fresh.data(), a.q_h = a.k_h = kChunk * kDim, a.q_t = a.k_t = kDim, a.scale = 0.2f;
    for (int t = 0; t < kTiers; ++t) a.sum.past[t] = past[t].data(), a.past_stride[t] = 2 * memory.layout.tier[t].slots;
    a.sum.tail = in_tail.data(), a.sum.fresh = of_new.data(), a.powers = 1;
    a.position_field = -1, a.position = a.key_position = position, a.batch = 1, a.kv_heads = kHeads;
    a.group = kGroup, a.n_q = a.n_k = kChunk;
    must(kvc_scores(isa, &a), "scores");
  }
  void pack() {  // the tail, into the first tier's second page
    KvcPack a = {};
    fill(a.rows);
    counts.assign(kHeads, tail_length);
    a.tier = 0, a.batch = 1, a.kv_heads = kHeads, a.n_fields = 2;
    a.k = tail_k.data(), a.v = tail_v.data(), a.k_h = a.v_h = kCapacity * kDim, a.k_t = a.v_t = kDim;
    a.count = counts.data(), a.count_h = 1;
    for (int f = 0; f < 2; ++f) a.field[f] = positions.data(), a.field_h[f] = kCapacity;
    must(kvc_pack(isa, &a), "pack");
    for (int h = 0; h < kHeads; ++h) length[0][h] += tail_length;
    tail_length = 0;
  }
  void lower() {  // everything of the first tier's second page: one move inside it, then all to the second tier
    const int slots = memory.layout.tier[0].slots, count = length[0][0] - slots;
    std::vector<int32_t> row, src, dst;
    for (int h = 0; h < kHeads; ++h)
      for (int i = 0; i < count; ++i) row.push_back(h), src.push_back(slots + i), dst.push_back(i);
    KvcMove m = {};
    fill(m.rows);
    int32_t last = slots + count - 1, first = slots, of = 0;
    m.tier = 0, m.n = 1, m.row = &of, m.dst = &first, m.src = &last;
    must(kvc_move(isa, &m), "move");
    KvcRetier r = {};
    fill(r.rows);
    r.src_tier = 0, r.dst_tier = 1, r.n = static_cast<int32_t>(row.size());
    r.row = row.data(), r.src = src.data(), r.dst = dst.data();
    must(kvc_retier(isa, &r), "retier");
    for (int h = 0; h < kHeads; ++h) length[0][h] = slots, length[1][h] = count;
  }
  void fields() {
    KvcFields a = {};
    fill(a.rows);
    a.tier = 0, a.field = 0, a.values = values.data(), a.stride = 2 * memory.layout.tier[0].slots;
    must(kvc_fields(isa, &a), "fields");
    a.tier = 1, a.field = 1, a.write = 1;
    must(kvc_fields(isa, &a), "fields");
  }
};

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 30;
  const bool race = argc > 2 && strcmp(argv[2], "race") == 0;
  Memory memory;
  KvcLayout& l = memory.layout;
  l.head_dim = kDim, l.dtype = KVC_F32, l.n_tiers = kTiers, l.n_fields = 2;
  l.tier[0].key_bits = 8, l.tier[0].value_bits = 4, l.tier[1].key_bits = 4, l.tier[1].value_bits = 2;
  must(kvc_layout(&l), "layout");
  for (int s = 0; s < 1 + kThreads; ++s) {
    memory.slabs.emplace_back(kPages * l.page_bytes);
    memory.addresses.push_back(reinterpret_cast<int64_t>(memory.slabs.back().data()));
    memory.pages.push_back(kPages);
  }
  std::atomic<int> waiting{kThreads};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] {
      Fork fork(memory, i, race ? 1 : 1 + i, kvc_isa_best());
      --waiting;
      while (waiting.load()) std::this_thread::yield();
      for (int round = 0; round < rounds; ++round) {
        for (int step = 0; step < 12; ++step) step % 4 == 3 ? fork.append() : fork.decode();
        fork.scores();
        fork.chunk();
        fork.pack();
        fork.fields();
        fork.lower();
      }
    });
  for (auto& thread : threads) thread.join();
  printf("%d threads, %d rounds%s\n", kThreads, rounds, race ? ", with a race" : ": no race");
}
