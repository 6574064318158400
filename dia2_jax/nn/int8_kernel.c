/* Products with int8 weights and attention over an int8 cache, for x86 processors with AVX-512 VNNI:
 * what a frame of an int8 model spends its time on, at the pace at which memory is read.
 *
 * int8_kernel.py compiles this file and says what is computed. What XLA calls stands at the end. Its
 * operands are checked there, because a compiled program may come from a cache. What is computed of
 * a row depends neither on the rows beside it nor on how the work is shared.
 */

#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

#define LEVELS 127.0f     /* quantized.LEVELS */
#define BASE 254.0f       /* quantized.BASE */
#define SMALLEST 1e-30f   /* quantized.SMALLEST */
#define DEALT 32768       /* bytes of weights that a thread takes at a time, at least */
#define ALONE 49152       /* bytes of them below which waking another thread takes longer */
#define PAIRS 8           /* of a row and an output, multiplied at a time: 16 sums of two digits */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE int64_t up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }

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
static void finish(const XLA_FFI_CallFrame *frame, Work *work, int alone) {
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

static void begin(Work *work, int64_t items, int64_t portion,
                  void (*compute)(const Work *, int64_t, int64_t)) {
  atomic_init(&work->next, 0);
  atomic_init(&work->done, 0);
  atomic_init(&work->holders, 1);
  work->items = items, work->portion = portion, work->compute = compute;
}

/* ---- Rows rounded to two digits: quantized.round_rows_twice ---------------------------------- */

typedef struct {
  int64_t count, inputs, padded; /* rows, their inputs, and bytes from one row of digits to another */
  int8_t *digits;                /* of each row the first ones, then the second ones */
  float *steps;                  /* what a first digit of 1 is worth */
  int32_t *offsets;              /* 128 times the sum of the first digits, of the second */
} Rows;

static int64_t rows_size(int64_t count, int64_t inputs) {
  return count * (2 * up(inputs, 64)) + up(count * 12, 64);
}

/* Lays rows out in `memory`, of rows_size() bytes. */
static Rows rows_in(char *memory, int64_t count, int64_t inputs) {
  Rows rows = {count, inputs, up(inputs, 64), (int8_t *)memory, NULL, NULL};
  rows.steps = (float *)(memory + count * 2 * rows.padded);
  rows.offsets = (int32_t *)(rows.steps + count);
  return rows;
}

/* Rounds `x` to a row. Of one that is not finite the step is NaN, and so is every product. */
static void round_row(const Rows *rows, int64_t row, const float *x) {
  int8_t *digits = rows->digits + 2 * row * rows->padded;
  __m512 most = _mm512_setzero_ps();
  __mmask16 strange = 0;
  for (int64_t k = 0; k < rows->inputs; k += 16) {
    __m512 read = _mm512_maskz_loadu_ps(first_lanes(rows->inputs - k), x + k);
    strange |= _mm512_fpclass_ps_mask(read, 0x99); /* either NaN, either infinity */
    most = _mm512_max_ps(most, _mm512_abs_ps(read));
  }
  float peak = _mm512_reduce_max_ps(most);
  rows->steps[row] = strange ? NAN : peak / LEVELS;
  __m512 factor = _mm512_set1_ps(LEVELS / (peak > SMALLEST ? peak : SMALLEST));
  __m512i totals[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t k = 0; k < rows->padded; k += 16) {
    __mmask16 here = strange ? 0 : first_lanes(rows->inputs - k);
    __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(here, x + k), factor);
    __m512i first = _mm512_cvtps_epi32(scaled);
    __m512 rest = _mm512_sub_ps(scaled, _mm512_cvtepi32_ps(first));
    __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(rest, _mm512_set1_ps(BASE)));
    totals[0] = _mm512_add_epi32(totals[0], first);
    totals[1] = _mm512_add_epi32(totals[1], second);
    _mm_store_si128((__m128i *)(digits + k), _mm512_cvtepi32_epi8(first));
    _mm_store_si128((__m128i *)(digits + rows->padded + k), _mm512_cvtepi32_epi8(second));
  }
  for (int digit = 0; digit < 2; digit++)
    rows->offsets[2 * row + digit] = 128 * _mm512_reduce_add_epi32(totals[digit]);
}

