/* Collectives among the processes of one machine, through a shared mapping.

   Every rank owns a counter and two buffers. A collective is: copy into the own buffer, raise the own counter to the
   round's number, wait until every counter has reached it, read all buffers. Rounds alternate between the two buffers:
   a rank that reaches round n+1 has finished reading round n, and nobody enters n+2 before all have reached n+1, so a
   buffer is never overwritten while someone reads it.

   A wait spins, then sleeps on the peer's counter. How long it spins follows from the waits before, as far as a bound: half
   as long after a wait that went beyond the bound, as where the peer had no core to run on (after Karlin, Li, Manasse,
   Owicki: Empirical Studies of Competitive Spinning for a Shared-Memory Multiprocessor, SOSP 1991). It never yields: that
   gives away a slice of milliseconds to whoever else is there, however unimportant. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "common.h"

#define MAX_RANKS 16
#define LEAST_SPIN_NS 20000
#define STAY_NS 5000000

typedef struct {
    _Atomic uint32_t round;
    _Atomic uint32_t sleepers; /* who waits for `round` in the kernel */
    _Atomic int32_t core;      /* where it was when it raised `round` */
    char padding[116];         /* two cache lines: neighbours are fetched in pairs */
} counter;

typedef struct {
    _Atomic uint32_t joined;
    char padding[124];
    counter counters[MAX_RANKS];
} header;

typedef struct {
    header *shared;
    char *buffers;
    size_t capacity; /* bytes of one buffer, a multiple of 64 */
    int64_t most_spin_ns, spin_ns, timeout_ns;
    int64_t stays_until; /* on its core */
    uint32_t round;
    int rank, world;
} group;

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

INLINE void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

INLINE int reached(counter *peer, uint32_t round) {
    return (int32_t)(atomic_load_explicit(&peer->round, memory_order_acquire) - round) >= 0;
}

/* Two ranks that take turns never want a core at the same time, so nothing tells the kernel that they should have one each:
   it may leave both on one for good. So of two ranks on one core the later one goes. It may come back. */
static void leave_core(group *g, const counter *peer, int64_t now) {
    const int core = sched_getcpu();
    if (core < 0 || now < g->stays_until || atomic_load_explicit(&peer->core, memory_order_relaxed) != core) return;
    g->stays_until = now + STAY_NS;
    cpu_set_t all, others;
    if (sched_getaffinity(0, sizeof all, &all) || core >= CPU_SETSIZE) return;
    others = all;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others)) sched_setaffinity(0, sizeof all, &all);
}

/* Whether the peer reached the round while this rank spun. */
static int spun(const group *g, counter *peer, uint32_t round, int64_t start) {
    for (int64_t waited = 0; waited < g->spin_ns; waited = now_ns() - start)
        for (int i = 0; i < 32; i++) {
            if (reached(peer, round)) return 1;
            relax();
        }
    return 0;
}

/* After a wait of so long. One that was short enough should have been spun through. */
static void learn(group *g, int64_t waited) {
    if (waited <= g->most_spin_ns)
        g->spin_ns = g->most_spin_ns;
    else if (g->spin_ns > LEAST_SPIN_NS)
        g->spin_ns /= 2;
}

/* 0 when the peer has reached the round, -1 when the time is up. */
static int wait_for(group *g, counter *peer, uint32_t round) {
    if (reached(peer, round)) return 0;
    const int64_t start = now_ns();
    if (g->most_spin_ns) {
        if (peer < &g->shared->counters[g->rank]) leave_core(g, peer, start);
        if (spun(g, peer, round, start)) return 0;
    }
    atomic_fetch_add(&peer->sleepers, 1);
    int result = 0;
    for (;;) {
        const uint32_t seen = atomic_load(&peer->round);
        if ((int32_t)(seen - round) >= 0) break;
        const int64_t left = start + g->timeout_ns - now_ns();
        if (left <= 0) {
            result = -1;
            break;
        }
        const struct timespec limit = {left / 1000000000, left % 1000000000};
        syscall(SYS_futex, &peer->round, FUTEX_WAIT, seen, &limit, NULL, 0);
    }
    atomic_fetch_sub(&peer->sleepers, 1);
    if (g->most_spin_ns) learn(g, now_ns() - start);
    return result;
}

