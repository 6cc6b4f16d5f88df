// Calls one kernel of the native core once, for valgrind to count its instructions: `kernels LIBRARY SET KERNEL`.
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "core.h"

namespace {

template <class T> std::vector<T> filled(int64_t n) {
    std::vector<T> values(static_cast<size_t>(n));
    uint32_t state = 12345;
    for (T &value : values) {
        state = state * 1664525 + 1013904223;
        value = T(int32_t(state >> 16) % 127 - 63);
    }
    return values;
}

int64_t padded(int64_t columns) { return (columns + QM_COLUMN_MULTIPLE - 1) / QM_COLUMN_MULTIPLE * QM_COLUMN_MULTIPLE; }

struct Library {
    void *at;
    template <class F> F *function(const char *name, F *) const { return (F *)dlsym(at, name); }
};
#define CALL(name) library.function(#name, &name)

void linear(const Library &library, int64_t rows) {
    const int64_t columns = 2048, n = 512;
    const auto integers = filled<int16_t>(rows * padded(columns));
    const auto scale = filled<float>(rows), weight_scale = filled<float>(n);
    const auto weights = filled<int8_t>(n * columns);
    std::vector<float> out(static_cast<size_t>(rows * n));
    const qm_weight weight = {weights.data(), weight_scale.data(), nullptr, 0, n, columns, nullptr, QM_INT8_ROWS};
    CALL(qm_linear)(integers.data(), scale.data(), rows, &weight, out.data(), QM_FP32, n, 0, 1);
}

void codes(const Library &library, int64_t rows) {
    const int64_t columns = 2048, n = 512;
    const auto integers = filled<int16_t>(rows * padded(columns));
    const auto scale = filled<float>(rows), weight_scale = filled<float>(n);
    const auto data = filled<int8_t>(n * (columns / 16 + columns / 2)), tables = filled<int8_t>(256 * 16);
    std::vector<float> out(static_cast<size_t>(rows * n));
    const qm_weight weight = {data.data(), weight_scale.data(), nullptr, 0, n, columns, tables.data(), QM_INT4_ROWS};
    CALL(qm_linear)(integers.data(), scale.data(), rows, &weight, out.data(), QM_FP32, n, 0, 1);
}

void quantize(const Library &library) {
    const int64_t rows = 16, columns = 6144, block = 2048;
    const auto x = filled<float>(rows * columns), signs = std::vector<float>(size_t(block), 1.0f);
    std::vector<int16_t> integers(static_cast<size_t>(rows * columns));
    std::vector<float> scale(static_cast<size_t>(rows));
    CALL(qm_quantize)(x.data(), QM_FP32, rows, columns, columns, signs.data(), block, 0, integers.data(), scale.data(), 1);
}

void attention(const Library &library) {
    const int64_t heads = 16, keys = 8, size = 128, tokens = 256, blocks = 8, tail = 64;
    const auto query = filled<float>(heads * size), newest = filled<float>(2 * keys * tail * size);
    const auto block = filled<int8_t>(keys * tokens * size);
    const std::vector<uint16_t> scales(size_t(keys * tokens), 0x3c23); // bf16 of 0.01
    const std::vector<const int8_t *> data(size_t(blocks), block.data());
    const std::vector<const uint16_t *> units(size_t(blocks), scales.data());
    std::vector<float> out(static_cast<size_t>(heads * size));
    const qm_attention job = {query.data(), 1, 1, heads, keys, size, 0.001f, blocks, tokens, data.data(), data.data(),
                              units.data(), units.data(), newest.data(), newest.data() + keys * tail * size, QM_FP32,
                              keys * tail * size, tail * size, tail, out.data()};
    CALL(qm_attend)(&job, 1);
}

void full_attention(const Library &library) {
    const int64_t tokens = 576, heads = 4, size = 64, stride = 3 * heads * size;
    const auto all = filled<float>(tokens * stride);
    std::vector<float> out(static_cast<size_t>(tokens * heads * size));
    qm_full_attention job = {all.data(), all.data() + heads * size, all.data() + 2 * heads * size, QM_FP32, tokens, heads, size,
                             stride, 0.001f, out.data(), heads * size, nullptr};
    std::vector<char> work(size_t(CALL(qm_full_attention_bytes)(&job)));
    job.work = work.data();
    CALL(qm_attend_all)(&job, 1);
}

} // namespace

int main(int count, char **arguments) {
    const Library library = {count == 4 ? dlopen(arguments[1], RTLD_NOW) : nullptr};
    if (!library.at) {
        fprintf(stderr, "%s\n", count == 4 ? dlerror() : "usage: kernels LIBRARY SET KERNEL");
        return 2;
    }
    const char *set = CALL(qm_select)(arguments[2]), *kernel = arguments[3];
    if (!set || strcmp(set, arguments[2])) return 3; // this processor does not have it
    if (!strcmp(kernel, "attention")) attention(library);
    else if (!strcmp(kernel, "full_attention")) full_attention(library);
    else if (!strcmp(kernel, "quantize")) quantize(library);
    else {
        int rows = 0;
        if (sscanf(kernel, "rows_%d", &rows) == 1 && rows > 0) linear(library, rows);
        else if (sscanf(kernel, "codes_%d", &rows) == 1 && rows > 0) codes(library, rows);
        else return 2;
    }
    return 0;
}
