#include "core.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <atomic>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "pool.h"
#include "selected.h"

const Kernels *kernels = &portable_kernels;
const Rearranged *matrix_products = nullptr; // for two rows and more

namespace {

const char *const MATRIX_UNIT = "amx";
constexpr int64_t CHUNK_BYTES = 128 * 1024; // of weights: about 10 us, so that threads end together
constexpr int64_t FEW_BYTES = 64 * 1024;    // less than this is not worth waking a thread for
constexpr int64_t CHUNK_PRODUCTS = 4 << 20; // multiplications per chunk with many rows: about 100 us

#if defined(__x86_64__)
bool has(const char *name) {
#ifdef QM_EMULATED
    return name != nullptr;
#endif
    // By hand: the compiler in the wheel `ziglang` answers 0 to __builtin_cpu_supports.
    unsigned a, b, c, d, kept, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;
    __asm__("xgetbv" : "=a"(kept), "=d"(high) : "c"(0)); // the registers that the system keeps
    const bool fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!fma || !f16c || (kept & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return false;
    if (!strcmp(name, "avx2")) return true;
    if (!strcmp(name, "avxvnni")) return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
    return (kept & 0xe6) == 0xe6 && b >> 16 & 1 && b >> 30 & 1 && b >> 31 & 1 && c >> 11 & 1; // F, BW, VL, VNNI
}

const Kernels *const known[] = {&portable_kernels, &avx2_kernels, &avxvnni_kernels, &avx512vnni_kernels};
#elif defined(__aarch64__)
bool has(const char *) {
#if defined(__linux__)
    constexpr unsigned long DOT_PRODUCT = 1 << 20; // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & DOT_PRODUCT;
#else
    return true; // Apple
#endif
}

const Kernels *const known[] = {&portable_kernels, &dotprod_kernels};
#else
bool has(const char *) { return false; }
const Kernels *const known[] = {&portable_kernels};
#endif

#if defined(__x86_64__) && defined(__linux__)
// The matrix unit, if the processor has it and the system lets this process use it.
const Rearranged *matrix_unit() {
    unsigned a, b, c, d;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM
    if (!amx_products.product || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return nullptr;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) ? nullptr : &amx_products;
}
#else
const Rearranged *matrix_unit() { return nullptr; }
#endif

int64_t item_bytes(int dtype) { return dtype == QM_FP32 ? 4 : 2; }

// Compute columns `first` to `stop` of a result with a kernel for INT8 rows. 4-bit rows are written so first, some at a time,
// which stay in the cache.
template <class Kernel> void with_int8_rows(const Linear &product, int64_t first, int64_t stop, Kernel kernel) {
    if (!product.tables) return kernel(product, first, stop);
    int8_t *rows = (int8_t *)malloc(size_t(COLUMNS_TOGETHER * product.columns) + 64);
    if (!rows) return kernels->few_rows_of_codes(product, first, stop);
    for (; first < stop; first += COLUMNS_TOGETHER) {
        Linear part = product;
        part.n = stop - first < COLUMNS_TOGETHER ? stop - first : COLUMNS_TOGETHER;
        kernels->expand_codes(product, first, first + part.n, rows);
        part.tables = nullptr;
        part.weights = rows;
        part.weight_scale = product.weight_scale + first;
        part.out = (char *)product.out + first * item_bytes(product.dtype);
        kernel(part, int64_t(0), part.n);
    }
    free(rows);
}

struct LinearLoop {
    Linear product;
    int64_t step;
    bool many;
};

void linear_chunk(void *context, int64_t chunk) {
    const LinearLoop &loop = *(const LinearLoop *)context;
    const int64_t first = chunk * loop.step;
    const int64_t stop = first + loop.step < loop.product.n ? first + loop.step : loop.product.n;
    if (loop.many) with_int8_rows(loop.product, first, stop, kernels->many_rows);
    else (loop.product.tables ? kernels->few_rows_of_codes : kernels->few_rows)(loop.product, first, stop);
}

struct RearrangedLoop {
    const Rearranged &kernel;
    Linear product;
    int8_t *memory;
    int64_t step;
};

void rearrange_chunk(void *context, int64_t unit) {
    const RearrangedLoop &loop = *(const RearrangedLoop *)context;
    loop.kernel.rearrange(loop.product, unit, loop.memory);
}

void rearranged_chunk(void *context, int64_t chunk) {
    const RearrangedLoop &loop = *(const RearrangedLoop *)context;
    const int64_t first = chunk * loop.step;
    const int64_t stop = first + loop.step < loop.product.n ? first + loop.step : loop.product.n;
    with_int8_rows(loop.product, first, stop, [&](const Linear &part, int64_t from, int64_t to) {
        loop.kernel.product(part, loop.memory, from, to);
    });
}

// Returns false if there is no memory.
bool rearranged_product(const Rearranged &kernel, const Linear &all, int n_threads) {
    const int64_t at_once = all.rows < AT_MOST_ROWS ? all.rows : AT_MOST_ROWS;
    RearrangedLoop loop = {kernel, all, nullptr, COLUMNS_TOGETHER};
    if (posix_memalign((void **)&loop.memory, 64, size_t(kernel.needed_bytes(at_once, all.columns, all.bytes)) + 64)) return false;
    while (loop.step < AT_MOST_COLUMNS && loop.step * 8 * n_threads < all.n) loop.step *= 2;
    for (int64_t row = 0; row < all.rows; row += at_once) {
        Linear &product = loop.product;
        product.rows = all.rows - row < at_once ? all.rows - row : at_once;
        product.x = all.x + row * all.x_stride;
        product.x_scale = all.x_scale + row;
        product.out = (char *)all.out + row * all.out_stride * item_bytes(all.dtype);
        share_out(rearrange_chunk, &loop, kernel.n_units(product.rows, all.bytes), n_threads);
        share_out(rearranged_chunk, &loop, (all.n + loop.step - 1) / loop.step, n_threads);
    }
    free(loop.memory);
    return true;
}

struct QuantizeLoop {
    const char *x;
    int dtype;
    int64_t rows, columns, row_bytes, padded, step;
    const float *signs;
    int64_t block;
    bool bytes;
    int16_t *integers;
    float *scale;
    std::atomic<bool> is_wide; // some integers do not fit 8 bits
};

void quantize_chunk(void *context, int64_t chunk) {
    QuantizeLoop &loop = *(QuantizeLoop *)context;
    float *work = (float *)malloc(size_t(loop.columns) * sizeof(float) + 64);
    const int64_t stop = (chunk + 1) * loop.step < loop.rows ? (chunk + 1) * loop.step : loop.rows;
    for (int64_t row = chunk * loop.step; row < stop; ++row) {
        int16_t *integers = loop.integers + row * loop.padded;
        if (work) {
            if (!kernels->quantize_row(loop.x + row * loop.row_bytes, loop.dtype, loop.columns, loop.signs, loop.block,
                                       loop.bytes, work, integers, loop.scale + row))
                loop.is_wide.store(true, std::memory_order_relaxed);
        } else { // no memory: the results say so
            memset(integers, 0, size_t(loop.padded) * 2);
            loop.scale[row] = __builtin_nanf("");
        }
    }
    free(work);
}

struct FloatLoop {
    FloatLinear product;
    int64_t step;
};

void float_chunk(void *context, int64_t chunk) {
    const FloatLoop &loop = *(const FloatLoop *)context;
    const int64_t first = chunk * loop.step;
    kernels->float_rows(loop.product, first, first + loop.step < loop.product.n ? first + loop.step : loop.product.n);
}

void encode_chunk(void *context, int64_t row) { kernels->encode_row(*(const qm_encoding *)context, row); }

void compensated_chunk(void *context, int64_t row) { kernels->encode_compensated(*(const qm_compensation *)context, row); }

int64_t at_least_one(int64_t n) { return n < 1 ? 1 : n; }

} // namespace

int qm_abi(void) { return QM_ABI; }

const char *qm_select(const char *limit) {
    const bool any = !limit || !*limit, up_to_matrix_unit = any || !strcmp(limit, MATRIX_UNIT);
    bool is_known = up_to_matrix_unit;
    for (const Kernels *each : known) is_known |= !any && !strcmp(limit, each->name);
    if (!is_known) return nullptr;
    for (const Kernels *each : known) {
        if (each == &portable_kernels || has(each->name)) kernels = each;
        if (!any && !strcmp(limit, each->name)) break;
    }
    const bool all = kernels == known[sizeof known / sizeof *known - 1];
    matrix_products = up_to_matrix_unit && all ? matrix_unit() : nullptr;
    return matrix_products ? MATRIX_UNIT : kernels->name;
}

int qm_multiplies_bytes(void) { return kernels->bytes != nullptr; }

int qm_quantize(const void *x, int dtype, int64_t rows, int64_t columns, int64_t x_stride, const float *signs,
                 int64_t block, int bytes, int16_t *integers, float *scale, int n_threads) {
    const int64_t padded = (columns + QM_COLUMN_MULTIPLE - 1) / QM_COLUMN_MULTIPLE * QM_COLUMN_MULTIPLE;
    const int64_t row_bytes = x_stride * (dtype == QM_FP32 ? 4 : 2);
    const int64_t step = at_least_one(FEW_BYTES / at_least_one(4 * columns));
    QuantizeLoop loop = {(const char *)x, dtype, rows, columns, row_bytes, padded, step, signs, block, bytes != 0, integers, scale, {false}};
    share_out(quantize_chunk, &loop, (rows + step - 1) / step, n_threads);
    return bytes && !loop.is_wide.load(std::memory_order_relaxed);
}

void qm_encode(const qm_encoding *encoding, int n_threads) {
    share_out(encode_chunk, (void *)encoding, encoding->rows, n_threads);
}

void qm_encode_compensated(const qm_compensation *encoding, int n_threads) {
    share_out(compensated_chunk, (void *)encoding, encoding->rows, n_threads);
}

void qm_linear(const int16_t *integers, const float *scale, int64_t rows, const qm_weight *weight, void *out, int dtype,
               int64_t out_stride, int bytes, int n_threads) {
    const int64_t columns = weight->columns, n = weight->rows;
    if (rows < 1 || n < 1) return;
    const int64_t padded = (columns + QM_COLUMN_MULTIPLE - 1) / QM_COLUMN_MULTIPLE * QM_COLUMN_MULTIPLE;
    const Linear product = {integers, scale, rows, columns, padded, (const int8_t *)weight->data, weight->scale, n, out, dtype,
                            out_stride, bytes != 0, weight->format == QM_INT4_ROWS ? weight->tables : nullptr};
    const bool many = rows >= kernels->least_rows;
    const Rearranged *best = bytes && many ? kernels->bytes : nullptr;
    if (matrix_products && rows > 1 && n >= COLUMNS_TOGETHER && (many || !product.tables)) best = matrix_products;
    if (best && rearranged_product(*best, product, n_threads)) return;
    int64_t step;
    if (many) {
        const int64_t panel = product.tables ? COLUMNS_TOGETHER : kernels->panel;
        step = at_least_one(CHUNK_PRODUCTS / at_least_one(rows * columns * panel)) * panel;
    } else {
        step = at_least_one(CHUNK_BYTES / at_least_one(product.row_bytes() * (rows < 4 ? 1 : rows / 2)) / 8) * 8;
    }
    LinearLoop loop = {product, step, many};
    const int64_t n_chunks = (n + step - 1) / step;
    if (n * product.row_bytes() < FEW_BYTES && !many) { // done before a thread would have begun
        for (int64_t chunk = 0; chunk < n_chunks; ++chunk) linear_chunk(&loop, chunk);
        return;
    }
    share_out(linear_chunk, &loop, n_chunks, n_threads);
}

void qm_float_linear(const float *x, int64_t rows, const qm_weight *weight, void *out, int dtype, int64_t out_stride,
                     int n_threads) {
    const int64_t columns = weight->columns, n = weight->rows;
    if (rows < 1 || n < 1) return;
    const FloatLinear product = {x, rows, columns, (const uint16_t *)weight->data, weight->scale,
                                 weight->format == QM_BF16_ROWS, n, out, dtype, out_stride};
    FloatLoop loop = {product, at_least_one(CHUNK_BYTES / at_least_one(2 * columns * (rows < 4 ? 1 : rows / 2)) / 8) * 8};
    share_out(float_chunk, &loop, (n + loop.step - 1) / loop.step, n * columns * 2 < FEW_BYTES ? 1 : n_threads);
}
