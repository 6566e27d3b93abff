/* rn_link_segments.c - a datagram link without virtio-net headers, and a frame that needs what they say.
 *
 * Segments are gathered where they lie and go BATCH a system call. When the link is full in the middle of a frame, the
 * rest is copied and held: the frame was begun, so that it cannot be refused any more. At most one frame is held,
 * because nothing is taken before it has gone.
 */
#include <errno.h>
#include <sys/socket.h>

#include "rn_link_kinds.h"

#define BATCH 64 /* segments a sendmmsg */

static int send_batch(int fd, struct mmsghdr *m, uint32_t n)
{
	int sent;

	do
		sent = sendmmsg(fd, m, n, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent < 0 ? -errno : sent;
}

int rn_link_segments_write(const struct rn_link *l, const uint8_t *vnet_then_frame, uint32_t len)
{
	uint8_t heads[BATCH][RN_GSO_HEAD_MAX];
	struct iovec iov[BATCH][2];
	struct mmsghdr m[BATCH];
	struct rn_gso g;
	int segs = rn_link_finish(l, &g, vnet_then_frame, len), full = 0;

	if (segs < 0)
		return segs;
	if (l->kind != RN_LINK_DGRAM || !l->state)
		return -EINVAL; /* a tap always has headers */
	for (int at = 0; at < segs; at += BATCH) {
		uint32_t n = (uint32_t)(segs - at < BATCH ? segs - at : BATCH);
		int sent = 0;

		memset(m, 0, n * sizeof(m[0]));
		for (uint32_t i = 0; i < n; i++) {
			const uint8_t *payload;
			uint32_t bytes;

			rn_gso_next(&g, heads[i], &payload, &bytes);
			iov[i][0] = (struct iovec){ .iov_base = heads[i], .iov_len = g.hlen };
			iov[i][1] = (struct iovec){ .iov_base = (void *)payload, .iov_len = bytes };
			m[i].msg_hdr.msg_iov = iov[i];
			m[i].msg_hdr.msg_iovlen = 2;
		}
		while (!full && (uint32_t)sent < n) {
			int r = send_batch(l->fd, m + sent, n - (uint32_t)sent);

			if (r < 0 && r != -EAGAIN)
				return r; /* the rest is lost, as the frame is */
			if (r < 0 && !at && !sent)
				return -EAGAIN; /* not begun */
			if (r < 0)
				full = 1;
			else
				sent += r;
		}
		for (uint32_t i = (uint32_t)sent; i < n; i++)
			rn_link_hold(l->state, heads[i], g.hlen, iov[i][1].iov_base, (uint32_t)iov[i][1].iov_len);
	}
	return 0;
}

int rn_link_segments_flush(const struct rn_link *l)
{
	struct rn_link_state *st = l->state;
	struct iovec iov[BATCH];
	struct mmsghdr m[BATCH];

	while (st->out_at < st->out_fill) {
		uint32_t n = 0;
		int sent;

		memset(m, 0, sizeof(m));
		for (uint32_t at = st->out_at; at < st->out_fill && n < BATCH; n++) {
			uint32_t bytes = rn_get32(st->out + at);

			iov[n] = (struct iovec){ .iov_base = st->out + at + RN_LINK_LEN, .iov_len = bytes };
			m[n].msg_hdr.msg_iov = &iov[n];
			m[n].msg_hdr.msg_iovlen = 1;
			at += RN_LINK_LEN + bytes;
		}
		sent = send_batch(l->fd, m, n);
		if (sent == -EAGAIN)
			return -EAGAIN;
		if (sent < 0) {
			st->out_at = st->out_fill = 0;
			return sent;
		}
		for (int i = 0; i < sent; i++)
			st->out_at += RN_LINK_LEN + (uint32_t)iov[i].iov_len;
	}
	st->out_at = st->out_fill = 0;
	return 0;
}
