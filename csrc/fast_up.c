/* fast_up.c - promoted flows, guest to host: the half `up` while guest_tx owns it (rules: rn_promote.h).
 *
 * A frame read from the link is looked up by its addresses and ports. Of a flow that is here it is parsed by the rules of
 * classify, and its data goes to the host socket from where the link put it: TCP in fast_train.c, UDP in fast_udp_up.c. What
 * these do not take goes to egress, which takes the half back for as long as it needs it.
 *
 * Bypass. A good TCP segment has been parsed here by then, so it goes to egress by a ring of its own, and a connection that
 * is opened, used once and closed saves a wake for each segment. All other frames, bad ones too, are classify's.
 *
 * ACKs. One a flow and turn, at the turn's end, so a burst costs one. Where the link's writes are whole frames they are
 * written here, else sent through guest_rx. A flow whose guest speaks and is answered in turn is not acknowledged at once:
 * the answer carries it (RFC 9293 3.8.6.3, RFC 5681 4.2: within 500 ms, and every second full segment; here within
 * DELAY_NS). Such a flow is known by its answers having done so before; where one did not come, the next segments are
 * acknowledged at once.
 *
 * Window. What three quarters of the host's send buffer has free (I3); there is no slack as in egress (tcp_up.c), as the
 * descriptor is watched for room instead when little is left. The watching also is what makes the kernel grow the buffer.
 *
 * Crowd. Among many senders windows are opened in turn: fast_turns.c.
 *
 * Barrier. A bulk flow never pauses, so when it is offered segments of it are always under way to egress, and the next one
 * read here is never the one at rcv_nxt. After some of them a notice is sent behind the last; the link is not read until
 * egress says that it dealt with all before it, or BARRIER_NS are over.
 *
 * system calls: write (link), recvmsg (sockets from egress), ioctl, getsockopt, epoll_ctl, close
 */
#include "fast_up_internal.h"

#include "rn_fdpass.h"

#include <errno.h>
#include <linux/sockios.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define BARRIER_NS 5000000ull
#define DELAY_NS 4000000ull /* an ACK is late by at most this, and a tick of epoll_wait */
#define SPEAKS_IN_TURN 2u /* answers that carried the ACK, to believe in the next */

struct fast_up *fast_up_new(struct rn_stage *s, const struct rn_link *link, void *flows, uint64_t flows_size,
			    const struct fast_up_config *cfg)
{
	struct fast_up *u;
	uint32_t nhash = 1;
	int err = rn_flows_check(flows, flows_size);

	if (err || !s->nin || !s->has_out[RN_ROLE_GUEST] || (cfg->bypass && !s->has_out[RN_ROLE_BRIDGE]) || classify_config_check(&cfg->parse)) {
		rn_fail(s, -EINVAL, "promotion: no flow table of this build, no rings to egress and guest_rx, or an address that is "
				    "out of range");
		return NULL;
	}
	u = calloc(1, sizeof(*u));
	if (!u)
		return NULL;
	u->s = s;
	u->link = link;
	u->flows = flows;
	u->nflows = u->flows->nflows;
	u->cfg = *cfg;
	u->way = cfg->bypass ? RN_ROLE_BRIDGE : RN_ROLE_CLASSIFY;
	u->me = rn_owner(s->row);
	u->egress = rn_owner(s->in_row[0]);
	u->rx = rn_owner(s->out_row[RN_ROLE_GUEST]);
	u->key = u->flows->secret[0] | 1;
	u->owed = u->late = u->late_tail = u->lacks = u->barrier = NONE;
	while (nhash < u->nflows * 2)
		nhash *= 2;
	u->hash_mask = nhash - 1;
	u->flow = calloc(u->nflows, sizeof(*u->flow));
	u->hash = calloc(nhash, sizeof(*u->hash)); /* index + 1: untouched pages stay untouched */
	u->udp = fast_udp_new();
	fast_turns_init(u);
	if (!u->flow || !u->hash || !u->udp || rn_flows_size(u->nflows) > flows_size) {
		fast_up_free(u);
		return NULL;
	}
	if (s->generation > 1) {
		for (uint32_t i = 0; i < u->nflows; i++) {
			struct rn_flow *f = &u->flows->flow[i];

			/* Before the half is given back its owner is sure to see it: BUSY keeps egress out until then. */
			if (atomic_load_explicit(&f->up.owner, memory_order_relaxed) == (u->me | RN_OWNER_BUSY))
				f->up.torn = 1;
			(void)rn_half_heir(&f->up.owner, u->me, u->egress);
		}
		u->reset = 1;
	}
	return u;
}

