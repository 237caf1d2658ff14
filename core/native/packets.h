// A packed request of one evaluation (hillinfer_core/packed.py) and the packets that it travels in
// (hillinferd/worker/packets.py), as byte offsets; tests hold them to those definitions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace hillinfer {

// _HEADER and _ITEM of packed.py.
constexpr size_t kLayerAt = 0, kFirstAt = 24, kEndAt = 28, kKAt = 32, kRequestBytes = 148;
constexpr size_t kResultHeader = 36;  // _RESULT

// _REQUEST and _ANSWER of packets.py.
constexpr uint8_t kEvaluate = 1, kEvaluated = 2;
constexpr size_t kSessionAt = 8, kRequestHeader = 16;
constexpr size_t kKeyBytesAt = 8, kTrafficAt = 16, kTraffic = 6, kWinnersAt = 64, kMissingAt = 72, kAnswerHeader = 80;
constexpr size_t kMostPacket = 192 * 1024;

constexpr size_t kMostTerms = 32;  // kept of a session's requests; Unpacker keeps 16

template <class T>
T number(const uint8_t *at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

// Whether two requests are the same but for layer and tokens.
inline bool same_terms(const uint8_t *one, const uint8_t *other) {
    return !std::memcmp(one + 4, other + 4, kFirstAt - 4) && !std::memcmp(one + kKAt, other + kKAt, kRequestBytes - kKAt);
}

}  // namespace hillinfer
