/* tcp.c - TCP bridge: the guest's TCP ends here, a host kernel socket carries the data.
 *
 * Goals: bytes in equal bytes out, in order, both ways, whatever the guest link does; both ends learn how
 * the connection ended; no copy of the data kept for retransmission.
 *
 * Up (guest to host): in-order bytes go to send(); rcv_nxt advances by what send() took, so an ACK is a
 * statement of the host kernel (I1). The segments of a burst wait in the frames' own buffers until tcp_work() sends
 * them together. What came early, or what a full host buffer did not take, is parked, not acknowledged, in private
 * memory: a copy, but were guest_tx's buffers held for it, a few slow servers could keep the guest from speaking. The
 * window is the host socket's free space plus a slack (I3): without the slack the guest could never fill the host
 * buffer, and the kernel grows a send buffer only for a sender that hit its end. While the host buffer is full the
 * right edge stands.
 *
 * Down (host to guest): data stays in the host socket until the guest acknowledged it (I2). down_pump() peeks at
 * offset snd_nxt - snd_una, an ACK discards. Going back is moving the peek offset. Kernels before 6.9 lack
 * SO_PEEK_OFF on TCP: there the peek goes past a discard buffer.
 *
 * A SYN is answered when the host connect() ended (I4). Loss on the guest link: three duplicate ACKs resend one
 * segment, partial ACKs the next (RFC 6582); a timeout (RFC 6298) goes back to snd_una and opens up from one
 * segment (RFC 5681 3.1) until all that was in flight is acknowledged. Without loss there is no congestion
 * window: the link is memory, the guest's window is the limit.
 *
 * Events only queue work (tcp_event, tcp_input set bits); tcp_work() does it when the guest ring has room, so that
 * several frames of a burst cost one send() and one ACK, and a full ring delays instead of dropping.
 *
 * Limits: parked bytes TCP_PARK_MAX over all flows, segments TCP_NODES; beyond, what is last is dropped with a counter
 * and sent again by the guest, as it was never acknowledged; connects under way cfg.pending_max; flows by the table; descriptors nfile.
 * Timeouts: SYN-ACK resent 5 times from 1 s; data given up after TCP_RETRIES timeouts; keepalive after 2 h idle.
 */
#include "egress.h"
#include "rn_csum.h"
#include "rn_view.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <linux/sockios.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define SEQ_LT(a, b) ((int32_t)((a) - (b)) < 0)
#define SEQ_LE(a, b) ((int32_t)((a) - (b)) <= 0)
#define SEQ_GT(a, b) ((int32_t)((a) - (b)) > 0)
#define SEQ_GE(a, b) ((int32_t)((a) - (b)) >= 0)

#define TCP_WSCALE 7u		 /* our shift: 8 MiB, above the kernel's largest send buffer estimate */
#define TCP_SLACK (128u << 10)	 /* bytes of window beyond the host's free space */
#define TCP_SLACK_LOW (16u << 10) /* the same when much is parked already */
#define TCP_PARK_MAX (32u << 20) /* bytes parked, all flows */
#define TCP_NODES 16384u	 /* segments parked, all flows, */
#define TCP_NODES_RESERVE 1024u	 /* of which these are for in-order segments on their way to send() */
#define TCP_FLUSH_IOV 64u	 /* segments a sendmsg() */
#define TCP_PUMP 4u		 /* frames a flow may send before the next one's turn */
#define TCP_RTO_INIT_US 1000000u /* RFC 6298 2.1 */
#define TCP_RTO_MIN_US 200000u	 /* below RFC 6298 2.4's 1 s, as Linux: the link has no delay of its own */
#define TCP_RTO_MAX_US 60000000u /* RFC 6298 2.5 */
#define TCP_RETRIES 12u		 /* about 6 minutes at the maximum; RFC 9293 3.8.3 R2 >= 100 s */
#define TCP_SYN_RETRIES 5u
#define TCP_TIME_WAIT_NS 1000000000ull
#define TCP_KEEPALIVE_NS (7200ull * 1000000000ull) /* RFC 9293 3.8.4 */
#define TCP_KEEPALIVE_INTERVAL_NS (75ull * 1000000000ull)
#define TCP_KEEPALIVE_PROBES 9u
#define TCP_SCRATCH 65536u
#define TCP_EVENTS (EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)

/* frame layout: payload of a segment without options */
#define TCP_ETH_OFF RN_BUF_ETH_OFF
#define TCP_DATA_OFF (RN_BUF_ETH_OFF + RN_ETH_HLEN + RN_IP4_HLEN + RN_TCP_HLEN)
_Static_assert(TCP_DATA_OFF + 65535u <= RN_BUF_LARGE, "a 64 KiB segment fits");

enum { /* flow_priv.work: what there is to do */
	W_SYNACK = 1u << 0,
	W_UP = 1u << 1,
	W_DOWN = 1u << 2,
	W_ACK = 1u << 3,
	W_RST = 1u << 4,   /* tell the guest, then drop */
	W_FAIL = 1u << 5,  /* connect failed (tcp_flow.error): tell the guest, then drop */
	W_PROBE = 1u << 6, /* window probe or keepalive */
	W_REXMIT = 1u << 7 /* one segment at snd_una again */
};

enum { /* flow_priv.flags */
	F_READABLE = 1u << 0,  /* host socket may have bytes we have not peeked */
	F_HUP = 1u << 1,       /* host side sent FIN (or worse): read on after a short read */
	F_BLOCKED = 1u << 2,   /* send() took less than all: EPOLLOUT will come */
	F_RECOVER = 1u << 3,   /* fast recovery until p->recover is acknowledged */
	F_SLOW = 1u << 4,      /* after a timeout: cwnd counts until p->recover is acknowledged */
	F_FIN_IN = 1u << 5,    /* guest's FIN has sequence number fin_in */
	F_EOF = 1u << 6,       /* host side's end is at sequence number fin_out */
	F_WE_FIRST = 1u << 7,  /* our FIN went out before the guest's came: TIME-WAIT is ours */
	F_TIMED = 1u << 8,     /* rtt_seq/rtt_ns hold a sample under way */
	F_GUEST_WS = 1u << 9,  /* window scale agreed */
	F_CONNECTED = 1u << 10, /* host connect() done */
	F_PEEK_OFF = 1u << 11  /* SO_PEEK_OFF works on this socket */
};

struct eg_parked {
	struct eg_parked *next;
	struct rn_buf *buf;  /* data lies in this frame: only within a turn, or */
	uint8_t *own;	     /* in memory of our own */
	const uint8_t *data;
	uint32_t seq, len;
};

struct tcp_flow { /* what only this file needs of a flow */
	uint32_t fin_in, fin_out;
	uint32_t cwnd;	  /* bytes; counts only with F_SLOW */
	uint32_t wnd_max; /* largest window the guest offered (RFC 9293 3.8.6.2.1) */
	uint32_t syn_seq; /* == irs: to tell a repeated SYN from a new one */
	int32_t error;	  /* errno of a failed connect */
};

struct tcp_state {
	struct tcp_flow *flow;
	struct eg_parked *nodes, *free_nodes;
	uint32_t nfree;	 /* nodes in free_nodes */
	uint64_t parked; /* bytes in memory of our own */
	struct rn_buf *spare; /* large buffer to peek into: most reads fit a small one afterwards */
	uint8_t *scratch;
	struct iovec *skip; /* discard vector of the fallback: all entries are the scratch page */
	int peek_off;	    /* 1 use SO_PEEK_OFF, 0 do not */
};

struct seg { /* one segment from the guest, host order */
	uint32_t seq, ack, len; /* len: payload bytes */
	uint32_t wnd;
	uint8_t flags;
	uint16_t mss; /* 0: no option */
	int wscale;   /* -1: no option */
	const uint8_t *data;
};

static inline void set_state(struct rn_flow *f, uint8_t st)
{
	/* relaxed: only the monitor reads it from outside, and any value it sees was true a moment ago */
	atomic_store_explicit(&f->state, st, memory_order_relaxed);
}
static inline uint8_t get_state(struct rn_flow *f)
{
	return atomic_load_explicit(&f->state, memory_order_relaxed);
}
static inline uint32_t rcv_wnd(const struct rn_flow *f)
{
	return f->up.rcv_adv - f->up.rcv_nxt;
}
static inline uint64_t us(uint64_t n)
{
	return n * 1000u;
}

/* --- set-up --- */

/* Does this kernel honour SO_PEEK_OFF on TCP (Linux 6.9)? Before, the option is refused on such sockets. */
static int probe_peek_off(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), zero = 0, ok;

	if (fd < 0)
		return 0;
	ok = setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof(zero)) == 0;
	close(fd);
	return ok;
}

