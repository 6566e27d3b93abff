/* udp.c - datagrams at a given rate, one sender, one receiver; either side may be either. Orders:
 *   send SECONDS BITS_PER_S SIZE   (0 bit/s: as fast as the socket takes them); answers when done
 *   mark                           count from here
 *   report                         what came since mark, after QUIET_MS without a datagram
 *
 * The receiver's socket buffer is 8 MiB, so that what is lost is lost by what lies between.
 */
#include "load.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define QUIET_MS 200
#define PACE_NS 200000ull     /* a sender sleeps as long between its bursts, */
#define BEHIND_NS 2000000ull  /* and never makes up for more than this */
#define HELLO "hello"

static struct {
	int fd;
	uint64_t bytes, datagrams, first, last;
	uint8_t buf[BATCH][2048];
	uint8_t big[65536];
	int sized; /* bytes a datagram that fits buf[] */
} u = { .sized = sizeof(u.buf[0]) };

static int udp_socket(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), size = 8 << 20;

	if (fd < 0)
		die(errno, "UDP socket");
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)))
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	return fd;
}

/* One recvmmsg(): datagrams taken, 0 if none waited. */
static int take(void)
{
	static struct mmsghdr m[BATCH];
	static struct iovec v[BATCH];
	uint64_t t;
	int n;

	for (int i = 0; i < BATCH; i++) {
		/* the first has room for any; a burst of large ones comes one at a time */
		v[i] = (struct iovec){ .iov_base = i ? u.buf[i] : u.big, .iov_len = i ? sizeof(u.buf[i]) : sizeof(u.big) };
		m[i] = (struct mmsghdr){ .msg_hdr = { .msg_iov = &v[i], .msg_iovlen = 1 } };
	}
	n = recvmmsg(u.fd, m, u.sized > (int)sizeof(u.buf[0]) ? 1 : BATCH, MSG_DONTWAIT, NULL);
	if (n <= 0)
		return 0;
	t = now_ns();
	if (!u.datagrams)
		u.first = t;
	u.last = t;
	for (int i = 0; i < n; i++) {
		u.datagrams++;
		u.bytes += m[i].msg_len;
		if (m[i].msg_hdr.msg_flags & MSG_TRUNC || m[i].msg_len > sizeof(u.buf[0]))
			u.sized = sizeof(u.big);
	}
	return n;
}

static void send_for(double seconds, double rate, size_t size)
{
	static struct mmsghdr m[BATCH];
	struct iovec v = { .iov_base = u.big, .iov_len = size };
	uint64_t began = now_ns(), end = began + (uint64_t)(seconds * 1e9), sent = 0, failed = 0, from = began, due_from = 0;
	double per_ns = rate / 8 / (double)size / 1e9; /* datagrams */
	uint64_t t;

	for (int i = 0; i < BATCH; i++)
		m[i] = (struct mmsghdr){ .msg_hdr = { .msg_iov = &v, .msg_iovlen = 1 } };
	while ((t = now_ns()) < end) {
		uint64_t due = BATCH;
		int n;

		if (rate > 0) {
			uint64_t should = due_from + (uint64_t)((double)(t - from) * per_ns), done = sent + failed;
			uint64_t slack = (uint64_t)(per_ns * BEHIND_NS) + 1;

			if (should > done + slack) { /* could not keep up: the rate counts from here */
				from = t;
				due_from = done + slack;
				should = due_from;
			}
			due = should - done;
			if (!due) {
				struct timespec nap = { .tv_nsec = (long)PACE_NS };

				nanosleep(&nap, NULL);
				continue;
			}
		}
		n = sendmmsg(u.fd, m, due > BATCH ? BATCH : (unsigned int)due, 0);
		if (n > 0)
			sent += (uint64_t)n;
		else if (errno == ENOBUFS || errno == ECONNREFUSED || errno == EAGAIN)
			failed++;
		else
			die(errno, "send");
	}
	tell("{\"datagrams\": %llu, \"failed\": %llu, \"seconds\": %.6f}", (unsigned long long)sent, (unsigned long long)failed,
	     (double)(now_ns() - began) / 1e9);
}

static void order(void)
{
	char line[LOAD_ORDER_MAX];
	double seconds, rate, size;

	if (!next_order(line))
		exit(0);
	if (sscanf(line, "send %lf %lf %lf", &seconds, &rate, &size) == 3) {
		if (!(seconds > 0 && seconds <= 3600 && rate >= 0 && size >= 1 && size <= 65507))
			die(0, "order '%s': out of range", line);
		send_for(seconds, rate, (size_t)size);
	} else if (!strcmp(line, "mark")) {
		u.bytes = u.datagrams = u.first = u.last = 0;
		tell("ok");
	} else if (!strcmp(line, "report")) {
		struct pollfd p = { .fd = u.fd, .events = POLLIN };

		while (poll(&p, 1, QUIET_MS) > 0)
			while (take())
				;
		tell("{\"datagrams\": %llu, \"bytes\": %llu, \"seconds\": %.6f}", (unsigned long long)u.datagrams,
		     (unsigned long long)u.bytes, (double)(u.last - u.first) / 1e9);
	} else {
		die(0, "order '%s' is not known", line);
	}
}

static int serve(void)
{
	struct pollfd p[2] = { { .fd = u.fd, .events = POLLIN }, { .fd = STDIN_FILENO, .events = POLLIN } };

	for (;;) {
		if (poll(p, 2, -1) < 0)
			die(errno, "poll");
		if (p[0].revents)
			for (int i = 0; i < 16 && take(); i++)
				;
		if (p[1].revents)
			order();
	}
}

int mode_udp_listen(int argc, char **argv)
{
	struct sockaddr_in at = address(argv[1], argv[2]), from;
	socklen_t l = sizeof(from);
	struct pollfd p[2] = { { .events = POLLIN }, { .fd = STDIN_FILENO, .events = POLLIN } };

	(void)argc;
	p[0].fd = u.fd = udp_socket();
	if (bind(u.fd, (struct sockaddr *)&at, sizeof(at)))
		die(errno, "bind");
	tell("ready");
	if (poll(p, 2, -1) < 0 || !p[0].revents) /* the input ended first: nobody came */
		return 0;
	if (recvfrom(u.fd, u.big, sizeof(u.big), 0, (struct sockaddr *)&from, &l) < 0)
		die(errno, "hello");
	if (connect(u.fd, (struct sockaddr *)&from, l) || send(u.fd, HELLO, sizeof(HELLO), 0) < 0)
		die(errno, "hello back");
	return serve();
}

int mode_udp_connect(int argc, char **argv)
{
	struct sockaddr_in to = address(argv[1], argv[2]);
	struct pollfd p = { .events = POLLIN };

	(void)argc;
	p.fd = u.fd = udp_socket();
	if (connect(u.fd, (struct sockaddr *)&to, sizeof(to)))
		die(errno, "connect");
	for (int i = 0; i < 50; i++) {
		if (send(u.fd, HELLO, sizeof(HELLO), 0) < 0 && errno != ECONNREFUSED)
			die(errno, "hello");
		if (poll(&p, 1, 200) > 0 && recv(u.fd, u.big, sizeof(u.big), 0) > 0) {
			tell("ready");
			return serve();
		}
	}
	die(0, "no hello came back");
}
