/* The call that steps a stack of layers: its operands, its memory, its steps. */

#ifndef DIA2_JAX_STACK_H_
#define DIA2_JAX_STACK_H_

#include "layer.h"

/* x [B, D], cos and sin [B, H / 2] float32, slot [B] and set [] int32; float32 keys [B, L, K, H, S] and
 * values [B, L, K, S, H], or both [B, L, K, S, H] int8 and the scales of both [B, L, K, S];
 * of every layer its norms (attention [D], query [H], key [H], MLP [D]), of every set its matrices of
 * queries, keys and values ([N H, D], [K H, D], [K H, D], or one of all three) and out [D, N H], then
 * wi [2 F, D] and wo [D, F]. A matrix of int8 is followed by its scale.
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
  int int8_weights, wrong;
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
      operands->int8_weights ? XLA_FFI_DataType_S8 : XLA_FFI_DataType_F32;
  if (operands->next == operands->end ||
      !fits(*operands->next, dtype, 2, (const int64_t[]){outputs, inputs})) {
    operands->wrong = 1;
    return matrix;
  }
  matrix.weight = (*operands->next++)->data;
  if (operands->int8_weights) matrix.scale = take_vector(operands, outputs);
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
  layer->wi = take_matrix(operands, 2 * all->hidden, all->width);
  layer->wo = take_matrix(operands, all->width, all->hidden);
}

#define BEFORE_CACHE 5 /* operands before those of the cache */

