// The native core: products on encoded rows. A plain C ABI, without headers of torch or Python, so one library serves
// every version of both. All pointers are to memory of the caller; nothing is kept after a call.
//
// Arithmetic. Activations are rounded to 14-bit or 8-bit integers with one scale per row, weights are 8-bit integers with
// one scale per row. 1,024 columns are summed exactly in 32-bit integers, such sums are added in fp32 in the order of
// columns, and no operation is contracted. So a result depends on nothing but its row of activations and its row of
// weights: not on the instruction set, the number of threads, the other rows, or how a weight is cut into ranges.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QM_EXPORT __attribute__((visibility("default")))
#define QM_ABI 4
#define QM_LEVELS 16383          // largest integer of an activation: 1,024 * 16,383 * 127 < 2^31
#define QM_BYTE_LEVELS 127       // the same with 8 bits
#define QM_MOST_CREST 16         // largest value of a row with 8 bits, in units of its root mean square
#define QM_SUMMED_COLUMNS 1024   // columns per exact sum
#define QM_COLUMN_MULTIPLE 32    // rows of integer activations are padded with zeros to this multiple
#define QM_LARGEST_ROTATION 4096

enum qm_dtype { QM_FP32 = 0, QM_BF16 = 1, QM_FP16 = 2 };

QM_EXPORT int qm_abi(void);

// Choose the kernels: the best this processor has, at most `limit` (NULL or "": no limit). In this order: "portable", then on
// x86 "avx2", "avxvnni", "avx512vnni", "amx", on ARM "dotprod". Returns the name of the set, or NULL if `limit` is unknown.
QM_EXPORT const char *qm_select(const char *limit);

// Whether the kernels in use multiply activations of 8 bits faster than those of 14.
QM_EXPORT int qm_multiplies_bytes(void);

// `n_threads` below: threads to use, the calling one among them. Workers start at first use.

// Write activations `x` [rows, columns] as integers [rows, padded] and the scale of each row [rows].
// If `signs` [block] is given, rows are first rotated in blocks of `block` columns (a power of two that divides
// `columns`): each value times its sign, then a Hadamard transform over sqrt(block).
// With `bytes` rows take 8 bits, except those whose largest value is more than QM_MOST_CREST times the root mean square.
// A row with a NaN or an infinite value gets the scale NaN: all its products are NaN.
// Returns whether all integers fit 8 bits.
QM_EXPORT int qm_quantize(const void *x, int dtype, int64_t rows, int64_t columns, int64_t x_stride, const float *signs,
                 int64_t block, int bytes, int16_t *integers, float *scale, int n_threads);

enum qm_format { QM_INT8_ROWS = 0, QM_INT4_ROWS = 1, QM_BF16_ROWS = 2, QM_FP16_ROWS = 3 };

// Rows [rows, columns] of a format. QM_INT4_ROWS: for each 16 of the columns, a multiple of 64, the number of one of `tables`
// [256, 16], then codes of 4 bits that name the table's bytes (see `codes.inl`).
struct qm_weight {
    const void *data;
    const float *scale; // of each row; of 16-bit rows it may be NULL: 1
    const float *signs; // NULL: not rotated
    int64_t block, rows, columns;
    const int8_t *tables;
    int64_t format;
};

// out [rows, rows of the weight] = (integers @ weight.T) * scale * the weight's scale; strides in elements. `bytes`: all
// integers fit 8 bits. For INT8 and 4-bit rows.
QM_EXPORT void qm_linear(const int16_t *integers, const float *scale, int64_t rows, const struct qm_weight *weight, void *out,
                    int dtype, int64_t out_stride, int bytes, int n_threads);

// The same with activations x [rows, columns] in fp32, for 16-bit rows; made for few rows of activations.
QM_EXPORT void qm_float_linear(const float *x, int64_t rows, const struct qm_weight *weight, void *out, int dtype, int64_t out_stride,
                          int n_threads);

// --- 4-bit rows

#define QM_TABLES 256
#define QM_MOST_ENCODED 254 // size of a value to encode, in halves of the tables' unit

struct qm_encoding {
    const int16_t *values; // [rows, columns], sizes of QM_MOST_ENCODED at most
    int64_t rows, columns; // a multiple of 64
    const int8_t *tables;  // [QM_TABLES, 16]
    const uint16_t *errors; // [values, QM_TABLES]: of each value from -QM_MOST_ENCODED on with each table; 4,095 at most
    const uint8_t *nearest; // [QM_TABLES, values]: the code
    uint8_t *data;          // [rows, columns / 16 + columns / 2]
    int64_t *products;      // [rows, 2]: of the values and the integers that stand for them; of these with themselves
};

