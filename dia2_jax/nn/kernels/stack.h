/* One step of a stack of transformer layers: each normalises its rows by their root mean square,
 * attends over a cache with normalised and rotated queries and keys, and has a gated MLP (silu).
 *
 * A layer is five steps of work, and all layers are one piece of it: the threads stay awake from the
 * first to the last. Who includes this file has said before
 *
 *   Held                               what products want of rows,
 *   held_size(rows, inputs)            how many bytes it takes,
 *   held_in(memory, x, rows, inputs)   where it lies in as many bytes,
 *   fill(held, x)                      makes it of rows x,
 *   multiply(held, weight, scale, first, last, y, stride)   products with outputs `first` to `last` - 1.
 */

#ifndef DIA2_JAX_STACK_H_
#define DIA2_JAX_STACK_H_

#include "attention.h"

enum { PROJECT, ATTEND, MERGE, GATE, NARROW, LAYER_STEPS };

#define MATRICES 3 /* of queries, keys and values */

/* Weights [outputs, inputs]; of int8 a scale for each output. */
typedef struct {
  const void *weight;
  const float *scale;
  int64_t outputs, inputs;
} Matrix;

typedef struct {
  const float *attention_norm, *query_norm, *key_norm, *mlp_norm;
  Matrix in[MATRICES];              /* of queries, keys and values; or one of all three, and two empty */
  Matrix out, wide, narrow;    /* wide: of the gates, then of what they let through */
} Layer;

typedef struct Stack Stack;

/* Keeps an item's key and value [H] in a slot of an int8 cache, whose slots of this layer, row and head
 * begin at `start`, and attends to it with queries [G, H]. `memory` has room for
 * rows as products want them. */
typedef void AttendNarrow(const Stack *, const Head *, int64_t start, int64_t slot, const float *query,
                          const float *key, const float *value, char *memory, float *scores, float *y);

struct Stack {
  Work work;
  int64_t rows, width, heads, kv_heads, head_width, hidden;
  int64_t layers, slots, room;
  float epsilon;
  const float *cos, *sin;     /* [B, H / 2] */
  const int32_t *slot;        /* [B] */
  AttendNarrow *attend_narrow; /* if the cache is of int8 with scales */
  void *keys, *values;        /* float32 [B, L, K, H, S] and [B, L, K, S, H]; int8 both the latter */
  float *key_scale, *value_scale;
  float *x;                   /* [B, D], to which every layer adds twice */
  float *added;               /* [B, D], what it adds */
  float *projected;           /* [B, N + 2 K, H] */
  float *attended;            /* [B, N, H] */
  float *gates;               /* [B, 2 F] */
  float *let;                 /* [B, F], what the gates let through */
  char *places;               /* memory of the threads, each `place_size` bytes */
  int64_t place_size;
  Layer layer[];
};

/* ---- Small parts ------------------------------------------------------------------------------- */

/* y = x / sqrt(mean(x^2) + epsilon) * weight, of `count` numbers */
INLINE void normalise(const float *x, const float *weight, int64_t count, float epsilon, float *y) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 read = _mm512_maskz_loadu_ps(first_lanes(count - i), x + i);
    squares = _mm512_fmadd_ps(read, read, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / (float)count;
  const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(mean + epsilon));
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 here = first_lanes(count - i);
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(here, x + i), factor);
    _mm512_mask_storeu_ps(y + i, here,
                          _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(here, weight + i)));
  }
}

/* Rotates plane (i, i + H / 2) of a head by the angle of that cosine and sine. */
INLINE void rotate(float *x, const float *cos, const float *sin, int64_t half) {
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 here = first_lanes(half - i);
    const __m512 first = _mm512_maskz_loadu_ps(here, x + i);
    const __m512 second = _mm512_maskz_loadu_ps(here, x + half + i);
    const __m512 c = _mm512_maskz_loadu_ps(here, cos + i), s = _mm512_maskz_loadu_ps(here, sin + i);
    _mm512_mask_storeu_ps(x + i, here,
                          _mm512_sub_ps(_mm512_mul_ps(first, c), _mm512_mul_ps(second, s)));
    _mm512_mask_storeu_ps(x + half + i, here,
                          _mm512_add_ps(_mm512_mul_ps(second, c), _mm512_mul_ps(first, s)));
  }
}

