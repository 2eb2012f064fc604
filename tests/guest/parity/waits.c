// Waiting: pipes, poll, select, epoll, events, timers, futexes.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void show(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result < 0 ? -1 : result, result < 0 ? strerrorname_np(errno) : "");
    fflush(stdout);
}

static int shared;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void *adds(void *argument)
{
    for (int i = 0; i < 2000; i++) {
        pthread_mutex_lock(&mutex);
        shared++;
        pthread_mutex_unlock(&mutex);
    }
    return argument;
}

static void *waits(void *argument)
{
    pthread_mutex_lock(&mutex);
    while (shared != 1)
        pthread_cond_wait(&changed, &mutex);
    shared = 2;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
    return argument;
}

static long futex(int *word, int operation, int value, struct timespec *limit)
{
    return syscall(SYS_futex, word, operation, value, limit, NULL, 0);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    int fds[2], n = 0;
    static char block[1 << 17];
    signal(SIGPIPE, SIG_IGN);
    pipe2(fds, O_NONBLOCK);
    show("empty", read(fds[0], block, 1));
    show("fills", write(fds[1], block, sizeof block));
    show("full", write(fds[1], block, 1));
    ioctl(fds[0], FIONREAD, &n);
    printf("holds %d, size %d\n", n, fcntl(fds[0], F_GETPIPE_SZ));
    struct pollfd polls[3] = {{fds[0], POLLIN, 0}, {fds[1], POLLOUT, 0}, {77, POLLIN, 0}};
    show("poll", poll(polls, 3, 0));
    printf("events %x %x %x\n", polls[0].revents, polls[1].revents, polls[2].revents);
    show("drain", read(fds[0], block, sizeof block));
    close(fds[1]);
    show("end", read(fds[0], block, 1));
    show("poll", poll(polls, 1, 0));
    printf("events %x\n", polls[0].revents);
    close(fds[0]);
    pipe(fds);
    close(fds[0]);
    show("nobody reads", write(fds[1], block, 1));
    polls[0] = (struct pollfd){fds[1], POLLOUT, 0};
    poll(polls, 1, 0);
    printf("events %x\n", polls[0].revents);
    show("time is over", poll(NULL, 0, 10));

    // select.
    pipe(fds);
    fd_set readers, writers;
    FD_ZERO(&readers);
    FD_ZERO(&writers);
    FD_SET(fds[0], &readers);
    FD_SET(fds[1], &writers);
    struct timeval no_time = {0};
    show("select", select(fds[1] + 1, &readers, &writers, NULL, &no_time));
    printf("set %d %d\n", FD_ISSET(fds[0], &readers), FD_ISSET(fds[1], &writers));
    FD_ZERO(&readers);
    FD_SET(50, &readers);
    show("select of nothing", select(60, &readers, NULL, NULL, &no_time));
    show("select of less", select(-1, NULL, NULL, NULL, &no_time));

    // epoll: level, edge, once, and what is refused.
    int ep = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0x123456789}, got[4];
    show("add", epoll_ctl(ep, EPOLL_CTL_ADD, fds[0], &event));
    show("add twice", epoll_ctl(ep, EPOLL_CTL_ADD, fds[0], &event));
    show("itself", epoll_ctl(ep, EPOLL_CTL_ADD, ep, &event));
    show("a file", epoll_ctl(ep, EPOLL_CTL_ADD, memfd_create("m", 0), &event));
    show("not there", epoll_ctl(ep, EPOLL_CTL_MOD, fds[1], &event));
    show("no room", epoll_wait(ep, got, 0, 0));
    show("nothing", epoll_wait(ep, got, 4, 0));
    write(fds[1], "ab", 2);
    for (int i = 0; i < 2; i++)
        show("level", epoll_wait(ep, got, 4, 100));
    printf("data %lx events %x\n", (long)got[0].data.u64, got[0].events);
    event.events = EPOLLIN | EPOLLET;
    epoll_ctl(ep, EPOLL_CTL_MOD, fds[0], &event);
    show("edge", epoll_wait(ep, got, 4, 100));
    show("no edge", epoll_wait(ep, got, 4, 10));
    write(fds[1], "c", 1);
    show("edge", epoll_wait(ep, got, 4, 100));
    event.events = EPOLLIN | EPOLLONESHOT;
    epoll_ctl(ep, EPOLL_CTL_MOD, fds[0], &event);
    show("once", epoll_wait(ep, got, 4, 100));
    show("no more", epoll_wait(ep, got, 4, 10));
    close(fds[0]);
    show("closed", epoll_ctl(ep, EPOLL_CTL_DEL, fds[0], &event));

    // Events and timers.
    uint64_t value = 3;
    int ev = eventfd(2, EFD_NONBLOCK);
    write(ev, &value, 8);
    show("event", read(ev, &value, 8));
    printf("value %lu\n", value);
    show("no event", read(ev, &value, 8));
    value = UINT64_MAX;
    show("too large", write(ev, &value, 8));
    show("too short", write(ev, &value, 4));
    ev = eventfd(2, EFD_SEMAPHORE);
    read(ev, &value, 8);
    printf("one of two: %lu\n", value);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct itimerspec times = {.it_value.tv_nsec = 10000000, .it_interval.tv_nsec = 10000000};
    show("not due", read(timer, &value, 8));
    timerfd_settime(timer, 0, &times, NULL);
    polls[0] = (struct pollfd){timer, POLLIN, 0};
    show("due", poll(polls, 1, 5000));
    show("read", read(timer, &value, 8));
    printf("at least once: %d\n", value >= 1);
    times.it_value.tv_nsec = 1000000000;
    show("no time", timerfd_settime(timer, 0, &times, NULL));

    // Threads.
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, adds, (void *)(long)i);
    for (int i = 0; i < 4; i++) {
        void *result;
        pthread_join(threads[i], &result);
        n = (int)(long)result;
    }
    printf("counted %d, last %d\n", shared, n);
    shared = 0;
    pthread_create(&threads[0], NULL, waits, NULL);
    pthread_mutex_lock(&mutex);
    shared = 1;
    pthread_cond_broadcast(&changed);
    while (shared != 2)
        pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
    pthread_join(threads[0], NULL);
    printf("changed %d\n", shared);
    int word = 5;
    struct timespec limit = {0, 10000000};
    show("other value", futex(&word, FUTEX_WAIT, 4, NULL));
    show("too late", futex(&word, FUTEX_WAIT, 5, &limit));
    show("nobody", futex(&word, FUTEX_WAKE, 1, NULL));
    show("crooked", futex((int *)((char *)&word + 1), FUTEX_WAIT, 5, &limit));
    show("no address", futex((int *)8, FUTEX_WAIT, 5, &limit));
    show("no operation", futex(&word, 99, 5, &limit));
    struct timespec before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    limit.tv_nsec = 30000000;
    nanosleep(&limit, NULL);
    clock_gettime(CLOCK_MONOTONIC, &after);
    printf("slept enough: %d\n", (after.tv_sec - before.tv_sec) * 1000000000 + after.tv_nsec - before.tv_nsec >= 30000000);
    limit.tv_nsec = -1;
    show("no time", nanosleep(&limit, NULL));
    return 0;
}
