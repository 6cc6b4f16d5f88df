// Matrix products with AMX: Intel servers since Sapphire Rapids.
//
// Weights are multiplied where they lie: 16 rows of 64 columns are one tile. Activations are rearranged: 14 bits are
// two digits (a = 128 * high + low), each a tile of 64 columns by 16 rows; 8 bits are one, and two tiles have 32 rows. So
// results are [weights, rows], and are transposed when they are written. Rearranging weights instead would cost more: there
// are more of them.
#include "kernels.h"

#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__linux__)
#include <immintrin.h>
#include <string.h>

namespace {

constexpr int64_t SIDE = 16;  // rows of a tile
constexpr int64_t WIDTH = 64; // bytes of a row of a tile
constexpr int64_t TILE = SIDE * WIDTH;
constexpr int64_t GROUP = COLUMNS_TOGETHER; // rows of weights at a time
constexpr int64_t MOST_PANELS = AT_MOST_ROWS / SIDE;

struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t width[16] = {};
    uint8_t rows[16] = {};
    Shapes() {
        for (int i = 0; i < 8; ++i) {
            width[i] = WIDTH;
            rows[i] = SIDE;
        }
    }
};

int64_t steps_of(int64_t columns) { return (columns + WIDTH - 1) / WIDTH; }

// Exchange rows and columns of 32-bit values.
inline void transpose(__m512i (&x)[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
            y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
        x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
    }
}

int64_t panels_of(int64_t rows) { return (rows + SIDE - 1) / SIDE; }

// Units are pairs of tiles: two digits of 16 rows, or one digit of 32.
int64_t units_of(int64_t rows, bool bytes) { return bytes ? (panels_of(rows) + 1) / 2 : panels_of(rows); }

// Activations, then a copy of the last rows of weights.
int64_t needed_bytes(int64_t rows, int64_t columns, bool bytes) {
    return units_of(rows, bytes) * steps_of(columns) * 2 * TILE + GROUP * steps_of(columns) * WIDTH;
}

inline __m512i bytes_of(__m512i first, __m512i second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(first)), _mm512_cvtepi16_epi8(second), 1);
}

void rearrange(const Linear &product, int64_t unit, int8_t *to) {
    const int64_t steps = steps_of(product.columns);
    to += unit * steps * 2 * TILE;
    const __m512i low_bits = _mm512_set1_epi16(127);
    for (int64_t step = 0; step < steps; ++step, to += 2 * TILE) {
        const int64_t left = product.x_stride - step * WIDTH; // a multiple of 32
        const auto read = [&](int64_t row, __m512i &first, __m512i &second) {
            first = second = _mm512_setzero_si512();
            if (row >= product.rows) return;
            const int16_t *x = product.x + row * product.x_stride + step * WIDTH;
            first = _mm512_loadu_si512(x);
            if (left > 32) second = _mm512_loadu_si512(x + 32);
        };
        __m512i one[SIDE], other[SIDE], first, second;
        for (int64_t i = 0; i < SIDE; ++i) {
            if (product.bytes) {
                read(2 * unit * SIDE + i, first, second);
                one[i] = bytes_of(first, second);
                read((2 * unit + 1) * SIDE + i, first, second);
                other[i] = bytes_of(first, second);
            } else {
                read(unit * SIDE + i, first, second);
                one[i] = bytes_of(_mm512_srai_epi16(first, 7), _mm512_srai_epi16(second, 7));
                other[i] = bytes_of(_mm512_and_si512(first, low_bits), _mm512_and_si512(second, low_bits));
            }
        }
        transpose(one);
        transpose(other);
        for (int64_t i = 0; i < SIDE; ++i) {
            _mm512_store_si512(to + i * WIDTH, one[i]);
            _mm512_store_si512(to + TILE + i * WIDTH, other[i]);
        }
    }
}

inline __m256i bf16_of(__m512i bits, __mmask16 is_nan) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
}

inline void write_some(const Linear &product, int64_t row, int64_t column, __mmask16 mask, __m512 values) {
    const int64_t at = row * product.out_stride + column;
    if (product.dtype == QM_FP32) {
        _mm512_mask_storeu_ps((float *)product.out + at, mask, values);
    } else {
        const __m256i narrow = product.dtype == QM_BF16
                                   ? bf16_of(_mm512_castps_si512(values), _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q))
                                   : _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16((uint16_t *)product.out + at, mask, narrow);
    }
}

// A group of weights: `n` rows from `column` on, which lie at `data`, `stride` bytes apart.
struct Group {
    const int8_t *data;
    int64_t stride, column, n;
};

struct Totals {
    alignas(64) float values[MOST_PANELS][GROUP][SIDE];

    void add(int64_t panel, int64_t i, bool begun, __m512i sums) {
        const __m512 values_now = _mm512_cvtepi32_ps(sums);
        float *total = values[panel][i];
        _mm512_store_ps(total, begun ? _mm512_add_ps(_mm512_load_ps(total), values_now) : values_now);
    }
};

