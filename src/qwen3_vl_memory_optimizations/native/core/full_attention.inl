// Attention of all tokens to all, as in a vision tower: in tiles, without a matrix of tokens by tokens.
//
// Queries, keys and values are rounded to 12-bit integers with one scale per token and head, the weights of tokens to 14
// bits with one scale per tile: 64 * 16,383 * 2,047 < 2^31. AVX2 multiplies these twice as fast as floats.

namespace {

constexpr int64_t TWELVE_BITS = 2047, SUMMED_TOKENS = 64;
constexpr int64_t TILE_TOKENS = FULL_TILE, TILE_ROWS = FULL_ROWS, MOST_FEATURES = 128;

// Write values as integers, zeros up to `padded`; return the value of one unit.
ALWAYS_INLINE float round_row(const float *values, int64_t n, int64_t padded, int16_t *integers) {
    const int32_t bits = largest_size(values, n);
    float largest;
    memcpy(&largest, &bits, 4);
    const bool usable = bits < 0x7f800000 && largest >= 1e-30f;
    const float factor = usable ? float(TWELVE_BITS) / largest : 0.0f;
    int64_t k = 0;
    if (usable)
        for (; k + WIDE <= n; k += WIDE) write_rounded(integers + k, read(values + k) * factor);
    if (usable && k < n) {
        float rest[WIDE] = {0};
        int16_t last[WIDE];
        memcpy(rest, values + k, size_t(n - k) * 4);
        write_rounded(last, read(rest) * factor);
        for (; k < n; ++k) integers[k] = last[k % WIDE];
    }
    for (; k < padded; ++k) integers[k] = 0;
    return usable ? largest / float(TWELVE_BITS) : bits < 0x7f800000 ? 0.0f : __builtin_nanf("");
}

ALWAYS_INLINE const float *token_of(const qm_full_attention &all, const void *from, int64_t head, int64_t token, float *buffer) {
    const int64_t at = token * all.token_stride + head * all.head_size;
    return widened((const char *)from + at * (all.dtype == QM_FP32 ? 4 : 2), int(all.dtype), all.head_size, buffer);
}

// One tile of keys and values of one head: panels of PANEL tokens by pairs of features, and of PANEL features by pairs of
// tokens. What is missing is zero.
void pack_tokens(const qm_full_attention &all, const FullTile &to, int64_t head, int64_t first) {
    const int64_t size = all.head_size, n = all.tokens - first < TILE_TOKENS ? all.tokens - first : TILE_TOKENS;
    float buffer[MOST_FEATURES];
    int16_t integers[MOST_FEATURES];
    memset(to.values, 0, size_t(full_features(size) * TILE_TOKENS) * 2);
    for (int64_t t = 0; t < TILE_TOKENS; ++t) {
        to.key_units[t] = to.value_units[t] = 0.0f;
        if (t < n) to.key_units[t] = round_row(token_of(all, all.keys, head, first + t, buffer), size, size, integers);
        else memset(integers, 0, sizeof integers);
        char *key = (char *)to.keys + t / PANEL * size * PANEL * 2 + t % PANEL * 4;
        for (int64_t pair = 0; pair < size / 2; ++pair) memcpy(key + pair * LINE, integers + 2 * pair, 4);
        if (t >= n) continue;
        to.value_units[t] = round_row(token_of(all, all.values, head, first + t, buffer), size, size, integers);
        for (int64_t k = 0; k < size; ++k)
            to.values[k / PANEL * TILE_TOKENS * PANEL + (t / 2 * PANEL + k % PANEL) * 2 + t % 2] = integers[k];
    }
}

void multiply_panel(const int16_t *x, int64_t x_stride, const int16_t *panel, int64_t lines, int64_t rows, int32_t *sums) {
    memset(sums, 0, size_t(rows * PANEL) * 4);
    int64_t j = 0;
    for (; j + V::TILE <= rows; j += V::TILE)
        tile<Words, V::TILE>(x + j * x_stride, x_stride, (const int8_t *)panel, lines, sums + j * PANEL);
    if (j < rows)
        last_tile<Words, V::TILE - 1>(rows - j, x + j * x_stride, x_stride, (const int8_t *)panel, lines, sums + j * PANEL);
}

// How TILE_ROWS rows of one head stand, tile after tile (online softmax).
struct Rows {
    alignas(64) int16_t query[TILE_ROWS * MOST_FEATURES], weights[TILE_ROWS * TILE_TOKENS];
    alignas(64) float scores[TILE_ROWS * TILE_TOKENS], out[TILE_ROWS * MOST_FEATURES];
    alignas(64) int32_t sums[TILE_ROWS * PANEL];
    float units[TILE_ROWS], largest[TILE_ROWS], totals[TILE_ROWS], weight_units[TILE_ROWS];

