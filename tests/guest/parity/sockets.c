// Sockets within the machine: unix and TCP and UDP of both families.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static void show(const char *what, long result)
{
    printf("%s: %ld %s\n", what, result < 0 ? -1 : result, result < 0 ? strerrorname_np(errno) : "");
    fflush(stdout);
}

static void unix_sockets(void)
{
    int pair[2], fds[2];
    char buffer[64];
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    send(pair[0], "stream", 6, 0);
    show("peek", recv(pair[1], buffer, 64, MSG_PEEK));
    show("part", recv(pair[1], buffer, 3, 0));
    show("rest", recv(pair[1], buffer, 64, 0));
    show("nothing", recv(pair[1], buffer, 64, MSG_DONTWAIT));

    // A file goes through.
    pipe(fds);
    union {
        char room[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec part = {"f", 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    *header = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
    memcpy(CMSG_DATA(header), &fds[1], sizeof(int));
    show("send file", sendmsg(pair[0], &message, 0));
    memset(&control, 0, sizeof control);
    part.iov_base = buffer;
    show("receive file", recvmsg(pair[1], &message, 0));
    int got;
    memcpy(&got, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
    write(got, "through", 7);
    show("works", read(fds[0], buffer, 64));
    show("shutdown", shutdown(pair[0], SHUT_WR));
    show("end", recv(pair[1], buffer, 64, 0));
    show("after shutdown", send(pair[0], "x", 1, MSG_NOSIGNAL));
    close(pair[1]);
    show("closed", recv(pair[0], buffer, 64, 0));

    socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair);
    send(pair[0], "packet", 6, 0), send(pair[0], "", 0, 0);
    show("packet", recv(pair[1], buffer, 3, 0));
    show("empty packet", recv(pair[1], buffer, 3, 0));

    // Names.
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "/tmp/parity-socket"};
    unlink(name.sun_path);
    int server = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
    show("connect to nothing", connect(client, (void *)&name, sizeof name));
    show("bind", bind(server, (void *)&name, sizeof name));
    show("connect to one that does not listen", connect(client, (void *)&name, sizeof name));
    show("bind again", bind(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&name, sizeof name));
    show("accept without listen", accept(server, NULL, NULL));
    listen(server, 1);
    show("connect", connect(client, (void *)&name, sizeof name));
    int other = accept(server, NULL, NULL);
    struct ucred who;
    socklen_t length = sizeof who;
    getsockopt(other, SOL_SOCKET, SO_PEERCRED, &who, &length);
    printf("peer: %d %d\n", who.pid == getpid(), who.uid);
    struct sockaddr_un peer;
    length = sizeof peer;
    getpeername(client, (void *)&peer, &length);
    printf("name: %s %d\n", peer.sun_path, length == offsetof(struct sockaddr_un, sun_path) + strlen(name.sun_path) + 1);
    unlink(name.sun_path);
    struct sockaddr_un abstract = {.sun_family = AF_UNIX, .sun_path = "\0parity"};
    int datagrams = socket(AF_UNIX, SOCK_DGRAM, 0), sender = socket(AF_UNIX, SOCK_DGRAM, 0);
    show("abstract", bind(datagrams, (void *)&abstract, offsetof(struct sockaddr_un, sun_path) + 7));
    show("send to it", sendto(sender, "d", 1, 0, (void *)&abstract, offsetof(struct sockaddr_un, sun_path) + 7));
    length = sizeof peer;
    show("receive", recvfrom(datagrams, buffer, 64, 0, (void *)&peer, &length));
    printf("from %d\n", length);
}

static void streams(int family, struct sockaddr *address, socklen_t size)
{
    printf("--- %s\n", family == AF_INET ? "IPv4" : "IPv6");
    char buffer[64];
    int server = socket(family, SOCK_STREAM, 0), client = socket(family, SOCK_STREAM, 0), value = 1;
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &value, sizeof value);
    show("bind", bind(server, address, size));
    socklen_t length = size;
    getsockname(server, address, &length);
    show("refused", connect(client, address, size));
    close(client);
    client = socket(family, SOCK_STREAM, 0);
    listen(server, 4);
    show("in use", bind(socket(family, SOCK_STREAM, 0), address, size));
    show("connect", connect(client, address, size));
    show("again", connect(client, address, size));
    int accepted = accept4(server, NULL, NULL, SOCK_NONBLOCK);
    show("nothing yet", recv(accepted, buffer, 64, 0));
    show("send", send(client, "hello", 5, 0));
    struct pollfd polls = {accepted, POLLIN, 0};
    show("poll", poll(&polls, 1, 5000));
    show("receive", recv(accepted, buffer, 64, 0));
    int waiting = -1;
    send(client, "more", 4, 0);
    poll(&polls, 1, 5000);
    ioctl(accepted, FIONREAD, &waiting);
    printf("waiting %d\n", waiting);
    length = sizeof value;
    getsockopt(client, SOL_SOCKET, SO_TYPE, &value, &length);
    printf("type %d\n", value);
    value = 1;
    show("no delay", setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &value, sizeof value));
    show("no option", setsockopt(client, SOL_SOCKET, 9999, &value, sizeof value));
    show("short option", setsockopt(client, SOL_SOCKET, SO_REUSEADDR, &value, 1));
    recv(accepted, buffer, 64, 0);
    shutdown(client, SHUT_WR);
    poll(&polls, 1, 5000);
    show("end", recv(accepted, buffer, 64, 0));
    show("the other way", send(accepted, "still", 5, 0));
    show("receive", recv(client, buffer, 64, 0));
    close(accepted), close(client);
    show("accept nothing", (fcntl(server, F_SETFL, O_NONBLOCK), accept(server, NULL, NULL)));

    // Much data between two processes.
    fcntl(server, F_SETFL, 0);
    static char block[65536];
    pid_t child = fork();
    if (child == 0) {
        int fd = socket(family, SOCK_STREAM, 0);
        connect(fd, address, size);
        for (int i = 0; i < 32; i++)
            for (size_t done = 0; done < sizeof block;)
                done += send(fd, block, sizeof block - done, 0);
        _exit(0);
    }
    accepted = accept(server, NULL, NULL);
    long total = 0, n;
    while ((n = recv(accepted, block, sizeof block, 0)) > 0)
        total += n;
    printf("received %ld\n", total);
    waitpid(child, NULL, 0);
    close(accepted), close(server);

    int first = socket(family, SOCK_DGRAM, 0), second = socket(family, SOCK_DGRAM, 0);
    if (family == AF_INET)
        ((struct sockaddr_in *)address)->sin_port = 0;
    else
        ((struct sockaddr_in6 *)address)->sin6_port = 0;
    bind(first, address, size);
    length = size;
    getsockname(first, address, &length);
    show("datagram", sendto(second, "datagram", 8, 0, address, size));
    show("cut", recv(first, buffer, 4, MSG_TRUNC));
    connect(second, address, size);
    show("connected", send(second, "", 0, 0));
    show("empty", recv(first, buffer, 4, 0));
    show("not connected", send(first, "x", 1, 0));
    show("too long", send(second, block, 65536, 0));
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);
    unix_sockets();
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_addr = in6addr_loopback};
    streams(AF_INET, (void *)&four, sizeof four);
    streams(AF_INET6, (void *)&six, sizeof six);
    show("no family", socket(99, SOCK_STREAM, 0));
    show("no type", socket(AF_INET, 77, 0));
    show("not a socket", send(1, "x", 1, 0));
    show("no file", send(77, "x", 1, 0));
    return 0;
}
