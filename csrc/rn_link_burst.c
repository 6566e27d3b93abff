/* rn_link_burst.c - datagrams read many a system call, so that segments of one connection can be merged.
 *
 * For a reader that takes super-frames, on a link whose frames are small: they come into slots of frame_max bytes, and what
 * is the middle of one connection goes on as one frame (rn_gro.h). The others are copied once more than by rn_link_read()
 * alone, which costs 8 % at 1500 bytes; a merged segment costs a tenth of one that is not.
 */
#include <errno.h>
#include <sys/socket.h>

#include "rn_gro.h"
#include "rn_link_kinds.h"

static uint32_t slot_size(const struct rn_link *l)
{
	return (l->frame_max + RN_CACHE_LINE) / RN_CACHE_LINE * RN_CACHE_LINE;
}

/* 0: there are datagrams in slots; else a negative errno. */
static int fill(const struct rn_link *l)
{
	struct rn_link_state *st = l->state;
	struct mmsghdr m[RN_LINK_BURST];
	struct iovec iov[RN_LINK_BURST];
	int n;

	if (st->in_at < st->in_fill)
		return 0;
	memset(m, 0, sizeof(m));
	for (uint32_t i = 0; i < RN_LINK_BURST; i++) {
		iov[i] = (struct iovec){ .iov_base = st->in + i * slot_size(l), .iov_len = slot_size(l) };
		m[i].msg_hdr.msg_iov = &iov[i];
		m[i].msg_hdr.msg_iovlen = 1;
	}
	do
		n = recvmmsg(l->fd, m, RN_LINK_BURST, MSG_TRUNC, NULL);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	for (int i = 0; i < n; i++)
		st->in_len[i] = m[i].msg_len; /* MSG_TRUNC: all of it, also what did not fit */
	st->in_at = 0;
	st->in_fill = (uint32_t)n;
	return 0;
}

/* The next datagram, if it waits in a slot and fits the link. */
static uint32_t next_of(const struct rn_link *l, const uint8_t **frame)
{
	const struct rn_link_state *st = l->state;

	if (st->in_at == st->in_fill || st->in_len[st->in_at] > l->frame_max)
		return 0;
	*frame = st->in + st->in_at * slot_size(l);
	return st->in_len[st->in_at];
}

/* The @n-byte frame at @vnet_then_frame was the last: add the segments that follow it. Bytes of frame in the end. */
static uint32_t merge(const struct rn_link *l, uint8_t *vnet_then_frame, uint32_t n)
{
	uint8_t *frame = vnet_then_frame + RN_VNET_HLEN;
	const uint8_t *from;
	uint32_t next = next_of(l, &from);
	struct rn_gro g;

	if (!next || !rn_gro_begin(&g, frame, n) || !rn_gro_follows(&g, from, next) || !rn_gro_intact(frame, n))
		return n;
	do {
		memcpy(frame + g.len - (next - g.hlen), from + g.hlen, next - g.hlen);
		l->state->in_at++;
		next = next_of(l, &from);
	} while (next && rn_gro_follows(&g, from, next));
	rn_gro_finish(&g, vnet_then_frame);
	return g.len;
}

int64_t rn_link_burst_read(const struct rn_link *l, uint8_t *vnet_then_frame)
{
	struct rn_link_state *st = l->state;
	int err = fill(l);
	uint32_t n, i;

	if (err)
		return err;
	i = st->in_at++;
	n = st->in_len[i];
	if (!n)
		return 0;
	if (n > l->frame_max)
		return -EMSGSIZE;
	memcpy(vnet_then_frame + RN_VNET_HLEN, st->in + i * slot_size(l), n);
	rn_link_head(l, vnet_then_frame, n);
	return merge(l, vnet_then_frame, n);
}
