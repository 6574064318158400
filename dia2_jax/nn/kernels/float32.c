/* Products of a few rows with float32 weights and attention over a float32 cache, for x86 processors
 * with AVX-512.
 *
 * What is computed of a row depends neither on the rows beside it nor on how the work is shared.
 */

#include "attention.h"

/* ---- Products ---------------------------------------------------------------------------------- */

typedef struct {
  Work work; /* its items are outputs */
  int64_t rows, inputs, outputs;
  const float *x, *weight; /* [rows, inputs], [outputs, inputs] */
  float *y;                /* [rows, outputs] */
} Product;

/* Adds 16 inputs from `k` on, of which `here` exist, to the sums of `width` outputs of `rows` rows. */
INLINE void add(__m512 *sums, const float *const *weights, const float *x, int64_t inputs, int64_t k,
                const int rows, const int width, __mmask16 here, int64_t ahead) {
  __m512 held[4];
  UNROLL for (int j = 0; j < rows; j++) held[j] = _mm512_maskz_loadu_ps(here, x + j * inputs + k);
  UNROLL for (int i = 0; i < width; i++) {
    _mm_prefetch((const char *)(weights[i] + k + ahead), _MM_HINT_T1);
    __m512 read = _mm512_maskz_loadu_ps(here, weights[i] + k);
    UNROLL for (int j = 0; j < rows; j++)
      sums[i * rows + j] = _mm512_fmadd_ps(read, held[j], sums[i * rows + j]);
  }
}

/* `width` outputs from `output` on, of which `exist`, of `rows` rows from `row` on; asks for the
 * weights `ahead` floats further on. */
INLINE void tile(const Product *all, int64_t output, int exist, int64_t row, const int rows,
                 const int width, int64_t ahead) {
  const int64_t inputs = all->inputs;
  const float *x = all->x + row * inputs, *weights[8];
  UNROLL for (int i = 0; i < width; i++)
    weights[i] = all->weight + (output + (i < exist ? i : 0)) * inputs;
  __m512 sums[16]; /* every lane sums every sixteenth input */
  UNROLL for (int i = 0; i < width * rows; i++) sums[i] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 16 <= inputs; k += 16) add(sums, weights, x, inputs, k, rows, width, 0xffff, ahead);
  if (k < inputs) add(sums, weights, x, inputs, k, rows, width, first_lanes(inputs - k), 0);
  UNROLL for (int i = 0; i < width; i++)
    if (i < exist)
      UNROLL for (int j = 0; j < rows; j++)
        all->y[(row + j) * all->outputs + output + i] = _mm512_reduce_add_ps(sums[i * rows + j]);
}

INLINE void multiply_some(const Product *all, int64_t first, int64_t last, int64_t row,
                          const int rows, const int width) {
  for (; first + width <= last; first += width) {
    const int64_t ahead = first + 2 * width <= last ? width * all->inputs : 0;
    tile(all, first, width, row, rows, width, ahead);
  }
  if (first < last) tile(all, first, (int)(last - first), row, rows, width, 0);
}

static void compute_outputs(const Work *work, int64_t first, int64_t last) {
  const Product *all = (const Product *)work;
  const int64_t kept = all->rows > 4 ? outputs_of(KEPT, 4 * all->inputs) : last - first;
  for (; first < last; first += kept) {
    const int64_t end = first + kept < last ? first + kept : last;
    int64_t row = 0;
    for (; row + 4 <= all->rows; row += 4) multiply_some(all, first, end, row, 4, 4);
    if (row + 2 <= all->rows) multiply_some(all, first, end, row, 2, 8), row += 2;
    if (row < all->rows) multiply_some(all, first, end, row, 1, 8);
  }
}

/* x [B, D], weight [F, D] -> y [B, F], all float32 */
XLA_FFI_Error *dia2_jax_float32_product(XLA_FFI_CallFrame *frame) {
  if (answered(frame)) return NULL;
  if (frame->args.size != 2 || frame->rets.size != 1)
    return refuse(frame, "dia2_jax float32 product: another number of operands");
  const XLA_FFI_Buffer *const *in = (const XLA_FFI_Buffer *const *)frame->args.args;
  const XLA_FFI_Buffer *x = in[0], *weight = in[1], *y = frame->rets.rets[0];
  if (x->rank != 2 || weight->rank != 2)
    return refuse(frame, "dia2_jax float32 product: operands of other ranks");
  const int64_t rows = x->dims[0], inputs = x->dims[1], outputs = weight->dims[0];
  if (!FITS(x, F32, rows, inputs) || !FITS(weight, F32, outputs, inputs) ||
      !FITS(y, F32, rows, outputs))
    return refuse(frame, "dia2_jax float32 product: operands that do not fit each other");
  Product *all = aligned_alloc(64, up(sizeof(Product), 64));
  if (all == NULL) return refuse(frame, "dia2_jax float32 product: no memory");
  all->rows = rows, all->inputs = inputs, all->outputs = outputs;
  all->x = x->data, all->weight = weight->data, all->y = y->data;
  begin(&all->work, outputs, outputs_of(DEALT, 4 * inputs), compute_outputs);
  finish(frame, &all->work, outputs * inputs * 4 < ALONE);
  return NULL;
}

