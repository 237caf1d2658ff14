#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "compute_pool.h"
#include "native.h"

namespace hillinfer {

namespace {

constexpr uint32_t kEmpty = 0xFFFFFFFF;
constexpr uint16_t kMost = UINT16_MAX;  // hits

// The loops over places below compute addresses instead of branching: what is found where is anybody's guess, and a
// wrong guess costs more than a word written in vain, which the next one found overwrites.

// One bit for each token, all of them 0 between heads and calls: few cache lines, as whoever computes in between leaves
// none there. A thread keeps the memory.
class Marks {
  public:
    explicit Marks(size_t tokens) : tokens_(uint32_t(tokens)) {
        if (bits().size() * 64 <= tokens) bits().resize(tokens / 64 + 1);
        words_ = bits().data();
    }
    bool has(uint32_t id) const { return words_[id / 64] >> id % 64 & 1; }
    void set(uint32_t id) { words_[id / 64] |= uint64_t(1) << id % 64; }
    void clear(uint32_t id) { words_[id / 64] &= ~(uint64_t(1) << id % 64); }

    // As `id`, or for ids beyond all tokens the one behind them, which is never set.
    uint32_t within(uint32_t id) const { return std::min(id, tokens_); }

  private:
    static std::vector<uint64_t> &bits() {
        thread_local std::vector<uint64_t> marked;
        return marked;
    }
    uint32_t tokens_;
    uint64_t *words_;
};

// At least `count` numbers that a thread keeps, and each `Use` for itself.
template <class Number, int Use>
Number *scratch(size_t count) {
    thread_local std::vector<Number> kept;
    if (kept.size() < count) kept.resize(count);
    return kept.data();
}

// Where `id`, which is among them, is in `count` ascending ids.
size_t find(const uint32_t *ids, size_t count, uint32_t id) {
    const uint32_t *first = ids;
    while (count > 1) {
        const size_t half = count / 2;
        first = first[half] <= id ? first + half : first;
        count -= half;
    }
    return size_t(first - ids);
}

// A head's part of `exchange`: `out` begins with its own. Says whether all is as it must be.
bool exchange_head(uint32_t *slots, size_t slot_count, uint32_t *hot, size_t hot_count, size_t head,
                   const uint32_t *wanted, size_t count, uint32_t tokens, Exchanged &out) {
    // Also what is written where follows from the order.
    for (size_t i = 1; i < count; ++i)
        if (wanted[i - 1] >= wanted[i]) return false;
    Marks marks(tokens);
    uint32_t *const free = scratch<uint32_t, 0>(slot_count), *const lacking = scratch<uint32_t, 1>(count);
    uint32_t *const found = scratch<uint32_t, 2>(hot_count);
    const int64_t first_slot = int64_t(head * slot_count), first_hot = int64_t(head * hot_count);
    for (size_t i = 0; i < count; ++i) marks.set(wanted[i]);
    size_t freed = 0, lack = 0;
    for (size_t place = 0; place < slot_count; ++place) {
        const uint32_t id = slots[place], mark = marks.within(id);
        const bool stays = marks.has(mark);
        marks.clear(mark);
        free[freed] = uint32_t(place);
        freed += !stays;
        out.left_ids[out.left] = id;
        out.left_places[out.left] = first_slot + int64_t(place);
        out.left += !stays & (id != kEmpty);
        slots[place] = stays ? id : kEmpty;
    }
    for (size_t i = 0; i < count; ++i) {
        lacking[lack] = wanted[i];
        lack += marks.has(wanted[i]);
    }
    const bool enough = lack <= freed;
    if (enough) {
        for (size_t i = 0; i < lack; ++i) slots[free[i]] = lacking[i];
        size_t in_hot = 0;
        for (size_t place = 0; place < hot_count; ++place) {
            found[in_hot] = uint32_t(place);
            in_hot += marks.has(marks.within(hot[place]));
        }
        for (size_t i = 0; i < in_hot; ++i) {
            const uint32_t id = hot[found[i]];
            out.hot_slots[out.found] = first_slot + int64_t(free[find(lacking, lack, id)]);
            out.hot_places[out.found++] = first_hot + int64_t(found[i]);
            marks.clear(id);
            hot[found[i]] = kEmpty;
        }
        for (size_t i = 0; i < lack; ++i) {
            out.missing_ids[out.missing] = lacking[i];
            out.missing_places[out.missing] = first_slot + int64_t(free[i]);
            out.missing += marks.has(lacking[i]);
        }
    }
    for (size_t i = 0; i < lack; ++i) marks.clear(lacking[i]);
    return enough;
}

// Moves `count` numbers of an array from `first` to `end`, the end of what is there already, and returns the new end.
template <class Number>
size_t close_up(Number *numbers, size_t first, size_t count, size_t end) {
    if (first != end) std::memmove(numbers + end, numbers + first, count * sizeof(Number));
    return end + count;
}

// Some of hits [tokens]; what is beyond has none.
class Hits {
  public:
    Hits(const uint16_t *hits, size_t tokens) : hits_(tokens ? hits : &kNone), tokens_(tokens) {}
    uint16_t of(uint32_t id) const { return uint16_t(hits_[id < tokens_ ? id : 0] & -int(id < tokens_)); }

