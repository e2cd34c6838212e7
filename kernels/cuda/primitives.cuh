// The few things that are not plain C++: PTX on a GPU, C++ under the host shim. No CUDA header is needed or used.
#ifndef KVC_PRIMITIVES_CUH
#define KVC_PRIMITIVES_CUH
#include <stdint.h>

#ifdef KVC_HOST_SHIM
#include "cuda_shim.h"
#else
#define KVC_KERNEL extern "C" __global__ void
#define KVC_DEVICE __device__ __forceinline__
#define KVC_DEVICE_METHOD __device__ __forceinline__
#define KVC_PARAMETER const __grid_constant__
#define KVC_UNROLL _Pragma("unroll")
// Loads of addresses that were found in memory are quicker when the compiler knows.
#define KVC_IS_GLOBAL(address) __builtin_assume(__isGlobal(address))
#define KVC_UNROLL_BY(n) KVC_PRAGMA(unroll n)
#define KVC_PRAGMA(text) _Pragma(#text)

KVC_DEVICE float half_to_float(uint16_t h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}
KVC_DEVICE uint16_t float_to_half(float x) {  // to nearest, half to even
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
// Two numbers in one register, a in the low half.
KVC_DEVICE uint32_t pack_halves(float a, float b) {
  uint32_t h;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(b), "f"(a));
  return h;
}
KVC_DEVICE uint32_t pack_bfloats(float a, float b) {
  uint32_t h;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(b), "f"(a));
  return h;
}
KVC_DEVICE uint32_t half2_subtract(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
KVC_DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
KVC_DEVICE uint32_t half2_larger(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
KVC_DEVICE uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
KVC_DEVICE float fast_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
KVC_DEVICE float fast_log2(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
KVC_DEVICE float fast_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// Of angles up to half a turn.
KVC_DEVICE float fast_sine(float x) {
  float r;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
KVC_DEVICE float fast_cosine(float x) {
  float r;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// c[16 x 8] += a[16 x 16] * b[16 x 8]; fragments as in the PTX manual, mma.m16n8k16.
KVC_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
KVC_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Transposes an 8 x 8 matrix of 16-bit elements; lane 4 r + c holds elements 2c and 2c + 1 of row r.
KVC_DEVICE uint32_t transpose(uint32_t rows) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(rows));
  return r;
}
KVC_DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }
// Four 8 x 8 matrices of two-byte elements; lane l gives the address of row l % 8 of matrix l / 8, in shared memory.
KVC_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
KVC_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// 16 bytes from global to shared memory, past the registers; there once this thread has called copies_done().
KVC_DEVICE void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Asks for the line of memory at an address that will soon be needed.
KVC_DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L1 [%0];" ::"l"(at)); }
KVC_DEVICE void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Bulk copies, from sm_90 on. A gate (mbarrier) is in shared memory. Its phases end, one after the other, each when one
// thread has said how many bytes are to come and as many have; whoever waits for that sees them.
KVC_DEVICE void make_gate(uint64_t* gate) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(gate)) : "memory");
}
KVC_DEVICE void unmake_gate(uint64_t* gate) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(gate)) : "memory");
}
// Gates that this thread has made are known to copies that it, or others behind a barrier, start from now on.
KVC_DEVICE void gates_made() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
KVC_DEVICE void expect_bytes(uint64_t* gate, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(gate)), "r"(bytes)
               : "memory");
}
// From global to shared memory; addresses and bytes are multiples of 16.
KVC_DEVICE void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* gate) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(gate)) : "memory");
}
// Waits for the end of a gate's phase: they are counted from 0, modulo 2.
KVC_DEVICE void pass_gate(uint64_t* gate, uint32_t phase) {
  uint32_t open;
  do {
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(open) : "r"(shared_address(gate)), "r"(phase) : "memory");
  } while (!open);
}
// True in one lane of a warp, all of whose lanes are here.
KVC_DEVICE bool elected() {
  uint32_t one;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(one));
  return one;
}
// Adds and returns what was there. All that this thread has seen or written before, barriers passed included, is seen by
// those who find its addition; it sees what came before additions that it finds. No fence of the whole block is needed.
KVC_DEVICE int32_t add_in_order(int32_t* at, int32_t add) {
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.s32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(add) : "memory");
  return before;
}
// Waits for other thread blocks to raise *at to `least`; only in a cooperative launch, where they all are under way.
KVC_DEVICE void wait_for_value(const int32_t* at, int32_t least) {
  int32_t now;
  do {
    asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(now) : "l"(at) : "memory");
  } while (now < least);
}
KVC_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
KVC_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
// The same number, of which the compiler knows no more: what follows from it is computed again, not kept in registers.
KVC_DEVICE int renewed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
KVC_DEVICE const uint8_t* renewed(const uint8_t* x) {
  asm volatile("" : "+l"(x));
  return x;
}
KVC_DEVICE float infinity() { return __uint_as_float(0x7f800000u); }
#endif

KVC_DEVICE float bfloat_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }
KVC_DEVICE uint16_t float_to_bfloat(float x) {  // to nearest, half to even
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
KVC_DEVICE int thread_lane() { return threadIdx.x & 31; }
KVC_DEVICE int thread_warp() { return threadIdx.x >> 5; }
KVC_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
KVC_DEVICE int least(int a, int b) { return a < b ? a : b; }
KVC_DEVICE int most(int a, int b) { return a > b ? a : b; }
#endif
