/* What the kernels have in common: vectors, work that threads share, and XLA's interface. */

#ifndef DIA2_JAX_SHARED_H_
#define DIA2_JAX_SHARED_H_

#include <immintrin.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

#define DEALT 32768 /* bytes of weights that a thread takes at a time, at least */
#define ALONE 49152 /* bytes of them below which waking another thread takes longer */

#define KEPT 65536  /* bytes of them that stay in a core's own cache while rows come and go */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE int64_t up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }

/* How many outputs have `bytes` of weights, in eights; at least 8. */
INLINE int64_t outputs_of(int64_t bytes, int64_t bytes_an_output) {
  return up(bytes / (bytes_an_output > 0 ? bytes_an_output : 1) + 1, 8);
}

INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* ---- Work that the threads of XLA's pool share -----------------------------------------------
 *
 * Items are dealt out some at a time: many at first, because long runs of weights are read faster,
 * and fewer towards the end, so that all threads finish together. Who comes late finds none left, so
 * nobody waits for a thread that has not begun. */

typedef struct Work {
  atomic_llong next, done; /* items dealt out, and finished */
  atomic_int holders;      /* who may still look at this; the last one frees it */
  int64_t items, portion, threads; /* `portion` items are the fewest dealt out */
  void (*compute)(const struct Work *, int64_t first, int64_t last);
} Work;

static void leave(Work *work) {
  if (atomic_fetch_sub(&work->holders, 1) == 1) free(work);
}

static void take_part(Work *work) {
  long long first = atomic_load(&work->next);
  while (first < work->items) {
    int64_t count = up((work->items - first) / (2 * work->threads), work->portion);
    if (count < work->portion) count = work->portion;
    if (count > work->items - first) count = work->items - first;
    if (!atomic_compare_exchange_weak(&work->next, &first, first + count)) continue;
    work->compute(work, first, first + count);
    atomic_fetch_add_explicit(&work->done, count, memory_order_release);
    first = atomic_load(&work->next);
  }
}

static void help(void *work) {
  take_part(work);
  leave(work);
}

static void forget(const XLA_FFI_Api *api, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  api->XLA_FFI_Error_Destroy(&args);
}

static int64_t count_threads(const XLA_FFI_CallFrame *frame) {
  int64_t count = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL,
                                             frame->ctx, &count};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&args);
  if (error == NULL) return count;
  forget(frame->api, error); /* no pool: the caller works alone */
  return 1;
}

/* Finishes the work, and gives up the caller's hold of it. */
INLINE void finish(const XLA_FFI_CallFrame *frame, Work *work, int alone) {
  const int64_t portions = (work->items + work->portion - 1) / work->portion;
  work->threads = alone ? 1 : count_threads(frame);
  int64_t helpers = (work->threads < portions ? work->threads : portions) - 1;
  for (; helpers > 0; helpers--) {
    atomic_fetch_add(&work->holders, 1);
    XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL,
                                             frame->ctx, help, work};
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&args);
    if (error != NULL) {
      forget(frame->api, error);
      atomic_fetch_sub(&work->holders, 1);
      break;
    }
  }
  take_part(work);
  for (int turn = 0; atomic_load_explicit(&work->done, memory_order_acquire) < work->items; turn++) {
    if (turn < 2000)
      _mm_pause();
    else
      sched_yield();
  }
  leave(work);
}

INLINE void begin(Work *work, int64_t items, int64_t portion,
                  void (*compute)(const Work *, int64_t, int64_t)) {
  atomic_init(&work->next, 0);
  atomic_init(&work->done, 0);
  atomic_init(&work->holders, 1);
  work->items = items, work->portion = portion, work->compute = compute;
}

/* ---- XLA's interface ---------------------------------------------------------------------------
 *
 * Operands are checked by each kernel, because a compiled program may come from a cache. */

INLINE XLA_FFI_Error *refuse(const XLA_FFI_CallFrame *frame, const char *why) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, why,
                                    XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

/* Whether XLA only asks for which version of its interface this was compiled. */
INLINE int answered(const XLA_FFI_CallFrame *frame) {
  const XLA_FFI_Extension_Base *extension = frame->extension_start;
  if (extension == NULL || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((const XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return 1;
}

INLINE int fits(const XLA_FFI_Buffer *buffer, XLA_FFI_DataType dtype, int rank,
                const int64_t *shape) {
  if (buffer->dtype != dtype || buffer->rank != rank) return 0;
  for (int axis = 0; axis < rank; axis++)
    if (buffer->dims[axis] != shape[axis]) return 0;
  return 1;
}

#define FITS(buffer, dtype, ...)                                               \
  fits(buffer, XLA_FFI_DataType_##dtype,                                       \
       sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t),               \
       (const int64_t[]){__VA_ARGS__})

#endif
