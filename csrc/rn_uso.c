/* rn_uso.c - trains of datagrams to a host socket (contract: rn_uso.h).
 *
 * What the kernel asks of UDP_SEGMENT (Linux 4.18 to 6.18): at most 64 datagrams and an IP packet's bytes in all, each within
 * the MTU of the way (EINVAL, later EMSGSIZE), and an interface that computes checksums and no IPsec (EIO). So a train goes
 * in pieces of 64; a piece that is refused for a reason of its size goes a datagram a call, and the kernel fragments what
 * it would fragment of a datagram sent alone.
 *
 * system calls: sendmsg
 */
#include "rn_uso.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <string.h>

#include "rn_proto.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#define PIECE 64u /* datagrams: UDP_MAX_SEGMENTS of every kernel that has UDP_SEGMENT */
#define PIECE_BYTES (65535u - 60u - RN_UDP_HLEN) /* the kernel's own IP header may have options */

static int full(int err)
{
	return err == EAGAIN || err == ENOBUFS || err == ENOMEM;
}

/* Refused because of what it is, not because of where it goes: datagrams alone may be taken. */
static int by_its_size(int err)
{
	return err == EINVAL || err == EMSGSIZE || err == EIO || err == EOPNOTSUPP || err == ENOPROTOOPT;
}

/* 0, or a positive errno; tried again where the error may be an earlier datagram's. */
static int send_once(int fd, const struct msghdr *m)
{
	int err = 0;

	for (int tries = 0; tries < 2; tries++) {
		if (sendmsg(fd, m, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
			return 0;
		err = errno;
		if (full(err))
			break;
	}
	return err;
}

static void note(struct rn_uso *out, uint32_t n, int err)
{
	if (err) {
		out->lost += n;
		out->err = out->err ? out->err : err;
	} else {
		out->sent += n;
	}
}

static void each(int fd, const struct msghdr *how, const uint8_t *payload, uint32_t len, uint32_t size, struct rn_uso *out)
{
	uint32_t too_long = UINT32_MAX, at = 0; /* too_long: so many bytes were: no need to ask again */

	do { /* an empty datagram is one too (RFC 768) */
		uint32_t n = len - at < size ? len - at : size;
		struct iovec iov[2];
		struct msghdr m = *how;
		int err = EMSGSIZE;

		if (how->msg_iovlen)
			iov[0] = how->msg_iov[0];
		iov[how->msg_iovlen] = (struct iovec){ (void *)(uintptr_t)(payload + at), n };
		m.msg_iov = iov;
		m.msg_iovlen = how->msg_iovlen + 1;
		if (n < too_long)
			err = send_once(fd, &m);
		if (err == EMSGSIZE && n < too_long)
			too_long = n;
		note(out, 1, err);
		at += n;
	} while (at < len);
}

/* UDP_SEGMENT behind the control messages of @how. */
static size_t put_control(char *to, const struct msghdr *how, uint16_t size)
{
	size_t had = how->msg_control ? CMSG_ALIGN(how->msg_controllen) : 0;
	struct cmsghdr c = { .cmsg_len = CMSG_LEN(sizeof(size)), .cmsg_level = IPPROTO_UDP, .cmsg_type = UDP_SEGMENT };

	if (how->msg_control)
		memcpy(to, how->msg_control, how->msg_controllen);
	memcpy(to + had, &c, sizeof(c));
	memcpy(to + had + CMSG_LEN(0), &size, sizeof(size));
	return had + CMSG_SPACE(sizeof(size));
}

void rn_uso_send(int fd, const struct msghdr *how, const uint8_t *payload, uint32_t len, uint32_t size, struct rn_uso *out)
{
	uint32_t head = how->msg_iovlen ? (uint32_t)how->msg_iov[0].iov_len : 0, unit = head + size, most;
	union {
		char raw[RN_USO_CONTROL];
		struct cmsghdr align;
	} control = { .raw = { 0 } };
	struct iovec iov[2 * PIECE];
	struct msghdr m = *how;

	*out = (struct rn_uso){ 0 };
	if (rn_uso_count(len, size) == 1) {
		each(fd, how, payload, len, len, out);
		return;
	}
	if (2 * unit > PIECE_BYTES || CMSG_ALIGN(how->msg_controllen) + CMSG_SPACE(sizeof(uint16_t)) > sizeof(control)) {
		each(fd, how, payload, len, size, out);
		return;
	}
	most = PIECE_BYTES / unit < PIECE ? PIECE_BYTES / unit : PIECE;
	m.msg_iov = iov;
	m.msg_control = &control;
	m.msg_controllen = put_control(control.raw, how, (uint16_t)unit);
	for (uint32_t at = 0; at < len;) {
		uint32_t bytes = len - at < most * size ? len - at : most * size, n = rn_uso_count(bytes, size);
		int err;

		if (n == 1) { /* the last one, left over */
			each(fd, how, payload + at, bytes, bytes, out);
			return;
		}
		m.msg_iovlen = 0;
		if (!head)
			iov[m.msg_iovlen++] = (struct iovec){ (void *)(uintptr_t)(payload + at), bytes };
		for (uint32_t i = 0; head && i < n; i++) {
			uint32_t off = i * size, part = bytes - off < size ? bytes - off : size;

			iov[m.msg_iovlen++] = how->msg_iov[0];
			iov[m.msg_iovlen++] = (struct iovec){ (void *)(uintptr_t)(payload + at + off), part };
		}
		err = send_once(fd, &m);
		if (by_its_size(err))
			each(fd, how, payload + at, bytes, size, out);
		else
			note(out, n, err);
		at += bytes;
	}
}

void rn_uso_connected(int fd, const uint8_t *head, uint32_t head_len, const uint8_t *payload, uint32_t len, uint32_t size,
		      struct rn_uso *out)
{
	struct iovec front = { (void *)(uintptr_t)head, head_len };
	struct msghdr m = { .msg_iov = &front, .msg_iovlen = head_len ? 1 : 0 };

	rn_uso_send(fd, &m, payload, len, size, out);
}
