/* rn_link.c - one frame in, one frame out, for each kind of guest link.
 *
 * A frame buffer has its 12-byte virtio-net header right in front of the Ethernet header (rn_arena.h), so
 * that a link with headers moves both with one read() or write() and no iovec. A link without them moves
 * the frame alone, and the reader finds a header of zeros: "checksums complete, no segmentation".
 *
 * What the kernel does at the edges (Linux 5.10 to 6.18), which the callers' error handling rests on:
 *   tap     read:  a frame longer than the buffer is cut and the cut length returned, so one byte more
 *                  than the limit is asked for; EAGAIN when nothing waits; EBADFD when the device is gone.
 *           write: EIO while the interface is down; EINVAL for a virtio-net header it does not like.
 *   dgram   read:  MSG_TRUNC returns the true length. A closed peer is not seen by reading (SOCK_DGRAM has
 *                  no end of file; SOCK_SEQPACKET has); an empty datagram reads as 0 bytes and is a runt.
 *           write: EAGAIN when the peer's queue is full, ECONNREFUSED or ENOTCONN when it is closed.
 */
#include "rn_link.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "rn_proto.h"

/* A link with virtio-net headers may carry super-frames, whatever its MTU (virtio 1.2 5.1.6.2). */
static uint32_t read_limit(const struct rn_link *l)
{
	return l->vnet && l->frame_max < RN_FRAME_MAX ? RN_FRAME_MAX : l->frame_max;
}

/* Did a read of 0 bytes mean the end, or an empty datagram? Asked only then. */
static int is_datagram(int fd)
{
	int type = 0;
	socklen_t len = sizeof(type);

	return !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) && type == SOCK_DGRAM;
}

int64_t rn_link_read(const struct rn_link *l, uint8_t *vnet_then_frame, uint32_t cap)
{
	uint32_t skip = l->vnet ? 0 : RN_VNET_HLEN;
	uint32_t max = RN_VNET_HLEN + read_limit(l);
	ssize_t n;

	if (cap <= max)
		return -EINVAL;
	do {
		if (l->kind == RN_LINK_DGRAM)
			n = recv(l->fd, vnet_then_frame + skip, max + 1 - skip, MSG_TRUNC);
		else
			n = read(l->fd, vnet_then_frame + skip, max + 1 - skip);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	if (n == 0)
		return l->kind == RN_LINK_DGRAM && is_datagram(l->fd) ? -EBADMSG : 0;
	if ((uint64_t)n > max - skip)
		return -EMSGSIZE;
	if (!l->vnet) {
		memset(vnet_then_frame, 0, RN_VNET_HLEN);
		return n;
	}
	if (n <= (ssize_t)RN_VNET_HLEN)
		return -EBADMSG;
	return n - (ssize_t)RN_VNET_HLEN;
}

int rn_link_write(const struct rn_link *l, const uint8_t *vnet_then_frame, uint32_t len)
{
	uint32_t skip = l->vnet ? 0 : RN_VNET_HLEN;
	size_t want = (size_t)len + RN_VNET_HLEN - skip;
	ssize_t n;

	do {
		/* MSG_NOSIGNAL: a peer that left is a counted drop, not a SIGPIPE. */
		if (l->kind == RN_LINK_DGRAM)
			n = send(l->fd, vnet_then_frame + skip, want, MSG_NOSIGNAL);
		else
			n = write(l->fd, vnet_then_frame + skip, want);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	return (size_t)n == want ? 0 : -EIO; /* frames go whole or not at all */
}
