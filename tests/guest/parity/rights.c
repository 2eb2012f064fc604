// Programs that run as somebody else, by a descriptor, at chosen addresses; what children used.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/times.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static char self[4096];

static void show(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result < 0 ? -1 : result, result < 0 ? strerrorname_np(errno) : "");
    fflush(stdout);
}

// Runs `what` in a child, as user 1000 if wanted; gives how it ended.
static int in_child(int user, void (*what)(void))
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (user && (setgid(1000) || setuid(1000)))
            _exit(99);
        what();
        _exit(98);
    }
    int status = -1;
    waitpid(child, &status, 0);
    return status;
}

static void who(void)
{
    char *arguments[] = {(char *)"x", (char *)"who", NULL};
    execve("/tmp/parity-rights", arguments, environ);
}

static void who_denied(void)
{
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    who();
}

static void by_descriptor(void)
{
    char *arguments[] = {(char *)"x", (char *)"plain", NULL};
    syscall(SYS_execveat, open(self, O_PATH), "", arguments, environ, AT_EMPTY_PATH);
}

static void by_directory(void)
{
    char *arguments[] = {(char *)"x", (char *)"plain", NULL};
    syscall(SYS_execveat, open("/tmp", O_RDONLY), "parity-rights", arguments, environ, 0);
}

static void without_a_name(void)
{
    char *arguments[] = {(char *)"x", (char *)"plain", NULL};
    int to = syscall(SYS_memfd_create, "program", 0), from = open(self, O_RDONLY);
    char buffer[65536];
    ssize_t n;
    while ((n = read(from, buffer, sizeof buffer)) > 0)
        if (write(to, buffer, n) != n)
            _exit(97);
    fexecve(to, arguments, environ);
}

// Where things are, as numbers of pages from the lowest of several runs.
static void where(void)
{
    char *arguments[] = {(char *)"x", (char *)"where", NULL};
    execve(self, arguments, environ);
}

static int different(unsigned long persona, int part)
{
    unsigned long seen[6][3];
    for (int i = 0; i < 6; i++) {
        int ends[2];
        if (pipe(ends))
            return -1;
        pid_t child = fork();
        if (child == 0) {
            personality(persona);
            dup2(ends[1], 1);
            where();
            _exit(98);
        }
        close(ends[1]);
        if (read(ends[0], seen[i], sizeof seen[i]) != sizeof seen[i])
            return -1;
        close(ends[0]);
        waitpid(child, NULL, 0);
    }
    int others = 0;
    for (int i = 1; i < 6; i++)
        others += seen[i][part] != seen[0][part];
    return others > 0;
}

static void burn(void)
{
    struct timespec t;
    do
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    while (t.tv_sec == 0 && t.tv_nsec < 60000000);
    _exit(0);
}

static void copied(int mode)
{
    unlink("/tmp/parity-rights");
    int from = open(self, O_RDONLY), to = open("/tmp/parity-rights", O_WRONLY | O_CREAT | O_EXCL, 0755);
    char buffer[65536];
    ssize_t n;
    while ((n = read(from, buffer, sizeof buffer)) > 0)
        write(to, buffer, n);
    close(from), close(to);
    chmod("/tmp/parity-rights", mode);
}