/* y = silu(gate) * through, of `count` numbers */
INLINE void gate_some(const float *gate, const float *through, float *y, int64_t count) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 here = first_lanes(count - i);
    const __m512 x = _mm512_maskz_loadu_ps(here, gate + i);
    /* With a power of e that is at most 1: sigmoid(x) is 1 / (1 + power), or power / (1 + power). */
    const __m512 power = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 top = _mm512_mask_mov_ps(one, below, power);
    const __m512 silu = _mm512_mul_ps(x, _mm512_div_ps(top, _mm512_add_ps(one, power)));
    _mm512_mask_storeu_ps(y + i, here,
                          _mm512_mul_ps(silu, _mm512_maskz_loadu_ps(here, through + i)));
  }
}

INLINE void add_some(float *x, const float *y, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 here = first_lanes(count - i);
    const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(here, x + i),
                                     _mm512_maskz_loadu_ps(here, y + i));
    _mm512_mask_storeu_ps(x + i, here, sum);
  }
}

/* ---- What a thread has of its own --------------------------------------------------------------- */

typedef struct {
  char *held;  /* rows as products want them */
  float *rows; /* [B, D], normalised */
  float *head; /* [G + 2, H]: an item's queries, key and value */
  float *scores;
} Place;

/* Lays a place out in `memory`, if there is any; returns how many bytes it takes. */
static int64_t lay_out(const Stack *all, char *memory, Place *place) {
  const int64_t group = all->heads / all->kv_heads, merged = all->heads * all->head_width;
  int64_t inputs = merged > all->hidden ? merged : all->hidden;
  if (inputs < all->width) inputs = all->width;
  const int64_t most = all->rows > group ? all->rows : group; /* queries of an item are rows, too */
  const int64_t held = up(held_size(most, inputs), 64);
  const int64_t rows = up(4 * all->rows * all->width, 64);
  const int64_t head = up(4 * (group + 2) * all->head_width, 64);
  if (memory != NULL)
    *place = (Place){memory, (float *)(memory + held), (float *)(memory + held + rows),
                     (float *)(memory + held + rows + head)};
  return held + rows + head + up(4 * group * all->room, 64);
}

/* ---- The five steps of a layer ------------------------------------------------------------------ */

static void project(const Stack *all, const Layer *layer, int64_t first, int64_t last, Place *place,
                    int fresh) {
  const int64_t stride = (all->heads + 2 * all->kv_heads) * all->head_width;
  const Held held = held_in(place->held, place->rows, all->rows, all->width);
  if (fresh) {
    for (int64_t row = 0; row < all->rows; row++)
      normalise(all->x + row * all->width, layer->attention_norm, all->width, all->epsilon,
                place->rows + row * all->width);
    fill(&held, place->rows);
  }
  int64_t before = 0; /* outputs of the matrices before this one */
  for (int i = 0; i < MATRICES; before += layer->in[i++].outputs) {
    const Matrix *matrix = layer->in + i;
    const int64_t from = first > before ? first - before : 0;
    const int64_t to = last - before < matrix->outputs ? last - before : matrix->outputs;
    if (from < to)
      multiply(&held, matrix->weight, matrix->scale, from, to, all->projected + before, stride);
  }
}

/* Normalises and rotates queries and the key of key-value head `item` of all rows, keeps key and value
 * in the row's slot, and attends. */
static void attend_item(const Stack *all, const Layer *layer, int64_t number, int64_t item,
                        Place *place) {
  const int64_t row = item / all->kv_heads, kv_head = item % all->kv_heads;
  const int64_t group = all->heads / all->kv_heads, width = all->head_width, half = width / 2;
  const float *in = all->projected + row * (all->heads + 2 * all->kv_heads) * width;
  const float *cos = all->cos + row * half, *sin = all->sin + row * half;
  float *query = place->head, *key = query + group * width;
  for (int64_t g = 0; g < group; g++) {
    normalise(in + (kv_head * group + g) * width, layer->query_norm, width, all->epsilon,
              query + g * width);
    rotate(query + g * width, cos, sin, half);
  }
  normalise(in + (all->heads + kv_head) * width, layer->key_norm, width, all->epsilon, key);
  rotate(key, cos, sin, half);
  const float *value = in + (all->heads + all->kv_heads + kv_head) * width;
  const int64_t slots = all->slots, asked = all->slot[row];
  const int64_t slot = asked < 0 ? 0 : asked >= slots ? slots - 1 : asked;
  const int64_t start = ((row * all->layers + number) * all->kv_heads + kv_head) * slots;
  const Head head = {group, width, slots, slots_of(asked + 1, slots), all->room};
  float *y = all->attended + (row * all->heads + kv_head * group) * width;
  if (all->attend_narrow != NULL) {
    all->attend_narrow(all, &head, start, slot, query, key, value, place->held, place->scores, y);
    return;
  }
  float *keys = (float *)all->keys + start * width, *values = (float *)all->values + start * width;
  for (int64_t h = 0; h < width; h++) keys[h * slots + slot] = key[h];
  memcpy(values + slot * width, value, width * sizeof(float));
  attend_float32(&head, query, keys, values, place->scores, y);
}

