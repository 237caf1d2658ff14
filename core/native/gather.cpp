#include <errno.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "io.h"
#include "native.h"
#include "pool.h"

namespace hillinfer {
namespace {

// A contiguous byte range of the file, and the rows order[first_row .. end_row) that lie in it.
struct Run {
    uint64_t begin, end;
    uint64_t needed_end;  // end of the last row; a file may end inside its last page
    size_t first_row, end_row;
};

uint64_t round_down(uint64_t offset, uint64_t unit) { return offset / unit * unit; }

std::vector<Run> plan(const uint64_t *offsets, const std::vector<uint32_t> &order, size_t row_bytes, uint64_t unit) {
    std::vector<Run> runs;
    for (size_t i = 0; i < order.size(); ++i) {
        const uint64_t row_end = offsets[order[i]] + row_bytes;
        const uint64_t begin = round_down(offsets[order[i]], unit);
        const uint64_t end = round_down(row_end + unit - 1, unit);
        if (!runs.empty() && begin <= runs.back().end && end - runs.back().begin <= ReadPool::kBufferBytes) {
            runs.back().end = std::max(runs.back().end, end);
            runs.back().needed_end = row_end;
            runs.back().end_row = i + 1;
        } else {
            runs.push_back({begin, end, row_end, i, i + 1});
        }
    }
    return runs;
}

}  // namespace

GatherResult gather(int fd, const uint64_t *offsets, size_t n, size_t row_bytes, uint8_t *out, bool direct) {
    const uint64_t unit = direct ? kPage : 1;
    std::vector<uint32_t> order(n);
    std::iota(order.begin(), order.end(), 0u);
    const auto earlier = [offsets](uint32_t a, uint32_t b) { return offsets[a] < offsets[b]; };
    if (!std::is_sorted(order.begin(), order.end(), earlier)) std::sort(order.begin(), order.end(), earlier);
    const std::vector<Run> runs = plan(offsets, order, row_bytes, unit);

    std::atomic<int> error{0};
    std::atomic<uint64_t> read_bytes{0};
    ReadPool::instance().run(runs.size(), [&](size_t index, uint8_t *buffer) {
        if (error.load(std::memory_order_relaxed)) return;
        const Run &run = runs[index];
        uint64_t got = 0;
        int failed = read_some(fd, run.begin, buffer, run.end - run.begin, unit, &got);
        if (!failed && run.begin + got < run.needed_end) failed = EIO;
        if (failed) {
            int none = 0;
            error.compare_exchange_strong(none, failed);
            return;
        }
        read_bytes.fetch_add(got, std::memory_order_relaxed);
        for (size_t i = run.first_row; i < run.end_row; ++i)
            std::memcpy(out + order[i] * row_bytes, buffer + (offsets[order[i]] - run.begin), row_bytes);
    });
    return {error.load(), read_bytes.load()};
}

}  // namespace hillinfer
