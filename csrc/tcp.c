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
 * Down (host to guest): data stays in the host socket until the guest acknowledged it (I2). tcp_down_pump() peeks at
 * offset snd_nxt - snd_una, an ACK discards. Going back is moving the peek offset. Kernels before 6.9 lack
 * SO_PEEK_OFF on TCP: there the peek goes past a discard buffer.
 *
 * A SYN is answered when the host connect() ended (I4). Loss on the guest link: three duplicate ACKs resend one
 * segment, partial ACKs the next (RFC 6582); a timeout (RFC 6298) goes back to snd_una and opens up from one
 * segment (RFC 5681 3.1) until all that was in flight is acknowledged. SACK (tcp_sack.c) tells the holes. Without loss there is no congestion
 * window: the link is memory, the guest's window is the limit.
 *
 * Events only queue work (tcp_event, tcp_input set bits); tcp_work() does it when the guest ring has room, so that
 * several frames of a burst cost one send() and one ACK, and a full ring delays instead of dropping.
 *
 * Limits: parked bytes TCP_PARK_MAX over all flows, segments TCP_NODES; beyond, what is last is dropped with a counter
 * and sent again by the guest, as it was never acknowledged; connects under way cfg.pending_max; flows by the table; descriptors nfile.
 * Timeouts: SYN-ACK resent 5 times from 1 s; data given up after TCP_RETRIES timeouts; keepalive after 2 h idle.
 */
#include "tcp_internal.h"
#include "proxy.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

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
	rn_peek_skip_init(&t->skip);
	if (!t->flow || !t->nodes || !t->scratch)
		return rn_fail(e->s, -ENOMEM, "tcp: out of memory");
	for (uint32_t i = 0; i < TCP_NODES; i++) {
		t->nodes[i].next = t->free_nodes;
		t->free_nodes = &t->nodes[i];
	}
	t->nfree = TCP_NODES;
	t->peek_off = e->cfg.peek_offset < 0 ? probe_peek_off() : e->cfg.peek_offset;
	if (e->cfg.peek_offset == 1 && !probe_peek_off())
		return rn_fail(e->s, -ENOTSUP, "this kernel has no SO_PEEK_OFF for TCP (Linux 6.9): use peek = \"discard\"");
	return 0;
}

/* --- timers: each reason has its time, the flow's one timer is the earliest --- */

void tcp_set_timer(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	uint64_t at = p->rto_at < p->life_at ? p->rto_at : p->life_at;

	eg_timer(e, i, at);
}

uint64_t tcp_rto_after(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	uint64_t rto = (uint64_t)eg_flow(e, i)->down.rto_us << (p->backoff < TCP_BACKOFF_MAX ? p->backoff : TCP_BACKOFF_MAX);

	return e->s->now + us(rto < TCP_RTO_MAX_US ? rto : TCP_RTO_MAX_US);
}

/* --- end of a flow --- */

void tcp_gone(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	tcp_take_back(e, i); /* what it finds to do is not done any more */
	if (get_state(eg_flow(e, i)) == RN_FL_CONNECTING)
		e->pending--;
	else if (get_state(eg_flow(e, i)) == RN_FL_SYN_SENT)
		tcp_in_settled(e, i);
	tcp_park_drop(e, i);
	free(e->tcp->flow[i].sacked);
	e->tcp->flow[i].sacked = NULL;
	p->flags = 0;
	eg_drop(e, i);
}

/* The host side must see that the connection broke, not that it ended well (I5). */
void tcp_abort_host(struct egress *e, uint32_t i)
{
	struct linger lg = { .l_onoff = 1, .l_linger = 0 };
	struct flow_priv *p = &e->priv[i];

	tcp_take_back(e, i);
	if (p->fast) { /* others hold the socket too: its close would be theirs. A connect to nowhere resets it now (connect(2)). */
		const struct sockaddr none = { .sa_family = AF_UNSPEC };

		(void)connect(p->fd, &none, sizeof(none));
	} else if (p->fd >= 0 && !p->is_unix)
		(void)setsockopt(p->fd, SOL_SOCKET, SO_LINGER, &lg, sizeof(lg)); /* a socket in error refuses: gone anyway */
	eg_close_fd(e, i);
}

/* Host side broke: tell the guest as soon as there is room. */
void tcp_host_reset(struct egress *e, uint32_t i)
{
	eg_count(e, i, RN_C_tcp_reset_by_host);
	tcp_abort_host(e, i);
	tcp_park_drop(e, i);
	e->priv[i].work = 0;
	eg_work(e, i, W_RST);
}

