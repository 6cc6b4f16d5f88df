// AVX2 with VNNI: Intel laptops since Alder Lake; AMD since Zen 5.
#include "kernels.h"

#if defined(__x86_64__)
#ifndef QM_PLAIN // the compiler does not know it: the code of AVX2
#define QM_BYTES
#endif
#include "vectors_avx2.h"
#include "products.inl"
#include "codes.inl"
#include "floats.inl"
#include "layer.inl"
#include "full_attention.inl"

extern const Kernels avxvnni_kernels = {
    "avxvnni", few_rows, many_rows, few_rows_of_codes, expand_codes, encode_row, encode_compensated, float_rows, PANEL, 16,
#ifdef QM_BYTES
    &byte_products,
#else
    nullptr,
#endif
    quantize_row, rms_norm, rotate_head, silu_product, convert, add, attend, pack_tokens, attend_full};
#endif
