// Who is ended by SIGKILL, whatever it does: also what is stopped, waits for a child of vfork, or makes
// processes without end. And timers that are always due, which must not keep others from running.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void show(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result < 0 ? -1 : result, result < 0 ? strerrorname_np(errno) : "");
    fflush(stdout);
}

static void ended(const char *what, pid_t child)
{
    int status = 0;
    pid_t found = waitpid(child, &status, 0);
    if (found != child)
        show(what, found);
    else if (WIFSIGNALED(status))
        printf("%s: signal %d\n", what, WTERMSIG(status));
    else
        printf("%s: exit %d\n", what, WEXITSTATUS(status));
    fflush(stdout);
}

static void *stop_all(void *unused)
{
    kill(getpid(), SIGSTOP);
    return unused;
}

static void *wait_for_ever(void *unused)
{
    for (;;)
        pause();
    return unused;
}

static void stopped(void)
{
    int status;
    pid_t child = fork();
    if (child == 0) {
        raise(SIGSTOP);
        _exit(1);
    }
    waitpid(child, &status, WUNTRACED);
    kill(child, SIGKILL);
    ended("stopped", child);
    // With threads, of which one sleeps, one runs, and one has stopped them all.
    if ((child = fork()) == 0) {
        pthread_t thread;
        pthread_create(&thread, NULL, wait_for_ever, NULL);
        pthread_create(&thread, NULL, stop_all, NULL);
        for (;;)
            ;
    }
    waitpid(child, &status, WUNTRACED);
    kill(child, SIGKILL);
    ended("stopped threads", child);
    // One that the first thread has left.
    if ((child = fork()) == 0) {
        pthread_t thread;
        pthread_create(&thread, NULL, wait_for_ever, NULL);
        pthread_exit(NULL);
    }
    usleep(20000);
    kill(child, SIGKILL);
    ended("without its first thread", child);
    // Stopped before the signal, which it has blocked everything against.
    if ((child = fork()) == 0) {
        sigset_t all;
        sigfillset(&all);
        sigprocmask(SIG_SETMASK, &all, NULL);
        raise(SIGSTOP);
        _exit(1);
    }
    waitpid(child, &status, WUNTRACED);
    kill(child, SIGTERM);
    kill(child, SIGKILL);
    ended("stopped and deaf", child);
}

static void waits_for_vfork(void)
{
    int two[2];
    pid_t grandchild = 0;
    pipe(two);
    pid_t child = fork();
    if (child == 0) {
        pid_t inner = vfork();
        if (inner == 0) {
            pid_t me = getpid();
            write(two[1], &me, sizeof me);
            for (;;)
                pause();
        }
        _exit(1);
    }
    read(two[0], &grandchild, sizeof grandchild);
    kill(child, SIGKILL);
    ended("waits for vfork", child);
    show("its child is there", kill(grandchild, 0));
    kill(grandchild, SIGKILL);
    close(two[0]), close(two[1]);
}

// A child that is ended before its first instruction has none.
static void unborn(void)
{
    int two[2], wrong = 0;
    char byte;
    pipe2(two, O_NONBLOCK);
    for (int i = 0; i < 50; i++) {
        pid_t child = fork();
        if (child == 0) {
            for (;;)
                if (fork() == 0)
                    pause();
        }
        setpgid(child, child);
        kill(child, SIGKILL);
        int status;
        wrong += waitpid(child, &status, 0) != child || !WIFSIGNALED(status);
        // What it made all the same, before it was ended.
        while (kill(-child, SIGKILL) == 0)
            waitpid(-child, NULL, 0);
    }
    show("wrong ends", wrong);
    show("pipe", read(two[0], &byte, 1));
    close(two[0]), close(two[1]);
}

// All of a group that makes processes without end, at once.
static void storm(void)
{
    int ready[2];
    char byte;
    pipe(ready);
    pid_t leader = fork();
    if (leader == 0) {
        struct rlimit limit = {60, 60};
        setpgid(0, 0);
        // The limit is of a user who is none.
        setrlimit(RLIMIT_NPROC, &limit);
        if (setgid(54322) || setuid(54322))
            _exit(1);
        // Nobody is waited for.
        signal(SIGCHLD, SIG_IGN);
        write(ready[1], "r", 1);
        close(ready[0]), close(ready[1]);
        for (;;)
            if (fork() == 0 && getpid() % 3 == 0)
                _exit(0);
    }
    close(ready[1]);
    read(ready[0], &byte, 1);
    usleep(100000);
    int rounds = 0;
    // A process that is made while the signals are sent may be missed, so more than once; but not
    // for ever.
    while (kill(-leader, SIGKILL) == 0 && rounds < 2000) {
        rounds++;
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        usleep(1000);
    }
    printf("storm: %s\n", rounds < 2000 ? "over" : "goes on");
    while (waitpid(-1, NULL, WNOHANG) > 0)
        ;
    close(ready[0]);
}

