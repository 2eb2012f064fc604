// Memory: mappings, protections, copies on write, files behind it, what it refuses.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096 };
// Where no kernel puts anything by itself.
#define NOWHERE ((char *)0x10000000000)

static void show(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result < 0 ? -1 : result, result < 0 ? strerrorname_np(errno) : "");
}

static void show_map(const char *what, void *result)
{
    show(what, result == MAP_FAILED ? -1 : 0);
}

static sigjmp_buf back;
static void jumps(int signal) { siglongjmp(back, signal); }

static int touch(volatile char *at, int write)
{
    int signal = sigsetjmp(back, 1);
    if (signal)
        return signal;
    if (write)
        *at = 1;
    else
        (void)*at;
    return 0;
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS, both = PROT_READ | PROT_WRITE;
    signal(SIGSEGV, jumps), signal(SIGBUS, jumps);
    char *a = mmap(NULL, 8 * PAGE, both, anonymous, -1, 0);
    printf("zero: %d\n", a[5 * PAGE + 7]);
    show("protect", mprotect(a + PAGE, PAGE, PROT_READ));
    printf("read %d write %d\n", touch(a + PAGE, 0), touch(a + PAGE, 1));
    show("protect", mprotect(a + PAGE, PAGE, PROT_NONE));
    printf("read %d neighbour %d\n", touch(a + PAGE, 0), touch(a + 2 * PAGE, 1));
    show("unmap", munmap(a + 3 * PAGE, PAGE));
    printf("gone %d\n", touch(a + 3 * PAGE, 0));
    show("protect across a hole", mprotect(a, 8 * PAGE, PROT_READ));
    printf("before the hole %d, after %d\n", touch(a, 1), touch(a + 4 * PAGE, 1));
    show("unmap nothing", munmap(NOWHERE, PAGE));
    show("unmap crooked", munmap(a + 1, PAGE));
    show("unmap no bytes", munmap(a, 0));
    show_map("no bytes", mmap(NULL, 0, both, anonymous, -1, 0));
    show_map("too many bytes", mmap(NULL, (size_t)1 << 60, both, anonymous, -1, 0));
    show_map("all bytes", mmap(NULL, SIZE_MAX, both, anonymous, -1, 0));
    show_map("crooked", mmap((void *)0x10001, PAGE, both, anonymous | MAP_FIXED, -1, 0));
    show_map("no kind", mmap(NULL, PAGE, both, MAP_ANONYMOUS, -1, 0));
    show_map("no file", mmap(NULL, PAGE, both, MAP_PRIVATE, 77, 0));
    show_map("occupied", mmap(a, PAGE, both, anonymous | MAP_FIXED_NOREPLACE, -1, 0));
    show_map("kernel", mmap((void *)0xffff800000000000, PAGE, both, anonymous | MAP_FIXED, -1, 0));

    // Children have copies, or the same.
    char *own = mmap(NULL, PAGE, both, anonymous, -1, 0);
    char *common = mmap(NULL, PAGE, both, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    strcpy(own, "before"), strcpy(common, "before");
    fflush(stdout);
    if (fork() == 0) {
        strcpy(own, "child"), strcpy(common, "child");
        _exit(0);
    }
    wait(NULL);
    printf("own %s common %s\n", own, common);

    // Files.
    int fd = open("/tmp/memory", O_RDWR | O_CREAT | O_TRUNC, 0600);
    char block[PAGE];
    memset(block, 'f', PAGE);
    write(fd, block, PAGE), write(fd, block, 100);
    char *copy = mmap(NULL, 3 * PAGE, both, MAP_PRIVATE, fd, 0);
    char *shared = mmap(NULL, 2 * PAGE, both, MAP_SHARED, fd, 0);
    copy[0] = 'c', shared[1] = 's';
    pread(fd, block, 2, 0);
    printf("file %.2s copy %.2s rest %d past the end %d\n", block, copy, copy[PAGE + 200], touch(copy + 2 * PAGE, 0));
    pwrite(fd, "w", 1, 2);
    printf("written: %c\n", shared[2]);
    ftruncate(fd, 10);
    printf("cut: %d %d\n", touch(shared + PAGE, 0), shared[20]);
    int reader = open("/tmp/memory", O_RDONLY), writer = open("/tmp/memory", O_WRONLY);
    show_map("shared and writable of a reader", mmap(NULL, PAGE, both, MAP_SHARED, reader, 0));
    show_map("private and writable of a reader", mmap(NULL, PAGE, both, MAP_PRIVATE, reader, 0));
    show_map("of a writer", mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, writer, 0));
    show_map("crooked offset", mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, reader, 100));
    show("sync", msync(shared, PAGE, MS_SYNC));
    show("sync nothing", msync(NOWHERE, PAGE, MS_SYNC));
    show("sync two ways", msync(shared, PAGE, MS_SYNC | MS_ASYNC));
    unlink("/tmp/memory");

    // Growing, moving, giving back.
    char *grown = mmap(NULL, 2 * PAGE, both, anonymous, -1, 0);
    strcpy(grown + PAGE, "kept");
    grown = mremap(grown, 2 * PAGE, 300 * PAGE, MREMAP_MAYMOVE);
    printf("grown: %s %d\n", grown + PAGE, grown[299 * PAGE]);
    char *less = mremap(grown, 300 * PAGE, PAGE, 0);
    printf("less: %d, cut off: %d\n", less == grown, touch(grown + PAGE, 0));
    show_map("of nothing", mremap(NOWHERE, PAGE, 2 * PAGE, MREMAP_MAYMOVE));
    strcpy(own, "text");
    show("give back", madvise(own, PAGE, MADV_DONTNEED));
    printf("given back: %d\n", own[0]);
    show("advice of nothing", madvise(NOWHERE, PAGE, MADV_DONTNEED));
    show("no advice", madvise(own, PAGE, 12345));
    char *end = sbrk(0);
    show("more heap", (char *)sbrk(10 * PAGE) == end);
    end[9 * PAGE] = 1;
    show("less heap", sbrk(-10 * PAGE) == end + 10 * PAGE);
    printf("heap is gone: %d\n", touch(end + 9 * PAGE, 0));

    // The kernel's copies stop where memory does.
    int fds[2];
    pipe(fds);
    write(fds[1], block, 100);
    char *edge = mmap(NULL, 2 * PAGE, both, anonymous, -1, 0);
    munmap(edge + PAGE, PAGE);
    show("read into nothing", read(fds[0], (void *)8, 10));
    show("write of nothing", write(fds[1], edge + PAGE, 10));
    show("write over the edge", write(fds[1], edge + PAGE - 5, 10));
    show("no executable data", (mprotect(edge, PAGE, PROT_READ), touch(edge, 1)));
    return 0;
}
