/* fuzz_promote.c - a hostile guest, and a hostile flow table, against promoted flows: fast_up.c's segments and fast_down.c's ACKs.
 *
 * The two halves are real, with their rings, sockets by SCM_RIGHTS, and a host connection on loopback behind them. The target
 * plays the guest's link, egress (which takes halves back and lends them again, and restarts stages) and the clock. An input is
 * a list of operations, each a few bytes.
 *
 * What must hold until the table was scribbled over, or the host side broke:
 *   up    The host reads the bytes the guest sent at rcv_nxt and no others, as many as rcv_nxt says.
 *   ACK   Never of what the socket did not take; the window's edge never moves back. Two full segments are acknowledged in the
 *         turn they came in, everything within 500 ms (RFC 9293 3.8.6.3, RFC 5681 4.2).
 *   down  The guest sees the bytes the host wrote, inside its window; what it did not acknowledge is still in the socket.
 *   end   Guest and host behave: everything arrives. No descriptor is left.
 * With a scribbled table nothing is promised but that the sanitizers find nothing.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fast_down.h"
#include "fast_up.h"
#define FUZZ_NAME "promote"
#include "fuzz_input.h"
#include "fuzz_main.h"
#include "rn_csum.h"
#include "rn_peek.h"
#include "rn_promote.h"
#include "rn_tcpseg.h"

#define MTU 1500u
#define GPORT 5000u
#define PPORT 80u
#define WSCALE 5u
#define MAX (1u << 18) /* bytes each way */
#define HELD_MAX 32 /* frames, fast_up_internal.h */
#define START_NS 1000000000000ull
enum { TX, EGRESS, RX, CLASSIFY, ROWS };

static const uint8_t gateway[4] = { 10, 0, 2, 1 }, guest[4] = { 10, 0, 2, 2 };
static const uint8_t gateway_mac[6] = { 2, 0xab, 0xcd, 0, 0, 1 }, guest_mac[6] = { 0x52, 0x54, 0xab, 0, 0, 2 };

static struct target {
	struct rn_stage *tx, *rx;
	struct fast_up *up;
	struct fast_down *down;
	struct rn_link link;
	void *session, *arena, *flows, *ring[5]; /* to tx, tx to rx, tx to egress, rx to egress, to rx */
	uint64_t session_size, arena_size, flows_size;
	struct rn_pool pool;
	struct rn_ring_rx from_tx[2], from_rx;
	int bells[ROWS], chan_tx[2], chan_rx[2], client, server;
	struct rn_flow *f;
	uint64_t now, since; /* since: of the oldest byte that is not acknowledged */
	uint32_t up0, down0, seen; /* first numbers; the guest's rcv_nxt */
	uint32_t acked, edge; /* highest that were told: acknowledgment, window's edge */
	uint32_t believed, wl1; /* the edge as the guest sees it, and SND.WL1 */
	uint32_t offered, claimed; /* edge of the guest's window, and what it acknowledged, their highest */
	uint32_t host_wrote, host_read;
	uint32_t nheld, held_bytes; /* read, and not sent to the host yet */
	int odd, full, broke;
	uint64_t inputs, up_bytes, down_bytes, acks, relent, restarts, scribbled, trains;
} t;

static int lt(uint32_t a, uint32_t b)
{
	return (int32_t)(a - b) < 0;
}

static uint8_t up_byte(uint32_t seq)
{
	return (uint8_t)(seq * 2654435761u >> 21);
}

static uint8_t down_byte(uint32_t seq)
{
	return (uint8_t)(seq * 2246822519u >> 19);
}

/* --- the guest's side of the link --- */

