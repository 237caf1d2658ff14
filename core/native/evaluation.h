// An evaluation of keys that lie in memory: everything from the query in the client's arena to what is lacking there.
#pragma once

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <vector>

#include "bindings.h"
#include "native.h"

namespace hillinfer {

// `count` numbers at a byte offset of the arena, null if they do not lie in it.
template <class T>
T *region(Array<uint8_t, 1> &arena, uint64_t offset, uint64_t count) {
    const uint64_t size = arena.shape(0);
    if (offset % sizeof(T) || offset > size || count > (size - offset) / sizeof(T)) return nullptr;
    return reinterpret_cast<T *>(arena.data() + offset);
}

enum class Outcome : int { done = 0, outside = 1, not_finite = 2, misfit = 3 };

// Where winners go in the arena, and what of it says which are held.
struct Places {
    uint64_t ids_at;
    std::optional<uint64_t> scores_at;
    uint64_t held_at;
    size_t held_count;
};

// All of an evaluation but its tokens. Arrays stay what they are for as long as it is used.
struct Evaluation {
    Array<uint8_t, 1> arena;
    uint64_t query_at;
    size_t group;  // query heads of a KV head
    bool sum;
    Array<const float, 2> scale, zero;
    Variant variant;
    std::vector<Strided<const uint8_t, 3>> parts;  // of keys; they begin with token `origin`
    int bits;
    uint64_t origin, k;
    Places places;
    Array<const int64_t, 2> extents;
    int64_t row_bytes, tokens;
    Strided<const uint32_t, 2> sums;
    size_t most;  // rows that are brought

    size_t heads() const { return scale.shape(0); }

    // Whether tokens first .. end - 1 can be ranked for k of them.
    bool fits(uint64_t first, uint64_t end) const;

    // Quantises the query, ranks, hands the winners over and finds what is lacking, for tokens that fit; `seconds` are
    // those of ranking.
    Outcome carry_out(uint64_t first, uint64_t end, size_t threads, Lacking &lacking, double &seconds);
};

}  // namespace hillinfer
