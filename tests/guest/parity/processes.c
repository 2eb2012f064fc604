// Processes: fork, exec, wait, sessions, groups, orphans, vfork, threads that end processes.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void show(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result < 0 ? -1 : result, result < 0 ? strerrorname_np(errno) : "");
    fflush(stdout);
}

static void *leave(void *argument)
{
    _exit((int)(long)argument);
}

static void *last_words(void *argument)
{
    usleep(20000);
    exit((int)(long)argument);
}

static int status_of(pid_t child)
{
    int status = -1;
    waitpid(child, &status, 0);
    return status;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1) {
        printf("again as %s: %d arguments, %s, FOO=%s\n", argv[0], argc, argv[argc - 1], getenv("FOO") ?: "none");
        return 33;
    }
    int status, fds[2];
    pid_t child;
    show("no child", waitpid(-1, &status, 0));
    show("no such child", waitpid(999999, &status, 0));

    if ((child = fork()) == 0)
        _exit(7);
    printf("exit: %x\n", status_of(child));
    if ((child = fork()) == 0)
        abort();
    status = status_of(child);
    printf("abort: %d %d\n", WIFSIGNALED(status), WTERMSIG(status));

    pipe(fds);
    if ((child = fork()) == 0) {
        char byte;
        close(fds[1]);
        _exit(read(fds[0], &byte, 1) == 0 ? 1 : 2);
    }
    show("not yet", waitpid(child, &status, WNOHANG));
    siginfo_t info = {0};
    close(fds[0]), close(fds[1]);
    show("waitid", waitid(P_PID, child, &info, WEXITED | WNOWAIT));
    printf("info: %d %d %d\n", info.si_code == CLD_EXITED, info.si_status, info.si_pid == child);
    printf("still there: %x\n", status_of(child));

    // exec: arguments, environment, close on exec; what is no program.
    fflush(stdout);
    pipe2(fds, O_CLOEXEC);
    if ((child = fork()) == 0) {
        char *arguments[] = {"other name", "x", "last", NULL}, *environment[] = {"FOO=bar", NULL};
        execve("/proc/self/exe", arguments, environment);
        _exit(1);
    }
    close(fds[1]);
    char byte;
    ssize_t end = read(fds[0], &byte, 1);
    printf("exec: %x\n", status_of(child));
    printf("closed on exec: %zd\n", end);
    char *arguments[] = {"x", NULL};
    show("no program", execve("/tmp", arguments, NULL));
    show("nothing", execve("/none", arguments, NULL));
    show("nothing in nothing", execve("/proc/self/exe/none", arguments, NULL));
    show("no address", execve((char *)8, arguments, NULL));
    show("no arguments", execve("/proc/self/exe", (char **)8, NULL));

    // Groups and sessions.
    if ((child = fork()) == 0) {
        int fine = setsid() == getpid() && getsid(0) == getpid() && getpgrp() == getpid();
        int refused = setsid() == -1 && errno == EPERM && setpgid(0, 0) == -1 && errno == EPERM;
        _exit(fine * 2 + refused);
    }
    printf("session: %d\n", WEXITSTATUS(status_of(child)));
    if ((child = fork()) == 0) {
        pause();
        _exit(0);
    }
    show("group", setpgid(child, child));
    show("is there", getpgid(child) == child);
    show("group of nobody", setpgid(999999, 0));
    killpg(child, SIGTERM);
    printf("by its group: %d\n", WTERMSIG(status_of(-child)));

    // Stopping and going on. It ends only when its going on has been seen.
    int seen[2];
    pipe(seen);
    if ((child = fork()) == 0) {
        char c;
        raise(SIGSTOP);
        read(seen[0], &c, 1);
        _exit(9);
    }
    waitpid(child, &status, WUNTRACED);
    printf("stopped: %d %d\n", WIFSTOPPED(status), WSTOPSIG(status));
    kill(child, SIGCONT);
    waitpid(child, &status, WCONTINUED);
    printf("continued: %d\n", WIFCONTINUED(status));
    write(seen[1], "x", 1);
    printf("exit: %d\n", WEXITSTATUS(status_of(child)));

    // Orphans go to the subreaper.
    prctl(PR_SET_CHILD_SUBREAPER, 0);
    pipe(fds);
    if ((child = fork()) == 0) {
        if (fork() == 0) {
            while (getppid() == child)
                usleep(1000);
            _exit(write(fds[1], "o", 1) != 1);
        }
        _exit(0);
    }
    status_of(child);
    close(fds[1]);
    read(fds[0], &byte, 1);
    printf("orphan: %c\n", byte);

    // vfork: the parent waits until the child is done with its memory.
    static volatile int order;
    if ((child = vfork()) == 0) {
        order = 1;
        usleep(10000);
        order = 2;
        _exit(4);
    }
    printf("vfork: %d %d\n", order, WEXITSTATUS(status_of(child)));

    // A thread ends the process; the first thread ends before others; exec by a thread.
    pthread_t thread;
    if ((child = fork()) == 0) {
        pthread_create(&thread, NULL, leave, (void *)21);
        for (;;)
            pause();
    }
    printf("by a thread: %d\n", WEXITSTATUS(status_of(child)));
    if ((child = fork()) == 0) {
        pthread_create(&thread, NULL, last_words, (void *)22);
        syscall(SYS_exit, 1);
    }
    printf("by the last thread: %d\n", WEXITSTATUS(status_of(child)));

    // Children that nobody waits for.
    signal(SIGCHLD, SIG_IGN);
    if ((child = fork()) == 0)
        _exit(0);
    show("ignored child", waitpid(child, &status, 0));
    signal(SIGCHLD, SIG_DFL);
    char name[16] = "";
    prctl(PR_SET_NAME, "a name that is too long");
    prctl(PR_GET_NAME, name);
    printf("name: %s\n", name);
    return 0;
}
