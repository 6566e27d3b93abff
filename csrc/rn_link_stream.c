/* rn_link_stream.c - the stream kind: 4 bytes of length, high byte first, then the frame (QEMU `-netdev stream`, passt,
 * gvproxy and socket_vmnet on a stream socket).
 *
 * Reading: one read() brings as many frames as wait, up to 256 KiB, and they are handed out one by one. A length that
 * no frame has (0, or beyond RN_LINK_WORD_MAX) means that the peer speaks something else, or that bytes went missing:
 * where the next frame begins cannot be known, so that the connection is of no more use. A frame that is merely longer
 * than the link allows is skipped, and so is one too short for its virtio-net header.
 *
 * Segments of one TCP connection that lie behind each other in the buffer are handed out as one super-frame (rn_gro.h), if
 * the caller allows it: a guest that cuts them itself then costs the stages behind it little more than one that does not.
 *
 * Writing: small frames are collected and go with the next large one, or by the flush; a large one, and what segments a
 * frame becomes, are gathered from where they lie. What a full socket does not take is copied and held, from the byte
 * where it stopped: within a record nothing else may be written. More is taken until RN_LINK_HIGH bytes are held.
 */
#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "rn_gro.h"
#include "rn_link_kinds.h"

#define BATCH 64 /* segments a sendmsg, of two pieces each */

/* --- reading --- */

/* More bytes. 1: there are; else what the read said. After a short read it is asked again all the same: the event of what
 * came behind it may have been told while frames still waited here. */
static int64_t fill(const struct rn_link *l, struct rn_link_state *st)
{
	ssize_t n;

	if (st->in_at) {
		memmove(st->in, st->in + st->in_at, st->in_fill - st->in_at);
		st->in_fill -= st->in_at;
		st->in_at = 0;
	}
	do
		n = recv(l->fd, st->in + st->in_fill, RN_LINK_IN - st->in_fill, 0);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	if (n == 0)
		return st->in_fill || st->skip ? -ENODATA : 0;
	st->in_fill += (uint32_t)n;
	return 1;
}

/* The record at in_at + @at, if it is there, whole and a frame: its bytes; 0: it is not. */
static uint32_t whole(const struct rn_link *l, uint32_t at)
{
	const struct rn_link_state *st = l->state;
	uint32_t have = st->in_fill - st->in_at - at, n;

	if (have < RN_LINK_LEN)
		return 0;
	n = rn_get32(st->in + st->in_at + at);
	return n <= have - RN_LINK_LEN && n <= l->frame_max ? n : 0;
}

/* The @n-byte frame at in_at is in @vnet_then_frame: add the segments that follow it. Bytes of frame in the end. */
static uint32_t merge(const struct rn_link *l, uint8_t *vnet_then_frame, uint32_t n)
{
	struct rn_link_state *st = l->state;
	uint32_t at = RN_LINK_LEN + n, next = whole(l, at);
	uint8_t *frame = vnet_then_frame + RN_VNET_HLEN;
	struct rn_gro g;

	if (!next || !rn_gro_begin(&g, frame, n) || !rn_gro_follows(&g, st->in + st->in_at + at + RN_LINK_LEN, next) ||
	    !rn_gro_intact(frame, n)) /* last: most are found to be alone without reading them */
		return n;
	for (;;) {
		const uint8_t *from = st->in + st->in_at + at + RN_LINK_LEN;

		memcpy(frame + g.len - (next - g.hlen), from + g.hlen, next - g.hlen);
		at += RN_LINK_LEN + next;
		next = whole(l, at);
		if (!next || !rn_gro_follows(&g, st->in + st->in_at + at + RN_LINK_LEN, next))
			break;
	}
	rn_gro_finish(&g, vnet_then_frame);
	st->in_at += at - RN_LINK_LEN - n; /* the caller counts the first */
	return g.len;
}

int64_t rn_link_stream_read(const struct rn_link *l, uint8_t *vnet_then_frame)
{
	uint32_t header = l->vnet ? RN_VNET_HLEN : 0, max = header || l->unfinished ? header + rn_link_read_limit(l) : l->frame_max;
	struct rn_link_state *st = l->state;

	if (!st)
		return -EINVAL;
	for (;;) {
		uint32_t have = st->in_fill - st->in_at;
		int64_t more;

		if (st->skip) {
			uint32_t n = st->skip < have ? st->skip : have;

			st->in_at += n;
			st->skip -= n;
			if (!st->skip)
				return st->skip_says;
		} else if (have >= RN_LINK_LEN) {
			uint32_t n = rn_get32(st->in + st->in_at);

			if (!n || n > RN_LINK_WORD_MAX)
				return -EPROTO; /* and again, should anybody ask */
			if (n > max || n <= header) {
				st->in_at += RN_LINK_LEN;
				st->skip = n;
				st->skip_says = n > max ? -EMSGSIZE : -EBADMSG;
				continue;
			}
			if (have - RN_LINK_LEN >= n) {
				const uint8_t *at = st->in + st->in_at + RN_LINK_LEN;

				memcpy(vnet_then_frame + RN_VNET_HLEN - header, at, n);
				if (!header)
					rn_link_head(l, vnet_then_frame, n);
				have = l->merge && !header ? merge(l, vnet_then_frame, n) : n - header;
				st->in_at += RN_LINK_LEN + n;
				return have;
			}
		}
		more = fill(l, st);
		if (more <= 0)
			return more;
	}
}