static void arrives(const uint8_t *eth, uint32_t len)
{
	const uint8_t *th = eth + 34;
	uint32_t seq, ack, n, edge;

	if (t.odd)
		return;
	must(len >= 54 && rn_get16(eth + 16) == len - 14, "lengths");
	must(rn_csum_fold(rn_csum_add(0, eth + 14, 20)) == 0xffff, "IP checksum");
	must(rn_csum_fold(rn_csum_add(rn_csum_pseudo4(eth + 26, eth + 30, RN_IPPROTO_TCP, len - 34), th, len - 34)) == 0xffff,
	     "TCP checksum");
	must(!memcmp(eth, guest_mac, 6) && rn_get16(th + RN_TCP_DPORT) == GPORT, "to the guest");
	seq = rn_get32(th + RN_TCP_SEQ);
	ack = rn_get32(th + RN_TCP_ACK);
	n = len - 54;
	must(!lt(t.f->up.rcv_nxt, ack), "ACK of what the socket took");
	edge = ack + ((uint32_t)rn_get16(th + RN_TCP_WND) << RN_TCP_WSCALE);
	/* RFC 9293 3.10.7.4: what of that the guest believes. A frame of guest_rx may be overtaken by guest_tx's ACK. */
	if (!lt(ack, t.acked) && (lt(t.wl1, seq) || (t.wl1 == seq && !lt(ack, t.acked)))) {
		t.believed = edge;
		t.wl1 = seq;
	}
	if (lt(t.acked, ack))
		t.acked = ack;
	if (lt(t.edge, edge))
		t.edge = edge;
	if (!n) {
		t.acks++;
		return;
	}
	must(n <= 1460 && !lt(t.offered, seq + n), "inside the guest's window and its MSS");
	must(!lt(t.down0 + t.host_wrote, seq + n), "only what the host wrote");
	for (uint32_t k = 0; k < n; k++)
		must(th[20 + k] == down_byte(seq + k), "a byte as the host wrote it");
	must(seq == t.seen, "each byte once, in order");
	t.seen += n;
	t.down_bytes += n;
}

static int out(struct rn_stage *s, const uint8_t *eth, uint32_t len)
{
	(void)s;
	if (t.full)
		return 0;
	arrives(eth, len);
	return 1;
}

/* --- egress --- */

static void offer(void)
{
	struct rn_pass p = { .index = 0, .gen = t.f->gen, .proto = RN_IPPROTO_TCP, .peek_off = 0, .window_scaled = 1, .peer_port = PPORT };
	struct rn_desc d = { .len = t.f->gen, .flags = rn_fn_flags(RN_FN_OFFER) };

	memcpy(p.peer4, gateway, 4);
	(void)rn_fdpass_send(t.chan_tx[0], &p, t.client);
	(void)rn_fdpass_send(t.chan_rx[0], &p, t.client);
	atomic_store(&t.f->acks.ack_wnd, (uint64_t)t.f->down.snd_una << 32 | t.f->down.snd_wnd);
	atomic_store(&t.f->acks.want, RN_WANT_NOTHING);
	atomic_store(&t.f->down.owner, rn_owner(RX));
	atomic_store(&t.f->up.owner, rn_owner(TX));
	fast_down_notice(t.down, &d);
	fast_up_notice(t.up, &d);
	t.relent++;
}

/* Egress takes both halves, reads what was acknowledged, and lends them again. */
static void relend(void)
{
	uint64_t w;
	uint32_t ack;

	if (t.f->gen != 1 || t.broke)
		return;
	rn_half_seize(&t.f->up.owner, rn_owner(EGRESS), NULL);
	rn_half_seize(&t.f->down.owner, rn_owner(EGRESS), NULL);
	w = atomic_load(&t.f->acks.ack_wnd);
	ack = rn_acks_ack(w);
	if (ack != t.f->down.snd_una && !lt(ack, t.f->down.snd_una) && !lt(t.f->down.snd_max, ack)) {
		uint32_t at = RN_PEEK_UNKNOWN;

		if (rn_peek_discard(t.client, &at, ack - t.f->down.snd_una)) {
			t.broke = 1;
			return;
		}
		t.f->down.snd_una = ack;
	}
	t.f->down.snd_wnd = rn_acks_wnd(w);
	t.f->up.acked = t.f->up.rcv_nxt; /* egress acknowledges what it finds, */
	if (t.f->up.rcv_adv - t.f->up.rcv_nxt < 2 * MTU) { /* and opens a window that is closed, or nearly (tcp_take_up()) */
		t.f->up.rcv_adv = t.f->up.rcv_nxt + 65536;
		t.acked = t.f->up.acked;
		t.edge = t.believed = t.f->up.rcv_adv;
	}
	t.f->up.torn = 0;
	t.f->down.torn = 0;
	offer();
}

