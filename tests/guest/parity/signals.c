// Signals: masks, queues, stacks, restarts, faults, waits, timers.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/time.h>
#include <sys/ucontext.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void show(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result < 0 ? -1 : result, result < 0 ? strerrorname_np(errno) : "");
}

static volatile int count;
static volatile siginfo_t last;
static char stack[65536];
static sigjmp_buf back;
static volatile int on_other_stack;

static void counts(int signal)
{
    (void)signal;
    count++;
}

static void informs(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)context;
    char here;
    on_other_stack = &here > stack && &here < stack + sizeof stack;
    last = *info;
    count++;
}

static void jumps(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)context;
    last = *info;
    siglongjmp(back, 1);
}

static void skips(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)info;
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2; // ud2
    count++;
}

static void set(int signal, void (*handler)(int, siginfo_t *, void *), int flags)
{
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
    sigaction(signal, &action, NULL);
}

static void fault(const char *what, volatile char *address, int write)
{
    if (sigsetjmp(back, 1) == 0) {
        if (write)
            *address = 1;
        else
            (void)*address;
        printf("%s: nothing\n", what);
    } else {
        printf("%s: signal %d code %d at the address: %d\n", what, last.si_signo, last.si_code, last.si_addr == address);
    }
}

// A signal to the process that all threads block goes to the one that waits for it, however it waits.
static volatile int stage;

static void *waits(void *unused)
{
    sigset_t set;
    int got = 0;
    sigemptyset(&set), sigaddset(&set, SIGTERM);
    stage = 1;
    int result = sigwait(&set, &got);
    printf("waited for: %d %d\n", result, got);
    struct signalfd_siginfo info = {0};
    int fd = signalfd(-1, &set, SFD_CLOEXEC);
    stage = 2;
    long bytes = read(fd, &info, sizeof info);
    printf("read: %ld %d\n", bytes, info.ssi_signo);
    kill(getpid(), SIGTERM);
    show("at once", sigwaitinfo(&set, NULL));
    kill(getpid(), SIGTERM);
    int before = count;
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    printf("unblocked: %d\n", count - before);
    return unused;
}