static void let_go(struct fast_up *u, uint32_t i);

void fast_up_free(struct fast_up *u)
{
	if (!u)
		return;
	for (uint32_t i = 0; u->n && u->flow && i < u->nflows; i++)
		if (u->flow[i].proto)
			let_go(u, i);
	free(u->flow);
	free(u->hash);
	free(u->udp);
	free(u);
}

/* --- which flow --- */

static uint32_t bucket(const struct fast_up *u, uint32_t guest4, uint32_t peer4, uint32_t ports, uint8_t proto)
{
	uint64_t h = ((uint64_t)guest4 << 32 | peer4) * 0x9e3779b97f4a7c15ull + u->key;

	h = (h ^ h >> 29 ^ ((uint64_t)ports << 8 | proto)) * u->key;
	h ^= h >> 32;
	h *= 0xd6e8feb86659fd93ull;
	return (uint32_t)(h >> 32) & u->hash_mask;
}

static uint32_t lookup(const struct fast_up *u, const uint8_t *eth)
{
	const uint8_t *ip = eth + RN_ETH_HLEN;
	uint32_t guest4, peer4, ports, i;

	memcpy(&guest4, ip + RN_IP4_SRC, 4);
	memcpy(&peer4, ip + RN_IP4_DST, 4);
	memcpy(&ports, ip + RN_IP4_HLEN, 4);
	for (i = u->hash[bucket(u, guest4, peer4, ports, ip[RN_IP4_PROTO])]; i; i = u->flow[i - 1].hash_next) {
		const struct fast_flow *ff = &u->flow[i - 1];

		if (ff->ports == ports && ff->peer4 == peer4 && ff->guest4 == guest4 && ff->proto == ip[RN_IP4_PROTO])
			return i - 1;
	}
	return NONE;
}

static void unhash(struct fast_up *u, uint32_t i)
{
	struct fast_flow *ff = &u->flow[i];
	uint32_t *at = &u->hash[bucket(u, ff->guest4, ff->peer4, ff->ports, ff->proto)];

	while (*at && *at != i + 1)
		at = &u->flow[*at - 1].hash_next;
	if (*at)
		*at = ff->hash_next;
}

/* Forget a flow. Lists that hold it find proto 0. */
static void let_go(struct fast_up *u, uint32_t i)
{
	struct fast_flow *ff = &u->flow[i];

	unhash(u, i);
	if (ff->watched) /* others hold the socket too: a close alone would leave it in epoll */
		(void)epoll_ctl(u->s->epfd, EPOLL_CTL_DEL, ff->fd, NULL);
	close(ff->fd);
	fast_turns_close(u, i);
	ff->fd = -1;
	ff->proto = 0;
	ff->watched = 0;
	u->n--;
	if (u->barrier == i)
		u->barrier = NONE;
}

static void take_in(struct fast_up *u, const struct rn_pass *p, int fd)
{
	struct fast_flow *ff = &u->flow[p->index];
	const struct rn_flow *f = &u->flows->flow[p->index];
	uint16_t port;
	uint32_t b;

	if (ff->proto)
		let_go(u, p->index);
	ff->fd = fd;
	ff->gen = p->gen;
	ff->proto = p->proto;
	ff->scaled = p->window_scaled;
	ff->in_turn = 0;
	ff->misses = 0;
	ff->held = 0;
	ff->sndbuf = 0;
	ff->tight = 0;
	ff->sack = p->sack;
	fast_turns_start(u, p->index, RN_LOOK(f->up.rcv_nxt));
	ff->df = p->df;
	ff->slow = 0;
	ff->to = (struct sockaddr_in){ .sin_family = AF_INET, .sin_port = htons(p->peer_port) };
	memcpy(&ff->to.sin_addr, p->host4, 4);
	memcpy(&ff->guest4, f->guest_addr + 12, 4);
	memcpy(&ff->peer4, p->peer4, 4);
	port = htons(f->guest_port);
	memcpy(&ff->ports, &port, 2);
	port = htons(p->peer_port);
	memcpy((uint8_t *)&ff->ports + 2, &port, 2);
	b = bucket(u, ff->guest4, ff->peer4, ff->ports, ff->proto);
	ff->hash_next = u->hash[b];
	u->hash[b] = p->index + 1;
	u->n++;
}

