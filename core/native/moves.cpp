// Moves rows between slots, where keys and values lie apart, and wherever a row is a key and then its value. One pass
// with no rows in between: numpy and torch each make a copy of what an index picks, and torch wakes threads for it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "compute_pool.h"
#include "native.h"

namespace nb = nanobind;

namespace hillinfer {
namespace {

constexpr size_t kAhead = 6;  // rows that are on their way from memory while others are copied
constexpr size_t kCacheLine = 64;
constexpr size_t kJobBytes = 128 << 10;

bool all_below(const int64_t *places, size_t count, size_t end) {
    return std::all_of(places, places + count, [end](int64_t place) { return uint64_t(place) < end; });
}

void fetch(const uint8_t *data, size_t bytes) {
    for (size_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(data + at);
}

void fetch_to_write(uint8_t *data, size_t bytes) {
    for (size_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(data + at, 1);
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

// Has `move(begin, end)` move all of `count` rows of `size` bytes, in parts that up to `threads` threads share.
template <class Move>
void in_parts(size_t count, size_t size, size_t threads, const Move &move) {
    if (threads <= 1) return move(size_t(0), count);
    const size_t part = std::max<size_t>(kJobBytes / std::max<size_t>(size, 1), 1);
    ComputePool::instance().run_now((count + part - 1) / part, threads,
                                    [&](size_t i) { move(i * part, std::min(count, (i + 1) * part)); });
}

// Copies rows out of the slots `places` one after another.
template <class Keys>
void join(const Keys &keys, const Keys &values, size_t pinned, const int64_t *places, size_t count, size_t threads,
          uint8_t *out) {
    const Slots slots(keys, pinned);
    const size_t size = slots.size;
    in_parts(count, 2 * size, threads, [&](size_t begin, size_t end) {
        uint8_t *to = out + begin * 2 * size;
        for (size_t i = begin; i < end; ++i, to += 2 * size) {
            if (i + kAhead < end) {
                fetch(keys.data() + slots.at(places[i + kAhead]), size);
                fetch(values.data() + slots.at(places[i + kAhead]), size);
            }
            std::memcpy(to, keys.data() + slots.at(places[i]), size);
            std::memcpy(to + size, values.data() + slots.at(places[i]), size);
        }
    });
}

// Copies rows, those that `chosen` counts if it is not null, into the slots `places`.
template <class Keys>
void split(const uint8_t *rows, const int64_t *chosen, const Keys &keys, const Keys &values, size_t pinned,
           const int64_t *places, size_t count, size_t threads) {
    const Slots slots(keys, pinned);
    const size_t size = slots.size;
    const auto row = [&](size_t i) { return rows + (chosen ? size_t(chosen[i]) : i) * 2 * size; };
    in_parts(count, 2 * size, threads, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            if (i + kAhead < end) {
                const size_t coming = slots.at(places[i + kAhead]);
                fetch(row(i + kAhead), 2 * size);
                fetch_to_write(keys.data() + coming, size);
                fetch_to_write(values.data() + coming, size);
            }
            const size_t to = slots.at(places[i]);
            std::memcpy(keys.data() + to, row(i), size);
            std::memcpy(values.data() + to, row(i) + size, size);
        }
    });
}

using Chosen = std::optional<Numbers>;

const int64_t *numbers(const Chosen &chosen) { return chosen ? chosen->data() : nullptr; }

// Whether `count` of `rows` are meant, and all of them are there.
bool are_among(const Chosen &chosen, size_t count, size_t rows) {
    if (!chosen) return count <= rows;
    return chosen->shape(0) == count && all_below(chosen->data(), count, rows);
}

bool join_rows(Array<const uint8_t, 3> keys, Array<const uint8_t, 3> values, size_t pinned, Numbers places,
               size_t threads, Array<uint8_t, 2> out) {
    nb::gil_scoped_release released;
    if (!fit(keys, values, pinned, places)) return false;
    join(keys, values, pinned, places.data(), places.shape(0), threads, out.data());
    return true;
}

bool split_rows(Array<const uint8_t, 2> rows, Chosen which, Array<uint8_t, 3> keys, Array<uint8_t, 3> values,
                size_t pinned, Numbers places, size_t threads) {
    nb::gil_scoped_release released;
    const size_t count = places.shape(0);
    if (!fit(keys, values, pinned, places) || !are_among(which, count, rows.shape(0))) return false;
    split(rows.data(), numbers(which), keys, values, pinned, places.data(), count, threads);
    return true;
}

// Copies rows of `size` bytes, those that `chosen` counts if it is not null, to `places`, likewise.
void put(const uint8_t *rows, const int64_t *chosen, uint8_t *out, const int64_t *places, size_t count, size_t size,
         size_t threads) {
    const auto row = [&](size_t i) { return rows + (chosen ? size_t(chosen[i]) : i) * size; };
    const auto place = [&](size_t i) { return out + (places ? size_t(places[i]) : i) * size; };
    in_parts(count, size, threads, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            if (i + kAhead < end) {
                fetch(row(i + kAhead), size);
                fetch_to_write(place(i + kAhead), size);
            }
            std::memcpy(place(i), row(i), size);
        }
    });
}

bool put_rows(Array<const uint8_t, 2> rows, Chosen which, Array<uint8_t, 2> out, Chosen places, size_t threads) {
    nb::gil_scoped_release released;
    const size_t count = which ? which->shape(0) : places ? places->shape(0) : rows.shape(0);
    if (!are_among(places, count, out.shape(0)) || !are_among(which, count, rows.shape(0))) return false;
    put(rows.data(), numbers(which), out.data(), numbers(places), count, out.shape(1), threads);
    return true;
}

using Tokens = nb::ndarray<nb::ro, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Held = nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu>;

// Puts one token of each sequence, [batch][heads][1][dim], to the place of its sequence in [batch][heads][count][dim].
bool put_tokens(Held keys, Held values, Tokens new_keys, Tokens new_values, const std::vector<size_t> &places) {
    const size_t batch = keys.shape(0), heads = keys.shape(1), count = keys.shape(2), dim = keys.shape(3);
    const auto fit = [&](const Held &held, const Tokens &tokens) {
        return held.dtype() == keys.dtype() && tokens.dtype() == keys.dtype() && held.shape(0) == batch &&
               held.shape(1) == heads && held.shape(2) == count && held.shape(3) == dim && tokens.shape(0) == batch &&
               tokens.shape(1) == heads && tokens.shape(2) == 1 && tokens.shape(3) == dim;
    };
    if (!fit(keys, new_keys) || !fit(values, new_values) || places.size() != batch) return false;
    if (std::any_of(places.begin(), places.end(), [count](size_t place) { return place >= count; })) return false;
    const size_t size = dim * keys.itemsize();
    for (const auto &[held, tokens] : {std::pair(&keys, &new_keys), std::pair(&values, &new_values)}) {
        auto *const to = static_cast<uint8_t *>(held->data());
        const auto *const from = static_cast<const uint8_t *>(tokens->data());
        for (size_t i = 0; i < batch * heads; ++i)
            std::memcpy(to + (i * count + places[i / heads]) * size, from + i * size, size);
    }
    return true;
}

// What `turn_over` finds out before it moves anything. A thread keeps the memory.
struct Found {
    std::vector<uint32_t> ids;
    std::vector<int64_t> places, of_heads;
    std::vector<uint8_t> rows;
};

using Rows = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

bool turn_over_apart(Array<uint32_t, 2> &slots, Array<uint32_t, 2> &hot, Array<uint16_t, 2> &hits,
                     Array<uint8_t, 3> &keys, Array<uint8_t, 3> &values, size_t pinned, Array<uint8_t, 2> &hot_rows,
                     const uint32_t *wanted, const int64_t *counts, size_t wanted_count, uint32_t tokens,
                     const std::vector<int64_t> &missing, const Rows &rows, uint16_t hit, bool halve) {
    thread_local Found found;
    const size_t heads = slots.shape(0), room = std::max(wanted_count, slots.size()), row_bytes = 2 * keys.shape(2);
    if (found.ids.size() < 2 * room) found.ids.resize(2 * room);
    if (found.places.size() < 6 * room) found.places.resize(6 * room);
    if (found.of_heads.size() < 2 * heads) found.of_heads.resize(2 * heads);
    int64_t *const places = found.places.data(), *const which = places + 4 * room, *const kept_at = places + 5 * room;
    Exchanged out{found.ids.data(), places, found.of_heads.data(), places + room, places + 2 * room,
                  found.ids.data() + room, places + 3 * room, found.of_heads.data() + heads};
    if (hot.size()) {
        count_hits(hits.data(), hits.shape(1), heads, wanted, counts, hit, UINT16_MAX, 1);
        if (halve)
            for (uint16_t *each = hits.data(), *end = each + hits.size(); each < end; ++each) *each >>= 1;
    }
    if (!exchange(slots.data(), slots.shape(1), hot.data(), hot.shape(1), heads, wanted, counts, tokens, 1, out) ||
        out.missing != rows.shape(0) || !std::equal(missing.begin(), missing.end(), out.missing_counts))
        return false;
    const size_t kept = hot.size() ? keep(hot.data(), hot.shape(1), hits.data(), hits.shape(1), heads, out.left_ids,
                                          out.left_counts, 1, which, kept_at)
                                   : 0;
    // Through memory in between: slots and places in the hot pool change hands both ways.
    if (found.rows.size() < kept * row_bytes) found.rows.resize(kept * row_bytes);
    for (size_t i = 0; i < kept; ++i) which[i] = out.left_places[which[i]];
    join(keys, values, pinned, which, kept, 1, found.rows.data());
    split(hot_rows.data(), out.hot_places, keys, values, pinned, out.hot_slots, out.found, 1);
    split(static_cast<const uint8_t *>(rows.data()), nullptr, keys, values, pinned, out.missing_places, out.missing, 1);
    put(found.rows.data(), nullptr, hot_rows.data(), kept_at, kept, row_bytes, 1);
    return true;
}

// A step's selection of one sequence, `wanted` [heads][k], from beginning to end: counts it, exchanges ids, moves rows,
// and keeps in the hot pool what has left slots and is hit more. `rows` are those of the `missing` of each head. False
// where others are missing, and nothing where something does not fit: ids and hits have changed in the first case.
std::optional<bool> turn_over(Array<uint32_t, 2> slots, Array<uint8_t, 3> keys, Array<uint8_t, 3> values,
                              size_t pinned, Array<uint32_t, 2> hot, Array<uint16_t, 2> hits,
                              Array<uint8_t, 2> hot_rows, Array<const uint32_t, 2> wanted, uint32_t tokens,
                              const std::vector<int64_t> &missing, Rows rows, uint16_t hit, bool halve) {
    const size_t heads = slots.shape(0), count = wanted.shape(1), row_bytes = 2 * keys.shape(2);
    const bool alike = keys.shape(0) == heads && keys.shape(1) == pinned + slots.shape(1) &&
                       values.shape(0) == heads && values.shape(1) == keys.shape(1) &&
                       values.shape(2) == keys.shape(2) && hot.shape(0) == heads && hits.shape(0) == heads &&
                       hot_rows.shape(0) == hot.size() && (hot_rows.shape(1) == row_bytes || !hot.size()) &&
                       wanted.shape(0) == heads && missing.size() == heads && count <= slots.shape(1) &&
                       rows.shape(1) == 2 && rows.shape(2) * rows.dtype().bits == 8 * keys.shape(2) &&
                       (tokens <= hits.shape(1) || !hot.size());
    if (!alike) return std::nullopt;
    nb::gil_scoped_release released;
    const std::vector<int64_t> counts(heads, int64_t(count));
    if (!fits(wanted.data(), wanted.size(), counts.data(), heads, tokens)) return std::nullopt;
    return turn_over_apart(slots, hot, hits, keys, values, pinned, hot_rows, wanted.data(), counts.data(),
                           wanted.size(), tokens, missing, rows, hit, halve);
}

}  // namespace

void define_moves(nb::module_ &module) {
    module.def("turn_over", &turn_over, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(),
               nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg());
    module.def("put_tokens", &put_tokens, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg());
    module.def("join_rows", &join_rows, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
               nb::arg(), nb::arg().noconvert());
    module.def("split_rows", &split_rows, nb::arg().noconvert(), nb::arg().none().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg());
    module.def("put_rows", &put_rows, nb::arg().noconvert(), nb::arg().none().noconvert(), nb::arg().noconvert(),
               nb::arg().none().noconvert(), nb::arg());
}

}  // namespace hillinfer
