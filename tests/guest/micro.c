// Times of a few system calls: a line NAME NANOSECONDS for each round.
//   micro              all of them
//   micro http PORT PATH COUNT   one connection and request after the other
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 5, PAGE = 4096, FILE_PAGES = 16 };

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static void report(const char *name, double begin, int count)
{
    printf("%s %.1f\n", name, (now() - begin) / count);
    fflush(stdout);
}

static void getpids(void)
{
    enum { COUNT = 50000 };
    double begin = now();
    for (int i = 0; i < COUNT; i++)
        syscall(SYS_getpid);
    report("getpid", begin, COUNT);
}

static void preads(int fd)
{
    enum { COUNT = 10000 };
    static char page[PAGE];
    double begin = now();
    for (int i = 0; i < COUNT; i++)
        if (pread(fd, page, PAGE, (i * 7 % FILE_PAGES) * PAGE) != PAGE)
            fail("pread");
    report("pread", begin, COUNT);
}

static void forks(char *self)
{
    enum { COUNT = 30 };
    double begin = now();
    for (int i = 0; i < COUNT; i++) {
        pid_t child = fork();
        if (child == 0) {
            execl(self, self, "exit", NULL);
            _exit(1);
        }
        int status;
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
            fail("fork, exec or wait");
    }
    report("fork+exec+wait", begin, COUNT);
}

static void pipes(void)
{
    enum { COUNT = 1000 };
    int there[2], back[2];
    char byte = 0;
    if (pipe(there) || pipe(back))
        fail("pipe");
    pid_t child = fork();
    if (child == 0) {
        for (int i = 0; i < COUNT; i++)
            if (read(there[0], &byte, 1) != 1 || write(back[1], &byte, 1) != 1)
                _exit(1);
        _exit(0);
    }
    double begin = now();
    for (int i = 0; i < COUNT; i++)
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            fail("pipe");
    report("pipe", begin, COUNT);
    waitpid(child, NULL, 0);
    close(there[0]), close(there[1]), close(back[0]), close(back[1]);
}

static void faults(void)
{
    enum { COUNT = 512 };
    char *memory = mmap(NULL, COUNT * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    double begin = now();
    for (int i = 0; i < COUNT; i++)
        memory[i * PAGE] = 1;
    report("fault", begin, COUNT);
    munmap(memory, COUNT * PAGE);
}

static void clocks(void)
{
    enum { COUNT = 20000 };
    double begin = now();
    for (int i = 0; i < COUNT; i++)
        now();
    report("clock_gettime", begin, COUNT);
}

static int http(int port, const char *path, int count)
{
    char request[512], answer[8192];
    int length = snprintf(request, sizeof request, "GET %s HTTP/1.0\r\n\r\n", path);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int round = 0; round < ROUNDS; round++) {
        double begin = now();
        for (int i = 0; i < count; i++) {
            int fd = socket(AF_INET, SOCK_STREAM, 0), got = 0, n;
            if (fd < 0 || connect(fd, (void *)&to, sizeof to) || write(fd, request, length) != length)
                fail("http");
            while ((n = read(fd, answer + got, sizeof answer - got)) > 0)
                got += n;
            close(fd);
            if (got < 12 || memcmp(answer + 9, "200", 3))
                fail("no answer");
        }
        report("http", begin, count);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "exit"))
        return 0;
    if (argc == 5 && !strcmp(argv[1], "http"))
        return http(atoi(argv[2]), argv[3], atoi(argv[4]));
    static char page[PAGE];
    int fd = open("/micro.data", O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0)
        fail("/micro.data");
    for (int i = 0; i < FILE_PAGES; i++)
        if (write(fd, page, PAGE) != PAGE)
            fail("write");
    for (int i = 0; i < ROUNDS; i++) {
        getpids();
        preads(fd);
        forks(argv[0]);
        pipes();
        faults();
        clocks();
    }
    unlink("/micro.data");
    puts("done");
    return 0;
}
