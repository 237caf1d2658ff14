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

// Where the slots that places count are, in bytes: those of each head lie behind `pinned` others.
class Slots {
  public:
    template <class Keys>
    Slots(const Keys &keys, size_t pinned) : size(keys.shape(2)), pinned_(pinned), counted_(keys.shape(1) - pinned) {}

    size_t at(int64_t place) const {
        const size_t head = size_t(place) / counted_;
        return (size_t(place) + (head + 1) * pinned_) * size;
    }

    const size_t size;  // of a key

  private:
    size_t pinned_, counted_;
};

template <class Keys>
bool fit(const Keys &keys, const Keys &values, size_t pinned, const Numbers &places) {
    const bool alike = keys.shape(0) == values.shape(0) && keys.shape(1) == values.shape(1) &&
                       keys.shape(2) == values.shape(2) && pinned <= keys.shape(1);
    return alike && all_below(places.data(), places.shape(0), keys.shape(0) * (keys.shape(1) - pinned));
}

bool join_rows(Array<const uint8_t, 3> keys, Array<const uint8_t, 3> values, size_t pinned, Numbers places,
               Array<uint8_t, 2> out) {
    nb::gil_scoped_release released;
    if (!fit(keys, values, pinned, places)) return false;
    const Slots slots(keys, pinned);
    const size_t count = places.shape(0), size = slots.size;
    const auto from = [&](size_t i) { return slots.at(places.data()[i]); };
    uint8_t *to = out.data();
    for (size_t i = 0; i < count; ++i, to += 2 * size) {
        if (i + kAhead < count) {
            fetch(keys.data() + from(i + kAhead), size);
            fetch(values.data() + from(i + kAhead), size);
        }
        std::memcpy(to, keys.data() + from(i), size);
        std::memcpy(to + size, values.data() + from(i), size);
    }
    return true;
}

bool split_rows(Array<const uint8_t, 2> rows, std::optional<Numbers> which, Array<uint8_t, 3> keys,
                Array<uint8_t, 3> values, size_t pinned, Numbers places) {
    nb::gil_scoped_release released;
    const size_t count = places.shape(0);
    const int64_t *const chosen = which ? which->data() : nullptr;
    if (!fit(keys, values, pinned, places)) return false;
    if (chosen ? !all_below(chosen, count, rows.shape(0)) : count > rows.shape(0)) return false;
    const Slots slots(keys, pinned);
    const size_t size = slots.size;
    const auto row = [&](size_t i) { return rows.data() + (chosen ? size_t(chosen[i]) : i) * 2 * size; };
    for (size_t i = 0; i < count; ++i) {
        if (i + kAhead < count) fetch(row(i + kAhead), 2 * size);
        const size_t to = slots.at(places.data()[i]);
        std::memcpy(keys.data() + to, row(i), size);
        std::memcpy(values.data() + to, row(i) + size, size);
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
    module.def("join_rows", &join_rows, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
               nb::arg().noconvert());
    module.def("split_rows", &split_rows, nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());
    module.def("put_rows", &put_rows, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert());
}

}  // namespace hillinfer
