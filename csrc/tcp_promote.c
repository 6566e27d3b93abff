/* tcp_promote.c - which TCP flows are promoted, and how egress takes a half back (rules: rn_promote.h).
 *
 * Settled is: established, nothing parked, blocked, in recovery or to be told, no FIN either way, cfg.after segments with
 * data behind it. Short flows end before that, and never pay for a promotion.
 *
 * up is lent for good once guest_tx has the socket: egress takes it when a segment of the flow comes this way, works on it,
 * and lends it again in the same turn if all is settled; that costs two atomic operations. down moves with a notice, and
 * with the events of the socket; so an ACK that is simple is passed on instead (struct rn_acks), and down is taken back
 * for what is not: duplicate ACKs, SACK, a timeout. After that it is not offered before fast_at, later each time it did not
 * last.
 */
#include "tcp_internal.h"

#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <linux/tcp.h> /* struct tcp_info with tcpi_bytes_acked; it does not go together with netinet/tcp.h */
#include <sys/ioctl.h>
#include <sys/socket.h>

#define SETTLE_NS 2000000ull /* after down was taken back: doubled up to 2^10 times while it does not last */
#define LASTS_NS 1000000000ull

/* The flow's socket: what of it this stage wants to be told. */
static void rewatch(struct egress *e, uint32_t i)
{
	const struct flow_priv *p = &e->priv[i];
	uint32_t events = TCP_EVENTS;

	if (p->fast & FP_DOWN) /* errors are always told */
		events = p->flags & F_BLOCKED ? EPOLLOUT | EPOLLET : EPOLLET;
	(void)eg_rewatch(e, i, events);
}

void tcp_blocked(struct egress *e, uint32_t i)
{
	if (e->priv[i].fast & FP_DOWN)
		rewatch(e, i); /* and looks at once */
}

enum { CLOSE_WAIT = 8, LAST_ACK = 9, TIME_WAIT = 6, CLOSING = 11 }; /* tcpi_state after the peer's FIN; linux/tcp.h has no names */

static const _Atomic uint32_t *stop_word(const struct egress *e)
{
	return e->s->cell ? &e->s->cell->stop : NULL;
}

/* Bytes the kernel took from us since the connection began, and a constant: what the peer acknowledged and what it has not
 * yet. The two are asked one after the other, so until the first stood still meanwhile. */
static int socket_sent(int fd, uint64_t *bytes)
{
	for (int tries = 0; tries < 1000; tries++) {
		struct tcp_info a, b;
		socklen_t la = sizeof(a), lb = sizeof(b);
		int out;

		if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &a, &la) || ioctl(fd, SIOCOUTQ, &out) ||
		    getsockopt(fd, IPPROTO_TCP, TCP_INFO, &b, &lb))
			return -errno;
		if (a.tcpi_bytes_acked == b.tcpi_bytes_acked) {
			*bytes = a.tcpi_bytes_acked + (uint64_t)(unsigned)out;
			return 0;
		}
	}
	return -EAGAIN;
}

/* Bytes taken out of the socket likewise: what came and what is still in it. The peer's FIN counts as a byte that came. */
static int socket_read(int fd, uint64_t *bytes)
{
	for (int tries = 0; tries < 1000; tries++) {
		struct tcp_info a, b;
		socklen_t la = sizeof(a), lb = sizeof(b);
		int in;

		if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &a, &la) || ioctl(fd, SIOCINQ, &in) ||
		    getsockopt(fd, IPPROTO_TCP, TCP_INFO, &b, &lb))
			return -errno;
		if (a.tcpi_bytes_received == b.tcpi_bytes_received && a.tcpi_state == b.tcpi_state) {
			int fin = a.tcpi_state == CLOSE_WAIT || a.tcpi_state == LAST_ACK ||
				  a.tcpi_state == CLOSING || a.tcpi_state == TIME_WAIT;

			*bytes = a.tcpi_bytes_received - (uint64_t)(unsigned)in - (uint64_t)fin;
			return 0;
		}
	}
	return -EAGAIN;
}

