/* rr.c - request and response. The clients block, one request at a time: what is measured is the way there and back. */
#include "load.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define SIZE_MAX_B (4u << 20)
#define SAMPLES_MAX (1u << 22)
#define CRR_MAX 50000u /* connections: a port each, all of them in TIME-WAIT afterwards */
#define PATIENCE_MS 1000

struct samples {
	uint64_t *ns;
	size_t n, lost;
	uint64_t begin, end;
};

static void begin(struct samples *s, const char *seconds)
{
	s->ns = malloc(SAMPLES_MAX * sizeof(*s->ns));
	if (!s->ns)
		die(ENOMEM, "samples");
	s->n = s->lost = 0;
	s->begin = now_ns();
	s->end = s->begin + (uint64_t)(number(seconds, 0.001, 3600, "seconds") * 1e9);
}

static int finish(struct samples *s)
{
	tell_latencies(s->ns, s->n, s->lost, (double)(now_ns() - s->begin) / 1e9);
	free(s->ns);
	return 0;
}

static void send_all(int fd, const uint8_t *buf, size_t len)
{
	while (len) {
		ssize_t n = send(fd, buf, len, 0);

		if (n < 0 && errno == EAGAIN) { /* the server's sockets do not block */
			struct pollfd p = { .fd = fd, .events = POLLOUT };

			poll(&p, 1, PATIENCE_MS);
			continue;
		}
		if (n < 0)
			die(errno, "send");
		buf += n;
		len -= (size_t)n;
	}
}

static void recv_all(int fd, uint8_t *buf, size_t len)
{
	while (len) {
		ssize_t n = recv(fd, buf, len, 0);

		if (n <= 0)
			die(n ? errno : 0, "the answer did not come");
		buf += n;
		len -= (size_t)n;
	}
}

static void patience(int fd)
{
	struct timeval tv = { .tv_sec = PATIENCE_MS / 1000 };

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
}

static int connected(const struct sockaddr_in *to)
{
	int fd = tcp_socket(0);

	if (connect(fd, (const struct sockaddr *)to, sizeof(*to)))
		die(errno, "connect");
	no_delay(fd);
	return fd;
}

int mode_rr(int argc, char **argv)
{
	struct sockaddr_in to = address(argv[1], argv[2]);
	size_t size = (size_t)number(argv[4], 1, SIZE_MAX_B, "size");
	uint8_t *buf = calloc(1, size);
	struct samples s;
	int fd;

	(void)argc;
	if (!buf)
		die(ENOMEM, "a message");
	fd = connected(&to);
	for (begin(&s, argv[3]); s.n < SAMPLES_MAX;) {
		uint64_t t = now_ns();

		if (t >= s.end)
			break;
		send_all(fd, buf, size);
		recv_all(fd, buf, size);
		s.ns[s.n++] = now_ns() - t;
	}
	close(fd);
	free(buf);
	return finish(&s);
}

int mode_udp_rr(int argc, char **argv)
{
	struct sockaddr_in to = address(argv[1], argv[2]);
	size_t size = (size_t)number(argv[4], 8, 65000, "size");
	uint8_t *buf = calloc(1, 65536);
	uint64_t count = 0;
	struct samples s;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	(void)argc;
	if (!buf || fd < 0 || connect(fd, (const struct sockaddr *)&to, sizeof(to)))
		die(errno, "UDP socket");
	patience(fd);
	for (begin(&s, argv[3]); s.n < SAMPLES_MAX;) {
		uint64_t t = now_ns(), back;
		ssize_t n;

		if (t >= s.end)
			break;
		count++;
		memcpy(buf, &count, sizeof(count));
		if (send(fd, buf, size, 0) < 0 && errno != ECONNREFUSED)
			die(errno, "send");
		do { /* an answer to one given up as lost is not this one's */
			n = recv(fd, buf, 65536, 0);
			memcpy(&back, buf, sizeof(back));
		} while (n >= (ssize_t)sizeof(back) && back != count);
		if (n < 0 && errno != EAGAIN && errno != ECONNREFUSED)
			die(errno, "recv");
		if (n < (ssize_t)sizeof(back))
			s.lost++;
		else
			s.ns[s.n++] = now_ns() - t;
	}
	close(fd);
	free(buf);
	return finish(&s);
}

int mode_crr(int argc, char **argv)
{
	struct sockaddr_in to = address(argv[1], argv[2]);
	struct samples s;

	(void)argc;
	for (begin(&s, argv[3]); s.n < CRR_MAX;) {
		uint64_t t = now_ns();
		uint8_t byte = 'x';
		int fd;

		if (t >= s.end)
			break;
		fd = connected(&to);
		send_all(fd, &byte, 1);
		recv_all(fd, &byte, 1);
		close(fd);
		s.ns[s.n++] = now_ns() - t;
	}
	return finish(&s);
}

/* --- the server: epoll, level-triggered; data.u64 = bytes of the request still missing << 32 | descriptor --- */

static void watch(int ep, int op, int fd, uint64_t missing)
{
	struct epoll_event e = { .events = EPOLLIN, .data.u64 = missing << 32 | (uint32_t)fd };

	if (epoll_ctl(ep, op, fd, &e))
		die(errno, "epoll_ctl");
}

static void serve_datagrams(int fd, uint8_t *buf)
{
	for (int i = 0; i < 64; i++) {
		struct sockaddr_in from;
		socklen_t l = sizeof(from);
		ssize_t n = recvfrom(fd, buf, 65536, MSG_DONTWAIT, (struct sockaddr *)&from, &l);

		if (n < 0)
			return;
		sendto(fd, buf, (size_t)n, 0, (struct sockaddr *)&from, l);
	}
}

int mode_serve(int argc, char **argv)
{
	struct sockaddr_in at = address(argv[1], argv[2]);
	size_t size = (size_t)number(argv[3], 1, SIZE_MAX_B, "size");
	int tcp = listen_on(&at), udp = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), ep = epoll_create1(EPOLL_CLOEXEC);
	uint8_t *buf = calloc(1, size > 65536 ? size : 65536);

	(void)argc;
	if (!buf || ep < 0 || udp < 0 || bind(udp, (struct sockaddr *)&at, sizeof(at)))
		die(errno, "UDP port %s", argv[2]);
	watch(ep, EPOLL_CTL_ADD, STDIN_FILENO, 0);
	watch(ep, EPOLL_CTL_ADD, tcp, 0);
	watch(ep, EPOLL_CTL_ADD, udp, 0);
	tell("ready");
	for (;;) {
		struct epoll_event ev[64];
		int n = epoll_wait(ep, ev, 64, -1);

		for (int i = 0; i < n; i++) {
			int fd = (int)(uint32_t)ev[i].data.u64;
			uint64_t missing = ev[i].data.u64 >> 32;
			ssize_t got;

			if (fd == STDIN_FILENO)
				return 0;
			if (fd == udp) {
				serve_datagrams(udp, buf);
				continue;
			}
			if (fd == tcp) {
				int c = accept4(tcp, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

				if (c < 0)
					continue; /* it went away */
				no_delay(c);
				watch(ep, EPOLL_CTL_ADD, c, size);
				continue;
			}
			got = recv(fd, buf, missing, 0);
			if (got < 0 && errno == EAGAIN)
				continue;
			if (got <= 0) {
				close(fd);
				continue;
			}
			missing -= (uint64_t)got;
			if (!missing) { /* the client does nothing but read now: this ends */
				send_all(fd, buf, size);
				missing = size;
			}
			if (size > 1)
				watch(ep, EPOLL_CTL_MOD, fd, missing);
		}
	}
}