int tcp_close_flow(struct egress *e, uint32_t i)
{
	if (get_state(eg_flow(e, i)) == RN_FL_TIME_WAIT) {
		tcp_gone(e, i); /* over on both sides already */
		return 0;
	}
	if (get_state(eg_flow(e, i)) == RN_FL_CONNECTING) {
		e->pending--; /* the guest's SYN gets an RST */
		set_state(eg_flow(e, i), RN_FL_SYN_RCVD);
	}
	if (e->priv[i].work & (W_RST | W_FAIL))
		return -ENOENT;
	tcp_take_back(e, i);
	eg_count(e, i, RN_C_tcp_closed_by_control);
	tcp_abort_host(e, i);
	tcp_park_drop(e, i);
	e->priv[i].work = 0;
	eg_work(e, i, W_RST);
	return 0;
}

/* We give up on the guest. */
static void give_up(struct egress *e, uint32_t i)
{
	eg_count(e, i, RN_C_tcp_timed_out);
	tcp_abort_host(e, i);
	tcp_park_drop(e, i);
	e->priv[i].work = 0;
	eg_work(e, i, W_RST);
}

void tcp_maybe_closed(struct egress *e, uint32_t i)
{
	struct rn_flow *f = eg_flow(e, i);
	struct flow_priv *p = &e->priv[i];

	if (!(f->up.fin & RN_FIN_SENT) || !(f->down.fin & RN_FIN_ACKED) || get_state(f) == RN_FL_TIME_WAIT)
		return; /* a flow with a FIN is not lent: both halves are ours */
	eg_count(e, i, RN_C_tcp_closed);
	eg_close_fd(e, i); /* all was read and acknowledged, all was written: a plain close */
	if (!(p->flags & F_WE_FIRST) && !(p->work & W_ACK)) {
		tcp_gone(e, i); /* LAST-ACK is over; TIME-WAIT is the guest's */
		return;
	}
	set_state(f, RN_FL_TIME_WAIT);
	p->rto_at = UINT64_MAX;
	p->life_at = e->s->now + TCP_TIME_WAIT_NS;
	p->work &= W_ACK;
	eg_lru_touch(e, i);
	tcp_set_timer(e, i);
}

/* Number of a segment without data: the highest sent, also after going back, so that a guest that has it all takes the
 * segment; but not outside a window that the guest took back, where it would refuse it (RFC 9293 3.10.7.4, first). */
static uint32_t ack_seq(struct rn_flow *f)
{
	uint32_t edge = f->down.snd_una + f->down.snd_wnd;

	return get_state(f) == RN_FL_ESTABLISHED && SEQ_LT(edge, f->down.snd_max) ? edge : f->down.snd_max;
}