/* Sockets that came; until flow @i's is here. 0, or -errno: it did not come. */
static int take_sockets(struct fast_up *u, uint32_t i, uint32_t gen)
{
	for (;;) {
		struct rn_pass p = { .index = NONE };
		int fd = rn_fdpass_recv(u->cfg.flows_fd, &p), wanted = p.index == i && p.gen == gen;

		if (fd < 0) {
			if (!wanted && (fd == -EMFILE || fd == -EPROTO))
				continue; /* another's */
			u->s->c[RN_C_promote_failed]++;
			return fd;
		}
		if (!rn_pass_current(&p, u->flows, u->nflows, u->s->session, u->s->in_row[0])) {
			u->s->c[RN_C_promote_stale]++;
			close(fd);
			if (wanted)
				return -ESTALE;
			continue;
		}
		take_in(u, &p, fd);
		if (wanted)
			return 0;
	}
}

/* Flow @i was offered and its socket is not here: egress is told as soon as there is room. */
static void lacks(struct fast_up *u, uint32_t i, uint32_t gen)
{
	struct fast_flow *ff = &u->flow[i];

	ff->lacks_gen = gen;
	if (ff->lacks)
		return;
	ff->lacks = 1;
	ff->lacks_next = u->lacks;
	u->lacks = i;
}

void fast_up_notice(struct fast_up *u, const struct rn_desc *d)
{
	uint32_t i = rn_fn_flow(d);

	if (i >= u->nflows) {
		u->s->c[RN_C_drop_bad_descriptor]++;
		return;
	}
	switch (rn_fn_of(d)) {
	case RN_FN_OFFER:
		if (!u->flow[i].proto || u->flow[i].gen != d->len)
			if (take_sockets(u, i, d->len))
				lacks(u, i, d->len);
		break;
	case RN_FN_CLOSE:
		if (u->flow[i].proto && u->flow[i].gen == d->len)
			let_go(u, i);
		break;
	case RN_FN_BARRIER_OVER:
		u->barrier_until = 0;
		break;
	case RN_FN_RESET:
		for (uint32_t k = 0; u->n && k < u->nflows; k++)
			if (u->flow[k].proto)
				let_go(u, k);
		break;
	default:
		u->s->c[RN_C_drop_bad_descriptor]++;
	}
}

/* --- segments --- */

void fast_up_owe(struct fast_up *u, uint32_t i)
{
	struct fast_flow *ff = &u->flow[i];

	if (ff->owed)
		return;
	ff->owed = 1;
	ff->owed_next = u->owed;
	u->owed = i;
}

int fast_up_open(struct fast_up *u)
{
	if (RN_UNLIKELY(u->reset)) {
		if (rn_stage_notice(u->s, u->way, rn_fn_flags(RN_FN_RESET), 0, 0))
			return 0;
		u->reset = 0;
	}
	if (RN_UNLIKELY(u->barrier_until)) {
		if (u->s->now < u->barrier_until)
			return 0;
		u->barrier_until = 0;
	}
	/* What is held may have to go the same way yet, a frame and a notice each. */
	return rn_stage_room(u->s, u->way, 1 + u->nheld) && (!u->n || rn_stage_room(u->s, RN_ROLE_GUEST, 1 + u->nheld));
}

enum fast_up_way fast_up_take(struct fast_up *u, uint8_t *eth, uint32_t len, uint16_t flags, uint64_t began, struct rn_parsed *p)
{
	struct rn_view v = { .data = eth, .len = len };
	struct rn_vnet_hdr vnet;
	int tcp, usual, held;
	uint32_t i;