    // Turn the scores of `n` tokens into weights, times the units of values, as integers.
    void weigh(int64_t j, int64_t n, int64_t features, const float *value_units) {
        float *row = scores + j * TILE_TOKENS, lanes[WIDE], now = largest[j];
        const int64_t wide = (n + WIDE - 1) / WIDE * WIDE;
        for (int64_t t = n; t < wide; ++t) row[t] = -__builtin_inff();
        F most = fill(now);
        for (int64_t t = 0; t < wide; t += WIDE) {
            const F values = read(row + t);
            most = choose(most < values, values, most);
        }
        write(lanes, most);
        for (float lane : lanes) now = lane > now ? lane : now;
        F total = {}, heaviest = {};
        for (int64_t t = 0; t < wide; t += WIDE) {
            const F weight = exponential(read(row + t) - fill(now)), product = weight * read(value_units + t);
            total = total + weight;
            heaviest = choose(heaviest < product, product, heaviest);
            write(row + t, product);
        }
        write(lanes, heaviest);
        float peak = 0.0f;
        for (float lane : lanes) peak = lane > peak ? lane : peak;
        const F factor = fill(peak > 1e-30f ? float(QM_LEVELS) / peak : 0.0f);
        for (int64_t t = 0; t < wide; t += WIDE) write_rounded(weights + j * TILE_TOKENS + t, read(row + t) * factor);
        weight_units[j] = peak / float(QM_LEVELS);
        const float kept = totals[j] > 0.0f ? first_of(exponential(fill(largest[j] - now))) : 0.0f;
        largest[j] = now;
        totals[j] = totals[j] * kept + sum(total);
        if (kept != 1.0f)
            for (int64_t k = 0; k < features; k += WIDE) write(out + j * MOST_FEATURES + k, read(out + j * MOST_FEATURES + k) * kept);
    }
};

void attend_full(const qm_full_attention &all, const FullTile *tiles, int64_t head, int64_t first) {
    const int64_t size = all.head_size, rows = all.tokens - first < TILE_ROWS ? all.tokens - first : TILE_ROWS;
    const int64_t features = full_features(size);
    Rows state;
    memset(state.out, 0, sizeof state.out);
    memset(state.weights, 0, sizeof state.weights);
    for (int64_t j = 0; j < rows; ++j) {
        float buffer[MOST_FEATURES];
        const float *query = token_of(all, all.query, head, first + j, buffer);
        state.units[j] = round_row(query, size, size, state.query + j * size) * all.scale;
        state.largest[j] = -3.4028235e38f;
        state.totals[j] = 0.0f;
    }
    for (int64_t start = 0; start < all.tokens; start += TILE_TOKENS, ++tiles) {
        const int64_t n = all.tokens - start < TILE_TOKENS ? all.tokens - start : TILE_TOKENS;
        for (int64_t t = 0; t < n; t += PANEL) {
            multiply_panel(state.query, size, tiles->keys + t * size, size / 2, rows, state.sums);
            for (int64_t j = 0; j < rows; ++j)
                for (int i = 0; i < PANEL; i += WIDE)
                    write(state.scores + j * TILE_TOKENS + t + i,
                          read_integers(state.sums + j * PANEL + i) * (read(tiles->key_units + t + i) * state.units[j]));
        }
        for (int64_t j = 0; j < rows; ++j) state.weigh(j, n, features, tiles->value_units);
        for (int64_t k = 0; k < features; k += PANEL)
            for (int64_t t = 0; t < n; t += SUMMED_TOKENS) {
                const int64_t lines = (n - t < SUMMED_TOKENS ? n - t + 1 : SUMMED_TOKENS) / 2;
                multiply_panel(state.weights + t, TILE_TOKENS, tiles->values + k * TILE_TOKENS + t * PANEL, lines, rows, state.sums);
                for (int64_t j = 0; j < rows; ++j)
                    for (int i = 0; i < PANEL; i += WIDE) {
                        float *to = state.out + j * MOST_FEATURES + k + i;
                        write(to, read(to) + read_integers(state.sums + j * PANEL + i) * state.weight_units[j]);
                    }
            }
    }
    for (int64_t j = 0; j < rows; ++j) {
        const int64_t at = (first + j) * all.out_stride + head * size;
        float *found = state.out + j * MOST_FEATURES;
        for (int64_t k = 0; k < size; ++k) found[k] /= state.totals[j];
        convert(found, size, (char *)all.out + at * (all.dtype == QM_FP32 ? 4 : 2), int(all.dtype));
    }
}

} // namespace