  private:
    static constexpr uint16_t kNone = 0;
    const uint16_t *hits_;
    size_t tokens_;
};

// How many of `count` hits are below `limit`. Sixteen bits wide, so that many are compared at once.
size_t count_below(const uint16_t *hits, size_t count, uint16_t limit) {
    constexpr size_t kBlock = 1 << 14;  // as many as 16 bits count
    size_t below = 0;
    for (size_t start = 0; start < count; start += kBlock) {
        uint16_t sum = 0;
        for (size_t i = start, end = std::min(count, start + kBlock); i < end; ++i) sum += hits[i] < limit;
        below += sum;
    }
    return below;
}

// Sorts numbers of which the high half is at most kMost and the low half ascends already.
void sort_by_hits(uint64_t *numbers, size_t count) {
    constexpr size_t kFew = 128;  // for less, counting digits takes longer
    if (count < kFew) return std::sort(numbers, numbers + count);
    uint64_t *const other = scratch<uint64_t, 2>(count);
    uint32_t low[256] = {}, high[256] = {};
    for (size_t i = 0; i < count; ++i) {
        ++low[numbers[i] >> 32 & 255];
        ++high[numbers[i] >> 40];
    }
    uint32_t low_sum = 0, high_sum = 0;
    for (size_t digit = 0; digit < 256; ++digit) {
        low_sum += std::exchange(low[digit], low_sum);
        high_sum += std::exchange(high[digit], high_sum);
    }
    for (size_t i = 0; i < count; ++i) other[low[numbers[i] >> 32 & 255]++] = numbers[i];
    for (size_t i = 0; i < count; ++i) numbers[high[other[i] >> 40]++] = other[i];
}

// A head's part of `keep`; `first` is the index of its first id. Returns how many.
size_t keep_head(uint32_t *hot, size_t hot_count, const Hits &hits, size_t head, const uint32_t *ids, size_t count,
                 size_t first, int64_t *which, int64_t *places) {
    // Hits above, and place or index below, so that equals keep their order; in one number, which sorts faster. Of what
    // is offered the most hit comes first, and a free place before all others.
    uint64_t *const offered = scratch<uint64_t, 0>(count), *const victims = scratch<uint64_t, 1>(hot_count);
    uint32_t *const free = scratch<uint32_t, 0>(hot_count);
    uint16_t *const held = scratch<uint16_t, 0>(hot_count);
    for (size_t i = 0; i < count; ++i) offered[i] = uint64_t(kMost - hits.of(ids[i])) << 32 | i;
    sort_by_hits(offered, count);
    size_t next = 0;
    const auto put = [&](size_t place) {
        const uint32_t index = uint32_t(offered[next]);
        hot[place] = ids[index];
        which[next] = int64_t(first + index);
        places[next++] = int64_t(head * hot_count + place);
    };
    size_t empty = 0;
    for (size_t place = 0; place < hot_count; ++place) {
        free[empty] = uint32_t(place);
        empty += hot[place] == kEmpty;
    }
    for (size_t place = 0; place < hot_count; ++place) held[place] = hits.of(hot[place]);
    // Nothing is hit more than that: what enters here stays.
    for (size_t i = 0; i < empty; ++i) held[free[i]] = kMost;
    for (size_t i = 0; i < empty && next < count; ++i) put(free[i]);
    if (next == count) return next;
    const uint32_t best = kMost - uint32_t(offered[next] >> 32);
    const size_t pairs = std::min(count - next, count_below(held, hot_count, uint16_t(best)));
    if (!pairs) return next;
    // The hits of the last of as many victims as there are to offer: the least of which enough have no more.
    uint32_t last = 0, more = best - 1;
    while (last < more) {
        const uint32_t middle = (last + more) / 2;
        if (count_below(held, hot_count, uint16_t(middle + 1)) >= pairs)
            more = middle;
        else
            last = middle + 1;
    }
    size_t fewer = 0, equal = 0;
    for (size_t place = 0; place < hot_count; ++place) {
        victims[fewer] = uint64_t(held[place]) << 32 | place;
        free[equal] = uint32_t(place);
        fewer += held[place] < last;
        equal += held[place] == last;
    }
    sort_by_hits(victims, fewer);
    // Strictly more hits: equals would take turns and throw each other out.
    for (size_t i = 0; i < pairs; ++i) {
        const uint64_t victim = i < fewer ? victims[i] : uint64_t(last) << 32 | free[i - fewer];
        if (kMost - (offered[next] >> 32) <= victim >> 32) break;
        put(uint32_t(victim));
    }
    return next;
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
              const uint32_t *wanted, const int64_t *counts, uint32_t tokens, size_t threads, Exchanged &out) {
    struct Head {
        size_t first;
        Exchanged found;
        bool done;
    };
    std::vector<Head> each(heads);
    size_t first = 0;
    for (size_t head = 0; head < heads; first += size_t(counts[head++])) {
        const size_t left = head * slot_count;
        each[head] = {first,
                      {out.missing_ids + first, out.missing_places + first, nullptr, out.hot_slots + first,
                       out.hot_places + first, out.left_ids + left, out.left_places + left, nullptr},
                      false};
    }
    ComputePool::instance().run_now(heads, threads, [&](size_t head) {
        Head &own = each[head];
        own.done = exchange_head(slots + head * slot_count, slot_count, hot + head * hot_count, hot_count, head,
                                 wanted + own.first, size_t(counts[head]), tokens, own.found);
    });
    for (size_t head = 0; head < heads; ++head) {
        const auto &[from, found, done] = each[head];
        if (!done) return false;
        const size_t left = head * slot_count;
        close_up(out.missing_ids, from, found.missing, out.missing);
        out.missing = close_up(out.missing_places, from, found.missing, out.missing);
        close_up(out.hot_slots, from, found.found, out.found);
        out.found = close_up(out.hot_places, from, found.found, out.found);
        close_up(out.left_ids, left, found.left, out.left);
        out.left = close_up(out.left_places, left, found.left, out.left);
        out.missing_counts[head] = int64_t(found.missing);
        out.left_counts[head] = int64_t(found.left);
    }
    return true;
}

void count_hits(uint16_t *hits, size_t tokens, size_t heads, const uint32_t *ids, const int64_t *counts, uint16_t hit,
                uint16_t most, size_t threads) {
    std::vector<const uint32_t *> starts(heads + 1, ids);
    for (size_t head = 0; head < heads; ++head) starts[head + 1] = starts[head] + counts[head];
    ComputePool::instance().run_now(heads, threads, [&](size_t head) {
        uint16_t *const own = hits + head * tokens;
        for (const uint32_t *id = starts[head]; id < starts[head + 1]; ++id)
            own[*id] = uint16_t(own[*id] + std::min(hit, uint16_t(most - std::min(most, own[*id]))));
    });
}

size_t keep(uint32_t *hot, size_t hot_count, const uint16_t *hits, size_t tokens, size_t heads, const uint32_t *ids,
            const int64_t *counts, size_t threads, int64_t *which, int64_t *places) {
    std::vector<size_t> starts(heads + 1), kept(heads);
    for (size_t head = 0; head < heads; ++head) starts[head + 1] = starts[head] + size_t(counts[head]);
    ComputePool::instance().run_now(heads, threads, [&](size_t head) {
        const size_t first = starts[head];
        kept[head] = keep_head(hot + head * hot_count, hot_count, Hits(hits + head * tokens, tokens), head,
                               ids + first, starts[head + 1] - first, first, which + first, places + first);
    });
    size_t end = 0;
    for (size_t head = 0; head < heads; ++head) {
        close_up(which, starts[head], kept[head], end);
        end = close_up(places, starts[head], kept[head], end);
    }
    return end;
}

}  // namespace hillinfer
