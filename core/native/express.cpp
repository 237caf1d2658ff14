// The short way of evaluations that repeat through the daemon (hillinferd/service/express.py): from a client's ring to
// the device worker and back, without Python, while nothing else is going on. Whatever is not plain is left to Python:
// what a client submitted stays in its ring, an evaluation that is under way is handed over.
#include <errno.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "packets.h"
#include "ring.h"

namespace nb = nanobind;

namespace hillinfer {
namespace {

constexpr uint32_t kEvaluatePacked = 4, kAnswered = 0;  // Method and Outcome of hillinfer_core/ring.py

constexpr size_t kMostTold = 4096;    // evaluations before Python is told of them
constexpr int kMostEvents = 64;
constexpr double kPatience = 1.0;  // seconds after which an evaluation is handed over to whoever looks for hung workers

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + double(time.tv_nsec) * 1e-9;
}

// A request that may be repeated, of other layers and tokens.
struct Permit {
    std::vector<uint8_t> asked;
    std::vector<uint32_t> held;  // tokens of each layer
    size_t drive;
    int worker;

    bool covers(const uint8_t *packed) const {
        if (!same_terms(packed, asked.data())) return false;
        const uint32_t layer = number<uint32_t>(packed + kLayerAt), first = number<uint32_t>(packed + kFirstAt);
        const uint32_t end = number<uint32_t>(packed + kEndAt), k = number<uint32_t>(packed + kKAt);
        return layer < held.size() && first < end && end <= held[layer] && k >= 1 && k <= end - first;
    }
};

struct Rider {
    uint64_t session;
    int submitted, completed;
    nb::object owners[2];  // of what follows
    RingConsumer *submissions;
    RingProducer *completions;
    std::vector<Permit> permits;
};

// What was done for one session on one drive.
struct Run {
    std::vector<double> waited, seconds;
    uint64_t traffic[kTraffic] = {}, winners = 0, missing = 0, key_bytes = 0;
};

struct Flight {
    Rider *rider;
    size_t drive;
    int worker;
    RingEntry entry;
    uint8_t payload[kRequestBytes];
    double since, began;
};

class Express {
  public:
    void add(uint64_t session, nb::object submissions, nb::object completions, int submitted, int completed) {
        Rider rider{session, submitted, completed, {submissions, completions}, nb::cast<RingConsumer *>(submissions),
                    nb::cast<RingProducer *>(completions), {}};
        riders_.insert_or_assign(submitted, std::move(rider));
    }

    void remove(int submitted) {
        if (waiting_ && waiting_->submitted == submitted) {
            waiting_ = nullptr;
            since_.clear();
        }
        riders_.erase(submitted);
    }

    // False for a request that cannot be repeated this way.
    bool permit(int submitted, nb::bytes asked, std::vector<uint32_t> held, size_t drive, int worker) {
        const auto rider = riders_.find(submitted);
        if (rider == riders_.end() || asked.size() != kRequestBytes) return false;
        const auto *bytes = static_cast<const uint8_t *>(asked.data());
        auto &permits = rider->second.permits;
        const auto same = [&](const Permit &other) { return same_terms(other.asked.data(), bytes); };
        permits.erase(std::remove_if(permits.begin(), permits.end(), same), permits.end());
        if (permits.size() == kMostTerms) permits.clear();
        permits.push_back({{bytes, bytes + kRequestBytes}, std::move(held), drive, worker});
        permitted_ = true;
        return true;
    }

    void revoke() {
        for (auto &[_, rider] : riders_) rider.permits.clear();
        permitted_ = false;
    }

    bool permitted() const { return permitted_; }