static void drain(void)
{
	for (int k = 0; k < 2; k++) {
		int n = rn_ring_peek(&t.from_tx[k], 64);

		must(n >= 0, "ring of guest_tx");
		for (int i = 0; i < n; i++) {
			struct rn_desc d = rn_ring_at(&t.from_tx[k], (uint32_t)i);

			if (d.flags & RN_DESC_FLOW) {
				if (k == 0)
					fast_down_notice(t.down, &d);
				continue;
			}
			arrives(t.pool.base + d.off, d.len);
			rn_buf_free(&t.pool, (struct rn_buf *)(t.pool.base + d.off - RN_BUF_ETH_OFF));
		}
		rn_ring_consume(&t.from_tx[k], (uint32_t)n);
	}
	int n = rn_ring_peek(&t.from_rx, 64), back = 0;

	must(n >= 0, "ring of guest_rx");
	for (int i = 0; i < n; i++) {
		struct rn_desc d = rn_ring_at(&t.from_rx, (uint32_t)i);

		back |= rn_fn_of(&d) == RN_FN_BACK || rn_fn_of(&d) == RN_FN_LACKS;
	}
	rn_ring_consume(&t.from_rx, (uint32_t)n);
	if (back)
		relend();
}

static void events(struct rn_stage *s, void (*tell)(void *, uint32_t, uint32_t), void *who)
{
	struct epoll_event ev[16];
	int n = epoll_wait(s->epfd, ev, 16, 0);

	for (int i = 0; i < n; i++)
		if (ev[i].data.u64 >> 32 == RN_TAG_FLOW)
			tell(who, (uint32_t)ev[i].data.u64, ev[i].events);
}

static void tell_up(void *u, uint32_t i, uint32_t ev)
{
	fast_up_event(u, i, ev);
}

static void tell_down(void *d, uint32_t i, uint32_t ev)
{
	fast_down_event(d, i, ev);
}

static void begin_turn(struct rn_stage *s)
{
	rn_stage_begin(s);
	s->now = t.now;
}

static void settle(void);

static void turn_tx(void)
{
	uint32_t owed;

	settle();
	begin_turn(t.tx);
	events(t.tx, tell_up, t.up);
	(void)fast_up_flush(t.up);
	rn_stage_end(t.tx);
	drain();
	if (t.odd || atomic_load(&t.f->up.owner) != rn_owner(TX))
		return;
	owed = t.f->up.rcv_nxt - t.f->up.acked;
	must(owed < 2 * (MTU - 40), "two full segments are acknowledged at once (RFC 5681 4.2)");
	if (!owed)
		t.since = t.now;
	must(t.now - t.since <= 500000000ull, "an ACK within 500 ms (RFC 9293 3.8.6.3)");
}

static void turn_rx(void)
{
	begin_turn(t.rx);
	events(t.rx, tell_down, t.down);
	for (int k = 0; k < 4 && fast_down_turn(t.down) > 0; k++)
		;
	rn_stage_end(t.rx);
	drain();
}

/* --- guest --- */

