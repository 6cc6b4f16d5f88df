// The kernels, written once over a vector type V that each instruction set defines before it includes this file:
//   Weights  LANES 16-bit integers                    Sums  LANES / 2 32-bit integers
//   load_weights(int8_t *)  load_integers(int16_t *)  repeat(char *): four bytes again and again
//   zero()  add_products(sums, a, b): sums + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]  total(sums)  totals of four sums
//   all_totals(Sums[LANES / 2]): the total of each
//   now(values): computed here, not later or earlier
//   store(int32_t *, sums)  load(int32_t *)  pack(...): see `portable.cpp`
// and, with QM_BYTES, add_bytes(sums, a, b): sums + the products of four bytes of `a`, which were increased by SHIFT (128: they
// have no sign), and `b`.
// Everything is in an unnamed namespace: code of two instruction sets must not be merged by the linker.

#include "lanes.h"

namespace {

constexpr int64_t SUMMED = QM_SUMMED_COLUMNS;
constexpr int64_t SHORT = 512;

ALWAYS_INLINE void put(void *out, int dtype, int64_t at, float value) {
    if (dtype == QM_FP32) {
        ((float *)out)[at] = value;
    } else if (dtype == QM_BF16) {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        ((uint16_t *)out)[at] = value != value ? 0x7fc0 : uint16_t(rounded);
    } else {
        ((uint16_t *)out)[at] = V::half(value);
    }
}

ALWAYS_INLINE float get(const void *x, int dtype, int64_t at) {
    if (dtype == QM_FP32) return ((const float *)x)[at];
    const uint16_t bits = ((const uint16_t *)x)[at];
    if (dtype == QM_FP16) return V::single(bits);
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// Sum the products of WEIGHTS rows of the weight and ROWS rows of integers over some columns. UNROLL independent sums
// per pair hide the latency of `add_products`.
template <int WEIGHTS, int ROWS, int UNROLL>
ALWAYS_INLINE void dots(const int16_t *x, int64_t x_stride, const int8_t *w, int64_t columns, int64_t stop,
                        int32_t (&sums)[WEIGHTS][ROWS]) {
    typename V::Sums total[WEIGHTS][ROWS][UNROLL];
    for (int i = 0; i < WEIGHTS; ++i)
        for (int j = 0; j < ROWS; ++j)
            for (int u = 0; u < UNROLL; ++u) total[i][j][u] = V::zero();
    int64_t k = 0;
    for (; k + V::LANES * UNROLL <= stop; k += V::LANES * UNROLL) {
        for (int u = 0; u < UNROLL; ++u) {
            typename V::Weights values[WEIGHTS];
            for (int i = 0; i < WEIGHTS; ++i) {
                const int8_t *at = w + i * columns + k + u * V::LANES;
                __builtin_prefetch(at + (ROWS == 1 ? V::AHEAD : WEIGHTS * columns));
                values[i] = V::load_weights(at);
            }
            for (int j = 0; j < ROWS; ++j) {
                const typename V::Weights row = V::load_integers(x + j * x_stride + k + u * V::LANES);
                for (int i = 0; i < WEIGHTS; ++i) total[i][j][u] = V::add_products(total[i][j][u], values[i], row);
            }
        }
    }
    for (; k < stop; k += V::LANES) {
        const int64_t rest = stop - k < V::LANES ? stop - k : V::LANES;
        for (int i = 0; i < WEIGHTS; ++i) {
            int8_t padded[V::LANES] = {0};
            memcpy(padded, w + i * columns + k, size_t(rest));
            const typename V::Weights values = V::load_weights(padded);
            for (int j = 0; j < ROWS; ++j)
                total[i][j][0] = V::add_products(total[i][j][0], values, V::load_integers(x + j * x_stride + k));
        }
    }
    for (int i = 0; i < WEIGHTS; ++i)
        for (int j = 0; j < ROWS; ++j)
            for (int u = 1; u < UNROLL; ++u) total[i][j][0] = V::add(total[i][j][0], total[i][j][u]);
    if constexpr (WEIGHTS == 4) {
        for (int j = 0; j < ROWS; ++j) {
            int32_t found[4];
            V::totals(total[0][j][0], total[1][j][0], total[2][j][0], total[3][j][0], found);
            for (int i = 0; i < 4; ++i) sums[i][j] = found[i];
        }
    } else {
        for (int i = 0; i < WEIGHTS; ++i)
            for (int j = 0; j < ROWS; ++j) sums[i][j] = V::total(total[i][j][0]);
    }
}

template <int WEIGHTS, int ROWS, int UNROLL>
ALWAYS_INLINE void some_outputs(const Linear &product, int64_t row, int64_t column) {
    float totals[WEIGHTS][ROWS] = {};
    for (int64_t k = 0; k < product.columns; k += SUMMED) {
        const int64_t stop = product.columns - k < SUMMED ? product.columns - k : SUMMED;
        int32_t sums[WEIGHTS][ROWS];
        dots<WEIGHTS, ROWS, UNROLL>(product.x + row * product.x_stride + k, product.x_stride,
                                    product.weights + column * product.columns + k, product.columns, stop, sums);
        for (int i = 0; i < WEIGHTS; ++i)
            for (int j = 0; j < ROWS; ++j) totals[i][j] += float(sums[i][j]);
    }
    for (int i = 0; i < WEIGHTS; ++i)
        for (int j = 0; j < ROWS; ++j)
            put(product.out, product.dtype, (row + j) * product.out_stride + column + i,
                totals[i][j] * (product.x_scale[row + j] * product.weight_scale[column + i]));
}

// Rows of weights at power-of-two distances compete for the same places of the cache, so a single row of activations
// meets one row of weights at a time: 18 instead of 11 GB/s for 2,048 columns. Several rows meet two at a time, with the
// next two on their way: 4 rows take 1.2 to 1.6 times as long as one (AMD EPYC, AVX2), and 1.5 to 2.1 without.
template <int WEIGHTS>
ALWAYS_INLINE void all_rows(const Linear &product, int64_t column) {
    int64_t row = 0;
    for (; row + 4 <= product.rows; row += 4) some_outputs<WEIGHTS, 4, 1>(product, row, column);
    switch (product.rows - row) {
    case 3: return some_outputs<WEIGHTS, 3, 1>(product, row, column);
    case 2: return some_outputs<WEIGHTS, 2, 1>(product, row, column);
    case 1: return some_outputs<WEIGHTS, 1, WEIGHTS == 1 ? V::UNROLL : 1>(product, row, column);
    }
}

void few_rows(const Linear &product, int64_t first, int64_t stop) {
    int64_t column = first;
    if (product.columns <= SHORT) // keys and values: most of the time would go into adding up the lanes of each sum
        for (; column + 4 <= stop; column += 4) all_rows<4>(product, column);
    if (product.rows > 1)
        for (; column + 2 <= stop; column += 2) all_rows<2>(product, column);
    for (; column < stop; ++column) all_rows<1>(product, column);
}

// --- many rows: weights are packed in panels of PANEL rows, some columns side by side, and stay in the cache

constexpr int SUMS = V::LANES / 2;
constexpr int PANEL = 2 * SUMS;
constexpr int DEEP = 512; // columns per panel
constexpr int64_t TALL = AT_MOST_ROWS;
constexpr int LINE = 4 * PANEL; // bytes of a panel's line: one sum's share of each row

// Pairs of 16-bit integers.
struct Words {
    using X = int16_t;
    static constexpr int COLUMNS = 2; // per line
    static constexpr bool SHIFTED = false;
    ALWAYS_INLINE typename V::Sums add(typename V::Sums sums, typename V::Weights x, typename V::Weights w) {
        return V::add_products(sums, w, x);
    }
};

#ifdef QM_BYTES
// Fours of bytes. V::SHIFT is added to activations: 128 where the processor takes one operand without sign.
struct Bytes {
    using X = uint8_t;
    static constexpr int COLUMNS = 4;
    static constexpr bool SHIFTED = V::SHIFT != 0;
    ALWAYS_INLINE typename V::Sums add(typename V::Sums sums, typename V::Weights x, typename V::Weights w) {
        return V::add_bytes(sums, x, w);
    }
};
#endif

template <class Kind, int ROWS>
ALWAYS_INLINE void tile(const typename Kind::X *x, int64_t x_stride, const int8_t *panel, int64_t lines, int32_t *sums) {
    typename V::Sums left[ROWS], right[ROWS];
    for (int j = 0; j < ROWS; ++j) {
        left[j] = V::load(sums + j * PANEL);
        right[j] = V::load(sums + j * PANEL + SUMS);
    }
    for (int64_t line = 0; line < lines; ++line) {
        const typename V::Weights first = V::load_integers((const int16_t *)(panel + line * LINE));
        const typename V::Weights second = V::load_integers((const int16_t *)(panel + line * LINE + LINE / 2));
        for (int j = 0; j < ROWS; ++j) {
            typename V::Weights value = V::repeat((const char *)(x + j * x_stride + Kind::COLUMNS * line));
            V::now(value); // or the compiler loads all of them first, and has no registers left for the sums
            left[j] = Kind::add(left[j], value, first);
            right[j] = Kind::add(right[j], value, second);
            V::now(left[j]);
            V::now(right[j]);
        }
    }
    for (int j = 0; j < ROWS; ++j) {
        V::store(sums + j * PANEL, left[j]);
        V::store(sums + j * PANEL + SUMS, right[j]);
    }
}

template <class Kind, int ROWS>
ALWAYS_INLINE void last_tile(int64_t rows, const typename Kind::X *x, int64_t x_stride, const int8_t *panel, int64_t lines,
                             int32_t *sums) {
    if (rows == ROWS) return tile<Kind, ROWS>(x, x_stride, panel, lines, sums);
    if constexpr (ROWS > 1) last_tile<Kind, ROWS - 1>(rows, x, x_stride, panel, lines, sums);
}

// Columns `first` to `stop` (PANEL at most) of the rows `row` to `row + rows` of the result; `x`: those rows.
template <class Kind>
void panel_product(const Linear &product, const typename Kind::X *x, int64_t x_stride, int64_t first, int64_t stop,
                   int64_t row, int64_t rows) {
    alignas(64) int8_t panel[DEEP / Kind::COLUMNS * LINE];
    alignas(64) int32_t sums[TALL * PANEL], shift[PANEL];
    alignas(64) float totals[TALL * PANEL];
    const int64_t n = stop - first;
    bool begun = false;
    for (int64_t k = 0; k < product.columns; k += SUMMED) {
        memset(sums, 0, size_t(rows) * PANEL * sizeof(int32_t));
        memset(shift, 0, sizeof shift);
        const int64_t end = product.columns - k < SUMMED ? product.columns : k + SUMMED;
        for (int64_t from = k; from < end; from += DEEP) {
            const int64_t deep = end - from < DEEP ? end - from : DEEP;
            const int8_t *w = product.weights + first * product.columns + from;
            const int64_t lines = V::template pack<Kind::COLUMNS>(w, product.columns, n, deep, panel);
            if constexpr (Kind::SHIFTED) {
                typename V::Sums left = V::load(shift), right = V::load(shift + SUMS);
                const int8_t shifts[4] = {-128, -128, -128, -128};
                for (int64_t line = 0; line < lines; ++line) {
                    const typename V::Weights value = V::repeat((const char *)shifts); // 128 without sign
                    left = Kind::add(left, value, V::load_integers((const int16_t *)(panel + line * LINE)));
                    right = Kind::add(right, value, V::load_integers((const int16_t *)(panel + line * LINE + LINE / 2)));
                }
                V::store(shift, left);
                V::store(shift + SUMS, right);
            }
            const typename Kind::X *at = x + from;
            int64_t j = 0;
            for (; j + V::TILE <= rows; j += V::TILE)
                tile<Kind, V::TILE>(at + j * x_stride, x_stride, panel, lines, sums + j * PANEL);
            if (j < rows)
                last_tile<Kind, V::TILE - 1>(rows - j, at + j * x_stride, x_stride, panel, lines, sums + j * PANEL);
        }
        for (int64_t j = 0; j < rows; ++j)
            for (int i = 0; i < PANEL; ++i) {
                const float sum = float(sums[j * PANEL + i] - shift[i]);
                totals[j * PANEL + i] = begun ? totals[j * PANEL + i] + sum : sum;
            }
        begun = true;
    }
    for (int64_t j = 0; j < rows; ++j) {
        const float scale = product.x_scale[row + j];
        for (int64_t i = 0; i < n; ++i)
            put(product.out, product.dtype, (row + j) * product.out_stride + first + i,
                begun ? totals[j * PANEL + i] * (scale * product.weight_scale[first + i]) : 0.0f);
    }
}

void many_rows(const Linear &product, int64_t first, int64_t stop) {
    for (int64_t row = 0; row < product.rows; row += TALL)
        for (int64_t column = first; column < stop; column += PANEL)
            panel_product<Words>(product, product.x + row * product.x_stride, product.x_stride, column,
                                 stop - column < PANEL ? stop : column + PANEL, row,
                                 product.rows - row < TALL ? product.rows - row : TALL);
}

#ifdef QM_BYTES
constexpr int64_t UNIT = 16; // rows

int64_t byte_rows_needed(int64_t rows, int64_t columns, bool) {
    return rows * ((columns + QM_COLUMN_MULTIPLE - 1) / QM_COLUMN_MULTIPLE * QM_COLUMN_MULTIPLE);
}

int64_t byte_units(int64_t rows, bool) { return (rows + UNIT - 1) / UNIT; }

void shift_rows(const Linear &product, int64_t unit, int8_t *to) {
    const int64_t stop = (unit + 1) * UNIT < product.rows ? (unit + 1) * UNIT : product.rows;
    for (int64_t i = unit * UNIT * product.x_stride; i < stop * product.x_stride; ++i)
        to[i] = int8_t(uint8_t(product.x[i] + V::SHIFT));
}

void byte_product(const Linear &product, int8_t *shifted, int64_t first, int64_t stop) {
    for (int64_t column = first; column < stop; column += PANEL)
        panel_product<Bytes>(product, (const uint8_t *)shifted, product.x_stride, column,
                             stop - column < PANEL ? stop : column + PANEL, 0, product.rows);
}

const Rearranged byte_products = {byte_rows_needed, byte_units, shift_rows, byte_product};
#endif

// --- activations

// Values in fp32, in place if they are.
ALWAYS_INLINE const float *widened(const void *x, int dtype, int64_t n, float *buffer) {
    if (dtype == QM_FP32) return (const float *)x;
    if (dtype == QM_BF16) {
        const uint16_t *bits = (const uint16_t *)x;
        for (int64_t k = 0; k < n; ++k) {
            const uint32_t wide = uint32_t(bits[k]) << 16;
            memcpy(buffer + k, &wide, 4);
        }
        return buffer;
    }
    for (int64_t k = 0; k < n; ++k) buffer[k] = get(x, dtype, k);
    return buffer;
}

// Hadamard transform in place: additions in one order for every instruction set.
void transform(float *values, int64_t n) {
    if (n >= WIDE) {
        float signs[4][WIDE];
        for (int bit = 0; bit < 4; ++bit)
            for (int i = 0; i < WIDE; ++i) signs[bit][i] = i >> bit & 1 ? -1.0f : 1.0f;
        const F sign1 = read(signs[0]), sign2 = read(signs[1]), sign4 = read(signs[2]), sign8 = read(signs[3]);
        for (int64_t k = 0; k < n; k += WIDE) { // the first four steps, within 16 values: a + b, and a - b in its partner
            F x = read(values + k);
            x = partner1(x) + x * sign1;
            x = partner2(x) + x * sign2;
            x = partner4(x) + x * sign4;
            x = partner8(x) + x * sign8;
            write(values + k, x);
        }
        int64_t half = WIDE;
        for (; half * 4 <= n; half *= 4) // two steps in one pass
            for (int64_t start = 0; start < n; start += 4 * half)
                for (int64_t i = start; i < start + half; i += WIDE) {
                    const F a = read(values + i), b = read(values + i + half);
                    const F c = read(values + i + 2 * half), d = read(values + i + 3 * half);
                    const F ab = a + b, ba = a - b, cd = c + d, dc = c - d;
                    write(values + i, ab + cd);
                    write(values + i + half, ba + dc);
                    write(values + i + 2 * half, ab - cd);
                    write(values + i + 3 * half, ba - dc);
                }
        for (; half < n; half *= 2)
            for (int64_t start = 0; start < n; start += 2 * half)
                for (int64_t i = start; i < start + half; i += WIDE) {
                    const F a = read(values + i), b = read(values + i + half);
                    write(values + i, a + b);
                    write(values + i + half, a - b);
                }
        return;
    }
    for (int64_t half = 1; half < n; half *= 2)
        for (int64_t start = 0; start < n; start += 2 * half)
            for (int64_t i = start; i < start + half; ++i) {
                const float a = values[i], b = values[i + half];
                values[i] = a + b;
                values[i + half] = a - b;
            }
}

// The bits of the largest size among values: as integers they have the order of the sizes, and NaN is the largest.
ALWAYS_INLINE int32_t largest_size(const float *values, int64_t n) {
    I most = {};
    int64_t k = 0;
    for (; k + WIDE <= n; k += WIDE) most = larger(most, sizes_of(read(values + k)));
    float rest[WIDE] = {0};
    memcpy(rest, values + k, size_t(n - k) * 4);
    most = larger(most, sizes_of(read(rest)));
    int32_t lanes[WIDE], found = 0;
    memcpy(lanes, &most, sizeof lanes);
    for (int32_t size : lanes) found = size > found ? size : found;
    return found;
}

ALWAYS_INLINE float square_sum(const float *x, int64_t n) {
    F total = {};
    int64_t k = 0;
    for (; k + WIDE <= n; k += WIDE) {
        const F values = read(x + k);
        total = total + values * values;
    }
    float found = sum(total);
    for (; k < n; ++k) found += x[k] * x[k];
    return found;
}

bool quantize_row(const void *x, int dtype, int64_t columns, const float *signs, int64_t block, bool bytes, float *work,
                  int16_t *integers, float *scale) {
    if (dtype == QM_FP32) {
        if (x != work) memcpy(work, x, size_t(columns) * 4);
    } else {
        widened(x, dtype, columns, work);
    }
    float unit = 1.0f;
    if (signs) {
        for (int64_t start = 0; start < columns; start += block) {
            for (int64_t k = 0; k < block; ++k) work[start + k] *= signs[k];
            transform(work + start, block);
        }
        unit = V::inverse_root(float(block));
    }
    const int32_t bits = largest_size(work, columns);
    float largest;
    memcpy(&largest, &bits, 4);
    const int64_t padded = (columns + QM_COLUMN_MULTIPLE - 1) / QM_COLUMN_MULTIPLE * QM_COLUMN_MULTIPLE;
    const bool finite = bits < 0x7f800000;
    // A row so small that the factor would overflow is a row of zeros: its products are below the smallest fp32.
    if (!finite || largest < 1e-30f) {
        memset(integers, 0, size_t(padded) * 2);
        *scale = finite ? 0.0f : __builtin_nanf("");
        return true;
    }
    if (bytes) {
        const float mean = square_sum(work, columns) / float(columns);
        bytes = largest < 1e15f && largest > 1e-15f && largest * largest <= float(QM_MOST_CREST * QM_MOST_CREST) * mean;
    }
    const float levels = bytes ? float(QM_BYTE_LEVELS) : float(QM_LEVELS), factor = levels / largest;
    int64_t k = 0;
    for (; k + WIDE <= columns; k += WIDE) write_rounded(integers + k, read(work + k) * factor);
    float rest[WIDE] = {0};
    int16_t last[WIDE];
    memcpy(rest, work + k, size_t(columns - k) * 4);
    write_rounded(last, read(rest) * factor);
    for (; k < columns; ++k) integers[k] = last[k % WIDE];
    for (; k < padded; ++k) integers[k] = 0;
    *scale = largest * unit / levels;
    return bytes;
}

} // namespace
