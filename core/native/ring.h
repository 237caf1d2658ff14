// One side of one ring of hillinfer_core/ring.py. The other side may write to the memory at any time: counters and
// headers are read once each, payloads are copied before they are looked at, and nothing is read that this side writes.
#pragma once

#include <cstdint>
#include <cstring>

#include "bindings.h"
#include "native.h"

namespace hillinfer {

constexpr uint32_t kRingEntries = 16;
constexpr size_t kRingEntryBytes = 8192;
constexpr size_t kRingHeaderBytes = 20;  // ticket, code, timeout in ms, payload bytes
constexpr size_t kRingPayloadBytes = kRingEntryBytes - kRingHeaderBytes;
constexpr size_t kRingBytes = kPage + 2 * kRingEntries * kRingEntryBytes;

struct RingEntry {
    uint64_t ticket = 0;
    uint32_t code = 0, timeout_ms = 0, length = 0;
};

// The memory of one ring; `number` 0 is that of submissions, 1 that of completions.
class RingLane {
  public:
    RingLane(Array<uint8_t, 1> memory, int number);
    uint32_t put() const { return load(counters_); }
    uint32_t taken() const { return load(counters_ + kLine); }
    void set_put(uint32_t count) { store(counters_, count); }
    void set_taken(uint32_t count) { store(counters_ + kLine, count); }
    uint8_t *entry(uint32_t count) const { return entries_ + count % kRingEntries * kRingEntryBytes; }
    template <class T>
    static T load(const T *from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
    template <class T>
    static void store(T *to, T value) { __atomic_store_n(to, value, __ATOMIC_RELEASE); }

  private:
    static constexpr size_t kLine = 16;  // counters in a cache line
    Array<uint8_t, 1> memory_;
    uint32_t *counters_;
    uint8_t *entries_;
};

class RingProducer {
  public:
    static constexpr int64_t kTooLong = -1, kNobodyListens = -2;

    // `at`: what both counters are.
    RingProducer(Array<uint8_t, 1> memory, int number, uint32_t at) : lane_(memory, number), put_(at) {}

    // Puts an entry in and rings `doorbell` unless it is -1. Returns 0, or kTooLong, or, with the entry put in,
    // kNobodyListens; else how many entries the counters say are in use: all, or more than there are.
    int64_t put(const RingEntry &entry, const uint8_t *payload, int doorbell);

  private:
    RingLane lane_;
    uint32_t put_;
};

class RingConsumer {
  public:
    RingConsumer(Array<uint8_t, 1> memory, int number, uint32_t at) : lane_(memory, number), taken_(at) {}

    // How many entries wait; more than there are if the other side's counter makes no sense.
    uint32_t waiting() const { return lane_.put() - taken_; }

    // Copies the entry after `skip` others that wait; false, with nothing in `payload`, if its length makes no sense.
    // `payload` has kRingPayloadBytes.
    bool copy(uint32_t skip, RingEntry &entry, uint8_t *payload) const;

    void take(uint32_t count) { lane_.set_taken(taken_ += count); }

    bool soon = false;  // whether the latest entry that was waited for came so

  private:
    RingLane lane_;
    uint32_t taken_;
};

// Whether somebody can still hear it; a pipe that is full has rung already. Never blocks.
bool ring_doorbell(int fd);

// Takes back rings so far; whether the other side can still ring. Never blocks.
bool clear_doorbell(int fd);

}  // namespace hillinfer
