// The decode of packed buffers (docs/FORMAT.md): one kernel per block format, one launch per weight.
//
// `cuda_decode.source` puts the definitions of one output dtype before this text:
//
//     BLOCK          weights per block
//     COLUMNS        neighbouring weights of a block that a thread decodes, 8: one 128-bit store of 16-bit numbers
//     THREADS        threads per program
//     OUTPUT         Fp16, Bf16 or Fp32
//     SCALE_OCTAVE   scale steps per octave, and SCALE_MANTISSAS, their ten mantissa bits
//     FORMATS(K)     K(name, levels, coarse radix, coarse digits, fine bits, window, blocks per unit) for each format
//
// There are no #include lines, because the run-time compiler has no headers. The tests compile the same text for a CPU:
// tests/helpers/cuda_on_cpu.h then supplies `product`, `widened`, the intrinsics and KERNEL.
//
// Threads. A thread decodes COLUMNS neighbouring weights of each block of one unit: so many consecutive blocks that
// whole groups of both planes belong to it. Eight threads share a unit, and a program has THREADS / 8 units.
//
// Lanes. A 32-bit word holds one number for each of four neighbouring weights (lanes of 8 bits), or of two (16 bits).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

constexpr int WORDS = COLUMNS / 4;                  // their bytes in a plane, in 32-bit words
constexpr int THREADS_PER_UNIT = BLOCK / COLUMNS;
constexpr int UNITS = THREADS / THREADS_PER_UNIT;   // units per program

__host__ __device__ constexpr u32 bytes_of(u32 value) { return value * 0x01010101u; }
__host__ __device__ constexpr u32 halves_of(u32 value) { return value * 0x00010001u; }
__host__ __device__ constexpr u32 low_bits(int count) { return (1u << count) - 1; }
__host__ __device__ constexpr int bits_for(int values) { return values <= 1 ? 0 : 1 + bits_for((values + 1) / 2); }

// Every pointer but `levels` is aligned to 16 bytes. `weights`, for as many `out` has room, is a multiple of COLUMNS.
struct Arguments {
    const u16* levels;
    const u8* coarse;
    const u8* fine;
    const u8* scales;
    u8* out;
    u32 weights;
};

template <int LEVELS_, int RADIX_, int DIGITS_, int FINE_BITS_, int WINDOW_, int BLOCKS_>
struct Format {
    static constexpr int LEVELS = LEVELS_, RADIX = RADIX_, DIGITS = DIGITS_, FINE_BITS = FINE_BITS_, WINDOW = WINDOW_;
    static constexpr int BLOCKS = BLOCKS_;                                 // blocks per unit
    static constexpr int GROUPS = BLOCKS / DIGITS;                         // groups of the coarse plane per unit
    static constexpr int FINE_DIGITS = FINE_BITS ? 8 / FINE_BITS : BLOCKS;
    static constexpr int FINE_GROUPS = FINE_BITS ? BLOCKS / FINE_DIGITS : 0;
    static constexpr int LEAD = WINDOW ? 1 : 0;                            // words before a thread's own, see `Codes`
    static constexpr int CODE_BITS = bits_for(RADIX) + FINE_BITS;
    static constexpr int NUMBER_BITS = WINDOW ? WINDOW : bits_for(LEVELS);
    // A table of pairs saves half of the look-ups. Larger ones would cost more to fill than they save.
    static constexpr bool PAIRS = !WINDOW && NUMBER_BITS <= 5;
    static constexpr int ENTRIES = 1 << (PAIRS ? 2 * NUMBER_BITS : NUMBER_BITS);
    static_assert(BLOCKS % DIGITS == 0 && BLOCKS % FINE_DIGITS == 0, "a unit has whole groups");
};

// What the threads of a program share.
template <class F>
struct Tables {
    u32 levels[F::ENTRIES];        // levels of two neighbouring weights, or one level in the low half
    u32 scales[UNITS * F::BLOCKS]; // each block's scale, in both halves
};

