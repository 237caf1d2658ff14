// Python bindings of what the worker does with a client's arena: one call before ranking and one after it, or one for
// all three, as each call of numpy's costs as much as the work. The client can write to the arena at any time: what is read of it is
// read once, and nothing that was written to it is read back.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "evaluation.h"

namespace nb = nanobind;

namespace hillinfer {
namespace {

Outcome quantise_query_at(Array<uint8_t, 1> &arena, uint64_t offset, Array<const float, 2> &scale,
                          Array<const float, 2> &zero, bool sum, size_t group, int8_t *q, int32_t *offsets) {
    const size_t heads = scale.shape(0), dim = scale.shape(1), count = heads * group * dim;
    const float *query = region<float>(arena, offset, count);
    if (!query) return Outcome::outside;
    thread_local std::vector<float> copy, sigma;
    copy.assign(query, query + count);
    sigma.resize(heads);
    const bool finite =
        quantise_query(copy.data(), scale.data(), zero.data(), heads, group, dim, sum, q, offsets, sigma.data());
    return finite ? Outcome::done : Outcome::not_finite;
}

int quantise_query_of(Array<uint8_t, 1> arena, uint64_t offset, Array<const float, 2> scale,
                      Array<const float, 2> zero, bool sum, Array<int8_t, 3> q, Array<int32_t, 2> offsets, size_t group) {
    return int(quantise_query_at(arena, offset, scale, zero, sum, group, q.data(), offsets.data()));
}

// Where a layer's rows lie; rows of `sums` may lie apart.
RowPlaces rows_of(Array<const int64_t, 2> &extents, int64_t row_bytes, int64_t tokens, Strided<const uint32_t, 2> &sums) {
    const size_t count = extents.shape(1);
    return {extents.data(), extents.data() + count, extents.data() + 2 * count, count,
            int64_t(sums.shape(0)), std::min(tokens, int64_t(sums.shape(1))), row_bytes, sums.data(),
            sums.stride(0)};
}

template <class T>
bool put(Array<uint8_t, 1> &arena, uint64_t offset, const T *numbers, size_t count) {
    T *const to = region<T>(arena, offset, count);
    if (to) std::memcpy(to, numbers, count * sizeof(T));
    return to != nullptr;
}

// False if a region does not lie in the arena or a row does not exist.
bool hand_over_to(Array<uint8_t, 1> &arena, const Places &at, const uint32_t *ids, const int32_t *scores, size_t heads,
                  size_t k, uint32_t end, const RowPlaces &rows, size_t most, Lacking &lacking) {
    const uint32_t *held = region<uint32_t>(arena, at.held_at, heads * at.held_count);
    return held && put(arena, at.ids_at, ids, heads * k) &&
           (!at.scores_at || put(arena, *at.scores_at, scores, heads * k)) &&
           find_lacking(ids, heads, k, held, at.held_count, end, rows, most, lacking);
}

using Arrived = std::pair<std::vector<uint32_t>, size_t>;

// Returns how many winners of each head are not held, and how many that are; nothing if a region does not lie in the
// arena or a row does not exist. `found` is [2][heads * k] heads and ids.
std::optional<Arrived> hand_over(
    Array<uint8_t, 1> arena, Array<const uint32_t, 2> ids, uint64_t ids_at, Array<const int32_t, 2> scores,
    std::optional<uint64_t> scores_at, uint64_t held_at, size_t held_count, uint32_t end,
    Array<const int64_t, 2> extents, int64_t row_bytes, int64_t tokens, Strided<const uint32_t, 2> sums, size_t most,
    Array<int64_t, 2> found, Array<uint64_t, 1> offsets, Array<uint32_t, 1> checksums) {
    const size_t heads = ids.shape(0), k = ids.shape(1);
    std::vector<uint32_t> counts(heads);
    Lacking lacking{counts.data(), found.data(), found.data() + heads * k, offsets.data(), checksums.data()};
    if (!hand_over_to(arena, {ids_at, scores_at, held_at, held_count}, ids.data(), scores.data(), heads, k, end,
                      rows_of(extents, row_bytes, tokens, sums), most, lacking))
        return {};
    return Arrived(std::move(counts), lacking.found);
}

// All of an evaluation but the rows, of keys that lie in memory: as quantise_query_of, rank and hand_over one after
// another. Returns an Outcome, what hand_over does, and the seconds that ranking took.
std::tuple<int, Arrived, double> evaluate(
    Array<uint8_t, 1> arena, uint64_t query_at, size_t group, bool sum, Array<const float, 2> scale,
    Array<const float, 2> zero, int variant, size_t threads, const std::vector<Strided<const uint8_t, 3>> &parts,
    int bits, uint64_t origin, uint64_t first, uint64_t end, uint64_t k, uint64_t ids_at,
    std::optional<uint64_t> scores_at, uint64_t held_at, size_t held_count, Array<const int64_t, 2> extents,
    int64_t row_bytes, int64_t tokens, Strided<const uint32_t, 2> sums, size_t most, Array<int64_t, 2> found,
    Array<uint64_t, 1> offsets, Array<uint32_t, 1> checksums) {
    Evaluation evaluation{arena,  query_at, group,   sum,       scale,  zero, Variant(variant),
                          parts,  bits,     origin,  k,         {ids_at, scores_at, held_at, held_count},
                          extents, row_bytes, tokens, sums,     most};
    const size_t room = evaluation.heads() * k;
    if (!evaluation.fits(first, end) || offsets.size() < room) return {int(Outcome::misfit), Arrived(), 0.0};
    nb::gil_scoped_release released;
    std::vector<uint32_t> counts(evaluation.heads());
    Lacking lacking{counts.data(), found.data(), found.data() + room, offsets.data(), checksums.data()};
    double seconds = 0;
    const Outcome outcome = evaluation.carry_out(first, end, threads, lacking, seconds);
    if (outcome != Outcome::done) return {int(outcome), Arrived(), 0.0};
    return {int(Outcome::done), Arrived(std::move(counts), lacking.found), seconds};
}

}  // namespace

bool Evaluation::fits(uint64_t first, uint64_t end) const {
    const size_t dim = scale.shape(1), tile = kTileTokens * dim * size_t(bits) / 8;
    uint64_t reached = origin;
    for (const auto &part : parts) {
        if (part.shape(0) != heads() || part.shape(1) == 0 || part.shape(2) != tile || part.stride(2) != 1 ||
            part.stride(1) != int64_t(tile))
            return false;
        reached += part.shape(1) * kTileTokens;
    }
    return dim && dim <= kMaxDim && dim % 8 == 0 && origin % kTileTokens == 0 && origin <= first && first <= end &&
           end <= reached && reached <= uint64_t(1) << 32 && k <= end - first;
}

Outcome Evaluation::carry_out(uint64_t first, uint64_t end, size_t threads, Lacking &lacking, double &seconds) {
    const size_t dim = scale.shape(1), queries = sum ? 1 : group;
    thread_local std::vector<int8_t> q;
    thread_local std::vector<int32_t> q_offsets, scores;
    thread_local std::vector<uint32_t> ids;
    q.resize(heads() * queries * dim);
    q_offsets.resize(heads() * queries);
    scores.resize(heads() * k);
    ids.resize(heads() * k);
    const Outcome read = quantise_query_at(arena, query_at, scale, zero, sum, group, q.data(), q_offsets.data());
    if (read != Outcome::done) return read;

    const auto began = std::chrono::steady_clock::now();
    RankRequest<int8_t> request{};
    request.variant = variant;
    request.threads = threads;
    for (const auto &part : parts) request.parts.push_back({part.data(), part.stride(0), part.shape(1)});
    request.q = q.data();
    request.offsets = q_offsets.data();
    request.heads = request.rows = heads();
    request.queries = queries;
    request.dim = dim;
    request.bits = bits;
    request.origin = origin;
    request.first = first;
    request.end = end;
    request.k = k;
    request.ids = ids.data();
    request.scores = scores.data();
    rank(request);
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();

    const RowPlaces rows = rows_of(extents, row_bytes, tokens, sums);
    const bool done = hand_over_to(arena, places, ids.data(), scores.data(), heads(), k, uint32_t(end), rows, most, lacking);
    return done ? Outcome::done : Outcome::outside;
}

void define_arena(nb::module_ &module) {
    module.def("quantise_query_of", &quantise_query_of, nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg());
    module.def("evaluate", &evaluate, nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(),
               nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(),
               nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert());
    module.def("hand_over", &hand_over, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
               nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());
}

}  // namespace hillinfer