/* ---- Their products with int8 weights -------------------------------------------------------- */

typedef struct {
  const int8_t *weight; /* [outputs, inputs] */
  const float *scale;   /* [outputs] */
  float *y;             /* [rows, outputs], `stride` from one row to the next */
  int64_t stride;
} Product;

/* What becomes of the 16 sums of a tile: of 8 pairs with the first digits, then with the second. */
typedef struct {
  __m256i first, second; /* to be subtracted from them */
  __m256i output;        /* the pair's output */
  __m256 steps;          /* the pair's row's */
} Ends;

/* The 16 sums over the lanes of 16 vectors, in their order. */
INLINE __m512i sum_lanes(const __m512i *vectors) {
  __m512i pairs[8], fours[4], eights[2];
  UNROLL for (int i = 0; i < 8; i++) {
    __m512i a = vectors[2 * i], b = vectors[2 * i + 1];
    pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  UNROLL for (int i = 0; i < 4; i++) {
    __m512i a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  UNROLL for (int i = 0; i < 2; i++) {
    __m512i a = fours[2 * i], b = fours[2 * i + 1];
    eights[i] =
        _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  }
  return _mm512_add_epi32(_mm512_shuffle_i32x4(eights[0], eights[1], 0x88),
                          _mm512_shuffle_i32x4(eights[0], eights[1], 0xdd));
}

/* Adds 64 inputs from `k` on, of which `here` exist, to the sums of a tile.
 *
 * The instruction multiplies unsigned by signed bytes, so 128 is added to the weights (which flips
 * their highest bit); Ends take from the sums what that adds. */
INLINE void add(__m512i *sums, const int8_t *const *weights, const int8_t *digits, int64_t padded,
                int64_t k, const int rows, __mmask64 here, int64_t ahead) {
  const int width = PAIRS / rows;
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  __m512i held[2 * PAIRS];
  UNROLL for (int j = 0; j < 2 * rows; j++) held[j] = _mm512_load_si512(digits + j * padded + k);
  UNROLL for (int i = 0; i < width; i++) {
    _mm_prefetch((const char *)(weights[i] + k + ahead), _MM_HINT_T1);
    __m512i read = _mm512_xor_si512(_mm512_maskz_loadu_epi8(here, weights[i] + k), flip);
    UNROLL for (int j = 0; j < rows; j++) {
      __m512i *first = sums + j * width + i, *second = first + PAIRS;
      *first = _mm512_dpbusd_epi32(*first, read, held[2 * j]);
      *second = _mm512_dpbusd_epi32(*second, read, held[2 * j + 1]);
    }
  }
}

/* PAIRS / `count` outputs from `output` on, of which `exist`, of `count` rows from `row` on; asks
 * for the weights `ahead` bytes further on. */
INLINE void tile(const Product *product, const Rows *rows, int64_t output, int exist, int64_t row,
                 const int count, const Ends *ends, int64_t ahead) {
  const int width = PAIRS / count;
  const int64_t inputs = rows->inputs, padded = rows->padded;
  const int8_t *digits = rows->digits + 2 * row * padded;
  const int8_t *weights[PAIRS];
  UNROLL for (int i = 0; i < width; i++)
    weights[i] = product->weight + (output + (i < exist ? i : 0)) * inputs;
  __m512i sums[2 * PAIRS];
  UNROLL for (int i = 0; i < 2 * PAIRS; i++) sums[i] = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 64 <= inputs; k += 64) add(sums, weights, digits, padded, k, count, ~0ull, ahead);
  if (k < inputs) add(sums, weights, digits, padded, k, count, (1ull << (inputs - k)) - 1, ahead);
  __m512i totals = sum_lanes(sums);
  __m256 first = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm512_castsi512_si256(totals), ends->first));
  __m256 second = _mm256_cvtepi32_ps(
      _mm256_sub_epi32(_mm512_extracti64x4_epi64(totals, 1), ends->second));
  const __mmask8 outputs = (__mmask8)((1 << exist) - 1);
  __m256 scale = _mm256_maskz_loadu_ps(outputs, product->scale + output);
  __m256 y = _mm256_add_ps(first, _mm256_div_ps(second, _mm256_set1_ps(BASE)));
  y = _mm256_mul_ps(_mm256_mul_ps(y, _mm256_permutexvar_ps(ends->output, scale)), ends->steps);
  UNROLL for (int j = 0; j < count; j++) {
    const __mmask8 lanes = (__mmask8)(((1 << width) - 1) << j * width);
    _mm256_mask_storeu_ps(product->y + (row + j) * product->stride + output, outputs,
                          _mm256_maskz_compress_ps(lanes, y));
  }
}

