// The worker's evaluations that repeat (hillinferd/worker/repeats.py): from the daemon's packet to the answer without
// Python. Whatever does not go as it should is left to Python, which then does all of it and says what is wrong.
#include <errno.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "evaluation.h"
#include "packets.h"

namespace nb = nanobind;

namespace hillinfer {
namespace {

constexpr size_t kMostKept = 2048;  // requests, of some 3 KiB each: all layers of many sessions

// Where rows are read from: a pool that lies in memory, or a file.
struct RowSource {
    std::optional<Array<const uint8_t, 1>> memory;
    int fd;
    bool direct;
    size_t depth;
    uint64_t capacity;
};

struct Kept {
    std::vector<uint8_t> asked;
    Evaluation evaluation;
    uint64_t rows_at;
    uint32_t generation;
    uint64_t key_bytes;
    RowSource source;
};

template <class T>
uint8_t *put(uint8_t *to, T value) {
    std::memcpy(to, &value, sizeof value);
    return to + sizeof value;
}

class Repeats {
  public:
    // `many` threads rank keys of so many bytes, and `few` of fewer.
    Repeats(size_t few, size_t many, size_t many_from) : few_(few), many_(many), many_from_(many_from) {}

    // Answers the same request itself from now on, also of other tokens of the layer.
    void keep(uint64_t session, nb::bytes asked, Array<uint8_t, 1> arena, uint64_t query_at, size_t group, bool sum,
              Array<const float, 2> scale, Array<const float, 2> zero, int variant,
              const std::vector<Strided<const uint8_t, 3>> &parts, int bits, uint64_t origin, uint64_t k, uint64_t ids_at,
              std::optional<uint64_t> scores_at, uint64_t held_at, size_t held_count, Array<const int64_t, 2> extents,
              int64_t row_bytes, int64_t tokens, Strided<const uint32_t, 2> sums, uint64_t rows_at, size_t most,
              uint32_t generation, uint64_t key_bytes, std::optional<Array<const uint8_t, 1>> memory, int fd,
              bool direct, size_t depth, uint64_t capacity) {
        if (asked.size() != kRequestBytes) return;
        const auto *bytes = static_cast<const uint8_t *>(asked.data());
        if (count_ >= kMostKept) clear();
        auto &there = kept_[{session, number<uint32_t>(bytes + kLayerAt)}];
        const auto same = [&](const Kept &other) { return same_terms(other.asked.data(), bytes); };
        const size_t before = there.size();
        there.erase(std::remove_if(there.begin(), there.end(), same), there.end());
        if (there.size() >= kMostTerms) there.clear();
        count_ += there.size() + 1 - before;
        there.push_back({{bytes, bytes + kRequestBytes},
                         {std::move(arena), query_at, group, sum, std::move(scale), std::move(zero), Variant(variant), parts, bits, origin, k,
                          {ids_at, scores_at, held_at, held_count}, std::move(extents), row_bytes, tokens, std::move(sums), most},
                         rows_at, generation, key_bytes, {std::move(memory), fd, direct, depth, capacity}});
    }

    void clear() {
        kept_.clear();
        count_ = 0;
    }

    // Waits for the next packet that is Python's; returns it, empty at hang-up, and the descriptor that came with it, or
    // -1. Raises OSError.
    nb::object next(int sock) {
        packet_.resize(kMostPacket);
        ssize_t count;
        int fd = -1, error = 0;
        {
            nb::gil_scoped_release released;
            do {
                count = receive(sock, fd);
                error = count < 0 ? errno : 0;
                if (count > 0 && fd < 0 && answer(size_t(count))) {
                    count = send(sock, answer_.data(), answer_.size(), MSG_NOSIGNAL);
                    error = count < 0 ? errno : 0;
                    if (!error) continue;
                }
                break;
            } while (true);
        }
        if (error) {
            errno = error;
            PyErr_SetFromErrno(PyExc_OSError);
            throw nb::python_error();
        }
        return nb::make_tuple(nb::bytes(reinterpret_cast<const char *>(packet_.data()), size_t(count)), fd);
    }

  private:
    ssize_t receive(int sock, int &fd) {
        iovec into{packet_.data(), packet_.size()};
        alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
        msghdr message{};
        message.msg_iov = &into;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        ssize_t count;
        do count = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
        while (count < 0 && errno == EINTR);
        const cmsghdr *const header = count < 0 ? nullptr : CMSG_FIRSTHDR(&message);
        if (header && header->cmsg_type == SCM_RIGHTS) std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
        return count;
    }