/* What is held goes to the host. Also in the middle of a guest's burst: it is what the stage does with a frame behind it. */
static void settle(void)
{
	const struct fast_frame *h;
	uint32_t before = t.f->up.rcv_nxt, next = before, held = 0, n;

	begin_turn(t.tx);
	n = fast_up_settle(t.up, &h);
	must(n == t.nheld, "as many as were held");
	for (uint32_t k = 0; k < n; k++) {
		uint32_t seq = rn_get32(h[k].eth + 34 + RN_TCP_SEQ), len = h[k].p.payload_len;

		if (seq == next && h[k].done)
			next += len;
		else if (seq == next && !held)
			held = len; /* which the host may have taken a part of, or all, with its acknowledgment left to egress */
		if (!h[k].done)
			fast_up_sent(t.up);
	}
	t.nheld = t.held_bytes = 0;
	rn_stage_end(t.tx);
	drain();
	if (!t.odd && t.f->gen == 1) {
		must(!lt(t.f->up.rcv_nxt, next) && t.f->up.rcv_nxt - next <= held, "only what was sent, and in order");
		t.up_bytes += t.f->up.rcv_nxt - before;
	}
	if (n > 1)
		t.trains++;
	if (atomic_load(&t.f->up.owner) == rn_owner(EGRESS))
		relend(); /* the socket did not take it all */
}

/* @more: 1: more is to be read before what is held goes to the host */
static void segment(uint8_t flags, uint32_t seq, uint32_t ack, uint16_t wnd, uint32_t len, uint32_t optlen, uint32_t cut, int more)
{
	static uint8_t buf[HELD_MAX + 1][RN_VNET_HLEN + 2 + 70000];
	uint8_t *f = buf[t.nheld] + RN_VNET_HLEN + 2, *th = f + 34;
	struct rn_vnet_hdr v = { .flags = RN_VNET_NEEDS_CSUM, .csum_start = 34, .csum_offset = RN_TCP_SUM };
	uint32_t l4 = 20 + optlen + len, before = t.f->up.rcv_nxt;
	uint32_t edge = ack + ((uint32_t)wnd << WSCALE);
	enum fast_up_way way;
	struct rn_parsed p;

	rn_ip4_build(f, gateway_mac, guest_mac, guest, gateway, RN_IPPROTO_TCP, 64, 0, RN_IP4_DF, l4);
	memset(th, 1, 20 + optlen);
	rn_put16(th + RN_TCP_SPORT, GPORT);
	rn_put16(th + RN_TCP_DPORT, PPORT);
	rn_put32(th + RN_TCP_SEQ, seq);
	rn_put32(th + RN_TCP_ACK, ack);
	th[RN_TCP_OFF] = (uint8_t)((20 + optlen) / 4 << 4);
	th[RN_TCP_FLAGS] = flags;
	rn_put16(th + RN_TCP_WND, wnd);
	for (uint32_t k = 0; k < len; k++)
		th[20 + optlen + k] = up_byte(seq + k);
	if (len + 40 > MTU) {
		v.gso_type = RN_VNET_GSO_TCPV4;
		v.gso_size = 1460;
		v.hdr_len = (uint16_t)(54 + optlen);
	}
	memcpy(f - RN_VNET_HLEN, &v, sizeof(v));
	/* What it claims to have, it does not get again; a later edge counts if the half takes the segment, which it may unless
	 * more was acknowledged before. */
	if (!lt(ack, t.claimed) && !lt(t.seen, ack)) {
		t.claimed = ack;
		if (lt(t.offered, edge))
			t.offered = edge;
	}
	if (lt(t.seen, ack) && !lt(t.f->down.snd_max, ack))
		t.odd = 1; /* of bytes that are in the link's stage still */
	begin_turn(t.tx);
	if (fast_up_open(t.up)) {
		uint32_t total = 34 + l4;

		way = fast_up_take(t.up, f, cut < total ? total - cut : 0, RN_DESC_VNET, 0, &p);
		if (way == FAST_UP_BEHIND) {
			must(t.nheld, "behind something");
			settle();
			before = t.f->up.rcv_nxt;
			begin_turn(t.tx);
			if (!fast_up_open(t.up))
				return;
			way = fast_up_take(t.up, f, cut < total ? total - cut : 0, RN_DESC_VNET, 0, &p);
			must(way != FAST_UP_BEHIND && way != FAST_UP_HELD, "behind nothing any more");
		}
		if (way == FAST_UP_HELD) {
			must(++t.nheld <= HELD_MAX, "no more than can be held");
			t.held_bytes += p.payload_len;
			if (!more || fast_up_full(t.up))
				settle();
			return;
		}
		if (way != FAST_UP_DONE)
			fast_up_sent(t.up);
	}
	rn_stage_end(t.tx);
	drain();
	if (!t.odd && t.f->gen == 1) {
		uint32_t took = t.f->up.rcv_nxt - before;

		must(took <= len && (!took || seq == before), "only what was sent, and in order");
		t.up_bytes += took;
	}
	if (atomic_load(&t.f->up.owner) == rn_owner(EGRESS))
		relend();
}