INLINE void multiply_some(const Product *product, const Rows *rows, int64_t first, int64_t last,
                          int64_t row, const int count) {
  const int width = PAIRS / count;
  int32_t offsets[2][PAIRS], output[PAIRS];
  float steps[PAIRS];
  for (int lane = 0; lane < PAIRS; lane++) {
    int64_t owner = row + lane / width;
    for (int digit = 0; digit < 2; digit++) offsets[digit][lane] = rows->offsets[2 * owner + digit];
    steps[lane] = rows->steps[owner];
    output[lane] = lane % width;
  }
  const Ends ends = {_mm256_loadu_si256((const __m256i *)offsets[0]),
                     _mm256_loadu_si256((const __m256i *)offsets[1]),
                     _mm256_loadu_si256((const __m256i *)output), _mm256_loadu_ps(steps)};
  for (; first + width <= last; first += width) {
    const int64_t ahead = first + 2 * width <= last ? width * rows->inputs : 0;
    tile(product, rows, first, width, row, count, &ends, ahead);
  }
  if (first < last) tile(product, rows, first, (int)(last - first), row, count, &ends, 0);
}

/* Outputs `first` to `last` - 1 of `count` rows from `row` on. */
static void multiply(const Product *product, const Rows *rows, int64_t first, int64_t last,
                     int64_t row, int64_t count) {
  const int64_t end = row + count;
  for (; row + 4 <= end; row += 4) multiply_some(product, rows, first, last, row, 4);
  if (row + 2 <= end) multiply_some(product, rows, first, last, row, 2), row += 2;
  if (row < end) multiply_some(product, rows, first, last, row, 1);
}

typedef struct {
  Work work; /* its items are outputs */
  Product product;
  Rows rows;
} ProductWork;

static void compute_outputs(const Work *work, int64_t first, int64_t last) {
  const ProductWork *all = (const ProductWork *)work;
  multiply(&all->product, &all->rows, first, last, 0, all->rows.count);
}

/* ---- Attention of one step over an int8 cache ------------------------------------------------- */

typedef struct {
  Work work; /* its items are the key-value heads of all rows */
  Rows queries;
  int64_t layers, layer, heads, group, slots, width, longest;
  const int8_t *keys, *values;            /* [B, L, K, S, H] */
  const float *key_scale, *value_scale;   /* [B, L, K, S] */
  const int32_t *length;                  /* [B] */
  float *y;                               /* [B, K, G, H] */
  float *scores;                          /* [B, K, G, longest] */
} AttentionWork;

/* e to the power of what is at most 0, within two units in the last place; of NaN NaN. */
INLINE __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-110), x); /* below it all is 0 */
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  /* The logarithm of 2 in two parts, so that what is left of x is exact. */
  __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  UNROLL for (int power = 6; power >= 0; power--) {
    const float reciprocals[] = {1.0f, 1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720};
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(reciprocals[power]));
  }
  return _mm512_scalef_ps(sum, whole);
}

/* Turns scores into weights times the scale of each value; returns the sum of the weights. */
static float soften(float *scores, const float *value_scale, int64_t length) {
  __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  for (int64_t s = 0; s < length; s += 16)
    most = _mm512_mask_max_ps(most, first_lanes(length - s), most, _mm512_loadu_ps(scores + s));
  const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t s = 0; s < length; s += 16) {
    const __mmask16 here = first_lanes(length - s);
    __m512 score = _mm512_maskz_loadu_ps(here, scores + s);
    __m512 weight = _mm512_maskz_mov_ps(here, exponential(_mm512_sub_ps(score, peak)));
    total = _mm512_add_ps(total, weight);
    _mm512_mask_storeu_ps(scores + s, here,
                          _mm512_mul_ps(weight, _mm512_maskz_loadu_ps(here, value_scale + s)));
  }
  return _mm512_reduce_add_ps(total);
}

