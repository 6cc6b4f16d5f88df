// One set of kernels per instruction set. Each is compiled in a file of its own, with the flags of that set.
#pragma once

#include "core.h"

struct Linear {
    const int16_t *x;
    const float *x_scale;
    int64_t rows, columns, x_stride;
    const int8_t *weights;
    const float *weight_scale;
    int64_t n;
    void *out;
    int dtype;
    int64_t out_stride;
    bool bytes;                     // all of `x` fits 8 bits
    const int8_t *tables = nullptr; // of 4-bit rows; NULL: INT8

    int64_t row_bytes() const { return tables ? columns / 16 + columns / 2 : columns; }
};

struct FloatLinear {
    const float *x; // [rows, columns]
    int64_t rows, columns;
    const uint16_t *weights;
    const float *weight_scale; // NULL: 1
    bool is_bf16;
    int64_t n;
    void *out;
    int dtype;
    int64_t out_stride;
};

// Products of activations that are rearranged first, some rows at a time, in memory of the caller. The bits are those of
// the others.
struct Rearranged {
    int64_t (*needed_bytes)(int64_t rows, int64_t columns, bool bytes);
    int64_t (*n_units)(int64_t rows, bool bytes);
    void (*rearrange)(const Linear &, int64_t unit, int8_t *to);
    // Columns `first` to `stop` of the result, AT_MOST_COLUMNS; `first` is a multiple of COLUMNS_TOGETHER.
    void (*product)(const Linear &, int8_t *rearranged, int64_t first, int64_t stop);
};
constexpr int64_t AT_MOST_ROWS = 256, COLUMNS_TOGETHER = 32, AT_MOST_COLUMNS = 128;

// Keys and values of some tokens of one head, as `pack_tokens` arranges them.
constexpr int64_t FULL_TILE = 256, FULL_ROWS = 24;
struct FullTile {
    int16_t *keys, *values;
    float *key_units, *value_units;
};
inline int64_t full_features(int64_t head_size) { return (head_size + 31) / 32 * 32; }

struct Kernels {
    const char *name;
    // Compute columns `first` to `stop` of the result.
    void (*few_rows)(const Linear &, int64_t first, int64_t stop);
    void (*many_rows)(const Linear &, int64_t first, int64_t stop);
    // The same with 4-bit rows, and these as INT8 rows `first` to `stop`.
    void (*few_rows_of_codes)(const Linear &, int64_t first, int64_t stop);
    void (*expand_codes)(const Linear &, int64_t first, int64_t stop, int8_t *to);
    void (*encode_row)(const qm_encoding &, int64_t row);
    void (*encode_compensated)(const qm_compensation &, int64_t row);
    // Compute columns `first` to `stop` of the result.
    void (*float_rows)(const FloatLinear &, int64_t first, int64_t stop);
    int64_t panel;      // columns of the result that `many_rows` computes together
    int64_t least_rows; // from here on `many_rows` is faster
    const Rearranged *bytes; // for many rows of 8-bit activations; NULL: `many_rows` is as fast
    // Returns whether all integers fit 8 bits.
    bool (*quantize_row)(const void *x, int dtype, int64_t columns, const float *signs, int64_t block, bool bytes,
                         float *work, int16_t *integers, float *scale);
    // out = x / root of its mean square * weight, in fp32
    void (*rms_norm)(const void *x, int dtype, int64_t columns, const float *weight, float epsilon, float *out);
    // Norm and rotation of one head: x in place.
    void (*rotate_head)(float *x, int64_t size, const float *weight, float epsilon, const float *cosine,
                        const float *sine);
    void (*silu_product)(const float *gate, const float *up, int64_t columns, float *out);
    void (*convert)(const float *from, int64_t n, void *to, int dtype);
    // out = a + b, where `a` has a dtype and `out` another
    void (*add)(const void *a, int a_dtype, const float *b, int64_t n, void *out, int out_dtype);
    // Attention of the rows of one key head of one sequence.
    void (*attend)(const qm_attention &, int64_t sequence, int64_t head);
    // Attention of all tokens to all: FULL_TILE tokens of a head are packed; FULL_ROWS rows attend to them.
    void (*pack_tokens)(const qm_full_attention &, const FullTile &to, int64_t head, int64_t first);
    void (*attend_full)(const qm_full_attention &, const FullTile *, int64_t head, int64_t first);
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avxvnni_kernels;
extern const Kernels avx512vnni_kernels;
extern const Kernels dotprod_kernels;
extern const Rearranged amx_products;
