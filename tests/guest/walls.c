// A container that tries to reach what is outside: of its volume, its VM, its pod.
//   walls DIRECTORY ROUNDS
// DIRECTORY is a volume that is shared with the host, where a file of the name SECRET_NAME lies beside
// it. One line for each thing tried; "ESCAPED" in one of them is a hole, and the program ends with 1.
// That something is refused is as right as that it works on the volume alone.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <unistd.h>

#define SECRET_NAME "secret-of-the-host"
#define SECRET "BULKHEAD-SECRET"

static char *volume;
static int rounds;
static atomic_int escapes;

__attribute__((format(printf, 2, 3))) static void escaped(const char *what, const char *text, ...)
{
    va_list args;
    va_start(args, text);
    printf("%s: ESCAPED: ", what);
    vprintf(text, args);
    printf("\n");
    va_end(args);
    escapes++;
}

// Whether a file is the host's.
static int is_secret(int dir, const char *name)
{
    char text[64] = {0};
    int fd = openat(dir, name, O_RDONLY | O_NONBLOCK);
    if (fd < 0)
        return 0;
    ssize_t got = read(fd, text, sizeof text - 1);
    close(fd);
    return got > 0 && strstr(text, SECRET);
}

static void write_file(int dir, const char *name, const char *text)
{
    int fd = openat(dir, name, O_WRONLY | O_CREAT, 0644);
    if (fd < 0)
        return;
    if (write(fd, text, strlen(text)) < 0)
        errno = 0;
    close(fd);
}

// One name that is a directory, then a link that leads out, then a file, while others use it.
static atomic_int racing;

static void *swap(void *arg)
{
    int dir = *(int *)arg;
    static const char *const targets[] = {
        "..", "../..", "/", "/proc/self/root", "/proc/1/root", "../" SECRET_NAME,
        "/proc/self/fd/3", "/proc/self/cwd/..", "swap", "inner/../../..",
    };
    for (unsigned n = 0; racing; n++) {
        symlinkat(targets[n % (sizeof targets / sizeof *targets)], dir, "other");
        renameat2(dir, "other", dir, "swap", n % 3 ? RENAME_EXCHANGE : 0);
        unlinkat(dir, "other", 0);
        mkdirat(dir, "other", 0755);
        renameat2(dir, "other", dir, "swap", RENAME_EXCHANGE);
        renameat(dir, "swap/inner", dir, "moved");
        renameat(dir, "moved", dir, "swap/inner");
        unlinkat(dir, "other", 0);
        unlinkat(dir, "other", AT_REMOVEDIR);
    }
    return NULL;
}

static void races(int dir)
{
    int tried = 0;
    mkdirat(dir, "swap", 0755);
    mkdirat(dir, "swap/inner", 0755);
    racing = 1;
    pthread_t thread;
    pthread_create(&thread, NULL, swap, &dir);
    for (int n = 0; n < rounds * 20; n++) {
        static const char *const ways[] = {
            "swap/" SECRET_NAME, "swap/../" SECRET_NAME, "swap/inner/../../../" SECRET_NAME,
            "swap", "swap/inner/../../" SECRET_NAME, "moved/../../" SECRET_NAME,
        };
        const char *way = ways[n % (sizeof ways / sizeof *ways)];
        if (is_secret(dir, way))
            escaped("races", "%s was read", way);
        write_file(dir, "swap/made", "made by a guest");
        linkat(dir, way, dir, "linked", n % 2 ? AT_SYMLINK_FOLLOW : 0);
        unlinkat(dir, "linked", 0);
        unlinkat(dir, "swap/made", 0);
        tried++;
    }
    racing = 0;
    pthread_join(thread, NULL);
    printf("races: %d\n", tried);
}