int tcp_work(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	int more = 0;

	if (p->work & W_FAIL) {
		if (tcp_send_failure(e, i))
			return -1;
		tcp_gone(e, i);
		return 0;
	}
	if (p->work & W_RST) {
		int early = get_state(f) == RN_FL_SYN_SENT;
		struct rn_buf *b;

		if (early && !(p->flags & F_SYN_OUT)) { /* it never heard of it */
			tcp_gone(e, i);
			return 0;
		}
		b = eg_out_buf(e, RN_SMALL);
		if (!b)
			return -1;
		e->s->c[RN_C_tcp_rst_sent]++;
		/* At the highest sequence number sent: what the guest expects next if nothing was lost, so that it takes the
		 * RST at once (RFC 5961 3.2); if something was, its challenge ACK is answered by tcp_reply_rst(). */
		tcp_emit(e, f, b, f->down.snd_max, f->up.rcv_nxt, early ? RN_TH_RST : RN_TH_RST | RN_TH_ACK, 0, NULL, 0, 0,
			 f->down.mss);
		tcp_gone(e, i);
		return 0;
	}
	if (p->fast) /* what is to be done here is done with halves of our own */
		tcp_take_up(e, i);
	if (RN_UNLIKELY(p->work & W_RST))
		return 1;
	if (p->work & W_SYN) {
		if (get_state(f) == RN_FL_SYN_SENT && tcp_send_syn(e, i))
			return -1;
		p->work &= ~(uint32_t)W_SYN;
	}
	if (p->work & W_SYNACK) {
		if (tcp_send_synack(e, i))
			return -1;
		p->work &= ~(uint32_t)W_SYNACK;
	}
	if (p->work & W_UP) {
		p->work &= ~(uint32_t)W_UP;
		if (tcp_up_flush(e, i))
			return 1; /* W_RST waits */
		/* The window opened without a segment to answer: tell the guest (I3). */
		if (p->fd >= 0 && !(f->up.fin & RN_FIN_SEEN) && tcp_update_window(e, i))
			p->work |= W_ACK;
		tcp_maybe_closed(e, i);
		if (get_state(f) == RN_FL_FREE)
			return 0;
	}
	if (p->work & W_REXMIT) {
		int r = 0;

		for (uint32_t k = 0; p->fd >= 0 && k < TCP_PUMP; k++)
			if ((r = tcp_retransmit(e, i)) <= 0)
				break;
		if (r < 0)
			return -1;
		if (p->work & W_RST)
			return 1;
		if (r)
			more = 1;
		else
			p->work &= ~(uint32_t)W_REXMIT;
	}
	if (p->work & W_DOWN) {
		int r = p->fd >= 0 && get_state(f) == RN_FL_ESTABLISHED ? tcp_down_pump(e, i) : 0;

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
		if (tcp_send_ack(e, i, f->down.snd_una - 1))
			return -1;
		eg_count(e, i, RN_C_tcp_zero_window_probes);
		p->work &= ~(uint32_t)W_PROBE;
	}
	if (p->work & W_ACK) {
		if (tcp_send_ack(e, i, ack_seq(f)))
			return -1;
		p->work &= ~(uint32_t)W_ACK;
		if (get_state(f) == RN_FL_TIME_WAIT && !(p->flags & F_WE_FIRST)) {
			tcp_gone(e, i);
			return 0;
		}
	}
	if (p->work & W_BARRIER) {
		/* All that came before it was handed to the host or parked: guest_tx may read on. */
		p->work &= ~(uint32_t)W_BARRIER;
		promote_notice(e, i, RN_FN_BARRIER_OVER, 1, f->gen);
	}
	tcp_promote(e, i);
	if (p->fast & FP_DOWN)
		more = 0;
	return more;
}

/* --- host events --- */

void tcp_event(struct egress *e, uint32_t i, uint32_t events)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);

	if (p->fd < 0)
		return;
	if (p->fast & FP_DOWN) {
		/* Room for what is parked, which is up's, and ours while it is; or the socket's end. */
		if (events & (EPOLLERR | EPOLLHUP | EPOLLRDHUP | EPOLLPRI | EPOLLIN))
			tcp_take_back(e, i);
		if (p->work & W_RST)
			return;
	}
	if (get_state(f) == RN_FL_SYN_SENT) {
		tcp_in_event(e, i, events);
		return;
	}
	if (get_state(f) == RN_FL_CONNECTING) {
		int err = 0, via = proxy_tcp_pending(e, i);
		socklen_t l = sizeof(err);

		if (!via && !(events & (EPOLLOUT | EPOLLERR | EPOLLHUP)))
			return;
		if (getsockopt(p->fd, SOL_SOCKET, SO_ERROR, &err, &l) < 0)
			err = errno;
		if (via) {
			int r = proxy_tcp_step(e, i, err);

			if (r > 0)
				return;
			err = -r;
			events |= EPOLLIN; /* what followed the proxy's answer is no new edge */
		}
		tcp_connect_done(e, i, err);
		if (err)
			return;
	}
	if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		p->flags |= F_HUP;
	if (events & EPOLLPRI)
		p->flags |= F_URG;
	if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
		p->flags |= F_READABLE;
		eg_work(e, i, W_DOWN);
	}
	/* A reset host socket has nothing to peek at any more when its end was seen before: ask it. */
	if ((events & EPOLLERR) && (p->flags & F_EOF)) {
		int err = 0;
		socklen_t l = sizeof(err);

		if (getsockopt(p->fd, SOL_SOCKET, SO_ERROR, &err, &l) == 0 && err) {
			tcp_host_reset(e, i);
			return;
		}
	}
	if ((events & EPOLLOUT) && (p->flags & F_BLOCKED))
		eg_work(e, i, W_UP);
}

/* --- timers --- */

/* In fast recovery with SACK the timer waits for a round, not for the timeout: twice the round-trip time, doubled each
 * round that brought nothing, never later than the timeout. Without ranges it stays what it is. */