/* Adds products of rows [B, inputs] to some numbers of x. */
static void add_products(const Stack *all, const Matrix *matrix, const float *rows, int64_t first,
                         int64_t last, Place *place, int fresh) {
  const Held held = held_in(place->held, rows, all->rows, matrix->inputs);
  if (fresh) fill(&held, rows);
  multiply(&held, matrix->weight, matrix->scale, first, last, all->added, all->width);
  for (int64_t row = 0; row < all->rows; row++)
    add_some(all->x + row * all->width + first, all->added + row * all->width + first, last - first);
}

static void gate(const Stack *all, const Layer *layer, int64_t first, int64_t last, Place *place,
                 int fresh) {
  const int64_t hidden = all->hidden;
  const Matrix *matrix = &layer->wide;
  const Held held = held_in(place->held, place->rows, all->rows, all->width);
  if (fresh) {
    for (int64_t row = 0; row < all->rows; row++)
      normalise(all->x + row * all->width, layer->mlp_norm, all->width, all->epsilon,
                place->rows + row * all->width);
    fill(&held, place->rows);
  }
  multiply(&held, matrix->weight, matrix->scale, first, last, all->gates, 2 * hidden);
  multiply(&held, matrix->weight, matrix->scale, hidden + first, hidden + last, all->gates, 2 * hidden);
  for (int64_t row = 0; row < all->rows; row++) {
    const float *gates = all->gates + row * 2 * hidden;
    gate_some(gates + first, gates + hidden + first, all->let + row * hidden + first, last - first);
  }
}

static void compute_layer(const Work *work, int64_t step, int64_t first, int64_t last, int thread,
                          int fresh) {
  const Stack *all = (const Stack *)work;
  const int64_t number = step / LAYER_STEPS;
  const Layer *layer = all->layer + number;
  Place place = {NULL, NULL, NULL, NULL};
  lay_out(all, all->places + thread * all->place_size, &place);
  switch (step % LAYER_STEPS) {
    case PROJECT: project(all, layer, first, last, &place, fresh); break;
    case ATTEND:
      for (int64_t item = first; item < last; item++) attend_item(all, layer, number, item, &place);
      break;
    case MERGE: add_products(all, &layer->out, all->attended, first, last, &place, fresh); break;
    case GATE: gate(all, layer, first, last, &place, fresh); break;
    case NARROW: add_products(all, &layer->narrow, all->let, first, last, &place, fresh); break;
  }
}

/* ---- The call --------------------------------------------------------------------------------------
 *
 * x [B, D], cos and sin [B, H / 2] float32, slot [B] and set [] int32; float32 keys [B, L, K, H, S] and
 * values [B, L, K, S, H], or both [B, L, K, S, H] int8 and the scales of both [B, L, K, S];
 * of every layer its norms (attention [D], query [H], key [H], MLP [D]), of every set its matrices of
 * queries, keys and values ([N H, D], [K H, D], [K H, D], or one of all three) and out [D, N H], then
 * wide [2 F, D] and narrow [D, F]. A matrix of int8 is followed by its scale.
 *   -> x, keys, values (and their scales)
 * Attributes: sets, matrices (3 or 1: how many make queries, keys and values), epsilon. */

INLINE void *attribute(const XLA_FFI_CallFrame *frame, const char *name, XLA_FFI_DataType dtype) {
  for (int64_t i = 0; i < frame->attrs.size; i++) {
    const XLA_FFI_ByteSpan *own = frame->attrs.names[i];
    if (own->len != strlen(name) || memcmp(own->ptr, name, own->len) != 0) continue;
    const XLA_FFI_Scalar *scalar = frame->attrs.attrs[i];
    if (frame->attrs.types[i] == XLA_FFI_AttrType_SCALAR && scalar->dtype == dtype)
      return scalar->value;
  }
  return NULL;
}

/* What is read of a call's operands, one after another. */
typedef struct {
  const XLA_FFI_Buffer *const *next, *const *end;
  int narrow_weights, wrong;
} Operands;

static const void *take_vector(Operands *operands, int64_t count) {
  if (operands->next == operands->end || !FITS(*operands->next, F32, count)) {
    operands->wrong = 1;
    return NULL;
  }
  return (*operands->next++)->data;
}

