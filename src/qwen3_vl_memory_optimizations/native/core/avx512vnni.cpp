// AVX512 with VNNI: Intel servers since Cascade Lake, laptops since Ice Lake; AMD since Zen 4.
#include "kernels.h"

#if defined(__x86_64__)
#define QM_WIDER
#define QM_BYTES
#include "vectors_avx2.h"

namespace {

struct V {
    static constexpr int LANES = 32, UNROLL = 4, TILE = 12, AHEAD = 8192, SHIFT = 128;
    using Weights = __m512i;
    using Sums = __m512i;

    static inline Sums zero() { return _mm512_setzero_si512(); }
    static inline Weights load_weights(const int8_t *from) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
    }
    static inline Weights load_integers(const int16_t *from) { return _mm512_loadu_si512(from); }
    static inline void codes(const uint8_t *codes, const uint8_t *numbers, const int8_t *tables, Weights (&to)[2]) {
        const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)codes));
        const __m512i each = _mm512_srlv_epi64(both, _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0));
        const auto table = [&](int i) { return _mm_loadu_si128((const __m128i *)(tables + 16 * int64_t(numbers[i]))); };
        __m512i four = _mm512_inserti32x4(_mm512_castsi128_si512(table(0)), table(1), 1);
        four = _mm512_inserti32x4(_mm512_inserti32x4(four, table(2), 2), table(3), 3);
        const __m512i bytes = _mm512_shuffle_epi8(four, _mm512_and_si512(each, _mm512_set1_epi8(15)));
        to[0] = _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8);
        to[1] = _mm512_srai_epi16(bytes, 8);
    }
    static inline Weights repeat(const char *from) {
        int32_t four;
        __builtin_memcpy(&four, from, 4);
        return _mm512_set1_epi32(four);
    }
#ifdef QM_EMULATED
    static inline F singles(const uint16_t *from) { return AVX2::singles(from); }
    static inline Sums add_products(Sums sums, Weights a, Weights b) { return _mm512_dpwssd_epi32(sums, a, b); }
    static inline Sums add_bytes(Sums sums, Weights a, Weights b) { return _mm512_dpbusd_epi32(sums, a, b); }
    static inline void now(__m512i &) {}
#else
    static inline F singles(const uint16_t *from) {
        return F{{(FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from))}};
    }
    // As intrinsics, GCC 12 copies each sum before it adds to it.
    static inline Sums add_products(Sums sums, Weights a, Weights b) {
        __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), QM_OR_MEMORY("v")(b));
        return sums;
    }
    static inline Sums add_bytes(Sums sums, Weights a, Weights b) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), QM_OR_MEMORY("v")(b));
        return sums;
    }
    static inline void now(__m512i &values) { __asm__ volatile("" : "+v"(values)); }
#endif
    static inline Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
    static inline __m256i halves(Sums sums) {
        return _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    }
    static inline int32_t total(Sums sums) { return AVX2::total(halves(sums)); }
    static inline void totals(Sums a, Sums b, Sums c, Sums d, int32_t *to) {
        AVX2::totals(halves(a), halves(b), halves(c), halves(d), to);
    }
    // The totals of four sums in each quarter, and of neighbouring quarters of two such.
    static inline __m512i quarter_totals(const Sums *sums) {
        const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]), _mm512_unpackhi_epi32(sums[0], sums[1]));
        const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]), _mm512_unpackhi_epi32(sums[2], sums[3]));
        return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
    static inline __m512i neighbours(__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    }
    static inline Sums all_totals(const Sums (&sums)[16]) {
        return neighbours(neighbours(quarter_totals(sums), quarter_totals(sums + 4)),
                          neighbours(quarter_totals(sums + 8), quarter_totals(sums + 12)));
    }
    static inline Sums load(const int32_t *from) { return _mm512_load_si512(from); }
    static inline void store(int32_t *to, Sums sums) { _mm512_store_si512(to, sums); }
    template <int COLUMNS> static inline int64_t pack(const int8_t *w, int64_t columns, int64_t n, int64_t deep, int8_t *panel) {
        return AVX2::pack_panel<COLUMNS>(w, columns, n, deep, 32, panel);
    }
    static inline uint16_t half(float value) { return uint16_t(_cvtss_sh(value, 0)); }
    static inline float single(uint16_t bits) { return _cvtsh_ss(bits); }
    static inline float inverse_root(float n) { return 1.0f / __builtin_sqrtf(n); }
};

} // namespace

#include "products.inl"
#include "codes.inl"
#include "floats.inl"
#include "layer.inl"
#include "full_attention.inl"

extern const Kernels avx512vnni_kernels = {
    "avx512vnni", few_rows, many_rows, few_rows_of_codes, expand_codes, encode_row, encode_compensated, float_rows, PANEL, 16,
    &byte_products, quantize_row, rms_norm, rotate_head, silu_product, convert, add, attend, pack_tokens, attend_full};
#endif
