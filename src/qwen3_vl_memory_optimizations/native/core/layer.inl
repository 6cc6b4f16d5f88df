// What a decoder layer needs beside products.

#include <type_traits>

namespace {

// e to the power of x, within 2 units in the last place; 0 below -87.
ALWAYS_INLINE F exponential(F x) {
    const F low = fill(-87.0f), high = fill(88.0f), magic = fill(12582912.0f);
    const I below = x < low;
    x = choose(below, low, x);
    x = choose(high < x, high, x);
    const F shifted = x * 1.44269504f + magic;
    const F n = shifted - magic;
    const F r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    F p = fill(1.38888889e-3f);
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    I power = bits_of(shifted);
    QM_EACH power.part[i] = (power.part[i] - 0x4b400000 + 127) << 23;
    return choose(below, F{}, p * from_bits(power));
}

void rms_norm(const void *x, int dtype, int64_t columns, const float *weight, float epsilon, float *out) {
    const float *values = widened(x, dtype, columns, out);
    const float factor = V::inverse_root(square_sum(values, columns) / float(columns) + epsilon);
    for (int64_t k = 0; k < columns; ++k) out[k] = weight[k] * (values[k] * factor);
}

void rotate_head(float *x, int64_t size, const float *weight, float epsilon, const float *cosine, const float *sine) {
    const float factor = V::inverse_root(square_sum(x, size) / float(size) + epsilon);
    for (int64_t k = 0; k < size; ++k) x[k] = weight[k] * (x[k] * factor);
    const int64_t half = size / 2;
    for (int64_t k = 0; k < half; ++k) {
        const float a = x[k], b = x[k + half];
        x[k] = a * cosine[k] - b * sine[k];
        x[k + half] = b * cosine[k + half] + a * sine[k + half];
    }
}

void silu_product(const float *gate, const float *up, int64_t columns, float *out) {
    int64_t k = 0;
    for (; k + WIDE <= columns; k += WIDE) {
        const F x = read(gate + k);
        write(out + k, x / (exponential(F{} - x) + 1.0f) * read(up + k));
    }
    if (k < columns) {
        float rest[WIDE] = {0};
        memcpy(rest, gate + k, size_t(columns - k) * 4);
        const F x = read(rest);
        write(rest, x / (exponential(F{} - x) + 1.0f));
        for (int64_t i = 0; i < columns - k; ++i) out[k + i] = rest[i] * up[k + i];
    }
}

void convert(const float *from, int64_t n, void *to, int dtype) {
    if (dtype == QM_FP32) memcpy(to, from, size_t(n) * 4);
    else
        for (int64_t k = 0; k < n; ++k) put(to, dtype, k, from[k]);
}

void add(const void *a, int a_dtype, const float *b, int64_t n, void *out, int out_dtype) {
    if (a_dtype == QM_FP32 && out_dtype == QM_FP32)
        for (int64_t k = 0; k < n; ++k) ((float *)out)[k] = ((const float *)a)[k] + b[k];
    else
        for (int64_t k = 0; k < n; ++k) put(out, out_dtype, k, get(a, a_dtype, k) + b[k]);
}

// --- attention

constexpr int64_t AT_ONCE = 256;  // tokens whose scores are computed together
constexpr int64_t MOST_SIZE = 256; // of a head
constexpr int64_t MOST_ROWS = 8;  // query rows per round
constexpr int64_t FEW = 4;        // tokens whose sums are in registers together

// The state of rows between parts of the tokens (online softmax).
struct Softmax {
    int64_t rows, size;
    float largest[MOST_ROWS], sums[MOST_ROWS];
    alignas(64) float out[MOST_ROWS][MOST_SIZE];

