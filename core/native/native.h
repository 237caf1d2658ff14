// The kernels behind hillinfer_core.kernel. Plain C++: pointers, sizes in elements unless named bytes.
// None touches Python; all are called without the GIL. Definitions are in hillinfer_core/reference.py.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace hillinfer {

constexpr size_t kTileTokens = 16;
constexpr size_t kBeatBytes = 64;
constexpr size_t kPage = 4096;
constexpr size_t kMaxDim = 256;
constexpr int32_t kLeastOffset = -(1 << 24);
constexpr int kBinBits = 11;  // 2,048 bins: 8 KiB of counters, well inside a first-level cache
constexpr size_t kBins = size_t(1) << kBinBits;

// Adding and subtracting 1.5 * 2^23 rounds a float of magnitude below 2^22 to the nearest integer, half to
// even. Unlike rintf it needs no instruction beyond baseline x86-64, so the loop vectorises everywhere.
constexpr float kRound = 12582912.0f;

enum class Variant : int { portable = 0, avx2 = 1, avx512vnni = 2 };
bool supported(Variant variant);

enum class Format : int { float16 = 0, bfloat16 = 1, float32 = 2 };

// Widens the keys of rows [tokens][2][dim] to out [tokens][dim].
void widen_keys(const void *rows, Format format, size_t tokens, size_t dim, float *out);

struct QuantiseCounts {
    uint64_t clipped = 0;    // elements outside the range, of keys
    uint64_t nonfinite = 0;  // elements, of keys and values
};

// Quantises rows [tokens][2][dim] of one head into tiles; padding tokens of the last tile become zero.
QuantiseCounts quantise_keys(const void *rows, Format format, size_t tokens, size_t dim, const float *zero,
                             const float *inverse_scale, int bits, uint8_t *tiles);

// Quantises query [heads * group][dim] for the sum of a KV head's query heads, or their maximum: to
// q [heads][vectors][dim], offsets [heads][vectors] and sigma [heads], where vectors is 1 or group. Returns false for
// a query that is not finite once scaled; what was to be written is then undefined.
bool quantise_query(const float *query, const float *scale, const float *zero, size_t heads, size_t group, size_t dim,
                    bool sum, int8_t *q, int32_t *offsets, float *sigma);

// Scores tiles of one head against `queries` vectors [queries][dim] of int8_t or int16_t, each with its offset;
// the best of them goes to out [tiles * 16].
template <class Query>
void scores(Variant variant, const uint8_t *tiles, size_t tile_count, const Query *q, const int32_t *offsets,
            size_t queries, size_t dim, int bits, int32_t *out);

struct Threshold {
    int32_t score;  // the least that is chosen
    size_t ties;    // how many with exactly this score are chosen
};

// The threshold of the `wanted` largest of `members`, 1 to their number; reorders them.
Threshold threshold_of(std::vector<int32_t> &members, size_t wanted);

// The k largest of scores[n], ties to the lowest index, ascending by index; 1 <= k <= n.
void top_k(const int32_t *scores, size_t n, size_t k, uint32_t first_id, uint32_t *ids, int32_t *chosen);

// Appends the ids and scores of those of scores[n] that are at least `threshold`, in order; returns how many.
// Up to 15 elements after the last may be overwritten.
size_t filter(Variant variant, const int32_t *scores, size_t n, int32_t threshold, uint32_t first_id,
              uint32_t *ids, int32_t *chosen);

// The same of n scores that have ids: moves those that are chosen to the front, and writes nothing behind n.
size_t filter(Variant variant, size_t n, int32_t threshold, uint32_t *ids, int32_t *scores);

// Finds which ids [heads][k] are not among held [heads][held_count], in order; returns how many. They and their heads
// go to missing_ids and missing_heads [heads * k], how many of each head to counts [heads]. What is held from `end` on
// is passed over. `held` may be memory that somebody else writes to: each number is read once.
size_t missing(const uint32_t *ids, size_t heads, size_t k, const uint32_t *held, size_t held_count, uint32_t end,
               uint32_t *counts, int64_t *missing_heads, int64_t *missing_ids);

// Whether n ids are as many as `counts` [heads] say, and all of them below `end`.
bool fits(const uint32_t *ids, size_t n, const int64_t *counts, size_t heads, uint64_t end);

// Adds `hit` to hits [heads][tokens] of ids (counts[head] of each head, which `fits`), up to `most`. Here and below
// heads are shared by up to `threads` threads.
void count_hits(uint16_t *hits, size_t tokens, size_t heads, const uint32_t *ids, const int64_t *counts, uint16_t hit,
                uint16_t most, size_t threads);

// What `exchange` finds; each array has room for all ids or slots. Places count through all heads.
struct Exchanged {
    uint32_t *missing_ids;  // wanted and nowhere, with the slots given to them; missing_counts [heads]
    int64_t *missing_places, *missing_counts;
    int64_t *hot_slots, *hot_places;  // wanted and in the hot pool: the slots given, and where there
    uint32_t *left_ids;  // lost their slots, and which they were; left_counts [heads]
    int64_t *left_places, *left_counts;
    size_t missing = 0, found = 0, left = 0;
};

// Gives every wanted id a slot: counts[head] of each head, ascending and below `tokens`. slots [heads][slot_count] and
// hot [heads][hot_count] hold ids or 0xFFFFFFFF and are changed: what gets a slot leaves `hot`. False where a head
// wants more than it has slots, or ids do not ascend; both are half changed then.
bool exchange(uint32_t *slots, size_t slot_count, uint32_t *hot, size_t hot_count, size_t heads,
              const uint32_t *wanted, const int64_t *counts, uint32_t tokens, size_t threads, Exchanged &out);

