// Python bindings of the rings of hillinfer_core/ring.py, and a client's wait for an answer.
#include "ring.h"

#include <errno.h>
#include <nanobind/stl/vector.h>
#include <poll.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace nb = nanobind;

namespace hillinfer {

RingLane::RingLane(Array<uint8_t, 1> memory, int number) : memory_(std::move(memory)) {
    if (memory_.shape(0) < kRingBytes || number < 0 || number > 1) throw nb::value_error("this is not a ring's memory");
    counters_ = reinterpret_cast<uint32_t *>(memory_.data() + size_t(number) * 128);
    entries_ = memory_.data() + kPage + size_t(number) * kRingEntries * kRingEntryBytes;
}

int64_t RingProducer::put(const RingEntry &entry, const uint8_t *payload, int doorbell) {
    if (entry.length > kRingPayloadBytes) return kTooLong;
    const uint32_t ahead = put_ - lane_.taken();
    if (ahead >= kRingEntries) return ahead;
    uint8_t *const to = lane_.entry(put_);
    std::memcpy(to, &entry.ticket, 8);
    std::memcpy(to + 8, &entry.code, 4);
    std::memcpy(to + 12, &entry.timeout_ms, 4);
    std::memcpy(to + 16, &entry.length, 4);
    if (entry.length) std::memcpy(to + kRingHeaderBytes, payload, entry.length);
    lane_.set_put(++put_);
    return doorbell >= 0 && !ring_doorbell(doorbell) ? kNobodyListens : 0;
}

bool RingConsumer::copy(uint32_t skip, RingEntry &entry, uint8_t *payload) const {
    const uint8_t *const from = lane_.entry(taken_ + skip);
    const auto field = [&](size_t at) { return RingLane::load(reinterpret_cast<const uint32_t *>(from + at)); };
    entry = {RingLane::load(reinterpret_cast<const uint64_t *>(from)), field(8), field(12), field(16)};
    if (entry.length > kRingPayloadBytes) return false;
    std::memcpy(payload, from + kRingHeaderBytes, entry.length);
    // From here on it is the copy that is looked at: the compiler must not read the ring again.
    asm volatile("" : : "r"(payload) : "memory");
    return true;
}

bool ring_doorbell(int fd) {
    const uint64_t one = 1;  // what rings an eventfd, so that clients that take it for one go on
    return write(fd, &one, sizeof one) >= 0 || errno == EAGAIN;
}

bool clear_doorbell(int fd) {
    char rings[4096];
    const ssize_t count = read(fd, rings, sizeof rings);
    return count > 0 || (count < 0 && errno == EAGAIN);
}

namespace {

std::string in_use(uint32_t ahead) {
    return "the ring's counters say that " + std::to_string(ahead) + " of its " + std::to_string(kRingEntries) +
           " entries are in use";
}

std::string holds(const RingEntry &entry) {
    return "an entry of the ring says that it holds " + std::to_string(entry.length) + " bytes";
}

nb::object as_tuple(const RingEntry &entry, const uint8_t *payload) {
    return nb::make_tuple(entry.ticket, entry.code, entry.timeout_ms,
                          nb::bytes(reinterpret_cast<const char *>(payload), entry.length));
}

nb::object text(const std::string &said) { return nb::str(said.c_str()); }

// The entries that wait, or a str that says what makes no sense.
nb::object take(RingConsumer &ring) {
    const uint32_t waiting = ring.waiting();
    if (waiting > kRingEntries) return text(in_use(waiting));
    nb::list entries;
    thread_local std::vector<uint8_t> payload(kRingPayloadBytes);
    for (uint32_t number = 0; number < waiting; ++number) {
        RingEntry entry;
        if (!ring.copy(number, entry, payload.data())) return text(holds(entry));
        entries.append(as_tuple(entry, payload.data()));
    }
    ring.take(waiting);
    return entries;
}

enum class Waited : int { deadline = 0, hung_up = 1, interrupted = 2 };

using Clock = std::chrono::steady_clock;

// To be woken takes an idle core tens of microseconds, on a virtual machine most of what a short evaluation takes. So
// whoever waited no longer than kSoon looks out for the next answer for kLookOut before it sleeps, if the other side has
// a processor beside it. Our choice: in a decode step most answers are there already or take longer.
constexpr auto kSoon = std::chrono::microseconds(200), kLookOut = std::chrono::microseconds(100);

bool several_processors() {
    cpu_set_t allowed;
    return sched_getaffinity(0, sizeof allowed, &allowed) == 0 && CPU_COUNT(&allowed) > 1;
}

bool comes_soon(const RingConsumer &ring) {
    const auto until = Clock::now() + kLookOut;
    do {
        for (int i = 0; i < 16; ++i) {
            if (ring.waiting()) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    } while (Clock::now() < until);
    return false;
}

// Why no entry comes; none where one is there. What was rung so far is taken back before it sleeps and not after: an
// entry that is there already costs no system call, and the answer to what was just asked no further one.
std::optional<Waited> wait_until_there(const RingConsumer &ring, int doorbell, int connection, double timeout_s) {
    const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s));
    while (true) {
        const bool open = clear_doorbell(doorbell);
        if (ring.waiting()) return std::nullopt;
        if (!open) return Waited::hung_up;
        const auto left = std::max(Clock::duration::zero(), until - Clock::now());
        const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(left).count();
        const timespec patience{time_t(ns / 1000000000), long(ns % 1000000000)};
        pollfd fds[] = {{doorbell, POLLIN, 0}, {connection, POLLIN, 0}};
        const int ready = ppoll(fds, 2, &patience, nullptr);
        if (ring.waiting()) return std::nullopt;
        if (ready < 0) return Waited::interrupted;
        if (ready && !fds[0].revents) return Waited::hung_up;
        if (left == Clock::duration::zero()) return Waited::deadline;
    }
}

// Waits for entries. Returns all that are there, or a Waited, or a str that says what makes no sense. An event of
// `connection` is the other side's end.
nb::object wait(RingConsumer &ring, int doorbell, int connection, double timeout_s) {
    std::optional<Waited> none;
    if (!ring.waiting()) {
        nb::gil_scoped_release released;
        const auto began = Clock::now();
        if (!ring.soon || !comes_soon(ring)) none = wait_until_there(ring, doorbell, connection, timeout_s);
        ring.soon = !none && Clock::now() - began < kSoon && several_processors();
    }
    return none ? nb::object(nb::int_(int(*none))) : take(ring);
}

int64_t put(RingProducer &ring, uint64_t ticket, uint32_t code, uint32_t timeout_ms, nb::bytes payload, int doorbell) {
    const size_t length = payload.size();
    if (length > kRingPayloadBytes) return RingProducer::kTooLong;
    return ring.put({ticket, code, timeout_ms, uint32_t(length)}, static_cast<const uint8_t *>(payload.data()), doorbell);
}

}  // namespace

void define_ring(nb::module_ &module) {
    nb::class_<RingProducer>(module, "RingProducer")
        .def(nb::init<Array<uint8_t, 1>, int, uint32_t>(), nb::arg().noconvert(), nb::arg(), nb::arg())
        .def("put", &put);
    nb::class_<RingConsumer>(module, "RingConsumer")
        .def(nb::init<Array<uint8_t, 1>, int, uint32_t>(), nb::arg().noconvert(), nb::arg(), nb::arg())
        .def("take", &take)
        .def("wait", &wait);
}

}  // namespace hillinfer