/* `count` queries' sums of the values of a head, 64 of the head's width at a time. */
INLINE void average(const AttentionWork *all, const float *weights, const float *totals,
                    const int8_t *values, int64_t length, float *y, const int count) {
  for (int64_t h = 0; h < all->width; h += 64) {
    __mmask16 here[4];
    __m512 sums[4][4];
    UNROLL for (int part = 0; part < 4; part++) {
      here[part] = first_lanes(all->width - h - 16 * part);
      UNROLL for (int g = 0; g < count; g++) sums[g][part] = _mm512_setzero_ps();
    }
    for (int64_t s = 0; s < length; s++) {
      const int8_t *slot = values + s * all->width + h;
      UNROLL for (int part = 0; part < 4; part++) {
        __m512 value = _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(here[part], slot + 16 * part)));
        UNROLL for (int g = 0; g < count; g++)
          sums[g][part] = _mm512_fmadd_ps(_mm512_set1_ps(weights[g * all->longest + s]), value,
                                          sums[g][part]);
      }
    }
    UNROLL for (int g = 0; g < count; g++)
      UNROLL for (int part = 0; part < 4; part++)
        _mm512_mask_storeu_ps(y + g * all->width + h + 16 * part, here[part],
                              _mm512_div_ps(sums[g][part], _mm512_set1_ps(totals[g])));
  }
}

static void compute_heads(const Work *work, int64_t first, int64_t last) {
  const AttentionWork *all = (const AttentionWork *)work;
  for (int64_t item = first; item < last; item++) {
    const int64_t row = item / all->heads, head = item % all->heads;
    const int64_t slot = ((row * all->layers + all->layer) * all->heads + head) * all->slots;
    int64_t length = all->length[row];
    length = length < 0 ? 0 : length > all->longest ? all->longest : length;
    const int8_t *values = all->values + slot * all->width;
    float *scores = all->scores + item * all->group * all->longest;
    float *y = all->y + item * all->group * all->width;
    /* As if the slots were outputs: keys are scaled by slot as weights are by output. */
    const Product product = {all->keys + slot * all->width, all->key_scale + slot,
                             scores - item * all->group * all->longest, all->longest};
    multiply(&product, &all->queries, 0, length, item * all->group, all->group);
    for (int64_t g = 0; g < all->group;) {
      const int count = all->group - g >= 4 ? 4 : all->group - g >= 2 ? 2 : 1;
      float totals[4];
      for (int i = 0; i < count; i++)
        totals[i] = soften(scores + (g + i) * all->longest, all->value_scale + slot, length);
      const float *weights = scores + g * all->longest;
      float *out = y + g * all->width;
      if (count == 4) average(all, weights, totals, values, length, out, 4);
      if (count == 2) average(all, weights, totals, values, length, out, 2);
      if (count == 1) average(all, weights, totals, values, length, out, 1);
      g += count;
    }
  }
}

/* ---- What XLA calls ---------------------------------------------------------------------------- */

static XLA_FFI_Error *refuse(const XLA_FFI_CallFrame *frame, const char *why) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, why,
                                    XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