// A directory that is deeper than any path, moved while one is in it.
static void depth(int dir)
{
    int at = dup(dir), levels = 0;
    for (; at >= 0 && levels < rounds * 20; levels++) {
        if (mkdirat(at, "deeper", 0755) && errno != EEXIST)
            break;
        int next = openat(at, "deeper", O_RDONLY | O_DIRECTORY);
        close(at);
        at = next;
    }
    for (int n = 0; at >= 0 && n < levels + 8; n++) {
        int up = openat(at, "..", O_RDONLY | O_DIRECTORY);
        close(at);
        at = up;
    }
    // Above the volume is the container's own root.
    if (at >= 0 && is_secret(at, SECRET_NAME))
        escaped("depth", "the way up ends outside");
    close(at);
    printf("depth: %s\n", levels > 0 ? "made" : strerror(errno));
}

// What a host would follow or execute: devices, doors, rights, names.
static void doors(int dir)
{
    static const struct {
        const char *name;
        mode_t mode;
        unsigned major, minor;
    } nodes[] = {
        {"mem", S_IFCHR | 0666, 1, 1},  {"disk", S_IFBLK | 0666, 8, 0},
        {"vda", S_IFBLK | 0666, 254, 0}, {"kvm", S_IFCHR | 0666, 10, 232},
        {"fifo", S_IFIFO | 0666, 0, 0}, {"socket", S_IFSOCK | 0666, 0, 0},
    };
    for (unsigned n = 0; n < sizeof nodes / sizeof *nodes; n++) {
        int failed = mknodat(dir, nodes[n].name, nodes[n].mode, makedev(nodes[n].major, nodes[n].minor));
        printf("doors: %s %s\n", nodes[n].name, failed ? "refused" : "made");
    }
    write_file(dir, "program", "#!/bin/sh\n");
    int fd = openat(dir, "program", O_RDWR);
    fchmod(fd, 06755);
    static const char *const names[] = {
        "trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.redirect",
        "security.selinux", "security.evm", "system.posix_acl_access", "user.large",
    };
    static char value[70000];
    memset(value, '/', sizeof value);
    for (unsigned n = 0; n < sizeof names / sizeof *names; n++)
        for (size_t size = 1; size < sizeof value; size *= 16)
            fsetxattr(fd, names[n], value, size, 0);
    close(fd);
    printf("doors: tried\n");
}

// As many open files, names and locks as there may be.
static void hold(int dir)
{
    struct rlimit limit = {1 << 20, 1 << 20};
    setrlimit(RLIMIT_NOFILE, &limit);
    getrlimit(RLIMIT_NOFILE, &limit);
    int most = rounds * 50, made = 0;
    int *fds = calloc(most, sizeof *fds);
    char name[32];
    mkdirat(dir, "many", 0755);
    for (; made < most; made++) {
        snprintf(name, sizeof name, "many/%d", made);
        fds[made] = openat(dir, name, O_RDWR | O_CREAT, 0644);
        if (fds[made] < 0)
            break;
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = made, .l_len = 1};
        fcntl(fds[made], F_SETLK, &lock);
        flock(fds[made], LOCK_EX | LOCK_NB);
        // Gone by name, still open.
        if (made % 2)
            unlinkat(dir, name, 0);
    }
    for (int n = 0; n < made; n++)
        close(fds[n]);
    free(fds);
    DIR *many = fdopendir(openat(dir, "many", O_RDONLY | O_DIRECTORY));
    int seen = 0;
    while (many && readdir(many))
        seen++;
    if (many)
        closedir(many);
    printf("hold: %s\n", made > 0 && seen > 2 ? "held and given back" : strerror(errno));
}

// Sizes and offsets at the ends of what fits.
static void sizes(int dir)
{
    int fd = openat(dir, "sparse", O_RDWR | O_CREAT, 0644);
    static const off_t ends[] = {INT64_MAX, INT64_MAX - 4096, 1ll << 62, 1ll << 44, -1, 0};
    for (unsigned n = 0; n < sizeof ends / sizeof *ends; n++) {
        if (ftruncate(fd, ends[n]))
            errno = 0;
        if (pwrite(fd, "x", 1, ends[n] - 1) < 0)
            errno = 0;
        fallocate(fd, n % 2 ? FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE : FALLOC_FL_KEEP_SIZE, 0, ends[n]);
        lseek(fd, ends[n], SEEK_DATA);
        copy_file_range(fd, NULL, fd, NULL, 1 << 20, 0);
    }
    if (ftruncate(fd, 0))
        errno = 0;
    close(fd);
    printf("sizes: tried\n");
}