static void recovery_timer(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct tcp_flow *x = &e->tcp->flow[i];
	uint64_t wait = 2ull * eg_flow(e, i)->down.srtt_us, rto = tcp_rto_after(e, i);

	if (x->nsacked && (p->flags & F_RECOVER)) {
		if (wait < TCP_ROUND_MIN_US)
			wait = TCP_ROUND_MIN_US;
		p->rto_at = e->s->now + us(wait << x->rounds);
		if (p->rto_at > rto || x->rounds >= TCP_ROUNDS)
			p->rto_at = rto;
	}
	tcp_set_timer(e, i);
}

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
			tcp_gone(e, i);
			return;
		}
		if (st == RN_FL_ESTABLISHED) { /* keepalive: is the guest still there? (RFC 9293 3.8.4) */
			uint64_t idle = e->s->now - RN_LOOK(f->last_ns); /* of a promoted flow too */

			if (idle < TCP_KEEPALIVE_NS && !p->probes) {
				p->life_at = f->last_ns + TCP_KEEPALIVE_NS;
			} else if (tcp_take_back(e, i), p->probes++ >= TCP_KEEPALIVE_PROBES) {
				give_up(e, i);
				return;
			} else {
				p->life_at = e->s->now + TCP_KEEPALIVE_INTERVAL_NS;
				eg_work(e, i, W_PROBE);
			}
		} else if (st == RN_FL_CONNECTING && proxy_tcp_pending(e, i)) {
			proxy_tcp_late(e, i);
			tcp_connect_done(e, i, ETIMEDOUT);
			return;
		} else {
			p->life_at = UINT64_MAX;
		}
	}
	if (p->rto_at > e->s->now) {
		tcp_set_timer(e, i);
		return;
	}
	p->rto_at = UINT64_MAX;
	if (st == RN_FL_ESTABLISHED && (p->flags & F_RECOVER) && e->tcp->flow[i].nsacked && f->down.snd_wnd &&
	    e->tcp->flow[i].rounds < TCP_ROUNDS) {
		e->tcp->flow[i].rounds++;
		tcp_sack_round(e, i);
		recovery_timer(e, i);
		return;
	}
	if (st == RN_FL_SYN_SENT) {
		tcp_in_timer(e, i); /* may drop it */
		return;
	}
	if (st == RN_FL_SYN_RCVD) {
		if (p->backoff++ >= TCP_SYN_RETRIES) {
			give_up(e, i);
			return;
		}
		eg_work(e, i, W_SYNACK);
	} else if (st == RN_FL_ESTABLISHED && flight) {
		/* A guest that answers probes of a closed window is waited for without end (RFC 9293 3.8.6.1). */
		int answers = f->down.snd_wnd == 0 && e->s->now - f->last_ns < us(2ull * TCP_RTO_MAX_US);

		if (p->backoff >= TCP_RETRIES && !answers) {
			give_up(e, i);
			return;
		}
		if (p->backoff < TCP_RETRIES)
			p->backoff++;
		/* RFC 6298 5.4-5.6, RFC 5681 3.1: back to snd_una, one segment, twice the time. */
		eg_count(e, i, RN_C_tcp_rto);
		f->down.snd_nxt = f->down.snd_una;
		p->recover = f->down.snd_max;
		p->flags = (p->flags | F_SLOW | F_READABLE) & ~(uint32_t)(F_RECOVER | F_TIMED);
		e->tcp->flow[i].cwnd = f->down.mss;
		e->tcp->flow[i].nsacked = 0; /* RFC 2018 8 */
		p->dupacks = 0;
		p->rto_at = tcp_rto_after(e, i);
		if (f->down.snd_wnd == 0)
			eg_work(e, i, W_PROBE); /* the window closed over what is in flight */
		else
			eg_work(e, i, W_DOWN);
	} else if (st == RN_FL_ESTABLISHED && f->down.snd_wnd == 0 && (p->flags & F_READABLE)) {
		if (p->backoff < TCP_BACKOFF_MAX)
			p->backoff++;
		p->rto_at = tcp_rto_after(e, i);
		eg_work(e, i, W_PROBE);
	}
	tcp_set_timer(e, i);
}

/* --- segments from the guest --- */

/**
 * tcp_new_ack() - The guest acknowledged up to sg->ack
 * Return: 0, or -1: the host side broke, the flow is on its way out.
 */
int tcp_new_ack(struct egress *e, uint32_t i, uint32_t ack)
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
		int r = tcp_discard(e, i, bytes);

		if (r) {
			tcp_host_reset(e, i);
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
		tcp_rtt_sample(f, e->s->now - p->rtt_ns);
	}
	p->backoff = 0;
	p->dupacks = 0;
	x->rounds = 0;
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
	p->rto_at = f->down.snd_max == ack ? UINT64_MAX : tcp_rto_after(e, i);
	if (p->rto_at < p->deadline)
		tcp_set_timer(e, i);
	if ((p->flags & (F_READABLE | F_EOF)) || SEQ_LT(f->down.snd_nxt, f->down.snd_max))
		eg_work(e, i, W_DOWN);
	return 0;
}

