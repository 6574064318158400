/* Attention of one step over a cache: of one key-value head, and what XLA's calls have in common. */

#ifndef DIA2_JAX_ATTENTION_H_
#define DIA2_JAX_ATTENTION_H_

#include "shared.h"

/* One key-value head of a row: `group` queries of `width` numbers over the first `length` slots. */
typedef struct {
  int64_t group, width, slots, length;
  int64_t room; /* from one query's scores to the next one's */
} Head;

/* How many slots are attended to of what is asked for. */
INLINE int64_t slots_of(int64_t length, int64_t slots) {
  return length < 0 ? 0 : length > slots ? slots : length;
}

/* Which of `count` is meant, as lax.dynamic_slice and its like have it. */
INLINE int64_t one_of(int64_t asked, int64_t count) {
  if (asked < 0) asked += count;
  return asked < 0 ? 0 : asked >= count ? count - 1 : asked;
}

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

/* Turns scores into weights, each times the scale of its value if there are scales; returns the sum
 * of the weights alone. */
INLINE float soften(float *scores, const float *scale, int64_t length) {
  __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  for (int64_t s = 0; s < length; s += 16)
    most = _mm512_mask_max_ps(most, first_lanes(length - s), most, _mm512_loadu_ps(scores + s));
  const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t s = 0; s < length; s += 16) {
    const __mmask16 here = first_lanes(length - s);
    __m512 score = _mm512_maskz_loadu_ps(here, scores + s);
    __m512 weight = _mm512_maskz_mov_ps(here, exponential(_mm512_sub_ps(score, peak)));
    total = _mm512_add_ps(total, weight);
    if (scale != NULL) weight = _mm512_mul_ps(weight, _mm512_maskz_loadu_ps(here, scale + s));
    _mm512_mask_storeu_ps(scores + s, here, weight);
  }
  return _mm512_reduce_add_ps(total);
}

INLINE __m512 read_values(const void *values, int64_t index, __mmask16 here, const int int8) {
  if (!int8) return _mm512_maskz_loadu_ps(here, (const float *)values + index);
  const __m128i bytes = _mm_maskz_loadu_epi8(here, (const int8_t *)values + index);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

/* `count` queries' sums of values [length, H] by their weights, 64 of the width at a time. */
INLINE void average_some(const Head *head, const float *weights, const float *totals,
                         const void *values, float *y, const int int8, const int count) {
  for (int64_t h = 0; h < head->width; h += 64) {
    __mmask16 here[4];
    __m512 sums[16];
    UNROLL for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
    UNROLL for (int part = 0; part < 4; part++)
      here[part] = first_lanes(head->width - h - 16 * part);
    for (int64_t s = 0; s < head->length; s++)
      UNROLL for (int part = 0; part < 4; part++) {
        __m512 value = read_values(values, s * head->width + h + 16 * part, here[part], int8);
        UNROLL for (int g = 0; g < count; g++)
          sums[4 * g + part] = _mm512_fmadd_ps(_mm512_set1_ps(weights[g * head->room + s]), value,
                                               sums[4 * g + part]);
      }
    UNROLL for (int g = 0; g < count; g++)
      UNROLL for (int part = 0; part < 4; part++)
        _mm512_mask_storeu_ps(y + g * head->width + h + 16 * part, here[part],
                              _mm512_div_ps(sums[4 * g + part], _mm512_set1_ps(totals[g])));
  }
}

/* From the scores [G, room] of a head's queries to what they attend to, y [G, H]; values [S, H] are
 * float32, or int8 with a scale a slot if they are `int8`. The scores are used up. */
INLINE void average(const Head *head, float *scores, const void *values, const float *scale, float *y,
                    const int int8) {
  for (int64_t g = 0; g < head->group;) {
    const int count = head->group - g >= 4 ? 4 : head->group - g >= 2 ? 2 : 1;
    float totals[4], *weights = scores + g * head->room, *out = y + g * head->width;
    for (int i = 0; i < count; i++) totals[i] = soften(weights + i * head->room, scale, head->length);
    if (count == 4) average_some(head, weights, totals, values, out, int8, 4);
    if (count == 2) average_some(head, weights, totals, values, out, int8, 2);
    if (count == 1) average_some(head, weights, totals, values, out, int8, 1);
    g += count;
  }
}

/* Scores of `count` queries [H] with the first slots of float32 keys [H, S], 64 slots at a time. */
INLINE void score_some(const Head *head, const float *query, const float *keys, float *scores,
                       const int count) {
  for (int64_t s = 0; s < head->length; s += 64) {
    __m512 sums[16];
    __mmask16 here[4];
    UNROLL for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
    UNROLL for (int part = 0; part < 4; part++)
      here[part] = first_lanes(head->length - s - 16 * part);
    for (int64_t h = 0; h < head->width; h++) {
      const float *slots = keys + h * head->slots + s;
      UNROLL for (int part = 0; part < 4; part++) {
        __m512 key = _mm512_maskz_loadu_ps(here[part], slots + 16 * part);
        UNROLL for (int g = 0; g < count; g++)
          sums[4 * g + part] = _mm512_fmadd_ps(_mm512_set1_ps(query[g * head->width + h]), key,
                                               sums[4 * g + part]);
      }
    }
    UNROLL for (int g = 0; g < count; g++)
      UNROLL for (int part = 0; part < 4; part++)
        _mm512_storeu_ps(scores + g * head->room + s + 16 * part, sums[4 * g + part]);
  }
}

/* Queries [G, H], float32 keys [H, S] and values [S, H] -> y [G, H]; scores are [G, room]. */
static void attend_float32(const Head *head, const float *query, const float *keys,
                           const float *values, float *scores, float *y) {
  int64_t g = 0;
  for (; g + 4 <= head->group; g += 4)
    score_some(head, query + g * head->width, keys, scores + g * head->room, 4);
  if (g + 2 <= head->group) {
    score_some(head, query + g * head->width, keys, scores + g * head->room, 2);
    g += 2;
  }
  if (g < head->group) score_some(head, query + g * head->width, keys, scores + g * head->room, 1);
  average(head, scores, values, NULL, y, 0);
}

/* ---- A call of attention alone; its items are the key-value heads of all rows ---------------------- */

typedef struct {
  Work work;
  Step step;
  Head head;             /* of which the length is each row's own */
  int64_t layers, layer, heads;
  const int32_t *length; /* [B] */
  float *scores;         /* [B, K, G, room] */
  float *y;              /* [B, K, G, H] */
} Attention;

/* A head of an item, and where its slots begin, counted in slots. */
INLINE Head head_of(const Attention *all, int64_t item, int64_t *slot) {
  const int64_t row = item / all->heads;
  Head head = all->head;
  head.length = slots_of(all->length[row], head.slots);
  *slot = ((row * all->layers + all->layer) * all->heads + item % all->heads) * head.slots;
  return head;
}

/* Sizes, the layer and the lengths of a call; returns how many slots the longest row attends to. */
INLINE int64_t size_up(Attention *all, const XLA_FFI_Buffer *query, int64_t layers, int64_t slots,
                       const XLA_FFI_Buffer *layer, const XLA_FFI_Buffer *length) {
  all->layers = layers, all->heads = query->dims[1], all->length = length->data;
  all->layer = one_of(*(const int32_t *)layer->data, layers);
  int64_t longest = 0;
  for (int64_t row = 0; row < query->dims[0]; row++) {
    const int64_t own = slots_of(all->length[row], slots);
    if (own > longest) longest = own;
  }
  all->head = (Head){query->dims[2], query->dims[3], slots, longest, up(longest, 64)};
  return longest;
}

#endif
