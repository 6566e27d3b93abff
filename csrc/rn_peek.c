/* rn_peek.c - recv(2) with MSG_PEEK and MSG_TRUNC. */
#include "rn_peek.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

void rn_peek_skip_init(struct rn_peek_skip *k)
{
	for (uint32_t i = 0; i < RN_PEEK_IOV; i++)
		k->iov[i].iov_base = k->bytes;
}

ssize_t rn_peek_at(int fd, uint32_t *at, uint32_t off, uint8_t *to, uint32_t len)
{
	ssize_t n;

	if (*at != off) {
		int o = (int)off;

		if (setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &o, sizeof(o)) < 0)
			return -errno;
		*at = off;
	}
	do
		n = recv(fd, to, len, MSG_PEEK | MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	*at += (uint32_t)n;
	return n;
}

ssize_t rn_peek_past(int fd, struct rn_peek_skip *k, uint32_t off, uint8_t *to, uint32_t len)
{
	struct msghdr m = { .msg_iov = k->iov };
	uint32_t left = off;
	ssize_t n;

	while (left && m.msg_iovlen < RN_PEEK_IOV - 1) {
		k->iov[m.msg_iovlen].iov_len = left < RN_PEEK_SKIP ? left : RN_PEEK_SKIP;
		left -= (uint32_t)k->iov[m.msg_iovlen++].iov_len;
	}
	if (left)
		return -EAGAIN; /* 63 MiB in flight: no window is that large */
	k->iov[m.msg_iovlen].iov_base = to;
	k->iov[m.msg_iovlen++].iov_len = len;
	do
		n = recvmsg(fd, &m, MSG_PEEK | MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	k->iov[m.msg_iovlen - 1].iov_base = k->bytes;
	if (n < 0)
		return -errno;
	if ((uint32_t)n < off)
		return -EAGAIN;
	return n - (ssize_t)off;
}

int rn_peek_discard(int fd, uint32_t *at, uint32_t n)
{
	while (n) {
		ssize_t k = recv(fd, NULL, n, MSG_TRUNC | MSG_DONTWAIT);

		if (k < 0 && errno == EINTR)
			continue;
		if (k <= 0)
			return k < 0 ? -errno : -EPIPE;
		n -= (uint32_t)k;
		if (*at != RN_PEEK_UNKNOWN) /* never below 0 */
			*at = *at > (uint32_t)k ? *at - (uint32_t)k : 0;
	}
	return 0;
}
