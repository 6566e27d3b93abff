/* rn_errqueue.c - one entry of a socket's error queue (ip(7), IP_RECVERR) */
#include "rn_errqueue.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h> /* before errqueue.h, which uses struct timespec */
#include <linux/errqueue.h>

/**
 * rn_errqueue_next() - Take the oldest entry, without waiting
 * @fd:		IPv4 UDP or ping socket with IP_RECVERR
 * @out:	what it says
 * @data:	what the error quoted of the datagram, out->len bytes
 * @size:	room there; what is longer is cut
 *
 * Return: 1; 0 if there is none; -1 if there was one that says nothing about an IPv4 datagram (go on with the next).
 */
int rn_errqueue_next(int fd, struct rn_sock_error *out, uint8_t *data, uint32_t size)
{
	union {
		char raw[CMSG_SPACE(sizeof(struct sock_extended_err) + sizeof(struct sockaddr_in6)) + 64];
		struct cmsghdr align;
	} control;
	struct sockaddr_in dst;
	struct iovec iov = { data, size };
	struct msghdr m = { .msg_name = &dst,
			    .msg_namelen = sizeof(dst),
			    .msg_iov = &iov,
			    .msg_iovlen = 1,
			    .msg_control = &control,
			    .msg_controllen = sizeof(control) };
	ssize_t len = recvmsg(fd, &m, MSG_ERRQUEUE | MSG_DONTWAIT);

	if (len < 0)
		return 0;
	if (m.msg_namelen < sizeof(dst) || dst.sin_family != AF_INET)
		return -1;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		struct sock_extended_err ee;
		struct sockaddr_in offender = { 0 };

		if (c->cmsg_level != IPPROTO_IP || c->cmsg_type != IP_RECVERR || c->cmsg_len < CMSG_LEN(sizeof(ee)))
			continue;
		memcpy(&ee, CMSG_DATA(c), sizeof(ee));
		if (c->cmsg_len >= CMSG_LEN(sizeof(ee) + sizeof(offender)))
			memcpy(&offender, CMSG_DATA(c) + sizeof(ee), sizeof(offender));
		*out = (struct rn_sock_error){
			.origin = ee.ee_origin,
			.type = ee.ee_type,
			.code = ee.ee_code,
			.offender_known = offender.sin_family == AF_INET,
			.dst_port = dst.sin_port,
			.error = ee.ee_errno,
			.info = ee.ee_info,
			.len = (uint32_t)len,
		};
		memcpy(out->dst, &dst.sin_addr, 4);
		memcpy(out->offender, &offender.sin_addr, 4);
		return 1; /* the kernel puts one error into a message */
	}
	return -1;
}