	if (len < RN_ETH_HLEN + RN_IP4_HLEN + RN_UDP_HLEN || rn_get16(eth + 12) != RN_ETHERTYPE_IPV4 ||
	    eth[RN_ETH_HLEN] != 0x45)
		return FAST_UP_CLASSIFY;
	tcp = eth[RN_ETH_HLEN + RN_IP4_PROTO] == RN_IPPROTO_TCP;
	i = u->n ? lookup(u, eth) : NONE;
	if (i == NONE && !(tcp && u->cfg.bypass))
		return FAST_UP_CLASSIFY;
	usual = i != NONE && tcp && fast_train_look(eth, len);
	held = usual && fast_train_long(len);
	if (!held && i != NONE && u->flow[i].held)
		return FAST_UP_BEHIND;
	if (flags & RN_DESC_VNET)
		memcpy(&vnet, eth - RN_VNET_HLEN, sizeof(vnet));
	if (rn_parse_frame(&v, flags & RN_DESC_VNET ? &vnet : NULL, &u->cfg.parse, p) != RN_V_BRIDGE)
		return FAST_UP_CLASSIFY; /* it says why, and counts it */
	if (held && p->payload_len) {
		fast_train_hold(u, i, &(struct fast_frame){ .eth = eth, .len = len, .flags = flags, .began = began, .p = *p });
		return FAST_UP_HELD;
	}
	if (i != NONE && (tcp ? usual && fast_train_take(u, i, eth, p) : fast_udp_take(u, i, eth, p)))
		return FAST_UP_DONE;
	return tcp && u->cfg.bypass ? FAST_UP_BRIDGE : FAST_UP_CLASSIFY;
}

void fast_up_sent(struct fast_up *u)
{
	uint32_t i = u->barrier;

	if (RN_LIKELY(i == NONE))
		return;
	if (rn_stage_notice(u->s, u->way, rn_fn_flags(RN_FN_BARRIER), i, u->flow[i].gen))
		return; /* full: behind one of the next frames, then */
	u->barrier = NONE;
	u->barrier_until = u->s->now + BARRIER_NS;
	u->s->c[RN_C_promote_barriers]++;
}

/* --- what the guest is told --- */

/* Wait for room in the host socket, or not any more. */
static void watch_room(struct fast_up *u, uint32_t i)
{
	struct fast_flow *ff = &u->flow[i];
	struct epoll_event ev = { .events = EPOLLOUT | EPOLLONESHOT, .data.u64 = RN_EV(RN_TAG_FLOW, i) };

	/* Both look at the socket at once, and make the kernel tell when a full one has a third free again. */
	if (!epoll_ctl(u->s->epfd, ff->watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, ff->fd, &ev))
		ff->watched = 2;
}

static void make_late(struct fast_up *u, uint32_t i)
{
	struct fast_flow *ff = &u->flow[i];

	if (ff->late)
		return;
	ff->late = 1;
	ff->late_next = NONE;
	ff->late_due = u->s->now + DELAY_NS;
	ff->late_seq = u->flows->flow[i].up.rcv_nxt;
	ff->late_max = RN_LOOK(u->flows->flow[i].down.snd_max);
	if (u->late == NONE)
		u->late = i;
	else
		u->flow[u->late_tail].late_next = i;
	u->late_tail = i;
}

