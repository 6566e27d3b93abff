/* stage_guest_tx.c - frames the guest sends: from the link into the arena, onto the ring to classify.
 *
 * The link's descriptor is watched edge-triggered and its readiness remembered: it is read until EAGAIN, at
 * most BURST frames a turn, and while it is left unread for want of room it does not wake us.
 *
 * Backpressure: no slot towards classify, or no buffer: the link is not read. The kernel's queue behind it
 * fills, and the guest's own stack slows down, or drops as on any slow wire; nothing is dropped here. A
 * frame that is read has its slot and its buffer already.
 *
 * Buffers: how long the next frame is, is not known before it is read, so each read goes into a large
 * buffer. A frame that fits a small one is copied there and the large one is used for the next read: there
 * are 128 large buffers and thousands of small ones, an ACK must not hold 68 KiB until egress is done with
 * it, and 2 KiB copied within the first-level cache cost about what one cache miss costs. With no small
 * buffer left the large one goes itself, so that a frame once read always gets through.
 *
 * On a bad wire (rn_impair.h) a frame read, and captured, is held there in private memory and comes back into a
 * buffer when its time has come.
 *
 * What is checked here is what needs no parsing: length, and the virtio-net header against the length.
 *
 * Frames of promoted flows end here (fast_up.c), some of them held in their buffers until a few more were read; with them comes a ring from egress, which carries notices only.
 *
 * The link may be set anew while the stage runs: a virtual machine that was started again comes with a socket of its own.
 * Without one (descriptor -1) there is nothing to read. A stream that lost its framing is of no more use; the stage stops
 * reading it and tells its Python half once, which tells the supervisor.
 *
 * The second NIC, if there is one, is a link of its own (relay.c): its frames go to vmnet unparsed, and never use the
 * last NIC1_LARGE large buffers, so that a host side that stands still does not stop this one.
 *
 * system calls: read, recv, getsockopt (link), epoll_ctl, write, fstat, lseek, ftruncate (capture), and fast_up.c's
 */
#include "stage_guest_tx.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>

#include "relay.h"
#include "rn_parse.h"
#include "rn_pcap.h"

#define NIC1_LARGE 64u
#define BURST 32u /* frames a turn: bounds the time to a cancel */

struct stage_guest_tx {
	struct rn_link link;
	struct rn_pcap *pcap; /* NULL: no capture */
	struct rn_buf *spare; /* large, the next frame is read into it; NULL: to be allocated */
	int readable;	      /* 1: the link has not said EAGAIN since its last event */
	int gone;	      /* 1: end of file, or the device is no more */
	int broken;	      /* negative errno: why the link is of no more use; 0 when it was told */
	struct fast_up *fast; /* promoted flows; NULL: none are */
	int bypass;	      /* 1: what that does not take goes to egress, not to classify */
	uint64_t pcap_written, pcap_lost; /* as last taken over */
	int has_nic2;
	struct relay_in nic2;
};

static void count_pcap(struct rn_stage *s, struct stage_guest_tx *t)
{
	uint64_t written = rn_pcap_written(t->pcap), lost = rn_pcap_lost(t->pcap);

	s->c[RN_C_pcap_frames] += written - t->pcap_written;
	s->c[RN_C_pcap_dropped] += lost - t->pcap_lost;
	t->pcap_written = written;
	t->pcap_lost = lost;
}

/* A read gave no frame. 0: no more to read now; 1: that frame was dropped, go on. */
static int read_failed(struct rn_stage *s, struct stage_guest_tx *t, int64_t err)
{
	switch (err) {
	case -EAGAIN:
		t->readable = 0;
		return 0;
	case 0:
		t->gone = 1;
		return 0;
	case -EMSGSIZE:
		s->c[RN_C_drop_oversize]++;
		break;
	case -EBADMSG:
		s->c[RN_C_drop_runt]++;
		break;
	case -EPROTO: /* a stream whose next frame nobody can find */
		s->c[RN_C_link_desync]++;
		t->broken = (int)err;
		t->gone = 1;
		s->notice = 1;
		return 0;
	default:
		s->c[RN_C_drop_link_read]++;
		if (rn_link_read_ended(err))
			t->gone = 1;
		else
			t->readable = 0;
		return 0;
	}
	s->c[RN_C_frames_in]++; /* a frame, though none that fits */
	return 1;
}

