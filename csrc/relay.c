/* relay.c - frames of the second NIC, whole and unchanged, between a link and a ring.
 *
 * Theory of operation
 *
 * in:   the link is read until EAGAIN, at most BURST frames a turn. No slot on the ring, or no buffer: it is not
 *       read, and the kernel's queue behind it fills (a sender's TCP slows down; nothing is dropped here). Each read
 *       goes into a large buffer, because the length of the next frame is not known before; a frame that fits a
 *       small one is copied there, as in stage_guest_tx.c and for the same reasons. Where a stage's buffers serve
 *       another link as well, @spare_large of them are left to that one: a relay whose far side stands still must
 *       not stop the other NIC.
 * out:  frames leave the ring when the link took them. EAGAIN leaves the frame at the head of its ring and the
 *       input is not looked at until EPOLLOUT. What the link refuses for good is dropped and counted.
 * storm: a frame whose destination has the group bit (IEEE 802.3 3.2.3) costs a token; without one it is dropped
 *       and counted. Unicast is never held back.
 *
 * Virtio-net headers travel with the frames where both links have them, so that a 64 KiB super-frame and a checksum
 * left to the link pass as they are (virtio 1.2 5.1.6). A link without headers cuts such a frame and completes its
 * checksums while it writes (rn_link.h).
 *
 * system calls: read, recv, getsockopt, write, sendto, sendmsg, sendmmsg, shutdown (link), epoll_ctl
 */
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "rn_parse.h"
#include "rn_proto.h"

/* Frames a turn: bounds the time to a cancel, and how long another link of the stage waits. And, one way, what a stage
 * killed between taking frames off the ring and freeing them loses: that many buffers of its neighbour's. */
#define IN_BURST 32u
#define OUT_BURST 16u
#define SECOND 1000000000ull

static void count(struct rn_stage *s, uint32_t which, uint64_t n)
{
	if (which < RN_NCOUNTERS)
		s->c[which] += n;
}

int rn_storm_pass(struct rn_storm *st, uint64_t now)
{
	uint64_t cost;

	if (!st->rate)
		return 1;
	cost = SECOND / st->rate;
	st->credit = st->at ? st->credit + (now - st->at) : SECOND;
	if (st->credit > SECOND)
		st->credit = SECOND;
	st->at = now;
	if (st->credit < cost)
		return 0;
	st->credit -= cost;
	return 1;
}

/* IEEE 802.3 3.2.3: first bit on the wire, the low one of the first byte; broadcast is one of them. */
static int held_by_storm(struct rn_stage *s, struct rn_storm *st, const struct rn_relay_counts *c, const uint8_t *eth)
{
	if (!(eth[0] & 1) || rn_storm_pass(st, s->now))
		return 0;
	count(s, c->storm, 1);
	return 1;
}

/* A read gave no frame. 0: no more to read now; 1: that frame was dropped, go on. */
static int read_failed(struct rn_stage *s, struct relay_in *r, int64_t err)
{
	switch (err) {
	case -EAGAIN:
		r->readable = 0;
		return 0;
	case 0:
		r->gone = 1;
		return 0;
	case -EMSGSIZE:
		count(s, r->c.oversize, 1);
		s->c[RN_C_frames_in]++;
		return 1;
	case -EBADMSG:
		count(s, r->c.runt, 1);
		s->c[RN_C_frames_in]++;
		return 1;
	}
	if (rn_link_read_ended(err)) {
		if (err == -EPROTO) /* nobody can use it any more; who watches it for its end may make another */
			shutdown(r->link.fd, SHUT_RDWR);
		r->gone = 1;
	} else {
		r->readable = 0;
	}
	count(s, r->c.failed, 1);
	return 0;
}

/* Is the frame at @eth one to hand on? Counts why not. */
static int frame_ok(struct rn_stage *s, struct relay_in *r, const uint8_t *eth, uint32_t len, uint16_t *flags)
{
	struct rn_vnet_hdr vnet;

	if (len < RN_ETH_HLEN) {
		count(s, r->c.runt, 1);
		return 0;
	}
	memcpy(&vnet, eth - RN_VNET_HLEN, sizeof(vnet));
	/* A UDP super-frame only where the other side takes it: its link has no way to say that it does not. */
	if (r->link.vnet && (!rn_vnet_check(&vnet, len) || (vnet.gso_type == RN_VNET_GSO_UDP_L4 && !r->link.uso))) {
		count(s, r->c.vnet_header, 1);
		return 0;
	}
	if (len > r->link.frame_max && vnet.gso_type == RN_VNET_GSO_NONE) {
		count(s, r->c.oversize, 1);
		return 0;
	}
	*flags = rn_vnet_says(&vnet) ? RN_DESC_VNET : 0;
	return !held_by_storm(s, &r->storm, &r->c, eth);
}

