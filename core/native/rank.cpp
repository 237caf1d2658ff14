// Scores, histogram, checksum and top-k in one pass over the keys.
//
// A job is a range of tiles of one KV head. It goes through them in blocks that fit a second-level cache: the
// scores of a block stay in the first-level cache, are counted in bins, and only those that can still win
// are kept. What can win is known from the bins: with k scores in bin b and above, no score below bin b wins.
// Jobs of a head tell one another of that bin, and raise it by what they counted together as each is done. The
// last job of a head chooses among what all of them kept.
#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <new>

#include "compute_pool.h"
#include "native.h"

namespace hillinfer {
namespace {

constexpr size_t kBlockBytes = 512 << 10;   // keys: further passes over them read a second-level cache
constexpr size_t kBlockTokens = 4096;       // 16 KiB of scores, half of a first-level cache
constexpr size_t kJobBytes = 2 << 20;       // keys: larger jobs share the work less evenly
constexpr size_t kLeastJobBytes = 64 << 10; // keys: smaller jobs cost more than they do
constexpr size_t kThreadBytes = 256 << 10;  // keys: for less it does not pay to wake another thread
constexpr size_t kOvershoot = 16;           // what `filter` may write behind the last
constexpr size_t kCacheLine = 64;           // bytes
constexpr size_t kShortTokens = 512;        // for fewer of a head, clearing and adding up bins costs more than they save
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

// Tiles of one part that one job goes through.
struct Piece {
    size_t part, first_tile, end_tile;
    size_t token;  // of first_tile
};

template <class Query>
class Scan {
  public:
    explicit Scan(const RankRequest<Query> &request)
        : r_(request), group_(r_.rows / r_.heads), tile_bytes_(kTileTokens * r_.dim * r_.bits / 8), rows_(r_.rows),
          unfinished_(r_.heads) {
        divide();
        kept_.resize(r_.rows * jobs());
        if (r_.checksums) sums_.resize(pieces_.size() * r_.heads);
        for (auto &count : unfinished_) count = jobs();
        for (size_t row = 0; row < r_.rows; ++row)
            rows_[row].bins = bins_for(r_.q + row * r_.queries * r_.dim, r_.offsets + row * r_.queries, r_.queries,
                                       r_.dim, r_.bits);
    }

    bool run() {
        ComputePool::instance().run(r_.heads * jobs(), threads_, [this](size_t i) {
            try {
                scan(i / jobs(), i % jobs());
            } catch (const std::bad_alloc &) {
                failed_ = true;
            }
        });
        if (failed_) throw std::bad_alloc();
        if (stopped()) return false;
        if (r_.checksums) checksums();
        return true;
    }

  private:
    size_t jobs() const { return starts_.size() - 1; }  // of each head
    bool stopped() const { return failed_ || (r_.cancel && r_.cancel->load(std::memory_order_relaxed)); }

    // Cuts the parts into pieces, and hands consecutive pieces to jobs.
    void divide() {
        const size_t first_tile = r_.first / kTileTokens, end_tile = (r_.end + kTileTokens - 1) / kTileTokens;
        std::vector<Piece> parts;
        size_t tile = r_.origin / kTileTokens, total = 0;
        for (size_t part = 0; part < r_.parts.size(); ++part) {
            const size_t count = r_.parts[part].tile_count;
            // A checksum is of the whole part.
            const size_t from = r_.checksums ? tile : std::clamp(first_tile, tile, tile + count);
            const size_t to = r_.checksums ? tile + count : std::clamp(end_tile, from, tile + count);
            if (from < to) parts.push_back({part, from - tile, to - tile, from * kTileTokens});
            total += to - from;
            tile += count;
        }
        const size_t bytes = total * tile_bytes_ * r_.heads;
        threads_ = std::clamp<size_t>(bytes / kThreadBytes, 1, std::max<size_t>(r_.threads, 1));
        const size_t share = std::clamp(bytes / (4 * threads_), kLeastJobBytes, kJobBytes);
        const size_t most = std::max<size_t>(share / tile_bytes_, 1);
        starts_ = {0};
        size_t filled = 0;
        for (Piece piece : parts) {
            while (piece.first_tile < piece.end_tile) {
                const size_t take = std::min(piece.end_tile - piece.first_tile, most - filled);
                pieces_.push_back({piece.part, piece.first_tile, piece.first_tile + take, piece.token});
                piece.first_tile += take;
                piece.token += take * kTileTokens;
                filled += take;
                if (filled == most) {
                    starts_.push_back(pieces_.size());
                    filled = 0;
                }
            }
        }
        if (filled) starts_.push_back(pieces_.size());
    }

