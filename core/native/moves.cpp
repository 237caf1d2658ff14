// Moves rows between slots, where keys and values lie apart, and wherever a row is a key and then its value. One pass
// with no rows in between: numpy and torch each make a copy of what an index picks, and torch wakes threads for it.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "bindings.h"
#include "native.h"

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

// Copies rows out of the slots `places` one after another.
template <class Keys>
void join(const Keys &keys, const Keys &values, size_t pinned, const int64_t *places, size_t count, uint8_t *to) {
    const Slots slots(keys, pinned);
    const size_t size = slots.size;
    for (size_t i = 0; i < count; ++i, to += 2 * size) {
        if (i + kAhead < count) {
            fetch(keys.data() + slots.at(places[i + kAhead]), size);
            fetch(values.data() + slots.at(places[i + kAhead]), size);
        }
        std::memcpy(to, keys.data() + slots.at(places[i]), size);
        std::memcpy(to + size, values.data() + slots.at(places[i]), size);
    }
}

// Copies rows, those that `chosen` counts if it is not null, into the slots `places`.
template <class Keys>
void split(const uint8_t *rows, const int64_t *chosen, const Keys &keys, const Keys &values, size_t pinned,
           const int64_t *places, size_t count) {
    const Slots slots(keys, pinned);
    const size_t size = slots.size;
    const auto row = [&](size_t i) { return rows + (chosen ? size_t(chosen[i]) : i) * 2 * size; };
    for (size_t i = 0; i < count; ++i) {
        if (i + kAhead < count) fetch(row(i + kAhead), 2 * size);
        const size_t to = slots.at(places[i]);
        std::memcpy(keys.data() + to, row(i), size);
        std::memcpy(values.data() + to, row(i) + size, size);
    }
}

bool join_rows(Array<const uint8_t, 3> keys, Array<const uint8_t, 3> values, size_t pinned, Numbers places,
               Array<uint8_t, 2> out) {
    nb::gil_scoped_release released;
    if (!fit(keys, values, pinned, places)) return false;
    join(keys, values, pinned, places.data(), places.shape(0), out.data());
    return true;
}

bool split_rows(Array<const uint8_t, 2> rows, std::optional<Numbers> which, Array<uint8_t, 3> keys,
                Array<uint8_t, 3> values, size_t pinned, Numbers places) {
    nb::gil_scoped_release released;
    const size_t count = places.shape(0);
    const int64_t *const chosen = which ? which->data() : nullptr;
    if (!fit(keys, values, pinned, places)) return false;
    if (chosen ? !all_below(chosen, count, rows.shape(0)) : count > rows.shape(0)) return false;
    split(rows.data(), chosen, keys, values, pinned, places.data(), count);
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

// As `exchange`, and moves the rows: those that leave slots for new memory, if `keep`, and those of the hot pool to
// their slots. Returns how many are missing, how many left, and their rows; nothing where something does not fit.
std::optional<nb::tuple> exchange_rows(Array<uint32_t, 2> slots, Array<uint32_t, 2> hot,
                                       Array<const uint32_t, 1> wanted, Array<const int64_t, 1> counts,
                                       uint32_t tokens, Array<uint32_t, 2> ids, Array<int64_t, 2> places,
                                       Array<int64_t, 2> of_heads, Array<uint8_t, 3> keys, Array<uint8_t, 3> values,
                                       size_t pinned, Array<const uint8_t, 2> hot_rows, bool keep) {
    const size_t room = places.shape(1), heads = slots.shape(0), row_bytes = 2 * keys.shape(2);
    const bool alike = keys.shape(0) == heads && keys.shape(1) == pinned + slots.shape(1) &&
                       values.shape(0) == heads && values.shape(1) == keys.shape(1) &&
                       values.shape(2) == keys.shape(2) && hot.shape(0) == heads && counts.shape(0) == heads &&
                       hot_rows.shape(0) == hot.size() && (hot_rows.shape(1) == row_bytes || !hot.size());
    if (!alike || wanted.shape(0) > room || slots.size() > room ||
        !fits(wanted.data(), wanted.shape(0), counts.data(), heads, tokens))
        return std::nullopt;
    Exchanged out{ids.data(), places.data(), of_heads.data(), places.data() + room, places.data() + 2 * room,
                  ids.data() + ids.shape(1), places.data() + 3 * room, of_heads.data() + of_heads.shape(1)};
    uint8_t *left = nullptr;  // never of no bytes: what owns it must point somewhere
    {
        nb::gil_scoped_release released;
        if (!exchange(slots.data(), slots.shape(1), hot.data(), hot.shape(1), heads, wanted.data(), counts.data(),
                      tokens, out))
            return std::nullopt;
        const size_t kept = keep ? out.left : 0;
        left = new uint8_t[kept * row_bytes + 1];
        join(keys, values, pinned, out.left_places, kept, left);
        split(hot_rows.data(), out.hot_places, keys, values, pinned, out.hot_slots, out.found);
    }
    const nb::capsule owner(left, [](void *memory) noexcept { delete[] static_cast<uint8_t *>(memory); });
    const nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>> rows(left, {keep ? out.left : 0, row_bytes}, owner);
    return nb::make_tuple(out.missing, out.left, rows);
}

}  // namespace

void define_moves(nb::module_ &module) {
    module.def("exchange_rows", &exchange_rows, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg());
    module.def("join_rows", &join_rows, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
               nb::arg().noconvert());
    module.def("split_rows", &split_rows, nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());
    module.def("put_rows", &put_rows, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert());
}

}  // namespace hillinfer
