/* rn_link.c - frames in and out, for each kind of guest link; here the kinds that carry one a system call.
 *
 * A frame buffer has its 12-byte virtio-net header right in front of the Ethernet header (rn_arena.h), so
 * that a link with headers moves both with one read() or write() and no iovec. A link without them moves
 * the frame alone, and the reader finds a header of zeros: "checksums complete, no segmentation"; or, where the peer took
 * it off, what it may have said.
 *
 * Datagrams are read one a system call where each is a frame of its own: recvmmsg() into slots, 32 at once, was measured to
 * take 1.55 against 1.63 us a frame of 60 bytes, but 1.95 against 1.80 at 1500, because the frame is then copied once more to
 * where it is wanted. Where segments may be merged it is many a call (rn_link_burst.c).
 *
 * What the kernel does at the edges (Linux 5.10 to 6.18), which the callers' error handling rests on:
 *   tap     read:  a frame longer than the buffer is cut and the cut length returned, so one byte more
 *                  than the limit is asked for; EAGAIN when nothing waits; EBADFD when the device is gone.
 *           write: EIO while the interface is down; EINVAL for a virtio-net header it does not like.
 *   dgram   read:  MSG_TRUNC returns the true length. A closed peer is not seen by reading (SOCK_DGRAM has
 *                  no end of file; SOCK_SEQPACKET has); an empty datagram reads as 0 bytes and is a runt.
 *           write: EAGAIN when the peer's queue is full, ECONNREFUSED or ENOTCONN when it is closed.
 *   stream  read:  0 at the end, ECONNRESET if the peer left with unread bytes of ours.
 *           write: takes a part when its buffer is nearly full, EPIPE when the peer has left.
 */
#include "rn_link.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "rn_link_kinds.h"

static int in_bursts(const struct rn_link *l)
{
	return l->kind == RN_LINK_DGRAM && l->merge && !l->vnet && !l->unfinished && l->frame_max <= RN_LINK_BURST_FRAME;
}

int rn_link_open(struct rn_link *l)
{
	struct rn_link_state *st;

	l->state = NULL;
	if (l->vnet && l->kind != RN_LINK_STREAM)
		return 0; /* nothing is ever held */
	st = calloc(1, sizeof(*st));
	if (!st)
		return -ENOMEM;
	/* Not touched before they are used: the reader's `out` and the writer's `in` cost no memory. */
	st->out = malloc(RN_LINK_OUT);
	if (l->kind == RN_LINK_STREAM)
		st->in = malloc(RN_LINK_IN);
	else if (in_bursts(l))
		st->in = malloc(RN_LINK_BURST * (l->frame_max + RN_CACHE_LINE));
	l->state = st;
	if (!st->out || (!st->in && (l->kind == RN_LINK_STREAM || in_bursts(l)))) {
		rn_link_close(l);
		return -ENOMEM;
	}
	return 0;
}

void rn_link_close(struct rn_link *l)
{
	if (!l->state)
		return;
	free(l->state->in);
	free(l->state->out);
	free(l->state);
	l->state = NULL;
}

int rn_link_atomic(const struct rn_link *l)
{
	return l->kind != RN_LINK_STREAM;
}

uint32_t rn_link_held(const struct rn_link *l)
{
	return l->state ? l->state->out_fill - l->state->out_at : 0;
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
	uint32_t max = RN_VNET_HLEN + rn_link_read_limit(l);
	ssize_t n;

	if (cap <= max)
		return -EINVAL;
	if (l->kind == RN_LINK_STREAM)
		return rn_link_stream_read(l, vnet_then_frame);
	if (l->state && l->state->in) {
		n = rn_link_burst_read(l, vnet_then_frame);
		return n == 0 && is_datagram(l->fd) ? -EBADMSG : n;
	}
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
		rn_link_head(l, vnet_then_frame, (uint32_t)n);
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

	if (l->kind == RN_LINK_STREAM)
		return rn_link_stream_write(l, vnet_then_frame, len);
	if (RN_UNLIKELY(rn_link_held(l))) {
		int err = rn_link_segments_flush(l);

		if (err)
			return err;
	}
	if (rn_link_must_finish(l, vnet_then_frame))
		return rn_link_segments_write(l, vnet_then_frame, len);
	if (!l->vnet && len > l->frame_max)
		return -EMSGSIZE;
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

int rn_link_flush(const struct rn_link *l)
{
	if (!rn_link_held(l))
		return 0;
	return l->kind == RN_LINK_STREAM ? rn_link_stream_flush(l) : rn_link_segments_flush(l);
}

int rn_link_put(const struct rn_link *l, const uint8_t *eth, uint32_t len)
{
	struct rn_vnet_hdr vnet;

	if (l->fd < 0)
		return -ENODEV;
	memcpy(&vnet, eth - RN_VNET_HLEN, sizeof(vnet));
	if (len < RN_ETH_HLEN || (len > l->frame_max && vnet.gso_type == RN_VNET_GSO_NONE))
		return -EMSGSIZE;
	return rn_link_write(l, eth - RN_VNET_HLEN, len);
}

int rn_link_read_ended(int64_t err)
{
	switch (err) {
	case -EPROTO:	  /* a stream whose next frame nobody can find, */
	case -ENODATA:	  /* that ended inside a frame, */
	case -ECONNRESET: /* or whose peer left with our bytes unread */
	case -EBADFD:	  /* the tap was deleted, */
	case -EFAULT:	  /* or its queue taken away */
	case -ENODEV:
	case -ENXIO:
	case -EBADF:
	case -EINVAL:
		return 1;
	}
	return 0; /* not known to pass by itself: wait for the next event instead of trying in a circle */
}

enum rn_link_down rn_link_write_down(int err)
{
	switch (err) {
	case -EIO: /* tap: not up */
	case -ENETDOWN:
	case -EBADFD: /* tap: deleted */
	case -ENODEV:
	case -ENXIO:
	case -EBADF:
		return RN_LINK_DOWN;
	case -ECONNREFUSED: /* socket: peer closed */
	case -ECONNRESET:
	case -ENOTCONN:
	case -EPIPE:
		return RN_LINK_LEFT;
	}
	return RN_LINK_UP;
}