/* --- host --- */

static void host_read(uint32_t max)
{
	uint8_t b[4096];

	while (max) {
		ssize_t n = recv(t.server, b, max < sizeof(b) ? max : sizeof(b), MSG_DONTWAIT);

		if (n <= 0)
			return;
		for (ssize_t k = 0; k < n && !t.odd; k++)
			must(b[k] == up_byte(t.up0 + t.host_read + (uint32_t)k), "a byte as the guest sent it");
		t.host_read += (uint32_t)n;
		must(t.odd || !lt(t.f->up.rcv_nxt, t.up0 + t.host_read), "no more than rcv_nxt says");
		max -= (uint32_t)n;
	}
}

static void host_write(uint32_t n)
{
	uint8_t b[4096];

	while (n && t.host_wrote < MAX) {
		uint32_t part = n < sizeof(b) ? n : sizeof(b);
		ssize_t r;

		for (uint32_t k = 0; k < part; k++)
			b[k] = down_byte(t.down0 + t.host_wrote + k);
		r = send(t.server, b, part, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (r <= 0)
			return;
		t.host_wrote += (uint32_t)r;
		n -= (uint32_t)r;
	}
}

/* --- set-up --- */

static void tcp_pair(void)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t l = sizeof(a);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1, small = 16384;

	must(fd >= 0 && !bind(fd, (struct sockaddr *)&a, sizeof(a)) && !listen(fd, 1) && !getsockname(fd, (struct sockaddr *)&a, &l), "listener");
	(void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
	t.client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	(void)setsockopt(t.client, SOL_SOCKET, SO_SNDBUF, &small, sizeof(small));
	must(!connect(t.client, (struct sockaddr *)&a, sizeof(a)), "connect");
	t.server = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
	must(t.server >= 0, "accept");
	for (int k = 0; k < 2; k++) /* real time stands still here */
		(void)setsockopt(k ? t.client : t.server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	close(fd);
}

static struct rn_stage *stage(uint32_t row, uint32_t gen)
{
	struct rn_stage *s = rn_stage_new(row, gen);

	must(s && !rn_stage_set_session(s, t.session, t.session_size) && !rn_stage_set_arena(s, t.arena, t.arena_size, row == TX), "grants");
	for (uint32_t i = 0; i < ROWS; i++)
		must(!rn_stage_set_bell(s, i, t.bells[i]), "bells");
	return s;
}

static void start_tx(uint32_t gen)
{
	struct fast_up_config cfg = { .bypass = 0, .offload = 0, .direct = 0, .flows_fd = t.chan_tx[1] };

	memcpy(cfg.parse.gateway4, gateway, 4);
	memcpy(cfg.parse.subnet4, (uint8_t[]){ 10, 0, 2, 0 }, 4);
	memcpy(cfg.parse.gateway_mac, gateway_mac, 6);
	cfg.parse.prefix = 24;
	cfg.parse.mtu = MTU;
	t.tx = stage(TX, gen);
	must(!rn_stage_add_input(t.tx, t.ring[0], rn_ring_size(64), EGRESS) &&
		     !rn_stage_add_output(t.tx, RN_ROLE_GUEST, t.ring[1], rn_ring_size(64), RX) &&
		     !rn_stage_add_output(t.tx, RN_ROLE_CLASSIFY, t.ring[2], rn_ring_size(64), EGRESS), "rings of guest_tx");
	t.up = fast_up_new(t.tx, &t.link, t.flows, t.flows_size, &cfg);
	must(t.up, "fast_up");
}

static void start_rx(uint32_t gen)
{
	struct fast_down_config cfg = { .mtu = MTU, .flows_fd = t.chan_rx[1] };

	memcpy(cfg.gateway4, gateway, 4);
	memcpy(cfg.gateway_mac, gateway_mac, 6);
	t.rx = stage(RX, gen);
	must(!rn_stage_add_input(t.rx, t.ring[4], rn_ring_size(64), EGRESS) &&
		     !rn_stage_add_output(t.rx, RN_ROLE_BRIDGE, t.ring[3], rn_ring_size(64), EGRESS), "rings of guest_rx");
	t.down = fast_down_new(t.rx, t.flows, t.flows_size, &cfg, out);
	must(t.down, "fast_down");
}

static void make_flow(struct input *in)
{
	struct rn_flow *f = t.f = &((struct rn_flows *)t.flows)->flow[0];

	t.up0 = u16(in) << 16 | 0xff00;
	t.down0 = u16(in) << 16 | 0xfe00;
	f->guest_addr[10] = f->guest_addr[11] = f->peer_addr[10] = f->peer_addr[11] = 0xff;
	memcpy(f->guest_addr + 12, guest, 4);
	memcpy(f->peer_addr + 12, gateway, 4);
	memcpy(f->guest_mac, guest_mac, 6);
	f->guest_port = GPORT;
	f->peer_port = PPORT;
	f->proto = RN_IPPROTO_TCP;
	f->gen = 1;
	atomic_store(&f->state, RN_FL_ESTABLISHED);
	f->up.rcv_nxt = f->up.acked = t.up0;
	f->up.rcv_adv = t.edge = t.believed = t.up0 + 65536;
	t.wl1 = t.claimed = t.down0;
	t.acked = t.up0;
	f->up.wscale = RN_TCP_WSCALE;
	f->down.snd_una = f->down.snd_nxt = f->down.snd_max = t.seen = t.down0;
	f->down.snd_wnd = 65536;
	f->down.mss = 1460;
	f->down.wscale = WSCALE;
	f->down.rto_us = 200000;
	t.offered = t.down0 + f->down.snd_wnd;
}

static void begin(struct input *in)
{
	static const struct rn_part_spec spec[ROWS] = { { 64, 2 }, { 0, 0 }, { 0, 0 }, { 0, 0 } };

	t.session_size = rn_session_size();
	t.session = memory(t.session_size);
	must(!rn_session_create(t.session, t.session_size, ROWS), "session");
	t.arena_size = rn_arena_size(spec, ROWS);
	t.arena = memory(t.arena_size);
	must(!rn_arena_create(t.arena, t.arena_size, spec, ROWS), "arena");
	t.flows_size = rn_flows_size(2);
	t.flows = memory(t.flows_size);
	must(!rn_flows_create(t.flows, t.flows_size, 2, 1, 2), "flows");
	for (int k = 0; k < 5; k++) {
		t.ring[k] = memory(rn_ring_size(64));
		must(!rn_ring_create(t.ring[k], rn_ring_size(64), 64), "ring");
	}
	for (int k = 0; k < ROWS; k++)
		must((t.bells[k] = rn_bell_new()) >= 0, "bell");
	must(!rn_pool_attach(&t.pool, t.arena, t.arena_size, -1, EGRESS, 0), "pool");
	must(!rn_ring_rx_attach(&t.from_tx[0], t.ring[1], rn_ring_size(64), t.bells[TX]) &&
		     !rn_ring_rx_attach(&t.from_tx[1], t.ring[2], rn_ring_size(64), t.bells[TX]) &&
		     !rn_ring_rx_attach(&t.from_rx, t.ring[3], rn_ring_size(64), t.bells[RX]), "consumers");
	must(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, t.chan_tx) &&
		     !socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, t.chan_rx), "socket pairs");
	t.link = (struct rn_link){ .fd = -1, .kind = RN_LINK_TAP, .vnet = 1, .frame_max = 1514 };
	t.now = t.since = START_NS;
	t.host_wrote = t.host_read = 0;
	t.odd = t.full = t.broke = 0;
	t.nheld = t.held_bytes = 0;
	tcp_pair();
	make_flow(in);
	start_tx(1);
	start_rx(1);
	offer();
}