/* I3. Never back (RFC 9293 3.8.6), and not by crumbs (3.8.6.2.2). 1: it moved. */
static int update_window(struct fast_up *u, uint32_t i, struct rn_flow *f)
{
	struct fast_flow *ff = &u->flow[i];
	uint32_t limit = ff->scaled ? 65535u << RN_TCP_WSCALE : 65535u, mtu = u->cfg.parse.mtu, room, edge;
	uint32_t wnd = f->up.rcv_adv - f->up.rcv_nxt;
	enum fast_turn_may may = fast_turns_may(u, i, f->up.rcv_nxt, wnd);
	int out = 0, moved = 0, scant;

	if (may == FAST_TURN_LATER) {
		rn_wait_set(&f->up.wait, &f->up.wait_ns, wnd < 2u * mtu ? RN_WAIT_TURN : RN_WAIT_NONE, u->s->now);
		return 0;
	}
	if (ioctl(ff->fd, SIOCOUTQ, &out) < 0)
		return 0;
	if (!ff->sndbuf || (uint32_t)out > ff->sndbuf / 2) {
		int sz = 0;
		socklen_t l = sizeof(sz);

		if (getsockopt(ff->fd, SOL_SOCKET, SO_SNDBUF, &sz, &l) == 0 && sz > 0)
			ff->sndbuf = (uint32_t)sz;
	}
	room = ff->sndbuf / 4 * 3; /* the rest is for the kernel's bookkeeping; what does not fit all the same is parked */
	room = room > (uint32_t)out ? room - (uint32_t)out : 0;
	/* The kernel, which counts its bookkeeping, told of room: a third of the buffer. It tells of the same room once more if
	 * asked, and of more only when this was used. So the guest gets it, and nobody looks again until it did something. A
	 * socket with nothing in it takes a super-frame, however small its buffer still is; if it does not, the kernel makes that
	 * larger. And less than two segments are no window (RFC 9293 3.8.6.2.1: the guest may wait for more). */
	if (ff->told_window || !out) {
		uint32_t least = ff->told_window ? ff->sndbuf / 4 : ff->tight ? 0 : u->turns.quantum;

		least = least < 2u * mtu ? 2u * mtu : least;
		room = room < least ? least : room;
	}
	if (room > limit)
		room = limit;
	scant = (room < ff->sndbuf / 4 || room < 2u * mtu) && room < limit;
	if (may == FAST_TURN_NOW && room > u->turns.quantum)
		room = u->turns.quantum;
	edge = f->up.rcv_nxt + room;
	if (SEQ_GT(edge, f->up.rcv_adv) && (edge - f->up.rcv_adv >= 2u * mtu || wnd < 4u * mtu)) {
		wnd = room;
		moved = 1;
		if (may == FAST_TURN_NOW)
			fast_turns_open(u, i, wnd, edge - f->up.rcv_adv);
		RN_SHOW(f->up.rcv_adv, edge);
	}
	if (scant && ff->watched != 2 && !ff->told_window)
		watch_room(u, i);
	rn_wait_set(&f->up.wait, &f->up.wait_ns, out && wnd < 2u * mtu ? RN_WAIT_HOST : RN_WAIT_NONE, u->s->now);
	return moved;
}

/* Write the ACK, or hand it to guest_rx. 0, or -EAGAIN: no room or buffer there, asked for. */
static int write_ack(struct fast_up *u, struct rn_flow *f, const struct rn_tcpseg *t)
{
	struct rn_vnet_hdr *vnet = (struct rn_vnet_hdr *)(u->ack_buf + 4);
	uint8_t *eth = u->ack_buf + 4 + RN_VNET_HLEN;
	struct rn_buf *b;
	uint32_t len;

	if (u->cfg.direct && u->link->fd >= 0 && rn_link_atomic(u->link)) {
		len = rn_tcpseg_build(f, t, eth, vnet);
		if (rn_link_write(u->link, eth - RN_VNET_HLEN, len) != -EAGAIN) {
			/* Behind the write: the frame that is being answered is on its way through a capture as well. */
			rn_tap_frame(u->s, RN_TAP_LINK, RN_PCAP_TO_GUEST, eth, len);
			return 0; /* written; or lost for a reason guest_rx counts with the next frame */
		}
	}
	if (!rn_stage_room(u->s, RN_ROLE_GUEST, 1))
		return -EAGAIN;
	b = rn_buf_alloc(&u->s->pool, RN_SMALL);
	if (!b) {
		u->s->want_buf = 1;
		return -EAGAIN;
	}
	eth = (uint8_t *)b + RN_BUF_ETH_OFF;
	len = rn_tcpseg_build(f, t, eth, (struct rn_vnet_hdr *)(eth - RN_VNET_HLEN));
	rn_stage_emit(u->s, RN_ROLE_GUEST, b, eth, len, u->cfg.offload ? RN_DESC_VNET : 0);
	return 0;
}

