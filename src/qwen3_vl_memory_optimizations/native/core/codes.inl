// Products with 4-bit rows. A row of the weight is, for each 16 of its columns, the number of a table (a byte), and then a
// code of 4 bits for each column, which names one of the table's 16 bytes. These bytes are an INT8 row: the same integers,
// the same sums, the same bits as if the row had been stored so.
//
// 64 columns are four groups and 32 bytes of codes. Group g has the columns 8g to 8g + 7 and 32 + 8g to 32 + 8g + 7, in turns
// one of each, so that their bytes become 16-bit integers without crossing parts of a vector. The low halves of the bytes are
// codes of the groups 0 and 1, 16 bytes each, the high halves of 2 and 3. V::codes(codes, numbers, tables, Weights[]) returns
// the 64 in the order of columns.

namespace {

constexpr int64_t CODED = 64;

template <int ROWS>
ALWAYS_INLINE void code_dots(const int16_t *x, int64_t x_stride, const uint8_t *codes, const uint8_t *numbers,
                             const int8_t *tables, int64_t columns, int64_t ahead, int32_t (&sums)[ROWS]) {
    constexpr int VECTORS = CODED / V::LANES, EACH = ROWS > 2 ? 1 : ROWS == 2 && VECTORS > 2 ? 2 : VECTORS;
    typename V::Sums total[ROWS][EACH];
    for (int j = 0; j < ROWS; ++j)
        for (int e = 0; e < EACH; ++e) total[j][e] = V::zero();
    for (int64_t k = 0; k < columns; k += CODED, codes += CODED / 2, numbers += CODED / 16) {
        __builtin_prefetch(codes + ahead);
        typename V::Weights values[VECTORS];
        V::codes(codes, numbers, tables, values);
        for (int v = 0; v < VECTORS; ++v)
            for (int j = 0; j < ROWS; ++j)
                total[j][v % EACH] =
                    V::add_products(total[j][v % EACH], values[v], V::load_integers(x + j * x_stride + k + v * V::LANES));
    }
    for (int j = 0; j < ROWS; ++j) {
        for (int e = 1; e < EACH; ++e) total[j][0] = V::add(total[j][0], total[j][e]);
        sums[j] = V::total(total[j][0]);
    }
}

template <int ROWS> ALWAYS_INLINE void code_outputs(const Linear &product, int64_t row, int64_t column) {
    const int64_t row_bytes = product.row_bytes();
    const uint8_t *numbers = (const uint8_t *)product.weights + column * row_bytes, *codes = numbers + product.columns / 16;
    float totals[ROWS] = {};
    for (int64_t k = 0; k < product.columns; k += SUMMED) {
        int32_t sums[ROWS];
        code_dots<ROWS>(product.x + row * product.x_stride + k, product.x_stride, codes + k / 2, numbers + k / 16,
                        product.tables, product.columns - k < SUMMED ? product.columns - k : SUMMED,
                        ROWS == 1 ? int64_t(V::AHEAD) : row_bytes, sums);
        for (int j = 0; j < ROWS; ++j) totals[j] += float(sums[j]);
    }
    for (int j = 0; j < ROWS; ++j)
        put(product.out, product.dtype, (row + j) * product.out_stride + column,
            totals[j] * (product.x_scale[row + j] * product.weight_scale[column]));
}

void few_rows_of_codes(const Linear &product, int64_t first, int64_t stop) {
    for (int64_t column = first; column < stop; ++column) {
        int64_t row = 0;
        for (; row + 4 <= product.rows; row += 4) code_outputs<4>(product, row, column);
        switch (product.rows - row) {
        case 3: code_outputs<3>(product, row, column); break;
        case 2: code_outputs<2>(product, row, column); break;
        case 1: code_outputs<1>(product, row, column); break;
        }
    }
}

// Write rows `first` to `stop` of the weight as INT8.
void expand_codes(const Linear &product, int64_t first, int64_t stop, int8_t *to) {
    constexpr int VECTORS = CODED / V::LANES;
    for (int64_t row = first; row < stop; ++row) {
        const uint8_t *numbers = (const uint8_t *)product.weights + row * product.row_bytes();
        const uint8_t *codes = numbers + product.columns / 16;
        for (int64_t k = 0; k < product.columns; k += CODED, to += CODED) {
            typename V::Weights values[VECTORS];
            V::codes(codes + k / 2, numbers + k / 16, product.tables, values);
            int16_t wide[CODED];
            memcpy(wide, values, sizeof wide);
            for (int i = 0; i < CODED; ++i) to[i] = int8_t(wide[i]);
        }
    }
}

typedef uint16_t Sixteen __attribute__((vector_size(32)));

// Sums of the errors of 16 values with each table.
ALWAYS_INLINE void sums_of_errors(const int16_t (&values)[16], const uint16_t *errors, uint16_t (&sums)[QM_TABLES]) {
    constexpr int TOGETHER = 8; // vectors: more do not fit the registers
    for (int64_t first = 0; first < QM_TABLES; first += TOGETHER * 16) {
        Sixteen total[TOGETHER] = {};
        for (int i = 0; i < 16; ++i) {
            const uint16_t *from = errors + (values[i] + QM_MOST_ENCODED) * QM_TABLES + first;
            for (int v = 0; v < TOGETHER; ++v) {
                Sixteen each;
                memcpy(&each, from + v * 16, sizeof each);
                total[v] += each;
            }
        }
        memcpy(sums + first, total, sizeof total);
    }
}

// The number of the least sum, the first of several.
ALWAYS_INLINE int64_t least_of(const uint16_t (&sums)[QM_TABLES]) {
    Sixteen least, best = {};
    memcpy(&least, sums, sizeof least);
    for (int64_t first = 16; first < QM_TABLES; first += 16) {
        Sixteen each;
        memcpy(&each, sums + first, sizeof each);
        const Sixteen less = (Sixteen)(each < least);
        least = (each & less) | (least & ~less);
        best = ((Sixteen{} + uint16_t(first)) & less) | (best & ~less);
    }
    int64_t found = best[0];
    uint16_t found_sum = least[0];
    for (int lane = 1; lane < 16; ++lane) {
        const int64_t number = best[lane] + lane;
        if (least[lane] > found_sum || (least[lane] == found_sum && number > found)) continue;
        found = number;
        found_sum = least[lane];
    }
    return found;
}

ALWAYS_INLINE int64_t best_table(const int16_t (&values)[16], const uint16_t *errors) {
    uint16_t sums[QM_TABLES];
    sums_of_errors(values, errors, sums);
    return least_of(sums);
}

void encode_row(const qm_encoding &all, int64_t row) {
    const int16_t *x = all.values + row * all.columns;
    uint8_t *numbers = all.data + row * (all.columns / 16 + all.columns / 2), *codes = numbers + all.columns / 16;
    int64_t product = 0, square = 0;
    for (int64_t k = 0; k < all.columns; k += CODED, x += CODED, codes += CODED / 2) {
        memset(codes, 0, CODED / 2);
        for (int group = 0; group < 4; ++group) {
            int16_t values[16];
            for (int i = 0; i < 16; ++i) values[i] = x[i % 2 * 32 + group * 8 + i / 2];
            const int64_t table = best_table(values, all.errors);
            *numbers++ = uint8_t(table);
            const uint8_t *nearest = all.nearest + table * (2 * QM_MOST_ENCODED + 1) + QM_MOST_ENCODED;
            for (int i = 0; i < 16; ++i) {
                const uint8_t code = nearest[values[i]];
                const int64_t integer = all.tables[table * 16 + code];
                codes[group % 2 * 16 + i] |= uint8_t(code << group / 2 * 4);
                product += integer * values[i];
                square += integer * integer;
            }
        }
    }
    all.products[2 * row] = product;
    all.products[2 * row + 1] = square;
}

constexpr int CANDIDATES = 8; // tables tried for each group, one in each lane
typedef float Candidates __attribute__((vector_size(4 * CANDIDATES)));
typedef int32_t CandidateIntegers __attribute__((vector_size(4 * CANDIDATES)));

// Values in halves of the tables' unit.
ALWAYS_INLINE CandidateIntegers halves_of(Candidates values) {
    const Candidates most = Candidates{} + float(QM_MOST_ENCODED);
    Candidates halves = 2.0f * values;
    halves = halves > most ? most : halves < -most ? -most : halves;
    return (CandidateIntegers)(halves + 12582912.0f) - 0x4b400000; // rounded
}

// Encode the 16 `values` from `first` on, whose own errors later ones of them make up for too.
ALWAYS_INLINE int64_t compensated_group(const qm_compensation &all, const float *values, const float *targets, int first,
                                        uint8_t (&best)[16]) {
    int16_t halves[16];
    for (int i = 0; i < 16; ++i) halves[i] = int16_t(halves_of(Candidates{} + values[i])[0]);
    uint16_t sums[QM_TABLES];
    sums_of_errors(halves, all.errors, sums);
    int64_t numbers[CANDIDATES];
    for (int64_t &number : numbers) {
        number = least_of(sums);
        sums[number] = UINT16_MAX;
    }
    Candidates left[16], total = {};
    for (int i = 0; i < 16; ++i) left[i] = Candidates{} + values[i];
    uint8_t chosen[16][CANDIDATES];
    for (int i = 0; i < 16; ++i) {
        const CandidateIntegers at = halves_of(left[i]);
        Candidates integers;
        for (int c = 0; c < CANDIDATES; ++c) {
            chosen[i][c] = all.nearest[numbers[c] * (2 * QM_MOST_ENCODED + 1) + QM_MOST_ENCODED + at[c]];
            integers[c] = all.tables[numbers[c] * 16 + chosen[i][c]];
        }
        const Candidates error = left[i] - integers, lacking = targets[i] - integers;
        total += error * error * all.importance[first + i];
        const float *feedback = all.feedback + (first + i) * CODED + first;
        for (int j = i + 1; j < 16; ++j) left[j] += lacking * feedback[j];
    }
    int least = 0;
    for (int c = 1; c < CANDIDATES; ++c)
        if (total[c] < total[least]) least = c;
    for (int i = 0; i < 16; ++i) best[i] = chosen[i][least];
    return numbers[least];
}

void encode_compensated(const qm_compensation &all, int64_t row) {
    float *targets = all.targets + row * all.stride, values[CODED];
    for (int i = 0; i < CODED; ++i) values[i] = targets[i] + all.fed_back[row * CODED + i];
    uint8_t *numbers = all.numbers + row * all.row_bytes, *codes = all.codes + row * all.row_bytes;
    memset(codes, 0, CODED / 2);
    for (int group = 0; group < 4; ++group) {
        const int first = group * 16;
        uint8_t best[16];
        numbers[group] = uint8_t(compensated_group(all, values + first, targets + first, first, best));
        for (int i = 0; i < 16; ++i) {
            codes[group % 2 * 16 + i] |= uint8_t(best[i] << group / 2 * 4);
            targets[first + i] -= all.tables[numbers[group] * 16 + best[i]];
            const float *feedback = all.feedback + (first + i) * CODED;
            for (int j = first + 16; j < CODED; ++j) values[j] += targets[first + i] * feedback[j];
        }
    }
}

} // namespace
