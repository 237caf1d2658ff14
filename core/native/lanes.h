// Vectors of floats of any width, for code that is written once and compiled for each set of instructions with its own.
// They are wider than some registers: for files compiled with -Wno-psabi, and nothing that other files call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define HILLINFER_INLINE inline __attribute__((always_inline))

namespace hillinfer {

typedef float Lanes4 __attribute__((vector_size(16)));
typedef float Lanes8 __attribute__((vector_size(32)));
typedef float Lanes16 __attribute__((vector_size(64)));
typedef int32_t Whole4 __attribute__((vector_size(16)));
typedef int32_t Whole8 __attribute__((vector_size(32)));
typedef int32_t Whole16 __attribute__((vector_size(64)));

// kColumns: vectors of the output whose sums for four queries are in registers.
template <class L, class W, size_t kOutput>
struct Width {
    using Lanes = L;
    using Whole = W;
    static constexpr size_t kLanes = sizeof(L) / sizeof(float), kColumns = kOutput;
};

template <class To, class From>
HILLINFER_INLINE To bits_of(const From &from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class Lanes>
HILLINFER_INLINE Lanes load(const float *from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

template <class Lanes>
HILLINFER_INLINE void store(float *to, const Lanes &lanes) {
    std::memcpy(to, &lanes, sizeof lanes);
}

// Two steps on the way to sums of lanes: of vectors that have one sum each, and of results of the first step.
HILLINFER_INLINE Lanes4 halve(const Lanes4 &a, const Lanes4 &b) {
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
}
HILLINFER_INLINE Lanes4 quarter(const Lanes4 &a, const Lanes4 &b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
}
HILLINFER_INLINE Lanes8 halve(const Lanes8 &a, const Lanes8 &b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
HILLINFER_INLINE Lanes8 quarter(const Lanes8 &a, const Lanes8 &b) {
    const Lanes8 sum = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13) +
                       __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
    return sum + __builtin_shufflevector(sum, sum, 1, 0, 3, 2, 5, 4, 7, 6);
}
HILLINFER_INLINE Lanes16 halve(const Lanes16 &a, const Lanes16 &b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
HILLINFER_INLINE Lanes16 quarter(const Lanes16 &a, const Lanes16 &b) {
    Lanes16 sum = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    sum += __builtin_shufflevector(sum, sum, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return sum + __builtin_shufflevector(sum, sum, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}

// The sums of four vectors each, in the lanes that begin a quarter of the result.
template <class Lanes>
HILLINFER_INLINE Lanes totals(const Lanes *of) {
    return quarter(halve(of[0], of[1]), halve(of[2], of[3]));
}

}  // namespace hillinfer
