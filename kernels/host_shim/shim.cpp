// All kernels in one library, to be launched by name.
#define KVC_HOST_SHIM 1  // kernels see the shim in place of PTX
#include "ring.cuh"     // outside the namespaces below, with what they include
#include "tile.cuh"

namespace storage {
#include "storage.cu"
}
namespace attention {
#include "attention.cu"
}
namespace bulk {
#include "bulk.cu"
}

#define KVC_HEADS 8
#define KVC_HEAD_DIM 64
namespace decode64_8 {
#include "decode.cu"
}
namespace chunk64 {
#include "chunk.cu"
}
namespace scores64 {
#include "scores.cu"
}
namespace non_causal64 {
#include "non_causal.cu"
}
#undef KVC_RING
#define KVC_RING 10240
#undef KVC_CODED
#undef KVC_SUFFIX
#define KVC_CODED 0
#define KVC_SUFFIX _bulk
namespace decode64_8_bulk {
#include "decode.cu"
}
#undef KVC_CODED
#undef KVC_SUFFIX
#undef KVC_RING
#undef KVC_HEAD_DIM
#define KVC_HEAD_DIM 128
namespace decode128_8 {
#include "decode.cu"
}
namespace chunk128 {
#include "chunk.cu"
}
namespace scores128 {
#include "scores.cu"
}
namespace non_causal128 {
#include "non_causal.cu"
}
#undef KVC_CODED
#undef KVC_SUFFIX
#define KVC_CODED 84
#define KVC_SUFFIX _k8v4
namespace decode128_8_k8v4 {
#include "decode.cu"
}
#undef KVC_CODED
#undef KVC_SUFFIX
#define KVC_CODED 44
#define KVC_SUFFIX _k4v4
namespace decode128_8_k4v4 {
#include "decode.cu"
}
#undef KVC_CODED
#undef KVC_SUFFIX
#define KVC_CODED 42
#define KVC_SUFFIX _k4v2
namespace decode128_8_k4v2 {
#include "decode.cu"
}
#undef KVC_CODED
#undef KVC_SUFFIX
#define KVC_CODED 22
#define KVC_SUFFIX _k2v2
namespace decode128_8_k2v2 {
#include "decode.cu"
}
#undef KVC_RING
#define KVC_RING 10240
#undef KVC_CODED
#undef KVC_SUFFIX
#define KVC_CODED 0
#define KVC_SUFFIX _bulk
namespace decode128_8_bulk {
#include "decode.cu"
}
#undef KVC_CODED
#undef KVC_SUFFIX
#define KVC_CODED 84
#define KVC_SUFFIX _k8v4_bulk
namespace decode128_8_k8v4_bulk {
#include "decode.cu"
}
#undef KVC_CODED
#undef KVC_SUFFIX
#define KVC_CODED 44
#define KVC_SUFFIX _k4v4_bulk
namespace decode128_8_k4v4_bulk {
#include "decode.cu"
}
#undef KVC_CODED
#undef KVC_SUFFIX
#define KVC_CODED 42
#define KVC_SUFFIX _k4v2_bulk
namespace decode128_8_k4v2_bulk {
#include "decode.cu"
}
#undef KVC_CODED
#undef KVC_SUFFIX
#define KVC_CODED 22
#define KVC_SUFFIX _k2v2_bulk
namespace decode128_8_k2v2_bulk {
#include "decode.cu"
}
#undef KVC_CODED
#undef KVC_SUFFIX
#undef KVC_RING
#undef KVC_HEAD_DIM
#define KVC_HEAD_DIM 256
namespace decode256_8 {
#include "decode.cu"
}
namespace chunk256 {
#include "chunk.cu"
}
namespace scores256 {
#include "scores.cu"
}
namespace non_causal256 {
#include "non_causal.cu"
}
#undef KVC_RING
#define KVC_RING 8832
#undef KVC_CODED
#undef KVC_SUFFIX
#define KVC_CODED 0
#define KVC_SUFFIX _bulk
namespace decode256_8_bulk {
#include "decode.cu"
}
#undef KVC_CODED
#undef KVC_SUFFIX
#undef KVC_RING
#undef KVC_HEADS
#define KVC_HEADS 16
namespace decode256_16 {
#include "decode.cu"
}
#undef KVC_HEAD_DIM
#define KVC_HEAD_DIM 128
namespace decode128_16 {
#include "decode.cu"
}
#undef KVC_HEAD_DIM
#define KVC_HEAD_DIM 64
namespace decode64_16 {
#include "decode.cu"
}