int tcp_init(struct egress *e)
{
	struct tcp_state *t = calloc(1, sizeof(*t));

	if (!t)
		return rn_fail(e->s, -ENOMEM, "tcp: out of memory");
	e->tcp = t;
	t->flow = calloc(e->nflows, sizeof(*t->flow));
	t->nodes = calloc(TCP_NODES, sizeof(*t->nodes));
	t->scratch = malloc(TCP_SCRATCH);
	t->skip = calloc(1024, sizeof(*t->skip)); /* UIO_MAXIOV */
	if (!t->flow || !t->nodes || !t->scratch || !t->skip)
		return rn_fail(e->s, -ENOMEM, "tcp: out of memory");
	for (uint32_t i = 0; i < TCP_NODES; i++) {
		t->nodes[i].next = t->free_nodes;
		t->free_nodes = &t->nodes[i];
	}
	t->nfree = TCP_NODES;
	for (uint32_t i = 0; i < 1024; i++)
		t->skip[i].iov_base = t->scratch;
	t->peek_off = e->cfg.peek_offset < 0 ? probe_peek_off() : e->cfg.peek_offset;
	if (e->cfg.peek_offset == 1 && !probe_peek_off())
		return rn_fail(e->s, -ENOTSUP, "this kernel has no SO_PEEK_OFF for TCP (Linux 6.9): use peek = \"discard\"");
	return 0;
}

/* --- parked segments --- */

static void node_free(struct egress *e, struct flow_priv *p, struct rn_flow *f, struct eg_parked *n)
{
	struct tcp_state *t = e->tcp;

	if (n->buf)
		rn_buf_free(&e->s->pool, n->buf);
	if (n->own) {
		free(n->own);
		t->parked -= n->len;
	}
	f->up.parked -= n->len;
	p->nparked--;
	n->next = t->free_nodes;
	t->free_nodes = n;
	t->nfree++;
}

/* Copy into memory of our own. 0, or -ENOMEM: over the bound, or out of memory. */
static int node_own(struct tcp_state *t, struct eg_parked *n, uint64_t limit)
{
	if (t->parked + n->len > limit)
		return -ENOMEM;
	n->own = malloc(n->len);
	if (!n->own)
		return -ENOMEM;
	memcpy(n->own, n->data, n->len);
	n->data = n->own;
	t->parked += n->len;
	return 0;
}

static void park_drop_all(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	while (p->parked) {
		struct eg_parked *n = p->parked;

		p->parked = n->next;
		node_free(e, p, eg_flow(e, i), n);
	}
}

/* End of a flush: what is left waits for longer than this turn, so it moves out of the arena. What finds no place
 * is dropped: it was not acknowledged, the guest sends it again. */
static void park_rest(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct tcp_state *t = e->tcp;
	struct eg_parked **at = &p->parked;

	while (*at) {
		struct eg_parked *n = *at;

		if (n->buf) {
			if (node_own(t, n, TCP_PARK_MAX)) {
				*at = n->next;
				node_free(e, p, eg_flow(e, i), n);
				e->s->c[RN_C_drop_tcp_park_full]++;
				continue;
			}
			rn_buf_free(&e->s->pool, n->buf);
			n->buf = NULL;
			e->s->c[RN_C_tcp_parked]++;
		}
		at = &n->next;
	}
}

/**
 * park() - Put a segment into the flow's list, by sequence number
 * In-order data of a flow that is not blocked stays in its frame until up_flush() in this turn; what has to wait is
 * copied. Overlaps are cut when the list is flushed, whole duplicates are refused here.
 * Return: 1 taken (fr->kept tells whether the frame is ours now), 0 not.
 */
static int park(struct egress *e, uint32_t i, struct eg_frame *fr, uint32_t seq, const uint8_t *data, uint32_t len)
{
	struct flow_priv *p = &e->priv[i];
	struct tcp_state *t = e->tcp;
	struct rn_flow *f = eg_flow(e, i);
	struct eg_parked **at = &p->parked, *n;
	int early = SEQ_GT(seq, f->up.rcv_nxt), wait = early || (p->flags & F_BLOCKED);

	while (*at && SEQ_LT((*at)->seq, seq))
		at = &(*at)->next;
	if (*at && (*at)->seq == seq && (*at)->len >= len) {
		e->s->c[RN_C_tcp_duplicate_segments]++;
		return 0;
	}
	n = t->free_nodes;
	if (!n || (wait && t->nfree <= TCP_NODES_RESERVE)) {
		e->s->c[RN_C_drop_tcp_park_full]++;
		return 0;
	}
	t->free_nodes = n->next;
	t->nfree--;
	*n = (struct eg_parked){ .next = *at, .data = data, .seq = seq, .len = len };
	if (!wait) {
		n->buf = fr->buf;
		fr->kept = 1;
	} else if (node_own(t, n, early && !p->parked ? TCP_PARK_MAX / 2 : TCP_PARK_MAX)) {
		/* Flows that wait already shall get their holes filled: a new one may not take the last half. */
		n->next = t->free_nodes;
		t->free_nodes = n;
		t->nfree++;
		e->s->c[RN_C_drop_tcp_park_full]++;
		return 0;
	} else {
		e->s->c[RN_C_tcp_parked]++;
	}
	*at = n;
	f->up.parked += len;
	p->nparked++;
	return 1;
}

/* --- timers: each reason has its time, the flow's one timer is the earliest --- */

static void set_timer(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	uint64_t at = p->rto_at < p->life_at ? p->rto_at : p->life_at;

	eg_timer(e, i, at);
}

static uint64_t rto_after(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	uint64_t rto = (uint64_t)eg_flow(e, i)->down.rto_us << (p->backoff < 16 ? p->backoff : 16);

	return e->s->now + us(rto < TCP_RTO_MAX_US ? rto : TCP_RTO_MAX_US);
}

/* --- frames to the guest --- */

/* Build and send one segment whose @len payload bytes lie at TCP_DATA_OFF + @optlen of @b. */
static void emit_segment(struct egress *e, const struct rn_flow *f, struct rn_buf *b, uint32_t seq, uint32_t ack,
			 uint8_t flags, uint16_t wnd, const uint8_t *opt, uint32_t optlen, uint32_t len, uint32_t mss)
{
	uint8_t *eth = (uint8_t *)b + TCP_ETH_OFF, *ip = eth + RN_ETH_HLEN, *th = ip + RN_IP4_HLEN;
	uint32_t l4 = RN_TCP_HLEN + optlen + len;
	struct rn_vnet_hdr v = { 0 };

	eg_ip4_header(e, eth, f->guest_mac, f->peer_addr + 12, f->guest_addr + 12, RN_IPPROTO_TCP, l4, 1);
	rn_put16(th + RN_TCP_SPORT, f->peer_port);
	rn_put16(th + RN_TCP_DPORT, f->guest_port);
	rn_put32(th + RN_TCP_SEQ, seq);
	rn_put32(th + RN_TCP_ACK, flags & RN_TH_ACK ? ack : 0);
	th[RN_TCP_OFF] = (uint8_t)((RN_TCP_HLEN + optlen) / 4 << 4);
	th[RN_TCP_FLAGS] = flags;
	rn_put16(th + RN_TCP_WND, wnd);
	memset(th + RN_TCP_SUM, 0, 4); /* checksum and urgent pointer */
	if (optlen)
		memcpy(th + RN_TCP_HLEN, opt, optlen);

	uint64_t sum = rn_csum_pseudo4(f->peer_addr + 12, f->guest_addr + 12, RN_IPPROTO_TCP, l4);
	uint16_t c;

	if (e->cfg.offload) { /* the pseudo-header's sum, the guest's kernel or card does the rest */
		c = rn_csum_fold(sum);
		v.flags = RN_VNET_NEEDS_CSUM;
		v.csum_start = RN_ETH_HLEN + RN_IP4_HLEN;
		v.csum_offset = RN_TCP_SUM;
		if (len > mss) {
			v.gso_type = RN_VNET_GSO_TCPV4;
			v.gso_size = (uint16_t)mss;
			v.hdr_len = (uint16_t)(RN_ETH_HLEN + RN_IP4_HLEN + RN_TCP_HLEN + optlen);
		}
	} else {
		c = (uint16_t)~rn_csum_fold(rn_csum_add(sum, th, l4));
	}
	memcpy(th + RN_TCP_SUM, &c, 2);
	eg_emit(e, b, eth, RN_ETH_HLEN + RN_IP4_HLEN + l4, e->cfg.offload ? &v : NULL);
}

/**
 * update_window() - Move the right edge of the window we offer, if the host socket has room
 * Never back (RFC 9293 3.8.6). Not by less than a segment unless the window is small anyway: silly window
 * avoidance (RFC 9293 3.8.6.2.2). Return: 1 if it moved.
 */
