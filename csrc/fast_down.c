/* fast_down.c - promoted flows, host to guest: the half `down` while guest_rx owns it (rules: rn_promote.h). UDP's part is
 * fast_udp_down.c.
 *
 * pump() peeks at the host socket into the one buffer of this stage, behind room for the headers, and writes it to the
 * link as it is: no frame buffer, no ring, no wake. What the guest acknowledged is read from struct rn_acks, and taken out
 * of the socket (I2). Nothing is sent twice from here: a flow that makes no progress for its retransmission timeout goes
 * back to egress, and so does one that ended, or broke, or has urgent data.
 *
 * What to do next. A flow is in the run list while its socket may have bytes. Those in it take turns of QUANTUM bytes, and
 * a turn of the stage does BUDGET of them, after the rings' frames: neither another flow nor the slow path waits for more
 * than that. A flow that stopped asks to be told (RN_WANT_*) only if it needs to be: its window is full, or so much lies
 * in the socket acknowledged but not taken out that the host's window would close. Otherwise the ACKs of a small exchange
 * are looked at when the next bytes come, or by the watch.
 *
 * Watch. Flows with something in flight are in a list that is walked each WATCH_NS as long as it is not empty: those whose
 * all was acknowledged leave it, those over their timeout go back. So an idle flow costs nothing.
 *
 * Many receivers: fast_bound.c.
 *
 * system calls: recvfrom, recvmsg, setsockopt (host sockets), recvmsg (sockets from egress), epoll_ctl, close
 */
#include "fast_down_internal.h"

#include "rn_fdpass.h"
#include "tcp_rtt.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#define QUANTUM (256u << 10) /* bytes of a flow before the next one's turn */
#define BUDGET (1024u << 10) /* bytes a turn of the stage */
#define RUNS 64u	     /* flows a turn of the stage */
#define WATCH_NS 50000000ull
#define TAKE_OUT (32u << 10) /* bytes acknowledged but still in the socket that are worth a wake */
#define EVENTS (EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLET)

#define SEQ_LT(a, b) ((int32_t)((a) - (b)) < 0)
#define SEQ_LE(a, b) ((int32_t)((a) - (b)) <= 0)
#define SEQ_GT(a, b) ((int32_t)((a) - (b)) > 0)

struct fast_down *fast_down_new(struct rn_stage *s, void *flows, uint64_t flows_size, const struct fast_down_config *cfg,
				fast_down_out *out)
{
	struct fast_down *d;
	int err = rn_flows_check(flows, flows_size);

	if (err || !s->has_out[RN_ROLE_BRIDGE]) {
		rn_fail(s, -EINVAL, "promotion: no flow table of this build, or no ring to egress");
		return NULL;
	}
	d = calloc(1, sizeof(*d));
	if (!d)
		return NULL;
	d->s = s;
	d->flows = flows;
	d->nflows = d->flows->nflows;
	d->cfg = *cfg;
	d->out = out;
	d->me = rn_owner(s->row);
	d->egress = rn_owner(s->out_row[RN_ROLE_BRIDGE]);
	d->run = d->run_tail = d->watch = d->lacks = d->said = NONE;
	fast_bound_init(d);
	d->frame = 65535u - RN_IP4_HLEN - RN_TCP_HLEN;
	d->flow = calloc(d->nflows, sizeof(*d->flow));
	if (!d->flow || rn_flows_size(d->nflows) > flows_size) {
		fast_down_free(d);
		return NULL;
	}
	if (s->generation > 1) { /* as in fast_up.c */
		for (uint32_t i = 0; i < d->nflows; i++) {
			struct rn_flow *f = &d->flows->flow[i];

			if (atomic_load_explicit(&f->down.owner, memory_order_relaxed) == (d->me | RN_OWNER_BUSY))
				f->down.torn = 1;
			(void)rn_half_heir(&f->down.owner, d->me, d->egress);
		}
		d->reset = 1;
	}
	return d;
}

/* --- lists --- */