extern "C" int kvc_shim_launch(const char* name, int order, uint32_t grid, uint32_t block, int cooperative,
                               void** parameters) {
  shim::order = order;
#define KVC_LAUNCH(place, kernel) \
  if (strcmp(name, #kernel) == 0) return shim::launch(place::kernel, grid, block, cooperative, parameters);
  KVC_LAUNCH(storage, kvc_pack)
  KVC_LAUNCH(storage, kvc_move)
  KVC_LAUNCH(storage, kvc_retier)
  KVC_LAUNCH(storage, kvc_fields)
  KVC_LAUNCH(storage, kvc_dense)
  KVC_LAUNCH(storage, kvc_slot_sums)
  KVC_LAUNCH(storage, kvc_hadamard)
  KVC_LAUNCH(storage, kvc_append)
  KVC_LAUNCH(storage, kvc_advance)
  KVC_LAUNCH(attention, kvc_chunk)
  KVC_LAUNCH(attention, kvc_scores)
  KVC_LAUNCH(attention, kvc_statistics)
  KVC_LAUNCH(bulk, kvc_shim_bulk)
  KVC_LAUNCH(decode64_8, kvc_decode_64_f16_8)
  KVC_LAUNCH(decode64_8, kvc_decode_64_bf16_8)
  KVC_LAUNCH(decode64_8_bulk, kvc_decode_64_f16_8_bulk)
  KVC_LAUNCH(decode64_8_bulk, kvc_decode_64_bf16_8_bulk)
  KVC_LAUNCH(decode64_16, kvc_decode_64_f16_16)
  KVC_LAUNCH(decode64_16, kvc_decode_64_bf16_16)
  KVC_LAUNCH(decode128_8, kvc_decode_128_f16_8)
  KVC_LAUNCH(decode128_8, kvc_decode_128_bf16_8)
  KVC_LAUNCH(decode128_8_bulk, kvc_decode_128_f16_8_bulk)
  KVC_LAUNCH(decode128_8_bulk, kvc_decode_128_bf16_8_bulk)
  KVC_LAUNCH(decode128_8_k8v4, kvc_decode_128_f16_8_k8v4)
  KVC_LAUNCH(decode128_8_k8v4, kvc_decode_128_bf16_8_k8v4)
  KVC_LAUNCH(decode128_8_k8v4_bulk, kvc_decode_128_f16_8_k8v4_bulk)
  KVC_LAUNCH(decode128_8_k8v4_bulk, kvc_decode_128_bf16_8_k8v4_bulk)
  KVC_LAUNCH(decode128_8_k4v4, kvc_decode_128_f16_8_k4v4)
  KVC_LAUNCH(decode128_8_k4v4, kvc_decode_128_bf16_8_k4v4)
  KVC_LAUNCH(decode128_8_k4v4_bulk, kvc_decode_128_f16_8_k4v4_bulk)
  KVC_LAUNCH(decode128_8_k4v4_bulk, kvc_decode_128_bf16_8_k4v4_bulk)
  KVC_LAUNCH(decode128_8_k4v2, kvc_decode_128_f16_8_k4v2)
  KVC_LAUNCH(decode128_8_k4v2, kvc_decode_128_bf16_8_k4v2)
  KVC_LAUNCH(decode128_8_k4v2_bulk, kvc_decode_128_f16_8_k4v2_bulk)
  KVC_LAUNCH(decode128_8_k4v2_bulk, kvc_decode_128_bf16_8_k4v2_bulk)
  KVC_LAUNCH(decode128_8_k2v2, kvc_decode_128_f16_8_k2v2)
  KVC_LAUNCH(decode128_8_k2v2, kvc_decode_128_bf16_8_k2v2)
  KVC_LAUNCH(decode128_8_k2v2_bulk, kvc_decode_128_f16_8_k2v2_bulk)
  KVC_LAUNCH(decode128_8_k2v2_bulk, kvc_decode_128_bf16_8_k2v2_bulk)
  KVC_LAUNCH(decode128_16, kvc_decode_128_f16_16)
  KVC_LAUNCH(decode128_16, kvc_decode_128_bf16_16)
  KVC_LAUNCH(decode256_8, kvc_decode_256_f16_8)
  KVC_LAUNCH(decode256_8, kvc_decode_256_bf16_8)
  KVC_LAUNCH(decode256_8_bulk, kvc_decode_256_f16_8_bulk)
  KVC_LAUNCH(decode256_8_bulk, kvc_decode_256_bf16_8_bulk)
  KVC_LAUNCH(decode256_16, kvc_decode_256_f16_16)
  KVC_LAUNCH(decode256_16, kvc_decode_256_bf16_16)
  KVC_LAUNCH(chunk64, kvc_chunk_64_16_f16)
  KVC_LAUNCH(chunk64, kvc_chunk_64_16_bf16)
  KVC_LAUNCH(chunk64, kvc_chunk_64_32_f16)
  KVC_LAUNCH(chunk64, kvc_chunk_64_32_bf16)
  KVC_LAUNCH(chunk64, kvc_chunk_64_64_f16)
  KVC_LAUNCH(chunk64, kvc_chunk_64_64_bf16)
  KVC_LAUNCH(chunk128, kvc_chunk_128_16_f16)
  KVC_LAUNCH(chunk128, kvc_chunk_128_16_bf16)
  KVC_LAUNCH(chunk128, kvc_chunk_128_32_f16)
  KVC_LAUNCH(chunk128, kvc_chunk_128_32_bf16)
  KVC_LAUNCH(chunk128, kvc_chunk_128_64_f16)
  KVC_LAUNCH(chunk128, kvc_chunk_128_64_bf16)
  KVC_LAUNCH(chunk256, kvc_chunk_256_32_f16)
  KVC_LAUNCH(chunk256, kvc_chunk_256_32_bf16)
  KVC_LAUNCH(scores64, kvc_scores_64_f16)
  KVC_LAUNCH(scores64, kvc_scores_64_bf16)
  KVC_LAUNCH(non_causal64, kvc_non_causal_64_f16)
  KVC_LAUNCH(non_causal64, kvc_non_causal_64_bf16)
  KVC_LAUNCH(scores128, kvc_scores_128_f16)
  KVC_LAUNCH(scores128, kvc_scores_128_bf16)
  KVC_LAUNCH(non_causal128, kvc_non_causal_128_f16)
  KVC_LAUNCH(non_causal128, kvc_non_causal_128_bf16)
  KVC_LAUNCH(scores256, kvc_scores_256_f16)
  KVC_LAUNCH(scores256, kvc_scores_256_bf16)
  KVC_LAUNCH(non_causal256, kvc_non_causal_256_f16)
  KVC_LAUNCH(non_causal256, kvc_non_causal_256_bf16)
#undef KVC_LAUNCH
  return 3;
}

// The part of the driver's interface that driver.py calls, for the test of its calls: handles are the kernels' names.
extern "C" int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
extern "C" int cuGetErrorString(int error, const char** text) {
  *text = error == 209 ? "no kernel image is available for execution on the device" : "launch failed";
  return 0;
}
extern "C" int cuLibraryLoadData(const char** library, const void* code, void*, void**, unsigned, void*, void**, unsigned) {
  *library = "a library";
  return memcmp(code, "\177ELF", 4) ? 209 : 0;
}
extern "C" int cuLibraryGetKernel(char** kernel, const char*, const char* name) {
  *kernel = strdup(name);
  return 0;
}
// A thread's context: there from the beginning, unless a test says that nothing has been done in this thread yet.
thread_local bool in_context = true;
extern "C" void kvc_shim_leave_context() { in_context = false; }
extern "C" int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
extern "C" int cuDevicePrimaryCtxRetain(const char** context, int) {
  *context = "a context";
  return 0;
}
extern "C" int cuCtxSetCurrent(const char* context) {
  in_context = context != nullptr;
  return 0;
}
extern "C" int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const char*, int block, size_t) {
  *blocks = block > shim::kMostThreads ? 0 : 3;
  return in_context ? 0 : 201;
}
extern "C" int cuLaunchKernel(const char* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                              unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                              void** extra) {
  if (!in_context) return 201;
  if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared || stream || extra) return 1;
  return kvc_shim_launch(kernel, 0, grid_x, block_x, 0, parameters) ? 719 : 0;
}
extern "C" int cuLaunchCooperativeKernel(const char* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                         unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                         void* stream, void** parameters) {
  if (!in_context) return 201;
  if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared || stream) return 1;
  return kvc_shim_launch(kernel, 0, grid_x, block_x, 1, parameters) ? 719 : 0;
}
