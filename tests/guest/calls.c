// Random system calls with hostile arguments, from several threads, in rounds.
//   calls SEED SECONDS            rounds of this seed until the time is over
//   calls SEED rounds FIRST COUNT these rounds
// Each round is a process of its own, made from SEED and its number, with everything it leaves
// behind taken away afterwards. After it this program looks whether the kernel still does what a
// kernel does; it ends with 3 when something could not be ended, 4 when something is broken.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <grp.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, ARENA_PAGES = 64, WORKERS = 3, CALLS = 400, FIRST_FD = 3, FDS = 32, NUMBERS = 463 };
#define ROUND_NS 3000000000ull
#define END_NS 60000000000ull
#define WORK "/calls.work"

static uint8_t *arena;
static volatile int working;

// One stream of random numbers for each thread: what a round does depends on its seed only (and on
// when which thread runs).
struct chance {
    uint64_t state;
};

static uint64_t any(struct chance *c)
{
    uint64_t x = c->state += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static uint64_t below(struct chance *c, uint64_t limit) { return any(c) % limit; }
static int one_in(struct chance *c, uint64_t n) { return below(c, n) == 0; }

// Without the library: its cancellation points, caches and errno are not wanted here.
static long raw(long number, const uint64_t *a)
{
    register uint64_t r10 __asm__("r10") = a[3];
    register uint64_t r8 __asm__("r8") = a[4];
    register uint64_t r9 __asm__("r9") = a[5];
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory", "cc");
    return result;
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static const char *const paths[] = {
    "a", "b", "d", "d/x", "d/y", "link", "loop", "fifo", "sock", "d/../a", ".", "..", "", "/", "bad.elf",
    "/dev/null", "/dev/zero", "/dev/full", "/dev/ptmx", "/dev/pts/0", "/dev/tty", "/dev/shm/s", "/proc/self/exe",
    "/proc/self/maps", "/proc/self/mem", "/proc/self/fd/3", "/proc/self/fd/5", "/proc/self/stat",
    "/proc/self/status", "/proc/self/task", "/proc/1/fd", "/proc/mounts", "/proc/meminfo", "/proc/stat",
    "/proc/sys/kernel/pid_max", "/sys/class/net", "/proc/self/oom_score_adj", "/proc/self/ns/pid", "/none",
    "user.a", "user.b", "/sys/fs/cgroup/cpu.max", "/proc/self/fdinfo/3",
};

// An address: of the arena, of the kernel, of nobody, at the end of something.
static uint64_t address(struct chance *c)
{
    uint64_t at = (uint64_t)arena;
    switch (below(c, 16)) {
    case 0: return 0;
    case 1: return below(c, 4096);
    case 2: return 0xffff800000000000ull + (any(c) & 0x7ffffff8);
    case 3: return 0xffffffff80000000ull + (any(c) & 0x1fffff);
    case 4: return 0x8000000000000000ull | any(c);
    case 5: return 0x7ffffffff000ull - below(c, 64);
    case 6: return at + below(c, ARENA_PAGES) * PAGE + PAGE - below(c, 64);
    case 7: return any(c);
    default: return at + below(c, ARENA_PAGES * PAGE) / 8 * 8;
    }
}

static void write_at(uint64_t to, const void *from, size_t length)
{
    // By the kernel, which says what cannot be written, where a store would end this program.
    int fds[2];
    if (pipe2(fds, O_NONBLOCK | O_CLOEXEC))
        return;
    if (write(fds[1], from, length) == (ssize_t)length)
        syscall(SYS_read, fds[0], to, length);
    close(fds[0]), close(fds[1]);
}

static uint64_t path(struct chance *c)
{
    if (one_in(c, 12))
        return address(c);
    const char *name = paths[below(c, sizeof paths / sizeof *paths)];
    if (one_in(c, 40)) {
        static char longest[8192];
        memset(longest, one_in(c, 2) ? 'x' : '/', sizeof longest - 1);
        for (size_t i = 0; i < sizeof longest - 8; i += 200)
            longest[i] = '/';
        return (uint64_t)longest;
    }
    if (one_in(c, 10)) {
        // Up to the last byte before what may not be there.
        uint64_t to = (uint64_t)arena + (1 + below(c, ARENA_PAGES)) * PAGE - strlen(name) - one_in(c, 2);
        write_at(to, name, strlen(name) + 1);
        return to;
    }
    return (uint64_t)name;
}

static uint64_t number(struct chance *c)
{
    switch (below(c, 10)) {
    case 0: return 0;
    case 1: return (uint64_t)-1;
    case 2: return 1ull << below(c, 64);
    case 3: return (1ull << below(c, 64)) - 1;
    case 4: return any(c);
    case 5: return (uint32_t)any(c);
    case 6: return INT64_MAX - below(c, 3);
    case 7: return below(c, ARENA_PAGES) * PAGE;
    default: return below(c, 64);
    }
}

static uint64_t flags(struct chance *c)
{
    uint64_t bits = 0;
    for (uint64_t n = below(c, 5); n > 0; n--)
        bits |= 1ull << below(c, one_in(c, 8) ? 64 : 24);
    return bits;
}

// Numbers in a row at an address: whatever the call takes them for.
static uint64_t words(struct chance *c, int count)
{
    uint64_t at = address(c), all[16];
    for (int i = 0; i < count && i < 16; i++)
        all[i] = one_in(c, 3) ? address(c) : number(c);
    write_at(at, all, count * 8);
    return at;
}

static uint64_t short_time(struct chance *c)
{
    if (one_in(c, 8))
        return address(c);
    struct timespec t = {.tv_nsec = below(c, 3000000)};
    if (one_in(c, 16))
        t = (struct timespec){.tv_sec = any(c), .tv_nsec = any(c)};
    uint64_t at = (uint64_t)arena + below(c, PAGE);
    write_at(at, &t, sizeof t);
    return at;
}

static uint64_t socket_address(struct chance *c)
{
    union {
        struct sockaddr_in four;
        struct sockaddr_in6 six;
        struct sockaddr_un local;
        uint64_t raw[16];
    } a;
    for (int i = 0; i < 16; i++)
        a.raw[i] = number(c);
    switch (below(c, 5)) {
    case 0: a.four = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(below(c, 8) ? 4000 + below(c, 4) : any(c)), .sin_addr.s_addr = htonl(one_in(c, 4) ? any(c) : INADDR_LOOPBACK)}; break;
    case 1: a.six = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons(4000 + below(c, 4)), .sin6_addr = in6addr_loopback}; break;
    case 2: a.local = (struct sockaddr_un){.sun_family = AF_UNIX, .sun_path = "sock"}; break;
    case 3: a.local = (struct sockaddr_un){.sun_family = AF_UNIX, .sun_path = "\0name"}; break;
    }
    uint64_t at = address(c);
    write_at(at, &a, sizeof a);
    return at;
}

