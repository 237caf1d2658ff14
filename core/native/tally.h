// What can still win of a row's scores, while jobs go through them: of rank.cpp alone.
//
// Known from bins: with k scores in bin b and above, no score below bin b wins. Jobs of a head tell one another
// of that bin, and raise it by what they counted together as each is done.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "native.h"

namespace hillinfer {
namespace {

constexpr size_t kOvershoot = 16;           // what `filter` may write behind the last
constexpr size_t kCacheLine = 64;           // bytes
constexpr size_t kCountsPerLine = 8;        // scores counted for each line of keys fetched ahead: docs/kernel.md

// The bins of one query's scores: docs/evaluation.md, "Histogram".
struct Bins {
    uint32_t low = 0;
    int shift = 0;

    size_t of(int32_t score) const { return (uint32_t(score) - low) >> shift; }
    int32_t edge(size_t bin) const { return int32_t(low + (uint32_t(bin) << shift)); }
};

template <class Query>
Bins bins_for(const Query *q, const int32_t *offsets, size_t queries, size_t dim, int bits) {
    const int64_t levels = (int64_t(1) << bits) - 1;
    int64_t low = std::numeric_limits<int64_t>::min(), high = low;
    for (size_t r = 0; r < queries; ++r, q += dim) {
        int64_t negative = 0, positive = 0;
        for (size_t d = 0; d < dim; ++d) (q[d] < 0 ? negative : positive) += q[d];
        low = std::max(low, levels * negative + offsets[r]);
        high = std::max(high, levels * positive + offsets[r]);
    }
    Bins bins;
    bins.low = uint32_t(low);
    while (size_t((high - low) >> bins.shift) >= kBins) ++bins.shift;
    return bins;
}

// Scores that can still win, by ascending id.
struct Kept {
    std::vector<uint32_t> ids;
    std::vector<int32_t> scores;

    void drop_below(Variant variant, int32_t threshold) {
        const size_t count = filter(variant, ids.size(), threshold, ids.data(), scores.data());
        ids.resize(count);
        scores.resize(count);
    }
};

// They while a job is going on. A thread keeps the memory: fresh pages would cost more than the work.
class Candidates {
  public:
    void clear() { count_ = 0; }

    // Makes room for `more`, first by dropping what is below `threshold`.
    void reserve(Variant variant, size_t more, int32_t threshold) {
        if (count_ + more + kOvershoot <= capacity_) return;
        drop_below(variant, threshold);
        // Half of it free, so that dropping is rare.
        const size_t capacity = 2 * (count_ + more) + kOvershoot;
        if (capacity <= capacity_) return;
        std::unique_ptr<uint32_t[]> ids(new uint32_t[capacity]);
        std::unique_ptr<int32_t[]> scores(new int32_t[capacity]);
        std::copy(ids_.get(), ids_.get() + count_, ids.get());
        std::copy(scores_.get(), scores_.get() + count_, scores.get());
        ids_ = std::move(ids);
        scores_ = std::move(scores);
        capacity_ = capacity;
    }

    // Adds those of scores[n] that reach `threshold`, for which there must be room; returns how many.
    size_t add(Variant variant, const int32_t *scores, size_t n, int32_t threshold, uint32_t first_id) {
        const size_t added =
            filter(variant, scores, n, threshold, first_id, ids_.get() + count_, scores_.get() + count_);
        count_ += added;
        return added;
    }

    // The scores of the last `n`.
    const int32_t *last(size_t n) const { return scores_.get() + count_ - n; }

    Kept keep(Variant variant, int32_t threshold) {
        drop_below(variant, threshold);
        return {{ids_.get(), ids_.get() + count_}, {scores_.get(), scores_.get() + count_}};
    }

  private:
    void drop_below(Variant variant, int32_t threshold) {
        count_ = filter(variant, count_, threshold, ids_.get(), scores_.get());
    }

    std::unique_ptr<uint32_t[]> ids_;
    std::unique_ptr<int32_t[]> scores_;
    size_t count_ = 0, capacity_ = 0;
};

// What the jobs of one row share.
struct Row {
    Bins bins;
    std::atomic<size_t> floor{0};  // no score below this bin wins
    std::mutex mutex;
    uint32_t counts[kBins] = {};  // of finished jobs; below `floor` only with a histogram

    void raise_floor(size_t bin) {
        size_t known = floor.load(std::memory_order_relaxed);
        while (known < bin && !floor.compare_exchange_weak(known, bin, std::memory_order_relaxed)) {}
    }
};

// The first bin, from above, at which the running count reaches k, and that count; bin 0 where it never does.
struct Reached {
    size_t bin = kBins, count = 0;