    // Waits as epoll_wait does, for `timeout_s` or for ever (below 0), and carries evaluations meanwhile; returns events
    // that are Python's: (descriptor, events). After it take_runs, take_flight, take_waiting and take_left.
    nb::list wait(int epoll, double timeout_s) {
        std::vector<epoll_event> others;
        {
            nb::gil_scoped_release released;
            const double until = timeout_s < 0 ? HUGE_VAL : now() + timeout_s;
            while (others.empty() && answer_.empty() && left_.empty() && told_ < kMostTold && !(waiting_ && !flight_)) {
                const double due = flight_ ? std::min(until, flight_->began + kPatience) : until;
                const double left = due - now();
                epoll_event events[kMostEvents];
                const int ms = due == HUGE_VAL ? -1 : int(std::ceil(std::clamp(left, 0.0, 1e6) * 1e3));
                const int count = epoll_wait(epoll, events, kMostEvents, ms);
                // A worker's answer first: the drive is free then.
                const int worker = flight_ ? flight_->worker : -1, mine = flight_ ? flight_->rider->submitted : -1;
                bool alone = true;
                for (int each = 0; each < count; ++each)
                    alone &= events[each].data.fd == worker || events[each].data.fd == mine;
                for (int each = 0; each < count; ++each)
                    if (events[each].data.fd == worker) {
                        if (!arrived(alone)) others.push_back(events[each]);
                        events[each].events = 0;
                    }
                for (int each = 0; each < count; ++each)
                    if (events[each].events && !begin(events[each])) others.push_back(events[each]);
                if (count < 0 || left <= 0) break;
            }
        }
        nb::list ready;
        for (const epoll_event &event : others) ready.append(nb::make_tuple(event.data.fd, event.events));
        return ready;
    }

    // What is under way and not answered: (descriptor of the ring's doorbell, drive, began, ticket, code, timeout in ms,
    // payload, what the worker said of it if that is for Python). It is Python's from now on.
    nb::object take_flight() {
        if (!flight_) return nb::none();
        const RingEntry &entry = flight_->entry;
        nb::object taken = nb::make_tuple(
            flight_->rider->submitted, flight_->drive, flight_->began, entry.ticket, entry.code, entry.timeout_ms,
            nb::bytes(reinterpret_cast<const char *>(flight_->payload), kRequestBytes),
            nb::bytes(reinterpret_cast<const char *>(answer_.data()), answer_.size()));
        flight_.reset();
        answer_.clear();
        return taken;
    }

    // What waits in the ring of the session whose evaluation was under way, and is Python's now: (doorbell, since when each
    // is there). The doorbell does not say so any more.
    nb::object take_waiting() {
        if (!waiting_) return nb::none();
        nb::object taken = nb::make_tuple(waiting_->submitted, std::vector<double>(since_.begin(), since_.end()));
        waiting_ = nullptr;
        since_.clear();
        return taken;
    }

    // What was carried since this was last asked, by doorbell and drive: (doorbell, drive, seconds that each waited and
    // that each took, traffic, winners, missing, bytes of keys).
    nb::list take_runs() {
        nb::list taken;
        for (const auto &[whose, run] : runs_)
            taken.append(nb::make_tuple(whose.first, whose.second, run.waited, run.seconds,
                                        std::vector<uint64_t>(run.traffic, run.traffic + kTraffic), run.winners,
                                        run.missing, run.key_bytes));
        runs_.clear();
        told_ = 0;
        return taken;
    }

    // Doorbells of rings whose clients do not listen any more.
    std::vector<int> take_left() { return std::exchange(left_, {}); }

  private:
    // Whether an event is done with. A session whose evaluation is under way may submit more: these are carried after it,
    // in order, as nobody else has anything to do.
    bool begin(const epoll_event &event) {
        const auto found = riders_.find(event.data.fd);
        if (found == riders_.end() || event.events != EPOLLIN) return false;
        Rider &rider = found->second;
        if (flight_ ? flight_->rider != &rider : waiting_ != nullptr) return false;
        if (!clear_doorbell(rider.submitted)) return false;
        const uint32_t waiting = rider.submissions->waiting();
        if (waiting + (flight_ ? 1 : 0) > kRingEntries || waiting < since_.size()) return false;
        since_.resize(waiting, now());
        if (waiting == 0) return true;
        if (!flight_ && !next(rider)) {
            since_.clear();
            return false;
        }
        waiting_ = since_.empty() ? nullptr : &rider;
        return true;
    }

    // Whether the first of what waits is carried from now on.
    bool next(Rider &rider) {
        const uint32_t waiting = rider.submissions->waiting();
        RingEntry entry;
        if (waiting == 0 || waiting > kRingEntries || !rider.submissions->copy(0, entry, payload_) ||
            entry.code != kEvaluatePacked || entry.length != kRequestBytes)
            return false;
        // Late: Python refuses it.
        if (entry.timeout_ms && now() - since_.front() >= entry.timeout_ms * 1e-3) return false;
        for (const Permit &permit : rider.permits)
            if (permit.covers(payload_)) return depart(rider, permit, entry);
        return false;
    }