static uint64_t process(struct chance *c)
{
    switch (below(c, 8)) {
    case 0: return number(c);
    case 1: return 0;
    case 2: return -(uint64_t)getpgid(0);
    default: return getpid();
    }
}

// Arguments by letter: f file, p path, P new path, b address, l length, t time, v row of numbers,
// n number, F flags, s signal, k process, S socket address, a address for memory, z bytes of memory,
// 0 to 9 below so many tens.
static const struct known {
    short number;
    const char *arguments;
} known[] = {
    {0, "fbl"}, {1, "fbl"}, {2, "pFn"}, {3, "f"}, {4, "pb"}, {5, "fb"}, {6, "pb"}, {7, "v11"}, {8, "fn1"},
    {9, "azFFfn"}, {10, "az1"}, {11, "az"}, {12, "a"}, {13, "svb1"}, {14, "1vb1"}, {16, "fnv"}, {17, "fbln"},
    {18, "fbln"}, {19, "fv1"}, {20, "fv1"}, {21, "p1"}, {22, "b"}, {23, "6vvvt"}, {24, ""}, {25, "azzFa"},
    {26, "az1"}, {27, "azb"}, {28, "az2"}, {29, "nz F"}, {30, "1aF"}, {31, "12v"}, {32, "f"}, {33, "f4"},
    {35, "tb"}, {38, "1vb"}, {40, "ffvl"}, {41, "1FF"}, {42, "fSn"}, {43, "fbv"}, {44, "fblFSn"}, {45, "fblFbv"},
    {46, "fvF"}, {47, "fvF"}, {48, "f1"}, {49, "fSn"}, {50, "f1"}, {51, "fbv"}, {52, "fbv"}, {53, "1FFb"},
    {54, "f19vn"}, {55, "f19bv"}, {61, "kbFb"}, {62, "ks"}, {64, "n1F"}, {65, "1v1"}, {66, "112v"}, {68, "nF"},
    {69, "1vlF"}, {70, "1vlnF"}, {71, "11v"}, {72, "f9v"}, {73, "fF"}, {74, "f"}, {75, "f"}, {76, "pn"}, {77, "fn"},
    {78, "fbl"}, {79, "bl"}, {80, "p"}, {81, "f"}, {82, "pp"}, {83, "pn"}, {84, "p"}, {85, "pn"}, {86, "pp"},
    {87, "p"}, {88, "pp"}, {89, "pbl"}, {90, "pn"}, {91, "fn"}, {92, "pnn"}, {95, "n"}, {96, "bb"}, {97, "2b"},
    {98, "1b"}, {99, "b"}, {100, "b"}, {109, "kk"}, {112, ""}, {115, "nv"}, {116, "nv"}, {120, "bb"}, {127, "vl"},
    {128, "vbtn"}, {129, "ksv"}, {131, "vb"}, {132, "pv"}, {133, "pnn"}, {137, "pb"}, {138, "fb"}, {157, "4nnnn"},
    {158, "nb"}, {160, "2v"}, {186, ""}, {188, "ppbl1"}, {190, "fpbl1"}, {191, "ppbl"}, {193, "fpbl"}, {194, "pbl"}, {196, "fbl"},
    {197, "pp"}, {199, "fp"}, {200, "ks"}, {202, "a9nta1"},
    {213, "n"}, {217, "fbl"}, {222, "1vb"}, {223, "11vb"}, {226, "1"}, {228, "1b"}, {229, "1b"}, {230, "1Ftb"},
    {232, "fb11"}, {233, "f1fv"}, {234, "kks"}, {247, "1kvFb"}, {254, "fpF"}, {255, "f1"}, {257, "fpFn"},
    {258, "fpn"}, {259, "fpnn"}, {260, "fpnnF"}, {262, "fpbF"}, {263, "fpF"}, {264, "fpfp"}, {265, "fpfpF"},
    {266, "pfp"}, {267, "fpbl"}, {268, "fpn"}, {269, "fpnF"}, {270, "6vvvtv"}, {271, "v1tvn"}, {273, "vl"},
    {274, "kbb"}, {275, "fvfvlF"}, {276, "fflF"}, {277, "fnlF"}, {280, "fpvF"}, {281, "fb11vn"}, {282, "fvnF"},
    {283, "1F"}, {284, "nF"}, {285, "fFnn"}, {286, "fFvb"}, {287, "fb"}, {288, "fbvF"}, {289, "fvnF"}, {290, "nF"},
    {291, "F"}, {292, "f4F"}, {293, "bF"}, {294, "F"}, {295, "fv1n"}, {296, "fv1n"}, {299, "fv1Ft"}, {302, "k2vb"},
    {306, "f"}, {307, "fv1F"}, {309, "bb"}, {310, "kv1v1F"}, {311, "kv1v1F"}, {314, "kvF"}, {315, "kbnF"}, {316, "fpfpF"}, {318, "bnF"}, {319, "pF"},
    {324, "9F9"}, {325, "azF"}, {326, "fvfvlF"}, {327, "fv1nnF"}, {328, "fv1nnF"}, {332, "fpFFb"}, {424, "fsvF"}, {434, "kF"},
    {435, "vn"}, {436, "ffF"}, {437, "fpvn"}, {438, "f9F"}, {439, "fpnF"}, {441, "fb1tvn"}, {452, "fpnF"},
};