/* An ACK that lets the guest show that a segment was its own (RFC 5961 3.2, 4.2, 5.2). Limited (RFC 5961 7) so that two
 * stacks that disagree do not answer each other without end; by flow, as a limit that all share tells a stranger who else
 * is being challenged. */
static void challenge(struct egress *e, uint32_t i)
{
	struct tcp_flow *x = &e->tcp->flow[i];

	if (!x->challenges || e->s->now - x->challenge_ns >= TCP_CHALLENGE_NS) {
		x->challenge_ns = e->s->now;
		x->challenges = 0;
	}
	if (x->challenges >= TCP_CHALLENGES) {
		e->s->c[RN_C_tcp_challenges_limited]++;
		return;
	}
	x->challenges++;
	e->s->c[RN_C_tcp_challenge_acks]++;
	eg_work(e, i, W_ACK);
}

/* A segment behind a hole is answered with an ACK of its own, at once (RFC 5681 4.2): the guest counts them, and resends
 * at the third. What came in order before it is handed on first, so that the number is the one it repeats. With SACK, what
 * follows the third and only makes a block longer is told by one ACK a turn (Linux waits for more, too): at a high rate
 * each ACK costs the guest as much as the segment did. A new block always has its own, as one ACK does not hold many. If
 * there is no room the ACK waits. Return: 0, or -1 if the host side broke. */
static int early_ack(struct egress *e, uint32_t i, int fresh)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	struct tcp_flow *x = &e->tcp->flow[i];

	if (p->work & W_UP) {
		p->work &= ~(uint32_t)W_UP;
		if (tcp_up_flush(e, i))
			return -1;
	}
	if (!(f->up.fin & RN_FIN_SEEN))
		tcp_update_window(e, i);
	if (x->dup_nxt != f->up.rcv_nxt) {
		x->dup_nxt = f->up.rcv_nxt;
		x->ndup = 0;
	}
	if (((p->flags & F_SACK) && x->ndup == TCP_DUPACKS && !fresh) || tcp_send_ack(e, i, ack_seq(f))) {
		eg_work(e, i, W_ACK);
		return 0;
	}
	if (x->ndup < TCP_DUPACKS)
		x->ndup++;
	p->work &= ~(uint32_t)W_ACK;
	return 0;
}

/* Guest's RST in the window (RFC 5961 3.2). Return 1: the flow is gone. */
static int got_rst(struct egress *e, uint32_t i, const struct seg *sg)
{
	struct rn_flow *f = eg_flow(e, i);

	if (sg->seq == f->up.rcv_nxt) {
		eg_count(e, i, RN_C_tcp_reset_by_guest);
		tcp_abort_host(e, i);
		tcp_gone(e, i);
		return 1;
	}
	if (SEQ_GT(sg->seq, f->up.rcv_nxt) && SEQ_LT(sg->seq, f->up.rcv_adv))
		challenge(e, i);
	return 0;
}

/* Fifth, ACK, of RFC 9293 3.10.7.4, and what RFC 5681, 6582 and 6675 make of it. @old: all its sequence numbers were here
 * before. 0, or -1: the segment ends here. */
