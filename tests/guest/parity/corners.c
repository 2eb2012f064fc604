// What few programs do, and rely on when they do: robust locks, siblings, epolls that are short of
// room, sockets and mappings of the wrong kind.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timex.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static void show(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result < 0 ? -1 : result, result < 0 ? strerrorname_np(errno) : "");
    fflush(stdout);
}

static pthread_mutex_t *lock;

static void *holds(void *argument)
{
    pthread_mutex_lock(lock);
    return argument;
}

// Whoever ends with a lock leaves it to the next one, who is told.
static void robust(void)
{
    lock = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(lock, &kind);
    pthread_t thread;
    pthread_create(&thread, NULL, holds, NULL);
    pthread_join(thread, NULL);
    printf("after a thread: %s\n", strerrorname_np(pthread_mutex_lock(lock)));
    printf("made consistent: %d\n", pthread_mutex_consistent(lock));
    // One waits while the other is killed.
    int ready[2];
    pipe(ready);
    pthread_mutex_unlock(lock);
    pid_t child = fork();
    if (child == 0) {
        pthread_mutex_lock(lock);
        write(ready[1], "x", 1);
        pause();
    }
    char byte;
    read(ready[0], &byte, 1);
    pid_t killer = fork();
    if (killer == 0) {
        usleep(100000);
        kill(child, SIGKILL);
        _exit(0);
    }
    printf("after a process: %s\n", strerrorname_np(pthread_mutex_lock(lock)));
    while (wait(NULL) > 0)
        ;
    pthread_mutex_consistent(lock);
    pthread_mutex_unlock(lock);
    printf("and again: %d\n", pthread_mutex_lock(lock));
}

static void siblings(void)
{
    int told[2];
    pipe(told);
    pid_t child = fork();
    if (child == 0) {
        pid_t sibling = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
        if (sibling == 0) {
            char same = getppid() != 0 ? 'y' : 'n';
            write(told[1], &same, 1);
            _exit(4);
        }
        // It is not our child.
        int result = waitpid(sibling, NULL, 0);
        _exit(result < 0 && errno == ECHILD ? 3 : 9);
    }
    int sum = 0, status;
    while (wait(&status) > 0)
        sum += WEXITSTATUS(status);
    show("children and siblings", sum);
}

// Who may be put where, and when.
static void groups(void)
{
    pid_t child = fork();
    int begin[2], status;
    if (child == 0) {
        pause();
        _exit(0);
    }
    show("a group for a child", setpgid(child, child));
    // In the child's group is another one, which then has its number.
    pipe(begin);
    pid_t other = fork();
    if (other == 0) {
        setpgid(0, child);
        show("a session of its own", setsid() == getpid() ? 0 : -1);
        _exit(0);
    }
    waitpid(other, &status, 0);
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    child = fork();
    if (child == 0) {
        // It leaves a group of its number, in which another one stays.
        setpgid(0, 0);
        pid_t members[2];
        for (int i = 0; i < 2; i++) {
            members[i] = fork();
            if (members[i] == 0) {
                close(begin[1]);
                char byte;
                read(begin[0], &byte, 1);
                _exit(0);
            }
        }
        setpgid(members[1], members[1]);
        show("another group", setpgid(0, members[1]));
        show("no leader, and no session", setsid() > 0 ? 0 : -1);
        close(begin[1]);
        while (wait(NULL) > 0)
            ;
        _exit(0);
    }
    close(begin[1]);
    waitpid(child, &status, 0);
    int ready[2];
    pipe(ready);
    fcntl(ready[1], F_SETFD, FD_CLOEXEC);
    child = fork();
    if (child == 0) {
        close(ready[0]);
        execl("/proc/self/exe", "corners", "pause", NULL);
        _exit(9);
    }
    close(ready[1]);
    char byte;
    // The end of the file: it runs another program.
    read(ready[0], &byte, 1);
    show("a child that runs another program", setpgid(child, child));
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
}

static void fair_epoll(void)
{
    enum { FILES = 12, ROOM = 5, ROUNDS = 12 };
    int epoll = epoll_create1(0), seen[FILES] = {0}, fds[2];
    for (int i = 0; i < FILES; i++) {
        pipe(fds);
        write(fds[1], "x", 1);
        struct epoll_event event = {.events = EPOLLIN, .data.u32 = i};
        epoll_ctl(epoll, EPOLL_CTL_ADD, fds[0], &event);
    }
    for (int i = 0; i < ROUNDS; i++) {
        struct epoll_event events[ROOM];
        int count = epoll_wait(epoll, events, ROOM, 0);
        for (int k = 0; k < count; k++)
            seen[events[k].data.u32]++;
    }
    for (int i = 0; i < FILES; i++)
        printf("%d ", seen[i]);
    printf("reports of each\n");
}