void tcp_take_up(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);

	if (!(p->fast & FP_LENT))
		return;
	rn_half_seize(&f->up.owner, rn_owner(e->s->row), stop_word(e));
	p->fast &= (uint8_t)~FP_LENT;
	e->s->c[RN_C_recalled_up]++;
	if (RN_UNLIKELY(f->up.torn)) {
		uint64_t sent;

		f->up.torn = 0;
		if (socket_sent(p->fd, &sent)) {
			tcp_host_reset(e, i); /* the guest's next byte is not known: better no connection than a wrong one */
			return;
		}
		eg_count(e, i, RN_C_promote_repaired);
		RN_SHOW(f->up.rcv_nxt, p->base_rcv + (uint32_t)(sent - p->base_sent));
	}
	if (f->up.rcv_nxt != RN_LOOK(f->up.acked))
		eg_work(e, i, W_ACK); /* guest_tx took it, and may not have said so yet */
	/* It offers no slack, so it may have closed the window. Of room it would be told while the half is not its own, and
	 * we look for room only while something is parked: that much is let come. */
	if (rcv_wnd(f) < 2u * e->cfg.mtu && tcp_update_window(e, i))
		eg_work(e, i, W_ACK);
}

void tcp_take_down(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	struct tcp_flow *x = &e->tcp->flow[i];
	uint64_t w;
	uint32_t ack;

	if (!(p->fast & FP_DOWN))
		return;
	rn_half_seize(&f->down.owner, rn_owner(e->s->row), stop_word(e));
	if (RN_UNLIKELY(f->down.torn)) {
		uint64_t read;

		f->down.torn = 0;
		if (socket_read(p->fd, &read)) {
			p->fast &= (uint8_t)~FP_DOWN;
			tcp_host_reset(e, i);
			return;
		}
		eg_count(e, i, RN_C_promote_repaired);
		f->down.snd_una = p->base_una + (uint32_t)(read - p->base_read);
		if (SEQ_LT(f->down.snd_nxt, f->down.snd_una))
			f->down.snd_nxt = f->down.snd_una;
		if (SEQ_LT(f->down.snd_max, f->down.snd_nxt))
			f->down.snd_max = f->down.snd_nxt;
	}
	/* After the owner word, before acks: guest_tx posts, then looks at the owner; one of us sees the other. */
	atomic_thread_fence(memory_order_seq_cst);
	w = atomic_load_explicit(&f->acks.ack_wnd, memory_order_acquire); /* K2 */
	atomic_store_explicit(&f->acks.want, RN_WANT_NOTHING, memory_order_relaxed);
	p->fast &= (uint8_t)~FP_DOWN;
	e->s->c[RN_C_recalled_down]++;
	if (e->s->now - p->fast_at > LASTS_NS)
		p->fast_backoff = 0;
	else if (p->fast_backoff < TCP_FAST_BACKOFF_MAX)
		p->fast_backoff++;
	p->fast_at = e->s->now + (SETTLE_NS << p->fast_backoff);

	p->peeked = RN_PEEK_UNKNOWN;
	p->flags = (p->flags | F_READABLE) & ~(uint32_t)F_TIMED;
	p->dupacks = p->backoff = 0;
	x->nsacked = 0;
	rewatch(e, i);
	ack = rn_acks_ack(w);
	if (SEQ_GT(ack, f->down.snd_una) && SEQ_LE(ack, f->down.snd_max) && tcp_new_ack(e, i, ack))
		return; /* on its way out */
	f->down.snd_wnd = rn_acks_wnd(w);
	f->down.snd_wl1 = f->up.rcv_nxt;
	f->down.snd_wl2 = f->down.snd_una;
	if (f->down.snd_wnd > x->wnd_max)
		x->wnd_max = f->down.snd_wnd;
	p->rto_at = f->down.snd_max == f->down.snd_una ? UINT64_MAX : tcp_rto_after(e, i);
	tcp_set_timer(e, i);
	eg_work(e, i, W_DOWN);
}

void tcp_take_back(struct egress *e, uint32_t i)
{
	tcp_take_up(e, i); /* first: its owner is who posts to acks */
	tcp_take_down(e, i);
}