static int update_window(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	uint32_t limit = p->flags & F_GUEST_WS ? 65535u << TCP_WSCALE : 65535u, room, edge;
	int out = 0;

	if (p->parked && (p->flags & F_BLOCKED))
		return 0;
	/* Unsent and unacknowledged bytes; on Unix sockets the unread ones. An error leaves 0: the slack holds. */
	if (ioctl(p->fd, SIOCOUTQ, &out) < 0)
		out = 0;
	if (!p->sndbuf || (uint32_t)out > p->sndbuf / 2) {
		int sz = 0;
		socklen_t l = sizeof(sz);

		if (getsockopt(p->fd, SOL_SOCKET, SO_SNDBUF, &sz, &l) == 0 && sz > 0)
			p->sndbuf = (uint32_t)sz;
	}
	/* Bookkeeping takes a part of the buffer: a quarter is an estimate, parking corrects it. */
	room = p->sndbuf / 4 * 3;
	room = (room > (uint32_t)out ? room - (uint32_t)out : 0) +
	       (e->tcp->parked < TCP_PARK_MAX / 4 ? TCP_SLACK : TCP_SLACK_LOW);
	if (room > limit)
		room = limit;
	edge = f->up.rcv_nxt + room;
	if (SEQ_LE(edge, f->up.rcv_adv))
		return 0;
	if (edge - f->up.rcv_adv < 2u * e->cfg.mtu && rcv_wnd(f) >= 4u * e->cfg.mtu)
		return 0;
	f->up.rcv_adv = edge;
	return 1;
}

static uint16_t window_field(const struct flow_priv *p, struct rn_flow *f)
{
	uint32_t w = rcv_wnd(f);

	if (!(p->flags & F_GUEST_WS))
		return (uint16_t)(w > 65535u ? 65535u : w);
	w >>= TCP_WSCALE;
	return (uint16_t)(w > 65535u ? 65535u : w);
}

/* RST that answers a segment of no connection (RFC 9293 3.10.7.1); the frame tells the addresses. */
static void reply_rst(struct egress *e, const struct eg_frame *fr, const struct seg *sg)
{
	struct rn_flow f = { 0 };
	struct rn_buf *b = eg_out_buf(e, RN_SMALL);
	uint32_t len = sg->len + !!(sg->flags & RN_TH_SYN) + !!(sg->flags & RN_TH_FIN);

	if (!b) {
		e->s->c[RN_C_drop_reply_no_room]++;
		return;
	}
	memcpy(f.guest_mac, fr->eth + 6, 6);
	memcpy(f.guest_addr + 12, fr->ip + RN_IP4_SRC, 4);
	memcpy(f.peer_addr + 12, fr->ip + RN_IP4_DST, 4);
	f.guest_port = rn_get16(fr->l4 + RN_TCP_SPORT);
	f.peer_port = rn_get16(fr->l4 + RN_TCP_DPORT);
	e->s->c[RN_C_tcp_rst_sent]++;
	if (sg->flags & RN_TH_ACK)
		emit_segment(e, &f, b, sg->ack, 0, RN_TH_RST, 0, NULL, 0, 0, e->cfg.mtu);
	else
		emit_segment(e, &f, b, 0, sg->seq + len, RN_TH_RST | RN_TH_ACK, 0, NULL, 0, 0, e->cfg.mtu);
}

/* --- end of a flow --- */

static void flow_gone(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	if (get_state(eg_flow(e, i)) == RN_FL_CONNECTING)
		e->pending--;
	park_drop_all(e, i);
	p->flags = 0;
	eg_drop(e, i);
}

/* The host side must see that the connection broke, not that it ended well (I5). */
static void abort_host(struct egress *e, uint32_t i)
{
	struct linger lg = { .l_onoff = 1, .l_linger = 0 };
	struct flow_priv *p = &e->priv[i];

	if (p->fd >= 0 && !p->is_unix)
		(void)setsockopt(p->fd, SOL_SOCKET, SO_LINGER, &lg, sizeof(lg)); /* a socket in error refuses: gone anyway */
	eg_close_fd(e, i);
}

/* Host side broke: tell the guest as soon as there is room. */
static void host_reset(struct egress *e, uint32_t i)
{
	e->s->c[RN_C_tcp_reset_by_host]++;
	abort_host(e, i);
	park_drop_all(e, i);
	e->priv[i].work = 0;
	eg_work(e, i, W_RST);
}

/* We give up on the guest. */
static void give_up(struct egress *e, uint32_t i)
{
	e->s->c[RN_C_tcp_timed_out]++;
	abort_host(e, i);
	park_drop_all(e, i);
	e->priv[i].work = 0;
	eg_work(e, i, W_RST);
}

static void maybe_closed(struct egress *e, uint32_t i)
{
	struct rn_flow *f = eg_flow(e, i);
	struct flow_priv *p = &e->priv[i];

	if (!(f->up.fin & RN_FIN_SENT) || !(f->down.fin & RN_FIN_ACKED) || get_state(f) == RN_FL_TIME_WAIT)
		return;
	e->s->c[RN_C_tcp_closed]++;
	eg_close_fd(e, i); /* all was read and acknowledged, all was written: a plain close */
	if (!(p->flags & F_WE_FIRST) && !(p->work & W_ACK)) {
		flow_gone(e, i); /* LAST-ACK is over; TIME-WAIT is the guest's */
		return;
	}
	set_state(f, RN_FL_TIME_WAIT);
	p->rto_at = UINT64_MAX;
	p->life_at = e->s->now + TCP_TIME_WAIT_NS;
	p->work &= W_ACK;
	set_timer(e, i);
}

/* --- up: guest to host --- */

/* After rcv_nxt moved: is the guest's FIN next? */
static void check_fin(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);

	if (!(p->flags & F_FIN_IN) || f->up.rcv_nxt != e->tcp->flow[i].fin_in || (f->up.fin & RN_FIN_SEEN))
		return;
	f->up.rcv_nxt++;
	if (SEQ_LT(f->up.rcv_adv, f->up.rcv_nxt))
		f->up.rcv_adv = f->up.rcv_nxt;
	f->up.fin |= RN_FIN_SEEN;
	/* All data was taken by send(): the host's FIN follows it (I5). ENOTCONN: reset meanwhile, EPOLLHUP tells. */
	if (shutdown(p->fd, SHUT_WR) == 0 || errno == ENOTCONN)
		f->up.fin |= RN_FIN_SENT;
	park_drop_all(e, i); /* nothing behind a FIN is data */
	eg_work(e, i, W_ACK);
}

/**
 * up_flush() - Hand parked in-order bytes to the host kernel
 * Return: 0, or -1 if the host side broke (the flow is on its way out).
 */
static int up_flush(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	uint32_t start = f->up.rcv_nxt;

	p->flags &= ~F_BLOCKED;
	for (;;) {
		struct iovec iov[TCP_FLUSH_IOV];
		struct msghdr m = { .msg_iov = iov };
		uint32_t next = f->up.rcv_nxt, want = 0;
		ssize_t n;

		for (struct eg_parked *k = p->parked; k && m.msg_iovlen < TCP_FLUSH_IOV; k = k->next) {
			uint32_t skip;

			if (SEQ_GT(k->seq, next))
				break;
			skip = next - k->seq;
			if (skip >= k->len)
				continue;
			iov[m.msg_iovlen].iov_base = (void *)(uintptr_t)(k->data + skip);
			iov[m.msg_iovlen++].iov_len = k->len - skip;
			next += k->len - skip;
			want += k->len - skip;
		}
		if (!want)
			break;
		n = sendmsg(p->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n < 0) {
			if (errno == EINTR)
				continue;
			if (errno == ENOBUFS || errno == ENOMEM) {
				/* Not the socket but the machine is full: no edge will follow, so ask for one. */
				p->flags |= F_BLOCKED;
				eg_rewatch(e, i, TCP_EVENTS);
				break;
			}
			if (errno == EAGAIN) {
				p->flags |= F_BLOCKED;
				break;
			}
			host_reset(e, i);
			return -1;
		}
		f->up.rcv_nxt += (uint32_t)n; /* I1: what send() returned */
		f->up.bytes += (uint64_t)n;
		e->s->c[RN_C_tcp_up_bytes] += (uint64_t)n;
		if ((uint32_t)n < want) {
			p->flags |= F_BLOCKED;
			break;
		}
	}
	/* Give back what lies wholly before rcv_nxt. */
	while (p->parked && SEQ_LE(p->parked->seq + p->parked->len, f->up.rcv_nxt)) {
		struct eg_parked *n = p->parked;

		p->parked = n->next;
		node_free(e, p, f, n);
	}
	if (f->up.rcv_nxt != start)
		eg_work(e, i, W_ACK);
	park_rest(e, i);
	check_fin(e, i);
	return 0;
}

/* --- down: host to guest --- */

/**
 * peek() - Read bytes of the host socket without taking them
 * @off:	bytes behind snd_una
 * Return: bytes read, 0 at the host side's end, -errno.
 */
