#include <algorithm>
#include <vector>

#include "native.h"

namespace hillinfer {

namespace {

constexpr uint32_t kEmpty = 0xFFFFFFFF;

// One bit for each token, all of them 0 between heads and calls: few cache lines, as whoever computes in between leaves
// none there. A thread keeps the memory.
class Marks {
  public:
    explicit Marks(size_t tokens) {
        if (bits().size() * 64 < tokens) bits().resize((tokens + 63) / 64);
        words_ = bits().data();
    }
    bool has(uint32_t id) const { return words_[id / 64] >> id % 64 & 1; }
    void set(uint32_t id) { words_[id / 64] |= uint64_t(1) << id % 64; }
    void clear(uint32_t id) { words_[id / 64] &= ~(uint64_t(1) << id % 64); }

  private:
    static std::vector<uint64_t> &bits() {
        thread_local std::vector<uint64_t> marked;
        return marked;
    }
    uint64_t *words_;
};

// The `count` least in order. As a rule they are few of many, which a heap finds with hardly a wrong guess.
void sort_first(std::vector<uint64_t> &values, size_t count) {
    const auto first = values.begin(), end = values.end(), last = first + long(count);
    if (count < values.size() / 8) return std::partial_sort(first, last, end);
    if (last != end) std::nth_element(first, last, end);
    std::sort(first, last);
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
    Marks marks(tokens);
    thread_local std::vector<uint32_t> free, lacking;  // lacking: what has no slot yet, ascending, for `free` in turn
    for (size_t head = 0; head < heads; ++head, slots += slot_count, hot += hot_count) {
        const size_t count = size_t(counts[head]);
        const int64_t first_slot = int64_t(head * slot_count), first_hot = int64_t(head * hot_count);
        // Also what is written where follows from the order.
        for (size_t i = 1; i < count; ++i)
            if (wanted[i - 1] >= wanted[i]) return false;
        for (size_t i = 0; i < count; ++i) marks.set(wanted[i]);
        free.clear();
        lacking.clear();
        const size_t left_before = out.left, missing_before = out.missing;
        for (size_t place = 0; place < slot_count; ++place) {
            const uint32_t id = slots[place];
            if (id < tokens && marks.has(id)) {
                marks.clear(id);
                continue;
            }
            free.push_back(uint32_t(place));
            if (id == kEmpty) continue;
            out.left_ids[out.left] = id;
            out.left_places[out.left++] = first_slot + int64_t(place);
            slots[place] = kEmpty;
        }
        for (size_t i = 0; i < count; ++i)
            if (marks.has(wanted[i])) lacking.push_back(wanted[i]);
        const bool enough = lacking.size() <= free.size();
        if (enough) {
            for (size_t i = 0; i < lacking.size(); ++i) slots[free[i]] = lacking[i];
            for (size_t place = 0; place < hot_count; ++place) {
                const uint32_t id = hot[place];
                if (id >= tokens || !marks.has(id)) continue;
                const auto at = std::lower_bound(lacking.begin(), lacking.end(), id) - lacking.begin();
                out.hot_slots[out.found] = first_slot + int64_t(free[size_t(at)]);
                out.hot_places[out.found++] = first_hot + int64_t(place);
                marks.clear(id);
                hot[place] = kEmpty;
            }
            for (size_t i = 0; i < lacking.size(); ++i) {
                if (!marks.has(lacking[i])) continue;
                out.missing_ids[out.missing] = lacking[i];
                out.missing_places[out.missing++] = first_slot + int64_t(free[i]);
            }
        }
        for (const uint32_t id : lacking) marks.clear(id);
        if (!enough) return false;
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
    // Hits above, and place or index below, so that equals keep their order; in one number, which sorts faster. Of what
    // is offered the most hit comes first, and a free place before all others.
    thread_local std::vector<uint64_t> victims, offered;
    constexpr uint64_t kMost = UINT16_MAX;
    size_t kept = 0, first = 0;
    for (size_t head = 0; head < heads; ++head, hot += hot_count, hits += tokens) {
        const size_t count = size_t(counts[head]);
        const auto worth = [&](uint32_t id) { return uint64_t(id < tokens ? hits[id] : 0); };
        offered.clear();
        for (size_t i = 0; i < count; ++i) offered.push_back((kMost - worth(ids[first + i])) << 32 | i);
        std::sort(offered.begin(), offered.end());
        size_t next = 0;
        const auto put = [&](size_t place) {
            const uint32_t index = uint32_t(offered[next++]);
            hot[place] = ids[first + index];
            which[kept] = int64_t(first + index);
            places[kept++] = int64_t(head * hot_count + place);
        };
        victims.resize(hot_count);
        size_t others = 0;
        for (size_t place = 0; place < hot_count; ++place)
            if (hot[place] != kEmpty)
                victims[others++] = place;
            else if (next < count)
                put(place);
        if (next < count) {
            // Most of a pool is hit more than what is left to offer, and need not be sorted.
            const uint64_t best = kMost - (offered[next] >> 32);
            size_t less = 0;
            for (size_t i = 0; i < others; ++i) {
                const uint64_t place = victims[i], held = worth(hot[place]);
                victims[less] = held << 32 | place;
                less += held < best;
            }
            const size_t pairs = std::min(count - next, less);
            victims.resize(less);
            sort_first(victims, pairs);
            // Strictly more hits: equals would take turns and throw each other out.
            for (size_t i = 0; i < pairs && kMost - (offered[next] >> 32) > victims[i] >> 32; ++i)
                put(uint32_t(victims[i]));
        }
        first += count;
    }
    return kept;
}

}  // namespace hillinfer