/* ---- Attention ----------------------------------------------------------------------------------- */

typedef struct {
  Attention attention;
  const float *query, *keys, *values; /* [B, K, G, H], [B, L, K, H, S], [B, L, K, S, H] */
} FloatAttention;

/* Scores of `count` queries [H] with the first `length` slots of keys [H, S], 64 slots at a time. */
INLINE void score_some(const Attention *all, const float *query, const float *keys, int64_t length,
                       float *scores, const int count) {
  for (int64_t s = 0; s < length; s += 64) {
    __m512 sums[16];
    __mmask16 here[4];
    UNROLL for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
    UNROLL for (int part = 0; part < 4; part++) here[part] = first_lanes(length - s - 16 * part);
    for (int64_t h = 0; h < all->width; h++) {
      const float *slots = keys + h * all->slots + s;
      UNROLL for (int part = 0; part < 4; part++) {
        __m512 key = _mm512_maskz_loadu_ps(here[part], slots + 16 * part);
        UNROLL for (int g = 0; g < count; g++)
          sums[4 * g + part] = _mm512_fmadd_ps(_mm512_set1_ps(query[g * all->width + h]), key,
                                               sums[4 * g + part]);
      }
    }
    UNROLL for (int g = 0; g < count; g++)
      UNROLL for (int part = 0; part < 4; part++)
        _mm512_storeu_ps(scores + g * all->room + s + 16 * part, sums[4 * g + part]);
  }
}

static void compute_heads(const Work *work, int64_t first, int64_t last) {
  const FloatAttention *call = (const FloatAttention *)work;
  const Attention *all = &call->attention;
  for (int64_t item = first; item < last; item++) {
    const int64_t start = first_slot(all, item) * all->width, length = slots_of(all, item);
    const float *query = call->query + item * all->group * all->width, *keys = call->keys + start;
    float *scores = all->scores + item * all->group * all->room;
    int64_t g = 0;
    for (; g + 4 <= all->group; g += 4)
      score_some(all, query + g * all->width, keys, length, scores + g * all->room, 4);
    if (g + 2 <= all->group) {
      score_some(all, query + g * all->width, keys, length, scores + g * all->room, 2);
      g += 2;
    }
    if (g < all->group)
      score_some(all, query + g * all->width, keys, length, scores + g * all->room, 1);
    finish_item(all, item, call->values + start, NULL, 0);
  }
}

/* query [B, K, G, H], keys [B, L, K, H, S], values [B, L, K, S, H] float32, layer [] int32, length
 * [B] int32 -> y [B, K, G, H] float32 */
XLA_FFI_Error *dia2_jax_float32_attention(XLA_FFI_CallFrame *frame) {
  if (answered(frame)) return NULL;
  if (frame->args.size != 5 || frame->rets.size != 1)
    return refuse(frame, "dia2_jax float32 attention: another number of operands");
  const XLA_FFI_Buffer *const *in = (const XLA_FFI_Buffer *const *)frame->args.args;
  const XLA_FFI_Buffer *query = in[0], *keys = in[1], *y = frame->rets.rets[0];
  if (query->rank != 4 || keys->rank != 5 || keys->dims[1] < 1)
    return refuse(frame, "dia2_jax float32 attention: operands of other ranks");
  const int64_t batch = query->dims[0], heads = query->dims[1], group = query->dims[2],
                width = query->dims[3], layers = keys->dims[1], slots = keys->dims[4];
  if (!FITS(query, F32, batch, heads, group, width) ||
      !FITS(keys, F32, batch, layers, heads, width, slots) ||
      !FITS(in[2], F32, batch, layers, heads, slots, width) ||
      !fits(in[3], XLA_FFI_DataType_S32, 0, NULL) || !FITS(in[4], S32, batch) ||
      !FITS(y, F32, batch, heads, group, width))
    return refuse(frame, "dia2_jax float32 attention: operands that do not fit each other");
  Attention sizes;
  const int64_t longest = size_up(&sizes, query, layers, slots, in[3], in[4]);
  const int64_t head = up(sizeof(FloatAttention), 64);
  FloatAttention *call = aligned_alloc(64, head + batch * heads * group * sizes.room * 4);
  if (call == NULL) return refuse(frame, "dia2_jax float32 attention: no memory for the scores");
  call->attention = sizes;
  call->attention.y = y->data;
  call->attention.scores = (float *)((char *)call + head);
  call->query = query->data, call->keys = keys->data, call->values = in[2]->data;
  begin(&call->attention.work, batch * heads, 1, compute_heads);
  finish(frame, &call->attention.work, batch * heads * longest * width * 4 < ALONE);
  return NULL;
}