static ssize_t peek(struct egress *e, uint32_t i, uint32_t off, uint8_t *to, uint32_t len)
{
	struct flow_priv *p = &e->priv[i];
	struct tcp_state *t = e->tcp;
	ssize_t n;

	if (p->flags & F_PEEK_OFF) {
		if (p->peeked != off) {
			int o = (int)off;

			if (setsockopt(p->fd, SOL_SOCKET, SO_PEEK_OFF, &o, sizeof(o)) < 0)
				return -errno;
			p->peeked = off;
		}
		do
			n = recv(p->fd, to, len, MSG_PEEK | MSG_DONTWAIT);
		while (n < 0 && errno == EINTR);
		if (n < 0)
			return -errno;
		p->peeked += (uint32_t)n;
		return n;
	}
	struct msghdr m = { .msg_iov = t->skip };
	uint32_t left = off;

	while (left && m.msg_iovlen < 1023) {
		t->skip[m.msg_iovlen].iov_base = t->scratch;
		t->skip[m.msg_iovlen].iov_len = left < TCP_SCRATCH ? left : TCP_SCRATCH;
		left -= (uint32_t)t->skip[m.msg_iovlen++].iov_len;
	}
	if (left)
		return -EAGAIN; /* 63 MiB in flight: no window is that large */
	t->skip[m.msg_iovlen].iov_base = to;
	t->skip[m.msg_iovlen++].iov_len = len;
	do
		n = recvmsg(p->fd, &m, MSG_PEEK | MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	t->skip[m.msg_iovlen - 1].iov_base = t->scratch;
	if (n < 0)
		return -errno;
	if ((uint32_t)n < off)
		return -EAGAIN; /* the kernel stopped at a boundary (urgent mark): no more for now */
	if ((uint32_t)n == off) {
		/* Nothing behind what is in flight: more to come, or the end? With data queued the peek cannot tell. */
		struct tcp_info ti;
		socklen_t l = sizeof(ti);

		if (!off)
			return 0;
		if (!(p->flags & F_HUP))
			return -EAGAIN;
		if (p->is_unix)
			return 0;
		if (getsockopt(p->fd, IPPROTO_TCP, TCP_INFO, &ti, &l) < 0)
			return -errno;
		/* The peer's FIN is in: these states are entered by it and no other way (RFC 9293 3.3.2). */
		return ti.tcpi_state == TCP_CLOSE_WAIT || ti.tcpi_state == TCP_LAST_ACK || ti.tcpi_state == TCP_CLOSING ||
				       ti.tcpi_state == TCP_TIME_WAIT || ti.tcpi_state == TCP_CLOSE
			       ? 0
			       : -EAGAIN;
	}
	return n - (ssize_t)off;
}

/* Take @n acknowledged bytes out of the host socket. 0 or -errno. */
static int discard(struct egress *e, uint32_t i, uint32_t n)
{
	struct flow_priv *p = &e->priv[i];

	while (n) {
		ssize_t k;

		/* tcp(7): MSG_TRUNC discards. Unix sockets do not know it: read into the scratch page. */
		if (p->is_unix)
			k = recv(p->fd, e->tcp->scratch, n < TCP_SCRATCH ? n : TCP_SCRATCH, MSG_DONTWAIT);
		else
			k = recv(p->fd, NULL, n, MSG_TRUNC | MSG_DONTWAIT);
		if (k < 0 && errno == EINTR)
			continue;
		if (k <= 0)
			return k < 0 ? -errno : -EPIPE;
		n -= (uint32_t)k;
		/* The kernel moves its peek offset back with us (not below 0). */
		p->peeked = p->peeked > (uint32_t)k ? p->peeked - (uint32_t)k : 0;
	}
	return 0;
}

/* Something is in flight: the retransmission timer runs (RFC 6298 5.1). */
static void sent(struct egress *e, uint32_t i, uint32_t end, int again)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);

	if (SEQ_GT(end, f->down.snd_max))
		f->down.snd_max = end;
	else
		again = 1;
	if (again) {
		p->flags &= ~F_TIMED; /* Karn: RFC 6298 3 */
		f->down.retransmits++;
		e->s->c[RN_C_tcp_retransmit_frames]++;
	} else if (!(p->flags & F_TIMED)) {
		p->flags |= F_TIMED;
		p->rtt_seq = end;
		p->rtt_ns = e->s->now;
	}
	if (p->rto_at == UINT64_MAX) {
		p->rto_at = rto_after(e, i);
		set_timer(e, i);
	}
}

static void acked_now(struct flow_priv *p)
{
	p->work &= ~(uint32_t)W_ACK;
}

/* Largest payload of one frame. */
static uint32_t frame_payload(const struct egress *e, uint32_t mss)
{
	if (!e->cfg.offload)
		return mss;
	return (65535u - RN_IP4_HLEN - RN_TCP_HLEN) / mss * mss; /* whole segments: no short one in mid-stream */
}

/* The FIN that follows the last byte. 0, or -1: no room. */
static int send_fin(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	struct rn_buf *b = eg_out_buf(e, RN_SMALL);

	if (!b)
		return -1;
	if (!(f->up.fin & RN_FIN_SEEN))
		p->flags |= F_WE_FIRST;
	emit_segment(e, f, b, f->down.snd_nxt, f->up.rcv_nxt, RN_TH_FIN | RN_TH_ACK, window_field(p, f), NULL, 0, 0,
		     f->down.mss);
	f->down.snd_nxt++;
	f->down.fin |= RN_FIN_SENT;
	sent(e, i, f->down.snd_nxt, 0);
	acked_now(p);
	return 0;
}

/**
 * send_data() - Peek and send one frame at sequence number @seq
 * @max:	payload bytes at most
 * @again:	1: a retransmission of its own, snd_nxt stays
 * Return: bytes sent (0: the host side's end is here), -EAGAIN nothing to read, -ENOBUFS no room or buffer,
 *         other -errno: the host side broke.
 */
static ssize_t send_data(struct egress *e, uint32_t i, uint32_t seq, uint32_t max, int again)
{
	struct flow_priv *p = &e->priv[i];
	struct tcp_state *t = e->tcp;
	struct rn_flow *f = eg_flow(e, i);
	struct rn_buf *b;
	ssize_t n;

	if (!t->spare && !(t->spare = rn_buf_alloc(&e->s->pool, RN_LARGE))) {
		e->s->want_buf = 1;
		return -ENOBUFS;
	}
	if (rn_stage_room(e->s, RN_ROLE_GUEST, 1) < 1)
		return -ENOBUFS;
	n = peek(e, i, seq - f->down.snd_una, (uint8_t *)t->spare + TCP_DATA_OFF, max);
	if (n <= 0)
		return n;
	if ((uint32_t)n <= RN_BUF_SMALL - TCP_DATA_OFF) {
		/* Few bytes: copy, so that a large buffer is not held up in the ring for them. */
		b = eg_out_buf(e, RN_SMALL);
		if (!b)
			return -ENOBUFS;
		memcpy((uint8_t *)b + TCP_DATA_OFF, (uint8_t *)t->spare + TCP_DATA_OFF, (size_t)n);
	} else {
		b = t->spare;
		t->spare = NULL;
	}
	emit_segment(e, f, b, seq, f->up.rcv_nxt, RN_TH_ACK | ((uint32_t)n < max ? RN_TH_PSH : 0), window_field(p, f), NULL,
		     0, (uint32_t)n, f->down.mss);
	f->down.packets++;
	if (!again)
		f->down.snd_nxt = seq + (uint32_t)n;
	sent(e, i, seq + (uint32_t)n, again);
	acked_now(p);
	return n;
}

/**
 * down_pump() - Send what the host socket has and the guest's window takes
 * Return: as tcp_work().
 */
static int down_pump(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	struct tcp_flow *x = &e->tcp->flow[i];
	uint32_t frame = frame_payload(e, f->down.mss);

	for (uint32_t k = 0; k < TCP_PUMP; k++) {
		uint32_t flight = f->down.snd_nxt - f->down.snd_una, wnd = f->down.snd_wnd, max;
		ssize_t n;

		if (p->flags & F_EOF) {
			if (f->down.snd_nxt == x->fin_out)
				return send_fin(e, i) ? -1 : 0;
			if (SEQ_GT(f->down.snd_nxt, x->fin_out))
				return 0;
		}
		if (!(p->flags & F_READABLE) && !SEQ_LT(f->down.snd_nxt, f->down.snd_max))
			return 0;
		if ((p->flags & F_SLOW) && x->cwnd < wnd)
			wnd = x->cwnd;
		max = wnd > flight ? wnd - flight : 0;
		/* Silly window avoidance, the sender's side (RFC 9293 3.8.6.2.1): wait for a full segment or half the largest
		 * window, unless nothing is in flight that would bring an ACK. */
		if (flight && max < f->down.mss && max < x->wnd_max / 2)
			return 0;
		if (!max) {
			if (!flight && p->rto_at == UINT64_MAX) { /* closed window: probe it (RFC 9293 3.8.6.1) */
				p->rto_at = rto_after(e, i);
				set_timer(e, i);
			}
			return 0;
		}
		if (max > frame)
			max = frame;
		n = send_data(e, i, f->down.snd_nxt, max, 0);
		if (n == -ENOBUFS)
			return -1;
		if (n == -EAGAIN) {
			p->flags &= ~(uint32_t)F_READABLE;
			return 0;
		}
		if (n < 0) {
			host_reset(e, i);
			return 0;
		}
		if (n == 0) {
			p->flags |= F_EOF;
			p->flags &= ~(uint32_t)F_READABLE;
			f->down.fin |= RN_FIN_SEEN;
			x->fin_out = f->down.snd_nxt;
			continue;
		}
		/* A short read emptied the socket: more will be a new edge. Unless its end is already there. */
		if ((uint32_t)n < max && !(p->flags & F_HUP))
			p->flags &= ~(uint32_t)F_READABLE;
	}
	return 1;
}