static void run(struct fast_down *d, uint32_t i)
{
	struct down_flow *q = &d->flow[i];

	if (q->running)
		return;
	q->running = 1;
	q->run_next = NONE;
	if (d->run == NONE)
		d->run = i;
	else
		d->flow[d->run_tail].run_next = i;
	d->run_tail = i;
}

static void watch(struct fast_down *d, uint32_t i)
{
	struct down_flow *q = &d->flow[i];

	if (q->watched)
		return;
	q->watched = 1;
	q->watch_prev = NONE;
	q->watch_next = d->watch;
	if (d->watch == NONE)
		d->watch_at = d->s->now + WATCH_NS;
	else
		d->flow[d->watch].watch_prev = i;
	d->watch = i;
}

static void unwatch(struct fast_down *d, uint32_t i)
{
	struct down_flow *q = &d->flow[i];

	if (!q->watched)
		return;
	q->watched = 0;
	if (q->watch_prev == NONE)
		d->watch = q->watch_next;
	else
		d->flow[q->watch_prev].watch_next = q->watch_next;
	if (q->watch_next != NONE)
		d->flow[q->watch_next].watch_prev = q->watch_prev;
}

/* --- flows come and go --- */

static void let_go(struct fast_down *d, uint32_t i)
{
	struct down_flow *q = &d->flow[i];

	unwatch(d, i);
	fast_bound_lift(d, q);
	(void)epoll_ctl(d->s->epfd, EPOLL_CTL_DEL, q->fd, NULL); /* others hold the socket too: a close would leave it there */
	close(q->fd);
	q->proto = 0; /* if it is in the run list, it falls out there */
	d->n--;
}

void fast_down_free(struct fast_down *d)
{
	if (!d)
		return;
	for (uint32_t i = 0; d->n && d->flow && i < d->nflows; i++)
		if (d->flow[i].proto)
			let_go(d, i);
	free(d->skip);
	free(d->flow);
	free(d);
}

/* A socket came. 0 or -errno: it is still the caller's. */
static int take_in(struct fast_down *d, const struct rn_pass *p, int fd)
{
	struct down_flow *q = &d->flow[p->index];
	struct epoll_event ev = { .events = EVENTS, .data.u64 = RN_EV(RN_TAG_FLOW, p->index) };

	if (q->proto)
		let_go(d, p->index);
	if (p->proto == RN_IPPROTO_TCP && !p->peek_off && !d->skip) {
		d->skip = calloc(1, sizeof(*d->skip));
		if (!d->skip)
			return -ENOMEM;
		rn_peek_skip_init(d->skip);
	}
	if (epoll_ctl(d->s->epfd, EPOLL_CTL_ADD, fd, &ev))
		return -errno;
	q->fd = fd;
	q->gen = p->gen;
	q->proto = p->proto;
	q->peek_off = p->peek_off;
	q->scaled = p->window_scaled;
	q->readable = q->hup = q->urgent = 0;
	q->bound = 0;
	rn_crowd_join(&d->crowd, &q->crowd);
	d->n++;
	return 0;
}

/* As in fast_up.c; of a flow that is here already, and perhaps at work, one descriptor is enough. */
static int take_sockets(struct fast_down *d, uint32_t i, uint32_t gen)
{
	for (;;) {
		struct rn_pass p = { .index = NONE };
		int fd = rn_fdpass_recv(d->cfg.flows_fd, &p), wanted = p.index == i && p.gen == gen, err = 0;

		if (fd < 0) {
			if (!wanted && (fd == -EMFILE || fd == -EPROTO))
				continue; /* another's */
			d->s->c[RN_C_promote_failed]++;
			return fd;
		}
		if (!rn_pass_current(&p, d->flows, d->nflows, d->s->session, d->s->out_row[RN_ROLE_BRIDGE])) {
			d->s->c[RN_C_promote_stale]++;
			err = -ESTALE;
		} else if (!d->flow[p.index].proto || d->flow[p.index].gen != p.gen) {
			err = take_in(d, &p, fd);
			d->s->c[RN_C_promote_failed] += err != 0;
			fd = err ? fd : -1;
		}
		if (fd >= 0)
			close(fd);
		if (wanted)
			return err;
	}
}

