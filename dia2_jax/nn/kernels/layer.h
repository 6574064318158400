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
 *   multiply(held, weight, scale, first, last, y, stride)
 *                                      products with outputs `first` to `last` - 1.
 */

#ifndef DIA2_JAX_LAYER_H_
#define DIA2_JAX_LAYER_H_

#include "attention.h"

enum { PROJECT, ATTEND, MERGE, GATE, REDUCE, LAYER_STEPS };

#define MATRICES 3 /* of queries, keys and values */

/* Weights [outputs, inputs]; of int8 a scale for each output. */
typedef struct {
  const void *weight;
  const float *scale;
  int64_t outputs, inputs;
} Matrix;

typedef struct {
  const float *attention_norm, *query_norm, *key_norm, *mlp_norm;
  Matrix in[MATRICES]; /* of queries, keys and values; or one of all three, and two empty */
  Matrix out;
  Matrix wi, wo; /* wi: of the gates, then of what they let through */
} Layer;

typedef struct Stack Stack;

/* Keeps an item's key and value [H] in a slot of an int8 cache, whose slots of this layer, row and head
 * begin at `start`, and attends to it with queries [G, H]. `memory` has room for rows as products want
 * them. */
typedef void AttendInt8(const Stack *, const Head *, int64_t start, int64_t slot, const float *query,
                        const float *key, const float *value, char *memory, float *scores, float *y);

struct Stack {
  Work work;
  int64_t rows, width, heads, kv_heads, head_width, hidden;
  int64_t layers, slots, room;
  float epsilon;
  const float *cos, *sin; /* [B, H / 2] */
  const int32_t *slot;    /* [B] */
  /* float32 keys [B, L, K, H, S] and values [B, L, K, S, H]; or both [B, L, K, S, H] int8 with a scale
   * a slot, where there is what attends to them */
  AttendInt8 *attend_int8_cache;
  void *keys, *values;
  float *key_scale, *value_scale;
  float *x;         /* [B, D], to which every layer adds twice */
  float *added;     /* [B, D], what it adds */
  float *projected; /* [B, N + 2 K, H] */
  float *attended;  /* [B, N, H] */
  float *gates;     /* [B, 2 F] */
  float *let;       /* [B, F], what the gates let through */
  char *places;     /* memory of the threads, each `place_size` bytes */
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
  float *head; /* [G + 1, H]: an item's queries and key */
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
  const int64_t head = up(4 * (group + 1) * all->head_width, 64);
  if (memory != NULL)
    *place = (Place){memory, (float *)(memory + held), (float *)(memory + held + rows),
                     (float *)(memory + held + rows + head)};
  return held + rows + head + up(4 * group * all->room, 64);
}

/* ---- The five steps of a layer ------------------------------------------------------------------ */

/* The rows of x, normalised, as products want them; made once a step by each thread. */
static Held normalised(const Stack *all, const float *norm, Place *place, int fresh) {
  const Held held = held_in(place->held, place->rows, all->rows, all->width);
  if (!fresh) return held;
  for (int64_t row = 0; row < all->rows; row++)
    normalise(all->x + row * all->width, norm, all->width, all->epsilon,
              place->rows + row * all->width);
  fill(&held, place->rows);
  return held;
}

static void project(const Stack *all, const Layer *layer, int64_t first, int64_t last, Place *place,
                    int fresh) {
  const int64_t stride = (all->heads + 2 * all->kv_heads) * all->head_width;
  const Held held = normalised(all, layer->attention_norm, place, fresh);
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
  const int64_t slots = all->slots, asked = all->slot[row], slot = one_of(asked, slots);
  const int64_t start = ((row * all->layers + number) * all->kv_heads + kv_head) * slots;
  const Head head = {group, width, slots, slots_of(asked + 1, slots), all->room};
  float *y = all->attended + (row * all->heads + kv_head * group) * width;
  if (all->attend_int8_cache != NULL) {
    all->attend_int8_cache(all, &head, start, slot, query, key, value, place->held, place->scores, y);
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
  const Matrix *matrix = &layer->wi;
  const Held held = normalised(all, layer->mlp_norm, place, fresh);
  multiply(&held, matrix->weight, matrix->scale, first, last, all->gates, 2 * hidden);
  multiply(&held, matrix->weight, matrix->scale, hidden + first, hidden + last, all->gates,
           2 * hidden);
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
    case REDUCE: add_products(all, &layer->wo, all->let, first, last, &place, fresh); break;
  }
}

#endif