// Add the products of columns of the steps `first` to `stop`.
void add_products(const Linear &product, const int8_t *packed, const Group &group, int64_t first, int64_t stop,
                  Totals &totals) {
    alignas(64) int32_t sums[4][SIDE][SIDE];
    const int64_t steps = steps_of(product.columns), units = units_of(product.rows, product.bytes), stride = group.stride;
    const int8_t *upper = group.data, *lower = group.n > SIDE ? group.data + SIDE * stride : group.data;
    const int8_t *next = group.data + GROUP * stride; // comes from memory meanwhile
    const int64_t lines = (GROUP + units - 1) / units;
    for (int64_t unit = 0; unit < units; ++unit) {
        const int8_t *x = packed + (unit * steps + first) * 2 * TILE;
        const int64_t line = unit * lines, last = line + lines < GROUP ? line + lines : GROUP;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = first; step < stop; ++step, x += 2 * TILE) {
            _tile_loadd(6, x, WIDTH);
            _tile_loadd(4, upper + step * WIDTH, stride);
            _tile_loadd(5, lower + step * WIDTH, stride);
            for (int64_t row = line; row < last; ++row)
                _mm_prefetch((const char *)next + row * stride + step * WIDTH, _MM_HINT_T1);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, x + TILE, WIDTH);
            _tile_dpbssd(1, 5, 6);
            _tile_dpbssd(2, 4, 7);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, sums[0], WIDTH);
        _tile_stored(1, sums[1], WIDTH);
        _tile_stored(2, sums[2], WIDTH);
        _tile_stored(3, sums[3], WIDTH);
        for (int64_t i = 0; i < GROUP; ++i) {
            const __m512i one = _mm512_load_si512(sums[i / SIDE][i % SIDE]);
            const __m512i other = _mm512_load_si512(sums[2 + i / SIDE][i % SIDE]);
            if (product.bytes) {
                totals.add(2 * unit, i, first, one);
                totals.add(2 * unit + 1, i, first, other);
            } else {
                totals.add(unit, i, first, _mm512_add_epi32(_mm512_slli_epi32(one, 7), other));
            }
        }
    }
}

// Write 16 rows of the result; neighbours in memory one after the other.
void write_panel(const Linear &product, int64_t panel, const Group *groups, const Totals *totals, int64_t n_groups) {
    const int64_t row = panel * SIDE, rows = product.rows - row < SIDE ? product.rows - row : SIDE;
    for (int64_t half = 0; half < 2 * n_groups; ++half) {
        const Group &group = groups[half / 2];
        const int64_t first = half % 2 * SIDE, count = group.n - first < SIDE ? group.n - first : SIDE;
        if (count < 1) return;
        __m512i values[SIDE];
        for (int64_t i = 0; i < SIDE; ++i) values[i] = _mm512_load_si512(totals[half / 2].values[panel][first + i]);
        transpose(values);
        const __mmask16 mask = __mmask16((1u << count) - 1);
        const __m512 scale = _mm512_maskz_loadu_ps(mask, product.weight_scale + group.column + first);
        for (int64_t j = 0; j < rows; ++j) {
            const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(product.x_scale[row + j]), scale);
            write_some(product, row + j, group.column + first, mask, _mm512_mul_ps(_mm512_castsi512_ps(values[j]), factor));
        }
    }
}

void multiply(const Linear &product, int8_t *packed, int64_t first, int64_t stop) {
    const int64_t columns = product.columns, steps = steps_of(columns), padded = steps * WIDTH;
    Group groups[AT_MOST_COLUMNS / GROUP];
    Totals totals[AT_MOST_COLUMNS / GROUP];
    int64_t n_groups = 0;
    for (int64_t column = first; column < stop; column += GROUP) {
        const int64_t n = stop - column < GROUP ? stop - column : GROUP;
        Group &group = groups[n_groups++] = {product.weights + column * columns, columns, column, n};
        // A tile that ends beyond its row reads the next row's first columns, and multiplies them by zeros. The last rows
        // have no next; this is the only place where rows may be missing, too.
        if (n == GROUP && (column + n < product.n || padded == columns)) continue;
        int8_t *copy = packed + units_of(product.rows, product.bytes) * steps * 2 * TILE;
        memset(copy, 0, size_t(GROUP * padded));
        for (int64_t i = 0; i < n; ++i) memcpy(copy + i * padded, group.data + i * columns, size_t(columns));
        group.data = copy;
        group.stride = padded;
    }
    const Shapes shapes;
    _tile_loadconfig(&shapes);
    // Activations of the same columns stay in the cache for all groups.
    constexpr int64_t AT_ONCE = QM_SUMMED_COLUMNS / WIDTH;
    for (int64_t step = 0; step < steps; step += AT_ONCE)
        for (int64_t i = 0; i < n_groups; ++i)
            add_products(product, packed, groups[i], step, step + AT_ONCE < steps ? step + AT_ONCE : steps, totals[i]);
    _tile_release();
    for (int64_t panel = 0; panel < panels_of(product.rows); ++panel)
        write_panel(product, panel, groups, totals, n_groups);
}

} // namespace

extern const Rearranged amx_products = {needed_bytes, units_of, rearrange, multiply};
#else // for another processor, or by a compiler that does not know AMX
extern const Rearranged amx_products = {};
#endif
