// Python bindings. hillinfer_core/kernel.py checks every argument before it comes here.
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/vfs.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/stat.h>
#include <sys/statfs.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "bindings.h"
#include "native.h"

namespace nb = nanobind;
using namespace hillinfer;

namespace {

// STATX_DIOALIGN of linux/stat.h (Linux 6.1), newer than the headers of some that build this.
constexpr unsigned kStatxDioAlign = 0x2000;
constexpr size_t kStatxDioOffset = 0x98;

[[noreturn]] void raise_os_error(int number) {
    errno = number;
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
}

void py_widen_keys(Bytes1 rows, int format, size_t tokens, size_t dim, Array<float, 1> out) {
    nb::gil_scoped_release released;
    widen_keys(rows.data(), Format(format), tokens, dim, out.data());
}

std::pair<uint64_t, uint64_t> py_quantise_keys(Bytes1 rows, int format, size_t tokens,
                                               Array<const float, 2> zero, Array<const float, 2> inverse_scale,
                                               int bits, Array<uint8_t, 3> tiles) {
    const size_t heads = zero.shape(0), dim = zero.shape(1);
    const size_t head_row_bytes = heads ? rows.shape(0) / heads : 0;
    const size_t head_tile_bytes = tiles.shape(1) * tiles.shape(2);
    QuantiseCounts total;
    nb::gil_scoped_release released;
    for (size_t head = 0; head < heads; ++head) {
        const QuantiseCounts counts = quantise_keys(
            rows.data() + head * head_row_bytes, Format(format), tokens, dim, zero.data() + head * dim,
            inverse_scale.data() + head * dim, bits, tiles.data() + head * head_tile_bytes);
        total.clipped += counts.clipped;
        total.nonfinite += counts.nonfinite;
    }
    return {total.clipped, total.nonfinite};
}

// As the process has it now: os.environ of Python takes ten times as long.
std::optional<std::string> environment(const char *name) {
    const char *value = std::getenv(name);
    return value ? std::optional<std::string>(value) : std::nullopt;
}

// The least and the greatest number, 0 and 0 of none.
std::pair<int32_t, int32_t> extremes(Array<const int32_t, 2> numbers) {
    const size_t count = numbers.size();
    if (count == 0) return {0, 0};
    const auto [least, most] = std::minmax_element(numbers.data(), numbers.data() + count);
    return {*least, *most};
}

bool py_quantise_query(Array<const float, 2> query, Array<const float, 2> scale, Array<const float, 2> zero, bool sum,
                       Array<int8_t, 3> q, Array<int32_t, 2> offsets, Array<float, 1> sigma) {
    const size_t heads = scale.shape(0), dim = scale.shape(1);
    return quantise_query(query.data(), scale.data(), zero.data(), heads, query.shape(0) / heads, dim, sum, q.data(),
                          offsets.data(), sigma.data());
}

// Only the head axis of `tiles` and `out` may be strided.
template <class Query>
void py_scores(int variant, Strided<const uint8_t, 3> tiles, Array<const Query, 3> q,
               Array<const int32_t, 2> offsets, int bits, Strided<int32_t, 2> out) {
    const size_t heads = q.shape(0), queries = q.shape(1), dim = q.shape(2);
    nb::gil_scoped_release released;
    for (size_t head = 0; head < heads; ++head)
        scores(Variant(variant), tiles.data() + int64_t(head) * tiles.stride(0), tiles.shape(1),
               q.data() + head * queries * dim, offsets.data() + head * queries, queries, dim, bits,
               out.data() + int64_t(head) * out.stride(0));
}

void py_top_k(Strided<const int32_t, 2> scores, uint32_t first_id, Array<uint32_t, 2> ids,
              Array<int32_t, 2> chosen) {
    const size_t k = ids.shape(1);
    nb::gil_scoped_release released;
    for (size_t head = 0; head < ids.shape(0); ++head)
        top_k(scores.data() + int64_t(head) * scores.stride(0), scores.shape(1), k, first_id,
              ids.data() + head * k, chosen.data() + head * k);
}

struct Cancel {
    std::atomic<bool> set{false};
};

// Only the head axis of a part may be strided.
template <class Query>
bool py_rank(int variant, size_t threads, const std::vector<Strided<const uint8_t, 3>> &parts, size_t heads,
             Array<const Query, 3> q, Array<const int32_t, 2> offsets, int bits, size_t origin, size_t first,
             size_t end, Array<uint32_t, 2> ids, Array<int32_t, 2> scores, std::optional<Array<uint32_t, 2>> histogram,
             std::optional<Array<uint32_t, 2>> checksums, const Cancel *cancel) {
    RankRequest<Query> request{};
    request.variant = Variant(variant);
    request.threads = threads;
    for (const auto &part : parts) request.parts.push_back({part.data(), part.stride(0), part.shape(1)});
    request.q = q.data();
    request.offsets = offsets.data();
    request.heads = heads;
    request.rows = q.shape(0);
    request.queries = q.shape(1);
    request.dim = q.shape(2);
    request.bits = bits;
    request.origin = origin;
    request.first = first;
    request.end = end;
    request.k = ids.shape(1);
    request.ids = ids.data();
    request.scores = scores.data();
    request.histogram = histogram ? histogram->data() : nullptr;
    request.checksums = checksums ? checksums->data() : nullptr;
    request.cancel = cancel ? &cancel->set : nullptr;
    nb::gil_scoped_release released;
    return rank(request);
}

uint64_t py_stream_read(int variant, size_t threads, Bytes1 data) {
    nb::gil_scoped_release released;
    return stream_read(Variant(variant), data.data(), data.shape(0), threads);
}

void py_row_checksums(bool hardware, Array<const uint8_t, 2> rows, Array<uint32_t, 1> out) {
    nb::gil_scoped_release released;
    row_checksums(hardware, rows.data(), rows.shape(0), rows.shape(1), out.data());
}

// The first row whose checksum is another one, or -1.
int64_t first_difference(Array<const uint8_t, 2> rows, Array<const uint32_t, 1> checksums, bool hardware) {
    nb::gil_scoped_release released;
    constexpr size_t kRows = 256;
    uint32_t found[kRows];
    for (size_t first = 0; first < rows.shape(0); first += kRows) {
        const size_t count = std::min(kRows, rows.shape(0) - first);
        row_checksums(hardware, rows.data() + first * rows.shape(1), count, rows.shape(1), found);
        const uint32_t *right = checksums.data() + first;
        const uint32_t *other = std::mismatch(found, found + count, right).first;
        if (other != found + count) return int64_t(first + (other - found));
    }
    return -1;
}

// Only the head axis of `tiles` may be strided.
void py_data_checksums(int variant, Strided<const uint8_t, 3> tiles, Array<uint32_t, 1> out) {
    nb::gil_scoped_release released;
    for (size_t head = 0; head < out.shape(0); ++head) {
        DataSums sums;
        add_beats(Variant(variant), tiles.data() + int64_t(head) * tiles.stride(0),
                  tiles.shape(1) * tiles.shape(2) / kBeatBytes, sums);
        out.data()[head] = data_checksum(sums);
    }
}

// Returns how many are missing, found in the hot pool, and left; nothing where ids or counts do not fit, and where a
// head wants more than it has slots: these are changed then.
std::optional<std::vector<size_t>> py_exchange(Array<uint32_t, 2> slots, Array<uint32_t, 2> hot,
                                               Array<const uint32_t, 1> wanted, Array<const int64_t, 1> counts,
                                               uint32_t tokens, size_t threads, Array<uint32_t, 2> ids,
                                               Array<int64_t, 2> places, Array<int64_t, 2> of_heads) {
    nb::gil_scoped_release released;
    const size_t room = places.shape(1), heads = slots.shape(0);
    if (hot.shape(0) != heads || counts.shape(0) != heads || wanted.shape(0) > room ||
        !fits(wanted.data(), wanted.shape(0), counts.data(), heads, tokens))
        return std::nullopt;
    Exchanged out{ids.data(), places.data(), of_heads.data(), places.data() + room, places.data() + 2 * room,
                  ids.data() + ids.shape(1), places.data() + 3 * room, of_heads.data() + of_heads.shape(1)};
    if (!exchange(slots.data(), slots.shape(1), hot.data(), hot.shape(1), slots.shape(0), wanted.data(),
                  counts.data(), tokens, threads, out))
        return std::nullopt;
    return std::vector<size_t>{out.missing, out.found, out.left};
}

bool py_count_hits(Array<uint16_t, 2> hits, Array<const uint32_t, 1> ids, Array<const int64_t, 1> counts,
                   uint16_t hit, uint16_t most, size_t threads) {
    nb::gil_scoped_release released;
    const size_t heads = hits.shape(0);
    if (counts.shape(0) != heads || !fits(ids.data(), ids.shape(0), counts.data(), heads, hits.shape(1))) return false;
    count_hits(hits.data(), hits.shape(1), heads, ids.data(), counts.data(), hit, most, threads);
    return true;
}

// Returns how many are kept; nothing where counts do not fit.
std::optional<size_t> py_keep(Array<uint32_t, 2> hot, Array<const uint16_t, 2> hits, Array<const uint32_t, 1> ids,
                              Array<const int64_t, 1> counts, size_t threads, Array<int64_t, 1> which,
                              Array<int64_t, 1> places) {
    nb::gil_scoped_release released;
    const size_t heads = hot.shape(0);
    if (hits.shape(0) != heads || counts.shape(0) != heads || which.shape(0) < ids.shape(0) ||
        places.shape(0) < ids.shape(0) ||
        !fits(ids.data(), ids.shape(0), counts.data(), heads, uint64_t(UINT32_MAX) + 1))
        return std::nullopt;
    return keep(hot.data(), hot.shape(1), hits.data(), hits.shape(1), hot.shape(0), ids.data(), counts.data(),
                threads, which.data(), places.data());
}

// The rows of `checksums` may lie apart.
bool py_locate(Array<const int64_t, 2> extents, int64_t row_bytes, int64_t tokens,
               nb::ndarray<const uint32_t, nb::ndim<2>, nb::device::cpu> sums, Array<const int64_t, 1> heads,
               Array<const int64_t, 1> ids, Array<uint64_t, 1> offsets, Array<uint32_t, 1> checksums) {
    const size_t count = extents.shape(1);
    const RowPlaces places{extents.data(), extents.data() + count, extents.data() + 2 * count, count,
                           int64_t(sums.shape(0)), std::min(tokens, int64_t(sums.shape(1))), row_bytes, sums.data(),
                           sums.stride(0)};
    return locate(places, heads.data(), ids.data(), ids.shape(0), offsets.data(), checksums.data());
}

// Whether shapes fit; keys and values are bytes [heads][tokens][dim].
bool py_attend(int variant, int format, Array<const uint8_t, 3> keys, Array<const uint8_t, 3> values,
               Array<const float, 3> query, float scaling, Array<float, 3> out) {
    const size_t heads = query.shape(0), group = query.shape(1), dim = query.shape(2), tokens = keys.shape(1);
    const size_t row_bytes = dim * (Format(format) == Format::float32 ? 4 : 2);
    for (size_t axis = 0; axis < 3; ++axis)
        if (keys.shape(axis) != values.shape(axis) || query.shape(axis) != out.shape(axis)) return false;
    if (keys.shape(0) != heads || keys.shape(2) != row_bytes || !heads || !group || !dim || !tokens) return false;
    nb::gil_scoped_release released;
    attend({Variant(variant), Format(format), query.data(), keys.data(), values.data(), heads, group, tokens, dim,
            scaling, out.data()});
    return true;
}

bool py_is_memory(int fd) {
    struct statfs info;
    return fstatfs(fd, &info) == 0 && (info.f_type == TMPFS_MAGIC || info.f_type == RAMFS_MAGIC);
}

bool py_copy_rows(Bytes1 memory, Array<const uint64_t, 1> offsets, Array<uint8_t, 2> out) {
    nb::gil_scoped_release released;
    return copy_rows(memory.data(), memory.shape(0), offsets.data(), offsets.shape(0), out.shape(1), out.data());
}

std::pair<uint64_t, uint64_t> py_gather(int fd, Array<const uint64_t, 1> offsets, Array<uint8_t, 2> out, bool direct,
                                        size_t depth) {
    GatherResult result;
    {
        nb::gil_scoped_release released;
        result = gather(fd, offsets.data(), offsets.shape(0), out.shape(1), out.data(), direct, depth);
    }
    if (result.error) raise_os_error(result.error);
    return {result.read_bytes, result.requests};
}

void transfer(int fd, bool write, uint64_t offset, uint8_t *memory, uint64_t length, bool direct) {
    int failed;
    {
        nb::gil_scoped_release released;
        failed = transfer_range(fd, write, offset, memory, length, direct);
    }
    if (failed) raise_os_error(failed);
}

void py_read_range(int fd, uint64_t offset, Array<uint8_t, 1> out, bool direct) {
    transfer(fd, false, offset, out.data(), out.shape(0), direct);
}

void py_write_range(int fd, uint64_t offset, Bytes1 data, bool direct) {
    transfer(fd, true, offset, const_cast<uint8_t *>(data.data()), data.shape(0), direct);
}

// What statx(2) says of direct I/O on the file: alignment of memory and of offsets in bytes, 0 for "not at all".
std::optional<std::pair<uint32_t, uint32_t>> py_direct_alignment(int fd) {
    // A file in memory has no page cache to bypass. A device has, though its node lies in memory (devtmpfs).
    struct statfs system {};
    struct stat kind {};
    const bool file = fstat(fd, &kind) == 0 && S_ISREG(kind.st_mode);
    if (file && fstatfs(fd, &system) == 0 && system.f_type == TMPFS_MAGIC) return std::pair(0u, 0u);
    struct statx info {};
    if (statx(fd, "", AT_EMPTY_PATH, kStatxDioAlign, &info) || !(info.stx_mask & kStatxDioAlign)) return {};
    uint32_t alignment[2];
    std::memcpy(alignment, reinterpret_cast<const char *>(&info) + kStatxDioOffset, sizeof alignment);
    return std::pair(alignment[0], alignment[1]);
}

void py_punch_hole(int fd, int64_t offset, int64_t length) {
    int failed;
    {
        nb::gil_scoped_release released;
        failed = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) ? errno : 0;
    }
    if (failed) raise_os_error(failed);
}