/* One segment at snd_una once more: fast retransmit (RFC 5681 3.2), partial ACK (RFC 6582 3.2 step 5). */
static int retransmit_one(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	uint32_t len = f->down.snd_max - f->down.snd_una;
	ssize_t n;

	if (!len)
		return 0;
	if ((p->flags & F_EOF) && f->down.snd_una == e->tcp->flow[i].fin_out) {
		uint32_t keep = f->down.snd_nxt;
		int r = 0;

		f->down.snd_nxt = f->down.snd_una;
		r = send_fin(e, i);
		f->down.snd_nxt = SEQ_GT(keep, f->down.snd_nxt) ? keep : f->down.snd_nxt;
		return r ? -1 : 0;
	}
	n = send_data(e, i, f->down.snd_una, len < f->down.mss ? len : f->down.mss, 1);
	if (n == -ENOBUFS)
		return -1;
	if (n < 0 && n != -EAGAIN)
		host_reset(e, i);
	return 0;
}

/* --- small segments --- */

static int send_ack(struct egress *e, uint32_t i, uint32_t seq)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	struct rn_buf *b = eg_out_buf(e, RN_SMALL);

	if (!b)
		return -1;
	emit_segment(e, f, b, seq, f->up.rcv_nxt, RN_TH_ACK, window_field(p, f), NULL, 0, 0, f->down.mss);
	return 0;
}

static int send_synack(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	struct rn_buf *b = eg_out_buf(e, RN_SMALL);
	uint8_t opt[8] = { RN_TCPOPT_MSS, 4 };
	uint32_t n = 4, w;

	if (!b)
		return -1;
	rn_put16(opt + 2, (uint16_t)(e->cfg.mtu - RN_IP4_HLEN - RN_TCP_HLEN));
	if (p->flags & F_GUEST_WS) { /* offered only if the guest did (RFC 7323 2.2) */
		opt[4] = RN_TCPOPT_NOP;
		opt[5] = RN_TCPOPT_WSCALE;
		opt[6] = 3;
		opt[7] = TCP_WSCALE;
		n = 8;
	}
	w = rcv_wnd(f); /* never scaled on a SYN (RFC 7323 2.2) */
	emit_segment(e, f, b, f->down.iss, f->up.rcv_nxt, RN_TH_SYN | RN_TH_ACK, (uint16_t)(w > 65535 ? 65535 : w), opt, n, 0,
		     f->down.mss);
	if (p->rto_at == UINT64_MAX) {
		p->rtt_ns = e->s->now;
		p->rto_at = rto_after(e, i);
		set_timer(e, i);
	}
	return 0;
}

/* The connect failed: RST where somebody refused, ICMP where nobody was reached (RFC 1122 4.2.3.9). */
static int send_failure(struct egress *e, uint32_t i)
{
	struct rn_flow *f = eg_flow(e, i);
	int err = e->tcp->flow[i].error, code = -1;
	struct rn_buf *b;

	switch (err) {
	case ENETUNREACH:
	case ENETDOWN:
		code = RN_ICMP_UNREACH_NET;
		break;
	case EHOSTUNREACH:
	case EHOSTDOWN:
	case ETIMEDOUT:
		code = RN_ICMP_UNREACH_HOST;
		break;
	case EACCES:
	case EPERM:
		code = RN_ICMP_UNREACH_ADMIN;
		break;
	}
	if (code >= 0) {
		/* The guest's SYN as it was, as far as an ICMP error quotes it (RFC 792): only ports and seq count. */
		uint8_t q[RN_IP4_HLEN + RN_TCP_HLEN] = { 0x45 };

		rn_put16(q + RN_IP4_LEN, sizeof(q));
		rn_put16(q + RN_IP4_FRAG, RN_IP4_DF);
		q[RN_IP4_TTL] = 64;
		q[RN_IP4_PROTO] = RN_IPPROTO_TCP;
		memcpy(q + RN_IP4_SRC, f->guest_addr + 12, 4);
		memcpy(q + RN_IP4_DST, f->peer_addr + 12, 4);
		rn_csum_ip4(q, RN_IP4_HLEN);
		rn_put16(q + RN_IP4_HLEN + RN_TCP_SPORT, f->guest_port);
		rn_put16(q + RN_IP4_HLEN + RN_TCP_DPORT, f->peer_port);
		rn_put32(q + RN_IP4_HLEN + RN_TCP_SEQ, f->up.irs);
		q[RN_IP4_HLEN + RN_TCP_OFF] = 5 << 4;
		q[RN_IP4_HLEN + RN_TCP_FLAGS] = RN_TH_SYN;
		int r = eg_icmp_error(e, f->guest_mac, e->cfg.gateway4, q, sizeof(q), RN_ICMP_UNREACH, (uint8_t)code, 0);

		if (r == 0) {
			e->s->c[RN_C_tcp_unreachable]++;
			return 0;
		}
		if (e->s->want_room[RN_ROLE_GUEST] || e->s->want_buf)
			return -1;
		/* over the ICMP rate limit: a RST is better than silence */
	}
	b = eg_out_buf(e, RN_SMALL);
	if (!b)
		return -1;
	e->s->c[RN_C_tcp_rst_sent]++;
	e->s->c[code >= 0 ? RN_C_tcp_unreachable : RN_C_tcp_refused]++;
	/* RFC 9293 3.10.7.1: no ACK in the SYN, so seq 0 and ack behind it */
	emit_segment(e, f, b, 0, f->up.irs + 1, RN_TH_RST | RN_TH_ACK, 0, NULL, 0, 0, e->cfg.mtu);
	return 0;
}

int tcp_work(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	int more = 0;

	if (p->work & W_FAIL) {
		if (send_failure(e, i))
			return -1;
		flow_gone(e, i);
		return 0;
	}
	if (p->work & W_RST) {
		struct rn_buf *b = eg_out_buf(e, RN_SMALL);

		if (!b)
			return -1;
		e->s->c[RN_C_tcp_rst_sent]++;
		/* At the highest sequence number sent: what the guest expects next if nothing was lost, so that it takes the
		 * RST at once (RFC 5961 3.2); if something was, its challenge ACK is answered by reply_rst(). */
		emit_segment(e, f, b, f->down.snd_max, f->up.rcv_nxt, RN_TH_RST | RN_TH_ACK, 0, NULL, 0, 0, f->down.mss);
		flow_gone(e, i);
		return 0;
	}
	if (p->work & W_SYNACK) {
		if (send_synack(e, i))
			return -1;
		p->work &= ~(uint32_t)W_SYNACK;
	}
	if (p->work & W_UP) {
		p->work &= ~(uint32_t)W_UP;
		if (up_flush(e, i))
			return 1; /* W_RST waits */
		/* The window opened without a segment to answer: tell the guest (I3). */
		if (p->fd >= 0 && !(f->up.fin & RN_FIN_SEEN) && update_window(e, i))
			p->work |= W_ACK;
		maybe_closed(e, i);
		if (get_state(f) == RN_FL_FREE)
			return 0;
	}
	if (p->work & W_REXMIT) {
		if (p->fd >= 0 && retransmit_one(e, i))
			return -1;
		if (p->work & W_RST)
			return 1;
		p->work &= ~(uint32_t)W_REXMIT;
	}
	if (p->work & W_DOWN) {
		int r = p->fd >= 0 && get_state(f) == RN_FL_ESTABLISHED ? down_pump(e, i) : 0;

		if (r < 0)
			return -1;
		if (p->work & W_RST)
			return 1;
		if (r > 0)
			more = 1;
		else
			p->work &= ~(uint32_t)W_DOWN;
	}
	if (p->work & W_PROBE) {
		/* One below what is expected: it must be answered with an ACK that tells the window (RFC 9293 3.10.7.4). */
		if (send_ack(e, i, f->down.snd_una - 1))
			return -1;
		e->s->c[RN_C_tcp_zero_window_probes]++;
		p->work &= ~(uint32_t)W_PROBE;
	}
	if (p->work & W_ACK) {
		if (send_ack(e, i, f->down.snd_nxt))
			return -1;
		p->work &= ~(uint32_t)W_ACK;
		if (get_state(f) == RN_FL_TIME_WAIT && !(p->flags & F_WE_FIRST)) {
			flow_gone(e, i);
			return 0;
		}
	}
	return more;
}