int tcp_pass_ack(struct egress *e, uint32_t i, const struct seg *sg, uint32_t hlen)
{
	struct rn_flow *f = eg_flow(e, i);
	uint64_t w = atomic_load_explicit(&f->acks.ack_wnd, memory_order_relaxed);
	uint32_t wnd = sg->wnd << f->down.wscale;

	if ((sg->flags & (RN_TH_SYN | RN_TH_FIN | RN_TH_RST | RN_TH_URG)) || hlen != RN_TCP_HLEN ||
	    SEQ_GT(sg->ack, __atomic_load_n(&f->down.snd_max, __ATOMIC_ACQUIRE)))
		return 0;
	if (sg->ack == rn_acks_ack(w))
		/* Nothing new. Without data it is a duplicate; another window may be older than the one guest_tx told. */
		return sg->len && wnd == rn_acks_wnd(w);
	if (SEQ_LT(sg->ack, rn_acks_ack(w)))
		/* Its data may be news; guest_tx passed on what came behind it. Not if it is too old (RFC 5961 5.2). */
		return sg->len && !SEQ_LT(sg->ack, rn_acks_ack(w) - e->tcp->flow[i].wnd_max);
	if (rn_acks_post(&f->acks, sg->ack, wnd, e->s->now, 0) && rn_acks_wake(&f->acks))
		promote_notice(e, i, RN_FN_ACKS, 0, f->gen);
	return 1;
}

/* Settled, as far as each half goes? */
static int settled(const struct egress *e, uint32_t i)
{
	const struct flow_priv *p = &e->priv[i];
	const struct rn_flow *f = &e->flows->flow[i];

	return p->fd >= 0 && !p->is_unix && atomic_load_explicit(&f->state, memory_order_relaxed) == RN_FL_ESTABLISHED &&
	       !f->up.fin && !f->down.fin && !(p->work & ~(uint32_t)W_DOWN) &&
	       !(p->flags & (F_BLOCKED | F_FIN_IN | F_EOF | F_HUP | F_URG)) && !p->parked;
}

void tcp_promote(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	const struct egress_promote *cfg = promote_config(e);
	struct rn_pass pass;

	if (!cfg || !settled(e, i))
		return;
	if (!(p->fast & FP_TX) && f->up.packets + f->down.packets < cfg->after)
		return;
	pass = (struct rn_pass){ .index = i, .gen = f->gen, .proto = RN_IPPROTO_TCP, .peek_off = !!(p->flags & F_PEEK_OFF),
				 .window_scaled = !!(p->flags & F_GUEST_WS), .sack = !!(p->flags & F_SACK), .peer_port = f->peer_port };
	memcpy(pass.peer4, f->peer_addr + 12, 4);
	if (!p->base_sent) { /* never 0 then: the SYN counts */
		if (socket_sent(p->fd, &p->base_sent) || socket_read(p->fd, &p->base_read)) {
			p->base_sent = 0;
			return;
		}
		atomic_store_explicit(&f->acks.broke, 0, memory_order_relaxed);
		p->base_rcv = f->up.rcv_nxt;
		p->base_una = f->down.snd_una;
	}
	if (!(p->fast & FP_DOWN) && !(p->flags & (F_RECOVER | F_SLOW)) && !p->dupacks && f->down.snd_nxt == f->down.snd_max &&
	    e->s->now >= p->fast_at && f->down.snd_wnd && !p->backoff) { /* a closed window is probed here, ever more rarely */
		atomic_store_explicit(&f->acks.ack_wnd, (uint64_t)f->down.snd_una << 32 | f->down.snd_wnd, memory_order_relaxed);
		atomic_store_explicit(&f->acks.want, RN_WANT_NOTHING, memory_order_relaxed);
		if (!promote_offer(e, i, 0, &pass)) {
			p->fast |= FP_DOWN;
			p->fast_at = e->s->now;
			p->work &= ~(uint32_t)W_DOWN;
			p->rto_at = UINT64_MAX;
			tcp_set_timer(e, i);
			rewatch(e, i);
			eg_count(e, i, RN_C_promoted_down);
			rn_half_leave(&f->down.owner, rn_owner(e->s->out_row[RN_ROLE_GUEST]));
		}
	}
	/* up goes only together with down: else each ACK of the guest would come this way and take it back. */
	if (!(p->fast & FP_DOWN) || (p->fast & FP_LENT))
		return;
	if (!(p->fast & FP_TX)) {
		if (promote_offer(e, i, 1, &pass))
			return;
		eg_count(e, i, RN_C_promoted_up);
	}
	p->fast |= FP_LENT;
	rn_half_leave(&f->up.owner, rn_owner(e->s->out_row[RN_ROLE_OFFER]));
}

void tcp_notice(struct egress *e, uint32_t i, enum rn_flow_notice n)
{
	switch (n) {
	case RN_FN_BACK:
		tcp_take_back(e, i);
		break;
	case RN_FN_BARRIER: /* answered when what came before it is done: tcp_work() */
		eg_work(e, i, W_BARRIER);
		break;
	default:
		break;
	}
}
