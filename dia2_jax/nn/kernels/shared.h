/* What the kernels have in common: vectors, work that threads share, and XLA's interface. */

#ifndef DIA2_JAX_SHARED_H_
#define DIA2_JAX_SHARED_H_

#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#define DEALT 32768 /* bytes of weights that a thread takes at a time, at least */
#define ALONE 49152 /* bytes of weights below which waking another thread takes longer */
#define KEPT 65536  /* bytes of weights that stay in a core's own cache while rows come and go */

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
 * Work is steps, one after another, and a step is items. They are dealt out some at a time: many at
 * first, because long runs of weights are read faster, and fewer towards the end, so that all threads
 * finish together. A step begins when the one before is done. Who comes late finds no items left of
 * the steps that are done, so nobody waits for a thread that has not begun. */

typedef struct {
  _Alignas(64) atomic_llong next; /* items dealt out */
  atomic_llong done;              /* items finished */
  int64_t items, portion;         /* `portion` items are the fewest dealt out */
} Step;

typedef struct Work {
  atomic_int holders; /* who may still look at this; the last one frees it */
  atomic_int joined;  /* threads that have begun */
  int64_t threads, count;
  Step *steps;
  /* Items `first` to `last` - 1 of a step, by a thread of that number; it computes the step's items for
   * the first time if they are `fresh`. */
  void (*compute)(const struct Work *, int64_t step, int64_t first, int64_t last, int thread,
                  int fresh);
} Work;

static void leave(Work *work) {
  if (atomic_fetch_sub(&work->holders, 1) == 1) free(work);
}

INLINE void await(Step *step) {
  for (int turn = 0; atomic_load_explicit(&step->done, memory_order_acquire) < step->items; turn++) {
    if (turn < 2000)
      _mm_pause();
    else
      sched_yield();
  }
}

static void take_part(Work *work) {
  const int thread = atomic_fetch_add(&work->joined, 1);
  for (int64_t number = 0; number < work->count; number++) {
    Step *step = work->steps + number;
    int fresh = 1;
    long long first = atomic_load(&step->next);
    while (first < step->items) {
      int64_t count = up((step->items - first) / (2 * work->threads), step->portion);
      if (count < step->portion) count = step->portion;
      if (count > step->items - first) count = step->items - first;
      if (!atomic_compare_exchange_weak(&step->next, &first, first + count)) continue;
      work->compute(work, number, first, first + count, thread, fresh);
      fresh = 0;
      atomic_fetch_add_explicit(&step->done, count, memory_order_release);
      first = atomic_load(&step->next);
    }
    await(step);
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
  if (error == NULL) return count > 0 ? count : 1;
  forget(frame->api, error); /* no pool: the caller works alone */
  return 1;
}

/* Finishes the work with at most `threads` threads, and gives up the caller's hold of it. */
INLINE void finish(const XLA_FFI_CallFrame *frame, Work *work, int64_t threads) {
  int64_t portions = 1; /* more threads than the step with the most of them are of no use */
  for (int64_t number = 0; number < work->count; number++) {
    const Step *step = work->steps + number;
    const int64_t some = (step->items + step->portion - 1) / step->portion;
    if (some > portions) portions = some;
  }
  work->threads = threads < portions ? threads : portions;
  for (int64_t helpers = work->threads - 1; helpers > 0; helpers--) {
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
  leave(work);
}

INLINE void begin_step(Step *step, int64_t items, int64_t portion) {
  atomic_init(&step->next, 0);
  atomic_init(&step->done, 0);
  step->items = items, step->portion = portion;
}

INLINE void begin(Work *work, Step *steps, int64_t count,
                  void (*compute)(const Work *, int64_t, int64_t, int64_t, int, int)) {
  atomic_init(&work->holders, 1);
  atomic_init(&work->joined, 0);
  work->steps = steps, work->count = count, work->compute = compute;
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
