// Every function of the native core with random shapes, in memory of the exact size: for the sanitizers, which see what
// comparisons of results do not. Ends with 1 if instruction sets differ.
#include "core.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

namespace {

struct Random {
    uint64_t state;
    uint32_t next() {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return uint32_t(state >> 33);
    }
    int64_t up_to(int64_t most) { return 1 + int64_t(next() % uint64_t(most)); }
    float real() { return float(int32_t(next() % 20001) - 10000) / 5000.0f; }
};

template <class T> struct Memory { // malloc, so that the first byte behind it is watched
    T *at;
    int64_t n;
    explicit Memory(int64_t size) : at((T *)malloc(size_t(size) * sizeof(T))), n(size) { memset(at, 0, size_t(size) * sizeof(T)); }
    Memory(const Memory &) = delete;
    ~Memory() { free(at); }
    Memory &fill(Random &random) {
        for (int64_t i = 0; i < n; ++i) at[i] = T(sizeof(T) == 1 ? int(random.next() % 255) - 127 : random.real());
        return *this;
    }
    bool same(const Memory &other) const { return !memcmp(at, other.at, size_t(n) * sizeof(T)); }
};

int64_t padded(int64_t columns) { return (columns + QM_COLUMN_MULTIPLE - 1) / QM_COLUMN_MULTIPLE * QM_COLUMN_MULTIPLE; }

bool product(Random &random, const char *const *sets, int n_threads) {
    const int bytes = int(random.next() % 2);
    const int64_t rows = random.up_to(40), columns = random.up_to(2100), n = random.up_to(80);
    Memory<float> x(rows * columns), weight_scale(n);
    Memory<int8_t> weights(n * columns);
    x.fill(random), weight_scale.fill(random), weights.fill(random);
    bool same = true;
    Memory<float> first(rows * n);
    for (int i = 0; sets[i]; ++i) {
        if (n_threads == 1) qm_select(sets[i]);
        Memory<int16_t> integers(rows * padded(columns));
        Memory<float> scale(rows), out(rows * n);
        const int fit = qm_quantize(x.at, QM_FP32, rows, columns, columns, nullptr, 0, bytes, integers.at, scale.at, n_threads);
        const qm_weight weight = {weights.at, weight_scale.at, nullptr, 0, n, columns, nullptr, QM_INT8_ROWS};
        qm_linear(integers.at, scale.at, rows, &weight, out.at, QM_FP32, n, fit, n_threads);
        if (i) same &= first.same(out);
        else memcpy(first.at, out.at, size_t(rows * n) * 4);
    }
    return same;
}

// Rows of 4 bits: encoded, and multiplied.
bool codes(Random &random, const char *const *sets, int n_threads) {
    const int bytes = int(random.next() % 2);
    const int64_t rows = random.up_to(40), columns = 64 * random.up_to(33), n = random.up_to(80);
    const int64_t n_values = 2 * QM_MOST_ENCODED + 1, row_bytes = columns / 16 + columns / 2;
    Memory<float> x(rows * columns), weight_scale(n), first(rows * n);
    Memory<int8_t> tables(QM_TABLES * 16), first_data(n * row_bytes);
    Memory<uint16_t> errors(n_values * QM_TABLES);
    Memory<uint8_t> nearest(QM_TABLES * n_values);
    Memory<int16_t> values(n * columns);
    x.fill(random), weight_scale.fill(random), tables.fill(random);
    for (int64_t i = 0; i < errors.n; ++i) errors.at[i] = uint16_t(random.next() % 4096);
    for (int64_t i = 0; i < nearest.n; ++i) nearest.at[i] = uint8_t(random.next() % 16);
    for (int64_t i = 0; i < values.n; ++i) values.at[i] = int16_t(int(random.next() % n_values) - QM_MOST_ENCODED);
    bool same = true;
    for (int i = 0; sets[i]; ++i) {
        if (n_threads == 1) qm_select(sets[i]);
        Memory<int16_t> integers(rows * padded(columns));
        Memory<float> scale(rows), out(rows * n);
        Memory<int8_t> data(n * row_bytes);
        Memory<int64_t> products(2 * n);
        const qm_encoding encoding = {values.at, n, columns, tables.at, errors.at, nearest.at, (uint8_t *)data.at, products.at};
        qm_encode(&encoding, n_threads);
        const int fit = qm_quantize(x.at, QM_FP32, rows, columns, columns, nullptr, 0, bytes, integers.at, scale.at, n_threads);
        const qm_weight weight = {data.at, weight_scale.at, nullptr, 0, n, columns, tables.at, QM_INT4_ROWS};
        qm_linear(integers.at, scale.at, rows, &weight, out.at, QM_FP32, n, fit, n_threads);
        if (i) same &= first.same(out) && first_data.same(data);
        else memcpy(first.at, out.at, size_t(rows * n) * 4), memcpy(first_data.at, data.at, size_t(data.n));
    }
    return same;
}

bool floats(Random &random, const char *const *sets, int n_threads) {
    const int64_t rows = random.up_to(20), columns = random.up_to(2100), n = random.up_to(80);
    Memory<float> x(rows * columns), weight_scale(n), first(rows * n);
    Memory<uint16_t> weights(n * columns);
    x.fill(random), weight_scale.fill(random);
    const int64_t format = random.next() % 2 ? QM_BF16_ROWS : QM_FP16_ROWS;
    for (int64_t i = 0; i < weights.n; ++i) weights.at[i] = uint16_t(0x3c00 + random.next() % 512 + random.next() % 2 * 0x8000);
    bool same = true;
    for (int i = 0; sets[i]; ++i) {
        if (n_threads == 1) qm_select(sets[i]);
        Memory<float> out(rows * n);
        const qm_weight weight = {weights.at, weight_scale.at, nullptr, 0, n, columns, nullptr, format};
        qm_float_linear(x.at, rows, &weight, out.at, QM_FP32, n, n_threads);
        if (i) same &= first.same(out);
        else memcpy(first.at, out.at, size_t(rows * n) * 4);
    }
    return same;
}

bool layer(Random &random, const char *const *sets) {
    const int64_t sequences = random.up_to(3), length = random.up_to(5), size = 16 * random.up_to(8), keys = random.up_to(3);
    const int64_t queries = keys * random.up_to(3), columns = 64 * random.up_to(4), inner = 32 * random.up_to(9);
    const int64_t rows = sequences * length, before = random.up_to(300), tokens = before + length, blocks = random.next() % 3;
    const int64_t in_block = 64, heads = queries + 2 * keys;
    Memory<float> hidden(rows * columns), norm(columns), head_norm(size), cosine(rows * size), sine(rows * size), signs(32);
    Memory<int8_t> w_in(heads * size * columns), w_out(columns * queries * size), w_up(2 * inner * columns), w_down(columns * inner);
    Memory<float> s_in(heads * size), s_out(columns), s_up(2 * inner), s_down(columns);
    for (auto *each : {&hidden, &norm, &head_norm, &cosine, &sine, &s_in, &s_out, &s_up, &s_down}) each->fill(random);
    for (auto *each : {&w_in, &w_out, &w_up, &w_down}) each->fill(random);
    for (int i = 0; i < 32; ++i) signs.at[i] = random.next() % 2 ? 1.0f : -1.0f;
    Memory<float> cache(2 * sequences * keys * tokens * size);
    cache.fill(random);
    const int64_t n_blocks = sequences * blocks, block_size = keys * in_block * size;
    Memory<int8_t> block_data(2 * n_blocks * block_size + 1);
    block_data.fill(random);
    Memory<uint16_t> scales(2 * n_blocks * keys * in_block + 1);
    for (int64_t i = 0; i < scales.n; ++i) scales.at[i] = uint16_t(0x3c00 + random.next() % 128); // bf16 of about 0.01
    std::vector<const int8_t *> key_blocks, value_blocks;
    std::vector<const uint16_t *> key_scales, value_scales;
    for (int64_t i = 0; i < n_blocks; ++i) {
        key_blocks.push_back(block_data.at + 2 * i * block_size);
        value_blocks.push_back(block_data.at + (2 * i + 1) * block_size);
        key_scales.push_back(scales.at + 2 * i * keys * in_block);
        value_scales.push_back(scales.at + (2 * i + 1) * keys * in_block);
    }
    bool same = true;
    Memory<float> first(rows * columns);
    for (int i = 0; sets[i]; ++i) {
        qm_select(sets[i]);
        Memory<float> tail(cache.n), query(rows * queries * size), attended(rows * queries * size), out(rows * columns);
        memcpy(tail.at, cache.at, size_t(cache.n) * 4);
        float *tail_values = tail.at + cache.n / 2;
        qm_layer_start start = {hidden.at, QM_FP32, sequences, length, columns, norm.at,
                                {w_in.at, s_in.at, signs.at, 32, heads * size, columns, nullptr, QM_INT8_ROWS}, queries, keys, size, head_norm.at,
                                head_norm.at, cosine.at, sine.at, 1e-6f, 1e-6f, query.at, tail.at + before * size,
                                tail_values + before * size, QM_FP32, keys * tokens * size, tokens * size, nullptr};
        Memory<char> start_work(qm_start_layer_bytes(&start));
        start.work = start_work.at;
        qm_start_layer(&start, 2);
        qm_attention attention = {query.at, sequences, length, queries, keys, size, 0.1f, blocks, in_block,
                                  key_blocks.data(), value_blocks.data(), key_scales.data(), value_scales.data(), tail.at,
                                  tail_values, QM_FP32, keys * tokens * size, tokens * size, tokens, attended.at};
        qm_attend(&attention, 2);
        qm_layer_end end = {attended.at, {w_out.at, s_out.at, nullptr, 0, columns, queries * size, nullptr, QM_INT8_ROWS},
                            {w_up.at, s_up.at, signs.at, 32, 2 * inner, columns, nullptr, QM_INT8_ROWS},
                            {w_down.at, s_down.at, signs.at, 32, columns, inner, nullptr, QM_INT8_ROWS}, norm.at, 1e-6f, rows, columns, QM_FP32,
                            hidden.at, out.at, nullptr};
        Memory<char> end_work(qm_end_layer_bytes(&end));
        end.work = end_work.at;
        qm_end_layer(&end, 2);
        if (i) same &= first.same(out);
        else memcpy(first.at, out.at, size_t(out.n) * 4);
    }
    return same;
}

bool full_attention(Random &random, const char *const *sets, int n_threads) {
    const int64_t tokens = random.up_to(300), heads = random.up_to(6), size = 2 * random.up_to(64);
    Memory<float> all(3 * tokens * heads * size), first(tokens * heads * size);
    all.fill(random);
    bool same = true;
    for (int i = 0; sets[i]; ++i) {
        if (n_threads == 1) qm_select(sets[i]);
        Memory<float> out(first.n);
        const float *query = all.at, *keys = query + heads * size, *values = keys + heads * size;
        qm_full_attention job = {query, keys, values, QM_FP32, tokens, heads, size, 3 * heads * size, 0.2f, out.at,
                                 heads * size, nullptr};
        Memory<char> work(qm_full_attention_bytes(&job));
        job.work = work.at;
        qm_attend_all(&job, n_threads);
        if (i) same &= first.same(out);
        else memcpy(first.at, out.at, size_t(out.n) * 4);
    }
    return same;
}

void *others(void *seed) {
    Random random = {uint64_t((intptr_t)seed)};
    const char *const in_use[] = {"", nullptr};
    for (int i = 0; i < 20; ++i) product(random, in_use, 3);
    for (int i = 0; i < 10; ++i) codes(random, in_use, 3);
    for (int i = 0; i < 10; ++i) floats(random, in_use, 3);
    for (int i = 0; i < 3; ++i) full_attention(random, in_use, 3);
    return nullptr;
}

} // namespace

int main(int, char **arguments) {
    Random random = {12345};
    const char *best = qm_select(nullptr);
#if defined(__aarch64__)
    const char *const sets[] = {"portable", "dotprod", nullptr};
#else
    const char *const sets[] = {"portable", "avx2", "avxvnni", "avx512vnni", "amx", nullptr}; // or the best below each
#endif
    bool same = true;
    for (int i = 0; i < 60; ++i) same &= product(random, sets, 1);
    for (int i = 0; i < 30; ++i) same &= codes(random, sets, 1);
    for (int i = 0; i < 30; ++i) same &= floats(random, sets, 1);
    for (int i = 0; i < 60; ++i) same &= layer(random, sets);
    for (int i = 0; i < 10; ++i) same &= full_attention(random, sets, 1);
    qm_select(nullptr);
    pthread_t threads[3];
    for (intptr_t i = 0; i < 3; ++i) pthread_create(&threads[i], nullptr, others, (void *)(i + 1));
    for (auto thread : threads) pthread_join(thread, nullptr);
    printf("%s: %s\n", arguments[0] ? best : "", same ? "same bits" : "different bits");
    return same ? 0 : 1;
}
