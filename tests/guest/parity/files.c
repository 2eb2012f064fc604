// Files: flags, offsets, links, directories, locks, names that are wrong.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static void show(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result < 0 ? -1 : result, result < 0 ? strerrorname_np(errno) : "");
    fflush(stdout);
}

static int by_name(const struct dirent **a, const struct dirent **b) { return strcmp((*a)->d_name, (*b)->d_name); }

static void list(const char *directory)
{
    struct dirent **names;
    int count = scandir(directory, &names, NULL, by_name);
    printf("%s:", directory);
    for (int i = 0; i < count; i++)
        printf(" %s/%d", names[i]->d_name, names[i]->d_type);
    puts("");
}

static void play(const char *where)
{
    char buffer[64] = "", name[300];
    struct stat s;
    printf("--- %s\n", where);
    if (mkdir(where, 0755) || chdir(where))
        show(where, -1);
    umask(027);
    int fd = open("a", O_RDWR | O_CREAT | O_EXCL, 0666);
    show("again", open("a", O_RDWR | O_CREAT | O_EXCL, 0666));
    fstat(fd, &s);
    printf("mode %o links %ld size %ld\n", s.st_mode, (long)s.st_nlink, (long)s.st_size);
    show("write", write(fd, "hello world", 11));
    show("pread", pread(fd, buffer, 5, 6));
    printf("%.5s, at %ld\n", buffer, (long)lseek(fd, 0, SEEK_CUR));
    show("past the end", lseek(fd, 100, SEEK_END));
    show("hole", write(fd, "x", 1));
    show("in the hole", pread(fd, buffer, 10, 50));
    printf("zeros: %d\n", buffer[0] | buffer[9]);
    show("before the start", lseek(fd, -1, SEEK_SET));
    show("whence", lseek(fd, 0, 99));
    int more = open("a", O_WRONLY | O_APPEND);
    show("append", pwrite(more, "end", 3, 0));
    show("read of a writer", read(more, buffer, 1));
    show("truncate", ftruncate(fd, 4));
    struct iovec parts[3] = {{buffer, 2}, {NULL, 0}, {buffer + 10, 10}};
    lseek(fd, 0, SEEK_SET);
    show("readv", readv(fd, parts, 3));
    printf("%.2s %.2s\n", buffer, buffer + 10);
    int twin = dup(fd);
    lseek(twin, 1, SEEK_SET);
    printf("same offset: %ld\n", (long)lseek(fd, 0, SEEK_CUR));
    show("close on exec", fcntl(dup3(fd, 50, O_CLOEXEC), F_GETFD));
    show("flags", fcntl(more, F_GETFL) & (O_APPEND | O_ACCMODE));

    // Names.
    show("link", link("a", "hard"));
    show("symlink", symlink("a", "soft"));
    show("loop", symlink("loop", "loop"));
    show("open the loop", open("loop", O_RDONLY));
    show("not the link", open("soft", O_RDONLY | O_NOFOLLOW));
    show("read the link", readlink("soft", buffer, 64));
    show("read no link", readlink("a", buffer, 64));
    stat("hard", &s);
    printf("links %ld same %d\n", (long)s.st_nlink, fstat(fd, (struct stat *)name) == 0 && ((struct stat *)name)->st_ino == s.st_ino);
    memset(name, 'n', sizeof name - 1), name[sizeof name - 1] = 0;
    show("long name", open(name, O_CREAT | O_RDWR, 0600));
    show("no directory", open("a/b", O_RDONLY));
    show("nothing", open("none/b", O_RDONLY));
    show("empty", open("", O_RDONLY));
    show("directory for writing", open(".", O_RDWR));
    show("file as directory", open("a", O_RDONLY | O_DIRECTORY));
    show("no address", open((char *)1, O_RDONLY));
    for (int i = 0, at = 0; i < 39; i++) {
        // Chains of links: 40 are followed.
        char from[16], to[16];
        snprintf(from, 16, i ? "l%d" : "a", i), snprintf(to, 16, "l%d", i + 1);
        at += symlink(from, to);
        if (at)
            show("chain", at);
    }
    show("39 links", access("l39", R_OK));
    symlink("l39", "l40"), symlink("l40", "l41");
    show("40 links", access("l40", R_OK));
    show("41 links", access("l41", R_OK));
    show("mkdir", mkdir("d", 0700));
    show("mkdir again", mkdir("d", 0700));
    show("rmdir file", rmdir("a"));
    show("unlink directory", unlink("d"));
    show("rename into itself", (mkdir("d/e", 0700), rename("d", "d/e/f")));
    show("rename", rename("a", "d/a"));
    show("rename to a full directory", rename("hard", "d"));
    show("no replace", renameat2(AT_FDCWD, "hard", AT_FDCWD, "d/a", RENAME_NOREPLACE));
    show("rmdir full", rmdir("d"));
    show("rmdir dot", rmdir("d/."));
    show("fifo", mkfifo("fifo", 0600));
    show("nobody reads", open("fifo", O_WRONLY | O_NONBLOCK));
    list("."), list("d");
    int dir = open("d", O_RDONLY | O_DIRECTORY);
    show("at", openat(dir, "a", O_RDONLY) >= 0 ? 0 : -1);
    show("at of a file", openat(fd, "x", O_RDONLY));
    show("at of nothing", openat(77, "x", O_RDONLY));
    show("read a directory", read(dir, buffer, 10));
    show("path only", read(open("d/a", O_PATH), buffer, 1));

    // A file without a name lives on.
    int gone = open("gone", O_RDWR | O_CREAT, 0600);
    unlink("gone");
    write(gone, "still", 5);
    show("still there", pread(gone, buffer, 5, 0));
    fstat(gone, &s);
    printf("links %ld size %ld\n", (long)s.st_nlink, (long)s.st_size);

    // Times and modes.
    struct timespec times[2] = {{1000, 5000}, {2000, 7000}};
    show("times", utimensat(AT_FDCWD, "d/a", times, 0));
    stat("d/a", &s);
    printf("times %ld.%ld %ld.%ld\n", s.st_atim.tv_sec, s.st_atim.tv_nsec, s.st_mtim.tv_sec, s.st_mtim.tv_nsec);
    show("mode", chmod("d/a", 04755));
    stat("d/a", &s);
    printf("mode %o\n", s.st_mode);

    // Locks of records, as another process sees them.
    struct flock lock = {.l_type = F_WRLCK, .l_start = 10, .l_len = 10};
    show("lock", fcntl(fd, F_SETLK, &lock));
    pid_t child = fork();
    if (child == 0) {
        struct flock other = {.l_type = F_RDLCK, .l_start = 15, .l_len = 1};
        show("locked", fcntl(fd, F_SETLK, &other));
        fcntl(fd, F_GETLK, &other);
        printf("by the parent: %d %ld %ld\n", other.l_pid == getppid(), (long)other.l_start, (long)other.l_len);
        show("whole", flock(open("d/a", O_RDWR), LOCK_EX | LOCK_NB));
        exit(0);
    }
    waitpid(child, NULL, 0);
    show("whole", flock(fd, LOCK_EX | LOCK_NB));
    show("and by another", flock(open("d/a", O_RDWR), LOCK_EX | LOCK_NB));

    // From file to file.
    int out = open("out", O_RDWR | O_CREAT | O_TRUNC, 0600);
    off_t from = 1;
    show("sendfile", sendfile(out, fd, &from, 100));
    loff_t in = 0, to = 10;
    show("copy range", copy_file_range(fd, &in, out, &to, 4, 0));
    printf("size %ld, offsets %ld %ld %ld\n", (long)lseek(out, 0, SEEK_END), (long)from, (long)in, (long)to);
    show("close", close(out));
    show("close twice", close(out));
    show("bad file", fsync(77));
    if (chdir("/"))
        show("back", -1);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    play("/tmp/parity-files");
    play("/dev/shm/parity-files");
    return 0;
}