static void end(void)
{
	struct rn_desc d = { .len = 1, .flags = rn_fn_flags(RN_FN_CLOSE) };

	fast_up_notice(t.up, &d);
	fast_down_notice(t.down, &d);
	fast_up_free(t.up);
	fast_down_free(t.down);
	rn_stage_free(t.tx);
	rn_stage_free(t.rx);
	for (int k = 0; k < 2; k++) {
		close(t.chan_tx[k]);
		close(t.chan_rx[k]);
	}
	for (int k = 0; k < ROWS; k++)
		close(t.bells[k]);
	close(t.client);
	close(t.server);
	for (int k = 0; k < 5; k++)
		free(t.ring[k]);
	free(t.flows);
	free(t.arena);
	free(t.session);
}

/* Guest and host behave from now on: all arrives. */
static void come_to_rest(void)
{
	uint32_t up_end = t.f->up.rcv_nxt + 5000;

	t.full = 0;
	for (int k = 0; k < 3000; k++) {
		struct pollfd wait = { .fd = t.server, .events = POLLIN };

		if (t.odd || t.broke)
			return;
		segment(RN_TH_ACK, t.f->up.rcv_nxt, t.seen, 2047, lt(t.f->up.rcv_nxt, up_end) ? 1000 : 0, 0, 0, 0);
		turn_tx();
		turn_rx();
		host_read(1 << 20);
		if (!lt(t.f->up.rcv_nxt, up_end) && t.seen == t.down0 + t.host_wrote && t.host_read == t.f->up.rcv_nxt - t.up0) {
			must(!lt(t.believed + (1u << RN_TCP_WSCALE), t.edge), "the window's edge is not taken back");
			return;
		}
		t.now += 5000000;
		if (k > 20)
			(void)poll(&wait, 1, 1); /* loopback needs no time but that of a busy machine */
	}
	must(0, "everything arrives");
}

