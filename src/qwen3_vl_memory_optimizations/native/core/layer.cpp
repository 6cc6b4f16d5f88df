#include "core.h"

#include <string.h>

#include "kernels.h"
#include "pool.h"
#include "selected.h"

namespace {

int64_t padded(int64_t columns) {
    return (columns + QM_COLUMN_MULTIPLE - 1) / QM_COLUMN_MULTIPLE * QM_COLUMN_MULTIPLE;
}

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Parts of the work memory, each at a multiple of 64 bytes.
struct Work {
    char *at;
    template <class T> T *take(int64_t n) {
        T *part = (T *)at;
        at += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
        return part;
    }
};

// Rows of floats on their way into a product.
struct Left {
    float *values;
    int16_t *integers;
    float *scale;

    Left(Work &work, int64_t rows, int64_t columns)
        : values(work.take<float>(rows * columns)), integers(work.take<int16_t>(rows * padded(columns))),
          scale(work.take<float>(rows)) {}

    void multiply(int64_t rows, const qm_weight &weight, float *out, int n_threads) {
        if (weight.format == QM_BF16_ROWS || weight.format == QM_FP16_ROWS)
            return qm_float_linear(values, rows, &weight, out, QM_FP32, weight.rows, n_threads);
        for (int64_t row = 0; row < rows; ++row) {
            float *x = values + row * weight.columns;
            kernels->quantize_row(x, QM_FP32, weight.columns, weight.signs, weight.block, false, x,
                                  integers + row * padded(weight.columns), scale + row);
        }
        qm_linear(integers, scale, rows, &weight, out, QM_FP32, weight.rows, 0, n_threads);
    }
};

const char *row_of(const void *x, int64_t dtype, int64_t row, int64_t columns) {
    return (const char *)x + row * columns * (dtype == QM_FP32 ? 4 : 2);
}

struct AttentionLoop {
    const qm_attention *all;
};

void attention_chunk(void *context, int64_t chunk) {
    const qm_attention &all = *((const AttentionLoop *)context)->all;
    kernels->attend(all, chunk / all.key_heads, chunk % all.key_heads);
}

// Some heads at a time: the work memory is that of these.
constexpr int64_t HEADS_TOGETHER = 4;

struct FullLoop {
    const qm_full_attention &all;
    FullTile *tiles;
    int64_t head, n_tiles, n_rounds; // first head; tiles and rounds of rows of each
};

void pack_chunk(void *context, int64_t chunk) {
    const FullLoop &loop = *(const FullLoop *)context;
    const int64_t tile = chunk % loop.n_tiles;
    kernels->pack_tokens(loop.all, loop.tiles[chunk], loop.head + chunk / loop.n_tiles, tile * FULL_TILE);
}

void full_chunk(void *context, int64_t chunk) {
    const FullLoop &loop = *(const FullLoop *)context;
    const int64_t head = chunk / loop.n_rounds;
    kernels->attend_full(loop.all, loop.tiles + head * loop.n_tiles, loop.head + head, chunk % loop.n_rounds * FULL_ROWS);
}

// Places the tiles of some heads in the work memory.
FullTile *full_tiles(Work &work, const qm_full_attention &all) {
    const int64_t n = (all.tokens + FULL_TILE - 1) / FULL_TILE * HEADS_TOGETHER;
    FullTile *tiles = work.take<FullTile>(n);
    for (int64_t i = 0; i < n; ++i) {
        const FullTile tile = {work.take<int16_t>(all.head_size * FULL_TILE),
                               work.take<int16_t>(full_features(all.head_size) * FULL_TILE), work.take<float>(FULL_TILE),
                               work.take<float>(FULL_TILE)};
        if (all.work) tiles[i] = tile;
    }
    return tiles;
}

} // namespace

int64_t qm_full_attention_bytes(const qm_full_attention *attention) {
    qm_full_attention all = *attention;
    all.work = nullptr;
    Work work = {nullptr};
    full_tiles(work, all);
    return int64_t(work.at - (char *)nullptr) + 64;
}

void qm_attend_all(const qm_full_attention *attention, int n_threads) {
    const qm_full_attention &all = *attention;
    Work work = {(char *)((uintptr_t(all.work) + 63) / 64 * 64)};
    FullLoop loop = {all, full_tiles(work, all), 0, (all.tokens + FULL_TILE - 1) / FULL_TILE,
                     (all.tokens + FULL_ROWS - 1) / FULL_ROWS};
    for (; loop.head < all.heads; loop.head += HEADS_TOGETHER) {
        const int64_t heads = all.heads - loop.head < HEADS_TOGETHER ? all.heads - loop.head : HEADS_TOGETHER;
        share_out(pack_chunk, &loop, heads * loop.n_tiles, n_threads);
        share_out(full_chunk, &loop, heads * loop.n_rounds, n_threads);
    }
}

