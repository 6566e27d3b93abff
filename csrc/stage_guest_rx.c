/* stage_guest_rx.c - frames for the guest: from the rings of all who write to it, onto the link.
 *
 * Fairness: each turn serves every input once, at most BURST frames, and begins behind the one it began with
 * last time, so that all get their turn also on a link that takes a few frames at a time. A bulk download
 * through egress does not keep an ARP or DNS reply waiting longer than one burst.
 *
 * Lossless: when the link says EAGAIN the frame stays at the head of its ring, no input is read, and the
 * rings fill towards those who write: they stop reading their sockets. EPOLLOUT goes on. What the link
 * refuses for good is dropped and counted: its interface is down or gone (drop_link_down), or it cannot
 * take such a frame (drop_link_write).
 *
 * On a bad wire (rn_impair.h) a frame taken from a ring is held there in private memory, its buffer free at
 * once, and written when its time has come; a full link or a stall stops the taking as above.
 *
 * The virtio-net header was written by the producer. For a peer that takes none the link completes checksums and cuts
 * segments while it writes (rn_link.h); a frame that does not fit its header is an error of ours and drop_link_write.
 *
 * Promoted flows (fast_down.c) get their turn after the rings, so that bulk never keeps a small frame waiting longer than
 * its budget.
 *
 * What the link has taken and not yet given to the kernel goes out at the end of each turn; while the kernel does not
 * take it, the link counts as full.
 *
 * The link may be set anew while the stage runs, when a virtual machine is started again. Without one (descriptor -1)
 * frames are dropped as for an interface that is down.
 *
 * The second NIC, if there is one, is a link of its own (relay.c) that takes vmnet's ring and no other: neither link,
 * when full, holds back the other's frames.
 *
 * system calls: write, sendto, sendmsg, sendmmsg (link), epoll_ctl, fstat, lseek, ftruncate (capture), and fast_down.c's
 */
#include "stage_guest_rx.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "relay.h"
#include "rn_parse.h"
#include "rn_pcap.h"

#define BURST 32u /* frames an input a turn */

struct stage_guest_rx {
	struct rn_link link;
	struct rn_pcap *pcap; /* NULL: no capture */
	int blocked;	      /* 1: the link said EAGAIN and no event came since */
	int broken;	      /* negative errno: the link's peer has left; 0 when stage_guest_rx_broken() has told it */
	int told;	      /* 1: it was noticed, once a link */
	struct fast_down *fast; /* promoted flows; NULL: none are */
	struct rn_buf *spent[BURST];
	uint32_t nspent;
	uint64_t pcap_written, pcap_lost; /* as last taken over */
	int has_nic2;
	struct relay_out nic2;
};

static void count_pcap(struct rn_stage *s, struct stage_guest_rx *g)
{
	uint64_t written = rn_pcap_written(g->pcap), lost = rn_pcap_lost(g->pcap);

	s->c[RN_C_pcap_frames] += written - g->pcap_written;
	s->c[RN_C_pcap_dropped] += lost - g->pcap_lost;
	g->pcap_written = written;
	g->pcap_lost = lost;
}

/* The link is full. EPOLL_CTL_MOD looks at the descriptor anew, so that room which came between the write
 * and now gives an event too; the edge alone was perhaps told before. */
static int wait_writable(struct rn_stage *s, struct stage_guest_rx *g)
{
	struct epoll_event ev = { .events = EPOLLOUT | EPOLLET, .data.u64 = RN_EV(RN_TAG_LINK, 0) };

	g->blocked = 1;
	s->c[RN_C_link_full]++;
	if (epoll_ctl(s->epfd, EPOLL_CTL_MOD, g->link.fd, &ev))
		return rn_fail(s, -errno, "cannot watch the guest's link: %s", strerror(errno));
	return 0;
}

