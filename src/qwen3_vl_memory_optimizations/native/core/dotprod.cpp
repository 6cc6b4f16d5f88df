// 64-bit ARM with the dot product of bytes: Cortex-A55 and A76, Apple A13 and M1, and later.
#include "kernels.h"

#if defined(__aarch64__)
#define QM_BYTES
#include <arm_neon.h>
#include <stddef.h>

#include "lanes.h"

namespace {

struct V {
    static constexpr int LANES = 16, UNROLL = 2, TILE = 6, AHEAD = 1024, SHIFT = 0;
    struct Weights { int16x8_t low, high; };
    struct Sums { int32x4_t low, high; };

    static inline Sums zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
    static inline Weights load_weights(const int8_t *from) {
        const int8x16_t bytes = vld1q_s8(from);
        return {vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)};
    }
    static inline Weights load_integers(const int16_t *from) { return {vld1q_s16(from), vld1q_s16(from + 8)}; }
    static inline void codes(const uint8_t *codes, const uint8_t *numbers, const int8_t *tables, Weights (&to)[4]) {
        int16x8_t even[4], odd[4];
        for (int group = 0; group < 4; ++group) {
            const uint8x16_t both = vld1q_u8(codes + group % 2 * 16);
            const uint8x16_t each = group / 2 ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15));
            const int16x8_t bytes = vreinterpretq_s16_s8(vqtbl1q_s8(vld1q_s8(tables + 16 * int64_t(numbers[group])), each));
            even[group] = vshrq_n_s16(vshlq_n_s16(bytes, 8), 8);
            odd[group] = vshrq_n_s16(bytes, 8);
        }
        to[0] = {even[0], even[1]}, to[1] = {even[2], even[3]}, to[2] = {odd[0], odd[1]}, to[3] = {odd[2], odd[3]};
    }
    static inline Weights repeat(const char *from) {
        int32_t four;
        __builtin_memcpy(&four, from, 4);
        const int16x8_t all = vreinterpretq_s16_s32(vdupq_n_s32(four));
        return {all, all};
    }
    static inline int32x4_t pairs(int32x4_t sums, int16x8_t a, int16x8_t b) {
        return vaddq_s32(sums, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
    }
    static inline Sums add_products(Sums sums, const Weights &a, const Weights &b) {
        return {pairs(sums.low, a.low, b.low), pairs(sums.high, a.high, b.high)};
    }
    static inline Sums add_bytes(Sums sums, const Weights &a, const Weights &b) {
        return {vdotq_s32(sums.low, vreinterpretq_s8_s16(a.low), vreinterpretq_s8_s16(b.low)),
                vdotq_s32(sums.high, vreinterpretq_s8_s16(a.high), vreinterpretq_s8_s16(b.high))};
    }
    static inline Sums add(Sums a, const Sums &b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
    static inline int32_t total(const Sums &sums) { return vaddvq_s32(vaddq_s32(sums.low, sums.high)); }
    static inline int32x4_t four_totals(const Sums &a, const Sums &b, const Sums &c, const Sums &d) {
        const int32x4_t ab = vpaddq_s32(vaddq_s32(a.low, a.high), vaddq_s32(b.low, b.high));
        return vpaddq_s32(ab, vpaddq_s32(vaddq_s32(c.low, c.high), vaddq_s32(d.low, d.high)));
    }
    static inline void totals(const Sums &a, const Sums &b, const Sums &c, const Sums &d, int32_t *to) {
        vst1q_s32(to, four_totals(a, b, c, d));
    }
    static inline Sums all_totals(const Sums (&sums)[8]) {
        return {four_totals(sums[0], sums[1], sums[2], sums[3]), four_totals(sums[4], sums[5], sums[6], sums[7])};
    }
    template <class T> static void now(T &) {}
    static inline Sums load(const int32_t *from) { return {vld1q_s32(from), vld1q_s32(from + 4)}; }
    static inline void store(int32_t *to, const Sums &sums) {
        vst1q_s32(to, sums.low);
        vst1q_s32(to + 4, sums.high);
    }
    template <int COLUMNS> static int64_t pack(const int8_t *w, int64_t columns, int64_t n, int64_t deep, int8_t *panel) {
        const int64_t lines = (deep + COLUMNS - 1) / COLUMNS;
        for (int64_t line = 0; line < lines; ++line)
            for (int64_t i = 0; i < LANES; ++i, panel += 4) {
                int8_t some[COLUMNS] = {0};
                const int64_t k = COLUMNS * line;
                if (i < n) __builtin_memcpy(some, w + i * columns + k, size_t(deep - k < COLUMNS ? deep - k : COLUMNS));
                int16_t wide[2] = {some[0], some[1]};
                __builtin_memcpy(panel, COLUMNS == 2 ? (const void *)wide : (const void *)some, 4);
            }
        return lines;
    }
    static inline F singles(const uint16_t *from) {
        float values[WIDE];
        for (int i = 0; i < WIDE; ++i) values[i] = single(from[i]);
        return read(values);
    }
    static inline uint16_t half(float value) {
        const __fp16 narrow = __fp16(value);
        uint16_t bits;
        __builtin_memcpy(&bits, &narrow, 2);
        return bits;
    }
    static inline float single(uint16_t bits) {
        __fp16 value;
        __builtin_memcpy(&value, &bits, 2);
        return float(value);
    }
    static inline float inverse_root(float n) { return 1.0f / __builtin_sqrtf(n); }
};

} // namespace

#include "products.inl"
#include "codes.inl"
#include "floats.inl"
#include "layer.inl"
#include "full_attention.inl"

extern const Kernels dotprod_kernels = {
    "dotprod", few_rows, many_rows, few_rows_of_codes, expand_codes, encode_row, encode_compensated, float_rows, PANEL, 16,
    &byte_products, quantize_row, rms_norm, rotate_head, silu_product, convert, add, attend, pack_tokens, attend_full};
#endif
