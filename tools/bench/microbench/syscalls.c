/* syscalls.c - the system calls of the code under test, timed apart: the linker puts these wrappers around them (--wrap). */
#include "micro.h"

#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

int micro_timed;
uint64_t micro_kernel_ns;

#define TIMED(call)                                 \
	do {                                        \
		uint64_t t = micro_timed ? micro_now() : 0; \
		__typeof__(call) r = (call);        \
                                                    \
		if (micro_timed)                        \
			micro_kernel_ns += micro_now() - t; \
		return r;                           \
	} while (0)

ssize_t __real_sendmsg(int fd, const struct msghdr *m, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *m, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *m, int flags)
{
	TIMED(__real_sendmsg(fd, m, flags));
}

ssize_t __real_send(int fd, const void *buf, size_t len, int flags);
ssize_t __wrap_send(int fd, const void *buf, size_t len, int flags);
ssize_t __wrap_send(int fd, const void *buf, size_t len, int flags)
{
	TIMED(__real_send(fd, buf, len, flags));
}

ssize_t __real_recv(int fd, void *buf, size_t len, int flags);
ssize_t __wrap_recv(int fd, void *buf, size_t len, int flags);
ssize_t __wrap_recv(int fd, void *buf, size_t len, int flags)
{
	TIMED(__real_recv(fd, buf, len, flags));
}

int __real_getsockopt(int fd, int level, int name, void *value, socklen_t *len);
int __wrap_getsockopt(int fd, int level, int name, void *value, socklen_t *len);
int __wrap_getsockopt(int fd, int level, int name, void *value, socklen_t *len)
{
	TIMED(__real_getsockopt(fd, level, name, value, len));
}

int __real_epoll_wait(int ep, struct epoll_event *ev, int n, int ms);
int __wrap_epoll_wait(int ep, struct epoll_event *ev, int n, int ms);
int __wrap_epoll_wait(int ep, struct epoll_event *ev, int n, int ms)
{
	TIMED(__real_epoll_wait(ep, ev, n, ms));
}

int __real_ioctl(int fd, unsigned long what, ...);
int __wrap_ioctl(int fd, unsigned long what, ...);
int __wrap_ioctl(int fd, unsigned long what, ...)
{
	va_list args;
	void *arg;

	va_start(args, what);
	arg = va_arg(args, void *);
	va_end(args);
	TIMED(__real_ioctl(fd, what, arg));
}

ssize_t __real_write(int fd, const void *buf, size_t len);
ssize_t __wrap_write(int fd, const void *buf, size_t len);
ssize_t __wrap_write(int fd, const void *buf, size_t len)
{
	TIMED(__real_write(fd, buf, len));
}

void micro_split(const char *part, const char *what, uint32_t bytes, uint32_t n, micro_fn round)
{
	double all[ROUNDS], kernel[ROUNDS], own[ROUNDS];
	char text[96];

	round(&bytes, n); /* warm */
	for (int r = 0; r < ROUNDS; r++) {
		all[r] = (double)round(&bytes, n) / n;
		kernel[r] = (double)micro_kernel_ns / n;
		own[r] = all[r] - kernel[r];
	}
	micro_say(part, what, bytes, all);
	snprintf(text, sizeof(text), "%s, system calls", what);
	micro_say(part, text, bytes, kernel);
	snprintf(text, sizeof(text), "%s, our code", what);
	micro_say(part, text, bytes, own);
}

void micro_tcp_pair(int *client, int *server)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t l = sizeof(sin);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), size = 8 << 20;

	*client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	NEED(listener >= 0 && *client >= 0);
	if (setsockopt(listener, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)))
		setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	NEED(!bind(listener, (struct sockaddr *)&sin, l) && !listen(listener, 1) &&
	     !getsockname(listener, (struct sockaddr *)&sin, &l) && !connect(*client, (struct sockaddr *)&sin, l));
	*server = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	NEED(*server >= 0);
	close(listener);
}