static int ack_part(struct egress *e, uint32_t i, const struct eg_frame *fr, const struct seg *sg, int old)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	uint32_t held = 0; /* bytes the guest holds out of order */
	int fin = !!(sg->flags & RN_TH_FIN), dup = 0;

	if (SEQ_GT(sg->ack, f->down.snd_max) || SEQ_LT(sg->ack, f->down.snd_una - e->tcp->flow[i].wnd_max)) {
		eg_count(e, i, RN_C_drop_tcp_bad_ack);
		challenge(e, i);
		return -1;
	}
	uint32_t scaled = sg->wnd << f->down.wscale;
	struct tcp_flow *x = &e->tcp->flow[i];
	int news = SEQ_GT(sg->ack, f->down.snd_una);

	if (news) {
		if (tcp_new_ack(e, i, sg->ack))
			return -1;
	} else if (sg->ack == f->down.snd_una && f->down.snd_max != f->down.snd_una && !sg->len && !fin &&
		   scaled == f->down.snd_wnd && !old) {
		/* Duplicate ACK (RFC 5681 2). */
		if (p->dupacks < 255)
			p->dupacks++;
		dup = 1;
	}
	if (f->down.snd_max == f->down.snd_una)
		x->nsacked = 0;
	else if (p->flags & F_SACK)
		held = tcp_sack_input(e, i, fr->l4, fr->l4_hlen);
	if (!(p->flags & (F_RECOVER | F_SLOW)) &&
	    ((dup && p->dupacks == TCP_DUPACKS) || held > 2u * f->down.mss)) { /* RFC 5681 3.2; RFC 6675 5 */
		eg_count(e, i, RN_C_tcp_fast_retransmit);
		p->flags |= F_RECOVER;
		p->recover = f->down.snd_max;
		x->rounds = 0;
		tcp_sack_round(e, i);
		recovery_timer(e, i);
	} else if ((p->flags & F_RECOVER) && x->nsacked) {
		if (SEQ_GT(x->sack_high, x->round_end) && SEQ_LT(f->down.snd_una, x->rxt_nxt))
			tcp_sack_round(e, i); /* what was sent later is there, what was resent is not */
		else
			eg_work(e, i, W_REXMIT); /* holes it tells for the first time */
		if (news)
			recovery_timer(e, i);
	}
	/* RFC 9293 3.10.7.4, and a new ACK always: the window counts from it, and the old one would reach too far. */
	if (SEQ_LE(f->down.snd_una, sg->ack) &&
	    (news || SEQ_LT(f->down.snd_wl1, sg->seq) || (f->down.snd_wl1 == sg->seq && SEQ_LE(f->down.snd_wl2, sg->ack)))) {
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
	return 0;
}

/* A segment of a connection in a synchronized state: RFC 9293 3.10.7.4 in its order. */
static void segment(struct egress *e, uint32_t i, struct eg_frame *fr, struct seg *sg)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	uint32_t fin = !!(sg->flags & RN_TH_FIN), end = sg->seq + sg->len + fin, wnd;
	int old, beyond, keep_data = 1;

	tcp_take_up(e, i);
	if (p->work & W_RST)
		return;
	if ((p->fast & FP_DOWN) && !tcp_pass_ack(e, i, sg, fr->l4_hlen)) {
		tcp_take_down(e, i);
		if (p->work & W_RST)
			return;
	}
	wnd = rcv_wnd(f);
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
		challenge(e, i);
		return;
	}
	if (!(sg->flags & RN_TH_ACK))
		return;
	if (old) {
		/* Nothing new in it (a keepalive probe, a resent segment whose ACK was lost): answer, and look at the ACK. */
		e->s->c[RN_C_tcp_duplicate_segments]++;
		e->tcp->flow[i].dup = (struct tcp_range){ sg->seq, sg->seq + sg->len };
		eg_work(e, i, W_ACK);
		keep_data = 0;
	} else if (beyond) {
		eg_count(e, i, RN_C_drop_tcp_outside_window);
		eg_work(e, i, W_ACK);
		/* RFC 9293 3.10.7.4: with a closed window ACKs of a segment at the edge are still taken. */
		if (sg->seq != f->up.rcv_nxt)
			return;
		keep_data = 0;
	}
	p->probes = 0;

	/* Fifth, ACK; guest_rx reads it while down is its own. */
	if (!(p->fast & FP_DOWN) && ack_part(e, i, fr, sg, old))
		return;

	/* Seventh, the text; eighth, FIN. */
	if (keep_data && (sg->len || fin)) {
		uint32_t seq = sg->seq, len = sg->len;
		const uint8_t *data = sg->data;
		int early = 0; /* behind a hole, and ACKed */

		if (f->up.fin & RN_FIN_SEEN) {
			eg_work(e, i, W_ACK); /* text behind its own FIN: RFC 9293 says it does not occur */
			tcp_maybe_closed(e, i);
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
			int taken;

			early = SEQ_GT(seq, tcp_up_edge(e, i));
			f->up.packets++;
			taken = tcp_park(e, i, fr, seq, data, len);
			if (!taken || (SEQ_GT(seq, f->up.rcv_nxt) && (p->flags & F_BLOCKED)))
				eg_work(e, i, W_ACK); /* refused, or here but not taken yet */
			else if (!early && !(p->flags & F_BLOCKED))
				eg_work(e, i, W_UP);
			if (early && early_ack(e, i, taken == 2))
				return;
		}
		if ((fin || (p->flags & F_FIN_IN)) && !early)
			eg_work(e, i, p->flags & F_BLOCKED ? W_ACK : W_UP | W_ACK);
	}
	tcp_maybe_closed(e, i);
}

