// Moves rows between slots, where keys and values lie apart, and wherever a row is a key and then its value. One pass
// with no rows in between: numpy and torch each make a copy of what an index picks, and torch wakes threads for it.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "bindings.h"

namespace nb = nanobind;

namespace hillinfer {
namespace {

constexpr size_t kAhead = 6;  // rows that are on their way from memory while others are copied
constexpr size_t kCacheLine = 64;

bool all_below(const int64_t *places, size_t count, size_t end) {
    return std::all_of(places, places + count, [end](int64_t place) { return uint64_t(place) < end; });
}

void fetch(const uint8_t *data, size_t bytes) {
    for (size_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(data + at);
}

using Numbers = Array<const int64_t, 1>;

bool join_rows(Array<const uint8_t, 2> keys, Array<const uint8_t, 2> values, Numbers places, Array<uint8_t, 2> out) {
    nb::gil_scoped_release released;
    const size_t count = places.shape(0), size = keys.shape(1);
    const int64_t *const at = places.data();
    if (!all_below(at, count, std::min(keys.shape(0), values.shape(0)))) return false;
    uint8_t *to = out.data();
    for (size_t i = 0; i < count; ++i, to += 2 * size) {
        if (i + kAhead < count) {
            fetch(keys.data() + size_t(at[i + kAhead]) * size, size);
            fetch(values.data() + size_t(at[i + kAhead]) * size, size);
        }
        std::memcpy(to, keys.data() + size_t(at[i]) * size, size);
        std::memcpy(to + size, values.data() + size_t(at[i]) * size, size);
    }
    return true;
}

bool split_rows(Array<const uint8_t, 2> rows, std::optional<Numbers> which, Array<uint8_t, 2> keys,
                Array<uint8_t, 2> values, Numbers places) {
    nb::gil_scoped_release released;
    const size_t count = places.shape(0), size = keys.shape(1);
    const int64_t *const at = places.data(), *const from = which ? which->data() : nullptr;
    if (!all_below(at, count, std::min(keys.shape(0), values.shape(0)))) return false;
    if (from ? !all_below(from, count, rows.shape(0)) : count > rows.shape(0)) return false;
    const auto row = [&](size_t i) { return rows.data() + (from ? size_t(from[i]) : i) * 2 * size; };
    for (size_t i = 0; i < count; ++i) {
        if (i + kAhead < count) fetch(row(i + kAhead), 2 * size);
        std::memcpy(keys.data() + size_t(at[i]) * size, row(i), size);
        std::memcpy(values.data() + size_t(at[i]) * size, row(i) + size, size);
    }
    return true;
}

bool put_rows(Array<const uint8_t, 2> rows, Numbers which, Array<uint8_t, 2> out, Numbers places) {
    nb::gil_scoped_release released;
    const size_t count = places.shape(0), size = out.shape(1);
    const int64_t *const at = places.data(), *const from = which.data();
    if (!all_below(at, count, out.shape(0)) || !all_below(from, count, rows.shape(0))) return false;
    for (size_t i = 0; i < count; ++i) {
        if (i + kAhead < count) fetch(rows.data() + size_t(from[i + kAhead]) * size, size);
        std::memcpy(out.data() + size_t(at[i]) * size, rows.data() + size_t(from[i]) * size, size);
    }
    return true;
}

}  // namespace

void define_moves(nb::module_ &module) {
    module.def("join_rows", &join_rows, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert());
    module.def("split_rows", &split_rows, nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg().noconvert());
    module.def("put_rows", &put_rows, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert());
}

}  // namespace hillinfer
