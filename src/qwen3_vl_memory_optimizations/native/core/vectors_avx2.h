#pragma once
#ifdef QM_EMULATED // the tests' build: AVX512 on any processor
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#else
#include <immintrin.h>
#endif

#include "lanes.h"

// An operand of an instruction that may be in memory. Clang would put all of them there.
#ifdef __clang__
#define QM_OR_MEMORY(registers) registers
#else
#define QM_OR_MEMORY(registers) registers "m"
#endif

namespace {

struct AVX2 {
    static inline int32_t total(__m256i sums) {
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
        return _mm_cvtsi128_si32(half);
    }

    // The totals of four sums in each half.
    static inline __m256i half_totals(__m256i a, __m256i b, __m256i c, __m256i d) {
        const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    }

    static inline void totals(__m256i a, __m256i b, __m256i c, __m256i d, int32_t *to) {
        const __m256i all = half_totals(a, b, c, d);
        const __m128i found = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
        _mm_storeu_si128((__m128i *)to, found);
    }

    static inline F singles(const uint16_t *from) {
        float values[WIDE];
        for (int i = 0; i < WIDE; i += 8)
            _mm256_storeu_ps(values + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
        return read(values);
    }

    // Four bytes of 8 rows of weights as 8 bytes if `COLUMNS` is 2 (two 16-bit integers), as they are if it is 4: 8 lines of 8
    // rows, `step` bytes apart.
    template <int COLUMNS> static inline void pack_block(const int8_t *w, int64_t columns, int8_t *to, int64_t step) {
        __m256i row[8], half[8];
        for (int i = 0; i < 8; ++i)
            row[i] = COLUMNS == 2 ? _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + i * columns)))
                                  : _mm256_loadu_si256((const __m256i *)(w + i * columns));
        for (int i = 0; i < 8; i += 2) {
            half[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
            half[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            row[i] = _mm256_unpacklo_epi64(half[i], half[i + 2]);
            row[i + 1] = _mm256_unpackhi_epi64(half[i], half[i + 2]);
            row[i + 2] = _mm256_unpacklo_epi64(half[i + 1], half[i + 3]);
            row[i + 3] = _mm256_unpackhi_epi64(half[i + 1], half[i + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            _mm256_store_si256((__m256i *)(to + i * step), _mm256_permute2x128_si256(row[i], row[i + 4], 0x20));
            _mm256_store_si256((__m256i *)(to + (i + 4) * step), _mm256_permute2x128_si256(row[i], row[i + 4], 0x31));
        }
    }

    // Write rows `w` [n, deep] as `panel` [lines, width, 4 bytes], rows and columns that are missing as zeros; return lines.
    template <int COLUMNS>
    static inline int64_t pack_panel(const int8_t *w, int64_t columns, int64_t n, int64_t deep, int64_t width,
                                     int8_t *panel) {
        constexpr int64_t DEPTH = 8 * COLUMNS;
        alignas(32) int8_t padded[8 * DEPTH];
        const int64_t steps = (deep + DEPTH - 1) / DEPTH;
        for (int64_t group = 0; group < width; group += 8) {
            const int64_t rows = n - group < 0 ? 0 : n - group < 8 ? n - group : 8;
            for (int64_t k = 0; k < deep; k += DEPTH) {
                const int64_t rest = deep - k < DEPTH ? deep - k : DEPTH;
                int8_t *to = panel + (k / COLUMNS * width + group) * 4;
                if (rows == 8 && rest == DEPTH) {
                    pack_block<COLUMNS>(w + group * columns + k, columns, to, 4 * width);
                    continue;
                }
                __builtin_memset(padded, 0, sizeof padded);
                for (int64_t i = 0; i < rows; ++i)
                    __builtin_memcpy(padded + DEPTH * i, w + (group + i) * columns + k, size_t(rest));
                pack_block<COLUMNS>(padded, DEPTH, to, 4 * width);
            }
        }
        return 8 * steps;
    }
};

#ifndef QM_WIDER
struct V {
    static constexpr int LANES = 16, UNROLL = 4, TILE = 6, AHEAD = 1024, SHIFT = 128;
    using Weights = __m256i;
    using Sums = __m256i;

    static inline Sums zero() { return _mm256_setzero_si256(); }
    static inline Weights load_weights(const int8_t *from) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
    }
    static inline Weights load_integers(const int16_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
    static inline void codes(const uint8_t *codes, const uint8_t *numbers, const int8_t *tables, Weights (&to)[4]) {
        const __m256i all = _mm256_loadu_si256((const __m256i *)codes), low = _mm256_set1_epi8(15);
        const __m256i each[2] = {_mm256_and_si256(all, low), _mm256_and_si256(_mm256_srli_epi16(all, 4), low)};
        for (int half = 0; half < 2; ++half) {
            const __m128i first = _mm_loadu_si128((const __m128i *)(tables + 16 * int64_t(numbers[2 * half])));
            const __m128i second = _mm_loadu_si128((const __m128i *)(tables + 16 * int64_t(numbers[2 * half + 1])));
            const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
            const __m256i bytes = _mm256_shuffle_epi8(both, each[half]);
            to[half] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
            to[half + 2] = _mm256_srai_epi16(bytes, 8);
        }
    }
    static inline Weights repeat(const char *from) {
        int32_t four;
        __builtin_memcpy(&four, from, 4);
        return _mm256_set1_epi32(four);
    }
#ifdef QM_BYTES
    static inline Sums add_products(Sums sums, Weights a, Weights b) {
        __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(a), QM_OR_MEMORY("x")(b));
        return sums;
    }
    static inline Sums add_bytes(Sums sums, Weights a, Weights b) {
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(a), QM_OR_MEMORY("x")(b));
        return sums;
    }
#else
    static inline Sums add_products(Sums sums, Weights a, Weights b) {
#ifdef QM_EMULATED
        return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#else // as intrinsics, GCC 12 copies sums between registers
        __m256i products;
        __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(a), QM_OR_MEMORY("x")(b));
        return sums;
#endif
    }
#endif
    static inline Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
    static inline int32_t total(Sums sums) { return AVX2::total(sums); }
    static inline void totals(Sums a, Sums b, Sums c, Sums d, int32_t *to) { AVX2::totals(a, b, c, d, to); }
    static inline Sums all_totals(const Sums (&sums)[8]) {
        const __m256i a = AVX2::half_totals(sums[0], sums[1], sums[2], sums[3]);
        const __m256i b = AVX2::half_totals(sums[4], sums[5], sums[6], sums[7]);
        return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    }
    static inline void now(__m256i &values) { __asm__ volatile("" : "+x"(values)); }
    static inline Sums load(const int32_t *from) { return _mm256_load_si256((const __m256i *)from); }
    static inline void store(int32_t *to, Sums sums) { _mm256_store_si256((__m256i *)to, sums); }
    template <int COLUMNS> static inline int64_t pack(const int8_t *w, int64_t columns, int64_t n, int64_t deep, int8_t *panel) {
        return AVX2::pack_panel<COLUMNS>(w, columns, n, deep, 16, panel);
    }
    static inline uint16_t half(float value) { return uint16_t(_cvtss_sh(value, 0)); }
    static inline F singles(const uint16_t *from) { return AVX2::singles(from); }
    static inline float single(uint16_t bits) { return _cvtsh_ss(bits); }
    static inline float inverse_root(float n) { return 1.0f / __builtin_sqrtf(n); }
};
#endif

} // namespace