/* The link refused for good: count why, and tell once if nobody is there any more. */
static void refused(struct rn_stage *s, struct stage_guest_rx *g, int err)
{
	enum rn_link_down down = rn_link_write_down(err);

	if (down == RN_LINK_UP) {
		s->c[RN_C_drop_link_write]++;
		return;
	}
	s->c[RN_C_drop_link_down]++;
	if (down == RN_LINK_LEFT && !g->told) {
		g->told = 1;
		g->broken = err;
		s->notice = 1;
	}
}

/* Onto the link. 1: done with it, written or dropped; 0: the link is full. */
static int write_link(struct rn_stage *s, struct stage_guest_rx *g, const uint8_t *eth, uint32_t len)
{
	int err;

	rn_tap_frame(s, RN_TAP_LINK, RN_PCAP_TO_GUEST, eth, len);
	err = rn_link_put(&g->link, eth, len);
	if (err == -EAGAIN) {
		rn_tap_undo(s); /* of the ring it came from too: it will come again */
		return 0;
	}
	if (err) {
		refused(s, g, err);
	} else {
		s->c[RN_C_frames_out]++;
		s->c[RN_C_bytes_out] += len;
		s->busy.down_here++;
		if (g->pcap)
			rn_pcap_frame(g->pcap, eth, len);
	}
	rn_tap_done(s);
	return 1;
}

/* The end of a turn: what the link holds goes to the kernel. Negative: the link could not be watched. */
static int flush_link(struct rn_stage *s, struct stage_guest_rx *g)
{
	int err = rn_link_flush(&g->link);

	if (err == -EAGAIN)
		return wait_writable(s, g);
	if (err)
		refused(s, g, err);
	return 0;
}

/* One descriptor. 1: done with it; 0: the link is full, it stays in the ring. */
static int take_one(struct rn_stage *s, struct stage_guest_rx *g, uint32_t input, const struct rn_desc *d)
{
	struct rn_impair *im = s->impair[RN_IMPAIR_LINK];
	struct rn_buf *b;
	const uint8_t *eth;

	if (d->flags & RN_DESC_FLOW) {
		if (g->fast)
			fast_down_notice(g->fast, d);
		return 1;
	}
	b = rn_stage_buf(s, d);
	if (RN_UNLIKELY(!b)) {
		s->c[RN_C_frames_in]++;
		s->c[RN_C_drop_bad_descriptor]++;
		return 1;
	}
	eth = s->pool.base + d->off;
	rn_tap_frame(s, input, RN_PCAP_TO_GUEST, eth, d->len);
	if (RN_UNLIKELY(im)) {
		rn_stage_impair_feed(s, im, eth, d->len, d->flags, NULL);
		rn_tap_done(s);
	} else if (!write_link(s, g, eth, d->len)) {
		return 0;
	}
	s->c[RN_C_frames_in]++;
	s->c[RN_C_bytes_in] += d->len;
	g->spent[g->nspent++] = b;
	return 1;
}

/* fast_down.c's way to the link. */
static int out(struct rn_stage *s, const uint8_t *eth, uint32_t len)
{
	struct stage_guest_rx *g = s->priv;
	struct rn_impair *im = s->impair[RN_IMPAIR_LINK];

	if (RN_LIKELY(!im))
		return write_link(s, g, eth, len);
	rn_stage_impair_feed(s, im, eth, len, RN_DESC_VNET, NULL);
	return 1;
}

/* What is due on the bad wire, at least as much as a turn can put there; *err: the link could not be watched. */
static int arrived(struct rn_stage *s, struct stage_guest_rx *g, struct rn_impair *im, int *err)
{
	struct rn_impair_frame f;
	int n;

	for (n = 0; n < (int)(2 * RN_INPUTS_MAX * BURST) && !g->blocked && rn_impair_peek(im, s->now, s->draining, &f); n++) {
		if (!write_link(s, g, f.vnet_then_frame + RN_VNET_HLEN, f.len)) {
			*err = wait_writable(s, g);
			break;
		}
		rn_impair_pop(im);
	}
	s->impair_stuck[RN_IMPAIR_LINK] = (uint8_t)g->blocked;
	return n;
}