/* Flow @i was offered and its socket is not here: egress is told as soon as there is room. */
static void lacks(struct fast_down *d, uint32_t i, uint32_t gen)
{
	struct down_flow *q = &d->flow[i];

	q->lacks_gen = gen;
	if (q->lacks)
		return;
	q->lacks = 1;
	q->lacks_next = d->lacks;
	d->lacks = i;
}

/* Down is egress's again. The half is claimed. 0, or -EAGAIN: no room to tell it, so it stays ours for now. */
static int give_back(struct fast_down *d, uint32_t i)
{
	struct rn_flow *f = &d->flows->flow[i];

	if (rn_stage_notice(d->s, RN_ROLE_BRIDGE, rn_fn_flags(RN_FN_BACK), i, f->gen))
		return -EAGAIN;
	unwatch(d, i);
	fast_bound_lift(d, &d->flow[i]);
	d->s->c[RN_C_promote_returned]++;
	rn_half_leave(&f->down.owner, d->egress);
	return 0;
}

static void offered(struct fast_down *d, uint32_t i, uint32_t gen)
{
	struct rn_flow *f = &d->flows->flow[i];
	struct down_flow *q = &d->flow[i];
	int err = q->proto && q->gen == gen ? 0 : take_sockets(d, i, gen);

	if (err) /* without its socket we cannot */
		lacks(d, i, gen);
	if (!rn_half_claim(&f->down.owner, d->me))
		return; /* taken back, or another flow's by now */
	if (f->gen != gen || err) {
		rn_half_leave(&f->down.owner, f->gen == gen ? d->egress : d->me);
		return;
	}
	if (q->proto == RN_IPPROTO_UDP)
		fast_udp_begin(d, q);
	q->at = RN_PEEK_UNKNOWN;
	q->wnd_max = f->down.snd_wnd;
	q->rtt_ns = 0;
	q->since = d->s->now;
	q->readable = 1;
	rn_half_leave(&f->down.owner, d->me);
	run(d, i);
}

void fast_down_notice(struct fast_down *d, const struct rn_desc *desc)
{
	uint32_t i = rn_fn_flow(desc);

	if (i >= d->nflows) {
		d->s->c[RN_C_drop_bad_descriptor]++;
		return;
	}
	switch (rn_fn_of(desc)) {
	case RN_FN_OFFER:
		offered(d, i, desc->len);
		break;
	case RN_FN_RESET:
		for (uint32_t k = 0; d->n && k < d->nflows; k++)
			if (d->flow[k].proto)
				let_go(d, k);
		break;
	case RN_FN_CLOSE:
		if (d->flow[i].proto && d->flow[i].gen == desc->len)
			let_go(d, i);
		break;
	case RN_FN_ACKS:
		if (d->flow[i].proto && d->flow[i].gen == desc->len)
			run(d, i);
		break;
	default:
		d->s->c[RN_C_drop_bad_descriptor]++;
	}
}

void fast_down_event(struct fast_down *d, uint32_t i, uint32_t events)
{
	struct down_flow *q;

	if (i >= d->nflows || !d->flow[i].proto)
		return;
	q = &d->flow[i];
	q->readable = 1;
	if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		q->hup = 1;
	if (events & EPOLLPRI)
		q->urgent = 1;
	run(d, i);
}

/* --- the pump --- */

/* What the guest acknowledged leaves the socket; its window is what it says. 0 or -errno: the socket broke. */
static int take_acks(struct fast_down *d, uint32_t i, struct rn_flow *f, uint64_t w)
{
	struct down_flow *q = &d->flow[i];
	uint32_t ack = rn_acks_ack(w), n = ack - f->down.snd_una;

	f->down.snd_wnd = rn_acks_wnd(w);
	if (f->down.snd_wnd > q->wnd_max)
		q->wnd_max = f->down.snd_wnd;
	if (!n || SEQ_LT(ack, f->down.snd_una) || SEQ_GT(ack, f->down.snd_max))
		return 0; /* the last cannot be: who posted it looked (and is not trusted with our socket) */
	int err = rn_peek_discard(q->fd, &q->at, n);

	if (err) {
		atomic_store_explicit(&f->acks.broke, (uint32_t)-err, memory_order_relaxed);
		return err;
	}
	RN_SHOW(f->down.snd_una, ack);
	f->down.bytes += n;
	d->s->c[RN_C_tcp_fast_down_bytes] += n;
	fast_bound_taken(d, q, n);
	q->since = d->s->now;
	if (q->rtt_ns && SEQ_LE(q->rtt_seq, ack)) {
		uint64_t came = atomic_load_explicit(&f->acks.at_ns, memory_order_relaxed);

		if (came > q->rtt_ns)
			tcp_rtt_sample(f, came - q->rtt_ns);
		q->rtt_ns = 0;
	}
	return 0;
}

