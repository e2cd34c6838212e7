// Runs device-only CUDA C++ on the CPU, for tests: one fiber per CUDA thread, blocks one after another; those of a
// cooperative launch take turns, and one that waits for others lets them go on.
//
// A fiber runs until it meets a barrier, so threads are interleaved only there; `order` turns that into three
// schedules (ascending, descending, shuffled), which between them show most missing barriers. Shared memory is
// poisoned before each block. Nothing here says anything about speed.
#ifndef KVC_CUDA_SHIM_H
#define KVC_CUDA_SHIM_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#define KVC_KERNEL extern "C" void
#define KVC_DEVICE static inline
#define KVC_DEVICE_METHOD inline
#define KVC_PARAMETER const
#define KVC_UNROLL
#define KVC_IS_GLOBAL(address)
#define KVC_UNROLL_BY(n)
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Plain statics, in a section of their own: poisoned before a block begins, put aside while another has its turn.
#define __shared__ static __attribute__((section("kvc_shared")))

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 { uint32_t x, y, z; };

namespace shim {

enum Wait { kReady, kBlockBarrier, kWarpBarrier, kOtherBlocks, kGate, kFault };

struct Fiber {
  ucontext_t start;
  void* stack_pointer;
  char* stack;
  bool done;
  Wait wait;
  uint32_t mask;  // lanes the warp barrier is for; the phase of a gate
  uint64_t* gate;
};

constexpr size_t kStackBytes = 256 << 10;
constexpr int kMostThreads = 1024;

inline std::vector<Fiber> all_fibers;
inline Fiber* fibers;  // of the block at hand
inline int current, threads, order;
inline bool advanced;  // since the last look: some thread did something else than find that it must wait on
inline dim3 block_index, grid_size;
inline uint64_t exchange[kMostThreads][8];  // what lanes show each other
inline void (*body)(void*);
inline void* body_data;
inline void* scheduler;

#if defined(__x86_64__)
// swapcontext asks the kernel for the signal mask at every switch; this is forty times faster.
extern "C" void kvc_shim_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
.globl kvc_shim_switch
.hidden kvc_shim_switch
.type kvc_shim_switch, @function
kvc_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kvc_shim_switch, .-kvc_shim_switch
)");
inline void to_scheduler() { kvc_shim_switch(&fibers[current].stack_pointer, scheduler); }
inline void to_fiber(Fiber& f) { kvc_shim_switch(&scheduler, f.stack_pointer); }
#else
inline ucontext_t scheduler_context;
inline void to_scheduler() { swapcontext(&fibers[current].start, &scheduler_context); }
inline void to_fiber(Fiber& f) { swapcontext(&scheduler_context, &f.start); }
#endif

inline void run_fiber() {
  body(body_data);
  fibers[current].done = true;
  to_scheduler();
  abort();
}

inline void prepare(Fiber& f) {
  if (!f.stack) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) abort();
    f.stack = static_cast<char*>(stack);
  }
  f.done = false, f.wait = kReady;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes - 64);
  *--top = nullptr;  // the stack is 8 bytes off 16 on entry, as after a call
  *--top = reinterpret_cast<void*>(run_fiber);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f.stack_pointer = top;
#else
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack;
  f.start.uc_stack.ss_size = kStackBytes;
  f.start.uc_link = nullptr;
  makecontext(&f.start, run_fiber, 0);
#endif
}

inline void wait_for(Wait why, uint32_t mask) {
  fibers[current].wait = why, fibers[current].mask = mask;
  to_scheduler();
}

// What a launch returns. Beyond the first, what a GPU would not say, or only by hanging.
enum Status { kFine, kForEver, kTooManyThreads, kNoSuchKernel, kBadCopy, kBadGate, kNobodyWaited };
inline Status fault;

// Notes a fault; the thread goes no further.
[[noreturn]] inline void stop_with(Status why) {
  fault = why;
  for (;;) wait_for(kFault, 0);
}

