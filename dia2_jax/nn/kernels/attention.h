/* Attention of one step over a cache, of keys and values of any type: what follows the scores. */

#ifndef DIA2_JAX_ATTENTION_H_
#define DIA2_JAX_ATTENTION_H_

#include <math.h>

#include "shared.h"

/* Its items are the key-value heads of all rows. */
typedef struct {
  Work work;
  int64_t layers, layer, heads, group, slots, width;
  int64_t room;          /* from one query's scores to the next one's */
  const int32_t *length; /* [B] */
  float *scores;         /* [B, K, G, room] */
  float *y;              /* [B, K, G, H] */
} Attention;

/* Where the slots of an item begin, counted in slots. */
INLINE int64_t first_slot(const Attention *all, int64_t item) {
  const int64_t row = item / all->heads, head = item % all->heads;
  return ((row * all->layers + all->layer) * all->heads + head) * all->slots;
}

/* How many slots an item attends to. */
INLINE int64_t slots_of(const Attention *all, int64_t item) {
  const int64_t length = all->length[item / all->heads];
  return length < 0 ? 0 : length > all->slots ? all->slots : length;
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

INLINE __m512 read_values(const void *values, int64_t index, __mmask16 here, const int narrow) {
  if (!narrow) return _mm512_maskz_loadu_ps(here, (const float *)values + index);
  const __m128i bytes = _mm_maskz_loadu_epi8(here, (const int8_t *)values + index);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

/* `count` queries' sums of values [length, H] by their weights, 64 of the width at a time. */
INLINE void average_some(const Attention *all, const float *weights, const float *totals,
                         const void *values, int64_t length, float *y, const int narrow,
                         const int count) {
  for (int64_t h = 0; h < all->width; h += 64) {
    __mmask16 here[4];
    __m512 sums[16];
    UNROLL for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
    UNROLL for (int part = 0; part < 4; part++) here[part] = first_lanes(all->width - h - 16 * part);
    for (int64_t s = 0; s < length; s++)
      UNROLL for (int part = 0; part < 4; part++) {
        __m512 value = read_values(values, s * all->width + h + 16 * part, here[part], narrow);
        UNROLL for (int g = 0; g < count; g++)
          sums[4 * g + part] = _mm512_fmadd_ps(_mm512_set1_ps(weights[g * all->room + s]), value,
                                               sums[4 * g + part]);
      }
    UNROLL for (int g = 0; g < count; g++)
      UNROLL for (int part = 0; part < 4; part++)
        _mm512_mask_storeu_ps(y + g * all->width + h + 16 * part, here[part],
                              _mm512_div_ps(sums[4 * g + part], _mm512_set1_ps(totals[g])));
  }
}

/* From the scores of an item's queries to what they attend to. */
INLINE void finish_item(const Attention *all, int64_t item, const void *values, const float *scale,
                        const int narrow) {
  const int64_t length = slots_of(all, item);
  float *scores = all->scores + item * all->group * all->room;
  float *y = all->y + item * all->group * all->width;
  for (int64_t g = 0; g < all->group;) {
    const int count = all->group - g >= 4 ? 4 : all->group - g >= 2 ? 2 : 1;
    float totals[4], *weights = scores + g * all->room, *out = y + g * all->width;
    for (int i = 0; i < count; i++) totals[i] = soften(weights + i * all->room, scale, length);
    if (count == 4) average_some(all, weights, totals, values, length, out, narrow, 4);
    if (count == 2) average_some(all, weights, totals, values, length, out, narrow, 2);
    if (count == 1) average_some(all, weights, totals, values, length, out, narrow, 1);
    g += count;
  }
}

/* Sizes, the layer and the lengths of a call; returns how many slots the longest row attends to. */
INLINE int64_t size_up(Attention *all, const XLA_FFI_Buffer *query, int64_t layers, int64_t slots,
                       const XLA_FFI_Buffer *layer, const XLA_FFI_Buffer *length) {
  int64_t asked = *(const int32_t *)layer->data;
  if (asked < 0) asked += layers; /* as lax.dynamic_slice does, like the limits below */
  all->layers = layers, all->slots = slots, all->length = length->data;
  all->layer = asked < 0 ? 0 : asked >= layers ? layers - 1 : asked;
  all->heads = query->dims[1], all->group = query->dims[2], all->width = query->dims[3];
  int64_t longest = 0;
  for (int64_t item = 0; item < query->dims[0] * all->heads; item += all->heads)
    if (slots_of(all, item) > longest) longest = slots_of(all, item);
  all->room = up(longest, 64);
  return longest;
}

#endif