static void wrong_kinds(void)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX, .sun_path = "/tmp/corners.sock"};
    unlink(at.sun_path);
    int stream = socket(AF_UNIX, SOCK_STREAM, 0), datagrams = socket(AF_UNIX, SOCK_DGRAM, 0);
    bind(stream, (struct sockaddr *)&at, sizeof at);
    listen(stream, 1);
    show("datagrams to a listener", connect(datagrams, (struct sockaddr *)&at, sizeof at));
    unlink(at.sun_path);
    int tcp = socket(AF_INET, SOCK_STREAM, 0), value;
    socklen_t size = sizeof value;
    show("level of nobody", getsockopt(tcp, 500, 1, &value, &size));
    show("level of UDP", getsockopt(tcp, IPPROTO_UDP, 1, &value, &size));
    show("option of nobody", getsockopt(tcp, IPPROTO_TCP, -1, &value, &size));
    show("level of a unix socket", getsockopt(stream, IPPROTO_IP, 1, &value, &size));

    int file = open("/tmp/corners", O_RDWR | O_CREAT, 0600), reads = open("/tmp/corners", O_RDONLY);
    ftruncate(file, 4096);
    void *seen = mmap(NULL, 4096, PROT_READ, MAP_SHARED, reads, 0);
    show("writing by a file open for reading", mprotect(seen, 4096, PROT_READ | PROT_WRITE));
    show("nothing of no file", (long)mmap(NULL, 0, PROT_READ, MAP_SHARED, -1, 0));
    show("unknown flags", (long)mmap(NULL, 4096, PROT_READ, MAP_SHARED_VALIDATE | 1 << 25, file, 0));
    unlink("/tmp/corners");

    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, -1};
    struct __user_cap_data_struct data[2];
    show("capabilities of -1", syscall(SYS_capget, &header, data));
    struct timex clock = {.modes = 0};
    int state = adjtimex(&clock);
    printf("the clock: %d\n", state >= 0 && clock.tick == 10000);
    void *head;
    size_t length = 0;
    show("robust list", syscall(SYS_get_robust_list, 0, &head, &length));
    printf("of %zu bytes: %d\n", length, head != NULL);
}

// Secrets that a child is not to have.
static void kept_from_children(void)
{
    enum { WIPED, HIDDEN, COPIED, PAGES };
    unsigned char *at = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(at, 7, PAGES * 4096);
    show("wiped", madvise(at + WIPED * 4096, 4096, MADV_WIPEONFORK));
    show("hidden", madvise(at + HIDDEN * 4096, 4096, MADV_DONTFORK));
    void *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    show("shared memory is not wiped", madvise(shared, 4096, MADV_WIPEONFORK));
    int status;
    if (fork() == 0) {
        printf("child: %d %d\n", at[WIPED * 4096], at[COPIED * 4096]);
        fflush(stdout);
        // Nothing is mapped there.
        _exit(at[HIDDEN * 4096]);
    }
    wait(&status);
    printf("child: signal %d\n", WTERMSIG(status));
    printf("parent: %d %d %d\n", at[WIPED * 4096], at[HIDDEN * 4096], at[COPIED * 4096]);
    madvise(at, 4096, MADV_KEEPONFORK);
    madvise(at + HIDDEN * 4096, 4096, MADV_DOFORK);
    if (fork() == 0)
        _exit(at[WIPED * 4096] + at[HIDDEN * 4096]);
    wait(&status);
    printf("again: %d\n", WEXITSTATUS(status));
}

static void reaper(void)
{
    int reaps = -1, status, told[2];
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    prctl(PR_GET_CHILD_SUBREAPER, &reaps);
    printf("reaps: %d\n", reaps);
    pipe(told);
    if (fork() == 0) {
        // Not inherited.
        prctl(PR_GET_CHILD_SUBREAPER, &reaps);
        if (fork() == 0) {
            char byte;
            close(told[1]);
            read(told[0], &byte, 1);
            _exit(6);
        }
        _exit(reaps);
    }
    wait(&status);
    printf("child: %d\n", WEXITSTATUS(status));
    close(told[1]);
    int found = wait(&status) > 0;
    printf("its orphan: %d %d\n", found, WEXITSTATUS(status));
    prctl(PR_SET_CHILD_SUBREAPER, 0);
}