/* The last frame is out. If guest_tx told a later edge before it, the guest takes that of this frame, which has the higher
 * sequence number, for the newer one (RFC 9293 3.10.7.4), and waits: so the later edge is told once more. */
static void say_again(struct fast_down *d)
{
	while (d->said != NONE) {
		struct rn_flow *f = &d->flows->flow[d->said];
		struct down_flow *q = &d->flow[d->said];
		uint8_t *eth = d->buf + BUF_ETH;
		struct rn_vnet_hdr v;
		uint32_t ack, adv;

		atomic_thread_fence(memory_order_seq_cst); /* the link, then rcv_adv: guest_tx shows it, then writes to the link */
		ack = __atomic_load_n(&f->up.rcv_nxt, __ATOMIC_ACQUIRE);
		adv = RN_LOOK(f->up.rcv_adv);
		if (RN_LIKELY(adv == d->said_adv) || ack != d->said_ack || f->gen != d->said_gen || q->gen != d->said_gen) {
			d->said = NONE; /* of new data it tells anyway */
			return;
		}
		struct rn_tcpseg t = {
			.seq = rn_acks_seq(f), .ack = ack, .flags = RN_TH_ACK, .wnd = rn_tcp_window_field(adv - ack, q->scaled),
			.ip_id = d->ip_id++, .mss = UINT16_MAX, .gateway_mac = d->cfg.gateway_mac, .offload = d->cfg.offload,
		};
		uint32_t len = rn_tcpseg_build(f, &t, eth, &v);

		memcpy(eth - RN_VNET_HLEN, &v, sizeof(v));
		d->said_adv = adv;
		if (!d->out(d->s, eth, len)) {
			d->waiting = len;
			return;
		}
	}
}

/* One frame of at most @max bytes. Bytes sent, 0: the end, -errno. */
static ssize_t send_one(struct fast_down *d, uint32_t i, struct rn_flow *f, uint32_t max, uint32_t mss)
{
	struct down_flow *q = &d->flow[i];
	uint8_t *eth = d->buf + BUF_ETH, *data = eth + HEADERS;
	uint32_t off = f->down.snd_nxt - f->down.snd_una, seq = f->down.snd_nxt, ack, adv, len;
	uint64_t began = rn_stage_inline_begin(d->s);
	struct rn_vnet_hdr v;
	ssize_t n = q->peek_off ? rn_peek_at(q->fd, &q->at, off, data, max)
				: rn_peek_past(q->fd, d->skip, off, data, max);

	if (n <= 0)
		return n == 0 && !q->peek_off && off && !q->hup ? -EAGAIN : n;
	/* rcv_nxt before rcv_adv: the edge told is then never beyond the one offered. */
	ack = __atomic_load_n(&f->up.rcv_nxt, __ATOMIC_ACQUIRE);
	adv = RN_LOOK(f->up.rcv_adv);
	struct rn_tcpseg t = {
		.seq = seq, .ack = ack, .flags = RN_TH_ACK | ((uint32_t)n < max ? RN_TH_PSH : 0),
		.wnd = rn_tcp_window_field(adv - ack, q->scaled), .ip_id = d->ip_id++, .len = (uint32_t)n,
		.mss = mss, .gateway_mac = d->cfg.gateway_mac, .offload = d->cfg.offload,
	};

	len = rn_tcpseg_build(f, &t, eth, &v);
	memcpy(eth - RN_VNET_HLEN, &v, sizeof(v));
	if (off == 0)
		q->since = d->s->now;
	if (!q->rtt_ns) {
		q->rtt_ns = d->s->now;
		q->rtt_seq = seq + (uint32_t)n;
	}
	f->down.snd_nxt = seq + (uint32_t)n;
	/* Before the frame is out: whoever reads an answer of the guest's sees what it answers (fast_up.c, acquire). */
	__atomic_store_n(&f->down.snd_max, f->down.snd_nxt, __ATOMIC_RELEASE);
	f->down.packets++;
	RN_SHOW(f->up.acked, ack);
	RN_SHOW(f->last_ns, d->s->now);
	d->s->c[RN_C_fast_frames]++;
	d->said = i;
	d->said_gen = f->gen;
	d->said_ack = ack;
	d->said_adv = adv;
	if (!d->out(d->s, eth, len)) {
		d->waiting = len;
		return n;
	}
	if (RN_UNLIKELY(began)) /* what the link made wait is the link's time */
		rn_stage_inline_end(d->s, began);
	say_again(d);
	return n;
}

