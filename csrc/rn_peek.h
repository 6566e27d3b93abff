/* rn_peek.h - bytes of a host socket read without taking them, and taken without reading them (I2).
 *
 * SO_PEEK_OFF (socket(7); on TCP since Linux 6.9) lets a peek begin anywhere. Older kernels peek from the front only:
 * what is in flight already is read past, into a buffer nobody looks at.
 */
#ifndef RN_PEEK_H
#define RN_PEEK_H

#include "rn_layout.h"

#include <sys/types.h>
#include <sys/uio.h>

#define RN_PEEK_UNKNOWN UINT32_MAX /* *@at: where the socket's offset stands is not known */
#define RN_PEEK_SKIP (64u << 10)
#define RN_PEEK_IOV 1024u /* UIO_MAXIOV */

struct rn_peek_skip { /* for sockets without SO_PEEK_OFF; one a process */
	struct iovec iov[RN_PEEK_IOV]; /* all entries are the same bytes */
	uint8_t bytes[RN_PEEK_SKIP];
};
void rn_peek_skip_init(struct rn_peek_skip *k);

/**
 * rn_peek_at() - Peek by SO_PEEK_OFF
 * @at:		Where the socket's offset stands, kept by the caller; moves with what is read
 * @off:	Bytes from the front of the receive queue
 * Return: bytes, 0 at the end, -errno.
 */
ssize_t rn_peek_at(int fd, uint32_t *at, uint32_t off, uint8_t *to, uint32_t len);

/**
 * rn_peek_past() - Peek past @off bytes
 * Return: bytes; 0: nothing behind them, or the end, which a peek cannot tell apart; -EAGAIN: the kernel stopped before
 *         (urgent mark), or the queue is empty; other -errno.
 */
ssize_t rn_peek_past(int fd, struct rn_peek_skip *k, uint32_t off, uint8_t *to, uint32_t len);

/* Take @n bytes out of a TCP socket unread (MSG_TRUNC, tcp(7)); *@at moves back with the kernel's. 0 or -errno. */
int rn_peek_discard(int fd, uint32_t *at, uint32_t n);

#endif
