// Few tokens are ranked without bins.
#include <algorithm>

#include "native.h"

namespace hillinfer {
namespace {

constexpr size_t kShortTokens = 512;        // for fewer of a head, clearing and adding up bins costs more than they save

}  // namespace

template <class Query>
bool rank_short(const RankRequest<Query> &r) {
    const size_t first_tile = r.first / kTileTokens, end_tile = (r.end + kTileTokens - 1) / kTileTokens;
    const bool few = (end_tile - first_tile) * kTileTokens <= kShortTokens && r.k > 0;
    if (!few || r.histogram || r.checksums || r.cancel) return false;
    alignas(64) int32_t all[kShortTokens];
    const size_t tile_bytes = kTileTokens * r.dim * r.bits / 8, group = r.rows / r.heads;
    for (size_t row = 0; row < r.rows; ++row) {
        size_t tile = r.origin / kTileTokens;
        int32_t *out = all;
        for (const Part &part : r.parts) {
            const size_t from = std::clamp(first_tile, tile, tile + part.tile_count);
            const size_t to = std::clamp(end_tile, from, tile + part.tile_count);
            if (from < to)
                scores(r.variant, part.tiles + int64_t(row / group) * part.head_stride + (from - tile) * tile_bytes,
                       to - from, r.q + row * r.queries * r.dim, r.offsets + row * r.queries, r.queries, r.dim, r.bits,
                       out);
            out += (to - from) * kTileTokens;
            tile += part.tile_count;
        }
        top_k(all + (r.first - first_tile * kTileTokens), r.end - r.first, r.k, uint32_t(r.first), r.ids + row * r.k,
              r.scores + row * r.k);
    }
    return true;
}

template bool rank_short<int8_t>(const RankRequest<int8_t> &);
template bool rank_short<int16_t>(const RankRequest<int16_t> &);

}  // namespace hillinfer
