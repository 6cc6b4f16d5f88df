// Any processor: plain C++, which compilers turn into the vectors that they may assume (NEON on 64-bit ARM).
#include "kernels.h"
#include "lanes.h"

namespace {

struct V {
    static constexpr int LANES = 16, UNROLL = 1, TILE = 4, AHEAD = 512;
    struct Weights { int16_t at[LANES]; };
    struct Sums { int32_t at[LANES / 2]; };

    static Sums zero() { return Sums{}; }
    static Weights load_weights(const int8_t *from) {
        Weights values;
        for (int i = 0; i < LANES; ++i) values.at[i] = from[i];
        return values;
    }
    static Weights load_integers(const int16_t *from) {
        Weights values;
        for (int i = 0; i < LANES; ++i) values.at[i] = from[i];
        return values;
    }
    static void codes(const uint8_t *codes, const uint8_t *numbers, const int8_t *tables, Weights (&to)[4]) {
        for (int column = 0; column < 64; ++column) {
            const int group = column % 32 / 8, code = codes[group % 2 * 16 + column % 8 * 2 + column / 32] >> group / 2 * 4 & 15;
            to[column / LANES].at[column % LANES] = tables[numbers[group] * 16 + code];
        }
    }
    static Weights repeat(const char *from) {
        int16_t pair[2]; // copied: GCC 12 vectorises direct reads so that it reads past the last pair
        __builtin_memcpy(pair, from, sizeof pair);
        Weights values;
        for (int i = 0; i < LANES; ++i) values.at[i] = pair[i % 2];
        return values;
    }
    static Sums add_products(Sums sums, const Weights &a, const Weights &b) {
        for (int i = 0; i < LANES / 2; ++i)
            sums.at[i] += int32_t(a.at[2 * i]) * b.at[2 * i] + int32_t(a.at[2 * i + 1]) * b.at[2 * i + 1];
        return sums;
    }
    static Sums add(Sums a, const Sums &b) {
        for (int i = 0; i < LANES / 2; ++i) a.at[i] += b.at[i];
        return a;
    }
    static int32_t total(const Sums &sums) {
        int32_t total = 0;
        for (int i = 0; i < LANES / 2; ++i) total += sums.at[i];
        return total;
    }
    static void totals(const Sums &a, const Sums &b, const Sums &c, const Sums &d, int32_t *to) {
        to[0] = total(a), to[1] = total(b), to[2] = total(c), to[3] = total(d);
    }
    static Sums all_totals(const Sums (&sums)[LANES / 2]) {
        Sums found;
        for (int i = 0; i < LANES / 2; ++i) found.at[i] = total(sums[i]);
        return found;
    }
    template <class T> static void now(T &) {}
    static Sums load(const int32_t *from) {
        Sums sums;
        for (int i = 0; i < LANES / 2; ++i) sums.at[i] = from[i];
        return sums;
    }
    static void store(int32_t *to, const Sums &sums) {
        for (int i = 0; i < LANES / 2; ++i) to[i] = sums.at[i];
    }
    // Write rows `w` [n, deep] as `panel` [lines, LANES, COLUMNS], rows and columns that are missing as zeros; return lines.
    template <int COLUMNS> static int64_t pack(const int8_t *w, int64_t columns, int64_t n, int64_t deep, int8_t *panel) {
        const int64_t lines = (deep + 1) / 2;
        int16_t *to = (int16_t *)panel;
        for (int64_t line = 0; line < lines; ++line)
            for (int i = 0; i < LANES; ++i)
                for (int odd = 0; odd < COLUMNS; ++odd) {
                    const int64_t k = 2 * line + odd;
                    *to++ = i < n && k < deep ? w[i * columns + k] : 0;
                }
        return lines;
    }
    static F singles(const uint16_t *from) {
        float values[WIDE];
        for (int i = 0; i < WIDE; ++i) values[i] = single(from[i]);
        return read(values);
    }
    static uint16_t half(float value) {
        uint32_t bits;
        __builtin_memcpy(&bits, &value, 4);
        const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
        const uint32_t size = bits & 0x7fffffff;
        if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
        if (size >= 0x477ff000) return uint16_t(sign | 0x7c00); // rounds to 65,536 or more
        if (size >= 0x38800000) return uint16_t(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
        if (size < 0x33000000) return sign; // below half of the smallest
        const uint32_t shift = 126 - (size >> 23), significand = (size & 0x7fffff) | 0x800000;
        const uint32_t whole = significand >> shift, rest = significand & ((1u << shift) - 1), middle = 1u << (shift - 1);
        return uint16_t(sign | (whole + (rest > middle || (rest == middle && (whole & 1)))));
    }
    static float single(uint16_t bits) {
        const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
        float value;
        if (exponent == 0) {
            value = float(fraction) * 5.9604645e-8f; // 2^-24
            return sign ? -value : value;
        }
        const uint32_t wide = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13;
        __builtin_memcpy(&value, &wide, 4);
        return value;
    }
    static float inverse_root(float n) { return 1.0f / __builtin_sqrtf(n); }
};

} // namespace

#include "products.inl"
#include "codes.inl"
#include "floats.inl"
#include "layer.inl"
#include "full_attention.inl"

extern const Kernels portable_kernels = {
    "portable", few_rows, many_rows, few_rows_of_codes, expand_codes, encode_row, encode_compensated, float_rows, PANEL, 16,
    nullptr, quantize_row, rms_norm, rotate_head, silu_product, convert, add, attend, pack_tokens, attend_full};
