// AVX2, FMA and F16C: every x86 processor since 2013 (Intel) and 2015 (AMD).
#include "kernels.h"

#if defined(__x86_64__)
#include "vectors_avx2.h"
#include "products.inl"
#include "codes.inl"
#include "floats.inl"
#include "layer.inl"
#include "full_attention.inl"

extern const Kernels avx2_kernels = {
    "avx2", few_rows, many_rows, few_rows_of_codes, expand_codes, encode_row, encode_compensated, float_rows, PANEL, 16,
    nullptr, quantize_row, rms_norm, rotate_head, silu_product, convert, add, attend, pack_tokens, attend_full};
#endif
