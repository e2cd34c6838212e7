// Memory of a warp for pages on their way to it by bulk copies (cp.async.bulk), which hold no registers while they are under
// way: one stage of it for each page, with a gate that opens when all of that is there.
#ifndef KVC_RING_CUH
#define KVC_RING_CUH
#include "primitives.cuh"

template <int kBytes>
struct alignas(128) Ring {
  uint8_t bytes[kBytes];
  uint64_t gates[2];

  // By all lanes of the warp that the ring belongs to.
  KVC_DEVICE_METHOD void make_gates() {
    if (thread_lane() < 2) {
      make_gate(&gates[thread_lane()]);
      gates_made();
    }
    __syncwarp();
  }
  KVC_DEVICE_METHOD void unmake_gates() {
    __syncwarp();
    if (thread_lane() < 2) unmake_gate(&gates[thread_lane()]);
    __syncwarp();
  }
};
#endif