    // Whether the packet was a request that is kept, and is answered in `answer_`.
    bool answer(size_t count) {
        if (count != kRequestHeader + kRequestBytes || packet_[0] != kEvaluate) return false;
        const uint8_t *const asked = packet_.data() + kRequestHeader;
        const auto found = kept_.find({number<uint64_t>(packet_.data() + kSessionAt), number<uint32_t>(asked + kLayerAt)});
        if (found == kept_.end()) return false;
        for (Kept &kept : found->second)
            if (same_terms(kept.asked.data(), asked))
                return carry_out(kept, number<uint32_t>(asked + kFirstAt), number<uint32_t>(asked + kEndAt));
        return false;
    }

    bool carry_out(Kept &kept, uint64_t first, uint64_t end) {
        Evaluation &evaluation = kept.evaluation;
        if (first >= end || int64_t(end) > evaluation.tokens || !evaluation.fits(first, end)) return false;
        const size_t heads = evaluation.heads(), room = heads * evaluation.k;
        counts_.resize(heads);
        found_.resize(2 * room);
        offsets_.resize(room);
        checksums_.resize(room);
        Lacking lacking{counts_.data(), found_.data(), found_.data() + room, offsets_.data(), checksums_.data()};
        double seconds = 0;
        if (evaluation.carry_out(first, end, threads(evaluation, first, end), lacking, seconds) != Outcome::done) return false;
        const size_t brought = std::min(lacking.found, evaluation.most);
        uint64_t read = 0, requests = 0;
        if (brought && !bring(kept, brought, read, requests)) return false;

        const size_t tile = kTileTokens * evaluation.scale.shape(1) * size_t(evaluation.bits) / 8;
        const uint64_t scanned = ((end + kTileTokens - 1) / kTileTokens - first / kTileTokens) * heads * tile;
        answer_.assign(kAnswerHeader + kResultHeader + 4 * heads, 0);
        uint8_t *to = answer_.data();
        to[0] = kEvaluated;
        to = put(to + kKeyBytesAt, kept.key_bytes);
        for (const uint64_t moved : {uint64_t(0), read, scanned, uint64_t(0), requests, uint64_t(0)}) to = put(to, moved);
        to = put(to, uint64_t(room));
        to = put(to, uint64_t(lacking.found));
        to = put(to, kept.generation);
        to = put(to, uint32_t(brought));
        to = put(to, scanned);
        to = put(to, read);
        to = put(to, seconds);
        to = put(to, uint32_t(heads));
        std::memcpy(to, counts_.data(), 4 * heads);
        return true;
    }

    size_t threads(const Evaluation &evaluation, uint64_t first, uint64_t end) const {
        uint64_t token = evaluation.origin, bytes = 0;
        for (const auto &part : evaluation.parts) {
            const uint64_t after = token + part.shape(1) * kTileTokens;
            if (token < end && after > first) bytes += part.size();
            token = after;
        }
        return bytes >= many_from_ ? many_ : few_;
    }

    // Whether all rows are in the arena, as they should be.
    bool bring(Kept &kept, size_t count, uint64_t &read, uint64_t &requests) {
        const uint64_t row_bytes = uint64_t(kept.evaluation.row_bytes);
        uint8_t *const out = region<uint8_t>(kept.evaluation.arena, kept.rows_at, count * row_bytes);
        if (!out) return false;
        const RowSource &from = kept.source;
        if (from.memory) {
            if (!copy_rows(from.memory->data(), from.memory->shape(0), offsets_.data(), count, row_bytes, out)) return false;
            read = count * row_bytes;
        } else {
            for (size_t row = 0; row < count; ++row)
                if (offsets_[row] > from.capacity || row_bytes > from.capacity - offsets_[row]) return false;
            const GatherResult result = gather(from.fd, offsets_.data(), count, row_bytes, out, from.direct, from.depth);
            if (result.error) return false;
            read = result.read_bytes;
            requests = result.requests;
        }
        sums_.resize(count);
        row_checksums(kept.evaluation.variant != Variant::portable, out, count, row_bytes, sums_.data());
        return std::equal(sums_.begin(), sums_.end(), checksums_.begin());
    }

    size_t few_, many_, many_from_, count_ = 0;
    std::map<std::pair<uint64_t, uint32_t>, std::vector<Kept>> kept_;  // by session and layer
    std::vector<uint8_t> packet_, answer_;
    std::vector<uint32_t> counts_, checksums_, sums_;
    std::vector<int64_t> found_;
    std::vector<uint64_t> offsets_;
};

}  // namespace

void define_repeats(nb::module_ &module) {
    nb::class_<Repeats>(module, "Repeats")
        .def(nb::init<size_t, size_t, size_t>())
        .def("keep", &Repeats::keep, nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(),
             nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert().none(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg())
        .def("clear", &Repeats::clear)
        .def("next", &Repeats::next);
}

}  // namespace hillinfer