/* A guest may change its MAC address, but nothing vouches for a frame's: no checksum we verify covers it. One damaged
 * ACK must not send all we have to nobody, when the guest has nothing more to say; two in a row with one address do. A
 * super-frame is as good as two: the link made it of segments that agree (rn_gro.c), or no wire was in between.
 * Who else writes frames of this flow does so with a half claimed, and reads the address then: both are taken first. */
static void hear_mac(struct egress *e, uint32_t i, const struct eg_frame *fr)
{
	const uint8_t *src = fr->eth + 6;
	struct tcp_flow *x = &e->tcp->flow[i];
	struct rn_flow *f = eg_flow(e, i);
	uint32_t fast = RN_LOOK(f->up.fast);

	if (RN_UNLIKELY(memcmp(f->guest_mac, src, 6))) {
		struct rn_vnet_hdr vnet;

		memcpy(&vnet, fr->eth - RN_VNET_HLEN, sizeof(vnet)); /* in front of every frame in the arena */
		if ((!memcmp(x->mac_heard, src, 6) && x->mac_fast == fast) || vnet.gso_type != RN_VNET_GSO_NONE) {
			tcp_take_back(e, i);
			memcpy(f->guest_mac, src, 6);
		}
	}
	memcpy(x->mac_heard, src, 6);
	x->mac_fast = fast;
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
			eg_count_of(e, RN_C_drop_tcp_no_flow, RN_IPPROTO_TCP, guest, gport, peer, pport);
			tcp_reply_rst(e, fr, &sg);
			return;
		}
		tcp_open(e, fr, &sg, guest, gport, peer, pport);
		return;
	}
	f = eg_flow(e, i);
	f->last_ns = e->s->now;
	if (e->priv[i].work & (W_RST | W_FAIL))
		return; /* on its way out: the answer is queued */
	switch (get_state(f)) {
	case RN_FL_SYN_SENT:
		tcp_in_segment(e, i, fr, &sg);
		return;
	case RN_FL_CONNECTING:
	case RN_FL_SYN_RCVD:
		if (sg.flags & RN_TH_RST) {
			if (sg.seq == f->up.rcv_nxt) { /* RFC 5961 3.2 */
				eg_count(e, i, RN_C_tcp_reset_by_guest);
				tcp_abort_host(e, i);
				tcp_gone(e, i);
			} else if (SEQ_GT(sg.seq, f->up.rcv_nxt) && SEQ_LT(sg.seq, f->up.rcv_adv)) {
				challenge(e, i); /* no window before our SYN-ACK, so none in CONNECTING */
			}
			return;
		}
		if (sg.flags & RN_TH_SYN) {
			if (sg.seq == f->up.irs) { /* the same SYN again */
				memcpy(f->guest_mac, fr->eth + 6, 6); /* perhaps because our answers went astray */
				if (get_state(f) == RN_FL_SYN_RCVD)
					eg_work(e, i, W_SYNACK);
				return;
			}
			/* The guest gave that one up and starts anew on the same ports. */
			tcp_abort_host(e, i);
			tcp_gone(e, i);
			i = EG_NONE;
			goto fresh;
		}
		if (!(sg.flags & RN_TH_ACK))
			return;
		if (get_state(f) == RN_FL_CONNECTING || sg.ack != f->down.iss + 1) {
			tcp_reply_rst(e, fr, &sg); /* RFC 9293 3.10.7.4, SYN-RECEIVED: not an acceptable ACK */
			return;
		}
		if (SEQ_LT(sg.seq + sg.len, f->up.rcv_nxt) || SEQ_GT(sg.seq, f->up.rcv_adv)) {
			eg_count(e, i, RN_C_drop_tcp_outside_window);
			eg_work(e, i, W_ACK); /* RFC 9293 3.10.7.4, first: not acceptable */
			return;
		}
		hear_mac(e, i, fr);
		set_state(f, RN_FL_ESTABLISHED);
		e->s->c[RN_C_tcp_established]++;
		f->down.snd_una = sg.ack;
		f->down.snd_wnd = sg.wnd << f->down.wscale;
		f->down.snd_wl1 = sg.seq;
		f->down.snd_wl2 = sg.ack;
		e->tcp->flow[i].wnd_max = f->down.snd_wnd;
		if (!e->priv[i].backoff)
			tcp_rtt_sample(f, e->s->now - e->priv[i].rtt_ns);
		else
			f->down.rto_us = TCP_RTO_SYN_LOST_US;
		e->priv[i].backoff = 0;
		e->priv[i].work &= ~(uint32_t)W_SYNACK;
		e->priv[i].rto_at = UINT64_MAX;
		e->priv[i].life_at = e->s->now + TCP_KEEPALIVE_NS;
		tcp_set_timer(e, i);
		eg_work(e, i, W_DOWN);
		segment(e, i, fr, &sg); /* it may carry data or FIN (ARCBOX fault 22) */
		return;
	case RN_FL_TIME_WAIT:
		if ((sg.flags & (RN_TH_SYN | RN_TH_ACK | RN_TH_RST)) == RN_TH_SYN && SEQ_GT(sg.seq, f->up.rcv_nxt)) {
			tcp_gone(e, i); /* a new connection may reuse the pair (RFC 9293 3.6.1, RFC 6191) */
			i = EG_NONE;
			goto fresh;
		}
		if (sg.flags & RN_TH_RST) {
			/* RFC 1337 3: none ends it, but one at the number of the ACK that answered a SYN: a guest whose ISN
			 * clock was outrun by what it sent before would be kept out of the pair for a minute. */
			if ((e->priv[i].flags & F_SYN_OLD) && sg.seq == f->up.rcv_nxt)
				tcp_gone(e, i);
			return;
		}
		if (sg.len || (sg.flags & (RN_TH_FIN | RN_TH_SYN))) {
			if (sg.flags & RN_TH_SYN)
				e->priv[i].flags |= F_SYN_OLD;
			eg_work(e, i, W_ACK);
			if (sg.flags & RN_TH_FIN) { /* its ACK was lost: wait anew (RFC 9293 3.10.7.4, eighth) */
				e->priv[i].life_at = e->s->now + TCP_TIME_WAIT_NS;
				tcp_set_timer(e, i);
			}
		}
		return;
	case RN_FL_ESTABLISHED:
		hear_mac(e, i, fr);
		if (!(e->priv[i].work & W_RST)) /* halves were taken back for it, and the host side found broken */
			segment(e, i, fr, &sg);
		return;
	}
}