// Left out: the end of the machine; waits for ever; what gives a thread another stack or end than this
// program knows of (made on purpose elsewhere).
static int left_out(long n, struct chance *c)
{
    switch (n) {
    case 15: case 56: case 58: case 59: case 322: case 435: return 1; // sigreturn, clone, vfork, exec
    case 34: case 130: case 169: case 176: return 1;                 // pause, sigsuspend, reboot
    case 60: case 231: return !one_in(c, 40);                         // exit
    case 165: case 166: case 161: return !one_in(c, 10);              // mount, umount, chroot
    default: return 0;
    }
}

static uint64_t argument(struct chance *c, char kind)
{
    if (one_in(c, 12))
        return one_in(c, 2) ? address(c) : number(c);
    switch (kind) {
    case 'f': return one_in(c, 16) ? (uint64_t)-100 : one_in(c, 8) ? number(c) : FIRST_FD + below(c, FDS);
    case 'p': return path(c);
    case 'b': return address(c);
    case 'l': return one_in(c, 4) ? number(c) : below(c, 3 * PAGE);
    case 't': return short_time(c);
    case 'v': return words(c, 1 + below(c, 12));
    case 'F': return flags(c);
    case 's': return below(c, 66);
    case 'k': return process(c);
    case 'S': return socket_address(c);
    case 'a': return one_in(c, 4) ? address(c) : (uint64_t)arena + below(c, ARENA_PAGES) * PAGE;
    case 'z': return one_in(c, 6) ? number(c) : (1 + below(c, 8)) * PAGE;
    case '0' ... '9': return below(c, (kind - '0') * 10 + 6);
    default: return one_in(c, 3) ? address(c) : number(c);
    }
}