// The code bytes of a thread's columns. Trellis formats need the four columns before them too: word 0.
template <class F>
struct Codes {
    u32 coarse[F::GROUPS][F::LEAD + WORDS];
    u32 fine[F::FINE_GROUPS ? F::FINE_GROUPS : 1][F::LEAD + WORDS];
};

#ifdef __CUDACC__
// fp16 products of two pairs of numbers, each rounded once.
__device__ __forceinline__ u32 product(u32 a, u32 b) {
    u32 result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

__device__ __forceinline__ float widened(u32 half) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"((u16)half));
    return result;
}

#define KERNEL(NAME, ...)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const Arguments arguments) {   \
        typedef Format<__VA_ARGS__> F;                                                        \
        __shared__ Tables<F> tables;                                                          \
        const Codes<F> codes = prepare<F>(arguments, tables);                                 \
        __syncthreads();                                                                      \
        decode<F>(arguments, tables, codes);                                                  \
    }
#endif

// Output dtypes: `put` writes the words of two neighbouring weights, given as a pair of fp16 numbers.

struct Fp16 {
    typedef u16 Element;
    static __device__ __forceinline__ void put(u32* words, u32 pair) { words[0] = pair; }
};

struct Fp32 {
    typedef u32 Element;
    static __device__ __forceinline__ void put(u32* words, u32 pair) {
        words[0] = __float_as_uint(widened(pair & 0xffff));
        words[1] = __float_as_uint(widened(pair >> 16));
    }
};

struct Bf16 {
    typedef u16 Element;
    static __device__ __forceinline__ void put(u32* words, u32 pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[0]) : "f"(widened(pair >> 16)), "f"(widened(pair & 0xffff)));
#else
        words[0] = rounded(widened(pair & 0xffff)) | rounded(widened(pair >> 16)) << 16;
#endif
    }
    // To nearest, ties to even.
    static __device__ __forceinline__ u32 rounded(float value) {
        const u32 bits = __float_as_uint(value);
        return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
    }
};

constexpr int SEGMENT_BYTES = COLUMNS * sizeof(OUTPUT::Element);

__constant__ const u16 MANTISSAS[SCALE_OCTAVE] = {SCALE_MANTISSAS};

// The scale of a code, in both halves of a word. For damaged parameters it is wrong, like the table in scales.py.
__device__ __forceinline__ u32 scale_pair(int code, int exponent, int stride) {
    const int magnitude = code & 127;
    const int step = (magnitude - 1) * stride;
    const u32 bits = ((exponent + 15 + step / SCALE_OCTAVE) << 10) + MANTISSAS[step & (SCALE_OCTAVE - 1)];
    return magnitude ? halves_of((bits ^ (code & 128) << 8) & 0xffff) : 0;
}

// The levels or, for pairs, every two of them: the lower bits of the index are the number of the first weight's level.
template <class F>
__device__ __forceinline__ void fill_levels(const u16* levels, u32* table, u32 thread) {
    if (F::ENTRIES < THREADS && thread >= F::ENTRIES) return;
    static_assert(F::ENTRIES % THREADS == 0 || F::ENTRIES < THREADS, "all threads fill as many entries");
    if constexpr (F::PAIRS) {
        constexpr int numbers = 1 << F::NUMBER_BITS, last = F::LEVELS - 1;
        static_assert(THREADS % numbers == 0, "all entries of a thread have the same first level");
        // Only damaged buffers name a level past the last one.
        const int column = thread % numbers, row = thread / numbers;
        const u32 first = levels[column < last ? column : last];
#pragma unroll
        for (int start = 0; start < F::ENTRIES; start += THREADS) {
            const int second = row + start / numbers;
            table[start + thread] = first | (u32)levels[last + 1 == numbers || second < last ? second : last] << 16;
        }
    } else {
#pragma unroll
        for (int start = 0; start < F::ENTRIES; start += THREADS) table[start + thread] = (levels + thread)[start];
    }
}