// A gate as it lies in shared memory, in the place of an mbarrier. Bulk copies arrive all at once, when somebody waits
// for their gate and as many bytes are under way as it was told; until then there is poison where they go.
struct Gate {
  uint16_t made;
  uint8_t phase, told;
  uint32_t bytes;
};
constexpr uint16_t kMade = 0x6a7e;
struct BulkCopy { void* to; const void* from; uint32_t bytes; uint64_t* gate; };
inline std::vector<BulkCopy> bulk_copies;  // under way, of the block at hand

inline Gate read_gate(const uint64_t* at) {
  Gate gate;
  memcpy(&gate, at, sizeof gate);
  return gate;
}
inline void write_gate(uint64_t* at, Gate gate) { memcpy(at, &gate, sizeof gate); }

// Whether the phase has ended, or ends now.
inline bool is_open(uint64_t* at, uint32_t phase) {
  Gate gate = read_gate(at);
  if (gate.phase != phase) return true;
  uint64_t coming = 0;
  for (const BulkCopy& copy : bulk_copies) coming += copy.gate == at ? copy.bytes : 0;
  if (!gate.told || coming != gate.bytes) return false;
  for (const BulkCopy& copy : bulk_copies) {
    if (copy.gate == at) memcpy(copy.to, copy.from, copy.bytes);
  }
  bulk_copies.erase(std::remove_if(bulk_copies.begin(), bulk_copies.end(),
                                   [at](const BulkCopy& copy) { return copy.gate == at; }), bulk_copies.end());
  write_gate(at, {kMade, static_cast<uint8_t>(phase ^ 1), 0, 0});
  return true;
}

// Lets go of those whose gate is open, of warps whose named lanes have all arrived (or ended), and of the block when all
// its threads have.
inline bool release() {
  bool released = false, all = true;
  for (int i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    if (!f.done && f.wait == kGate && is_open(f.gate, f.mask)) f.wait = kReady, released = true;
  }
  for (int first = 0; first < threads; first += 32) {
    uint32_t arrived = 0, live = 0, named = 0;
    for (int lane = 0; lane < 32 && first + lane < threads; lane++) {
      const Fiber& f = fibers[first + lane];
      if (f.done) continue;
      live |= 1u << lane;
      all &= f.wait == kBlockBarrier;
      if (f.wait == kWarpBarrier) arrived |= 1u << lane, named |= f.mask;
    }
    if (!arrived || (named & live & ~arrived)) continue;
    for (int lane = 0; lane < 32; lane++) {
      if (arrived >> lane & 1) fibers[first + lane].wait = kReady;
    }
    released = true;
  }
  if (!all) return released;
  for (int i = 0; i < threads; i++) fibers[i].wait = kReady;
  return true;
}

enum Result { kEnded, kStuck, kWaiting };

// Runs a block until it ends, or its threads wait for each other for ever (a barrier that not all of them reach), or
// some wait for other blocks and the rest for these.
inline Result run_block(std::mt19937& random) {
  std::vector<int> turn(threads);
  int alive = 0;
  for (int i = 0; i < threads; i++) {
    turn[i] = order == 1 ? threads - 1 - i : i;
    alive += !fibers[i].done;
    if (fibers[i].wait == kOtherBlocks) fibers[i].wait = kReady;
  }
  while (alive) {
    if (order == 2) std::shuffle(turn.begin(), turn.end(), random);
    bool ran = false, waiting = false;
    for (int i : turn) {
      Fiber& f = fibers[i];
      if (!f.done && f.wait == kReady) {
        current = i;
        to_fiber(f);
        ran = true, alive -= f.done;
        advanced |= f.wait != kOtherBlocks;
      }
      waiting |= !f.done && f.wait == kOtherBlocks;
    }
    if (alive && !release() && !ran) return waiting ? kWaiting : kStuck;
  }
  return kEnded;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** p, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<A>*>(p[I])...);
}

extern "C" char __start_kvc_shared[], __stop_kvc_shared[];

