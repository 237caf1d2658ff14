#include <algorithm>
#include <vector>

#include "native.h"

namespace hillinfer {

size_t missing(const uint32_t *ids, size_t heads, size_t k, const uint32_t *held, size_t held_count, uint32_t end,
               uint32_t *counts, int64_t *missing_heads, int64_t *missing_ids) {
    // One bit for each token, all of them 0 between heads and calls. A thread keeps the memory.
    thread_local std::vector<uint64_t> has;
    if (has.size() < end / 64 + 1) has.resize(end / 64 + 1);
    size_t found = 0;
    for (size_t head = 0; head < heads; ++head, ids += k, held += held_count) {
        for (size_t i = 0; i < held_count; ++i)
            if (held[i] < end) has[held[i] / 64] |= uint64_t(1) << held[i] % 64;
        const size_t before = found;
        for (size_t i = 0; i < k; ++i) {
            if (ids[i] < end && has[ids[i] / 64] >> ids[i] % 64 & 1) continue;
            missing_heads[found] = int64_t(head);
            missing_ids[found++] = ids[i];
        }
        counts[head] = uint32_t(found - before);
        for (size_t i = 0; i < held_count; ++i)
            if (held[i] < end) has[held[i] / 64] = 0;
    }
    return found;
}

bool locate(const RowPlaces &places, const int64_t *heads, const int64_t *tokens, size_t n, uint64_t *offsets,
            uint32_t *checksums) {
    const int64_t *starts = places.starts, *last = starts + places.extents;
    for (size_t i = 0; i < n; ++i) {
        const int64_t head = heads[i], token = tokens[i];
        if (head < 0 || head >= places.heads || token < 0 || token >= places.tokens) return false;
        const int64_t *after = std::upper_bound(starts, last, token);
        if (after == starts) return false;
        const size_t extent = size_t(after - starts) - 1;
        const int64_t row = head * places.strides[extent] + token - starts[extent];
        offsets[i] = uint64_t(places.bases[extent] + row * places.row_bytes);
        checksums[i] = places.checksums[head * places.checksum_stride + token];
    }
    return true;
}

bool find_lacking(const uint32_t *ids, size_t heads, size_t k, const uint32_t *held, size_t held_count, uint32_t end,
                  const RowPlaces &places, size_t most, Lacking &out) {
    thread_local std::vector<uint32_t> copy;
    copy.assign(held, held + heads * held_count);
    out.found = missing(ids, heads, k, copy.data(), held_count, end, out.counts, out.heads, out.ids);
    return locate(places, out.heads, out.ids, std::min(out.found, most), out.offsets, out.checksums);
}

}  // namespace hillinfer
