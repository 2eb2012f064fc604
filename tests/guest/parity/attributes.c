// Extended attributes, and files without a name.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static void show(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result < 0 ? -1 : result, result < 0 ? strerrorname_np(errno) : "");
    fflush(stdout);
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// The names of the user's own, in order: a kernel may show others too.
static void names(const char *what, const char *list, long length)
{
    char *all[32];
    int count = 0;
    for (long at = 0; at < length && count < 32; at += strlen(list + at) + 1)
        if (!strncmp(list + at, "user.", 5))
            all[count++] = (char *)list + at;
    qsort(all, count, sizeof *all, by_name);
    printf("%s:", what);
    for (int i = 0; i < count; i++)
        printf(" %s", all[i]);
    puts("");
}

static void extended(void)
{
    char buffer[256], list[65536];
    static char big[70000], name[300] = "user.";
    close(open("f", O_RDWR | O_CREAT, 0600));
    mkdir("d", 0700), symlink("f", "link"), symlink("none", "dangling"), mkfifo("fifo", 0600);
    show("none yet", getxattr("f", "user.a", buffer, sizeof buffer));
    show("set", setxattr("f", "user.a", "value", 5, 0));
    show("get", getxattr("f", "user.a", buffer, sizeof buffer));
    printf("%.5s\n", buffer);
    show("size", getxattr("f", "user.a", NULL, 0));
    show("small", getxattr("f", "user.a", buffer, 4));
    show("no address", getxattr("f", "user.a", (void *)8, 100));
    show("create again", setxattr("f", "user.a", "x", 1, XATTR_CREATE));
    show("replace nothing", setxattr("f", "user.b", "x", 1, XATTR_REPLACE));
    show("replace", setxattr("f", "user.a", "x", 1, XATTR_REPLACE));
    show("get", getxattr("f", "user.a", buffer, sizeof buffer));
    show("flags", setxattr("f", "user.a", "x", 1, 4));
    show("empty value", setxattr("f", "user.empty", "", 0, XATTR_CREATE));
    show("get", getxattr("f", "user.empty", buffer, sizeof buffer));
    int fd = open("f", O_RDONLY);
    show("by descriptor", fsetxattr(fd, "user.fd", "12", 2, 0));
    show("get", fgetxattr(fd, "user.fd", buffer, sizeof buffer));
    show("path only", fgetxattr(open("f", O_PATH), "user.fd", buffer, sizeof buffer));
    show("no descriptor", fgetxattr(99, "user.fd", buffer, sizeof buffer));
    show("through a link", getxattr("link", "user.fd", buffer, sizeof buffer));
    show("of a link", lgetxattr("link", "user.fd", buffer, sizeof buffer));
    show("on a link", lsetxattr("link", "user.fd", "x", 1, 0));
    show("dangling", getxattr("dangling", "user.fd", buffer, sizeof buffer));
    show("on a fifo", setxattr("fifo", "user.a", "x", 1, 0));
    show("of a fifo", getxattr("fifo", "user.a", buffer, sizeof buffer));
    show("on a directory", setxattr("d", "user.dir", "abc", 3, 0));
    show("get", getxattr("d", "user.dir", buffer, sizeof buffer));
    names("list", list, listxattr("f", list, sizeof list));
    names("by descriptor", list, flistxattr(fd, list, sizeof list));
    show("small", listxattr("f", list, 3));
    show("remove", removexattr("f", "user.a"));
    show("remove again", removexattr("f", "user.a"));
    show("by descriptor", fremovexattr(fd, "user.fd"));
    names("list", list, listxattr("f", list, sizeof list));
    // Names and sizes that are none.
    show("no name", setxattr("f", "", "x", 1, 0));
    show("no prefix", setxattr("f", "plain", "x", 1, 0));
    show("unknown prefix", setxattr("f", "other.a", "x", 1, 0));
    show("only a prefix", setxattr("f", "user.", "x", 1, 0));
    memset(name + 5, 'n', 255 - 5), name[255] = 0;
    show("longest name", setxattr("f", name, "x", 1, 0));
    show("get", getxattr("f", name, buffer, sizeof buffer));
    show("remove", removexattr("f", name));
    name[255] = 'n';
    show("too long", setxattr("f", name, "x", 1, 0));
    show("too large", setxattr("f", "user.big", big, 65537, 0));
    show("large", setxattr("f", "user.big", big, 3000, 0));
    show("get", getxattr("f", "user.big", big, 70000));
    show("remove", removexattr("f", "user.big"));
    show("trusted", setxattr("f", "trusted.a", "x", 1, 0));
    show("trusted", getxattr("f", "trusted.a", buffer, sizeof buffer));
    show("security", setxattr("f", "security.a", "x", 1, 0));
    // They go with the file, and follow it.
    setxattr("f", "user.kept", "1", 1, 0);
    rename("f", "g");
    show("renamed", getxattr("g", "user.kept", buffer, sizeof buffer));
    unlink("g");
    show("unlinked", fgetxattr(fd, "user.kept", buffer, sizeof buffer));
    close(open("g", O_RDWR | O_CREAT, 0600));
    show("another", getxattr("g", "user.kept", buffer, sizeof buffer));
    // Somebody else.
    chmod("g", 0644), setxattr("g", "user.mine", "1", 1, 0);
    pid_t child = fork();
    if (child == 0) {
        setgid(1000), setuid(1000);
        show("read by others", getxattr("g", "user.mine", buffer, sizeof buffer));
        show("set by others", setxattr("g", "user.mine", "2", 1, 0));
        show("removed by others", removexattr("g", "user.mine"));
        chmod("g", 0600);
        exit(0);
    }
    waitpid(child, NULL, 0);
    chmod("g", 0600);
    child = fork();
    if (child == 0) {
        setgid(1000), setuid(1000);
        show("not read by others", getxattr("g", "user.mine", buffer, sizeof buffer));
        exit(0);
    }
    waitpid(child, NULL, 0);
}

