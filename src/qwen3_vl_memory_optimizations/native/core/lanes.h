// Sixteen floats or integers, in as many vectors as the instruction set needs: the same operations on the same lanes
// everywhere, and so the same bits.
#pragma once

#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int WIDE = 16;

// One vector of 64 bytes would do everywhere if the compiler kept it in registers; GCC keeps it in memory before AVX512. With
// AVX512 it copies two vectors of 32 bytes as one of 64, which then waits for both to reach memory.
#if defined(__AVX512F__)
#define QM_PARTS 1
#elif defined(__AVX2__)
#define QM_PARTS 2
#else
#define QM_PARTS 4
#endif
typedef float FloatPart __attribute__((vector_size(64 / QM_PARTS)));
typedef int32_t IntegerPart __attribute__((vector_size(64 / QM_PARTS)));
typedef int16_t ShortPart __attribute__((vector_size(32 / QM_PARTS)));

struct F {
    FloatPart part[QM_PARTS];
};

struct I {
    IntegerPart part[QM_PARTS];
};

#define QM_EACH for (int i = 0; i < QM_PARTS; ++i)

ALWAYS_INLINE F operator+(F a, F b) {
    QM_EACH a.part[i] += b.part[i];
    return a;
}
ALWAYS_INLINE F operator-(F a, F b) {
    QM_EACH a.part[i] -= b.part[i];
    return a;
}
ALWAYS_INLINE F operator*(F a, F b) {
    QM_EACH a.part[i] *= b.part[i];
    return a;
}
ALWAYS_INLINE F operator/(F a, F b) {
    QM_EACH a.part[i] /= b.part[i];
    return a;
}
ALWAYS_INLINE F operator+(F a, float b) {
    QM_EACH a.part[i] += b;
    return a;
}
ALWAYS_INLINE F operator*(F a, float b) {
    QM_EACH a.part[i] *= b;
    return a;
}

ALWAYS_INLINE F fill(float value) {
    F values;
    QM_EACH values.part[i] = value - FloatPart{};
    return values;
}

ALWAYS_INLINE F read(const float *from) {
    F values;
    QM_EACH memcpy(&values.part[i], from + i * (WIDE / QM_PARTS), sizeof values.part[i]);
    return values;
}

ALWAYS_INLINE F read_integers(const int32_t *from) {
    F values;
    QM_EACH {
        IntegerPart part;
        memcpy(&part, from + i * (WIDE / QM_PARTS), sizeof part);
        values.part[i] = __builtin_convertvector(part, FloatPart);
    }
    return values;
}

ALWAYS_INLINE void write(float *to, F values) {
    QM_EACH memcpy(to + i * (WIDE / QM_PARTS), &values.part[i], sizeof values.part[i]);
}

ALWAYS_INLINE float first_of(F values) { return values.part[0][0]; }

ALWAYS_INLINE I bits_of(F values) {
    I bits;
    QM_EACH bits.part[i] = (IntegerPart)values.part[i];
    return bits;
}

ALWAYS_INLINE F from_bits(I bits) {
    F values;
    QM_EACH values.part[i] = (FloatPart)bits.part[i];
    return values;
}

// Lanes of `a` where those of `mask` are set, of `b` elsewhere.
ALWAYS_INLINE F choose(I mask, F a, F b) {
    QM_EACH a.part[i] = (FloatPart)(((IntegerPart)a.part[i] & mask.part[i]) | ((IntegerPart)b.part[i] & ~mask.part[i]));
    return a;
}

ALWAYS_INLINE I operator<(F a, F b) {
    I mask;
    QM_EACH mask.part[i] = (IntegerPart)(a.part[i] < b.part[i]);
    return mask;
}

ALWAYS_INLINE I larger(I a, I b) {
    QM_EACH {
        const IntegerPart mask = (IntegerPart)(a.part[i] > b.part[i]);
        a.part[i] = (a.part[i] & mask) | (b.part[i] & ~mask);
    }
    return a;
}

ALWAYS_INLINE I sizes_of(F values) {
    I bits = bits_of(values);
    QM_EACH bits.part[i] &= 0x7fffffff;
    return bits;
}

// Round to the nearest integer, halves to even, by adding 1.5 * 2^23; values below 2^22.
ALWAYS_INLINE void write_rounded(int16_t *to, F values) {
    QM_EACH {
        const ShortPart rounded = __builtin_convertvector((IntegerPart)(values.part[i] + 12582912.0f) - 0x4b400000, ShortPart);
        memcpy(to + i * (WIDE / QM_PARTS), &rounded, sizeof rounded);
    }
}

// Each lane's partner is the lane whose number differs in one bit.
#if QM_PARTS == 1
#define QM_SHUFFLED(...) return F{{__builtin_shufflevector(x.part[0], x.part[0], __VA_ARGS__)}}
ALWAYS_INLINE F partner8(F x) { QM_SHUFFLED(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
ALWAYS_INLINE F partner4(F x) { QM_SHUFFLED(4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
ALWAYS_INLINE F partner2(F x) { QM_SHUFFLED(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }
ALWAYS_INLINE F partner1(F x) { QM_SHUFFLED(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }
ALWAYS_INLINE float sum(F x) {
    const FloatPart all = x.part[0];
    const auto of8 = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto of4 = __builtin_shufflevector(of8, of8, 0, 1, 2, 3) + __builtin_shufflevector(of8, of8, 4, 5, 6, 7);
    return (of4[0] + of4[2]) + (of4[1] + of4[3]);
}
#elif QM_PARTS == 2
ALWAYS_INLINE F partner8(F x) { return F{{x.part[1], x.part[0]}}; }
ALWAYS_INLINE F partner4(F x) {
    QM_EACH x.part[i] = __builtin_shufflevector(x.part[i], x.part[i], 4, 5, 6, 7, 0, 1, 2, 3);
    return x;
}
ALWAYS_INLINE F partner2(F x) {
    QM_EACH x.part[i] = __builtin_shufflevector(x.part[i], x.part[i], 2, 3, 0, 1, 6, 7, 4, 5);
    return x;
}
ALWAYS_INLINE F partner1(F x) {
    QM_EACH x.part[i] = __builtin_shufflevector(x.part[i], x.part[i], 1, 0, 3, 2, 5, 4, 7, 6);
    return x;
}
ALWAYS_INLINE float sum(F x) {
    const FloatPart of8 = x.part[0] + x.part[1];
    const auto of4 = __builtin_shufflevector(of8, of8, 0, 1, 2, 3) + __builtin_shufflevector(of8, of8, 4, 5, 6, 7);
    return (of4[0] + of4[2]) + (of4[1] + of4[3]);
}
#else
ALWAYS_INLINE F partner8(F x) { return F{{x.part[2], x.part[3], x.part[0], x.part[1]}}; }
ALWAYS_INLINE F partner4(F x) { return F{{x.part[1], x.part[0], x.part[3], x.part[2]}}; }
ALWAYS_INLINE F partner2(F x) {
    QM_EACH x.part[i] = __builtin_shufflevector(x.part[i], x.part[i], 2, 3, 0, 1);
    return x;
}
ALWAYS_INLINE F partner1(F x) {
    QM_EACH x.part[i] = __builtin_shufflevector(x.part[i], x.part[i], 1, 0, 3, 2);
    return x;
}
ALWAYS_INLINE float sum(F x) {
    const FloatPart of4 = (x.part[0] + x.part[2]) + (x.part[1] + x.part[3]);
    return (of4[0] + of4[2]) + (of4[1] + of4[3]);
}
#endif

} // namespace