/* Before letting go of a flow that stopped: what it must be told of. 1: news came meanwhile, go on; 0: let go. */
static int ask(struct rn_flow *f, uint32_t mss, uint32_t flight, int full, uint64_t seen)
{
	uint32_t want = RN_WANT_NOTHING;

	if (full) {
		want = f->down.snd_wnd > mss && flight ? RN_WANT_ACK : RN_WANT_ANY;
		atomic_store_explicit(&f->acks.want_ack, f->down.snd_una + (flight + 3) / 4, memory_order_relaxed);
	} else if (flight > TAKE_OUT) {
		want = RN_WANT_ACK;
		atomic_store_explicit(&f->acks.want_ack, f->down.snd_una + flight / 2, memory_order_relaxed);
	}
	if (want == RN_WANT_NOTHING)
		return 0;
	/* K3: the store, then the load, for everybody: else both could miss the other's (pairs K4). */
	atomic_store_explicit(&f->acks.want, want, memory_order_seq_cst);
	atomic_thread_fence(memory_order_seq_cst);
	return atomic_load_explicit(&f->acks.ack_wnd, memory_order_relaxed) != seen;
}

/**
 * pump() - One turn of a flow
 * Return: 1 it has more, 0 it stopped (or is egress's), -1 the link is full, and it has more.
 */
static int pump(struct fast_down *d, uint32_t i)
{
	struct down_flow *q = &d->flow[i];
	struct rn_flow *f = &d->flows->flow[i];
	uint32_t left = QUANTUM, mss;
	int r = 0, back = 0;

	if (!rn_half_claim(&f->down.owner, d->me)) {
		unwatch(d, i);
		return 0;
	}
	if (f->gen != q->gen)
		goto leave;
	mss = rn_tcp_mss(f->down.mss, d->cfg.mtu);
	for (;;) {
		uint64_t w = atomic_load_explicit(&f->acks.ack_wnd, memory_order_acquire); /* K2, pairs K1 */
		uint32_t flight, room, max;
		int full = 0;
		ssize_t n;

		if (take_acks(d, i, f, w) || q->urgent) {
			back = 1;
			break;
		}
		flight = f->down.snd_nxt - f->down.snd_una;
		room = f->down.snd_wnd > flight ? f->down.snd_wnd - flight : 0;
		/* Silly window avoidance, the sender's side (RFC 9293 3.8.6.2.1), as in tcp_down.c. */
		if (!room || (flight && room < mss && room < q->wnd_max / 2))
			full = q->readable;
		if (full || !q->readable) {
			rn_wait_set(&f->down.wait, &f->down.wait_ns,
				    !full ? RN_WAIT_NONE : f->down.snd_wnd ? RN_WAIT_ACK : RN_WAIT_WINDOW, d->s->now);
			if (ask(f, mss, flight, full, w))
				continue;
			if (flight || full)
				watch(d, i);
			else
				unwatch(d, i);
			break;
		}
		max = room < d->frame ? room : d->frame / mss * mss;
		if (!d->cfg.offload && max > mss)
			max = mss;
		n = send_one(d, i, f, max, mss);
		if (n == -EAGAIN) {
			q->readable = 0;
			back = q->hup;
			if (back)
				break;
			continue;
		}
		if (n < 0)
			atomic_store_explicit(&f->acks.broke, (uint32_t)-n, memory_order_relaxed);
		if (n <= 0) {
			back = 1;
			break;
		}
		rn_wait_set(&f->down.wait, &f->down.wait_ns, d->waiting ? RN_WAIT_ROOM : RN_WAIT_NONE, d->s->now);
		if ((uint32_t)n < max && !q->hup)
			q->readable = 0; /* it is empty now: more will be a new edge */
		if (d->waiting) {
			r = -1;
			break;
		}
		left -= (uint32_t)n < left ? (uint32_t)n : left;
		if (!left) {
			r = 1;
			break;
		}
	}
	if (back) {
		if (!give_back(d, i))
			return 0;
		r = 1;
	}
	if (r)
		watch(d, i);
leave:
	rn_half_leave(&f->down.owner, d->me);
	return r;
}

