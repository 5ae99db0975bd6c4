/* Measure for how much CPU time a thread holds the interpreter's lock. Preloaded by bench/lock_holds.py.

CPython (tried with 3.11) signals one condition variable when a thread takes the lock and another one when it gives the
lock up. Between these two, a thread gives the lock up only where the interpreter looks for requests of other threads:
at the beginning of functions, after calls, and at the end of the body of a loop. It runs pending calls at the same
places, so a pending call that adds itself again marks all of them. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

typedef int (*AddPendingCall)(int (*)(void *), void *);

static __thread enum { IDLE, FIND_TAKEN, FIND_GIVEN, READY, MEASURE } state;
static __thread int has_lock;
static __thread long began_ns, read_ns;
static pthread_cond_t *taken, *given;
static AddPendingCall add_pending_call;
static int report_fd;
static long report_ns;

#define MARK_NS 20000 /* The CPU time is read that often at most, because it takes a system call. */

static long clock_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

static void begin_hold(void) {
    read_ns = clock_ns(CLOCK_MONOTONIC);
    began_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
}

/* End a hold. A long one is reported, with the Python functions, which faulthandler writes on the signal. */
static void end_hold(void) {
    long held_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID) - began_ns;
    if (held_ns > report_ns) {
        dprintf(report_fd, "hold %ld\n", held_ns);
        raise(SIGUSR1);
    }
}

int pthread_cond_signal(pthread_cond_t *condition) {
    static int (*original)(pthread_cond_t *);
    if (!original)
        original = (int (*)(pthread_cond_t *))dlsym(RTLD_NEXT, "pthread_cond_signal");
    if (state == FIND_TAKEN) {
        taken = condition;
        state = FIND_GIVEN;
    } else if (state == FIND_GIVEN) {
        given = condition;
        state = READY;
    } else if (state == MEASURE && condition == given && has_lock) {
        end_hold();
        has_lock = 0;
    } else if (state == MEASURE && condition == taken) {
        has_lock = 1;
        begin_hold();
    }
    return original(condition);
}

static int mark(void *unused) {
    if (state != MEASURE)
        return 0;
    add_pending_call(mark, NULL);
    if (clock_ns(CLOCK_MONOTONIC) - read_ns > MARK_NS) {
        end_hold();
        begin_hold();
    }
    return 0;
}

/* The caller gives the lock up for each of these calls. The first one finds the condition variables. */
void holds_find(void) { state = FIND_TAKEN; }

void holds_begin(AddPendingCall add, int fd, long limit_ns) {
    add_pending_call = add;
    report_fd = fd;
    report_ns = limit_ns;
    has_lock = 0;
    state = MEASURE;
    add_pending_call(mark, NULL);
}

void holds_end(void) { state = IDLE; }
