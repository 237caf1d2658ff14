// Python bindings of what the worker does with a client's arena: one call before ranking and one after it, as each
// call of numpy's costs as much as the work. The client can write to the arena at any time: what is read of it is
// read once, and nothing that was written to it is read back.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "native.h"

namespace nb = nanobind;

namespace hillinfer {
namespace {

// `count` numbers at a byte offset of the arena, null if they do not lie in it.
template <class T>
T *region(Array<uint8_t, 1> &arena, uint64_t offset, uint64_t count) {
    const uint64_t size = arena.shape(0);
    if (offset % sizeof(T) || offset > size || count > (size - offset) / sizeof(T)) return nullptr;
    return reinterpret_cast<T *>(arena.data() + offset);
}

enum class Query : int { quantised = 0, outside = 1, not_finite = 2 };

int quantise_query_of(Array<uint8_t, 1> arena, uint64_t offset, Array<const float, 2> scale,
                      Array<const float, 2> zero, bool sum, Array<int8_t, 3> q, Array<int32_t, 2> offsets, size_t group) {
    const size_t heads = scale.shape(0), dim = scale.shape(1), count = heads * group * dim;
    const float *query = region<float>(arena, offset, count);
    if (!query) return int(Query::outside);
    thread_local std::vector<float> copy, sigma;
    copy.assign(query, query + count);
    sigma.resize(heads);
    const bool finite = quantise_query(copy.data(), scale.data(), zero.data(), heads, group, dim, sum, q.data(),
                                       offsets.data(), sigma.data());
    return int(finite ? Query::quantised : Query::not_finite);
}

template <class T>
bool put(Array<uint8_t, 1> &arena, uint64_t offset, Array<const T, 2> &numbers) {
    T *const to = region<T>(arena, offset, numbers.size());
    if (to) std::memcpy(to, numbers.data(), numbers.size() * sizeof(T));
    return to != nullptr;
}

// Returns how many winners of each head are not held, and how many that are; nothing if a region does not lie in the
// arena or a row does not exist. `found` is [2][heads * k] heads and ids. Rows of `checksums` may lie apart.
std::optional<std::pair<std::vector<uint32_t>, size_t>> hand_over(
    Array<uint8_t, 1> arena, Array<const uint32_t, 2> ids, uint64_t ids_at, Array<const int32_t, 2> scores,
    std::optional<uint64_t> scores_at, uint64_t held_at, size_t held_count, uint32_t end,
    Array<const int64_t, 2> extents, int64_t row_bytes, int64_t tokens, Strided<const uint32_t, 2> sums, size_t most,
    Array<int64_t, 2> found, Array<uint64_t, 1> offsets, Array<uint32_t, 1> checksums) {
    const size_t heads = ids.shape(0), k = ids.shape(1), count = extents.shape(1);
    const uint32_t *held = region<uint32_t>(arena, held_at, heads * held_count);
    if (!held || !put(arena, ids_at, ids) || (scores_at && !put(arena, *scores_at, scores))) return {};
    const RowPlaces places{extents.data(), extents.data() + count, extents.data() + 2 * count, count,
                           int64_t(sums.shape(0)), std::min(tokens, int64_t(sums.shape(1))), row_bytes, sums.data(),
                           sums.stride(0)};
    std::vector<uint32_t> counts(heads);
    Lacking lacking{counts.data(), found.data(), found.data() + heads * k, offsets.data(), checksums.data()};
    if (!find_lacking(ids.data(), heads, k, held, held_count, end, places, most, lacking)) return {};
    return std::pair(std::move(counts), lacking.found);
}

}  // namespace

void define_arena(nb::module_ &module) {
    module.def("quantise_query_of", &quantise_query_of, nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg());
    module.def("hand_over", &hand_over, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
               nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());
}

}  // namespace hillinfer