/* Is there a large buffer that nobody else is to have? The return list is looked at only if it matters. */
static int large_to_spare(struct rn_stage *s, const struct relay_in *r)
{
	return s->pool.free[RN_LARGE] > r->spare_large || rn_pool_free(&s->pool, RN_LARGE) > r->spare_large;
}

/* Where the next frame goes, with room for it to go on: the Ethernet header's place, or NULL. */
static uint8_t *place(struct rn_stage *s, struct relay_in *r)
{
	if (!rn_stage_room(s, r->role, 1))
		return NULL;
	if (!r->next && large_to_spare(s, r))
		r->next = rn_buf_alloc(&s->pool, RN_LARGE);
	if (!r->next) {
		s->want_buf = 1;
		return NULL;
	}
	return (uint8_t *)r->next + RN_BUF_ETH_OFF;
}

static void hand_on(struct rn_stage *s, struct relay_in *r, uint8_t *eth, uint32_t len, uint16_t flags)
{
	struct rn_buf *b = len <= RN_SMALL_FRAME_MAX ? rn_buf_alloc(&s->pool, RN_SMALL) : NULL;

	if (b) {
		uint8_t *small = (uint8_t *)b + RN_BUF_ETH_OFF;

		memcpy(small - RN_VNET_HLEN, eth - RN_VNET_HLEN, RN_VNET_HLEN + len);
		eth = small;
	} else {
		b = r->next;
		r->next = NULL;
	}
	rn_stage_emit(s, r->role, b, eth, len, flags);
	s->c[RN_C_frames_out]++;
	s->c[RN_C_bytes_out] += len;
	count(s, r->c.frames, 1);
	count(s, r->c.bytes, len);
}

int relay_in_turn(struct rn_stage *s, struct relay_in *r)
{
	int n = 0;

	/* Draining: what comes from now on stays in the link. */
	for (; !s->draining && n < (int)IN_BURST && r->readable && !r->gone; n++) {
		uint8_t *eth = place(s, r);
		uint16_t flags;
		int64_t len;

		if (!eth)
			break;
		len = rn_link_read(&r->link, eth - RN_VNET_HLEN, RN_BUF_LARGE - RN_BUF_ETH_OFF + RN_VNET_HLEN);
		if (len <= 0) {
			if (!read_failed(s, r, len))
				break;
			continue;
		}
		s->c[RN_C_frames_in]++;
		s->c[RN_C_bytes_in] += (uint64_t)len;
		s->busy.up_here += r->c.frames == RN_C_nic2_up_frames;
		rn_tap_frame(s, r->tap, r->dir, eth, (uint32_t)len);
		if (frame_ok(s, r, eth, (uint32_t)len, &flags))
			hand_on(s, r, eth, (uint32_t)len, flags);
		rn_tap_done(s);
	}
	return n;
}

/* The link is full. EPOLL_CTL_MOD looks at the descriptor anew, so that room which came between the write and now
 * gives an event too. Both ways, for a link that is read here as well: an event too many is a read that says EAGAIN. */
static int wait_writable(struct rn_stage *s, struct relay_out *r)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLOUT | EPOLLET, .data.u64 = RN_EV(RN_TAG_LINK, r->index) };

	r->blocked = 1;
	count(s, r->c.full, 1);
	if (epoll_ctl(s->epfd, EPOLL_CTL_MOD, r->link.fd, &ev))
		return rn_fail(s, -errno, "cannot watch the second NIC's link: %s", strerror(errno));
	return 0;
}

/* The link refused for good: count why. */
static void refused(struct rn_stage *s, const struct relay_out *r, int err)
{
	count(s, rn_link_write_down(err) == RN_LINK_UP ? r->c.failed : r->c.down, 1);
}

/* Onto the link. 1: done with it, written or dropped; 0: the link is full. */
static int write_link(struct rn_stage *s, struct relay_out *r, const uint8_t *eth, uint32_t len)
{
	int err;

	rn_tap_frame(s, r->tap, r->dir, eth, len);
	err = rn_link_put(&r->link, eth, len);
	if (err == -EAGAIN)
		return 0;
	if (err) {
		refused(s, r, err);
		return 1;
	}
	s->c[RN_C_frames_out]++;
	s->c[RN_C_bytes_out] += len;
	s->busy.down_here += r->c.frames == RN_C_nic2_down_frames;
	count(s, r->c.frames, 1);
	count(s, r->c.bytes, len);
	return 1;
}