/* Is the frame at @eth one to hand on? Counts why not. */
static int frame_ok(struct rn_stage *s, const struct stage_guest_tx *t, uint8_t *eth, uint32_t len, uint16_t *flags)
{
	struct rn_vnet_hdr vnet;

	if (len < RN_ETH_HLEN) {
		s->c[RN_C_drop_runt]++;
		return 0;
	}
	memcpy(&vnet, eth - RN_VNET_HLEN, sizeof(vnet));
	if (t->link.vnet && !rn_vnet_check(&vnet, len)) {
		s->c[RN_C_drop_bad_vnet_header]++;
		return 0;
	}
	if (len > t->link.frame_max && vnet.gso_type == RN_VNET_GSO_NONE) {
		s->c[RN_C_drop_oversize]++;
		return 0;
	}
	*flags = rn_vnet_says(&vnet) ? RN_DESC_VNET : 0;
	return 1;
}

/* Onto the ring to classify, or to egress with @p, what was parsed of it. The frame is in *@large, which is NULL afterwards
 * if it went as well. */
static void emit(struct rn_stage *s, struct rn_buf **large, uint8_t *eth, uint32_t len, uint16_t flags,
		 const struct rn_parsed *p)
{
	struct rn_buf *b;

	if (p)
		len = p->frame_len;
	b = len <= RN_SMALL_FRAME_MAX ? rn_buf_alloc(&s->pool, RN_SMALL) : NULL;
	if (b) {
		uint8_t *small = (uint8_t *)b + RN_BUF_ETH_OFF;

		memcpy(small - RN_VNET_HLEN, eth - RN_VNET_HLEN, RN_VNET_HLEN + len);
		eth = small;
	} else {
		b = *large;
		*large = NULL;
	}
	if (p)
		b->meta = rn_meta_of(p, 0);
	rn_stage_emit(s, p ? RN_ROLE_BRIDGE : RN_ROLE_CLASSIFY, b, eth, len, flags);
	s->c[RN_C_frames_out]++;
	s->c[RN_C_bytes_out] += len;
	if (p) /* egress begins while we look whether there is more: a connection is short */
		rn_stage_publish_now(s, RN_ROLE_BRIDGE);
}

/* Frames that are held go to the host; what it does not take, on. The caller has fast_up_sent() behind the last. */
static void settle(struct rn_stage *s, struct stage_guest_tx *t)
{
	const struct fast_frame *h;
	uint32_t n = fast_up_settle(t->fast, &h);

	for (; n; n--, h++) {
		struct rn_buf *b = (struct rn_buf *)(h->eth - RN_BUF_ETH_OFF);

		if (!h->done)
			emit(s, &b, h->eth, h->len, h->flags, t->bypass ? &h->p : NULL);
		else if (RN_UNLIKELY(h->began))
			rn_stage_inline_end(s, h->began);
		rn_buf_free(&s->pool, b);
	}
}

static void hand_on(struct rn_stage *s, struct stage_guest_tx *t, uint8_t *eth, uint32_t len, uint16_t flags)
{
	enum fast_up_way way = FAST_UP_CLASSIFY;
	struct rn_parsed p;

	if (t->fast) {
		uint64_t began = rn_stage_inline_begin(s);

		way = fast_up_take(t->fast, eth, len, flags, began, &p);
		if (way == FAST_UP_BEHIND) {
			settle(s, t);
			way = fast_up_take(t->fast, eth, len, flags, began, &p);
		}
		if (way == FAST_UP_HELD) {
			t->spare = NULL;
			if (fast_up_full(t->fast)) {
				settle(s, t);
				fast_up_sent(t->fast);
			}
			return;
		}
		if (way == FAST_UP_DONE) {
			if (RN_UNLIKELY(began))
				rn_stage_inline_end(s, began);
			return;
		}
	}
	emit(s, &t->spare, eth, len, flags, way == FAST_UP_BRIDGE ? &p : NULL);
	if (t->fast)
		fast_up_sent(t->fast);
}

/* Where the next frame goes, with room for it to go on: the Ethernet header's place, or NULL. */
static uint8_t *place(struct rn_stage *s, struct stage_guest_tx *t)
{
	if (!rn_stage_room(s, RN_ROLE_CLASSIFY, 1) || (t->fast && !fast_up_open(t->fast)))
		return NULL;
	if (!t->spare)
		t->spare = rn_buf_alloc(&s->pool, RN_LARGE);
	if (!t->spare) {
		s->want_buf = 1;
		return NULL;
	}
	return (uint8_t *)t->spare + RN_BUF_ETH_OFF;
}

