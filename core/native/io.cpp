#include "io.h"

#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "native.h"
#include "pool.h"

namespace hillinfer {
namespace {

// Splits a range in chunks and transfers them from several threads; returns the first errno.
template <class Transfer>
int in_chunks(uint64_t length, Transfer transfer) {
    std::atomic<int> error{0};
    const size_t chunks = size_t((length + kChunkBytes - 1) / kChunkBytes);
    ReadPool::instance().run(chunks, [&](size_t index, uint8_t *) {
        if (error.load(std::memory_order_relaxed)) return;
        const uint64_t begin = index * kChunkBytes;
        const int failed = transfer(begin, std::min(kChunkBytes, length - begin));
        int none = 0;
        if (failed) error.compare_exchange_strong(none, failed);
    });
    return error.load();
}

}  // namespace

int read_some(int fd, uint64_t offset, uint8_t *out, uint64_t length, uint64_t unit, uint64_t *filled) {
    uint64_t done = 0;
    int failed = 0;
    while (done < length) {
        const uint64_t from = done / unit * unit;
        const ssize_t count = pread(fd, out + from, size_t(length - from), off_t(offset + from));
        if (count < 0) {
            if (errno == EINTR) continue;
            failed = errno;
            break;
        }
        if (from + uint64_t(count) <= done) break;
        done = from + uint64_t(count);
    }
    *filled = done;
    return failed;
}

int write_all(int fd, uint64_t offset, const uint8_t *data, uint64_t length, uint64_t unit) {
    uint64_t done = 0;
    while (done < length) {
        const ssize_t count = pwrite(fd, data + done, size_t(length - done), off_t(offset + done));
        if (count < 0) {
            if (errno == EINTR) continue;
            return errno;
        }
        // A transfer that ends off a page tore it: that page is written again.
        const uint64_t next = (done + uint64_t(count)) / unit * unit;
        if (next == done) return ENOSPC;
        done = next;
    }
    return 0;
}

int read_range(int fd, uint64_t offset, uint8_t *out, uint64_t length, bool direct) {
    return in_chunks(length, [=](uint64_t begin, uint64_t size) {
        uint64_t filled = 0;
        const int failed = read_some(fd, offset + begin, out + begin, size, direct ? kPage : 1, &filled);
        return failed ? failed : filled < size ? EIO : 0;
    });
}

int write_range(int fd, uint64_t offset, const uint8_t *data, uint64_t length, bool direct) {
    return in_chunks(length, [=](uint64_t begin, uint64_t size) {
        return write_all(fd, offset + begin, data + begin, size, direct ? kPage : 1);
    });
}

}  // namespace hillinfer