// The code bytes of a thread's columns, in the groups of one plane that belong to its unit; zeros for groups past the
// plane's end. `words` has one or no word for the four columns before, then WORDS of the thread's own.
template <int GROUPS, int COUNT, int EACH>
__device__ __forceinline__ void load_groups(
    u32 (&words)[COUNT][EACH], const u8* plane, u32 unit, u32 groups, u32 column) {
    constexpr int lead = EACH - WORDS;
    const u32 before = (column - 4) & (BLOCK - 1);  // a block's stream is circular
    const u8* first = plane + (unsigned long long)unit * (GROUPS * BLOCK);
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        uint2 own = {0, 0};
        u32 earlier = 0;
        if (unit * GROUPS + group < groups) {
            own = *reinterpret_cast<const uint2*>(first + group * BLOCK + column);
            if (lead) earlier = *reinterpret_cast<const u32*>(first + group * BLOCK + before);
        }
        if (lead) words[group][0] = earlier;
        words[group][lead] = own.x;
        words[group][lead + 1] = own.y;
    }
}

// Fill the tables, and load the codes. The threads must wait for each other afterwards.
template <class F>
__device__ __forceinline__ Codes<F> prepare(const Arguments& arguments, Tables<F>& tables) {
    const u32 thread = threadIdx.x;
    const u32 blocks = (arguments.weights + BLOCK - 1) / BLOCK;
    const u32 unit = blockIdx.x * UNITS + thread / THREADS_PER_UNIT;
    const u32 column = thread % THREADS_PER_UNIT * COLUMNS;

    Codes<F> codes;
    const u32 groups = (blocks + F::DIGITS - 1) / F::DIGITS;
    const u32 fine_groups = (blocks + F::FINE_DIGITS - 1) / F::FINE_DIGITS;
    load_groups<F::GROUPS>(codes.coarse, arguments.coarse, unit, groups, column);
    load_groups<F::FINE_GROUPS>(codes.fine, arguments.fine, unit, fine_groups, column);

    const int exponent = (signed char)arguments.scales[blocks], stride = arguments.scales[blocks + 1];
    const u32 first_block = blockIdx.x * (UNITS * F::BLOCKS) + thread;
#pragma unroll
    for (int start = 0; start < UNITS * F::BLOCKS; start += THREADS) {
        if (start + THREADS > UNITS * F::BLOCKS && start + thread >= UNITS * F::BLOCKS) break;
        const int code = first_block + start < blocks ? (arguments.scales + first_block)[start] : 0;
        tables.scales[start + thread] = scale_pair(code, exponent, stride);
    }
    fill_levels<F>(arguments.levels, tables.levels, thread);
    return codes;
}

// The coarse digits of one block for four columns, shifted left by the fine bits: the blocks of a group in turn, in
// lanes of 8 bits. `even` and `odd` hold what is left of the bytes of base 6.
template <class F>
__device__ __forceinline__ u32 coarse_part(u32 word, int place, u32& even, u32& odd) {
    if (F::RADIX == 6) {
        if (place == 0) {
            even = word & halves_of(0xff);
            odd = word >> 8 & halves_of(0xff);
        }
        u32 even_digit = even, odd_digit = odd;
        if (place < F::DIGITS - 1) {
            // Division by 6, exact below 256.
            even = even * 171 >> 10 & halves_of(0x3f);
            odd = odd * 171 >> 10 & halves_of(0x3f);
            even_digit -= 6 * even;
            odd_digit -= 6 * odd;
        }
        return (even_digit + (odd_digit << 8)) << F::FINE_BITS;
    }
    const int shift = place * bits_for(F::RADIX) - F::FINE_BITS;
    return (shift > 0 ? word >> shift : word << -shift) & bytes_of((F::RADIX - 1) << F::FINE_BITS);
}

// The numbers of the levels of the four columns whose codes are in `word`; with lanes of 16 bits those of every other
// column, from `first` on. `previous` has the codes of the four columns before.
template <class F, int LANE>
__device__ __forceinline__ u32 windows(u32 previous, u32 word, int first) {
    u32 numbers = LANE == 8 ? word : word >> 8 * first & halves_of(0xff);
#pragma unroll
    for (int back = 1; back * F::CODE_BITS < F::WINDOW; back++) {
        const int shift = back * F::CODE_BITS;
        const u32 lane = low_bits(F::WINDOW) & ~low_bits(shift);
        const u32 earlier = back == first ? word : __funnelshift_l(previous, word, 8 * (back - first));
        numbers |= earlier << shift & (LANE == 8 ? bytes_of(lane) : halves_of(lane));
    }
    return numbers;
}

