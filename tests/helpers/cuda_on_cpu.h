// What decode.cu needs to compile as C++ for a CPU. The threads of a program run one after the other, up to the barrier
// and then from it on; the programs of a launch do too.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#define __host__
#define __device__
#define __constant__ static
#define __forceinline__ inline

struct uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct Index {
    unsigned x;
};

static Index threadIdx, blockIdx;

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int byte = 0; byte < 4; byte++) result |= unsigned(both >> 8 * (selector >> 4 * byte & 7) & 255) << 8 * byte;
    return result;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// fp16 to fp32.
inline float widened(unsigned half) {
    const unsigned sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) return uint_as_float(sign | 0x7f800000 | fraction << 13);
    const float magnitude = exponent ? uint_as_float((exponent + 112) << 23 | fraction << 13) : fraction * 0x1p-24f;
    return uint_as_float(__float_as_uint(magnitude) | sign);
}

// fp32 to fp16, to nearest, ties to even.
inline unsigned narrowed(float value) {
    const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000;
    const unsigned magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {
        // Subnormal: this sum rounds to a multiple of 2**-24.
        return sign | (__float_as_uint(uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f));
    }
    return sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10));
}

// fp16 products of two pairs, each rounded once: the product of two fp16 numbers is exact in fp32.
inline unsigned product(unsigned a, unsigned b) {
    return narrowed(widened(a & 0xffff) * widened(b & 0xffff)) | narrowed(widened(a >> 16) * widened(b >> 16)) << 16;
}

// The tables begin as garbage, as shared memory does.
#define KERNEL(NAME, ...)                                                                      \
    extern "C" void NAME(const Arguments* arguments, unsigned programs) {                      \
        typedef Format<__VA_ARGS__> F;                                                         \
        std::vector<Codes<F>> codes(THREADS);                                                  \
        Tables<F> tables;                                                                      \
        for (blockIdx.x = 0; blockIdx.x < programs; blockIdx.x++) {                            \
            memset(&tables, 0xa5, sizeof tables);                                              \
            for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++)                        \
                codes[threadIdx.x] = prepare<F>(*arguments, tables);                           \
            for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++)                        \
                decode<F>(*arguments, tables, codes[threadIdx.x]);                             \
        }                                                                                      \
    }