static void step(struct chance *c)
{
    uint64_t a[6] = {0};
    long n;
    if (one_in(c, 5)) {
        n = one_in(c, 50) ? (long)any(c) : (long)below(c, NUMBERS);
        for (int i = 0; i < 6; i++)
            a[i] = argument(c, "fpblvnFsak"[below(c, 10)]);
    } else {
        const struct known *k = &known[below(c, sizeof known / sizeof *known)];
        n = k->number;
        for (int i = 0; k->arguments[i]; i++)
            a[i] = argument(c, k->arguments[i]);
    }
    if (left_out(n, c))
        return;
    // Nobody but the round's own processes: their father has to live.
    if ((n == 302 || n == 62 || n == 200 || n == 234 || n == 129 || n == 297 || n == 424 || n == 310 || n == 311) && (int)a[0] == 1)
        return;
    // This thread's own stack pointer of the library.
    if (n == 158 && (int)a[0] == 0x1002)
        return;
    // Mounts go below the round's directory.
    if (n == 165 || n == 166)
        a[n == 165] = (uint64_t) "d";
    long result = raw(n, a);
    if (n == 57 && result == 0) {
        for (int i = 0; i < 20; i++)
            step(c);
        _exit(0);
    }
}

static void on_nothing(int signal) { (void)signal; }

static void calm(void)
{
    struct sigaction nothing = {.sa_handler = on_nothing};
    sigset_t none;
    sigemptyset(&none);
    sigaction(SIGUSR1, &nothing, NULL);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

// A frame of rubbish for sigreturn.
static void bad_return(struct chance *c)
{
    static uint64_t frame[256];
    for (int i = 0; i < 256; i++)
        frame[i] = one_in(c, 2) ? address(c) : number(c);
    __asm__ volatile("mov %0, %%rsp; mov $15, %%eax; syscall" : : "r"(frame + 8) : "memory");
    __builtin_unreachable();
}

// A program with a broken header.
static void bad_program(struct chance *c)
{
    static uint8_t image[3 * PAGE];
    int fd = open("/proc/self/exe", O_RDONLY);
    ssize_t got = read(fd, image, sizeof image);
    close(fd);
    for (uint64_t n = 1 + below(c, 4); n > 0; n--) {
        uint64_t at = below(c, 64 + 56 * 8) & ~7ull, value = one_in(c, 2) ? address(c) : number(c);
        memcpy(image + at, &value, one_in(c, 2) ? 8 : 2);
    }
    char name[32];
    snprintf(name, sizeof name, "bad.%d", getpid());
    fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0700);
    if (fd < 0 || write(fd, image, got) != got)
        _exit(0);
    close(fd);
    execl(name, name, "0", "rounds", "0", "0", NULL);
    _exit(0);
}