/* A cut connection must not look like a whole one to either side. If there is no room the guest hears of it with the next
 * segment it sends. */
static void cut_short(struct egress *e, struct rn_flow *f)
{
	uint8_t st = get_state(f), flags = st == RN_FL_SYN_SENT ? RN_TH_RST : RN_TH_RST | RN_TH_ACK;
	struct rn_buf *b;

	if (st != RN_FL_ESTABLISHED && st != RN_FL_SYN_RCVD && st != RN_FL_SYN_SENT)
		return;
	b = eg_out_buf(e, RN_SMALL);
	if (b)
		tcp_emit(e, f, b, f->down.snd_max, f->up.rcv_nxt, flags, 0, NULL, 0, 0, f->down.mss ? f->down.mss : 536);
}

void tcp_end_all(struct egress *e)
{
	for (uint32_t i = 0; i < e->fresh; i++) {
		if (e->priv[i].proto != RN_IPPROTO_TCP)
			continue;
		tcp_take_back(e, i);
		cut_short(e, eg_flow(e, i));
		tcp_abort_host(e, i);
		tcp_gone(e, i);
	}
}

void tcp_end_strangers(struct egress *e)
{
	const _Atomic uint32_t *stop = e->s->cell ? &e->s->cell->stop : NULL;

	for (uint32_t i = 0; i < e->nflows; i++) {
		struct rn_flow *f = eg_flow(e, i);

		if (e->priv[i].proto || f->proto != RN_IPPROTO_TCP || get_state(f) == RN_FL_FREE)
			continue;
		rn_half_seize(&f->up.owner, rn_owner(e->s->row), stop); /* from guest_tx, guest_rx: they stop here */
		rn_half_seize(&f->down.owner, rn_owner(e->s->row), stop);
		cut_short(e, f);
	}
}

/* The successor has its copy of all. */
static void free_copies(struct egress *e)
{
	for (uint32_t i = 0; i < e->fresh; i++) {
		if (e->priv[i].proto != RN_IPPROTO_TCP)
			continue;
		for (const struct eg_parked *n = e->priv[i].parked; n; n = n->next)
			free(n->own);
		free(e->tcp->flow[i].sacked);
	}
}

void tcp_fini(struct egress *e)
{
	struct tcp_state *t = e->tcp;

	if (!t)
		return;
	if (e->left)
		free_copies(e);
	else if (t->flow && t->nodes)
		tcp_end_all(e);
	if (t->spare)
		rn_buf_free(&e->s->pool, t->spare);
	free(t->flow);
	free(t->nodes);
	free(t->scratch);
	free(t);
	e->tcp = NULL;
}