/* What is due on the bad wire, at most twice BURST frames. */
static uint32_t arrived(struct rn_stage *s, struct stage_guest_tx *t, struct rn_impair *im)
{
	struct rn_impair_frame f;
	uint32_t n;

	for (n = 0; n < 2 * BURST && rn_impair_peek(im, s->now, s->draining, &f); n++) {
		uint8_t *eth = place(s, t);
		uint32_t len = f.len;
		uint16_t flags;

		if (!eth) {
			s->impair_stuck[RN_IMPAIR_LINK] = 1;
			break;
		}
		memcpy(eth - RN_VNET_HLEN, f.vnet_then_frame, RN_VNET_HLEN + len);
		rn_impair_pop(im);
		if (frame_ok(s, t, eth, len, &flags))
			hand_on(s, t, eth, len, flags);
	}
	return n;
}

/* What egress says about flows. */
static uint32_t notices(struct rn_stage *s, struct stage_guest_tx *t)
{
	uint32_t did = 0;

	for (uint32_t i = 0; i < s->nin; i++) {
		uint32_t n = (uint32_t)rn_stage_peek(s, i, BURST);

		for (uint32_t k = 0; k < n; k++) {
			struct rn_desc d = rn_ring_at(&s->in[i], k);

			if (d.flags & RN_DESC_FLOW)
				fast_up_notice(t->fast, &d);
			else
				s->c[RN_C_drop_bad_descriptor]++;
		}
		rn_ring_consume(&s->in[i], n);
		did += n;
	}
	return did;
}

static int guest_tx_turn(struct rn_stage *s)
{
	struct stage_guest_tx *t = s->priv;
	struct rn_impair *im = s->impair[RN_IMPAIR_LINK];
	uint32_t n = 0, told = t->fast ? notices(s, t) : 0;

	/* Draining: what the guest sends from now on stays in the link. */
	for (; !s->draining && n < BURST && t->readable && !t->gone && !rn_stage_paused(s); n++) {
		uint16_t flags;
		uint8_t *eth;
		int64_t len;

		if (RN_UNLIKELY(im) && !rn_impair_open(im, s->now))
			break;
		eth = place(s, t);
		if (!eth)
			break;
		len = rn_link_read(&t->link, eth - RN_VNET_HLEN, RN_BUF_LARGE - RN_BUF_ETH_OFF + RN_VNET_HLEN);
		if (len <= 0) {
			if (!read_failed(s, t, len))
				break;
			continue;
		}
		s->c[RN_C_frames_in]++;
		s->c[RN_C_bytes_in] += (uint64_t)len;
		s->busy.up_here++;
		if (t->pcap) /* also what is dropped: one captures to see why */
			rn_pcap_frame(t->pcap, eth, (uint32_t)len);
		rn_tap_frame(s, RN_TAP_LINK, RN_PCAP_FROM_GUEST, eth, (uint32_t)len);
		if (RN_UNLIKELY(im))
			rn_stage_impair_feed(s, im, eth, (uint32_t)len, 0, NULL);
		else if (frame_ok(s, t, eth, (uint32_t)len, &flags))
			hand_on(s, t, eth, (uint32_t)len, flags);
		rn_tap_done(s);
	}
	if (RN_UNLIKELY(im))
		n += arrived(s, t, im);
	if (t->fast) {
		settle(s, t);
		fast_up_sent(t->fast);
		(void)fast_up_flush(t->fast); /* what is left waits for what it asked for */
	}
	if (t->pcap) {
		rn_pcap_flush(t->pcap);
		count_pcap(s, t);
	}
	if (t->has_nic2)
		n += (uint32_t)relay_in_turn(s, &t->nic2);
	return (int)(n + told);
}

static void guest_tx_event(struct rn_stage *s, uint32_t tag, uint32_t index, uint32_t events)
{
	struct stage_guest_tx *t = s->priv;

	if (tag == RN_TAG_LINK)
		*(index ? &t->nic2.readable : &t->readable) = 1; /* whatever it is, reading tells */
	else if (tag == RN_TAG_FLOW && t->fast)
		fast_up_event(t->fast, index, events);
}

static uint64_t guest_tx_deadline(struct rn_stage *s)
{
	struct stage_guest_tx *t = s->priv;

	return t->fast ? fast_up_deadline(t->fast) : UINT64_MAX;
}