static void nameless(void)
{
    char path[64], buffer[64];
    struct stat s;
    int fd = open(".", O_TMPFILE | O_RDWR, 0640);
    show("nameless", fd < 0 ? -1 : 0);
    show("write", write(fd, "hello", 5));
    fstat(fd, &s);
    printf("mode %o links %ld size %ld\n", s.st_mode, (long)s.st_nlink, (long)s.st_size);
    show("attribute", fsetxattr(fd, "user.t", "1", 1, 0));
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int again = open(path, O_RDWR);
    show("again", pread(again, buffer, 5, 0));
    show("written again", pwrite(again, "J", 1, 0));
    close(again);
    show("link", linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW));
    show("link again", linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW));
    stat("named", &s);
    printf("mode %o links %ld size %ld\n", s.st_mode, (long)s.st_nlink, (long)s.st_size);
    close(fd);
    fd = open("named", O_RDONLY);
    show("read", read(fd, buffer, sizeof buffer));
    printf("%.5s\n", buffer);
    show("attribute", getxattr("named", "user.t", buffer, sizeof buffer));
    close(fd);
    fd = open(".", O_TMPFILE | O_WRONLY | O_EXCL, 0600);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    show("never a name", linkat(AT_FDCWD, path, AT_FDCWD, "other", AT_SYMLINK_FOLLOW));
    close(fd);
    fd = open("gone", O_RDWR | O_CREAT, 0600);
    unlink("gone");
    write(fd, "abc", 3);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    show("no name any more", linkat(AT_FDCWD, path, AT_FDCWD, "other", AT_SYMLINK_FOLLOW));
    again = open(path, O_RDONLY);
    show("opened by number", read(again, buffer, sizeof buffer));
    long length = readlink(path, buffer, sizeof buffer - 1);
    buffer[length > 0 ? length : 0] = 0;
    printf("%s\n", strrchr(buffer, '/'));
    close(again), close(fd);
    show("for reading", open(".", O_TMPFILE | O_RDONLY, 0600));
    show("in a file", open("named", O_TMPFILE | O_RDWR, 0600));
    show("in nothing", open("none", O_TMPFILE | O_RDWR, 0600));
    show("half a flag", open(".", (O_TMPFILE & ~O_DIRECTORY) | O_RDWR, 0600));
    show("create", open(".", O_TMPFILE | O_CREAT | O_RDWR, 0600));
    show("many", 0);
    for (int i = 0; i < 200; i++) {
        fd = open(".", O_TMPFILE | O_RDWR, 0600);
        if (fd < 0 || write(fd, "x", 1) != 1)
            show("one of many", -1);
        close(fd);
    }
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    umask(027);
    const char *const places[] = {"/tmp/parity-attributes", "/dev/shm/parity-attributes"};
    for (int i = 0; i < 2; i++) {
        printf("--- %s\n", places[i]);
        if (mkdir(places[i], 0755) || chdir(places[i]))
            show(places[i], -1);
        chmod(".", 0755);
        extended();
        nameless();
        if (chdir("/"))
            show("back", -1);
    }
    return 0;
}
