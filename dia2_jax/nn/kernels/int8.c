/* Products with int8 weights, attention over an int8 cache, and layers of both, for x86 processors with
 * AVX-512 and VNNI.
 *
 * What is computed of a row depends neither on the rows beside it nor on how the work is shared.
 */

#include "attention.h"

#define LEVELS 127.0f   /* quantized.LEVELS */
#define BASE 254.0f     /* quantized.BASE */
#define SMALLEST 1e-30f /* quantized.SMALLEST */
#define PAIRS 8         /* of a row and an output, multiplied at a time: 16 sums of two digits */

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

/* By what numbers are multiplied before they are rounded, and what a first digit of 1 is worth then:
 * NaN if one of them is not finite, which is returned. */
INLINE int measure(const float *x, int64_t count, __m512 *factor, float *step) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 strange = 0;
  for (int64_t k = 0; k < count; k += 16) {
    const __m512 read = _mm512_maskz_loadu_ps(first_lanes(count - k), x + k);
    strange |= _mm512_fpclass_ps_mask(read, 0x99); /* either NaN, either infinity */
    most = _mm512_max_ps(most, _mm512_abs_ps(read));
  }
  const float peak = _mm512_reduce_max_ps(most);
  *factor = _mm512_set1_ps(LEVELS / (peak > SMALLEST ? peak : SMALLEST));
  *step = strange ? NAN : peak / LEVELS;
  return strange != 0;
}