    void scan(size_t head, size_t job) {
        thread_local std::vector<Candidates> candidates;
        if (candidates.size() < group_) candidates.resize(group_);
        std::vector<Tally> tallies;
        tallies.reserve(group_);
        for (size_t g = 0; g < group_; ++g)
            tallies.emplace_back(r_.variant, rows_[head * group_ + g], r_.k, r_.histogram != nullptr,
                                 candidates[g]);
        const size_t tokens = std::min(kBlockTokens, kBlockBytes * kTileTokens / tile_bytes_);
        const size_t block = std::max<size_t>(tokens / kTileTokens, 1);
        for (size_t p = starts_[job]; p < starts_[job + 1]; ++p) {
            const Piece &piece = pieces_[p];
            const uint8_t *tiles = r_.parts[piece.part].tiles + int64_t(head) * r_.parts[piece.part].head_stride;
            for (size_t tile = piece.first_tile; tile < piece.end_tile; tile += block) {
                if (stopped()) return;
                const size_t count = std::min(block, piece.end_tile - tile);
                const uint8_t *keys = tiles + tile * tile_bytes_;
                if (r_.checksums)
                    add_beats(r_.variant, keys, count * tile_bytes_ / kBeatBytes, sums_[p * r_.heads + head]);
                rank_block(head, keys, count, piece.token + (tile - piece.first_tile) * kTileTokens, tallies);
            }
        }
        if (stopped()) return;
        for (size_t g = 0; g < group_; ++g) kept_[(head * group_ + g) * jobs() + job] = tallies[g].finish();
        if (unfinished_[head].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(head);
    }

    void rank_block(size_t head, const uint8_t *keys, size_t tiles, size_t token,
                    std::vector<Tally> &tallies) {
        const size_t first = std::max(r_.first, token), end = std::min(r_.end, token + tiles * kTileTokens);
        if (first >= end) return;
        alignas(64) int32_t block[kBlockTokens];
        for (size_t g = 0; g < group_ && !stopped(); ++g) {
            const size_t row = head * group_ + g;
            scores(r_.variant, keys, tiles, r_.q + row * r_.queries * r_.dim, r_.offsets + row * r_.queries,
                   r_.queries, r_.dim, r_.bits, block);
            tallies[g].add(block + (first - token), end - first, uint32_t(first), keys + tiles * tile_bytes_);
        }
    }

    void finish(size_t head) {
        for (size_t row = head * group_; row < (head + 1) * group_; ++row) {
            Kept *kept = &kept_[row * jobs()];
            if (r_.histogram)
                std::copy(rows_[row].counts, rows_[row].counts + kBins, r_.histogram + row * kBins);
            if (r_.k)
                choose(r_.variant, rows_[row], kept, jobs(), r_.k, r_.ids + row * r_.k, r_.scores + row * r_.k);
            for (size_t job = 0; job < jobs(); ++job) kept[job] = Kept();
        }
    }

    void checksums() {
        for (size_t head = 0; head < r_.heads; ++head) {
            std::vector<DataSums> parts(r_.parts.size());
            for (size_t p = 0; p < pieces_.size(); ++p) {
                const size_t tiles = pieces_[p].end_tile - pieces_[p].first_tile;
                join(parts[pieces_[p].part], sums_[p * r_.heads + head], tiles * tile_bytes_ / kBeatBytes);
            }
            for (size_t part = 0; part < parts.size(); ++part)
                r_.checksums[part * r_.heads + head] = data_checksum(parts[part]);
        }
    }

    const RankRequest<Query> &r_;
    size_t group_;       // rows of each head
    size_t tile_bytes_;
    size_t threads_ = 1;
    std::vector<Piece> pieces_;
    std::vector<size_t> starts_;  // job j of a head has pieces starts_[j] to starts_[j + 1] - 1
    std::vector<Row> rows_;
    std::vector<Kept> kept_;       // [rows][jobs]
    std::vector<DataSums> sums_;    // [pieces][heads]
    std::vector<std::atomic<size_t>> unfinished_;  // jobs of each head
    std::atomic<bool> failed_{false};
};

}  // namespace

// Ranks without bins; the tiles that hold the tokens are at most kShortTokens / 16 of each head.
template <class Query>
void rank_short(const RankRequest<Query> &r) {
    alignas(64) int32_t all[kShortTokens];
    const size_t tile_bytes = kTileTokens * r.dim * r.bits / 8, group = r.rows / r.heads;
    const size_t first_tile = r.first / kTileTokens, end_tile = (r.end + kTileTokens - 1) / kTileTokens;
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
}

template <class Query>
bool rank(const RankRequest<Query> &request) {
    const size_t end = (request.end + kTileTokens - 1) / kTileTokens * kTileTokens;
    const bool is_short = end - request.first / kTileTokens * kTileTokens <= kShortTokens && request.k > 0;
    if (!is_short || request.histogram || request.checksums || request.cancel) return Scan<Query>(request).run();
    rank_short(request);
    return true;
}

template bool rank<int8_t>(const RankRequest<int8_t> &);
template bool rank<int16_t>(const RankRequest<int16_t> &);

}  // namespace hillinfer
