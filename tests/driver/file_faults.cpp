// LD_PRELOAD layer below a driver: breaks reads and writes of one file, as a file named by an environment variable
// says, in words: the operation (read, write), what happens, and at which request of those after it was written.
//   EIO, ENOSPC   fails with that
//   short         moves the first 1000 bytes only
//   half          moves the first half, whole pages
//   torn          moves the first half, then fails with EIO: what a power loss leaves
//   delay         takes 20 ms longer
#include <dlfcn.h>
#include <errno.h>
#include <linux/aio_abi.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>

namespace {

struct Plan {
    char operation[8] = "", fault[16] = "";
    long at = -1;
};

Plan plan;
long seen;
time_t stamp_s;
long stamp_ns;
ino_t inode;
std::map<uint64_t, std::string> spoilt;  // iocb address -> fault of its completion

void load() {
    struct stat info;
    const char *path = getenv("HILLINFER_TEST_FAULTS");
    if (!path || stat(path, &info)) return;
    if (info.st_mtim.tv_sec == stamp_s && info.st_mtim.tv_nsec == stamp_ns && info.st_ino == inode) return;
    stamp_s = info.st_mtim.tv_sec, stamp_ns = info.st_mtim.tv_nsec, inode = info.st_ino;
    plan = Plan{};
    seen = 0;
    if (FILE *file = fopen(path, "r")) {
        if (fscanf(file, "%7s %15s %ld", plan.operation, plan.fault, &plan.at) != 3) plan.at = -1;
        fclose(file);
    }
}

bool is_pool(int fd) {
    char link[32], name[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0) return false;
    name[length] = 0;
    return strstr(name, "faulty-pool") != nullptr;
}

// The fault for this request, or "".
std::string fault_of(int fd, bool write, size_t length) {
    if (!is_pool(fd) || length == 0) return "";
    // The driver reads from several threads.
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    load();
    if (strcmp(plan.operation, write ? "write" : "read") || plan.at < 0) return "";
    return seen++ == plan.at ? plan.fault : "";
}

// The bytes that a request with this fault still moves.
size_t cut(const std::string &fault, size_t length) {
    if (fault == "short") return length < 1000 ? length : 1000;
    if (fault == "half" || fault == "torn") return std::min(length, (length / 2 + 4095) / 4096 * 4096);
    return length;
}

int number_of(const std::string &fault) {
    return fault == "EIO" || fault == "torn" ? EIO : fault == "ENOSPC" ? ENOSPC : 0;
}

template <class Call>
ssize_t spoil(int fd, bool write, size_t length, Call call) {
    const std::string fault = fault_of(fd, write, length);
    if (fault.empty()) return call(length);
    if (fault == "delay") usleep(20000);
    // Direct I/O moves whole sectors: a short transfer is one that says so.
    const size_t part = cut(fault, length);
    const ssize_t moved = fault == "EIO" || fault == "ENOSPC" ? 0 : call(part % 512 ? length : part);
    if (number_of(fault)) return errno = number_of(fault), -1;
    return moved < 0 ? moved : ssize_t(part);
}

template <class Function>
Function next(const char *name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

ssize_t pread(int fd, void *out, size_t length, off_t offset) {
    static auto real = next<ssize_t (*)(int, void *, size_t, off_t)>("pread");
    return spoil(fd, false, length, [&](size_t size) { return real(fd, out, size, offset); });
}
ssize_t pread64(int fd, void *out, size_t length, off_t offset) { return pread(fd, out, length, offset); }

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) {
    static auto real = next<ssize_t (*)(int, const void *, size_t, off_t)>("pwrite");
    return spoil(fd, true, length, [&](size_t size) { return real(fd, data, size, offset); });
}
ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset) { return pwrite(fd, data, length, offset); }

ssize_t preadv2(int fd, const iovec *parts, int count, off_t offset, int flags) {
    static auto real = next<ssize_t (*)(int, const iovec *, int, off_t, int)>("preadv2");
    const std::string fault = fault_of(fd, false, count ? parts->iov_len : 0);
    if (number_of(fault)) return errno = number_of(fault), -1;
    return real(fd, parts, count, offset, flags);
}
ssize_t preadv64v2(int fd, const iovec *parts, int count, off_t offset, int flags) {
    return preadv2(fd, parts, count, offset, flags);
}
ssize_t preadv(int fd, const iovec *parts, int count, off_t offset) { return preadv2(fd, parts, count, offset, 0); }
ssize_t preadv64(int fd, const iovec *parts, int count, off_t offset) { return preadv2(fd, parts, count, offset, 0); }

int fdatasync(int fd) {
    static auto real = next<int (*)(int)>("fdatasync");
    if (is_pool(fd)) {
        load();
        if (!strcmp(plan.operation, "flush") && seen++ == plan.at) return errno = number_of(plan.fault), -1;
    }
    return real(fd);
}

long syscall(long number, ...) {
    static auto real = next<long (*)(long, ...)>("syscall");
    va_list list;
    va_start(list, number);
    long a[6];
    for (long &value : a) value = va_arg(list, long);
    va_end(list);
    if (number == SYS_io_submit) {
        auto **blocks = reinterpret_cast<iocb **>(a[2]);
        for (long i = 0; i < a[1]; ++i) {
            const bool write = blocks[i]->aio_lio_opcode == IOCB_CMD_PWRITE;
            const std::string fault = fault_of(int(blocks[i]->aio_fildes), write, blocks[i]->aio_nbytes);
            if (fault.empty()) continue;
            if (fault == "delay") usleep(20000);
            spoilt[reinterpret_cast<uint64_t>(blocks[i])] = fault;
            const size_t part = cut(fault, blocks[i]->aio_nbytes);
            if (part % 512 == 0) blocks[i]->aio_nbytes = part;
        }
    }
    const long result = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (number == SYS_io_getevents) {
        auto *events = reinterpret_cast<io_event *>(a[3]);
        for (long i = 0; i < result; ++i) {
            const auto found = spoilt.find(events[i].obj);
            if (found == spoilt.end()) continue;
            if (number_of(found->second)) events[i].res = -number_of(found->second);
            if (found->second == "short" && events[i].res > 1000) events[i].res = 1000;
            spoilt.erase(found);
        }
    }
    return result;
}

}  // extern "C"
