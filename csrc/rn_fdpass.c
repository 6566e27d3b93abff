/* rn_fdpass.c - SCM_RIGHTS, one descriptor a packet. */
#include "rn_fdpass.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

union one_fd {
	char raw[CMSG_SPACE(sizeof(int))];
	struct cmsghdr align;
};

int rn_fdpass_send(int sock, const struct rn_pass *p, int fd)
{
	struct rn_pass copy = *p;
	struct iovec iov = { &copy, sizeof(copy) };
	union one_fd control = { .raw = { 0 } };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	ssize_t n;

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	do
		n = sendmsg(sock, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : 0;
}

int rn_fdpass_recv(int sock, struct rn_pass *p)
{
	struct iovec iov = { p, sizeof(*p) };
	union one_fd control = { .raw = { 0 } };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control) };
	struct cmsghdr *c;
	int fd = -1;
	ssize_t n;

	do
		n = recvmsg(sock, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	if (n == 0)
		return -EPIPE;
	c = CMSG_FIRSTHDR(&m);
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(fd)))
		memcpy(&fd, CMSG_DATA(c), sizeof(fd));
	/* MSG_CTRUNC: more than one descriptor was sent, or we may have no more of them (EMFILE leaves none) */
	if (fd < 0)
		return m.msg_flags & MSG_CTRUNC ? -EMFILE : -EPROTO;
	if ((m.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) || n != (ssize_t)sizeof(*p)) {
		close(fd);
		return -EPROTO;
	}
	return fd;
}