// The host's ends of vsock, and the agent's, are not for containers.
static void vsock(void)
{
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0) {
        printf("vsock: tried\n");
        return;
    }
    close(fd);
    static const unsigned cids[] = {0, 1, VMADDR_CID_HOST, 3, 4, 5, VMADDR_CID_ANY};
    for (unsigned c = 0; c < sizeof cids / sizeof *cids; c++)
        for (unsigned port = 0; port < 3; port++) {
            static const unsigned ports[] = {1, 1024, 1025};
            struct sockaddr_vm to = {
                .svm_family = AF_VSOCK, .svm_cid = cids[c], .svm_port = ports[port]};
            fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK, 0);
            if (!connect(fd, (struct sockaddr *)&to, sizeof to) && cids[c] == VMADDR_CID_HOST)
                escaped("vsock", "the host answers at port %u", ports[port]);
            close(fd);
        }
    printf("vsock: tried\n");
}

// With all rights in the guest: its disk, and the pod's files by a mount of one's own.
static void guest(int dir)
{
    int disk = open("/dev/vda", O_WRONLY);
    if (disk >= 0) {
        static char block[4096];
        if (pwrite(disk, block, sizeof block, 0) == sizeof block && !fsync(disk))
            escaped("guest", "the image that all pods boot from was written");
        close(disk);
    }
    static const char *const tags[] = {"share", "volumes"};
    for (unsigned n = 0; n < 2; n++) {
        mkdir("/walls-share", 0755);
        if (mount(tags[n], "/walls-share", "virtiofs", 0, NULL))
            continue;
        int top = open("/walls-share", O_RDONLY | O_DIRECTORY);
        if (!mkdirat(top, "made", 0755) || !symlinkat("/", top, "link"))
            escaped("guest", "names of the pod's directory are made: %s", tags[n]);
        DIR *all = fdopendir(dup(top));
        struct dirent *entry;
        while (all && (entry = readdir(all)))
            if (entry->d_name[0] != '.' && !renameat(top, entry->d_name, top, "moved"))
                escaped("guest", "%s of %s was moved", entry->d_name, tags[n]);
        if (all)
            closedir(all);
        if (is_secret(top, "../" SECRET_NAME) || is_secret(top, "../../" SECRET_NAME))
            escaped("guest", "above the pod's directory is the host");
        close(top);
        umount2("/walls-share", MNT_DETACH);
        printf("guest: %s mounted\n", tags[n]);
    }
    // A handle is a number that the host made: others lead elsewhere.
    struct {
        struct file_handle head;
        unsigned char id[64];
    } handle = {.head.handle_bytes = sizeof handle.id};
    int mounted;
    if (!name_to_handle_at(dir, "program", &handle.head, &mounted, 0))
        for (int n = 0; n < rounds; n++) {
            handle.id[n % handle.head.handle_bytes] += 1 + n / 8;
            int fd = open_by_handle_at(dir, &handle.head, O_RDONLY);
            if (fd >= 0 && is_secret(fd, ""))
                escaped("guest", "a handle of the host");
            close(fd);
        }
    printf("guest: tried\n");
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    volume = argv[1];
    rounds = atoi(argv[2]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    int dir = open(volume, O_RDONLY | O_DIRECTORY);
    if (dir < 0) {
        perror(volume);
        return 2;
    }
    races(dir);
    depth(dir);
    doors(dir);
    hold(dir);
    sizes(dir);
    vsock();
    guest(dir);
    printf("walls: %s\n", escapes ? "ESCAPED" : "done");
    return escapes != 0;
}
