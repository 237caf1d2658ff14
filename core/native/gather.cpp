#include <algorithm>
#include <cstring>
#include <numeric>

#include "native.h"
#include "transfers.h"

namespace hillinfer {
namespace {

// A range of the file that is read at once, and the rows order[first_row .. end_row) that lie in it.
struct Run {
    uint64_t begin, end;
    uint64_t needed_end;  // end of the last row; a file may end inside its last page
    size_t first_row, end_row;
};

uint64_t round_down(uint64_t offset, uint64_t unit) { return offset / unit * unit; }

std::vector<Run> plan(const uint64_t *offsets, const std::vector<uint32_t> &order, size_t row_bytes, uint64_t unit,
                      uint64_t gap) {
    std::vector<Run> runs;
    for (size_t i = 0; i < order.size(); ++i) {
        const uint64_t row_end = offsets[order[i]] + row_bytes;
        const uint64_t begin = round_down(offsets[order[i]], unit);
        const uint64_t end = round_down(row_end + unit - 1, unit);
        if (!runs.empty() && begin <= runs.back().end + gap &&
            end - runs.back().begin <= Transfers::kBufferBytes) {
            runs.back().end = std::max(runs.back().end, end);
            runs.back().needed_end = row_end;
            runs.back().end_row = i + 1;
        } else {
            runs.push_back({begin, end, row_end, i, i + 1});
        }
    }
    return runs;
}

// Where in `out` the run can be read to as a whole, or null: its rows follow one another there as in the file.
uint8_t *in_place(const Run &run, const uint64_t *offsets, const std::vector<uint32_t> &order, size_t row_bytes,
                  uint64_t unit, uint8_t *out) {
    uint8_t *target = out + order[run.first_row] * row_bytes;
    if (offsets[order[run.first_row]] != run.begin || run.needed_end != run.end ||
        run.end - run.begin != (run.end_row - run.first_row) * row_bytes ||
        reinterpret_cast<uintptr_t>(target) % unit)
        return nullptr;
    for (size_t i = run.first_row + 1; i < run.end_row; ++i)
        if (order[i] != order[i - 1] + 1 || offsets[order[i]] != offsets[order[i - 1]] + row_bytes) return nullptr;
    return target;
}

}  // namespace

GatherResult gather(int fd, const uint64_t *offsets, size_t n, size_t row_bytes, uint8_t *out, bool direct,
                    size_t depth) {
    const uint64_t unit = direct ? kPage : 1;
    std::vector<uint32_t> order(n);
    std::iota(order.begin(), order.end(), 0u);
    const auto earlier = [offsets](uint32_t a, uint32_t b) { return offsets[a] < offsets[b]; };
    if (!std::is_sorted(order.begin(), order.end(), earlier)) std::stable_sort(order.begin(), order.end(), earlier);
    const std::vector<Run> runs = plan(offsets, order, row_bytes, unit, direct ? kGatherGap : 0);

    std::vector<Transfer> transfers(runs.size());
    for (size_t i = 0; i < runs.size(); ++i)
        transfers[i] = {runs[i].begin, runs[i].end - runs[i].begin, runs[i].needed_end - runs[i].begin,
                        in_place(runs[i], offsets, order, row_bytes, unit, out)};
    GatherResult result;
    result.requests = runs.size();
    result.error = Transfers::instance().run(
        fd, false, direct, depth, transfers,
        [&](size_t index, const uint8_t *memory) {
            if (transfers[index].memory) return;
            const Run &run = runs[index];
            for (size_t i = run.first_row; i < run.end_row; ++i)
                std::memcpy(out + order[i] * row_bytes, memory + (offsets[order[i]] - run.begin), row_bytes);
        },
        &result.read_bytes);
    return result;
}

bool copy_rows(const uint8_t *memory, size_t bytes, const uint64_t *offsets, size_t n, size_t row_bytes, uint8_t *out) {
    if (n && (row_bytes > bytes || *std::max_element(offsets, offsets + n) > bytes - row_bytes)) return false;
    constexpr size_t kAhead = 8;  // rows, whose first line is on its way while others are copied
    for (size_t i = 0; i < n; ++i) {
        if (i + kAhead < n) __builtin_prefetch(memory + offsets[i + kAhead]);
        std::memcpy(out + i * row_bytes, memory + offsets[i], row_bytes);
    }
    return true;
}

int transfer_range(int fd, bool write, uint64_t offset, uint8_t *memory, uint64_t length, bool direct) {
    std::vector<Transfer> transfers;
    for (uint64_t begin = 0; begin < length; begin += kChunkBytes) {
        const uint64_t size = std::min(kChunkBytes, length - begin);
        transfers.push_back({offset + begin, size, size, memory + begin});
    }
    uint64_t moved;
    return Transfers::instance().run(fd, write, direct, Transfers::kDepth, transfers, [](size_t, const uint8_t *) {}, &moved);
}

}  // namespace hillinfer