static void names(const char *dir)
{
    char a[64], b[64], text[8] = "";
    snprintf(a, sizeof a, "%s/corners-a", dir);
    snprintf(b, sizeof b, "%s/corners-b", dir);
    mkdir(a, 0755);
    int file = open(b, O_RDWR | O_CREAT | O_TRUNC, 0600);
    write(file, "text", 4);
    close(file);
    show("exchange", renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE));
    file = open(a, O_RDONLY);
    read(file, text, 4);
    close(file);
    printf("file: %s\n", text);
    show("directory", rmdir(b));
    show("with nothing", renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE));
    show("and not replacing", renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE | RENAME_NOREPLACE));
    unlink(a);
    show("no name", readlink("", text, sizeof text));
    file = open(dir, O_PATH);
    show("mapping a place", (long)mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, file, 0));
    close(file);
}

// Files in memory that can be kept from changes for good, and holes in them.
static void sealed(void)
{
    char text[16] = "";
    int plain = memfd_create("plain", 0), file = memfd_create("sealed", MFD_ALLOW_SEALING | MFD_CLOEXEC);
    show("seals of a plain one", fcntl(plain, F_GET_SEALS));
    show("which gets no others", fcntl(plain, F_ADD_SEALS, F_SEAL_WRITE));
    show("unknown flags", memfd_create("x", 0x40));
    show("seals", fcntl(file, F_GET_SEALS));
    show("no such seal", fcntl(file, F_ADD_SEALS, 0x4000));
    show("writing", write(file, "0123456789", 10));
    show("no growing", fcntl(file, F_ADD_SEALS, F_SEAL_GROW));
    show("growing", ftruncate(file, 11));
    show("writing behind the end", pwrite(file, "x", 1, 10));
    show("writing within", pwrite(file, "x", 1, 9));
    show("shrinking", ftruncate(file, 9));
    show("no shrinking", fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK));
    show("shrinking again", ftruncate(file, 5));
    char *mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    show("no writing while it is mapped", fcntl(file, F_ADD_SEALS, F_SEAL_WRITE));
    munmap(mapped, 4096);
    show("no writing", fcntl(file, F_ADD_SEALS, F_SEAL_WRITE));
    show("writing", pwrite(file, "x", 1, 0));
    show("a hole", fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4));
    mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    show("mapped for writing", mapped == MAP_FAILED ? -1 : 0);
    mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    show("a copy", mapped == MAP_FAILED ? -1 : (mapped[0] = 'c'));
    mapped = mmap(NULL, 4096, PROT_READ, MAP_SHARED, file, 0);
    show("mapped for reading", mapped == MAP_FAILED ? -1 : mapped[0]);
    show("made writable", mprotect(mapped, 4096, PROT_READ | PROT_WRITE));
    show("no more seals", fcntl(file, F_ADD_SEALS, F_SEAL_SEAL));
    show("one more", fcntl(file, F_ADD_SEALS, F_SEAL_GROW));
    show("seals", fcntl(file, F_GET_SEALS));
    show("of a pipe", fcntl(pipe((int[2]){0}) ? 0 : 1, F_GET_SEALS));
    ftruncate(plain, 3 * 4096);
    for (int i = 0; i < 3; i++)
        pwrite(plain, "page", 4, i * 4096);
    show("a hole in the middle", fallocate(plain, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 2, 4096 + 2));
    for (int i = 0; i < 3; i++) {
        memset(text, 0, sizeof text);
        show("read", pread(plain, text, 4, i * 4096));
        printf("%s, %d\n", text, text[3]);
    }
    struct stat status;
    fstat(plain, &status);
    show("size", status.st_size);
}

// Pages that are brought before they are touched.
static void populated(void)
{
    char *all = mmap(NULL, 64 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    unsigned char there[64];
    mincore(all, 64 * 4096, there);
    int count = 0;
    for (int i = 0; i < 64; i++)
        count += there[i] & 1;
    printf("there: %d, %d\n", count, all[63 * 4096]);
    show("madvise", madvise(all, 64 * 4096, MADV_POPULATE_WRITE));
    munmap(all + 4096, 4096);
    show("with a hole", madvise(all, 64 * 4096, MADV_POPULATE_READ));
    munmap(all, 64 * 4096);
}

int main(int count, char **words)
{
    (void)words;
    alarm(90);
    if (count > 1) {
        pause();
        return 0;
    }
    robust();
    siblings();
    groups();
    fair_epoll();
    wrong_kinds();
    kept_from_children();
    reaper();
    sealed();
    populated();
    names("/tmp");
    names("/dev/shm");
    return 0;
}
