// What is bad: bombs, floods, broken programs. Each gets the error that Linux gives.
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static void show(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result < 0 ? -1 : result, result < 0 ? strerrorname_np(errno) : "");
    fflush(stdout);
}

static unsigned char program[16384];

// How a program ends whose bytes at an offset are others.
static void broken(const char *what, size_t at, const void *bytes, size_t count, size_t length)
{
    static unsigned char copy[sizeof program];
    memcpy(copy, program, sizeof copy);
    memcpy(copy + at, bytes, count);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        int fd = open("/tmp/broken", O_WRONLY | O_CREAT | O_TRUNC, 0755);
        if (fd < 0 || write(fd, copy, length) != (ssize_t)length)
            _exit(100);
        close(fd);
        execl("/tmp/broken", "/tmp/broken", NULL);
        _exit(errno);
    }
    int status;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status))
        printf("%s: signal %d\n", what, WTERMSIG(status));
    else
        printf("%s: exit %d\n", what, WEXITSTATUS(status));
}

// exit(0) at 0x400000.
static void make_program(void)
{
    Elf64_Ehdr *header = (void *)program;
    Elf64_Phdr *segment = (void *)(program + sizeof *header);
    memcpy(header->e_ident, "\177ELF\2\1\1", 7);
    header->e_type = ET_EXEC, header->e_machine = EM_X86_64, header->e_version = 1;
    header->e_entry = 0x400100, header->e_phoff = sizeof *header;
    header->e_ehsize = sizeof *header, header->e_phentsize = sizeof *segment, header->e_phnum = 1;
    *segment = (Elf64_Phdr){PT_LOAD, PF_R | PF_X, 0, 0x400000, 0x400000, 0x1000, 0x1000, 0x1000};
    memcpy(program + 0x100, "\xb8\x3c\0\0\0\x31\xff\x0f\x05", 9);
}

static void programs(void)
{
    const size_t entry = offsetof(Elf64_Ehdr, e_entry), segment = sizeof(Elf64_Ehdr);
    unsigned char byte;
    unsigned short two;
    unsigned long word;
    make_program();
    broken("whole", 0, "\177", 1, 4096);
    broken("empty", 0, "", 0, 0);
    broken("cut in the header", 0, "", 0, 40);
    broken("cut in the table", 0, "", 0, 80);
    broken("cut in the segment", 0, "", 0, 0x108);
    broken("other magic", 0, "\177ELX", 4, 4096);
    byte = 1, broken("32 bits", 4, &byte, 1, 4096);
    two = 40, broken("other machine", offsetof(Elf64_Ehdr, e_machine), &two, 2, 4096);
    two = ET_REL, broken("object file", offsetof(Elf64_Ehdr, e_type), &two, 2, 4096);
    two = 0, broken("no segments", offsetof(Elf64_Ehdr, e_phnum), &two, 2, 4096);
    two = 17, broken("odd size of entries", offsetof(Elf64_Ehdr, e_phentsize), &two, 2, 4096);
    word = -8ul, broken("table nowhere", offsetof(Elf64_Ehdr, e_phoff), &word, 8, 4096);
    word = 0, broken("entry 0", entry, &word, 8, 4096);
    word = 0x500000, broken("entry outside", entry, &word, 8, 4096);
    word = 0xffffffff80000000, broken("entry in the kernel", entry, &word, 8, 4096);
    word = 0x800000000000, broken("entry of no address", entry, &word, 8, 4096);
    word = 0x123456789abcdef0, broken("entry of no address", entry, &word, 8, 4096);
    word = 0x7ffffffff000, broken("entry at the end", entry, &word, 8, 4096);
    word = 0xffffffff80000000, broken("segment in the kernel", segment + offsetof(Elf64_Phdr, p_vaddr), &word, 8, 4096);
    word = -1ul & ~0xffful, broken("segment of all", segment + offsetof(Elf64_Phdr, p_memsz), &word, 8, 4096);
    word = 0x10, broken("segment with less memory", segment + offsetof(Elf64_Phdr, p_memsz), &word, 8, 4096);
    broken("other first instruction", 0x100, "\x06", 1, 4096);
    strcpy((char *)program, "#!/none\n"), broken("script without interpreter", 0, "#", 1, 8);
    strcpy((char *)program, "#!/tmp/broken\n"), broken("script of itself", 0, "#", 1, 14);
    strcpy((char *)program, "#!\n"), broken("script of nothing", 0, "#", 1, 3);
    unlink("/tmp/broken");
}

static void as_user(void)
{
    setgroups(0, NULL);
    if (setgid(54321) || setuid(54321))
        _exit(100);
}

static void bombs(void)
{
    // As many processes as the limit says.
    fflush(stdout);
    if (fork() == 0) {
        struct rlimit limit = {20, 20};
        setrlimit(RLIMIT_NPROC, &limit);
        as_user();
        setpgid(0, 0);
        int made = 0;
        pid_t child;
        while ((child = fork()) > 0)
            made++;
        if (child == 0) {
            pause();
            _exit(0);
        }
        printf("processes: %d\n", made);
        show("one more", child);
        signal(SIGTERM, SIG_IGN);
        killpg(0, SIGTERM);
        while (wait(NULL) > 0)
            ;
        _exit(0);
    }
    wait(NULL);
    // As many files.
    if (fork() == 0) {
        struct rlimit limit = {64, 64};
        setrlimit(RLIMIT_NOFILE, &limit);
        int fd, last = -1;
        while ((fd = dup(0)) >= 0)
            last = fd;
        printf("last file: %d\n", last);
        show("one more", fd);
        int two[2];
        show("pipe", pipe(two));
        show("socket", open("/", O_RDONLY));
        show("beyond", dup2(0, 64));
        _exit(0);
    }
    wait(NULL);
    // As large a file.
    if (fork() == 0) {
        struct rlimit limit = {1000, 1000};
        static char block[3000];
        setrlimit(RLIMIT_FSIZE, &limit);
        signal(SIGXFSZ, SIG_IGN);
        int fd = open("/tmp/large", O_RDWR | O_CREAT | O_TRUNC, 0600);
        show("part", write(fd, block, 3000));
        show("no more", write(fd, block, 1));
        show("truncate", ftruncate(fd, 2000));
        unlink("/tmp/large");
        _exit(0);
    }
    wait(NULL);
    // A stack without end.
    pid_t child = fork();
    if (child == 0) {
        volatile char *down = (char *)__builtin_frame_address(0);
        for (;; down -= 512)
            *down = 1;
    }
    int status;
    waitpid(child, &status, 0);
    printf("stack: signal %d\n", WTERMSIG(status));
    // Arguments without end.
    char *much = malloc(200000);
    memset(much, 'x', 199999), much[199999] = 0;
    char *arguments[] = {"x", much, NULL};
    show("long argument", execv("/proc/self/exe", arguments));
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    programs();
    bombs();
    return 0;
}