static void guest_tx_fini(struct rn_stage *s)
{
	struct stage_guest_tx *t = s->priv;

	if (t->pcap) {
		rn_pcap_flush(t->pcap);
		count_pcap(s, t);
		rn_pcap_free(t->pcap);
	}
	fast_up_free(t->fast);
	rn_buf_free(&s->pool, t->spare);
	rn_link_close(&t->link);
	if (t->has_nic2)
		relay_in_fini(s, &t->nic2);
	free(t);
	s->priv = NULL;
}

static const struct rn_stage_ops guest_tx_ops = {
	.turn = guest_tx_turn,
	.event = guest_tx_event,
	.deadline = guest_tx_deadline,
	.fini = guest_tx_fini,
};

int stage_guest_tx_link(struct rn_stage *s, const struct rn_link *link)
{
	struct stage_guest_tx *t = s->priv;
	struct rn_link fresh = *link;
	int err;

	if (link->frame_max < RN_ETH_HLEN || link->frame_max > RN_FRAME_MAX)
		return rn_fail(s, -EINVAL, "guest_tx: largest frame of %u bytes is outside %u..%u", link->frame_max,
			       RN_ETH_HLEN, RN_FRAME_MAX);
	if (rn_link_open(&fresh))
		return rn_fail(s, -ENOMEM, "guest_tx: out of memory");
	if (fresh.fd >= 0) {
		err = rn_stage_watch(s, fresh.fd, EPOLLIN | EPOLLET, RN_EV(RN_TAG_LINK, 0));
		if (err) {
			rn_link_close(&fresh);
			return err;
		}
	}
	/* By hand: others have descriptors of the same socket, so that ours being closed would not do it. */
	if (t->link.fd >= 0)
		epoll_ctl(s->epfd, EPOLL_CTL_DEL, t->link.fd, NULL);
	rn_link_close(&t->link);
	t->link = fresh;
	t->readable = fresh.fd >= 0; /* until it says otherwise: frames may wait already */
	t->gone = fresh.fd < 0;
	t->broken = 0;
	return 0;
}

int stage_guest_tx_broken(struct rn_stage *s)
{
	struct stage_guest_tx *t = s->priv;
	int err = t->broken;

	t->broken = 0;
	return err;
}

int stage_guest_tx_init(struct rn_stage *s, const struct rn_link *link, int pcap_fd)
{
	struct stage_guest_tx *t;
	int err;

	t = calloc(1, sizeof(*t));
	if (!t)
		return rn_fail(s, -ENOMEM, "guest_tx: out of memory");
	t->link.fd = -1;
	if (pcap_fd >= 0) {
		t->pcap = rn_pcap_new(pcap_fd, RN_PCAP_FROM_GUEST, 0);
		if (!t->pcap) {
			free(t);
			return rn_fail(s, -ENOMEM, "guest_tx: out of memory");
		}
	}
	s->priv = t;
	err = stage_guest_tx_link(s, link);
	if (err) {
		rn_pcap_free(t->pcap);
		free(t);
		s->priv = NULL;
		return err;
	}
	s->ops = &guest_tx_ops;
	return 0;
}

int stage_guest_tx_nic2(struct rn_stage *s, const struct rn_link *link)
{
	struct stage_guest_tx *t = s->priv;
	int err = relay_link_check(s, link);

	if (err)
		return err;
	if (t->has_nic2)
		return relay_in_set(s, &t->nic2, link);
	t->nic2 = (struct relay_in){
		.link = *link,
		.role = RN_ROLE_HOSTNET,
		.spare_large = NIC1_LARGE,
		.index = 1,
		.tap = RN_TAP_LINK2,
		.dir = RN_PCAP_FROM_GUEST,
		.c = { .frames = RN_C_nic2_up_frames, .bytes = RN_C_nic2_up_bytes, .down = RN_NCOUNTERS,
		       .failed = RN_C_drop_link_read, .runt = RN_C_drop_runt, .oversize = RN_C_drop_oversize,
		       .vnet_header = RN_C_drop_bad_vnet_header, .storm = RN_NCOUNTERS, .full = RN_NCOUNTERS },
	};
	err = relay_in_watch(s, &t->nic2);
	t->has_nic2 = !err;
	return err;
}

int stage_guest_tx_promote(struct rn_stage *s, void *flows, uint64_t flows_size, const struct fast_up_config *cfg)
{
	struct stage_guest_tx *t = s->priv;

	t->fast = fast_up_new(s, &t->link, flows, flows_size, cfg);
	t->bypass = cfg->bypass;
	if (!t->fast)
		return s->error[0] ? -EINVAL : rn_fail(s, -ENOMEM, "guest_tx: out of memory");
	return 0;
}