/* Whether XLA only asks for which version of its interface this was compiled. */
static int answered(const XLA_FFI_CallFrame *frame) {
  const XLA_FFI_Extension_Base *extension = frame->extension_start;
  if (extension == NULL || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((const XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return 1;
}

static int fits(const XLA_FFI_Buffer *buffer, XLA_FFI_DataType dtype, int rank,
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

/* x [B, D] float32, weight [F, D] int8, scale [F] float32 -> y [B, F] float32 */
XLA_FFI_Error *dia2_jax_int8_product(XLA_FFI_CallFrame *frame) {
  if (answered(frame)) return NULL;
  if (frame->args.size != 3 || frame->rets.size != 1)
    return refuse(frame, "dia2_jax int8 product: another number of operands");
  const XLA_FFI_Buffer *const *in = (const XLA_FFI_Buffer *const *)frame->args.args;
  const XLA_FFI_Buffer *x = in[0], *weight = in[1], *scale = in[2], *y = frame->rets.rets[0];
  if (x->rank != 2 || weight->rank != 2)
    return refuse(frame, "dia2_jax int8 product: operands of other ranks");
  const int64_t rows = x->dims[0], inputs = x->dims[1], outputs = weight->dims[0];
  if (!FITS(x, F32, rows, inputs) || !FITS(weight, S8, outputs, inputs) ||
      !FITS(scale, F32, outputs) || !FITS(y, F32, rows, outputs))
    return refuse(frame, "dia2_jax int8 product: operands that do not fit each other");
  const int64_t head = up(sizeof(ProductWork), 64);
  ProductWork *all = aligned_alloc(64, head + rows_size(rows, inputs));
  if (all == NULL) return refuse(frame, "dia2_jax int8 product: no memory for the rounded rows");
  all->rows = rows_in((char *)all + head, rows, inputs);
  all->product = (Product){weight->data, scale->data, y->data, outputs};
  for (int64_t row = 0; row < rows; row++)
    round_row(&all->rows, row, (const float *)x->data + row * inputs);
  const int64_t portion = up(DEALT / (inputs > 0 ? inputs : 1) + 1, PAIRS);
  begin(&all->work, outputs, portion, compute_outputs);
  finish(frame, &all->work, outputs * inputs < ALONE);
  return NULL;
}

/* query [B, K, G, H] float32, keys [B, L, K, S, H] int8, key_scale [B, L, K, S] float32, values and
 * value_scale likewise, layer [] int32, length [B] int32 -> y [B, K, G, H] float32 */
XLA_FFI_Error *dia2_jax_int8_attention(XLA_FFI_CallFrame *frame) {
  if (answered(frame)) return NULL;
  if (frame->args.size != 7 || frame->rets.size != 1)
    return refuse(frame, "dia2_jax int8 attention: another number of operands");
  const XLA_FFI_Buffer *const *in = (const XLA_FFI_Buffer *const *)frame->args.args;
  const XLA_FFI_Buffer *query = in[0], *keys = in[1], *y = frame->rets.rets[0];
  if (query->rank != 4 || keys->rank != 5)
    return refuse(frame, "dia2_jax int8 attention: operands of other ranks");
  const int64_t batch = query->dims[0], heads = query->dims[1], group = query->dims[2],
                width = query->dims[3], layers = keys->dims[1], slots = keys->dims[3];
  if (!FITS(query, F32, batch, heads, group, width) ||
      !FITS(keys, S8, batch, layers, heads, slots, width) ||
      !FITS(in[2], F32, batch, layers, heads, slots) ||
      !FITS(in[3], S8, batch, layers, heads, slots, width) ||
      !FITS(in[4], F32, batch, layers, heads, slots) ||
      !fits(in[5], XLA_FFI_DataType_S32, 0, NULL) || !FITS(in[6], S32, batch) ||
      !FITS(y, F32, batch, heads, group, width))
    return refuse(frame, "dia2_jax int8 attention: operands that do not fit each other");
  const int32_t *length = in[6]->data;
  int64_t layer = *(const int32_t *)in[5]->data, longest = 0;
  layer = layer < 0 ? 0 : layer >= layers ? layers - 1 : layer; /* as XLA's slices do */
  for (int64_t row = 0; row < batch; row++)
    if (length[row] > longest) longest = length[row] < slots ? length[row] : slots;
  const int64_t queries = batch * heads * group, head = up(sizeof(AttentionWork), 64);
  const int64_t padded = up(longest, 16), rounded = rows_size(queries, width);
  AttentionWork *all = aligned_alloc(64, head + rounded + up(queries * padded * 4, 64));
  if (all == NULL) return refuse(frame, "dia2_jax int8 attention: no memory for the scores");
  all->queries = rows_in((char *)all + head, queries, width);
  for (int64_t row = 0; row < queries; row++)
    round_row(&all->queries, row, (const float *)query->data + row * width);
  all->layers = layers, all->layer = layer, all->heads = heads, all->group = group;
  all->slots = slots, all->width = width, all->longest = padded < slots ? padded : slots;
  all->keys = keys->data, all->values = in[3]->data;
  all->key_scale = in[2]->data, all->value_scale = in[4]->data;
  all->length = length, all->y = y->data;
  all->scores = (float *)((char *)all + head + rounded);
  begin(&all->work, batch * heads, 1, compute_heads);
  finish(frame, &all->work, batch * heads * longest * width < ALONE);
  return NULL;
}
