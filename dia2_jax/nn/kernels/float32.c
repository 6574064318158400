/* Products of a few rows with float32 weights, attention over a float32 cache, and layers of both, for
 * x86 processors with AVX-512.
 *
 * What is computed of a row depends neither on the rows beside it nor on how the work is shared.
 */

#include "shared.h"

/* ---- Products ---------------------------------------------------------------------------------- */

typedef struct {
  int64_t rows, inputs, stride; /* `stride` from one row of y to the next */
  const float *x, *weight;      /* [rows, inputs], [outputs, inputs] */
  float *y;                     /* [rows, outputs ...] */
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
        all->y[(row + j) * all->stride + output + i] = _mm512_reduce_add_ps(sums[i * rows + j]);
}

INLINE void multiply_some(const Product *all, int64_t first, int64_t last, int64_t row,
                          const int rows, const int width) {
  for (; first + width <= last; first += width) {
    const int64_t ahead = first + 2 * width <= last ? width * all->inputs : 0;
    tile(all, first, width, row, rows, width, ahead);
  }
  if (first < last) tile(all, first, (int)(last - first), row, rows, width, 0);
}

/* Outputs `first` to `last` - 1. */
static void multiply_outputs(const Product *all, int64_t first, int64_t last) {
  const int64_t kept = all->rows > 4 ? outputs_of(KEPT, 4 * all->inputs) : last - first;
  for (; first < last; first += kept) {
    const int64_t end = first + kept < last ? first + kept : last;
    int64_t row = 0;
    for (; row + 4 <= all->rows; row += 4) multiply_some(all, first, end, row, 4, 4);
    if (row + 2 <= all->rows) multiply_some(all, first, end, row, 2, 8), row += 2;
    if (row < all->rows) multiply_some(all, first, end, row, 1, 8);
  }
}

typedef struct {
  Work work; /* its items are outputs */
  Step step;
  Product product;
} ProductWork;

static void compute_outputs(const Work *work, int64_t step, int64_t first, int64_t last, int thread,
                            int fresh) {
  multiply_outputs(&((const ProductWork *)work)->product, first, last);
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
  ProductWork *all = aligned_alloc(64, up(sizeof(ProductWork), 64));
  if (all == NULL) return refuse(frame, "dia2_jax float32 product: no memory");
  all->product = (Product){rows, inputs, outputs, x->data, weight->data, y->data};
  begin_step(&all->step, outputs, outputs_of(DEALT, 4 * inputs));
  begin(&all->work, &all->step, 1, compute_outputs);
  finish(frame, &all->work, outputs * inputs * 4 < ALONE ? 1 : count_threads(frame));
  return NULL;
}

/* ---- Layers -------------------------------------------------------------------------------------- */

/* Rows are multiplied as they are. */
typedef struct {
  const float *x;
  int64_t rows, inputs;
} Held;

static int64_t held_size(int64_t rows, int64_t inputs) { return 0; }

static Held held_in(char *memory, const float *x, int64_t rows, int64_t inputs) {
  return (Held){x, rows, inputs};
}

static void fill(const Held *held, const float *x) {}

static void multiply(const Held *held, const void *weight, const float *scale, int64_t first,
                     int64_t last, float *y, int64_t stride) {
  const Product product = {held->rows, held->inputs, stride, held->x, weight, y};
  multiply_outputs(&product, first, last);
}

#include "stack.h"

XLA_FFI_Error *dia2_jax_float32_layers(XLA_FFI_CallFrame *frame) {
  return answered(frame) ? NULL : step_layers(frame, 0, NULL);
}

/* ---- Attention ----------------------------------------------------------------------------------- */

typedef struct {
  Attention attention;
  const float *query, *keys, *values; /* [B, K, G, H], [B, L, K, H, S], [B, L, K, S, H] */
} FloatAttention;

static void compute_heads(const Work *work, int64_t step, int64_t first, int64_t last, int thread,
                          int fresh) {
  const FloatAttention *call = (const FloatAttention *)work;
  const Attention *all = &call->attention;
  for (int64_t item = first; item < last; item++) {
    int64_t slot;
    const Head head = head_of(all, item, &slot);
    const int64_t start = slot * head.width, query = item * head.group * head.width;
    attend_float32(&head, call->query + query, call->keys + start, call->values + start,
                   all->scores + item * head.group * head.room, all->y + query);
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
  const int64_t before = up(sizeof(FloatAttention), 64);
  FloatAttention *call =
      aligned_alloc(64, before + up(batch * heads * group * sizes.head.room * 4, 64));
  if (call == NULL) return refuse(frame, "dia2_jax float32 attention: no memory for the scores");
  call->attention = sizes;
  call->attention.y = y->data;
  call->attention.scores = (float *)((char *)call + before);
  call->query = query->data, call->keys = keys->data, call->values = in[2]->data;
  begin_step(&call->attention.step, batch * heads, 1);
  begin(&call->attention.work, &call->attention.step, 1, compute_heads);
  const int alone = batch * heads * longest * width * 4 < ALONE;
  finish(frame, &call->attention.work, alone ? 1 : count_threads(frame));
  return NULL;
}
