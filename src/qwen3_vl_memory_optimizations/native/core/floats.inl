// Products with rows of 16-bit floating point, in fp32. Sixteen sums of every sixteenth column, in two halves; then these are
// added up: one order for every instruction set. V::singles(uint16_t *): sixteen fp16 values as fp32.

namespace {

template <bool BF16> ALWAYS_INLINE F sixteen(const uint16_t *from) {
    if constexpr (BF16) {
        F values;
        QM_EACH {
            ShortPart part;
            memcpy(&part, from + i * (WIDE / QM_PARTS), sizeof part);
            values.part[i] = (FloatPart)(__builtin_convertvector(part, IntegerPart) << 16);
        }
        return values;
    } else {
        return V::singles(from);
    }
}

template <bool BF16, int ROWS> ALWAYS_INLINE void float_outputs(const FloatLinear &product, int64_t row, int64_t column) {
    const uint16_t *w = product.weights + column * product.columns;
    const float *x = product.x + row * product.columns;
    constexpr int HALVES = 2;
    F total[ROWS][HALVES] = {};
    int64_t k = 0;
    for (; k + HALVES * WIDE <= product.columns; k += HALVES * WIDE)
        for (int half = 0; half < HALVES; ++half) {
            const int64_t at = k + half * WIDE;
            __builtin_prefetch(w + at + (ROWS == 1 ? V::AHEAD / 2 : product.columns));
            const F values = sixteen<BF16>(w + at);
            for (int j = 0; j < ROWS; ++j) total[j][half] = total[j][half] + values * read(x + j * product.columns + at);
        }
    for (; k < product.columns; k += WIDE) {
        const int64_t rest = product.columns - k < WIDE ? product.columns - k : WIDE;
        uint16_t last[WIDE] = {0};
        memcpy(last, w + k, size_t(rest) * 2);
        const F values = sixteen<BF16>(last);
        for (int j = 0; j < ROWS; ++j) {
            float given[WIDE] = {0};
            memcpy(given, x + j * product.columns + k, size_t(rest) * 4);
            total[j][0] = total[j][0] + values * read(given);
        }
    }
    for (int j = 0; j < ROWS; ++j) {
        const float found = sum(total[j][0] + total[j][1]);
        put(product.out, product.dtype, (row + j) * product.out_stride + column,
            product.weight_scale ? found * product.weight_scale[column] : found);
    }
}

template <bool BF16> ALWAYS_INLINE void all_float_rows(const FloatLinear &product, int64_t first, int64_t stop) {
    for (int64_t column = first; column < stop; ++column) {
        int64_t row = 0;
        for (; row + 4 <= product.rows; row += 4) float_outputs<BF16, 4>(product, row, column);
        for (; row + 2 <= product.rows; row += 2) float_outputs<BF16, 2>(product, row, column);
        for (; row < product.rows; ++row) float_outputs<BF16, 1>(product, row, column);
    }
}

void float_rows(const FloatLinear &product, int64_t first, int64_t stop) {
    if (product.is_bf16) all_float_rows<true>(product, first, stop);
    else all_float_rows<false>(product, first, stop);
}

} // namespace