/* --- host events --- */

static void connect_done(struct egress *e, uint32_t i, int err)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);

	e->pending--;
	set_state(f, RN_FL_SYN_RCVD); /* out of the pending count whichever way it goes */
	if (err) {
		e->tcp->flow[i].error = err;
		eg_close_fd(e, i);
		eg_work(e, i, W_FAIL);
		return;
	}
	p->flags |= F_CONNECTED;
	update_window(e, i);
	if (rcv_wnd(f) > 65535)
		f->up.rcv_adv = f->up.rcv_nxt + 65535; /* what the SYN-ACK can say */
	eg_work(e, i, W_SYNACK);
}

void tcp_event(struct egress *e, uint32_t i, uint32_t events)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);

	if (p->fd < 0)
		return;
	if (get_state(f) == RN_FL_CONNECTING) {
		int err = 0;
		socklen_t l = sizeof(err);

		if (!(events & (EPOLLOUT | EPOLLERR | EPOLLHUP)))
			return;
		if (getsockopt(p->fd, SOL_SOCKET, SO_ERROR, &err, &l) < 0)
			err = errno;
		connect_done(e, i, err);
		if (err)
			return;
	}
	if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		p->flags |= F_HUP;
	if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
		p->flags |= F_READABLE;
		eg_work(e, i, W_DOWN);
	}
	/* A reset host socket has nothing to peek at any more when its end was seen before: ask it. */
	if ((events & EPOLLERR) && (p->flags & F_EOF)) {
		int err = 0;
		socklen_t l = sizeof(err);

		if (getsockopt(p->fd, SOL_SOCKET, SO_ERROR, &err, &l) == 0 && err) {
			host_reset(e, i);
			return;
		}
	}
	if ((events & EPOLLOUT) && (p->flags & F_BLOCKED))
		eg_work(e, i, W_UP);
}

/* --- timers --- */

void tcp_timer(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	uint8_t st = get_state(f);
	uint32_t flight = f->down.snd_max - f->down.snd_una;

	if (p->work & (W_RST | W_FAIL))
		return; /* on its way out */
	if (p->life_at <= e->s->now) {
		if (st == RN_FL_TIME_WAIT) {
			flow_gone(e, i);
			return;
		}
		if (st == RN_FL_ESTABLISHED) { /* keepalive: is the guest still there? (RFC 9293 3.8.4) */
			uint64_t idle = e->s->now - f->last_ns;

			if (idle < TCP_KEEPALIVE_NS && !p->probes) {
				p->life_at = f->last_ns + TCP_KEEPALIVE_NS;
			} else if (p->probes++ >= TCP_KEEPALIVE_PROBES) {
				give_up(e, i);
				return;
			} else {
				p->life_at = e->s->now + TCP_KEEPALIVE_INTERVAL_NS;
				eg_work(e, i, W_PROBE);
			}
		} else {
			p->life_at = UINT64_MAX;
		}
	}
	if (p->rto_at > e->s->now) {
		set_timer(e, i);
		return;
	}
	p->rto_at = UINT64_MAX;
	if (st == RN_FL_SYN_RCVD) {
		if (p->backoff++ >= TCP_SYN_RETRIES) {
			give_up(e, i);
			return;
		}
		eg_work(e, i, W_SYNACK);
	} else if (st == RN_FL_ESTABLISHED && flight) {
		if (p->backoff++ >= TCP_RETRIES) {
			give_up(e, i);
			return;
		}
		/* RFC 6298 5.4-5.6, RFC 5681 3.1: back to snd_una, one segment, twice the time. */
		e->s->c[RN_C_tcp_rto]++;
		f->down.snd_nxt = f->down.snd_una;
		p->recover = f->down.snd_max;
		p->flags = (p->flags | F_SLOW | F_READABLE) & ~(uint32_t)(F_RECOVER | F_TIMED);
		e->tcp->flow[i].cwnd = f->down.mss;
		p->dupacks = 0;
		p->rto_at = rto_after(e, i);
		if (f->down.snd_wnd == 0)
			eg_work(e, i, W_PROBE); /* the window closed over what is in flight */
		else
			eg_work(e, i, W_DOWN);
	} else if (st == RN_FL_ESTABLISHED && f->down.snd_wnd == 0 && (p->flags & F_READABLE)) {
		if (p->backoff < 16)
			p->backoff++;
		p->rto_at = rto_after(e, i);
		eg_work(e, i, W_PROBE);
	}
	set_timer(e, i);
}

/* --- segments from the guest --- */

static void parse_options(struct seg *sg, const uint8_t *th, uint32_t hlen)
{
	struct rn_view v = { .data = th, .len = hlen };
	uint32_t at = RN_TCP_HLEN;

	sg->mss = 0;
	sg->wscale = -1;
	while (at < hlen) {
		const uint8_t *o = rn_view_get(&v, at, 1), *l;
		uint8_t len;

		if (!o || o[0] == RN_TCPOPT_EOL)
			return;
		if (o[0] == RN_TCPOPT_NOP) {
			at++;
			continue;
		}
		l = rn_view_get(&v, at + 1, 1);
		if (!l || l[0] < 2)
			return; /* RFC 9293 3.1: an illegal length ends the list */
		len = l[0];
		o = rn_view_get(&v, at, len);
		if (!o)
			return;
		if (o[0] == RN_TCPOPT_MSS && len == 4)
			sg->mss = rn_get16(o + 2);
		else if (o[0] == RN_TCPOPT_WSCALE && len == 3)
			sg->wscale = o[2] > 14 ? 14 : o[2]; /* RFC 7323 2.3 */
		at += len;
	}
}

/* ISN = M + F(tuple, secret) (RFC 6528 3); M ticks each 4 us. */
static uint32_t new_isn(struct egress *e, const struct rn_flow *f)
{
	uint8_t k[36];

	memcpy(k, f->guest_addr, 16);
	memcpy(k + 16, f->peer_addr, 16);
	rn_put16(k + 32, f->guest_port);
	rn_put16(k + 34, f->peer_port);
	return (uint32_t)eg_siphash(e, k, sizeof(k)) + (uint32_t)(e->s->now / 4000u);
}

static int start_connect(struct egress *e, uint32_t i, const uint8_t dst[4], uint16_t port)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	int one = 1, zero = 0, fd, r;
	uint8_t host[4];

	if (port == RN_PORT_DNS && e->cfg.dns_path[0] && !memcmp(dst, e->cfg.gateway4, 4)) {
		struct sockaddr_un un = { .sun_family = AF_UNIX };
		size_t n = strnlen(e->cfg.dns_path, sizeof(e->cfg.dns_path));

		if (n > sizeof(un.sun_path) - 1)
			return EINVAL;
		memcpy(un.sun_path + 1, e->cfg.dns_path, n); /* abstract: a NUL in front (unix(7)) */
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		if (fd < 0)
			return errno;
		p->is_unix = 1;
		r = connect(fd, (struct sockaddr *)&un, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + n));
		if (r < 0 && errno == EAGAIN)
			errno = ECONNREFUSED; /* backlog full; unlike TCP there is no waiting in line */
	} else {
		struct sockaddr_in sin = { .sin_family = AF_INET, .sin_port = htons(port) };

		if (eg_host_addr(e, dst, host))
			return ECONNREFUSED; /* loopback not offered: nobody listens there */
		memcpy(&sin.sin_addr, host, 4);
		fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		if (fd < 0)
			return errno;
		p->is_unix = 0;
		/* The guest's stack has done its own Nagle; a second one only adds delay. */
		(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		(void)setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &one, sizeof(one));
		(void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
		r = connect(fd, (struct sockaddr *)&sin, sizeof(sin));
	}
	if (r < 0 && errno != EINPROGRESS) {
		int err = errno;

		close(fd);
		return err;
	}
	if (e->tcp->peek_off && setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof(zero)) == 0)
		p->flags |= F_PEEK_OFF;
	p->fd = fd;
	p->peeked = 0;
	e->pending++;
	set_state(f, RN_FL_CONNECTING);
	int w = eg_watch(e, i, fd, TCP_EVENTS);

	if (w) {
		e->pending--;
		set_state(f, RN_FL_SYN_RCVD);
		return -w;
	}
	if (r == 0)
		connect_done(e, i, 0);
	return 0;
}

