#include <algorithm>
#include <vector>

#include "native.h"

namespace hillinfer {

size_t missing(const uint32_t *ids, size_t heads, size_t k, const uint32_t *held, size_t held_count, uint32_t end,
               uint32_t *counts, int64_t *missing_heads, int64_t *missing_ids) {
    // One bit for each token, and one for all from `end` on. A thread keeps the memory.
    thread_local std::vector<uint64_t> has;
    has.resize(end / 64 + 1);
    size_t found = 0;
    for (size_t head = 0; head < heads; ++head, ids += k, held += held_count) {
        std::fill(has.begin(), has.end(), 0);
        for (size_t i = 0; i < held_count; ++i) {
            // Volatile, or the compiler might read it again after it was compared.
            const uint32_t read = *static_cast<const volatile uint32_t *>(held + i), id = std::min(read, end);
            has[id / 64] |= uint64_t(1) << id % 64;
        }
        const size_t before = found;
        // Written always and counted where it lacks: a branch would be mispredicted.
        for (size_t i = 0; i < k; ++i) {
            missing_heads[found] = int64_t(head);
            missing_ids[found] = ids[i];
            found += ids[i] >= end || !(has[ids[i] / 64] >> ids[i] % 64 & 1);
        }
        counts[head] = uint32_t(found - before);
    }
    return found;
}

bool locate(const RowPlaces &places, const int64_t *heads, const int64_t *tokens, size_t n, uint64_t *offsets,
            uint32_t *checksums) {
    const int64_t *starts = places.starts, *last = starts + places.extents, *after = starts;
    for (size_t i = 0; i < n; ++i) {
        const int64_t head = heads[i], token = tokens[i];
        if (head < 0 || head >= places.heads || token < 0 || token >= places.tokens) return false;
        // Tokens of a head ascend, as a rule: most lie in the same extent as the one before.
        if (after == starts || token < after[-1] || (after != last && token >= *after))
            after = std::upper_bound(starts, last, token);
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
    out.found = missing(ids, heads, k, held, held_count, end, out.counts, out.heads, out.ids);
    return locate(places, out.heads, out.ids, std::min(out.found, most), out.offsets, out.checksums);
}

}  // namespace hillinfer