/* Rounds `x` to a row. Of one that is not finite the step is NaN, and so is every product. */
static void round_row(const Rows *rows, int64_t row, const float *x) {
  int8_t *digits = rows->digits + 2 * row * rows->padded;
  __m512 factor;
  const int strange = measure(x, rows->inputs, &factor, &rows->steps[row]);
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

static void round_rows(const Rows *rows, const float *x) {
  for (int64_t row = 0; row < rows->count; row++) round_row(rows, row, x + row * rows->inputs);
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
static void multiply_rows(const Product *product, const Rows *rows, int64_t first, int64_t last,
                          int64_t row, int64_t count) {
  const int64_t kept = count > 8 ? outputs_of(KEPT, rows->inputs) : last - first;
  for (; first < last; first += kept) {
    const int64_t stop = first + kept < last ? first + kept : last, end = row + count;
    int64_t next = row;
    for (; next + 8 <= end; next += 8) multiply_some(product, rows, first, stop, next, 8);
    if (next + 4 <= end) multiply_some(product, rows, first, stop, next, 4), next += 4;
    if (next + 2 <= end) multiply_some(product, rows, first, stop, next, 2), next += 2;
    if (next < end) multiply_some(product, rows, first, stop, next, 1);
  }
}

typedef struct {
  Work work; /* its items are outputs */
  Step step;
  Product product;
  Rows rows;
} ProductWork;

static void compute_outputs(const Work *work, int64_t step, int64_t first, int64_t last, int thread,
                            int fresh) {
  const ProductWork *all = (const ProductWork *)work;
  multiply_rows(&all->product, &all->rows, first, last, 0, all->rows.count);
}

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
  round_rows(&all->rows, x->data);
  begin_step(&all->step, outputs, outputs_of(DEALT, inputs));
  begin(&all->work, &all->step, 1, compute_outputs);
  finish(frame, &all->work, outputs * inputs < ALONE ? 1 : count_threads(frame));
  return NULL;
}

/* ---- Attention over an int8 cache --------------------------------------------------------------- */

/* A head's rounded queries from `row` on, int8 keys and values [S, H] with a scale a slot -> y [G, H]; as
 * if the slots were outputs: keys are scaled by slot as weights are by output. */
static void attend_int8(const Head *head, const Rows *queries, int64_t row, const int8_t *keys,
                        const float *key_scale, const int8_t *values, const float *value_scale,
                        float *scores, float *y) {
  /* Product rows are counted from the first query. */
  const Product product = {keys, key_scale, scores - row * head->room, head->room};
  multiply_rows(&product, queries, 0, head->length, row, head->group);
  average(head, scores, values, value_scale, y, 1);
}

typedef struct {
  Attention attention;
  Rows queries;
  const int8_t *keys, *values;          /* [B, L, K, S, H] */
  const float *key_scale, *value_scale; /* [B, L, K, S] */
} Int8Attention;

static void compute_heads(const Work *work, int64_t step, int64_t first, int64_t last, int thread,
                          int fresh) {
  const Int8Attention *call = (const Int8Attention *)work;
  const Attention *all = &call->attention;
  for (int64_t item = first; item < last; item++) {
    int64_t slot;
    const Head head = head_of(all, item, &slot);
    const int64_t query = item * head.group, start = slot * head.width;
    attend_int8(&head, &call->queries, query, call->keys + start, call->key_scale + slot,
                call->values + start, call->value_scale + slot, all->scores + query * head.room,
                all->y + query * head.width);
  }
}

/* query [B, K, G, H] float32, keys [B, L, K, S, H] int8, key_scale [B, L, K, S] float32, values and
 * value_scale likewise, layer [] int32, length [B] int32 -> y [B, K, G, H] float32 */
XLA_FFI_Error *dia2_jax_int8_attention(XLA_FFI_CallFrame *frame) {
  if (answered(frame)) return NULL;
  if (frame->args.size != 7 || frame->rets.size != 1)
    return refuse(frame, "dia2_jax int8 attention: another number of operands");
  const XLA_FFI_Buffer *const *in = (const XLA_FFI_Buffer *const *)frame->args.args;
  const XLA_FFI_Buffer *query = in[0], *keys = in[1], *y = frame->rets.rets[0];
  if (query->rank != 4 || keys->rank != 5 || keys->dims[1] < 1)
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
  Attention sizes;
  const int64_t longest = size_up(&sizes, query, layers, slots, in[5], in[6]);
  const int64_t queries = batch * heads * group, before = up(sizeof(Int8Attention), 64);
  const int64_t rounded = rows_size(queries, width);
  Int8Attention *call =
      aligned_alloc(64, before + rounded + up(queries * sizes.head.room * 4, 64));
  if (call == NULL) return refuse(frame, "dia2_jax int8 attention: no memory for the scores");
  call->attention = sizes;
  call->attention.y = y->data;
  call->attention.scores = (float *)((char *)call + before + rounded);
  call->queries = rows_in((char *)call + before, queries, width);
  round_rows(&call->queries, query->data);
  call->keys = keys->data, call->values = in[3]->data;
  call->key_scale = in[2]->data, call->value_scale = in[4]->data;
  begin_step(&call->attention.step, batch * heads, 1);
  begin(&call->attention.work, &call->attention.step, 1, compute_heads);
  const int alone = batch * heads * longest * width < ALONE;
  finish(frame, &call->attention.work, alone ? 1 : count_threads(frame));
  return NULL;
}

/* ---- Layers -------------------------------------------------------------------------------------- */

typedef Rows Held;

static int64_t held_size(int64_t rows, int64_t inputs) { return rows_size(rows, inputs); }

static Held held_in(char *memory, const float *x, int64_t rows, int64_t inputs) {
  return rows_in(memory, rows, inputs);
}

static void fill(const Held *held, const float *x) { round_rows(held, x); }

static void multiply(const Held *held, const void *weight, const float *scale, int64_t first,
                     int64_t last, float *y, int64_t stride) {
  const Product product = {weight, scale, y, stride};
  multiply_rows(&product, held, first, last, 0, held->count);
}

#include "stack.h"

/* Rounds to one digit: quantized.round_rows. */
static void keep(const float *x, int64_t count, int8_t *digits, float *scale) {
  __m512 factor;
  const int strange = measure(x, count, &factor, scale);
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 here = first_lanes(count - k);
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(strange ? 0 : here, x + k), factor);
    _mm_mask_storeu_epi8(digits + k, here, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled)));
  }
}

static void attend_int8_cache(const Stack *all, const Head *head, int64_t start, int64_t slot,
                          const float *query, const float *key, const float *value, char *memory,
                          float *scores, float *y) {
  int8_t *keys = (int8_t *)all->keys + start * head->width;
  int8_t *values = (int8_t *)all->values + start * head->width;
  keep(key, head->width, keys + slot * head->width, all->key_scale + start + slot);
  keep(value, head->width, values + slot * head->width, all->value_scale + start + slot);
  const Rows queries = rows_in(memory, head->group, head->width);
  round_rows(&queries, query);
  attend_int8(head, &queries, 0, keys, all->key_scale + start, values, all->value_scale + start,
              scores, y);
}

XLA_FFI_Error *dia2_jax_int8_layers(XLA_FFI_CallFrame *frame) {
  return answered(frame) ? NULL : step_layers(frame, 1, attend_int8_cache);
}