/* Flows with something in flight: who is through, who makes no progress? */
static void walk(struct fast_down *d)
{
	uint32_t i = d->watch, next;

	for (; i != NONE; i = next) {
		struct down_flow *q = &d->flow[i];
		struct rn_flow *f = &d->flows->flow[i];

		next = q->watch_next;
		if (!rn_half_claim(&f->down.owner, d->me)) {
			unwatch(d, i);
			continue;
		}
		if (f->gen != q->gen) {
			unwatch(d, i);
		} else {
			uint64_t w = atomic_load_explicit(&f->acks.ack_wnd, memory_order_acquire); /* K2 */
			int broke = take_acks(d, i, f, w);
			uint64_t rto = (uint64_t)f->down.rto_us * 1000u;

			if (broke || (d->s->now > q->since && d->s->now - q->since > rto)) {
				if (f->down.snd_nxt == f->down.snd_una && f->down.snd_wnd && !broke)
					unwatch(d, i); /* it waits for nothing */
				else if (!give_back(d, i))
					continue;
			} else if (f->down.snd_nxt == f->down.snd_una && !q->readable) {
				unwatch(d, i);
			}
		}
		rn_half_leave(&f->down.owner, d->me);
	}
	d->watch_at = d->s->now + WATCH_NS;
}

int fast_down_turn(struct fast_down *d)
{
	uint32_t budget = BUDGET / QUANTUM;
	int did = 0;

	if (RN_UNLIKELY(d->reset)) {
		if (!rn_stage_notice(d->s, RN_ROLE_BRIDGE, rn_fn_flags(RN_FN_RESET), 0, 0)) {
			d->reset = 0;
			did = 1;
		}
	}
	while (RN_UNLIKELY(d->lacks != NONE) &&
	       !rn_stage_notice(d->s, RN_ROLE_BRIDGE, rn_fn_flags(RN_FN_LACKS), d->lacks, d->flow[d->lacks].lacks_gen)) {
		d->flow[d->lacks].lacks = 0;
		d->lacks = d->flow[d->lacks].lacks_next;
	}
	if (d->waiting) {
		if (!d->out(d->s, d->buf + BUF_ETH, d->waiting))
			return -EAGAIN;
		d->waiting = 0;
		did = 1;
		say_again(d);
		if (d->waiting)
			return -EAGAIN;
	}
	for (uint32_t k = 0; k < RUNS && budget && d->run != NONE; k++) {
		uint32_t i = d->run;
		struct down_flow *q = &d->flow[i];
		int r;

		d->run = q->run_next;
		q->running = 0;
		did = 1;
		if (!q->proto)
			continue;
		r = q->proto == RN_IPPROTO_TCP ? pump(d, i) : fast_udp_pump(d, i);
		if (r)
			run(d, i);
		if (r < 0)
			return -EAGAIN;
		budget -= r > 0;
	}
	if (d->watch != NONE && d->s->now >= d->watch_at)
		walk(d);
	return did;
}

uint64_t fast_down_deadline(const struct fast_down *d)
{
	return d->watch == NONE ? UINT64_MAX : d->watch_at;
}
