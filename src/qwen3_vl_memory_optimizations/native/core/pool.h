// Threads that share out the chunks of one loop.
#pragma once

#include <stdint.h>

typedef void (*ChunkFunction)(void *context, int64_t chunk);

// Call `run(context, chunk)` for each chunk from 0 to `n_chunks` - 1, in any order, on at most `n_threads` threads;
// returns when all are done. A thread that comes late finds nothing to do: nobody waits for one that has not begun a chunk.
void share_out(ChunkFunction run, void *context, int64_t n_chunks, int n_threads);