/* --- writing --- */

/* What is held goes first; then @n pieces that end with a whole record. Returns 0, or a negative errno but EAGAIN: what
 * the socket does not take is held. */
static int gather(const struct rn_link *l, struct iovec *iov, uint32_t n)
{
	struct rn_link_state *st = l->state;
	struct msghdr m = { .msg_iov = iov, .msg_iovlen = n + 1 };
	size_t took = 0;
	ssize_t sent;

	iov[0] = (struct iovec){ .iov_base = st->out + st->out_at, .iov_len = st->out_fill - st->out_at };
	do
		sent = sendmsg(l->fd, &m, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	if (sent < 0 && errno != EAGAIN) {
		int err = -errno;

		st->out_at = st->out_fill = 0;
		return err;
	}
	if (sent > 0)
		took = (size_t)sent;
	if (took < iov[0].iov_len) {
		st->out_at += (uint32_t)took;
		took = 0;
	} else {
		took -= iov[0].iov_len;
		st->out_at = st->out_fill = 0;
	}
	for (uint32_t i = 1; i <= n; i++) {
		size_t bytes = iov[i].iov_len;

		if (took >= bytes) {
			took -= bytes;
			continue;
		}
		if (st->out_at && st->out_fill + (bytes - took) > RN_LINK_OUT) {
			memmove(st->out, st->out + st->out_at, st->out_fill - st->out_at);
			st->out_fill -= st->out_at;
			st->out_at = 0;
		}
		memcpy(st->out + st->out_fill, (uint8_t *)iov[i].iov_base + took, bytes - took);
		st->out_fill += (uint32_t)(bytes - took);
		took = 0;
	}
	return 0;
}

int rn_link_stream_flush(const struct rn_link *l)
{
	struct iovec held;
	int err = gather(l, &held, 0);

	return err ? err : rn_link_held(l) ? -EAGAIN : 0;
}

/* A frame that is finished here: each segment is a length, headers and payload, in two pieces. */
static int write_segments(const struct rn_link *l, const uint8_t *vnet_then_frame, uint32_t len)
{
	uint8_t heads[BATCH][RN_LINK_LEN + RN_GSO_HEAD_MAX];
	struct iovec iov[1 + 2 * BATCH];
	struct rn_gso g;
	int segs = rn_link_finish(l, &g, vnet_then_frame, len);

	if (segs < 0)
		return segs;
	for (int at = 0; at < segs; at += BATCH) {
		uint32_t n = (uint32_t)(segs - at < BATCH ? segs - at : BATCH);
		int err;

		for (uint32_t i = 0; i < n; i++) {
			const uint8_t *payload;
			uint32_t bytes;

			rn_gso_next(&g, heads[i] + RN_LINK_LEN, &payload, &bytes);
			rn_put32(heads[i], g.hlen + bytes);
			iov[1 + 2 * i] = (struct iovec){ .iov_base = heads[i], .iov_len = RN_LINK_LEN + g.hlen };
			iov[2 + 2 * i] = (struct iovec){ .iov_base = (void *)payload, .iov_len = bytes };
		}
		err = gather(l, iov, 2 * n);
		if (err)
			return err;
	}
	return 0;
}

int rn_link_stream_write(const struct rn_link *l, const uint8_t *vnet_then_frame, uint32_t len)
{
	uint32_t header = l->vnet ? RN_VNET_HLEN : 0, n = header + len;
	const uint8_t *from = vnet_then_frame + RN_VNET_HLEN - header;
	struct rn_link_state *st = l->state;
	struct iovec iov[3];
	uint8_t word[RN_LINK_LEN];

	if (!st)
		return -EINVAL;
	if (rn_link_held(l) >= RN_LINK_HIGH) {
		int err = rn_link_stream_flush(l);

		if (err && (err != -EAGAIN || rn_link_held(l) >= RN_LINK_HIGH))
			return err;
	}
	if (rn_link_must_finish(l, vnet_then_frame))
		return write_segments(l, vnet_then_frame, len);
	if (len > (header ? RN_FRAME_MAX : l->frame_max))
		return -EMSGSIZE;
	if (n <= RN_LINK_SMALL && st->out_fill + RN_LINK_LEN + n <= RN_LINK_OUT) {
		rn_link_hold(st, from, 0, from, n);
		return 0;
	}
	rn_put32(word, n);
	iov[1] = (struct iovec){ .iov_base = word, .iov_len = RN_LINK_LEN };
	iov[2] = (struct iovec){ .iov_base = (void *)from, .iov_len = n };
	return gather(l, iov, 2);
}