template <class... A>
int launch(void (*kernel)(A...), uint32_t grid, uint32_t block, bool cooperative, void** parameters) {
  struct Call {
    void (*kernel)(A...);
    void** parameters;
  } data{kernel, parameters};
  if (block > kMostThreads) return kTooManyThreads;
  fault = kFine;
  bulk_copies.clear();
  const uint32_t together = cooperative ? grid : 1;  // blocks that are under way at the same time
  while (all_fibers.size() < static_cast<size_t>(together) * block) all_fibers.push_back({});
  threads = static_cast<int>(block);
  grid_size = {grid, 1, 1};
  body = [](void* d) {
    Call* c = static_cast<Call*>(d);
    call(c->kernel, c->parameters, std::index_sequence_for<A...>());
  };
  body_data = &data;
  std::mt19937 random(7);
  const size_t shared = static_cast<size_t>(__stop_kvc_shared - __start_kvc_shared);
  std::vector<std::vector<char>> aside(cooperative ? grid : 0);
  std::vector<uint32_t> turn(grid);
  for (uint32_t i = 0; i < grid; i++) turn[i] = order == 1 ? grid - 1 - i : i;
  std::vector<bool> begun(grid);
  while (!turn.empty()) {
    advanced = false;
    if (cooperative && order == 2) std::shuffle(turn.begin(), turn.end(), random);
    std::vector<uint32_t> left;
    for (uint32_t i : turn) {
      block_index = {i, 0, 0};
      fibers = &all_fibers[cooperative ? static_cast<size_t>(i) * block : 0];
      if (!begun[i]) {
        begun[i] = true;
        memset(__start_kvc_shared, 0xff, shared);
        for (int k = 0; k < threads; k++) prepare(fibers[k]);
      } else {
        memcpy(__start_kvc_shared, aside[i].data(), shared);
      }
      const Result result = run_block(random);
      if (fault) return fault;
      if (result == kStuck || (result == kWaiting && !cooperative)) return kForEver;
      if (!bulk_copies.empty()) return kNobodyWaited;
      if (result == kEnded) continue;
      aside[i].assign(__start_kvc_shared, __stop_kvc_shared);
      left.push_back(i);
    }
    if (!left.empty() && !advanced) return kForEver;
    turn.swap(left);
  }
  return kFine;
}

}  // namespace shim

#define threadIdx (dim3{static_cast<uint32_t>(shim::current), 0, 0})
#define blockIdx (shim::block_index)
#define blockDim (dim3{static_cast<uint32_t>(shim::threads), 1, 1})
#define gridDim (shim::grid_size)

static inline void __syncthreads() { shim::wait_for(shim::kBlockBarrier, 0); }
static inline void __syncwarp(uint32_t mask = 0xffffffffu) { shim::wait_for(shim::kWarpBarrier, mask); }
static inline int32_t add_in_order(int32_t* at, int32_t add) { return std::exchange(*at, *at + add); }
static inline void wait_for_value(const int32_t* at, int32_t least) {
  while (*at < least) shim::wait_for(shim::kOtherBlocks, 0);
}

template <class T>
static inline T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  const int first = shim::current & ~(width - 1);
  memcpy(&shim::exchange[shim::current][0], &value, sizeof(T));
  __syncwarp(mask);
  T result;
  memcpy(&result, &shim::exchange[first + (from & (width - 1))][0], sizeof(T));
  __syncwarp(mask);
  return result;
}
template <class T>
static inline T __shfl_xor_sync(uint32_t mask, T value, int bits) {
  return __shfl_sync(mask, value, (shim::current & 31) ^ bits);
}
static inline int __any_sync(uint32_t mask, int predicate) {
  const int first = shim::current & ~31;
  shim::exchange[shim::current][0] = predicate != 0;
  __syncwarp(mask);
  int any = 0;
  for (int lane = 0; lane < 32; lane++) any |= (mask >> lane & 1) && shim::exchange[first + lane][0];
  __syncwarp(mask);
  return any;
}
template <class T>
static inline T atomicAdd(T* at, T add) {
  const T before = *at;
  *at = before + add;
  return before;
}