// A child by clone with any flags, which only ends.
static void any_clone(struct chance *c)
{
    static __thread uint8_t stack[4096] __attribute__((aligned(16)));
    uint64_t a[6] = {flags(c) | below(c, 65), 0, address(c), address(c), address(c), 0};
    if (a[0] & CLONE_VM)
        a[1] = (uint64_t)(stack + sizeof stack);
    a[0] &= ~(uint64_t)CLONE_SETTLS;
    register uint64_t r10 __asm__("r10") = a[3];
    register uint64_t r8 __asm__("r8") = a[4];
    long result;
    __asm__ volatile("syscall; test %%rax, %%rax; jnz 1f; xor %%edi, %%edi; mov $60, %%eax; syscall; 1:"
                     : "=a"(result)
                     : "a"(56), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory", "cc");
}

static void special(struct chance *c)
{
    int what = below(c, 4);
    if (what == 3) {
        any_clone(c);
        return;
    }
    pid_t child = fork();
    if (child != 0)
        return;
    calm();
    if (what == 0)
        bad_return(c);
    if (what == 1)
        bad_program(c);
    struct rlimit small = {.rlim_cur = below(c, 40), .rlim_max = 40};
    setrlimit(below(c, 16), &small);
    for (int i = 0; i < 20; i++)
        step(c);
    _exit(0);
}

static void *worker(void *argument)
{
    struct chance *c = argument;
    for (int i = 0; i < CALLS; i++) {
        if (i % 8 == 0)
            calm();
        if (one_in(c, 60))
            special(c);
        else
            step(c);
    }
    __atomic_fetch_sub(&working, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

// Takes memory away, and gives other memory, while the others make calls with it.
static void mangle(struct chance *c)
{
    uint8_t *at = arena + below(c, ARENA_PAGES) * PAGE;
    size_t bytes = (1 + below(c, 6)) * PAGE;
    if (at + bytes > arena + ARENA_PAGES * PAGE)
        return;
    int shared = one_in(c, 2) ? MAP_SHARED : MAP_PRIVATE;
    switch (below(c, 6)) {
    case 0: munmap(at, bytes); break;
    case 1: mprotect(at, bytes, below(c, 8)); break;
    case 2: madvise(at, bytes, MADV_DONTNEED); break;
    case 3: mmap(at, bytes, PROT_READ | PROT_WRITE, shared | MAP_ANONYMOUS | MAP_FIXED, -1, 0); break;
    // Of files, also past their end.
    default: mmap(at, bytes, PROT_READ | PROT_WRITE, shared | MAP_FIXED, FIRST_FD + below(c, 4), below(c, 4) * PAGE);
    }
}

static void open_things(struct chance *c)
{
    int two[2];
    for (int fd = FIRST_FD; fd < FIRST_FD + FDS; fd++)
        close(fd);
    open("a", O_RDWR | O_CREAT, 0600);
    open("/dev/shm/s", O_RDWR | O_CREAT, 0600);
    memfd_create("m", 0);
    open("d", O_RDONLY | O_DIRECTORY);
    for (int fd = FIRST_FD; fd < FIRST_FD + 3; fd++)
        ftruncate(fd, below(c, 4 * PAGE));
    pipe(two);
    pipe2(two, O_NONBLOCK);
    socketpair(AF_UNIX, one_in(c, 2) ? SOCK_STREAM : SOCK_DGRAM, 0, two);
    socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, two);
    for (int i = 0; i < 4; i++) {
        int fd = socket(one_in(c, 3) ? AF_INET6 : AF_INET, (one_in(c, 2) ? SOCK_STREAM : SOCK_DGRAM) | (i ? SOCK_NONBLOCK : 0), 0);
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(4000 + below(c, 4)), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        if (one_in(c, 2))
            bind(fd, (void *)&to, sizeof to), listen(fd, 4);
        else
            connect(fd, (void *)&to, sizeof to);
    }
    socket(AF_UNIX, SOCK_STREAM, 0);
    socket(AF_NETLINK, SOCK_RAW, 0);
    epoll_create1(0);
    eventfd(below(c, 4), EFD_NONBLOCK);
    timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    inotify_init1(IN_NONBLOCK);
    open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK);
    open("/proc/self/mem", O_RDWR);
}

static void play(uint64_t seed)
{
    struct chance chances[WORKERS + 1];
    for (int i = 0; i <= WORKERS; i++)
        chances[i].state = seed * 31 + i * 0x1234567;
    struct chance *c = &chances[WORKERS];
    setpgid(0, 0);
    if (one_in(c, 3)) {
        chmod(WORK, 0777);
        setgroups(0, NULL);
        setgid(1000), setuid(1000);
    }
    arena = mmap(NULL, ARENA_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(arena, 1, ARENA_PAGES / 2 * PAGE);
    mkdir("d", 0755), symlink("a", "link"), symlink("loop", "loop"), mkfifo("fifo", 0600);
    open_things(c);
    calm();
    // A call that waits is ended by a signal now and then.
    pthread_t threads[WORKERS];
    working = WORKERS;
    for (int i = 0; i < WORKERS; i++)
        if (pthread_create(&threads[i], NULL, worker, &chances[i]))
            __atomic_fetch_sub(&working, 1, __ATOMIC_SEQ_CST);
    for (int i = 0; working > 0; i++) {
        for (int n = 0; n < 4; n++)
            mangle(c);
        struct timespec moment = {.tv_nsec = 500000};
        nanosleep(&moment, NULL);
        if (i % 16 == 0)
            for (int w = 0; w < WORKERS; w++)
                pthread_kill(threads[w], SIGUSR1);
    }
    _exit(0);
}

// As much of one thing as there is: processes, files of many kinds, memory, signals.
static void flood(uint64_t seed)
{
    struct chance chance = {seed}, *c = &chance;
    setpgid(0, 0);
    int kind = below(c, 6);
    if (kind == 0) {
        while (fork() >= 0)
            if (one_in(c, 400))
                break;
        pause();
    }
    for (int i = 0; i < 3; i++)
        if (fork() == 0)
            break;
    struct rlimit most = {65536, 65536};
    if (setrlimit(RLIMIT_NOFILE, &most)) {
        getrlimit(RLIMIT_NOFILE, &most);
        most.rlim_cur = most.rlim_max;
        setrlimit(RLIMIT_NOFILE, &most);
    }
    static char block[65536];
    if (kind == 1)
        for (int i = 0; i < 200; i++) {
            char *memory = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (memory != MAP_FAILED)
                memset(memory, 1, 1 << 20);
        }
    if (kind == 2) {
        char name[32];
        for (int i = 0; i < 20000; i++) {
            snprintf(name, sizeof name, "/dev/shm/%d.%d", getpid(), i);
            int fd = open(name, O_WRONLY | O_CREAT, 0600);
            if (fd < 0 || write(fd, block, sizeof block) < 0)
                break;
            close(fd);
        }
    }
    int failures = 0;
    for (int i = 0; kind >= 3 && failures < 8; i++) {
        int two[2] = {-1, -1}, failed = 0;
        switch (kind == 3 ? 0 : kind == 4 ? 1 : below(c, 6)) {
        case 0:
            failed = pipe2(two, O_NONBLOCK);
            while (!failed && write(two[1], block, sizeof block) > 0)
                ;
            break;
        case 1:
            failed = socketpair(AF_UNIX, (one_in(c, 2) ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK, 0, two);
            while (!failed && write(two[1], block, 1000) > 0)
                ;
            break;
        case 2: failed = socket(AF_INET, SOCK_STREAM, 0) < 0; break;
        case 3: failed = epoll_create1(0) < 0; break;
        case 4: failed = memfd_create("m", 0) < 0; break;
        default: failed = open("/dev/ptmx", O_RDWR | O_NOCTTY) < 0;
        }
        failures += failed != 0;
    }
    pause();
}

static int forget(const char *name, const struct stat *s, int flag, struct FTW *ftw)
{
    (void)s, (void)flag;
    if (ftw->level > 0)
        remove(name);
    return 0;
}

static void clean(void)
{
    while (umount2(WORK "/d", MNT_DETACH) == 0)
        ;
    nftw(WORK, forget, 16, FTW_DEPTH | FTW_PHYS);
    nftw("/dev/shm", forget, 16, FTW_DEPTH | FTW_PHYS);
    union {
        struct shmid_ds shm;
        struct msqid_ds msg;
        struct semid_ds sem;
    } any;
    for (int i = 0; i < 256; i++) {
        int id = shmctl(i, SHM_STAT, &any.shm);
        if (id >= 0)
            shmctl(id, IPC_RMID, NULL);
        id = msgctl(i, MSG_STAT, &any.msg);
        if (id >= 0)
            msgctl(id, IPC_RMID, NULL);
        id = semctl(i, 0, SEM_STAT, &any.sem);
        if (id >= 0)
            semctl(id, 0, IPC_RMID);
    }
}

static void end_round(pid_t child)
{
    uint64_t begin = now_ns();
    int status;
    while (now_ns() - begin < ROUND_NS && waitpid(child, &status, WNOHANG) == 0) {
        struct timespec moment = {.tv_nsec = 5000000};
        nanosleep(&moment, NULL);
    }
    begin = now_ns();
    for (;;) {
        // Again and again: those that fork go on until they are ended.
        kill(-1, SIGKILL);
        pid_t gone = waitpid(-1, &status, WNOHANG);
        if (gone < 0 && errno == ECHILD)
            return;
        if (gone == 0) {
            struct timespec moment = {.tv_nsec = 1000000};
            nanosleep(&moment, NULL);
        }
        if (now_ns() - begin > END_NS) {
            puts("HUNG: a process does not end by SIGKILL");
            exit(3);
        }
    }
}

static void broken(const char *what)
{
    printf("BROKEN: %s: %s\n", what, strerror(errno));
    exit(4);
}

static void still_a_kernel(void)
{
    int two[2], status;
    char text[8] = "";
    if (pipe(two))
        broken("pipe");
    pid_t child = fork();
    if (child < 0)
        broken("fork");
    if (child == 0)
        _exit(write(two[1], "child", 6) == 6 ? 5 : 6);
    if (read(two[0], text, 8) != 6 || strcmp(text, "child"))
        broken("what a child wrote");
    if (waitpid(child, &status, 0) != child || status != 5 << 8)
        broken("how a child ended");
    close(two[0]), close(two[1]);
    // A tenth of the memory, as it was given: zeros.
    size_t bytes = 12 << 20;
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        broken("mmap");
    for (size_t i = 0; i < bytes; i += PAGE) {
        if (memory[i])
            broken("fresh memory is not zero");
        memory[i] = 1;
    }
    munmap(memory, bytes);
    int fd = open(WORK "/sane", O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, "sane", 4) != 4 || pread(fd, text, 4, 0) != 4 || memcmp(text, "sane", 4))
        broken("a file");
    close(fd);
}

int main(int argc, char **argv)
{
    if (argc != 3 && argc != 5) {
        fputs("usage: calls SEED SECONDS | calls SEED rounds FIRST COUNT\n", stderr);
        return 2;
    }
    uint64_t seed = strtoull(argv[1], NULL, 0), first = 0, count = UINT64_MAX, seconds = 1 << 30;
    if (argc == 5)
        first = strtoull(argv[3], NULL, 0), count = strtoull(argv[4], NULL, 0);
    else
        seconds = strtoull(argv[2], NULL, 0);
    uint64_t begin = now_ns(), round;
    if (count == 0)
        return 0;
    mkdir(WORK, 0777);
    if (chdir(WORK))
        broken(WORK);
    for (round = first; round - first < count && now_ns() - begin < seconds * 1000000000ull; round++) {
        printf("round %lu\n", round);
        fflush(stdout);
        struct chance c = {seed + round * 0x51ed27};
        uint64_t own = any(&c);
        pid_t child = fork();
        if (child == 0) {
            if (round % 8 == 7)
                flood(own);
            play(own);
        }
        end_round(child);
        clean();
        still_a_kernel();
    }
    printf("rounds done: %lu\n", round - first);
    return 0;
}
