// The vDSO: found as loaders find it, and what it says about the time is what the kernel says.
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// A function by its name and version, by DT_SYMTAB as musl does it.
static void *find(const char *name)
{
    Elf64_Ehdr *header = (void *)getauxval(AT_SYSINFO_EHDR);
    if (!header || memcmp(header->e_ident, ELFMAG, SELFMAG))
        return NULL;
    char *base = (char *)header;
    Elf64_Phdr *part = (void *)(base + header->e_phoff);
    Elf64_Dyn *dynamic = NULL;
    char *loaded = NULL;
    for (int i = 0; i < header->e_phnum; i++) {
        if (part[i].p_type == PT_LOAD && !loaded)
            loaded = base + part[i].p_offset - part[i].p_vaddr;
        if (part[i].p_type == PT_DYNAMIC)
            dynamic = (void *)(base + part[i].p_offset);
    }
    if (!dynamic || !loaded)
        return NULL;
    char *strings = NULL;
    Elf64_Sym *symbols = NULL;
    Elf32_Word *hashes = NULL;
    Elf64_Half *versions = NULL;
    Elf64_Verdef *definitions = NULL;
    for (; dynamic->d_tag; dynamic++) {
        void *at = loaded + dynamic->d_un.d_ptr;
        switch (dynamic->d_tag) {
        case DT_STRTAB: strings = at; break;
        case DT_SYMTAB: symbols = at; break;
        case DT_HASH: hashes = at; break;
        case DT_VERSYM: versions = at; break;
        case DT_VERDEF: definitions = at; break;
        }
    }
    if (!strings || !symbols || !hashes || !versions || !definitions)
        return NULL;
    for (unsigned i = 1; i < hashes[1]; i++) {
        if (strcmp(strings + symbols[i].st_name, name) || ELF64_ST_TYPE(symbols[i].st_info) != STT_FUNC)
            continue;
        Elf64_Verdef *d = definitions;
        while ((d->vd_ndx & 0x7fff) != (versions[i] & 0x7fff) && d->vd_next)
            d = (void *)((char *)d + d->vd_next);
        Elf64_Verdaux *aux = (void *)((char *)d + d->vd_aux);
        if (!strcmp(strings + aux->vda_name, "LINUX_2.6"))
            return loaded + symbols[i].st_value;
    }
    return NULL;
}

static long long ns(struct timespec t) { return t.tv_sec * 1000000000ll + t.tv_nsec; }

static long long asked(clockid_t clock)
{
    struct timespec t = {0};
    syscall(SYS_clock_gettime, clock, &t);
    return ns(t);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    int (*gettime)(clockid_t, struct timespec *) = find("__vdso_clock_gettime");
    int (*getres)(clockid_t, struct timespec *) = find("__vdso_clock_getres");
    int (*getday)(struct timeval *, struct timezone *) = find("__vdso_gettimeofday");
    time_t (*seconds)(time_t *) = find("__vdso_time");
    int (*getcpu_)(unsigned *, unsigned *, void *) = find("__vdso_getcpu");
    printf("found: %d %d %d %d %d\n", !!gettime, !!getres, !!getday, !!seconds, !!getcpu_);
    printf("nothing: %d, weak: %d\n", !!find("__vdso_none"), find("clock_gettime") == (void *)gettime);
    if (!gettime || !getday || !seconds || !getcpu_)
        return 1;
    const struct {
        clockid_t id;
        const char *name;
    } clocks[] = {{CLOCK_REALTIME, "realtime"}, {CLOCK_MONOTONIC, "monotonic"}, {CLOCK_MONOTONIC_RAW, "raw"},
                  {CLOCK_BOOTTIME, "boottime"}, {CLOCK_TAI, "tai"}, {CLOCK_PROCESS_CPUTIME_ID, "process"},
                  {CLOCK_THREAD_CPUTIME_ID, "thread"}};
    for (size_t i = 0; i < sizeof clocks / sizeof *clocks; i++) {
        long long back = 0, early = 0, late = 0, last = 0;
        for (int n = 0; n < 2000; n++) {
            struct timespec t = {0};
            long long before = asked(clocks[i].id);
            if (gettime(clocks[i].id, &t))
                printf("%s fails\n", clocks[i].name);
            long long after = asked(clocks[i].id);
            early += ns(t) < before, late += ns(t) > after, back += ns(t) < last;
            last = ns(t);
        }
        printf("%s: %lld early %lld late %lld back\n", clocks[i].name, early, late, back);
    }
    for (int id = CLOCK_REALTIME_COARSE; id <= CLOCK_MONOTONIC_COARSE; id++) {
        struct timespec t = {0};
        long long before = asked(id);
        int result = gettime(id, &t);
        printf("coarse %d: %d %d\n", id, result, ns(t) >= before && ns(t) - before < 1000000000ll);
    }
    struct timespec t;
    struct timeval day = {0};
    struct timezone zone = {77, 77};
    printf("no such clock: %d %d\n", gettime(4711, &t), gettime(-1, NULL) < 0);
    printf("resolution: %d\n", getres ? getres(CLOCK_MONOTONIC, &t) : 0);
    long long before = asked(CLOCK_REALTIME) / 1000;
    printf("day: %d\n", getday(&day, &zone));
    long long after = asked(CLOCK_REALTIME) / 1000, us = day.tv_sec * 1000000ll + day.tv_usec;
    printf("within: %d, zone %d %d, nothing: %d\n", before <= us && us <= after, zone.tz_minuteswest, zone.tz_dsttime,
           getday(NULL, NULL));
    time_t now = 0, again = seconds(&now);
    printf("time: %d %d\n", now == again, llabs(now - asked(CLOCK_REALTIME) / 1000000000) <= 1);
    unsigned cpu = 4711, node = 4711;
    printf("cpu: %d %d\n", getcpu_(&cpu, &node, NULL), cpu < 4096 && node < 1024);

    // A child has it too, and memory of its own around it.
    pid_t child = fork();
    if (child == 0)
        _exit(gettime(CLOCK_MONOTONIC, &t) || ns(t) < before - before);
    int status = -1;
    waitpid(child, &status, 0);
    printf("child: %d\n", status);
    char line[512];
    int named[2] = {0};
    FILE *maps = fopen("/proc/self/maps", "r");
    while (maps && fgets(line, sizeof line, maps)) {
        if (strstr(line, "[vdso]"))
            named[0] = !!strstr(line, " r-xp 00000000 00:00 0 ");
        if (strstr(line, "[vvar]"))
            named[1] = !!strstr(line, " r--p 00000000 00:00 0 ");
    }
    printf("maps: %d %d\n", named[0], named[1]);
    // What is read-only stays so.
    child = fork();
    if (child == 0) {
        *(volatile char *)getauxval(AT_SYSINFO_EHDR) = 1;
        _exit(0);
    }
    waitpid(child, &status, 0);
    printf("written: signal %d\n", WTERMSIG(status));
    return 0;
}
