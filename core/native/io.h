// Positioned reads and writes that go on after short transfers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hillinfer {

// Reads `length` bytes at `offset`, or up to the end of the file; returns errno. `filled` is what was read.
// After a short transfer both go on from a multiple of `unit`, as direct I/O must.
int read_some(int fd, uint64_t offset, uint8_t *out, uint64_t length, uint64_t unit, uint64_t *filled);

// Writes all of `length` bytes; returns errno, ENOSPC where the medium takes no more.
int write_all(int fd, uint64_t offset, const uint8_t *data, uint64_t length, uint64_t unit);

}  // namespace hillinfer