    Reached(const uint32_t *counts, size_t k) {
        while (bin > 0 && count < k) count += counts[--bin];
    }
};

// One job's part of one row.
class Tally {
  public:
    Tally(Variant variant, Row &row, size_t k, bool all, Candidates &candidates)
        : variant_(variant), row_(row), k_(k), all_(all), candidates_(candidates) {
        candidates.clear();
    }

    // `next_keys` follow those of the scores in memory; they may be beyond the last.
    void add(const int32_t *scores, size_t n, uint32_t first_id, const uint8_t *next_keys) {
        follow(row_.floor.load(std::memory_order_relaxed));
        if (all_) count_all(scores, n, next_keys);
        if (k_ == 0) return;
        const int32_t threshold = row_.bins.edge(floor_);
        candidates_.reserve(variant_, n, threshold);
        const size_t added = candidates_.add(variant_, scores, n, threshold, first_id);
        if (!all_) count(candidates_.last(added), added);
        above_ += added;
        if (above_ - in(floor_) < k_) return;
        while (above_ - in(floor_) >= k_) above_ -= in(floor_++);
        row_.raise_floor(floor_);
    }

    Kept finish() {
        std::lock_guard<std::mutex> lock(row_.mutex);
        for (size_t bin = 0; bin < kBins; ++bin) row_.counts[bin] += in(bin);
        if (k_) row_.raise_floor(Reached(row_.counts, k_).bin);
        return candidates_.keep(variant_, row_.bins.edge(row_.floor.load(std::memory_order_relaxed)));
    }

  private:
    // Memory would stand still meanwhile, so the next keys are fetched: as many as the counting hides.
    void count_all(const int32_t *scores, size_t n, const uint8_t *next_keys) {
        size_t i = 0;
        for (; i + kCountsPerLine <= n; i += kCountsPerLine, next_keys += kCacheLine) {
            __builtin_prefetch(next_keys);
            count(scores + i, kCountsPerLine);
        }
        count(scores + i, n - i);
    }

    // Two counters: neighbours often share a bin, and an increment has to wait for the one before.
    void count(const int32_t *scores, size_t n) {
        const Bins bins = row_.bins;
        size_t i = 0;
        for (; i + 2 <= n; i += 2) {
            ++counts_[0][bins.of(scores[i])];
            ++counts_[1][bins.of(scores[i + 1])];
        }
        if (i < n) ++counts_[0][bins.of(scores[i])];
    }

    uint32_t in(size_t bin) const { return counts_[0][bin] + counts_[1][bin]; }

    void follow(size_t floor) {
        while (floor_ < floor) above_ -= in(floor_++);
    }

    Variant variant_;
    Row &row_;
    size_t k_;
    bool all_;  // count every score, and not just candidates
    Candidates &candidates_;
    size_t floor_ = 0;  // as Row::floor
    size_t above_ = 0;  // scores counted in bin floor_ and above
    uint32_t counts_[2][kBins] = {};
};

// Chooses the k best of what the jobs of a row kept, in order. No branch depends on a score: it would be
// mispredicted.
void choose(Variant variant, const Row &row, Kept *kept, size_t jobs, size_t k, uint32_t *ids,
            int32_t *scores) {
    const auto [bin, above] = Reached(row.counts, k);
    const size_t wanted = k - (above - row.counts[bin]);
    std::vector<int32_t> members(row.counts[bin] + 1);
    size_t found = 0;
    for (size_t job = 0; job < jobs; ++job) {
        kept[job].drop_below(variant, row.bins.edge(bin));
        for (size_t i = 0; i < kept[job].ids.size(); ++i) {
            members[found] = kept[job].scores[i];
            found += row.bins.of(kept[job].scores[i]) == bin;
        }
    }
    members.resize(found);
    const Threshold threshold = threshold_of(members, wanted);
    size_t filled = 0, ties = 0;
    for (size_t job = 0; job < jobs; ++job) {
        for (size_t i = 0; i < kept[job].ids.size() && filled < k; ++i) {
            const int32_t score = kept[job].scores[i];
            ids[filled] = kept[job].ids[i];
            scores[filled] = score;
            const size_t tie = score == threshold.score;
            filled += size_t(score > threshold.score) + (tie & size_t(ties < threshold.ties));
            ties += tie;
        }
    }
}

}  // namespace
}  // namespace hillinfer