static void scribble(struct input *in)
{
	static const size_t where[] = {
		offsetof(struct rn_flow, up.rcv_nxt), offsetof(struct rn_flow, up.rcv_adv), offsetof(struct rn_flow, up.acked),
		offsetof(struct rn_flow, down.mss), offsetof(struct rn_flow, down.wscale), offsetof(struct rn_flow, down.snd_una),
		offsetof(struct rn_flow, down.snd_nxt), offsetof(struct rn_flow, down.snd_max), offsetof(struct rn_flow, down.snd_wnd),
		offsetof(struct rn_flow, down.rto_us), offsetof(struct rn_flow, acks.ack_wnd), offsetof(struct rn_flow, acks.want),
		offsetof(struct rn_flow, gen), offsetof(struct rn_flow, guest_port), offsetof(struct rn_flow, down.srtt_us),
	};
	size_t at = where[u8(in) % (sizeof(where) / sizeof(where[0]))];
	uint32_t n = 1 + u8(in) % 8;

	t.odd = 1;
	t.scribbled++;
	for (uint32_t k = 0; k < n; k++)
		((uint8_t *)t.f)[at + k] = (uint8_t)u8(in);
}

static void restart(struct input *in)
{
	uint32_t which = u8(in);

	/* Killed at work on a half, or not: nothing was under way in the socket, so there is nothing to repair. */
	if (which & 1) {
		fast_up_free(t.up); /* with what it held: the guest sends that once more */
		rn_stage_free(t.tx);
		t.nheld = t.held_bytes = 0;
		which &= atomic_load(&t.f->up.owner) == rn_owner(TX) ? 3u : 1u; /* an owner only is at work */
		if (which & 2)
			atomic_fetch_or(&t.f->up.owner, RN_OWNER_BUSY);
		start_tx(2);
		must(t.odd || atomic_load(&t.f->up.owner) == rn_owner(EGRESS), "the half is given back");
		must(t.odd || !(which & 2) || t.f->up.torn, "and said to be torn");
	} else {
		fast_down_free(t.down);
		rn_stage_free(t.rx);
		which &= atomic_load(&t.f->down.owner) == rn_owner(RX) ? 3u : 1u;
		if (which & 2)
			atomic_fetch_or(&t.f->down.owner, RN_OWNER_BUSY);
		start_rx(2);
		must(t.odd || atomic_load(&t.f->down.owner) == rn_owner(EGRESS), "the half is given back");
		must(t.odd || !(which & 2) || t.f->down.torn, "and said to be torn");
		t.f->down.snd_nxt = t.f->down.snd_max = t.seen; /* a frame that waited for the link is gone */
	}
	t.restarts++;
	relend();
}