int relay_out_turn(struct rn_stage *s, struct relay_out *r)
{
	struct rn_buf *spent[OUT_BURST];
	uint32_t n = r->blocked ? 0 : (uint32_t)rn_stage_peek(s, r->in, OUT_BURST), k, nspent = 0;
	int err = 0;

	for (k = 0; k < n; k++) {
		struct rn_desc d = rn_ring_at(&s->in[r->in], k);
		struct rn_buf *b = rn_buf_of(&s->pool, &d);
		const uint8_t *eth = s->pool.base + d.off;

		if (RN_UNLIKELY(!b)) {
			s->c[RN_C_drop_bad_descriptor]++;
		} else {
			rn_tap_frame(s, r->in, r->dir, eth, d.len);
			if (!held_by_storm(s, &r->storm, &r->c, eth) && !write_link(s, r, eth, d.len)) {
				rn_tap_undo(s);
				err = wait_writable(s, r);
				break;
			}
			rn_tap_done(s);
		}
		s->c[RN_C_frames_in]++;
		if (b) {
			s->c[RN_C_bytes_in] += d.len;
			spent[nspent++] = b;
		}
	}
	if (k) {
		/* First off the ring, then free (DESIGN 6): killed in between, buffers are swept, not freed twice. */
		rn_ring_consume(&s->in[r->in], k);
		while (nspent)
			rn_buf_free(&s->pool, spent[--nspent]);
	}
	if (rn_link_held(&r->link) && !r->blocked && !err) {
		int flushed = rn_link_flush(&r->link);

		if (flushed == -EAGAIN)
			err = wait_writable(s, r);
		else if (flushed)
			refused(s, r, flushed);
	}
	if (r->blocked)
		s->hold_inputs |= (uint8_t)(1u << r->in); /* frames wait, but for the link: neighbours need not wake us */
	return err ? err : (int)k;
}

int relay_link_check(struct rn_stage *s, const struct rn_link *link)
{
	if (link->frame_max >= RN_ETH_HLEN && link->frame_max <= RN_FRAME_MAX)
		return 0;
	return rn_fail(s, -EINVAL, "second NIC: largest frame of %u bytes is outside %u..%u", link->frame_max, RN_ETH_HLEN,
		       RN_FRAME_MAX);
}

/* The link's buffers, and its events. */
static int watch(struct rn_stage *s, struct rn_link *link, uint32_t events, uint32_t index)
{
	int err, flags = fcntl(link->fd, F_GETFL);

	/* One that blocks would stop the stage, and with it every cancel, until the other side does something. */
	if (link->fd >= 0 && (flags < 0 || !(flags & O_NONBLOCK)))
		return rn_fail(s, flags < 0 ? -errno : -EINVAL, "second NIC: descriptor %d %s", link->fd,
			       flags < 0 ? "is not open" : "blocks: set O_NONBLOCK");
	if (rn_link_open(link))
		return rn_fail(s, -ENOMEM, "second NIC: out of memory");
	if (link->fd < 0)
		return 0;
	err = rn_stage_watch(s, link->fd, events | EPOLLET, RN_EV(RN_TAG_LINK, index));
	if (err)
		rn_link_close(link);
	return err;
}

int relay_in_watch(struct rn_stage *s, struct relay_in *r)
{
	r->readable = r->link.fd >= 0; /* until it says otherwise: frames may wait already */
	r->gone = r->link.fd < 0;
	return watch(s, &r->link, EPOLLIN, r->index);
}

int relay_out_watch(struct rn_stage *s, struct relay_out *r)
{
	return watch(s, &r->link, EPOLLOUT, r->index);
}

/* Let go of a link that another takes the place of. By hand: others have descriptors of the same socket, so that ours
 * being closed would not do it. */
static void unwatch(struct rn_stage *s, struct rn_link *link)
{
	if (link->fd >= 0)
		epoll_ctl(s->epfd, EPOLL_CTL_DEL, link->fd, NULL);
	rn_link_close(link);
}

int relay_in_set(struct rn_stage *s, struct relay_in *r, const struct rn_link *link)
{
	struct rn_link fresh = *link;
	int err = relay_link_check(s, link);

	if (!err)
		err = watch(s, &fresh, EPOLLIN, r->index);
	if (err)
		return err;
	unwatch(s, &r->link);
	r->link = fresh;
	r->readable = fresh.fd >= 0;
	r->gone = fresh.fd < 0;
	return 0;
}

int relay_out_set(struct rn_stage *s, struct relay_out *r, const struct rn_link *link)
{
	struct rn_link fresh = *link;
	int err = relay_link_check(s, link);

	if (!err)
		err = watch(s, &fresh, EPOLLOUT, r->index);
	if (err)
		return err;
	unwatch(s, &r->link);
	r->link = fresh;
	r->blocked = 0;
	return 0;
}

int relay_watch_both(struct rn_stage *s, struct relay_in *in, struct relay_out *out)
{
	int err;

	out->index = in->index;
	in->readable = 1;
	if (rn_link_open(&out->link))
		return rn_fail(s, -ENOMEM, "second NIC: out of memory");
	err = watch(s, &in->link, EPOLLIN | EPOLLOUT, in->index);
	if (err)
		rn_link_close(&out->link);
	return err;
}

void relay_in_fini(struct rn_stage *s, struct relay_in *r)
{
	rn_buf_free(&s->pool, r->next);
	r->next = NULL;
	rn_link_close(&r->link);
}

void relay_out_fini(struct relay_out *r)
{
	rn_link_close(&r->link);
}