static Matrix take_matrix(Operands *operands, int64_t outputs, int64_t inputs) {
  Matrix matrix = {NULL, NULL, outputs, inputs};
  const XLA_FFI_DataType dtype =
      operands->narrow_weights ? XLA_FFI_DataType_S8 : XLA_FFI_DataType_F32;
  if (operands->next == operands->end ||
      !fits(*operands->next, dtype, 2, (const int64_t[]){outputs, inputs})) {
    operands->wrong = 1;
    return matrix;
  }
  matrix.weight = (*operands->next++)->data;
  if (operands->narrow_weights) matrix.scale = take_vector(operands, outputs);
  return matrix;
}

static void take_layer(Operands *operands, const Stack *all, int64_t sets, int64_t set,
                       int64_t matrices, Layer *layer) {
  const int64_t merged = all->heads * all->head_width, one = all->kv_heads * all->head_width;
  layer->attention_norm = take_vector(operands, all->width);
  layer->query_norm = take_vector(operands, all->head_width);
  layer->key_norm = take_vector(operands, all->head_width);
  layer->mlp_norm = take_vector(operands, all->width);
  for (int64_t i = 0; i < sets; i++) {
    Layer other = {0};
    other.in[0] = take_matrix(operands, matrices == 1 ? merged + 2 * one : merged, all->width);
    if (matrices > 1)
      for (int j = 1; j < MATRICES; j++) other.in[j] = take_matrix(operands, one, all->width);
    other.out = take_matrix(operands, all->width, merged);
    if (i == set) memcpy(layer->in, other.in, sizeof other.in), layer->out = other.out;
  }
  layer->wide = take_matrix(operands, 2 * all->hidden, all->width);
  layer->narrow = take_matrix(operands, all->width, all->hidden);
}

#define HEAD 5 /* operands before those of the cache */