static void announce(group *g) {
    counter *own = &g->shared->counters[g->rank];
    atomic_store_explicit(&own->core, sched_getcpu(), memory_order_relaxed);
    atomic_store(&own->round, ++g->round);
    if (atomic_load(&own->sleepers)) syscall(SYS_futex, &own->round, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* 0, or -1 - rank of the first peer that did not come. */
static int meet(group *g) {
    announce(g);
    for (int rank = 0; rank < g->world; rank++)
        if (rank != g->rank && wait_for(g, &g->shared->counters[rank], g->round)) return -1 - rank;
    return 0;
}

INLINE char *buffer_of(const group *g, int rank, uint32_t round) {
    return g->buffers + ((size_t)rank * 2 + (round & 1)) * g->capacity;
}

EXPORT size_t treadle_group_bytes(int world, size_t capacity) { return sizeof(header) + 2 * capacity * (size_t)world; }

EXPORT int treadle_max_ranks(void) { return MAX_RANKS; }

/* How many ranks have come, this one included if it comes now. */
EXPORT int treadle_group_join(void *mapping, int comes) {
    header *shared = mapping;
    return (int)atomic_fetch_add(&shared->joined, (uint32_t)comes) + comes;
}

/* `mapping`: treadle_group_bytes long, shared by all ranks, zero before the first rank came. Null: no memory. */
EXPORT void *treadle_group_new(void *mapping, int rank, int world, size_t capacity, double spin, double timeout) {
    group *g = calloc(1, sizeof *g);
    if (!g) return NULL;
    *g = (group){mapping, (char *)mapping + sizeof(header), capacity, (int64_t)(spin * 1e9), (int64_t)(spin * 1e9),
                 (int64_t)(timeout * 1e9), 0, 0, rank, world};
    return g;
}

EXPORT void treadle_group_free(void *handle) { free(handle); }

EXPORT int treadle_barrier(void *handle) { return meet(handle); }

/* The sum over the ranks, in rank order from the first, so that it is the same number everywhere. */
INLINE void sum_buffers(const group *g, void *out, size_t count, int bf16) {
    const char *base = buffer_of(g, 0, g->round);
    for (size_t i = 0; i < count; i += LANES) {
        vfloat sum = load_some(base, i, count, bf16);
        for (int rank = 1; rank < g->world; rank++)
            sum += load_some(base + (size_t)rank * 2 * g->capacity, i, count, bf16);
        store_some(out, i, count, sum, bf16);
    }
}

EXPORT int treadle_all_reduce(void *handle, void *data, size_t count, int bf16) {
    group *g = handle;
    const size_t most = g->capacity / element_size(bf16);
    for (size_t done = 0; done < count; done += most) {
        const size_t some = count - done < most ? count - done : most;
        void *part = at_mut(data, done, bf16);
        memcpy(buffer_of(g, g->rank, g->round + 1), part, some * element_size(bf16));
        const int missing = meet(g);
        if (missing) return missing;
        if (bf16)
            sum_buffers(g, part, some, 1);
        else
            sum_buffers(g, part, some, 0);
    }
    return 0;
}

/* out: [world, bytes]. */
EXPORT int treadle_all_gather(void *handle, const void *data, void *out, size_t bytes) {
    group *g = handle;
    for (size_t done = 0; done < bytes; done += g->capacity) {
        const size_t some = bytes - done < g->capacity ? bytes - done : g->capacity;
        memcpy(buffer_of(g, g->rank, g->round + 1), (const char *)data + done, some);
        const int missing = meet(g);
        if (missing) return missing;
        for (int rank = 0; rank < g->world; rank++)
            memcpy((char *)out + (size_t)rank * bytes + done, buffer_of(g, rank, g->round), some);
    }
    return 0;
}
