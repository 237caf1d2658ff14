#include "transfers.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>

#include "native.h"

namespace hillinfer {
namespace {

// The kernel holds back what is submitted together with more than this, to merge it (AIO_PLUG_THRESHOLD in its
// fs/aio.c): nothing here can be merged, and a drive that waits loses a sixth of its reads (docs/storage.md).
constexpr size_t kSubmit = 2;

constexpr uint64_t kHelpers = 3;              // threads, at most, beside the caller
constexpr uint64_t kHelperBytes = 512 << 10;  // for each of them: starting one costs as much as copying half of it

struct InFlight {
    iocb block;
    size_t index;
    uint8_t *memory;
    uint64_t done;  // bytes of the transfer
};

// Takes in the result of a call that began at byte `from` of the transfer; returns errno. `done` moves on, and
// `finished` is set when nothing is left to do.
int advance(const Transfer &transfer, bool write, uint64_t from, int64_t result, uint64_t *done, bool *finished) {
    if (result < 0) return int(-result);
    const uint64_t reached = from + uint64_t(result);
    const bool stuck = reached <= *done;
    *done = std::max(*done, reached);
    *finished = stuck || *done >= transfer.length;
    return *finished && *done < transfer.least ? (write ? ENOSPC : EIO) : 0;
}

int one_by_one(int fd, const Transfer &transfer, bool write, uint64_t unit, uint8_t *memory, uint64_t *done) {
    for (bool finished = transfer.length == 0; !finished;) {
        const uint64_t from = *done / unit * unit;
        const size_t size = size_t(transfer.length - from);
        const off_t offset = off_t(transfer.offset + from);
        const ssize_t count = write ? pwrite(fd, memory + from, size, offset) : pread(fd, memory + from, size, offset);
        if (count < 0 && errno == EINTR) continue;
        const int failed = advance(transfer, write, from, count < 0 ? -errno : count, done, &finished);
        if (failed) return failed;
    }
    return 0;
}

void prepare(InFlight *slot, int fd, const Transfer &transfer, bool write, uint64_t unit) {
    const uint64_t from = slot->done / unit * unit;
    slot->block = {};
    slot->block.aio_data = reinterpret_cast<uint64_t>(slot);
    slot->block.aio_lio_opcode = write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
    slot->block.aio_fildes = uint32_t(fd);
    slot->block.aio_buf = reinterpret_cast<uint64_t>(slot->memory + from);
    slot->block.aio_nbytes = transfer.length - from;
    slot->block.aio_offset = int64_t(transfer.offset + from);
}

}  // namespace

Transfers::Transfers() : pid_(getpid()) {
    void *memory = std::aligned_alloc(kPage, kDepth * kBufferBytes);
    if (memory == nullptr) throw std::bad_alloc();
    buffers_ = static_cast<uint8_t *>(memory);
    aio_context_t context = 0;
    // Fails where the system's aio-max-nr is used up, or a sandbox forbids it.
    if (syscall(SYS_io_setup, kDepth, &context) == 0) context_ = context;
}

Transfers &Transfers::instance() {
    static std::mutex mutex;
    static Transfers *queue = nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    // A forked child has the object, but the kernel's queue stays with its parent.
    if (queue == nullptr || queue->pid_ != getpid()) queue = new Transfers();
    return *queue;
}

int Transfers::plain(int fd, bool write, uint64_t unit, const std::vector<Transfer> &transfers,
                     const std::function<void(size_t, const uint8_t *)> &done, uint64_t *moved) {
    uint64_t total = 0;
    for (const Transfer &item : transfers) total += item.length;
    std::atomic<size_t> next{0};
    std::atomic<uint64_t> bytes{0};
    std::atomic<int> error{0};
    const auto work = [&](uint8_t *buffer) {
        for (size_t i; !error.load() && (i = next.fetch_add(1)) < transfers.size();) {
            uint8_t *memory = transfers[i].memory ? transfers[i].memory : buffer;
            uint64_t own = 0;
            int none = 0;
            const int failed = one_by_one(fd, transfers[i], write, unit, memory, &own);
            if (failed)
                error.compare_exchange_strong(none, failed);
            else
                done(i, memory);
            bytes.fetch_add(own);
        }
    };
    // Copies out of the page cache take cores; writes would wait for one another in the file system.
    const uint64_t most = std::min<uint64_t>(std::max(1u, std::thread::hardware_concurrency()) - 1, kHelpers);
    const uint64_t wanted = write ? 0 : std::min(most, total / kHelperBytes);
    std::vector<std::thread> helpers;
    try {
        while (helpers.size() < wanted) helpers.emplace_back(work, buffers_ + (helpers.size() + 1) * kBufferBytes);
    } catch (const std::system_error &) {
        // Under a thread limit fewer, at worst the caller alone, do the same work.
    }
    work(buffers_);
    for (std::thread &helper : helpers) helper.join();
    *moved = bytes.load();
    return error.load();
}

int Transfers::run(int fd, bool write, bool direct, size_t depth, const std::vector<Transfer> &transfers,
                   const std::function<void(size_t, const uint8_t *)> &done, uint64_t *moved) {
    std::lock_guard<std::mutex> turn(turn_);
    const uint64_t unit = direct ? kPage : 1;
    *moved = 0;
    int error = 0;
    const auto finish = [&](size_t index, const uint8_t *memory, uint64_t bytes) {
        *moved += bytes;
        done(index, memory);
    };

    if (!direct || !context_) return plain(fd, write, unit, transfers, done, moved);

    std::array<InFlight, kDepth> slots;
    std::array<InFlight *, kDepth> idle;
    std::array<iocb *, kDepth> waiting;  // prepared, not yet submitted
    std::array<io_event, kDepth> events;
    size_t idles = std::clamp<size_t>(depth, 1, kDepth), waits = 0, flying = 0, next = 0;

    for (size_t i = 0; i < idles; ++i) idle[i] = &slots[idles - 1 - i];

    while (!error || flying) {
        while (!error && idles && next < transfers.size()) {
            InFlight *slot = idle[--idles];
            const Transfer &item = transfers[next];
            *slot = {{}, next++, item.memory ? item.memory : buffers_ + size_t(slot - slots.data()) * kBufferBytes, 0};
            prepare(slot, fd, item, write, unit);
            waiting[waits++] = &slot->block;
        }
        size_t sent = 0;
        while (sent < waits && !error) {
            const long taken = syscall(SYS_io_submit, context_, long(std::min(waits - sent, kSubmit)), &waiting[sent]);
            if (taken > 0) {
                flying += size_t(taken);
                sent += size_t(taken);
            } else if (flying) {
                break;  // a place is free when something has come back
            } else {
                // The kernel does not take it: the plain call does, or gives the true reason.
                auto *slot = reinterpret_cast<InFlight *>(waiting[sent++]->aio_data);
                error = one_by_one(fd, transfers[slot->index], write, unit, slot->memory, &slot->done);
                if (!error) finish(slot->index, slot->memory, slot->done);
                idle[idles++] = slot;
            }
        }
        std::copy(waiting.begin() + long(sent), waiting.begin() + long(waits), waiting.begin());
        waits -= sent;
        if (!flying) {
            if (!waits && next == transfers.size()) break;
            continue;
        }
        const long count = syscall(SYS_io_getevents, context_, 1L, long(kDepth), events.data(), nullptr);
        for (long i = 0; i < count; ++i) {
            auto *slot = reinterpret_cast<InFlight *>(events[i].data);
            const Transfer &item = transfers[slot->index];
            --flying;
            bool finished = false;
            const int failed = advance(item, write, slot->done / unit * unit, events[i].res, &slot->done, &finished);
            if (failed && !error) error = failed;
            if (failed || finished) {
                if (!failed) finish(slot->index, slot->memory, slot->done);
                idle[idles++] = slot;
            } else {
                prepare(slot, fd, item, write, unit);
                waiting[waits++] = &slot->block;
            }
        }
    }
    return error;
}

}  // namespace hillinfer