static void operation(struct input *in)
{
	uint32_t op = u8(in), a;

	switch (op % 16) {
	case 0:
	case 1:
	case 2: /* what a guest sends nearly always */
		a = u16(in) % 3000;
		segment(RN_TH_ACK | (op & 16 ? RN_TH_PSH : 0), t.f->up.rcv_nxt + t.held_bytes, t.seen, (uint16_t)u16(in), a, 0, 0,
			!!(op & 32));
		break;
	case 3: /* anything */
		a = u8(in);
		segment((uint8_t)a, t.f->up.rcv_nxt + (uint32_t)(int16_t)u16(in), t.seen + (uint32_t)(int8_t)u8(in), (uint16_t)u16(in),
			u16(in) % 2000, u8(in) % 11 * 4, u8(in) % 60, op >> 7);
		break;
	case 4:
		segment(RN_TH_ACK, t.f->up.rcv_nxt, t.seen - u16(in) % 5000, (uint16_t)u16(in), 0, 0, 0, 0);
		break;
	case 5:
	case 6:
		host_write(u16(in) % 20000);
		break;
	case 7:
		host_read(u16(in));
		break;
	case 8:
	case 9:
		turn_tx();
		t.now += u16(in) * 1000;
		turn_tx(); /* the loop wakes for its deadlines */
		break;
	case 10:
	case 11:
		turn_rx();
		t.now += u16(in) * 1000;
		turn_tx();
		break;
	case 12:
		t.full = u8(in) & 1;
		break;
	case 13:
		relend();
		break;
	case 14:
		if (u8(in) % 4)
			restart(in);
		else
			scribble(in);
		break;
	case 15: {
		struct rn_desc d = { .off = u8(in) % 4, .len = u8(in) % 3, .flags = rn_fn_flags((enum rn_flow_notice)(u8(in) % 12)) };

		settle();
		/* What no egress says of a flow that lives. */
		if (rn_fn_of(&d) == RN_FN_CLOSE || rn_fn_of(&d) == RN_FN_RESET)
			t.odd = 1;
		fast_up_notice(t.up, &d);
		fast_down_notice(t.down, &d);
		break;
	}
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };

	begin(&in);
	for (uint32_t n = 0; in.left && n < 400; n++)
		operation(&in);
	come_to_rest();
	end();
	t.inputs++;
	return 0;
}

size_t fuzz_generate(uint8_t *buf, size_t cap)
{
	size_t n = 4 + fuzz_rnd(400);

	if (n > cap)
		n = cap;
	for (size_t k = 0; k < n; k++)
		buf[k] = (uint8_t)fuzz_rnd(256);
	return n;
}

void fuzz_report(void)
{
	printf("inputs %llu\nup_bytes %llu\ndown_bytes %llu\nacks %llu\nrelent %llu\nrestarts %llu\nscribbled %llu\ntrains %llu\n",
	       (unsigned long long)t.inputs, (unsigned long long)t.up_bytes, (unsigned long long)t.down_bytes, (unsigned long long)t.acks,
	       (unsigned long long)t.relent, (unsigned long long)t.restarts, (unsigned long long)t.scribbled, (unsigned long long)t.trains);
}