KVC_DEVICE uint32_t float_bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
KVC_DEVICE float bits_float(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
template <class T>
KVC_DEVICE T renewed(T x) { return x; }
KVC_DEVICE float infinity() { return bits_float(0x7f800000u); }

// IEEE half in plain integers: the compiler's own type needs newer processors than the shim does.
KVC_DEVICE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = h >> 10 & 31u, fraction = h & 1023u;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return bits_float(sign | float_bits(static_cast<float>(fraction) * 5.9604644775390625e-8f));
  return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
}
KVC_DEVICE uint16_t float_to_half(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded fraction in the low bits
    return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}
KVC_DEVICE uint32_t pack_halves(float a, float b) {
  return float_to_half(a) | static_cast<uint32_t>(float_to_half(b)) << 16;
}
KVC_DEVICE uint32_t pack_bfloats(float a, float b) {
  const auto round = [](float x) { return (float_bits(x) + 0x7fffu + (float_bits(x) >> 16 & 1u)) >> 16; };
  return round(a) | round(b) << 16;
}
KVC_DEVICE uint32_t half2_subtract(uint32_t a, uint32_t b) {
  return pack_halves(half_to_float(a & 0xffffu) - half_to_float(b & 0xffffu),
                     half_to_float(a >> 16) - half_to_float(b >> 16));
}
KVC_DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  return pack_halves(half_to_float(a & 0xffffu) * half_to_float(b & 0xffffu) + half_to_float(c & 0xffffu),
                     half_to_float(a >> 16) * half_to_float(b >> 16) + half_to_float(c >> 16));
}
KVC_DEVICE uint32_t half2_larger(uint32_t a, uint32_t b) {
  return pack_halves(fmaxf(half_to_float(a & 0xffffu), half_to_float(b & 0xffffu)),
                     fmaxf(half_to_float(a >> 16), half_to_float(b >> 16)));
}
KVC_DEVICE uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<uint32_t>(bytes >> (8 * (selector >> 4 * i & 7u)) & 255u) << 8 * i;
  return result;
}
KVC_DEVICE float fast_exp2(float x) { return exp2f(x); }
KVC_DEVICE float fast_log2(float x) { return log2f(x); }
KVC_DEVICE float fast_reciprocal(float x) { return 1.f / x; }
KVC_DEVICE float fast_sine(float x) { return sinf(x); }
KVC_DEVICE float fast_cosine(float x) { return cosf(x); }

namespace shim {
inline float first(uint32_t pair, bool bfloat) {
  return bfloat ? bits_float(pair << 16) : half_to_float(static_cast<uint16_t>(pair));
}
// m16n8k16 by the documented fragment layout. Each lane unpacks its own fragments once for all others.
inline float a_tile[kMostThreads / 32][16][16], b_tile[kMostThreads / 32][8][16];

inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat) {
  const int warp = current >> 5, lane = current & 31, g = lane >> 2, t = lane & 3;
  auto& at = a_tile[warp];
  auto& bt = b_tile[warp];
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 2; j++) at[g + 8 * (i & 1)][2 * t + j + 8 * (i >> 1)] = first(a[i] >> 16 * j, bfloat);
  }
  for (int j = 0; j < 2; j++) bt[g][2 * t + j] = first(b0 >> 16 * j, bfloat);
  for (int j = 0; j < 2; j++) bt[g][2 * t + j + 8] = first(b1 >> 16 * j, bfloat);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const float *x = at[g + 8 * (i >> 1)], *y = bt[2 * t + (i & 1)];
    float sum = 0;
    for (int k = 0; k < 16; k++) sum += x[k] * y[k];
    c[i] += sum;
  }
  __syncwarp();
}
}  // namespace shim