template <class Query>
void define_rank(nb::module_ &module) {
    module.def("rank", &py_rank<Query>, nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg(),
               nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
               nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert().none(),
               nb::arg().none());
}

}  // namespace

NB_MODULE(_native, module) {
    define_arena(module);
    define_express(module);
    define_moves(module);
    define_predict(module);
    define_repeats(module);
    define_ring(module);
    module.def("supported", [](int variant) { return supported(Variant(variant)); });
    module.def("environment", &environment);
    module.def("extremes", &extremes, nb::arg().noconvert());
    module.def("first_difference", &first_difference, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg());
    module.def("widen_keys", &py_widen_keys, nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(),
               nb::arg().noconvert());
    module.def("quantise_keys", &py_quantise_keys, nb::arg().noconvert(), nb::arg(), nb::arg(),
               nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());
    module.def("quantise_query", &py_quantise_query, nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());
    module.def("scores", &py_scores<int8_t>, nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());
    module.def("scores", &py_scores<int16_t>, nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());
    nb::class_<Cancel>(module, "Cancel")
        .def(nb::init<>())
        .def("set", [](Cancel &cancel) { cancel.set = true; })
        .def("is_set", [](const Cancel &cancel) { return cancel.set.load(); });
    define_rank<int8_t>(module);
    define_rank<int16_t>(module);
    module.def("stream_read", &py_stream_read, nb::arg(), nb::arg(), nb::arg().noconvert());
    module.def("top_k", &py_top_k, nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(),
               nb::arg().noconvert());
    module.def("row_checksums", &py_row_checksums, nb::arg(), nb::arg().noconvert(), nb::arg().noconvert());
    module.def("data_checksums", &py_data_checksums, nb::arg(), nb::arg().noconvert(), nb::arg().noconvert());
    module.def("exchange", &py_exchange, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert());
    module.def("count_hits", &py_count_hits, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg(), nb::arg(), nb::arg());
    module.def("keep", &py_keep, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert());
    module.def("locate", &py_locate, nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());
    module.def("attend", &py_attend, nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(),
               nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());
    module.def("is_memory", &py_is_memory);
    module.def("copy_rows", &py_copy_rows, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());
    module.def("gather", &py_gather, nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(),
               nb::arg());
    module.def("read_range", &py_read_range, nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg());
    module.def("write_range", &py_write_range, nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg());
    module.def("direct_alignment", &py_direct_alignment);
    module.def("punch_hole", &py_punch_hole);
}
