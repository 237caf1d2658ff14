#include <algorithm>
#include <utility>
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

size_t keep(uint32_t *hot, size_t hot_count, const uint16_t *hits, size_t tokens, size_t heads, const uint32_t *ids,
            const int64_t *counts, int64_t *which, int64_t *places) {
    using Worth = std::pair<int32_t, uint32_t>;  // and place or index, so that equals keep their order
    thread_local std::vector<Worth> victims, offered;
    size_t kept = 0, first = 0;
    for (size_t head = 0; head < heads; ++head, hot += hot_count, hits += tokens) {
        const size_t count = size_t(counts[head]), most = std::min(count, hot_count);
        const auto worth = [&](uint32_t id) { return id < tokens ? int32_t(hits[id]) : 0; };
        victims.clear();
        offered.clear();
        for (size_t place = 0; most && place < hot_count; ++place)
            victims.emplace_back(hot[place] == kEmpty ? -1 : worth(hot[place]), uint32_t(place));
        for (size_t i = 0; most && i < count; ++i) offered.emplace_back(-worth(ids[first + i]), uint32_t(i));
        sort_first(victims, most);
        sort_first(offered, most);
        for (size_t i = 0; i < most; ++i) {
            // Strictly more hits: equals would take turns and throw each other out.
            if (-offered[i].first <= victims[i].first) break;
            hot[victims[i].second] = ids[first + offered[i].second];
            which[kept] = int64_t(first + offered[i].second);
            places[kept++] = int64_t(head * hot_count + victims[i].second);
        }
        first += count;
    }
    return kept;
}

}  // namespace hillinfer