    // Turn the scores of `n` tokens into weights; those from `n` to the next multiple of 16 become 0.
    ALWAYS_INLINE void weigh(Softmax &state, int64_t row, float *scores, int64_t n) {
        const int64_t padded = (n + WIDE - 1) / WIDE * WIDE;
        for (int64_t t = n; t < padded; ++t) scores[t] = -__builtin_inff();
        F most = fill(state.largest[row]);
        for (int64_t t = 0; t < padded; t += WIDE) {
            const F values = read(scores + t);
            most = choose(most < values, values, most);
        }
        float lanes[WIDE], largest = state.largest[row];
        write(lanes, most);
        for (float lane : lanes) largest = lane > largest ? lane : largest;
        F total = {};
        for (int64_t t = 0; t < padded; t += WIDE) {
            const F weight = exponential(read(scores + t) - fill(largest));
            write(scores + t, weight);
            total = total + weight;
        }
        const float kept = state.sums[row] > 0.0f ? first_of(exponential(fill(state.largest[row] - largest))) : 0.0f;
        state.largest[row] = largest;
        state.sums[row] = state.sums[row] * kept + sum(total);
        for (int64_t k = 0; k < state.size; ++k) state.out[row][k] *= kept;
    }
};

ALWAYS_INLINE float single_of_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

typedef int32_t Four __attribute__((vector_size(16)));
typedef float FourFloats __attribute__((vector_size(16)));

// Products of a few rows of integers [rows, x_stride] with all `n` rows of a small matrix of bytes [n, columns], as if by
// `few_rows`, in fp32. GROUP sums are added up together: one by one that takes longer than the products. `next`: a matrix
// as large, which comes into the cache meanwhile. COLUMNS: how many there are, or 0; a known number leaves addresses to the
// compiler, which otherwise keeps one of each row in memory.
template <int ROWS, int COLUMNS>
ALWAYS_INLINE void block_products(const int16_t *x, int64_t x_stride, const float *units, const int8_t *w, const float *scale,
                                  int64_t columns, int64_t n, const int8_t *next, float *out, int64_t out_stride) {
    if constexpr (COLUMNS > 0) columns = x_stride = COLUMNS;
    constexpr int GROUP = SUMS, EACH = GROUP / ROWS;
    alignas(64) int32_t found[GROUP];
    for (int64_t first = 0; first < n; first += EACH) {
        typename V::Sums sums[GROUP];
        for (int i = 0; i < GROUP; ++i) sums[i] = V::zero();
        for (int i = 0; i < EACH; ++i)
            for (int64_t k = 0; k < columns; k += 64) __builtin_prefetch(next + (first + i) * columns + k, 0, 2);
        for (int64_t k = 0; k < columns; k += V::LANES) {
            if constexpr (ROWS == 1) {
                const typename V::Weights row = V::load_integers(x + k);
                for (int i = 0; i < EACH; ++i)
                    sums[i] = V::add_products(sums[i], V::load_weights(w + (first + i) * columns + k), row);
            } else { // the other way round GCC 12 keeps rows in memory
                typename V::Weights weights[EACH];
                for (int i = 0; i < EACH; ++i) weights[i] = V::load_weights(w + (first + i) * columns + k);
                for (int j = 0; j < ROWS; ++j) {
                    const typename V::Weights row = V::load_integers(x + j * x_stride + k);
                    for (int i = 0; i < EACH; ++i) sums[j * EACH + i] = V::add_products(sums[j * EACH + i], weights[i], row);
                }
            }
        }
        V::store(found, V::all_totals(sums));
        for (int j = 0; j < ROWS; ++j) {
            float *to = out + j * out_stride + first;
            if constexpr (EACH % 4 == 0) {
                for (int i = 0; i < EACH; i += 4) {
                    Four totals;
                    FourFloats scales;
                    memcpy(&totals, found + j * EACH + i, sizeof totals);
                    memcpy(&scales, scale + first + i, sizeof scales);
                    const FourFloats values = __builtin_convertvector(totals, FourFloats) * (units[j] * scales);
                    memcpy(to + i, &values, sizeof values);
                }
            } else {
                for (int i = 0; i < EACH; ++i) to[i] = float(found[j * EACH + i]) * (units[j] * scale[first + i]);
            }
        }
    }
}

struct Block {
    const int8_t *keys, *values;
    const uint16_t *key_scale, *value_scale;
};

void products(const int16_t *x, int64_t x_stride, const float *units, int64_t rows, const int8_t *w, const float *scale,
              int64_t columns, int64_t n, const int8_t *next, float *out, int64_t out_stride) {
    const bool fits = columns % V::LANES == 0 && columns <= QM_SUMMED_COLUMNS && n % SUMS == 0;
    if (!fits) return few_rows({x, units, rows, columns, x_stride, w, scale, n, out, QM_FP32, out_stride, false}, 0, n);
    const auto all = [&](auto known) {
        int64_t row = 0;
        const auto some = [&](auto count) {
            constexpr int ROWS = decltype(count)::value;
            for (; row + ROWS <= rows; row += ROWS)
                block_products<ROWS, decltype(known)::value>(x + row * x_stride, x_stride, units + row, w, scale, columns, n,
                                                             next, out + row * out_stride, out_stride);
        };
        some(std::integral_constant<int, 4>());
        some(std::integral_constant<int, 2>());
        some(std::integral_constant<int, 1>());
    };
    // Those of the models: the size of a head, and the tokens of a block.
    if (columns == 128 && x_stride == 128) all(std::integral_constant<int, 128>());
    else if (columns == 256 && x_stride == 256) all(std::integral_constant<int, 256>());
    else all(std::integral_constant<int, 0>());
}

// One block of integers. Both products are those of weights: keys [tokens, size] by rows of the query, values
// [size, tokens] by rows of weights of tokens.
void attend_block(Softmax &state, const int16_t *query, const float *query_units, const Block &block, const Block &next,
                  int64_t tokens) {
    alignas(64) int16_t integers[MOST_ROWS * AT_ONCE];
    alignas(64) float scores[MOST_ROWS * AT_ONCE], scale[AT_ONCE], work[AT_ONCE];
    float units[MOST_ROWS];
    const int64_t size = state.size, size_stride = (size + 31) / 32 * 32, stride = (tokens + 31) / 32 * 32;
    for (int64_t t = 0; t < tokens; ++t) scale[t] = single_of_bf16(block.key_scale[t]);
    products(query, size_stride, query_units, state.rows, block.keys, scale, size, tokens, next.keys, scores, AT_ONCE);
    for (int64_t row = 0; row < state.rows; ++row) Softmax::weigh(state, row, scores + row * AT_ONCE, tokens);
    for (int64_t t = 0; t < tokens; ++t) scale[t] = single_of_bf16(block.value_scale[t]);
    for (int64_t row = 0; row < state.rows; ++row) {
        float *weights = scores + row * AT_ONCE;
        for (int64_t t = 0; t < tokens; ++t) weights[t] *= scale[t];
        quantize_row(weights, QM_FP32, tokens, nullptr, 0, false, work, integers + row * stride, units + row);
    }
    alignas(64) float found[MOST_ROWS * MOST_SIZE];
    for (int64_t k = 0; k < size; ++k) scale[k] = 1.0f;
    products(integers, stride, units, state.rows, block.values, scale, tokens, size, next.values, found, MOST_SIZE);
    for (int64_t row = 0; row < state.rows; ++row)
        for (int64_t k = 0; k < size; ++k) state.out[row][k] += found[row * MOST_SIZE + k];
}

// Tokens in floating point. `seen`: how many of the tokens each row sees, counted from the first.
void attend_tokens(Softmax &state, const float *const *query, const int64_t *seen, const char *keys, const char *values,
                   int dtype, int64_t first, int64_t stop) {
    alignas(64) float scores[MOST_ROWS][AT_ONCE];
    alignas(64) float buffer[FEW][MOST_SIZE];
    const int64_t size = state.size, token_bytes = size * (dtype == QM_FP32 ? 4 : 2), n = stop - first;
    for (int64_t t = 0; t < n; t += FEW) {
        const int64_t count = n - t < FEW ? n - t : FEW;
        const float *key[FEW];
        for (int64_t i = 0; i < FEW; ++i) // the last ones again, if there are fewer
            key[i] = widened(keys + (first + t + (i < count ? i : 0)) * token_bytes, dtype, size, buffer[i]);
        for (int64_t row = 0; row < state.rows; ++row) {
            F total[FEW] = {};
            for (int64_t k = 0; k < size; k += WIDE) {
                const F values = read(query[row] + k);
                for (int64_t i = 0; i < FEW; ++i) total[i] = total[i] + values * read(key[i] + k);
            }
            for (int64_t i = 0; i < count; ++i) scores[row][t + i] = sum(total[i]);
        }
    }
    for (int64_t row = 0; row < state.rows; ++row) {
        const int64_t visible = seen[row] - first < n ? seen[row] - first : n;
        if (visible < 1) memset(scores[row], 0, sizeof scores[row]);
        else {
            Softmax::weigh(state, row, scores[row], visible);
            for (int64_t t = (visible + WIDE - 1) / WIDE * WIDE; t < n; ++t) scores[row][t] = 0.0f;
        }
    }
    for (int64_t t = 0; t < n; t += FEW) {
        const int64_t count = n - t < FEW ? n - t : FEW;
        const float *value[FEW];
        for (int64_t i = 0; i < FEW; ++i)
            value[i] = widened(values + (first + t + (i < count ? i : 0)) * token_bytes, dtype, size, buffer[i]);
        for (int64_t row = 0; row < state.rows; ++row) {
            F weight[FEW];
            for (int64_t i = 0; i < FEW; ++i) weight[i] = fill(i < count ? scores[row][t + i] : 0.0f);
            for (int64_t k = 0; k < size; k += WIDE) {
                F found = read(state.out[row] + k);
                for (int64_t i = 0; i < FEW; ++i) found = found + weight[i] * read(value[i] + k);
                write(state.out[row] + k, found);
            }
        }
    }
}

void attend_rows(const qm_attention &all, int64_t sequence, int64_t head, int64_t first, int64_t rows) {
    const int64_t group = all.query_heads / all.key_heads, size = all.head_size;
    Softmax state;
    alignas(64) float scaled[MOST_ROWS][MOST_SIZE];
    const float *query[MOST_ROWS];
    int64_t seen[MOST_ROWS];
    state.rows = rows, state.size = size;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t position = (first + row) / group, member = (first + row) % group;
        const float *from = all.query + ((sequence * all.length + position) * all.query_heads + head * group + member) * size;
        for (int64_t k = 0; k < size; ++k) scaled[row][k] = from[k] * all.scale;
        query[row] = scaled[row];
        seen[row] = all.tokens - all.length + position + 1;
        state.largest[row] = -3.4028235e38f;
        state.sums[row] = 0.0f;
        memset(state.out[row], 0, sizeof state.out[row]);
    }
    alignas(64) int16_t integers[MOST_ROWS * MOST_SIZE];
    alignas(64) float work[MOST_SIZE];
    float units[MOST_ROWS];
    const int64_t stride = (size + 31) / 32 * 32;
    if (all.n_blocks)
        for (int64_t row = 0; row < rows; ++row)
            quantize_row(query[row], QM_FP32, size, nullptr, 0, false, work, integers + row * stride, units + row);
    const auto block_of = [&](int64_t number) {
        const int64_t block = sequence * all.n_blocks + number, at = head * all.block_tokens;
        return Block{all.block_keys[block] + at * size, all.block_values[block] + at * size, all.key_scales[block] + at,
                     all.value_scales[block] + at};
    };
    for (int64_t number = 0; number < all.n_blocks; ++number) {
        const Block block = block_of(number);
        const Block next = number + 1 < all.n_blocks ? block_of(number + 1) : block;
        attend_block(state, integers, units, block, next, all.block_tokens);
    }
    const int64_t offset = (sequence * all.sequence_stride + head * all.head_stride) * (all.cache_dtype == QM_FP32 ? 4 : 2);
    for (int64_t start = 0; start < all.tokens; start += AT_ONCE)
        attend_tokens(state, query, seen, (const char *)all.keys + offset, (const char *)all.values + offset,
                      int(all.cache_dtype), start, all.tokens - start < AT_ONCE ? all.tokens : start + AT_ONCE);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t position = (first + row) / group, member = (first + row) % group;
        float *to = all.out + ((sequence * all.length + position) * all.query_heads + head * group + member) * size;
        for (int64_t k = 0; k < size; ++k) to[k] = state.out[row][k] / state.sums[row];
    }
}

void attend(const qm_attention &all, int64_t sequence, int64_t head) {
    const int64_t rows = all.length * (all.query_heads / all.key_heads);
    for (int64_t first = 0; first < rows; first += MOST_ROWS)
        attend_rows(all, sequence, head, first, rows - first < MOST_ROWS ? rows - first : MOST_ROWS);
}

} // namespace
