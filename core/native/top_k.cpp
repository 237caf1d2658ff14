#include <algorithm>
#include <functional>

#include "native.h"

namespace hillinfer {
namespace {

constexpr size_t kFew = 512;  // scores: a histogram of fewer costs more than choosing among all of them

// A histogram over the range of the scores finds the bin of the k-th largest; only that bin is looked at
// closer. Two passes over the scores, whatever k is.
Threshold find_threshold(const int32_t *scores, size_t n, size_t k) {
    if (n <= kFew) {
        std::vector<int32_t> members(scores, scores + n);
        return threshold_of(members, k);
    }
    int32_t low = scores[0], high = scores[0];
    for (size_t i = 1; i < n; ++i) {
        low = std::min(low, scores[i]);
        high = std::max(high, scores[i]);
    }
    const uint32_t base = uint32_t(low);
    int shift = 0;
    while (((uint32_t(high) - base) >> shift) >= kBins) ++shift;

    uint32_t histogram[kBins] = {};
    for (size_t i = 0; i < n; ++i) ++histogram[(uint32_t(scores[i]) - base) >> shift];

    size_t bin = kBins, above = 0;
    do {
        --bin;
        above += histogram[bin];
    } while (above < k);
    above -= histogram[bin];
    const size_t wanted = k - above;  // of the bin, at least 1
    if (shift == 0) return {int32_t(base + uint32_t(bin)), wanted};

    std::vector<int32_t> members;
    members.reserve(histogram[bin]);
    for (size_t i = 0; i < n; ++i)
        if (((uint32_t(scores[i]) - base) >> shift) == bin) members.push_back(scores[i]);
    return threshold_of(members, wanted);
}

}  // namespace

Threshold threshold_of(std::vector<int32_t> &members, size_t wanted) {
    const auto least = members.begin() + (wanted - 1);
    std::nth_element(members.begin(), least, members.end(), std::greater<int32_t>());
    const int32_t score = *least;
    const auto better = std::count_if(members.begin(), least, [score](int32_t member) { return member > score; });
    return {score, wanted - size_t(better)};
}

void top_k(const int32_t *scores, size_t n, size_t k, uint32_t first_id, uint32_t *ids, int32_t *chosen) {
    Threshold threshold = find_threshold(scores, n, k);
    size_t filled = 0;
    for (size_t i = 0; filled < k; ++i) {
        if (scores[i] < threshold.score) continue;
        if (scores[i] == threshold.score) {
            if (threshold.ties == 0) continue;
            --threshold.ties;
        }
        ids[filled] = first_id + uint32_t(i);
        chosen[filled++] = scores[i];
    }
}

}  // namespace hillinfer