static void nothing(int signal) { (void)signal; }

static void timers(void)
{
    // Due for ever, read by nobody: the wait goes on all the same.
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct itimerspec once = {.it_value.tv_nsec = 1}, often = {.it_value.tv_nsec = 1, .it_interval.tv_nsec = 1};
    timerfd_settime(timer, 0, &once, NULL);
    usleep(1000);
    struct pollfd none = {.fd = timer, .events = 0};
    show("poll for nothing", poll(&none, 1, 50));
    int queue = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    epoll_ctl(queue, EPOLL_CTL_ADD, timer, &event);
    show("first edge", epoll_wait(queue, &event, 1, 50));
    show("no second edge", epoll_wait(queue, &event, 1, 50));
    struct itimerspec later = {.it_value.tv_nsec = 1, .it_interval.tv_nsec = 20000000};
    timerfd_settime(timer, 0, &later, NULL);
    show("an edge", epoll_wait(queue, &event, 1, 1000));
    show("the next, unread", epoll_wait(queue, &event, 1, 50));
    unsigned long count;
    show("read", read(timer, &count, sizeof count));
    usleep(40000);
    show("after it", epoll_wait(queue, &event, 1, 1000));
    timerfd_settime(timer, 0, &once, NULL);
    usleep(1000);
    show("set again", epoll_wait(queue, &event, 1, 1000));
    close(queue);
    timerfd_settime(timer, 0, &often, NULL);
    show("poll for nothing, often", poll(&none, 1, 50));
    close(timer);
    // By signals, and by the processor's time: the program goes on.
    pid_t child = fork();
    if (child == 0) {
        struct sigaction action = {.sa_handler = nothing};
        struct itimerval fast = {{0, 400}, {0, 400}};
        sigaction(SIGALRM, &action, NULL);
        setitimer(ITIMER_REAL, &fast, NULL);
        for (volatile int i = 0; i < 3000000; i++)
            ;
        _exit(3);
    }
    ended("a timer without end", child);
    if ((child = fork()) == 0) {
        struct itimerval soon = {{0, 0}, {0, 20000}};
        setitimer(ITIMER_PROF, &soon, NULL);
        for (;;)
            ;
    }
    ended("of the processor's time", child);
    // A chain of waits has an end.
    int outer = epoll_create1(0), last = 0, refused = 0;
    for (int i = 0; i < 3; i++) {
        int inner = epoll_create1(0);
        event = (struct epoll_event){.events = EPOLLIN};
        refused += epoll_ctl(outer, EPOLL_CTL_ADD, inner, &event) != 0;
        last = inner;
    }
    show("inner", refused);
    show("ring", epoll_ctl(last, EPOLL_CTL_ADD, outer, &event));
    close(outer), close(last);
}

static void large(void)
{
    // By its own number: it is itself that it asks about.
    struct rlimit limit;
    show("own limits", prlimit(getpid(), RLIMIT_CORE, NULL, &limit));
    // More than a call moves at once, from memory that is there once.
    size_t bytes = 64 << 20;
    int fd = open("/dev/null", O_WRONLY), small = memfd_create("small", 0);
    ftruncate(small, 4096);
    char *memory = mmap(NULL, bytes, PROT_READ, MAP_SHARED, small, 0);
    struct iovec parts[1024];
    for (int i = 0; i < 1024; i++)
        parts[i] = (struct iovec){memory, 4096};
    show("many parts", writev(fd, parts, 1024));
    // Far past the end of a file: it is not looked for page by page.
    char *far = mmap(NULL, 1ul << 44, PROT_READ, MAP_SHARED, small, 0);
    show("mapped", far == MAP_FAILED);
    unsigned char there[4];
    show("looked at", mincore(memory, 4096 * 4, there));
    munmap(far, 1ul << 44);
    munmap(memory, bytes);
    close(fd), close(small);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    stopped();
    waits_for_vfork();
    unborn();
    storm();
    timers();
    large();
    return 0;
}