int main(int argc, char **argv)
{
    char buffer[16];
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1 && !strcmp(argv[1], "who")) {
        uid_t r, e, s;
        getresuid(&r, &e, &s);
        printf("users %d %d %d, groups %d %d, secure %lu\n", r, e, s, getgid(), getegid(), getauxval(AT_SECURE));
        return 0;
    }
    if (argc > 1 && !strcmp(argv[1], "plain"))
        return puts("by another way") < 0;
    if (argc > 1 && !strcmp(argv[1], "where")) {
        int local;
        unsigned long at[3] = {(unsigned long)&local >> 12, (unsigned long)sbrk(0) >> 12,
                               (unsigned long)mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) >> 12};
        return write(1, at, sizeof at) != sizeof at;
    }
    if (readlink("/proc/self/exe", self, sizeof self - 1) < 0)
        return 1;
    copied(0755);
    printf("plain: %d\n", in_child(1, who));
    chmod("/tmp/parity-rights", 04755);
    printf("set user: %d\n", in_child(1, who));
    printf("by root: %d\n", in_child(0, who));
    printf("no new privileges: %d\n", in_child(1, who_denied));
    chmod("/tmp/parity-rights", 06755);
    printf("both: %d\n", in_child(1, who));
    chmod("/tmp/parity-rights", 02745);
    printf("no group: %d\n", in_child(1, who));
    struct stat s;
    chmod("/tmp/parity-rights", 06755);
    chown("/tmp/parity-rights", 0, 0);
    stat("/tmp/parity-rights", &s);
    printf("after chown: %o\n", s.st_mode);
    chmod("/tmp/parity-rights", 0755);

    printf("by descriptor: %d\n", in_child(0, by_descriptor));
    printf("from a directory: %d\n", in_child(0, by_directory));
    printf("without a name: %d\n", in_child(0, without_a_name));
    char *arguments[] = {(char *)"x", NULL};
    show("flags", syscall(SYS_execveat, AT_FDCWD, self, arguments, environ, 1));
    show("nothing", syscall(SYS_execveat, AT_FDCWD, "/none", arguments, environ, 0));
    symlink(self, "/tmp/parity-rights-link");
    show("not the link", syscall(SYS_execveat, AT_FDCWD, "/tmp/parity-rights-link", arguments, environ, AT_SYMLINK_NOFOLLOW));
    unlink("/tmp/parity-rights-link"), unlink("/tmp/parity-rights");

    for (int part = 0; part < 3; part++)
        printf("part %d moves: %d, or not: %d\n", part, different(0, part), different(ADDR_NO_RANDOMIZE, part));
    show("persona", personality(ADDR_NO_RANDOMIZE));
    show("kept", personality(0xffffffff) == ADDR_NO_RANDOMIZE);

    struct rusage used = {0}, one = {0};
    struct tms before, after;
    times(&before);
    pid_t child = fork();
    if (child == 0)
        burn();
    wait4(child, NULL, 0, &one);
    getrusage(RUSAGE_CHILDREN, &used);
    times(&after);
    long ms = used.ru_utime.tv_sec * 1000 + used.ru_utime.tv_usec / 1000 + used.ru_stime.tv_sec * 1000 + used.ru_stime.tv_usec / 1000;
    printf("children: %d %d, one: %d, memory: %d\n", ms >= 50, after.tms_cutime + after.tms_cstime - before.tms_cutime - before.tms_cstime >= 4,
           one.ru_utime.tv_sec + one.ru_utime.tv_usec + one.ru_stime.tv_usec > 0, one.ru_maxrss > 0);
    getrusage(RUSAGE_SELF, &used);
    printf("own memory: %d\n", used.ru_maxrss > 0);

    int fd = open("/tmp/parity-rights-data", O_RDWR | O_CREAT | O_TRUNC, 0600);
    write(fd, "some data", 9), fsync(fd);
    show("data", lseek(fd, 3, SEEK_DATA));
    show("hole", lseek(fd, 3, SEEK_HOLE));
    show("data at the end", lseek(fd, 9, SEEK_DATA));
    show("hole past it", lseek(fd, 100, SEEK_HOLE));
    unlink("/tmp/parity-rights-data");

    // Another process' memory, and barriers.
    static char word[16] = "before";
    int ends[2];
    pipe(ends);
    child = fork();
    if (child == 0) {
        strcpy(word, "child's");
        write(ends[1], "", 1);
        pause();
    }
    read(ends[0], buffer, 1);
    struct iovec here[2] = {{buffer, 3}, {buffer + 8, 5}}, there = {word, 8}, nowhere = {(void *)8, 8};
    show("read", process_vm_readv(child, here, 2, &there, 1, 0));
    printf("%.3s %.5s\n", buffer, buffer + 8);
    strcpy(buffer, "mine"), here[0].iov_len = 5;
    show("written", process_vm_writev(child, here, 1, &there, 1, 0));
    here[0].iov_len = 8;
    show("read again", process_vm_readv(child, here, 1, &there, 1, 0));
    printf("%.4s, own: %s\n", buffer, word);
    show("nowhere", process_vm_readv(child, here, 1, &nowhere, 1, 0));
    show("flags", process_vm_readv(child, here, 1, &there, 1, 1));
    kill(child, SIGKILL), waitpid(child, NULL, 0);
    show("nobody", process_vm_readv(child, here, 1, &there, 1, 0));
    printf("barriers: %d\n", (syscall(SYS_membarrier, 0, 0, 0) & 0x19) == 0x19);
    show("all", syscall(SYS_membarrier, 1, 0, 0));
    show("not registered", syscall(SYS_membarrier, 8, 0, 0));
    show("register", syscall(SYS_membarrier, 16, 0, 0));
    show("registered", syscall(SYS_membarrier, 8, 0, 0));
    show("flags", syscall(SYS_membarrier, 0, 77, 0));
    return 0;
}