static int guest_rx_turn(struct rn_stage *s)
{
	struct stage_guest_rx *g = s->priv;
	struct rn_impair *im = s->impair[RN_IMPAIR_LINK];
	uint32_t start = s->next_in;
	int did = 0, err = 0, closed = 0, relayed = 0;

	for (uint32_t j = 0; j < s->nin && !g->blocked && !closed; j++) {
		uint32_t i = (start + j) % s->nin;
		uint32_t n = g->has_nic2 && i == g->nic2.in ? 0 : (uint32_t)rn_stage_peek(s, i, BURST), k;

		for (k = 0; k < n; k++) {
			struct rn_desc d = rn_ring_at(&s->in[i], k);

			closed = im && !rn_stage_impair_open(s, im);
			if (RN_UNLIKELY(closed))
				break;
			if (!take_one(s, g, i, &d)) {
				err = wait_writable(s, g);
				break;
			}
		}
		if (!k)
			continue;
		/* First off the ring, then free (DESIGN 6): killed in between, buffers are swept, not freed twice. */
		rn_ring_consume(&s->in[i], k);
		while (g->nspent)
			rn_buf_free(&s->pool, g->spent[--g->nspent]);
		/* Next time the one behind the first that got its turn. Not one further each turn: with a link that
		 * takes a few frames and then says EAGAIN, idle turns would fall into step and starve an input. */
		if (!did)
			s->next_in = (i + 1) % s->nin;
		did += (int)k;
	}
	if (g->fast && !g->blocked && !closed) {
		int r = im && !rn_stage_impair_open(s, im) ? 0 : fast_down_turn(g->fast);

		if (r < 0)
			err = wait_writable(s, g);
		else
			did += r;
	}
	if (RN_UNLIKELY(im))
		did += arrived(s, g, im, &err);
	if (rn_link_held(&g->link) && !g->blocked && !err)
		err = flush_link(s, g);
	/* Frames wait, but for the link or the end of a stall: neighbours need not wake us. */
	if (g->has_nic2) {
		if (g->blocked || closed)
			s->hold_inputs = (uint8_t)~(1u << g->nic2.in);
		relayed = relay_out_turn(s, &g->nic2);
	} else {
		s->hold_input = (uint8_t)(g->blocked || closed);
	}
	if (g->pcap) {
		rn_pcap_flush(g->pcap);
		count_pcap(s, g);
	}
	if (err || relayed < 0)
		return err ? err : relayed;
	return did + relayed;
}

static void guest_rx_event(struct rn_stage *s, uint32_t tag, uint32_t index, uint32_t events)
{
	struct stage_guest_rx *g = s->priv;

	if (tag == RN_TAG_LINK)
		*(index ? &g->nic2.blocked : &g->blocked) = 0; /* on an error as well: the write tells */
	else if (tag == RN_TAG_FLOW && g->fast)
		fast_down_event(g->fast, index, events);
}

static uint64_t guest_rx_deadline(struct rn_stage *s)
{
	struct stage_guest_rx *g = s->priv;

	return g->fast ? fast_down_deadline(g->fast) : UINT64_MAX;
}

/* Draining ends when the kernel has all. */
static int guest_rx_drained(struct rn_stage *s)
{
	struct stage_guest_rx *g = s->priv;

	return !rn_link_held(&g->link) && (!g->has_nic2 || !rn_link_held(&g->nic2.link));
}

static void guest_rx_fini(struct rn_stage *s)
{
	struct stage_guest_rx *g = s->priv;

	if (g->pcap) {
		rn_pcap_flush(g->pcap);
		count_pcap(s, g);
		rn_pcap_free(g->pcap);
	}
	rn_link_close(&g->link);
	if (g->has_nic2)
		relay_out_fini(&g->nic2);
	fast_down_free(g->fast);
	free(g);
	s->priv = NULL;
}

static const struct rn_stage_ops guest_rx_ops = {
	.turn = guest_rx_turn,
	.event = guest_rx_event,
	.drained = guest_rx_drained,
	.deadline = guest_rx_deadline,
	.fini = guest_rx_fini,
};

