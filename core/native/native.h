// The kernels behind hillinfer_core.kernel. Plain C++: pointers, sizes in elements unless named bytes.
// None touches Python; all are called without the GIL. Definitions are in hillinfer_core/reference.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hillinfer {

constexpr size_t kTileTokens = 16;
constexpr size_t kBeatBytes = 64;
constexpr size_t kPage = 4096;

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

// Scores tiles of one head against `queries` vectors [queries][dim]; the best of them goes to out [tiles * 16].
void scores(Variant variant, const uint8_t *tiles, size_t tile_count, const int8_t *q, size_t queries,
            size_t dim, int bits, int32_t *out);

// The k largest of scores[n], ties to the lowest index, ascending by index; 1 <= k <= n.
void top_k(const int32_t *scores, size_t n, size_t k, uint32_t first_id, uint32_t *ids, int32_t *chosen);

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

}  // namespace hillinfer