// Puts those of ids (counts[head] of each head) into hot [heads][hot_count] that have more hits [heads][tokens] than what
// they replace; the most hit against the least hit. Returns how many: which of all ids, and their places through all heads.
size_t keep(uint32_t *hot, size_t hot_count, const uint16_t *hits, size_t tokens, size_t heads, const uint32_t *ids,
            const int64_t *counts, size_t threads, int64_t *which, int64_t *places);

// Attention of queries [heads][group][dim], float, on keys and values [heads][tokens][dim] of `format`; to out
// [heads][group][dim]. Sums are of floats. tokens and dim are at least 1.
struct AttendRequest {
    Variant variant;
    Format format;
    const float *query;
    const void *keys, *values;
    size_t heads, group, tokens, dim;
    float scaling;
    float *out;
};
void attend(const AttendRequest &request);

// Where a layer's rows lie, by extents [extents] that ascend by first token, and the rows' checksums
// [heads][checksum_stride].
struct RowPlaces {
    const int64_t *starts, *strides, *bases;
    size_t extents;
    int64_t heads, tokens, row_bytes;
    const uint32_t *checksums;
    int64_t checksum_stride;
};

// Says where n rows lie and what their checksums are; false if one does not exist.
bool locate(const RowPlaces &places, const int64_t *heads, const int64_t *tokens, size_t n, uint64_t *offsets,
            uint32_t *checksums);

// What the worker finds out between ranking and reading rows, for ids [heads][k] of tokens below `end`.
struct Lacking {
    uint32_t *counts;           // [heads]: winners that are not held
    int64_t *heads, *ids;       // [heads * k]: these winners
    uint64_t *offsets;          // [heads * k]: where the rows of the first `most` lie
    uint32_t *checksums;        // [heads * k]: theirs
    size_t found = 0;
};

// Finds the rows that are lacking, `most` at most; false if one does not exist. `held` as for `missing`.
bool find_lacking(const uint32_t *ids, size_t heads, size_t k, const uint32_t *held, size_t held_count, uint32_t end,
                  const RowPlaces &places, size_t most, Lacking &out);

// Evaluation keys of consecutive tokens: head h at tiles + h * head_stride.
struct Part {
    const uint8_t *tiles;
    int64_t head_stride;
    size_t tile_count;
};

// A request to rank tokens first .. end-1; see rank in hillinfer_core/reference.py. `origin` is the token that
// the parts begin with, a multiple of 16.
template <class Query>
struct RankRequest {
    Variant variant;
    size_t threads;
    std::vector<Part> parts;
    const Query *q;  // [rows][queries][dim]; rows is a multiple of heads, and row r reads head r * heads / rows
    const int32_t *offsets;  // [rows][queries]
    size_t heads, rows, queries, dim;
    int bits;
    size_t origin, first, end, k;  // k <= end - first
    uint32_t *ids;                 // [rows][k]
    int32_t *scores;               // [rows][k]
    uint32_t *histogram;           // [rows][kBins], or null
    uint32_t *checksums;           // [parts][heads], or null
    const std::atomic<bool> *cancel;  // or null
};

// Returns false if cancelled; what was to be written is then undefined. Throws std::bad_alloc.
template <class Query>
bool rank(const RankRequest<Query> &request);

// Ranks what has few tokens and asks for no more than ids and scores; returns false, with nothing done, for the rest.
template <class Query>
bool rank_short(const RankRequest<Query> &request);

// Reads all of `data` as fast as memory allows, whole cache lines; returns the sum of its 64-bit words.
uint64_t stream_read(Variant variant, const uint8_t *data, size_t bytes, size_t threads);

// CRC-32C of each of n rows that lie one after another; with the instruction where `hardware` and there is one.
void row_checksums(bool hardware, const uint8_t *rows, size_t n, size_t row_bytes, uint32_t *out);

// Longer ranges are transferred in chunks, to have several in flight.
constexpr uint64_t kChunkBytes = 512 << 10;

// Reads or writes a range of a file; returns errno, 0 for success: EIO where the file ends too early, ENOSPC where
// it takes no more. With `direct`, offset, length and address are whole pages. Blocks.
int transfer_range(int fd, bool write, uint64_t offset, uint8_t *memory, uint64_t length, bool direct);

// Direct reads with no more than this between them become one, which reads what is between them too: it takes no
// longer than two (docs/storage.md).
constexpr uint64_t kGatherGap = 2 * kPage;

// The sums behind a data checksum; both zero before the first beat.
struct DataSums {
    uint64_t first[kTileTokens] = {};
    uint64_t second[kTileTokens] = {};
};

// Adds `count` beats that lie one after another.
void add_beats(Variant variant, const uint8_t *beats, size_t count, DataSums &sums);

// Makes `sums` those of its beats and then of `following`, which were summed apart.
void join(DataSums &sums, const DataSums &following, size_t following_beats);

uint32_t data_checksum(const DataSums &sums);

struct GatherResult {
    int error = 0;  // errno, 0 for success
    uint64_t read_bytes = 0;
    uint64_t requests = 0;  // that the file was read with, if none was short
};

// Reads n rows at byte offsets into out [n][row_bytes]; with `direct` in whole pages, `depth` requests at once (at
// most 64). Blocks.
GatherResult gather(int fd, const uint64_t *offsets, size_t n, size_t row_bytes, uint8_t *out, bool direct,
                    size_t depth);

// Copies n rows at byte offsets of memory [bytes] into out [n][row_bytes]; false, with none copied, if one is not in it.
bool copy_rows(const uint8_t *memory, size_t bytes, const uint64_t *offsets, size_t n, size_t row_bytes, uint8_t *out);

}  // namespace hillinfer
