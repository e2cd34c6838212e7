// For the test of the shim's bulk copies: one of them, with each of the things that may be wrong.
KVC_KERNEL kvc_shim_bulk(const uint8_t* from, uint8_t* to, int bytes, int expected, int skew, int waits, int early,
                         int made) {
  struct alignas(16) Shared {
    uint8_t bytes[512];
    uint64_t gate;
  };
  __shared__ Shared shared;
  for (int i = 0; i < made && threadIdx.x == 0; i++) make_gate(&shared.gate);
  gates_made();
  __syncthreads();
  for (uint32_t turn = 0; turn < 2; turn++) {  // one phase, and the next
    if (elected()) {
      expect_bytes(&shared.gate, expected);
      copy_bulk(shared.bytes + skew, from + turn * 512, bytes, &shared.gate);
    }
    if (early) to[turn * 512 + threadIdx.x] = shared.bytes[skew + threadIdx.x];
    if (waits < 0) return;
    if (waits) pass_gate(&shared.gate, turn % 2);
    if (!early) to[turn * 512 + threadIdx.x] = shared.bytes[skew + threadIdx.x];
    __syncwarp();
  }
  if (threadIdx.x == 0) unmake_gate(&shared.gate);
}
