/* ready.c - the moment a guest's network begins to work: a connection that succeeds.
 *
 * Started before there is an interface. Tries at each change of interfaces, addresses or routes that netlink tells of,
 * and, because an early SYN may be lost, with a fresh socket each AGAIN_MS after.
 */
#include "load.h"

#include <errno.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#define AGAIN_MS 2
#define TRIES 64

static int news(void)
{
	struct sockaddr_nl nl = { .nl_family = AF_NETLINK,
				  .nl_groups = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE };
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_ROUTE);

	if (fd < 0 || bind(fd, (struct sockaddr *)&nl, sizeof(nl)))
		die(errno, "netlink");
	return fd;
}

static int attempt(const struct sockaddr_in *to)
{
	int fd = tcp_socket(1);

	if (connect(fd, (const struct sockaddr *)to, sizeof(*to)) && errno != EINPROGRESS) {
		close(fd);
		return -1; /* no route yet */
	}
	return fd;
}

int mode_ready(int argc, char **argv)
{
	struct sockaddr_in to = address(argv[1], argv[2]);
	uint64_t end = now_ns() + (uint64_t)(number(argv[3], 0.1, 600, "seconds") * 1e9);
	struct pollfd p[1 + TRIES] = { { .fd = news(), .events = POLLIN } };
	nfds_t n = 1;

	(void)argc;
	tell("waiting");
	while (now_ns() < end) {
		char junk[8192];
		int fd = n <= TRIES ? attempt(&to) : -1;

		if (fd >= 0)
			p[n++] = (struct pollfd){ .fd = fd, .events = POLLOUT };
		if (poll(p, n, n > 1 ? AGAIN_MS : 1000) < 0)
			die(errno, "poll");
		while (recv(p[0].fd, junk, sizeof(junk), 0) > 0)
			;
		for (nfds_t i = 1; i < n; i++) {
			int err = 0;
			socklen_t l = sizeof(err);

			if (!p[i].revents)
				continue;
			getsockopt(p[i].fd, SOL_SOCKET, SO_ERROR, &err, &l);
			if (!err) {
				tell("{\"at_ns\": %llu}", (unsigned long long)now_ns());
				return 0;
			}
			close(p[i].fd);
			p[i--] = p[--n];
		}
	}
	die(0, "no connection to %s port %s in %s s", argv[1], argv[2], argv[3]);
}