// For each 16 values, in the groups of `codes.inl`, take the table with the least sum of errors, the first of several.
QM_EXPORT void qm_encode(const struct qm_encoding *encoding, int n_threads);

// 64 columns of rows to encode so that later columns make up for the errors of earlier ones. Columns are in the order of
// groups (see `codes.inl`): 16 of the first, 16 of the second, ...
struct qm_compensation {
    float *targets;         // [rows, 64], in the tables' unit; replaced by what the chosen integers lack
    int64_t stride;         // elements between rows of `targets`
    const float *fed_back;  // [rows, 64]: what errors of columns before these add
    int64_t rows;
    const float *feedback;  // [64, 64]: of column i to column j > i, the share of its error that is added
    const float *importance; // [64]: of a squared error
    const int8_t *tables;   // these three as above
    const uint16_t *errors;
    const uint8_t *nearest;
    uint8_t *numbers, *codes; // where those of the 64 columns begin in the first row
    int64_t row_bytes;
};

// Of the tables with the least sums of errors, take the one that leaves the least weighed errors after feedback.
QM_EXPORT void qm_encode_compensated(const struct qm_compensation *encoding, int n_threads);

// --- a decoder layer, for few rows

// What comes before attention: norm, products for query, key and value, norm and rotation of heads. Keys and values go
// where the cache wants them.
struct qm_layer_start {
    const void *hidden; // [sequences * length, columns]
    int64_t dtype, sequences, length, columns;
    const float *norm; // [columns]
    struct qm_weight weight; // rows of query, key and value heads
    int64_t query_heads, key_heads, head_size;
    const float *query_norm, *key_norm; // [head_size]
    const float *cosine, *sine; // [sequences * length, head_size]
    float norm_epsilon, head_epsilon;
    float *query; // [sequences, length, query_heads, head_size]
    void *keys, *values; // [sequences, key_heads, tokens, head_size], at the first new token
    int64_t cache_dtype, sequence_stride, head_stride; // in elements
    void *work; // qm_start_layer_bytes
};

// Attention of few rows of each sequence to blocks of encoded keys and values and to the newest tokens, of which the
// rows are the last. Rows see themselves and what is before them.
struct qm_attention {
    const float *query; // [sequences, length, query_heads, head_size]
    int64_t sequences, length, query_heads, key_heads, head_size;
    float scale;
    int64_t n_blocks, block_tokens;
    // Per block: int8 keys [key_heads, tokens, head_size] and values [key_heads, head_size, tokens], bf16 scales
    // [key_heads, tokens]; blocks of the first sequence first.
    const int8_t *const *block_keys, *const *block_values;
    const uint16_t *const *key_scales, *const *value_scales;
    const void *keys, *values; // [sequences, key_heads, tokens, head_size]
    int64_t cache_dtype, sequence_stride, head_stride, tokens;
    float *out; // [sequences, length, query_heads, head_size]
};

// What comes after attention: its product, residual, norm, the MLP, residual.
struct qm_layer_end {
    const float *attended; // [rows, columns of `attention`]
    struct qm_weight attention, gate_up, down;
    const float *norm; // [columns]
    float norm_epsilon;
    int64_t rows, columns, dtype;
    const void *hidden; // [rows, columns]
    void *out; // [rows, columns]
    void *work; // qm_end_layer_bytes
};

struct qm_layer {
    struct qm_layer_start start;
    struct qm_attention attention;
    struct qm_layer_end end;
};

// Run whole layers, one after the other.
QM_EXPORT void qm_run_layers(const struct qm_layer *layers, int64_t n_layers, int n_threads);

// The steps of one, and the memory they work in.
QM_EXPORT int64_t qm_start_layer_bytes(const struct qm_layer_start *layer);
QM_EXPORT void qm_start_layer(const struct qm_layer_start *layer, int n_threads);
QM_EXPORT void qm_attend(const struct qm_attention *attention, int n_threads);
QM_EXPORT int64_t qm_end_layer_bytes(const struct qm_layer_end *layer);
QM_EXPORT void qm_end_layer(const struct qm_layer_end *layer, int n_threads);

// --- attention of all tokens to all

// Tokens lie `token_stride` elements apart, heads `head_size`, in query, keys and values alike; an even head size of 128 at
// most.
struct qm_full_attention {
    const void *query, *keys, *values; // [tokens, heads, head_size]
    int64_t dtype, tokens, heads, head_size, token_stride;
    float scale;
    void *out; // [tokens, heads, head_size]
    int64_t out_stride;
    void *work; // qm_full_attention_bytes
};

QM_EXPORT int64_t qm_full_attention_bytes(const struct qm_full_attention *attention);
QM_EXPORT void qm_attend_all(const struct qm_full_attention *attention, int n_threads);

#ifdef __cplusplus
}
#endif