/* A SYN of a new connection. */
static void open_flow(struct egress *e, struct eg_frame *fr, const struct seg *sg, const uint8_t guest[16], uint16_t gport,
		      const uint8_t peer[16], uint16_t pport)
{
	struct rn_flow *f;
	struct flow_priv *p;
	uint32_t i = EG_NONE, own = e->cfg.mtu - RN_IP4_HLEN - RN_TCP_HLEN;
	int err;

	e->s->c[RN_C_tcp_syn]++;
	if (e->pending < e->cfg.pending_max && e->nfds < e->cfg.nfile)
		i = eg_new(e, RN_IPPROTO_TCP, guest, gport, peer, pport, fr->eth + 6);
	if (i == EG_NONE) {
		e->s->c[RN_C_tcp_over_limit]++;
		reply_rst(e, fr, sg);
		return;
	}
	f = eg_flow(e, i);
	p = &e->priv[i];
	e->tcp->flow[i] = (struct tcp_flow){ .syn_seq = sg->seq };
	p->parked = NULL;
	p->nparked = 0;
	p->dupacks = p->backoff = p->probes = 0;
	p->flags = 0;
	p->sndbuf = 0;
	p->rto_at = p->ack_at = UINT64_MAX;
	p->life_at = UINT64_MAX;
	f->up.irs = sg->seq;
	f->up.rcv_nxt = sg->seq + 1;
	f->up.rcv_adv = f->up.rcv_nxt;
	f->up.fin = f->down.fin = 0;
	f->up.parked = 0;
	f->up.bytes = f->up.packets = f->down.bytes = f->down.packets = 0;
	f->down.iss = new_isn(e, f);
	f->down.snd_una = f->down.iss;
	f->down.snd_nxt = f->down.snd_max = f->down.iss + 1;
	f->down.snd_wnd = sg->wnd;
	f->down.snd_wl1 = sg->seq;
	f->down.snd_wl2 = f->down.iss;
	/* RFC 9293 3.7.1: 536 if the option is absent. A smaller one is honoured down to 64: below, headers are all. */
	f->down.mss = (uint16_t)(sg->mss ? sg->mss : 536u);
	if (f->down.mss < 64)
		f->down.mss = 64;
	if (f->down.mss > own)
		f->down.mss = (uint16_t)own;
	f->down.wscale = 0;
	if (sg->wscale >= 0) {
		p->flags |= F_GUEST_WS;
		f->down.wscale = (uint8_t)sg->wscale;
	}
	f->up.wscale = p->flags & F_GUEST_WS ? TCP_WSCALE : 0;
	f->down.srtt_us = f->down.rttvar_us = 0;
	f->down.rto_us = TCP_RTO_INIT_US;
	f->down.retransmits = 0;
	set_state(f, RN_FL_SYN_RCVD);
	err = start_connect(e, i, peer + 12, pport);
	if (err) {
		e->tcp->flow[i].error = err;
		eg_close_fd(e, i);
		eg_work(e, i, W_FAIL);
	}
}

/* RFC 6298 2.2, 2.3 */
static void rtt_sample(struct rn_flow *f, uint64_t ns)
{
	uint32_t r = (uint32_t)(ns / 1000u), rto;

	if (!f->down.srtt_us) {
		f->down.srtt_us = r ? r : 1;
		f->down.rttvar_us = r / 2;
	} else {
		uint32_t d = r > f->down.srtt_us ? r - f->down.srtt_us : f->down.srtt_us - r;

		f->down.rttvar_us = f->down.rttvar_us - f->down.rttvar_us / 4 + d / 4;
		f->down.srtt_us = f->down.srtt_us - f->down.srtt_us / 8 + r / 8;
	}
	rto = f->down.srtt_us + 4 * f->down.rttvar_us;
	f->down.rto_us = rto < TCP_RTO_MIN_US ? TCP_RTO_MIN_US : rto > TCP_RTO_MAX_US ? TCP_RTO_MAX_US : rto;
}

/**
 * new_ack() - The guest acknowledged up to sg->ack
 * Return: 0, or -1: the host side broke, the flow is on its way out.
 */
static int new_ack(struct egress *e, uint32_t i, uint32_t ack)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	struct tcp_flow *x = &e->tcp->flow[i];
	uint32_t n = ack - f->down.snd_una, bytes = n;

	if ((p->flags & F_EOF) && SEQ_GT(ack, x->fin_out)) {
		bytes--;
		f->down.fin |= RN_FIN_ACKED;
	}
	if (bytes) {
		int r = discard(e, i, bytes);

		if (r) {
			host_reset(e, i);
			return -1;
		}
		f->down.bytes += bytes;
		e->s->c[RN_C_tcp_down_bytes] += bytes;
	}
	f->down.snd_una = ack;
	if (SEQ_LT(f->down.snd_nxt, ack))
		f->down.snd_nxt = ack; /* after going back: the guest had more than we thought */
	if ((p->flags & F_TIMED) && SEQ_GE(ack, p->rtt_seq)) {
		p->flags &= ~(uint32_t)F_TIMED;
		rtt_sample(f, e->s->now - p->rtt_ns);
	}
	p->backoff = 0;
	p->dupacks = 0;
	if (p->flags & F_SLOW) {
		x->cwnd += n; /* slow start (RFC 5681 3.1) */
		if (SEQ_GE(ack, p->recover))
			p->flags &= ~(uint32_t)F_SLOW;
	}
	if (p->flags & F_RECOVER) {
		if (SEQ_GE(ack, p->recover))
			p->flags &= ~(uint32_t)F_RECOVER;
		else
			eg_work(e, i, W_REXMIT); /* partial ACK: the next hole (RFC 6582 3.2) */
	}
	/* RFC 6298 5.2, 5.3. Setting the wheel for each ACK would cost; a timer that fires early looks again. */
	p->rto_at = f->down.snd_max == ack ? UINT64_MAX : rto_after(e, i);
	if (p->rto_at < p->deadline)
		set_timer(e, i);
	if ((p->flags & (F_READABLE | F_EOF)) || SEQ_LT(f->down.snd_nxt, f->down.snd_max))
		eg_work(e, i, W_DOWN);
	return 0;
}

/* Guest's RST in the window (RFC 5961 3.2). Return 1: the flow is gone. */
static int got_rst(struct egress *e, uint32_t i, const struct seg *sg)
{
	struct rn_flow *f = eg_flow(e, i);

	if (sg->seq == f->up.rcv_nxt) {
		e->s->c[RN_C_tcp_reset_by_guest]++;
		abort_host(e, i);
		flow_gone(e, i);
		return 1;
	}
	if (SEQ_GT(sg->seq, f->up.rcv_nxt) && SEQ_LT(sg->seq, f->up.rcv_adv)) {
		e->s->c[RN_C_tcp_challenge_acks]++;
		eg_work(e, i, W_ACK);
	}
	return 0;
}