static XLA_FFI_Error *step_layers(XLA_FFI_CallFrame *frame, int narrow_weights,
                                  AttendNarrow *attend_narrow) {
  const XLA_FFI_Buffer *const *in = (const XLA_FFI_Buffer *const *)frame->args.args;
  const XLA_FFI_Buffer *const *out = (const XLA_FFI_Buffer *const *)frame->rets.rets;
  const int64_t *sets = attribute(frame, "sets", XLA_FFI_DataType_S64);
  const int64_t *matrices = attribute(frame, "matrices", XLA_FFI_DataType_S64);
  const float *epsilon = attribute(frame, "epsilon", XLA_FFI_DataType_F32);
  const int64_t caches = frame->rets.size - 1;
  if (sets == NULL || *sets < 1 || matrices == NULL || (*matrices != 1 && *matrices != MATRICES) ||
      epsilon == NULL)
    return refuse(frame, "dia2_jax layers: attributes are missing");
  const int narrow_cache = caches == 4 && attend_narrow != NULL;
  if ((caches != 2 && !narrow_cache) || frame->args.size < HEAD + caches + 4)
    return refuse(frame, "dia2_jax layers: another number of operands");
  Stack sizes = {.epsilon = *epsilon, .attend_narrow = narrow_cache ? attend_narrow : NULL};
  const XLA_FFI_Buffer *x = in[0], *keys = in[HEAD], *values = in[HEAD + 1];
  const XLA_FFI_Buffer *query_norm = in[HEAD + caches + 1];
  if (x->rank != 2 || keys->rank != 5 || query_norm->rank != 1 || keys->dims[1] < 1)
    return refuse(frame, "dia2_jax layers: operands of other ranks");
  const int64_t rows = sizes.rows = x->dims[0], width = sizes.width = x->dims[1];
  const int64_t layers = sizes.layers = keys->dims[1], kv_heads = sizes.kv_heads = keys->dims[2];
  const int64_t head_width = sizes.head_width = query_norm->dims[0];
  const int64_t slots = sizes.slots = keys->dims[narrow_cache ? 3 : 4];
  const int64_t each = (frame->args.size - HEAD - caches) / layers; /* operands of a layer */
  const XLA_FFI_Buffer *last = in[HEAD + caches + each - 1 - narrow_weights]; /* narrow [D, F] */
  const XLA_FFI_Buffer *merge = in[HEAD + caches + each - 3 * (1 + narrow_weights)]; /* [D, N H] */
  if (each < 7 || last->rank != 2 || merge->rank != 2 || head_width < 2 || head_width % 2 != 0 ||
      kv_heads < 1 || merge->dims[1] % (kv_heads * head_width) != 0)
    return refuse(frame, "dia2_jax layers: matrices of other shapes");
  sizes.hidden = last->dims[1], sizes.heads = merge->dims[1] / head_width;
  const XLA_FFI_DataType held =
      narrow_cache ? XLA_FFI_DataType_S8 : XLA_FFI_DataType_F32;
  const int64_t slots_first[] = {rows, layers, kv_heads, slots, head_width};
  const int64_t width_first[] = {rows, layers, kv_heads, head_width, slots};
  int good = FITS(x, F32, rows, width) && FITS(out[0], F32, rows, width) &&
             FITS(in[1], F32, rows, head_width / 2) && FITS(in[2], F32, rows, head_width / 2) &&
             FITS(in[3], S32, rows) && fits(in[4], XLA_FFI_DataType_S32, 0, NULL) &&
             fits(keys, held, 5, narrow_cache ? slots_first : width_first) &&
             fits(values, held, 5, slots_first);
  if (narrow_cache)
    good = good && FITS(in[HEAD + 2], F32, rows, layers, kv_heads, slots) &&
           FITS(in[HEAD + 3], F32, rows, layers, kv_heads, slots);
  /* A step writes to a cache in its place. */
  for (int64_t i = 0; i < caches; i++) good = good && in[HEAD + i]->data == out[1 + i]->data;
  if (!good) return refuse(frame, "dia2_jax layers: operands that do not fit each other");
  sizes.cos = in[1]->data, sizes.sin = in[2]->data, sizes.slot = in[3]->data;
  sizes.keys = keys->data, sizes.values = values->data;
  if (narrow_cache)
    sizes.key_scale = in[HEAD + 2]->data, sizes.value_scale = in[HEAD + 3]->data;
  int64_t longest = 0;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t own = slots_of((int64_t)sizes.slot[row] + 1, slots);
    if (own > longest) longest = own;
  }
  sizes.room = up(longest, 64);

  const int64_t merged = sizes.heads * head_width, projected = merged + 2 * kv_heads * head_width;
  const int64_t counts[] = {width, projected, merged, 2 * sizes.hidden, sizes.hidden};
  int64_t shared = 0;
  for (int i = 0; i < 5; i++) shared += up(4 * rows * counts[i], 64);
  const int64_t head = up(sizeof(Stack) + layers * sizeof(Layer), 64);
  const int64_t steps = layers * LAYER_STEPS * (int64_t)sizeof(Step);
  const int64_t threads = count_threads(frame);
  sizes.place_size = lay_out(&sizes, NULL, NULL);
  Stack *all = aligned_alloc(64, head + steps + shared + threads * sizes.place_size);
  if (all == NULL) return refuse(frame, "dia2_jax layers: no memory for what a step computes");
  *all = sizes;
  char *memory = (char *)all + head + steps;
  float **parts[] = {&all->added, &all->projected, &all->attended, &all->gates, &all->let};
  for (int i = 0; i < 5; i++) *parts[i] = (float *)memory, memory += up(4 * rows * counts[i], 64);
  all->places = memory;
  all->x = out[0]->data;
  if (all->x != x->data) memcpy(all->x, x->data, 4 * rows * width);

  Operands operands = {in + HEAD + caches, in + frame->args.size, narrow_weights, 0};
  const int64_t set = layer_of(*(const int32_t *)in[4]->data, *sets);
  for (int64_t i = 0; i < layers; i++)
    take_layer(&operands, all, *sets, set, *matrices, all->layer + i);
  if (operands.wrong || operands.next != operands.end) {
    free(all);
    return refuse(frame, "dia2_jax layers: weights that do not fit each other");
  }
  const int64_t bytes = narrow_weights ? 1 : 4; /* of a weight */
  Step *step = (Step *)((char *)all + head);
  for (int64_t i = 0; i < layers; i++, step += LAYER_STEPS) {
    begin_step(step + PROJECT, projected, outputs_of(DEALT, bytes * width));
    begin_step(step + ATTEND, rows * kv_heads, 1);
    begin_step(step + MERGE, width, outputs_of(DEALT, bytes * merged));
    begin_step(step + GATE, sizes.hidden, outputs_of(DEALT / 2, bytes * width));
    begin_step(step + NARROW, width, outputs_of(DEALT, bytes * sizes.hidden));
  }
  begin(&all->work, (Step *)((char *)all + head), layers * LAYER_STEPS, compute_layer);
  const int64_t weights = width * (projected + merged + 3 * sizes.hidden) * bytes * layers;
  finish(frame, &all->work, weights < ALONE ? 1 : threads);
  return NULL;
}

#endif