int stage_guest_rx_link(struct rn_stage *s, const struct rn_link *link)
{
	struct stage_guest_rx *g = s->priv;
	struct rn_link fresh = *link;
	int err;

	if (link->frame_max < RN_ETH_HLEN || link->frame_max > RN_FRAME_MAX)
		return rn_fail(s, -EINVAL, "guest_rx: largest frame of %u bytes is outside %u..%u", link->frame_max,
			       RN_ETH_HLEN, RN_FRAME_MAX);
	if (rn_link_open(&fresh))
		return rn_fail(s, -ENOMEM, "guest_rx: out of memory");
	if (fresh.fd >= 0) {
		err = rn_stage_watch(s, fresh.fd, EPOLLOUT | EPOLLET, RN_EV(RN_TAG_LINK, 0));
		if (err) {
			rn_link_close(&fresh);
			return err;
		}
	}
	/* By hand: others have descriptors of the same socket, so that ours being closed would not do it. */
	if (g->link.fd >= 0)
		epoll_ctl(s->epfd, EPOLL_CTL_DEL, g->link.fd, NULL);
	rn_link_close(&g->link);
	g->link = fresh;
	g->blocked = g->broken = g->told = 0;
	return 0;
}

int stage_guest_rx_broken(struct rn_stage *s)
{
	struct stage_guest_rx *g = s->priv;
	int err = g->broken;

	g->broken = 0;
	return err;
}

int stage_guest_rx_init(struct rn_stage *s, const struct rn_link *link, int pcap_fd)
{
	struct stage_guest_rx *g;
	int err;

	g = calloc(1, sizeof(*g));
	if (!g)
		return rn_fail(s, -ENOMEM, "guest_rx: out of memory");
	g->link.fd = -1;
	if (pcap_fd >= 0) {
		g->pcap = rn_pcap_new(pcap_fd, RN_PCAP_TO_GUEST, 0);
		if (!g->pcap) {
			free(g);
			return rn_fail(s, -ENOMEM, "guest_rx: out of memory");
		}
	}
	s->priv = g;
	err = stage_guest_rx_link(s, link);
	if (err) {
		rn_pcap_free(g->pcap);
		free(g);
		s->priv = NULL;
		return err;
	}
	s->ops = &guest_rx_ops;
	return 0;
}

int stage_guest_rx_nic2(struct rn_stage *s, const struct rn_link *link, uint32_t producer_row)
{
	struct stage_guest_rx *g = s->priv;
	int err = relay_link_check(s, link);
	uint32_t i = 0;

	while (i < s->nin && s->in_row[i] != producer_row)
		i++;
	if (!err && i == s->nin)
		err = rn_fail(s, -EINVAL, "guest_rx: no input from stage row %u for the second NIC", producer_row);
	if (err)
		return err;
	if (g->has_nic2)
		return relay_out_set(s, &g->nic2, link);
	g->nic2 = (struct relay_out){
		.link = *link,
		.in = i,
		.index = 1,
		.tap = RN_TAP_LINK2,
		.dir = RN_PCAP_TO_GUEST,
		.c = { .frames = RN_C_nic2_down_frames, .bytes = RN_C_nic2_down_bytes, .down = RN_C_drop_link_down,
		       .failed = RN_C_drop_link_write, .runt = RN_NCOUNTERS, .oversize = RN_NCOUNTERS,
		       .vnet_header = RN_NCOUNTERS, .storm = RN_NCOUNTERS, .full = RN_C_link_full },
	};
	err = relay_out_watch(s, &g->nic2);
	g->has_nic2 = !err;
	return err;
}

int stage_guest_rx_promote(struct rn_stage *s, void *flows, uint64_t flows_size, const struct fast_down_config *cfg)
{
	struct stage_guest_rx *g = s->priv;

	g->fast = fast_down_new(s, flows, flows_size, cfg, out);
	if (!g->fast)
		return s->error[0] ? -EINVAL : rn_fail(s, -ENOMEM, "guest_rx: out of memory");
	return 0;
}
