#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>

#include "native.h"

namespace hillinfer {
namespace {

uint8_t *aligned_buffer() {
    void *buffer = std::aligned_alloc(kPage, ReadPool::kBufferBytes);
    if (buffer == nullptr) throw std::bad_alloc();
    return static_cast<uint8_t *>(buffer);
}

}  // namespace

ReadPool::ReadPool() : caller_buffer_(aligned_buffer()), pid_(getpid()) {}

ReadPool &ReadPool::instance() {
    static std::mutex mutex;
    static ReadPool *pool = nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    // A forked child has the object but not its threads.
    if (pool == nullptr || pool->pid_ != getpid()) pool = new ReadPool();
    return *pool;
}

void ReadPool::run(size_t count, const std::function<void(size_t, uint8_t *)> &job) {
    if (count == 0) return;
    std::lock_guard<std::mutex> turn(turn_);
    const size_t wanted = std::min(count - 1, kThreads);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        job_ = &job;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        start_threads(wanted);
        tickets_ = active_ = std::min(wanted, threads_);
    }
    for (size_t i = 0; i < wanted; ++i) wake_.notify_one();
    work(caller_buffer_);
    std::unique_lock<std::mutex> lock(mutex_);
    // Jobs are all taken: whoever has not come yet need not come.
    active_ -= tickets_;
    tickets_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
}

void ReadPool::start_threads(size_t wanted) {
    while (threads_ < wanted) {
        uint8_t *buffer = aligned_buffer();
        try {
            std::thread([this, buffer] { serve(buffer); }).detach();
        } catch (const std::system_error &) {
            // Under a thread limit fewer readers, at worst the caller alone, do the same work.
            std::free(buffer);
            return;
        }
        ++threads_;
    }
}

void ReadPool::work(uint8_t *buffer) {
    for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*job_)(i, buffer);
}

void ReadPool::serve(uint8_t *buffer) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [this] { return tickets_ > 0; });
        --tickets_;
        lock.unlock();
        work(buffer);
        lock.lock();
        if (--active_ == 0) done_.notify_one();
    }
}

}  // namespace hillinfer