static XLA_FFI_Error *step_layers(XLA_FFI_CallFrame *frame, int int8_weights,
                                  AttendInt8 *attend_int8_cache) {
  const XLA_FFI_Buffer *const *in = (const XLA_FFI_Buffer *const *)frame->args.args;
  const XLA_FFI_Buffer *const *out = (const XLA_FFI_Buffer *const *)frame->rets.rets;
  const int64_t *sets = attribute(frame, "sets", XLA_FFI_DataType_S64);
  const int64_t *matrices = attribute(frame, "matrices", XLA_FFI_DataType_S64);
  const float *epsilon = attribute(frame, "epsilon", XLA_FFI_DataType_F32);
  const int64_t caches = frame->rets.size - 1;
  if (sets == NULL || *sets < 1 || *sets > frame->args.size || matrices == NULL ||
      (*matrices != 1 && *matrices != MATRICES) || epsilon == NULL)
    return refuse(frame, "dia2_jax layers: attributes are missing");
  const int int8_cache = caches == 4 && attend_int8_cache != NULL;
  if ((caches != 2 && !int8_cache) || frame->args.size < BEFORE_CACHE + caches + 4)
    return refuse(frame, "dia2_jax layers: another number of operands");
  Stack sizes = {.epsilon = *epsilon, .attend_int8_cache = int8_cache ? attend_int8_cache : NULL};
  const XLA_FFI_Buffer *x = in[0], *keys = in[BEFORE_CACHE], *values = in[BEFORE_CACHE + 1];
  const XLA_FFI_Buffer *query_norm = in[BEFORE_CACHE + caches + 1];
  if (x->rank != 2 || keys->rank != 5 || query_norm->rank != 1 || keys->dims[1] < 1)
    return refuse(frame, "dia2_jax layers: operands of other ranks");
  const int64_t rows = sizes.rows = x->dims[0], width = sizes.width = x->dims[1];
  const int64_t layers = sizes.layers = keys->dims[1], kv_heads = sizes.kv_heads = keys->dims[2];
  const int64_t head_width = sizes.head_width = query_norm->dims[0];
  const int64_t slots = sizes.slots = keys->dims[int8_cache ? 3 : 4];
  const int64_t first = BEFORE_CACHE + caches, each = (frame->args.size - first) / layers;
  const XLA_FFI_Buffer *last = in[first + each - 1 - int8_weights];        /* wo [D, F] */
  const XLA_FFI_Buffer *merge = in[first + each - 3 * (1 + int8_weights)]; /* out [D, N H] */
  if (each < 7 || last->rank != 2 || merge->rank != 2 || head_width < 2 || head_width % 2 != 0 ||
      kv_heads < 1 || slots < 1 || merge->dims[1] % (kv_heads * head_width) != 0)
    return refuse(frame, "dia2_jax layers: matrices of other shapes");
  sizes.hidden = last->dims[1], sizes.heads = merge->dims[1] / head_width;
  const XLA_FFI_DataType held = int8_cache ? XLA_FFI_DataType_S8 : XLA_FFI_DataType_F32;
  const int64_t slots_first[] = {rows, layers, kv_heads, slots, head_width};
  const int64_t width_first[] = {rows, layers, kv_heads, head_width, slots};
  int good = FITS(x, F32, rows, width) && FITS(out[0], F32, rows, width) &&
             FITS(in[1], F32, rows, head_width / 2) && FITS(in[2], F32, rows, head_width / 2) &&
             FITS(in[3], S32, rows) && fits(in[4], XLA_FFI_DataType_S32, 0, NULL) &&
             fits(keys, held, 5, int8_cache ? slots_first : width_first) &&
             fits(values, held, 5, slots_first);
  if (int8_cache)
    good = good && FITS(in[BEFORE_CACHE + 2], F32, rows, layers, kv_heads, slots) &&
           FITS(in[BEFORE_CACHE + 3], F32, rows, layers, kv_heads, slots);
  /* A step writes to a cache in its place. */
  for (int64_t i = 0; i < caches; i++)
    good = good && in[BEFORE_CACHE + i]->data == out[1 + i]->data;
  if (!good) return refuse(frame, "dia2_jax layers: operands that do not fit each other");
  sizes.cos = in[1]->data, sizes.sin = in[2]->data, sizes.slot = in[3]->data;
  sizes.keys = keys->data, sizes.values = values->data;
  if (int8_cache)
    sizes.key_scale = in[BEFORE_CACHE + 2]->data, sizes.value_scale = in[BEFORE_CACHE + 3]->data;
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
  const int64_t bytes = int8_weights ? 1 : 4; /* of a weight */
  const int64_t weights = width * (projected + merged + 3 * sizes.hidden) * bytes * layers;
  const int64_t threads = weights < ALONE ? 1 : count_threads(frame);
  sizes.place_size = lay_out(&sizes, NULL, NULL);
  Stack *all = aligned_alloc(64, head + steps + shared + threads * sizes.place_size);
  if (all == NULL) return refuse(frame, "dia2_jax layers: no memory for what a step computes");
  *all = sizes;
  char *memory = (char *)all + head + steps;
  float **parts[] = {&all->added, &all->projected, &all->attended, &all->gates, &all->let};
  for (int i = 0; i < 5; i++) *parts[i] = (float *)memory, memory += up(4 * rows * counts[i], 64);
  all->places = memory;
  all->x = out[0]->data;

  Operands operands = {in + BEFORE_CACHE + caches, in + frame->args.size, int8_weights, 0};
  const int64_t set = one_of(*(const int32_t *)in[4]->data, *sets);
  for (int64_t i = 0; i < layers; i++)
    take_layer(&operands, all, *sets, set, *matrices, all->layer + i);
  if (operands.wrong || operands.next != operands.end) {
    free(all);
    return refuse(frame, "dia2_jax layers: weights that do not fit each other");
  }
  if (all->x != x->data) memcpy(all->x, x->data, 4 * rows * width);
  Step *step = (Step *)((char *)all + head);
  for (int64_t i = 0; i < layers; i++, step += LAYER_STEPS) {
    begin_step(step + PROJECT, projected, outputs_of(DEALT, bytes * width));
    begin_step(step + ATTEND, rows * kv_heads, 1);
    begin_step(step + MERGE, width, outputs_of(DEALT, bytes * merged));
    begin_step(step + GATE, sizes.hidden, outputs_of(DEALT / 2, bytes * width));
    begin_step(step + REDUCE, width, outputs_of(DEALT, bytes * sizes.hidden));
  }
  begin(&all->work, (Step *)((char *)all + head), layers * LAYER_STEPS, compute_layer);
  finish(frame, &all->work, threads);
  return NULL;
}

#endif
