#include <algorithm>
#include <vector>

#include "native.h"

namespace hillinfer {

namespace {

constexpr uint32_t kEmpty = 0xFFFFFFFF;

// One number for each token, all of them 0 between heads and calls. A thread keeps the memory.
std::vector<uint32_t> &marks(size_t tokens) {
    thread_local std::vector<uint32_t> marked;
    if (marked.size() < tokens) marked.resize(tokens);
    return marked;
}

template <class T>
void sort_first(std::vector<T> &values, size_t count) {
    if (count < values.size()) std::nth_element(values.begin(), values.begin() + long(count), values.end());
    std::sort(values.begin(), values.begin() + long(count));
}

}  // namespace

bool fits(const uint32_t *ids, size_t n, const int64_t *counts, size_t heads, uint64_t end) {
    size_t left = n;
    for (size_t head = 0; head < heads; ++head) {
        if (uint64_t(counts[head]) > left) return false;
        left -= size_t(counts[head]);
    }
    return left == 0 && (n == 0 || *std::max_element(ids, ids + n) < end);
}

bool exchange(uint32_t *slots, size_t slot_count, uint32_t *hot, size_t hot_count, size_t heads,
              const uint32_t *wanted, const int64_t *counts, uint32_t tokens, Exchanged &out) {
    std::vector<uint32_t> &mark = marks(tokens);
    thread_local std::vector<uint32_t> free;
    for (size_t head = 0; head < heads; ++head, slots += slot_count, hot += hot_count) {
        const size_t count = size_t(counts[head]);
        const int64_t first_slot = int64_t(head * slot_count), first_hot = int64_t(head * hot_count);
        for (size_t i = 0; i < count; ++i) mark[wanted[i]] = 1;
        free.clear();
        const size_t left_before = out.left, missing_before = out.missing;
        for (size_t place = 0; place < slot_count; ++place) {
            const uint32_t id = slots[place];
            if (id < tokens && mark[id]) {
                mark[id] = 0;
                continue;
            }
            free.push_back(uint32_t(place));
            if (id == kEmpty) continue;
            out.left_ids[out.left] = id;
            out.left_places[out.left++] = first_slot + int64_t(place);
            slots[place] = kEmpty;
        }
        // What is still marked has no slot: each gets the next free one, and its mark says which.
        size_t taken = 0;
        for (size_t i = 0; i < count; ++i) {
            if (!mark[wanted[i]]) continue;
            if (taken < free.size()) {
                slots[free[taken]] = wanted[i];
                mark[wanted[i]] = free[taken] + 1;
            }
            ++taken;
        }
        if (taken <= free.size()) {
            for (size_t place = 0; place < hot_count; ++place) {
                const uint32_t id = hot[place];
                if (id >= tokens || !mark[id]) continue;
                out.hot_slots[out.found] = first_slot + int64_t(mark[id]) - 1;
                out.hot_places[out.found++] = first_hot + int64_t(place);
                mark[id] = 0;
                hot[place] = kEmpty;
            }
            for (size_t i = 0; i < count; ++i) {
                if (!mark[wanted[i]]) continue;
                out.missing_ids[out.missing] = wanted[i];
                out.missing_places[out.missing++] = first_slot + int64_t(mark[wanted[i]]) - 1;
            }
        }
        for (size_t i = 0; i < count; ++i) mark[wanted[i]] = 0;
        if (taken > free.size()) return false;
        out.left_counts[head] = int64_t(out.left - left_before);
        out.missing_counts[head] = int64_t(out.missing - missing_before);
        wanted += count;
    }
    return true;
}

void count_hits(uint16_t *hits, size_t tokens, size_t heads, const uint32_t *ids, const int64_t *counts, uint16_t hit,
                uint16_t most) {
    for (size_t head = 0; head < heads; ++head, hits += tokens)
        for (const uint32_t *end = ids + counts[head]; ids < end; ++ids)
            hits[*ids] = uint16_t(hits[*ids] + std::min(hit, uint16_t(most - std::min(most, hits[*ids]))));
}

size_t keep(uint32_t *hot, size_t hot_count, const uint16_t *hits, size_t tokens, size_t heads, const uint32_t *ids,
            const int64_t *counts, int64_t *which, int64_t *places) {
    // Hits above, and place or index below, so that equals keep their order; in one number, which sorts faster. A free
    // place has fewer hits than any, and of what is offered the most hit comes first.
    thread_local std::vector<uint64_t> victims, offered;
    constexpr uint64_t kMost = UINT16_MAX + 1;
    size_t kept = 0, first = 0;
    for (size_t head = 0; head < heads; ++head, hot += hot_count, hits += tokens) {
        const size_t count = size_t(counts[head]), most = std::min(count, hot_count);
        const auto worth = [&](uint32_t id) { return 1 + uint64_t(id < tokens ? hits[id] : 0); };
        victims.clear();
        offered.clear();
        uint64_t best = 0;
        for (size_t i = 0; most && i < count; ++i) {
            const uint64_t each = worth(ids[first + i]);
            offered.push_back((kMost - each) << 32 | i);
            best = std::max(best, each);
        }
        // Most of a pool is hit more than anything offered, and need not be sorted.
        for (size_t place = 0; most && place < hot_count; ++place) {
            const uint64_t held = hot[place] == kEmpty ? 0 : worth(hot[place]);
            if (held < best) victims.push_back(held << 32 | place);
        }
        const size_t pairs = std::min(most, victims.size());
        sort_first(victims, pairs);
        sort_first(offered, pairs);
        for (size_t i = 0; i < pairs; ++i) {
            // Strictly more hits: equals would take turns and throw each other out.
            if (kMost - (offered[i] >> 32) <= victims[i] >> 32) break;
            const uint32_t place = uint32_t(victims[i]), index = uint32_t(offered[i]);
            hot[place] = ids[first + index];
            which[kept] = int64_t(first + index);
            places[kept++] = int64_t(head * hot_count + place);
        }
        first += count;
    }
    return kept;
}

}  // namespace hillinfer