namespace shim {
// ldmatrix: lane (g, t) gets the elements 2t and 2t + 1 of row g of each matrix, or of column g where transposed.
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  const int first = current & ~31, lane = current & 31, g = lane >> 2, t = lane & 3;
  exchange[current][0] = reinterpret_cast<uint64_t>(row);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    uint16_t x[2];
    for (int j = 0; j < 2; j++) {
      const int at = first + 8 * i + (transposed ? 2 * t + j : g);
      x[j] = reinterpret_cast<const uint16_t*>(exchange[at][0])[transposed ? g : 2 * t + j];
    }
    r[i] = x[0] | static_cast<uint32_t>(x[1]) << 16;
  }
  __syncwarp();
}
// Copies under way arrive when their thread waits for them, and not before.
struct Copy { void* to; const void* from; };
inline std::vector<Copy> copies[kMostThreads];
}  // namespace shim

KVC_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) { shim::load_matrices(r, row, false); }
KVC_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) { shim::load_matrices(r, row, true); }
KVC_DEVICE void copy_async(void* to, const void* from) { shim::copies[shim::current].push_back({to, from}); }
KVC_DEVICE void prefetch(const void*) {}
KVC_DEVICE void copies_done() {
  for (const shim::Copy& copy : shim::copies[shim::current]) memcpy(copy.to, copy.from, 16);
  shim::copies[shim::current].clear();
}

KVC_DEVICE void make_gate(uint64_t* gate) {
  if (shim::read_gate(gate).made == shim::kMade) shim::stop_with(shim::kBadGate);
  shim::write_gate(gate, {shim::kMade, 0, 0, 0});
}
KVC_DEVICE void unmake_gate(uint64_t* gate) {
  const shim::Gate now = shim::read_gate(gate);
  if (now.made != shim::kMade || now.told) shim::stop_with(shim::kBadGate);
  shim::write_gate(gate, {0, 0, 0, 0});
}
KVC_DEVICE void gates_made() {}
KVC_DEVICE void expect_bytes(uint64_t* gate, uint32_t bytes) {
  const shim::Gate now = shim::read_gate(gate);
  if (now.made != shim::kMade || now.told) shim::stop_with(shim::kBadGate);  // told twice: a phase nobody waited for
  shim::write_gate(gate, {shim::kMade, now.phase, 1, bytes});
}
KVC_DEVICE void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* gate) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
  const char* begin = static_cast<char*>(to);
  const bool inside = begin >= shim::__start_kvc_shared && begin + bytes <= shim::__stop_kvc_shared;
  if (all % 16 || bytes == 0 || !inside) shim::stop_with(shim::kBadCopy);
  if (shim::read_gate(gate).made != shim::kMade) shim::stop_with(shim::kBadGate);
  memset(to, 0xff, bytes);
  shim::bulk_copies.push_back({to, from, bytes, gate});
}
KVC_DEVICE void pass_gate(uint64_t* gate, uint32_t phase) {
  if (shim::read_gate(gate).made != shim::kMade) shim::stop_with(shim::kBadGate);
  shim::fibers[shim::current].gate = gate;
  shim::wait_for(shim::kGate, phase);
}
// Another lane in each schedule. Those who come early are not held up: that they may be is nothing to rely on.
KVC_DEVICE bool elected() { return (shim::current & 31) == (shim::order == 0 ? 0 : shim::order == 1 ? 31 : 13); }

KVC_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim::mma(c, a, b0, b1, false);
}
KVC_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim::mma(c, a, b0, b1, true);
}
KVC_DEVICE uint32_t transpose(uint32_t rows) {
  const int first = shim::current & ~31, row = (shim::current & 31) >> 2, column = shim::current & 3;
  memcpy(&shim::exchange[shim::current][0], &rows, 4);
  __syncwarp();
  uint32_t result = 0;
  for (int i = 0; i < 2; i++) {  // element `row` of rows 2 column and 2 column + 1
    uint32_t pair;
    memcpy(&pair, &shim::exchange[first + 4 * (2 * column + i) + row / 2][0], 4);
    result |= (pair >> row % 2 * 16 & 0xffffu) << 16 * i;
  }
  __syncwarp();
  return result;
}
#endif