// The levels of four weights, as two pairs.
template <class F>
__device__ __forceinline__ uint2 look_up(const u32* levels, u32 previous, u32 codes) {
    if constexpr (F::PAIRS) {
        // Two codes next to each other in each half.
        constexpr u32 low = halves_of(low_bits(F::NUMBER_BITS));
        const u32 index = (codes & low) | (codes >> (8 - F::NUMBER_BITS) & (low << F::NUMBER_BITS));
        return {levels[index & 0xffff], levels[index >> 16]};
    }
    u32 level[4];
    if (F::WINDOW > 8) {
        const u32 even = windows<F, 16>(previous, codes, 0), odd = windows<F, 16>(previous, codes, 1);
        level[0] = levels[even & 0xffff];
        level[1] = levels[odd & 0xffff];
        level[2] = levels[even >> 16];
        level[3] = levels[odd >> 16];
    } else {
        const u32 numbers = F::WINDOW ? windows<F, 8>(previous, codes, 0) : codes;
        level[0] = levels[numbers & 0xff];
        level[1] = levels[numbers >> 8 & 0xff];
        level[2] = levels[numbers >> 16 & 0xff];
        level[3] = levels[numbers >> 24];
    }
    return {__byte_perm(level[0], level[1], 0x5410), __byte_perm(level[2], level[3], 0x5410)};
}

// Decode and store all blocks of a thread's unit.
template <class F>
__device__ __forceinline__ void decode(const Arguments& arguments, const Tables<F>& tables, const Codes<F>& codes) {
    const u32 thread = threadIdx.x, unit = thread / THREADS_PER_UNIT;
    const u32 first = (blockIdx.x * UNITS + unit) * (F::BLOCKS * BLOCK) + thread % THREADS_PER_UNIT * COLUMNS;
    const int remaining = (int)(arguments.weights - first);
    u8* out = arguments.out + (unsigned long long)first * sizeof(OUTPUT::Element);
    const u32* scales = tables.scales + unit * F::BLOCKS;
    u32 even[F::LEAD + WORDS], odd[F::LEAD + WORDS];
#pragma unroll
    for (int block = 0; block < F::BLOCKS; block++) {
        u32 bytes[F::LEAD + WORDS];
#pragma unroll
        for (int word = 0; word < F::LEAD + WORDS; word++) {
            const u32 coarse = codes.coarse[block / F::DIGITS][word];
            bytes[word] = coarse_part<F>(coarse, block % F::DIGITS, even[word], odd[word]);
            if (F::FINE_BITS) {
                const u32 fine = codes.fine[block / F::FINE_DIGITS][word] >> block % F::FINE_DIGITS * F::FINE_BITS;
                bytes[word] |= fine & bytes_of(low_bits(F::FINE_BITS));
            }
        }
        union {
            u32 words[SEGMENT_BYTES / 4];
            uint4 quads[SEGMENT_BYTES / 16];
        } segment;
        const u32 scale = scales[block];
#pragma unroll
        for (int word = 0; word < WORDS; word++) {
            const uint2 pairs = look_up<F>(tables.levels, F::LEAD ? bytes[word] : 0, bytes[F::LEAD + word]);
            OUTPUT::put(segment.words + word * SEGMENT_BYTES / 8, product(pairs.x, scale));
            OUTPUT::put(segment.words + word * SEGMENT_BYTES / 8 + SEGMENT_BYTES / 16, product(pairs.y, scale));
        }
        uint4* to = reinterpret_cast<uint4*>(out + block * BLOCK * sizeof(OUTPUT::Element));
#pragma unroll
        for (int quad = 0; quad < SEGMENT_BYTES / 16; quad++) {
            if (block * BLOCK < remaining) to[quad] = segment.quads[quad];
        }
    }
}

FORMATS(KERNEL)
