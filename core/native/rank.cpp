// Scores, histogram, checksum and top-k in one pass over the keys.
//
// A job is a range of tiles of one KV head. It goes through them in blocks that fit a second-level cache: the
// scores of a block stay in the first-level cache, are counted in bins, and only those that can still win
// are kept (tally.h). The last job of a head chooses among what all of them kept.
#include <algorithm>
#include <new>

#include "compute_pool.h"
#include "native.h"
#include "tally.h"

namespace hillinfer {
namespace {

constexpr size_t kBlockBytes = 512 << 10;   // keys: further passes over them read a second-level cache
constexpr size_t kBlockTokens = 4096;       // 16 KiB of scores, half of a first-level cache
constexpr size_t kJobBytes = 2 << 20;       // keys: larger jobs share the work less evenly
constexpr size_t kLeastJobBytes = 64 << 10; // keys: smaller jobs cost more than they do
constexpr size_t kThreadBytes = 256 << 10;  // keys: for less it does not pay to wake another thread

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

template <class Query>
bool rank(const RankRequest<Query> &request) {
    return rank_short(request) || Scan<Query>(request).run();
}

template bool rank<int8_t>(const RankRequest<int8_t> &);
template bool rank<int16_t>(const RankRequest<int16_t> &);

}  // namespace hillinfer