    bool depart(Rider &rider, const Permit &permit, const RingEntry &entry) {
        uint8_t packet[kRequestHeader + kRequestBytes] = {kEvaluate};
        std::memcpy(packet + kSessionAt, &rider.session, sizeof rider.session);
        std::memcpy(packet + kRequestHeader, payload_, kRequestBytes);
        const double began = now();
        if (send(permit.worker, packet, sizeof packet, MSG_DONTWAIT | MSG_NOSIGNAL) != ssize_t(sizeof packet)) return false;
        rider.submissions->take(1);
        flight_.emplace(Flight{&rider, permit.drive, permit.worker, entry, {}, since_.front(), began});
        since_.pop_front();
        std::memcpy(flight_->payload, payload_, kRequestBytes);
        return true;
    }

    // Whether the worker's event is done with; what is not an answer to a plain evaluation is kept for Python.
    bool arrived(bool alone) {
        packet_.resize(kMostPacket);
        const ssize_t count = recv(flight_->worker, packet_.data(), packet_.size(), MSG_DONTWAIT);
        if (count < 0 && errno == EAGAIN) return true;
        if (count <= 0) return false;
        const size_t results = size_t(count) - kAnswerHeader, length = results + sizeof(double);
        if (packet_[0] != kEvaluated || size_t(count) <= kAnswerHeader || length > kRingPayloadBytes) {
            answer_.assign(packet_.begin(), packet_.begin() + count);
            return true;
        }
        const double at = now();
        // In front of the results, where the packet's header was.
        uint8_t *const payload = packet_.data() + kAnswerHeader - sizeof at;
        uint8_t header[kAnswerHeader];
        std::memcpy(header, packet_.data(), kAnswerHeader);
        std::memcpy(payload, &at, sizeof at);
        Rider &rider = *flight_->rider;
        const int64_t put =
            rider.completions->put({flight_->entry.ticket, kAnswered, 0, uint32_t(length)}, payload, rider.completed);
        if (put == RingProducer::kNobodyListens) {
            left_.push_back(rider.submitted);
        } else if (put) {
            std::memcpy(packet_.data(), header, kAnswerHeader);
            answer_.assign(packet_.begin(), packet_.begin() + count);
            return true;
        }
        Run &run = runs_[{rider.submitted, flight_->drive}];
        run.waited.push_back(flight_->began - flight_->since);
        run.seconds.push_back(at - flight_->began);
        for (size_t each = 0; each < kTraffic; ++each)
            run.traffic[each] += number<uint64_t>(header + kTrafficAt + 8 * each);
        run.winners += number<uint64_t>(header + kWinnersAt);
        run.missing += number<uint64_t>(header + kMissingAt);
        run.key_bytes = number<uint64_t>(header + kKeyBytesAt);
        ++told_;
        flight_.reset();
        // What it submitted meanwhile. Where somebody else wants something too, or it is not carried, `waiting_` without
        // a flight ends the wait.
        if (waiting_ && alone && next(rider) && since_.empty()) waiting_ = nullptr;
        return true;
    }

    std::map<int, Rider> riders_;  // by doorbell
    std::map<std::pair<int, size_t>, Run> runs_;
    std::optional<Flight> flight_;
    std::vector<uint8_t> packet_, answer_;
    std::vector<int> left_;
    Rider *waiting_ = nullptr;   // whose flight it is, if it has submitted more
    std::deque<double> since_;  // when what waits in its ring was seen there
    uint8_t payload_[kRingPayloadBytes];
    size_t told_ = 0;
    bool permitted_ = false;
};

}  // namespace

void define_express(nb::module_ &module) {
    nb::class_<Express>(module, "Express")
        .def(nb::init<>())
        .def("add", &Express::add)
        .def("remove", &Express::remove)
        .def("permit", &Express::permit)
        .def("revoke", &Express::revoke)
        .def_prop_ro("permitted", &Express::permitted)
        .def("wait", &Express::wait)
        .def("take_flight", &Express::take_flight)
        .def("take_waiting", &Express::take_waiting)
        .def("take_runs", &Express::take_runs)
        .def("take_left", &Express::take_left);
}

}  // namespace hillinfer