int64_t qm_start_layer_bytes(const qm_layer_start *layer) {
    const int64_t rows = layer->sequences * layer->length;
    Work work = {nullptr};
    Left(work, rows, layer->columns);
    work.take<float>(rows * layer->weight.rows);
    return int64_t(work.at - (char *)nullptr);
}

void qm_start_layer(const qm_layer_start *layer, int n_threads) {
    const qm_layer_start &all = *layer;
    const int64_t rows = all.sequences * all.length, size = all.head_size;
    Work work = {(char *)all.work};
    Left left(work, rows, all.columns);
    float *heads = work.take<float>(rows * all.weight.rows);
    for (int64_t row = 0; row < rows; ++row)
        kernels->rms_norm(row_of(all.hidden, all.dtype, row, all.columns), int(all.dtype), all.columns, all.norm,
                          all.norm_epsilon, left.values + row * all.columns);
    left.multiply(rows, all.weight, heads, n_threads);
    const int item = all.cache_dtype == QM_FP32 ? 4 : 2;
    for (int64_t row = 0; row < rows; ++row) {
        float *x = heads + row * all.weight.rows;
        const float *cosine = all.cosine + row * size, *sine = all.sine + row * size;
        for (int64_t head = 0; head < all.query_heads + all.key_heads; ++head)
            kernels->rotate_head(x + head * size, size, head < all.query_heads ? all.query_norm : all.key_norm,
                                 all.head_epsilon, cosine, sine);
        memcpy(all.query + row * all.query_heads * size, x, size_t(all.query_heads * size) * 4);
        const int64_t at = row / all.length * all.sequence_stride + row % all.length * size;
        for (int64_t head = 0; head < all.key_heads; ++head) {
            const float *key = x + (all.query_heads + head) * size, *value = key + all.key_heads * size;
            const int64_t to = (at + head * all.head_stride) * item;
            kernels->convert(key, size, (char *)all.keys + to, int(all.cache_dtype));
            kernels->convert(value, size, (char *)all.values + to, int(all.cache_dtype));
        }
    }
}

void qm_attend(const qm_attention *attention, int n_threads) {
    AttentionLoop loop = {attention};
    const int64_t tokens = attention->n_blocks * attention->block_tokens + attention->tokens;
    // Few tokens are done before another thread would have begun.
    const bool few = tokens * attention->head_size * attention->key_heads * attention->length < 16 * 1024;
    share_out(attention_chunk, &loop, attention->sequences * attention->key_heads, few ? 1 : n_threads);
}

int64_t qm_end_layer_bytes(const qm_layer_end *layer) {
    Work work = {nullptr};
    Left(work, layer->rows, most(layer->attention.columns, most(layer->columns, layer->down.columns)));
    work.take<float>(layer->rows * most(layer->gate_up.rows, layer->columns));
    work.take<float>(layer->rows * layer->columns);
    return int64_t(work.at - (char *)nullptr);
}

void qm_end_layer(const qm_layer_end *layer, int n_threads) {
    const qm_layer_end &all = *layer;
    const int64_t rows = all.rows, columns = all.columns, inner = all.down.columns;
    Work work = {(char *)all.work};
    Left left(work, rows, most(all.attention.columns, most(columns, inner)));
    float *found = work.take<float>(rows * most(all.gate_up.rows, columns));
    float *middle = work.take<float>(rows * columns);
    memcpy(left.values, all.attended, size_t(rows * all.attention.columns) * 4);
    left.multiply(rows, all.attention, found, n_threads);
    for (int64_t row = 0; row < rows; ++row) {
        kernels->add(row_of(all.hidden, all.dtype, row, columns), int(all.dtype), found + row * columns, columns,
                     middle + row * columns, QM_FP32);
        kernels->rms_norm(middle + row * columns, QM_FP32, columns, all.norm, all.norm_epsilon, left.values + row * columns);
    }
    left.multiply(rows, all.gate_up, found, n_threads);
    for (int64_t row = 0; row < rows; ++row)
        kernels->silu_product(found + row * 2 * inner, found + row * 2 * inner + inner, inner, left.values + row * inner);
    left.multiply(rows, all.down, found, n_threads);
    for (int64_t row = 0; row < rows; ++row)
        kernels->add(middle + row * columns, QM_FP32, found + row * columns, columns,
                     (char *)all.out + row * columns * (all.dtype == QM_FP32 ? 4 : 2), int(all.dtype));
}

void qm_run_layers(const qm_layer *layers, int64_t n_layers, int n_threads) {
    for (const qm_layer *layer = layers; layer < layers + n_layers; ++layer) {
        qm_start_layer(&layer->start, n_threads);
        qm_attend(&layer->attention, n_threads);
        qm_end_layer(&layer->end, n_threads);
    }
}
