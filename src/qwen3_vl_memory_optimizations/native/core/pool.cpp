#include "pool.h"

#include <atomic>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#elif defined(__aarch64__)
static inline void relax() { __asm__ volatile("yield"); }
#else
static inline void relax() {}
#endif

namespace {

constexpr int MOST_THREADS = 64;
constexpr int64_t SPIN_NS = 50 * 1000; // waking a thread that sleeps takes about as long

// A loop in one word: its number, how many chunks it has, and the next one. A late thread can never take a chunk of
// another loop, nor one that does not exist.
constexpr int CHUNK_BITS = 20;
constexpr int64_t MOST_CHUNKS = (1 << CHUNK_BITS) - 1;

uint64_t number_of(uint64_t loop) { return loop >> 2 * CHUNK_BITS; }
int64_t chunks_of(uint64_t loop) { return int64_t(loop >> CHUNK_BITS) & MOST_CHUNKS; }
int64_t next_of(uint64_t loop) { return int64_t(loop) & MOST_CHUNKS; }

struct Pool {
    pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;  // one loop at a time
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; // guards `sleeping`
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
    int sleeping = 0;
    int n_workers = 0;
    std::atomic<uint64_t> loop{0};
    std::atomic<int64_t> done{0};
    std::atomic<int> helpers{0}; // workers that may take part
    ChunkFunction run = nullptr;
    void *context = nullptr;
};

Pool pool;

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// Take and run chunks of the loop with this number until none is left.
void take(uint64_t number) {
    uint64_t loop = pool.loop.load(std::memory_order_acquire);
    while (number_of(loop) == number && next_of(loop) < chunks_of(loop)) {
        if (!pool.loop.compare_exchange_weak(loop, loop + 1, std::memory_order_acq_rel)) continue;
        // The loop cannot end while this chunk is not done, so its function and context are valid.
        pool.run(pool.context, next_of(loop));
        pool.done.fetch_add(1, std::memory_order_release);
        loop = pool.loop.load(std::memory_order_acquire);
    }
}

uint64_t current() { return number_of(pool.loop.load(std::memory_order_acquire)); }

void wait_for_another(uint64_t seen) {
    int64_t until = 0;
    for (int spins = 1; current() == seen; ++spins) {
        relax();
        if (spins % 64) continue;
        if (!until) until = now_ns() + SPIN_NS;
        if (now_ns() < until) continue;
        pthread_mutex_lock(&pool.mutex);
        ++pool.sleeping;
        while (current() == seen) pthread_cond_wait(&pool.wake, &pool.mutex);
        --pool.sleeping;
        pthread_mutex_unlock(&pool.mutex);
    }
}

void *work(void *argument) {
    const int index = int(intptr_t(argument));
    for (uint64_t seen = 0;;) {
        wait_for_another(seen);
        seen = current();
        if (index < pool.helpers.load(std::memory_order_acquire)) take(seen);
    }
    return nullptr;
}

// A child process has none of its parent's threads.
void forget_threads() {
    pool.turn = PTHREAD_MUTEX_INITIALIZER;
    pool.mutex = PTHREAD_MUTEX_INITIALIZER;
    pool.wake = PTHREAD_COND_INITIALIZER;
    pool.sleeping = pool.n_workers = 0;
}

void start_workers(int n) {
    static bool registered = false;
    if (!registered) {
        registered = true;
        pthread_atfork(nullptr, nullptr, forget_threads);
    }
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 1 << 20);
    sigset_t all, before; // signals are for the application's threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    while (pool.n_workers < n && !pthread_create(&thread, &attributes, work, (void *)intptr_t(pool.n_workers)))
        ++pool.n_workers;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
}

} // namespace

void share_out(ChunkFunction run, void *context, int64_t n_chunks, int n_threads) {
    const int n_others = (n_threads < MOST_THREADS ? n_threads : MOST_THREADS) - 1;
    // If another thread's loop has the workers, this one goes on alone.
    if (n_others < 1 || n_chunks < 2 || n_chunks > MOST_CHUNKS || pthread_mutex_trylock(&pool.turn)) {
        for (int64_t chunk = 0; chunk < n_chunks; ++chunk) run(context, chunk);
        return;
    }
    start_workers(n_others);
    pool.run = run;
    pool.context = context;
    pool.helpers.store(n_others, std::memory_order_relaxed);
    pool.done.store(0, std::memory_order_relaxed);
    const uint64_t number = (current() + 1) & ((uint64_t(1) << (64 - 2 * CHUNK_BITS)) - 1);
    pool.loop.store(number << 2 * CHUNK_BITS | uint64_t(n_chunks) << CHUNK_BITS, std::memory_order_seq_cst);
    pthread_mutex_lock(&pool.mutex);
    if (pool.sleeping) pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
    take(number);
    while (pool.done.load(std::memory_order_acquire) < n_chunks) relax();
    pthread_mutex_unlock(&pool.turn);
}