/* A segment of a connection in a synchronized state: RFC 9293 3.10.7.4 in its order. */
static void segment(struct egress *e, uint32_t i, struct eg_frame *fr, struct seg *sg)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	uint32_t fin = !!(sg->flags & RN_TH_FIN), end = sg->seq + sg->len + fin, wnd = rcv_wnd(f);
	int old, beyond, keep_data = 1;

	/* First, sequence number. */
	old = SEQ_LT(sg->seq, f->up.rcv_nxt) && SEQ_LE(end, f->up.rcv_nxt);
	beyond = SEQ_GT(sg->seq, f->up.rcv_adv) || (sg->seq == f->up.rcv_adv && sg->len + fin && !(fin && !sg->len && !wnd));
	if (sg->flags & RN_TH_RST) {
		if (!old && !(beyond && wnd))
			got_rst(e, i, sg);
		else if (sg->seq == f->up.rcv_nxt)
			got_rst(e, i, sg);
		return;
	}
	/* Fourth, SYN: a challenge ACK whatever its number (RFC 5961 4.2). */
	if (sg->flags & RN_TH_SYN) {
		e->s->c[RN_C_tcp_challenge_acks]++;
		eg_work(e, i, W_ACK);
		return;
	}
	if (!(sg->flags & RN_TH_ACK))
		return;
	if (old) {
		/* Nothing new in it (a keepalive probe, a resent segment whose ACK was lost): answer, and look at the ACK. */
		e->s->c[RN_C_tcp_duplicate_segments]++;
		eg_work(e, i, W_ACK);
		keep_data = 0;
	} else if (beyond) {
		e->s->c[RN_C_drop_tcp_outside_window]++;
		eg_work(e, i, W_ACK);
		/* RFC 9293 3.10.7.4: with a closed window ACKs of a segment at the edge are still taken. */
		if (sg->seq != f->up.rcv_nxt)
			return;
		keep_data = 0;
	}
	p->probes = 0;

	/* Fifth, ACK. */
	if (SEQ_GT(sg->ack, f->down.snd_max) || SEQ_LT(sg->ack, f->down.snd_una - e->tcp->flow[i].wnd_max)) {
		e->s->c[RN_C_drop_tcp_bad_ack]++;
		eg_work(e, i, W_ACK);
		return;
	}
	uint32_t scaled = sg->wnd << f->down.wscale;
	struct tcp_flow *x = &e->tcp->flow[i];

	if (SEQ_GT(sg->ack, f->down.snd_una)) {
		if (new_ack(e, i, sg->ack))
			return;
	} else if (sg->ack == f->down.snd_una && f->down.snd_max != f->down.snd_una && !sg->len && !fin &&
		   scaled == f->down.snd_wnd && !old) {
		/* Duplicate ACK (RFC 5681 2). */
		if (++p->dupacks == 3 && !(p->flags & (F_RECOVER | F_SLOW))) {
			e->s->c[RN_C_tcp_fast_retransmit]++;
			p->flags |= F_RECOVER;
			p->recover = f->down.snd_max;
			eg_work(e, i, W_REXMIT);
		}
	}
	if (SEQ_LE(f->down.snd_una, sg->ack) &&
	    (SEQ_LT(f->down.snd_wl1, sg->seq) || (f->down.snd_wl1 == sg->seq && SEQ_LE(f->down.snd_wl2, sg->ack)))) {
		int opened = scaled > f->down.snd_wnd;

		f->down.snd_wnd = scaled;
		f->down.snd_wl1 = sg->seq;
		f->down.snd_wl2 = sg->ack;
		if (scaled > x->wnd_max)
			x->wnd_max = scaled;
		if (opened) {
			if (f->down.snd_una == f->down.snd_max && p->rto_at != UINT64_MAX) {
				p->rto_at = UINT64_MAX; /* persist timer no more */
				p->backoff = 0;
			}
			if (p->flags & (F_READABLE | F_EOF))
				eg_work(e, i, W_DOWN);
		}
	}

	/* Seventh, the text; eighth, FIN. */
	if (keep_data && (sg->len || fin)) {
		uint32_t seq = sg->seq, len = sg->len;
		const uint8_t *data = sg->data;

		if (f->up.fin & RN_FIN_SEEN) {
			eg_work(e, i, W_ACK); /* text behind its own FIN: RFC 9293 says it does not occur */
			maybe_closed(e, i);
			return;
		}
		if (SEQ_LT(seq, f->up.rcv_nxt)) { /* trim the old part; FIN has its own number */
			uint32_t cut = f->up.rcv_nxt - seq;

			if (cut > len)
				cut = len;
			seq += cut;
			data += cut;
			len -= cut;
		}
		if (SEQ_GT(seq + len, f->up.rcv_adv)) { /* trim what the window did not offer, and the FIN with it */
			len = f->up.rcv_adv - seq;
			fin = 0;
		}
		if (fin && !(p->flags & F_FIN_IN)) {
			p->flags |= F_FIN_IN;
			e->tcp->flow[i].fin_in = seq + len;
		}
		/* Data behind a FIN the guest already numbered cannot be data. */
		if ((p->flags & F_FIN_IN) && SEQ_GT(seq + len, e->tcp->flow[i].fin_in))
			len = SEQ_LT(seq, e->tcp->flow[i].fin_in) ? e->tcp->flow[i].fin_in - seq : 0;
		if (len) {
			f->up.packets++;
			if (SEQ_GT(seq, f->up.rcv_nxt))
				eg_work(e, i, W_ACK); /* a hole: duplicate ACK at once (RFC 5681 4.2) */
			if (park(e, i, fr, seq, data, len)) {
				if (!(p->flags & F_BLOCKED))
					eg_work(e, i, W_UP);
			} else {
				eg_work(e, i, W_ACK);
			}
		}
		if (fin || (p->flags & F_FIN_IN))
			eg_work(e, i, p->flags & F_BLOCKED ? W_ACK : W_UP | W_ACK);
	}
	maybe_closed(e, i);
}

void tcp_input(struct egress *e, struct eg_frame *fr)
{
	struct seg sg;
	uint8_t guest[16], peer[16];
	uint16_t gport = rn_get16(fr->l4 + RN_TCP_SPORT), pport = rn_get16(fr->l4 + RN_TCP_DPORT);
	struct rn_flow *f;
	uint32_t i;

	sg.seq = rn_get32(fr->l4 + RN_TCP_SEQ);
	sg.ack = rn_get32(fr->l4 + RN_TCP_ACK);
	sg.flags = fr->l4[RN_TCP_FLAGS];
	sg.wnd = rn_get16(fr->l4 + RN_TCP_WND);
	sg.len = fr->payload_len;
	sg.data = fr->payload;
	rn_addr_from4(guest, fr->ip + RN_IP4_SRC);
	rn_addr_from4(peer, fr->ip + RN_IP4_DST);
	i = eg_find(e, RN_IPPROTO_TCP, guest, gport, peer, pport);
	if (i == EG_NONE) {
	fresh:
		if (sg.flags & RN_TH_RST)
			return;
		if ((sg.flags & (RN_TH_SYN | RN_TH_ACK)) != RN_TH_SYN) {
			e->s->c[RN_C_drop_tcp_no_flow]++;
			reply_rst(e, fr, &sg);
			return;
		}
		parse_options(&sg, fr->l4, fr->l4_hlen);
		open_flow(e, fr, &sg, guest, gport, peer, pport);
		return;
	}
	f = eg_flow(e, i);
	f->last_ns = e->s->now;
	if (e->priv[i].work & (W_RST | W_FAIL))
		return; /* on its way out: the answer is queued */
	switch (get_state(f)) {
	case RN_FL_CONNECTING:
	case RN_FL_SYN_RCVD:
		if (sg.flags & RN_TH_RST) {
			if (sg.seq == f->up.rcv_nxt) { /* RFC 5961 3.2 */
				e->s->c[RN_C_tcp_reset_by_guest]++;
				abort_host(e, i);
				flow_gone(e, i);
			}
			return;
		}
		if (sg.flags & RN_TH_SYN) {
			if (sg.seq == f->up.irs) { /* the same SYN again */
				if (get_state(f) == RN_FL_SYN_RCVD)
					eg_work(e, i, W_SYNACK);
				return;
			}
			/* The guest gave that one up and starts anew on the same ports. */
			abort_host(e, i);
			flow_gone(e, i);
			i = EG_NONE;
			goto fresh;
		}
		if (!(sg.flags & RN_TH_ACK))
			return;
		if (get_state(f) == RN_FL_CONNECTING || sg.ack != f->down.iss + 1) {
			reply_rst(e, fr, &sg); /* RFC 9293 3.10.7.4, SYN-RECEIVED: not an acceptable ACK */
			return;
		}
		memcpy(f->guest_mac, fr->eth + 6, 6);
		set_state(f, RN_FL_ESTABLISHED);
		e->s->c[RN_C_tcp_established]++;
		f->down.snd_una = sg.ack;
		f->down.snd_wnd = sg.wnd << f->down.wscale;
		f->down.snd_wl1 = sg.seq;
		f->down.snd_wl2 = sg.ack;
		e->tcp->flow[i].wnd_max = f->down.snd_wnd;
		if (!e->priv[i].backoff)
			rtt_sample(f, e->s->now - e->priv[i].rtt_ns);
		e->priv[i].backoff = 0;
		e->priv[i].work &= ~(uint32_t)W_SYNACK;
		e->priv[i].rto_at = UINT64_MAX;
		e->priv[i].life_at = e->s->now + TCP_KEEPALIVE_NS;
		set_timer(e, i);
		eg_work(e, i, W_DOWN);
		segment(e, i, fr, &sg); /* it may carry data or FIN (ARCBOX fault 22) */
		return;
	case RN_FL_TIME_WAIT:
		if ((sg.flags & (RN_TH_SYN | RN_TH_ACK | RN_TH_RST)) == RN_TH_SYN && SEQ_GT(sg.seq, f->up.rcv_nxt)) {
			flow_gone(e, i); /* a new connection may reuse the pair (RFC 9293 3.6.1, RFC 6191) */
			i = EG_NONE;
			goto fresh;
		}
		if (!(sg.flags & RN_TH_RST) && (sg.len || (sg.flags & (RN_TH_FIN | RN_TH_SYN)))) /* RFC 1337: no RST here */
			eg_work(e, i, W_ACK);
		return;
	case RN_FL_ESTABLISHED:
		memcpy(f->guest_mac, fr->eth + 6, 6);
		segment(e, i, fr, &sg);
		return;
	}
}

void tcp_fini(struct egress *e)
{
	struct tcp_state *t = e->tcp;

	if (!t)
		return;
	if (t->flow && t->nodes) {
		for (uint32_t i = 0; i < e->nflows; i++) {
			struct rn_flow *f = eg_flow(e, i);
			uint8_t st = get_state(f);

			if (f->proto != RN_IPPROTO_TCP || st == RN_FL_FREE)
				continue;
			if (st == RN_FL_ESTABLISHED || st == RN_FL_SYN_RCVD) {
				struct rn_buf *b = eg_out_buf(e, RN_SMALL);

				/* A cut connection must not look like a whole one to either side. */
				if (b)
					emit_segment(e, f, b, f->down.snd_max, f->up.rcv_nxt, RN_TH_RST | RN_TH_ACK, 0,
						     NULL, 0, 0, f->down.mss ? f->down.mss : 536);
				abort_host(e, i);
			}
			flow_gone(e, i);
		}
	}
	if (t->spare)
		rn_buf_free(&e->s->pool, t->spare);
	free(t->flow);
	free(t->nodes);
	free(t->scratch);
	free(t->skip);
	free(t);
	e->tcp = NULL;
}