/* Tell the guest what is owed to it. @due: 1: no waiting for an answer any more. 0, or -EAGAIN. */
static int tell(struct fast_up *u, uint32_t i, int due)
{
	struct fast_flow *ff = &u->flow[i];
	struct rn_flow *f = &u->flows->flow[i];
	uint32_t acked;
	uint8_t opt[RN_SACK_LEN(1)];
	int r = 0, moved, turn = u->turns.now == i;

	if (!ff->proto)
		return 0;
	if (!rn_half_claim(&f->up.owner, u->me)) {
		if (ff->told_window)
			make_late(u, i); /* room that the kernel tells of once */
		return 0; /* egress has it, and acknowledges what it finds unacknowledged */
	}
	if (f->gen != ff->gen)
		goto leave;
	moved = update_window(u, i, f);
	acked = RN_LOOK(f->up.acked);
	if (due) {
		/* Something was sent to the guest since it asked: taken for an answer, which carried the acknowledgement. */
		if (RN_LOOK(f->down.snd_max) != ff->late_max)
			ff->in_turn += ff->in_turn < SPEAKS_IN_TURN;
		else
			ff->in_turn = 0;
		if (!SEQ_LT(acked, ff->late_seq) && acked != f->up.rcv_nxt) {
			ff->again = 1; /* what is unacknowledged was asked later, and has its own time */
			goto leave;
		}
	}
	if (acked == f->up.rcv_nxt && !ff->asked && !(moved && (ff->told_window || due || turn)))
		goto leave;
	if (!due && !ff->told_window && !turn && !ff->asked && f->up.rcv_nxt - acked < 2u * (u->cfg.parse.mtu - 40u)) {
		make_late(u, i);
		if (ff->in_turn >= SPEAKS_IN_TURN)
			goto leave;
	}
	struct rn_tcpseg t = {
		.seq = rn_acks_seq(f), .ack = f->up.rcv_nxt, .flags = RN_TH_ACK,
		.wnd = rn_tcp_window_field(f->up.rcv_adv - f->up.rcv_nxt, ff->scaled), .ip_id = u->ip_id++,
		.gateway_mac = u->cfg.parse.gateway_mac, .offload = u->cfg.offload, .mss = UINT16_MAX,
	};

	if (RN_UNLIKELY(ff->asked && ff->sack && ff->dup_lo != ff->dup_hi)) {
		t.optlen = rn_sack_head(opt, 1);
		rn_put32(opt + 4, ff->dup_lo);
		rn_put32(opt + 8, ff->dup_hi);
		t.opt = opt;
	}
	r = write_ack(u, f, &t);
	if (!r) {
		RN_SHOW(f->up.acked, t.ack);
		u->s->c[RN_C_tcp_fast_acks]++;
	}
leave:
	rn_half_leave(&f->up.owner, u->me);
	return r;
}

int fast_up_flush(struct fast_up *u)
{
	fast_udp_flush(u);
	while (RN_UNLIKELY(u->lacks != NONE) &&
	       !rn_stage_notice(u->s, u->way, rn_fn_flags(RN_FN_LACKS), u->lacks, u->flow[u->lacks].lacks_gen)) {
		u->flow[u->lacks].lacks = 0;
		u->lacks = u->flow[u->lacks].lacks_next;
	}
	while (u->owed != NONE) {
		uint32_t i = u->owed;
		struct fast_flow *ff = &u->flow[i];

		if (tell(u, i, 0))
			return 1;
		u->owed = ff->owed_next;
		ff->owed = ff->asked = 0;
		ff->told_window = 0;
	}
	while (RN_UNLIKELY((u->turns.now = fast_turns_next(u)) != NONE)) {
		int r = tell(u, u->turns.now, 0);

		u->turns.now = NONE;
		if (r)
			return 1;
		fast_turns_done(u);
	}
	while (u->late != NONE && u->s->now >= u->flow[u->late].late_due) {
		uint32_t i = u->late;
		struct fast_flow *ff = &u->flow[i];

		if (tell(u, i, 1))
			return 1;
		ff->late = 0;
		u->late = ff->late_next;
		if (ff->again)
			make_late(u, i);
		ff->again = 0;
	}
	return 0;
}

void fast_up_event(struct fast_up *u, uint32_t i, uint32_t events)
{
	(void)events; /* room, or the socket's end: egress is told of that too */
	if (i >= u->nflows || !u->flow[i].proto || u->flow[i].watched != 2)
		return;
	u->flow[i].watched = 1;
	u->flow[i].told_window = 1;
	fast_up_owe(u, i);
}

uint64_t fast_up_deadline(const struct fast_up *u)
{
	uint64_t at = u->late == NONE ? UINT64_MAX : u->flow[u->late].late_due, turn = fast_turns_deadline(u);

	if (turn < at)
		at = turn;
	return u->barrier_until && u->barrier_until < at ? u->barrier_until : at;
}