static void threads(void)
{
    sigset_t set, old;
    pthread_t thread;
    signal(SIGTERM, counts);
    sigemptyset(&set), sigaddset(&set, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set, &old);
    pthread_create(&thread, NULL, waits, NULL);
    for (int i = 1; i <= 2; i++) {
        while (stage != i)
            usleep(1000);
        kill(getpid(), SIGTERM);
    }
    pthread_join(thread, NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    threads();
    sigset_t set1, old, pending;
    signal(SIGUSR1, counts);
    sigemptyset(&set1), sigaddset(&set1, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set1, &old);
    raise(SIGUSR1), raise(SIGUSR1);
    sigpending(&pending);
    printf("blocked: %d pending: %d\n", count, sigismember(&pending, SIGUSR1));
    sigprocmask(SIG_SETMASK, &old, NULL);
    printf("unblocked: %d\n", count);
    show("kill blocked", (sigaddset(&set1, SIGKILL), sigprocmask(SIG_BLOCK, &set1, NULL)));
    sigprocmask(SIG_SETMASK, NULL, &pending);
    printf("is blocked: %d\n", sigismember(&pending, SIGKILL));
    sigprocmask(SIG_SETMASK, &old, NULL);
    show("handler for kill", signal(SIGKILL, counts) == SIG_ERR ? -1 : 0);
    show("no signal", kill(getpid(), 65));
    show("nobody", kill(999999, 0));

    // Real-time signals queue, with values, lowest first.
    int rt = SIGRTMIN + 1;
    set(rt, informs, 0), set(rt + 1, informs, 0);
    sigemptyset(&set1), sigaddset(&set1, rt), sigaddset(&set1, rt + 1);
    sigprocmask(SIG_BLOCK, &set1, NULL);
    for (int i = 0; i < 3; i++) {
        union sigval value = {.sival_int = 10 + i};
        sigqueue(getpid(), rt + (i == 0), value);
    }
    struct timespec soon = {0, 10000000};
    siginfo_t info;
    for (int i = 0; i < 4; i++) {
        int got = sigtimedwait(&set1, &info, &soon);
        if (got > 0)
            printf("queued: %d value %d code %d own %d\n", got - SIGRTMIN, info.si_value.sival_int, info.si_code, info.si_pid == getpid());
        else
            show("queued", got);
    }
    sigprocmask(SIG_SETMASK, &old, NULL);

    // Another stack.
    stack_t other = {.ss_sp = stack, .ss_size = sizeof stack};
    show("stack", sigaltstack(&other, NULL));
    set(SIGUSR2, informs, SA_ONSTACK);
    raise(SIGUSR2);
    printf("on it: %d code %d\n", on_other_stack, last.si_code);
    other.ss_size = 100;
    show("small stack", sigaltstack(&other, NULL));

    // Faults.
    set(SIGSEGV, jumps, 0), set(SIGBUS, jumps, 0), set(SIGFPE, jumps, 0);
    char *page = mmap(NULL, 8192, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(page + 4096, 4096);
    fault("null", NULL, 0);
    fault("read-only", page, 1);
    fault("unmapped", page + 4096, 0);
    fault("kernel", (char *)0xffffffff80000000, 0);
    volatile int zero = 0;
    if (sigsetjmp(back, 1) == 0)
        printf("%d\n", 100 / zero);
    else
        printf("division: signal %d code %d\n", last.si_signo, last.si_code);
    count = 0;
    set(SIGILL, skips, 0);
    __asm__ volatile("ud2");
    printf("skipped: %d\n", count);

    // Restarts.
    int fds[2];
    char byte;
    struct itimerval timer = {.it_value.tv_usec = 20000};
    pipe(fds);
    struct sigaction action = {.sa_handler = counts};
    sigaction(SIGALRM, &action, NULL);
    count = 0;
    setitimer(ITIMER_REAL, &timer, NULL);
    show("interrupted", read(fds[0], &byte, 1));
    action.sa_flags = SA_RESTART;
    sigaction(SIGALRM, &action, NULL);
    pid_t child = fork();
    if (child == 0) {
        usleep(100000);
        _exit(write(fds[1], "x", 1) != 1);
    }
    setitimer(ITIMER_REAL, &timer, NULL);
    show("restarted", read(fds[0], &byte, 1));
    printf("alarms: %d\n", count);
    waitpid(child, NULL, 0);
    struct timespec left, while_ = {0, 200000000};
    setitimer(ITIMER_REAL, &timer, NULL);
    show("sleep", nanosleep(&while_, &left));
    printf("left: %d\n", left.tv_nsec > 100000000 && left.tv_nsec < 200000000);

    // signalfd, and masks while waiting.
    sigemptyset(&set1), sigaddset(&set1, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set1, NULL);
    int fd = signalfd(-1, &set1, SFD_NONBLOCK);
    struct signalfd_siginfo got;
    show("empty", read(fd, &got, sizeof got));
    kill(getpid(), SIGUSR1);
    show("full", read(fd, &got, sizeof got));
    printf("which: %d %d\n", got.ssi_signo, got.ssi_code);
    count = 0;
    kill(getpid(), SIGUSR1);
    show("suspended", sigsuspend(&old));
    sigprocmask(SIG_SETMASK, NULL, &pending);
    printf("handled: %d, blocked again: %d\n", count, sigismember(&pending, SIGUSR1));
    sigprocmask(SIG_SETMASK, &old, NULL);

    // A fault that is blocked ends the program.
    fflush(stdout);
    if ((child = fork()) == 0) {
        sigfillset(&set1);
        sigprocmask(SIG_BLOCK, &set1, NULL);
        *(volatile char *)NULL = 1;
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    printf("blocked fault: %d\n", WTERMSIG(status));
    return 0;
}
