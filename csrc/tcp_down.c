/* tcp_down.c - host to guest: peek at the host socket, send, discard what was acknowledged, send again. */
#include "tcp_internal.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

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

	if (p->flags & F_PEEK_OFF)
		return rn_peek_at(p->fd, &p->peeked, off, to, len);
	n = rn_peek_past(p->fd, &t->skip, off, to, len);
	if (n == 0) {
		/* Nothing behind what is in flight: more to come, or the end? With data queued the peek cannot tell. */
		struct tcp_info ti;
		socklen_t l = sizeof(ti), el = sizeof(int);
		int err = 0;

		if (!off)
			return 0;
		if (!(p->flags & F_HUP))
			return -EAGAIN;
		/* A reset closes the socket too, but with an error, which the kernel keeps to itself as long as data is queued. */
		if (getsockopt(p->fd, SOL_SOCKET, SO_ERROR, &err, &el) < 0 || err)
			return err ? -err : -errno;
		if (p->is_unix)
			return 0;
		if (getsockopt(p->fd, IPPROTO_TCP, TCP_INFO, &ti, &l) < 0)
			return -errno;
		/* The peer's FIN is in: without an error these states are entered by it and no other way (RFC 9293 3.3.2). */
		return ti.tcpi_state == TCP_CLOSE_WAIT || ti.tcpi_state == TCP_LAST_ACK || ti.tcpi_state == TCP_CLOSING ||
				       ti.tcpi_state == TCP_TIME_WAIT || ti.tcpi_state == TCP_CLOSE
			       ? 0
			       : -EAGAIN;
	}
	return n;
}

/* Take @n acknowledged bytes out of the host socket. 0 or -errno. */
int tcp_discard(struct egress *e, uint32_t i, uint32_t n)
{
	struct flow_priv *p = &e->priv[i];
	struct tcp_state *t = e->tcp;

	if (!p->is_unix)
		return rn_peek_discard(p->fd, &p->peeked, n);
	while (n) { /* Unix sockets do not know MSG_TRUNC so */
		ssize_t k = recv(p->fd, t->scratch, n < TCP_SCRATCH ? n : TCP_SCRATCH, MSG_DONTWAIT);

		if (k < 0 && errno == EINTR)
			continue;
		if (k <= 0)
			return k < 0 ? -errno : -EPIPE;
		n -= (uint32_t)k;
		p->peeked = p->peeked > (uint32_t)k ? p->peeked - (uint32_t)k : 0; /* the kernel's moves back with us */
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
		p->rto_at = tcp_rto_after(e, i);
		tcp_set_timer(e, i);
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
	tcp_emit(e, f, b, f->down.snd_nxt, f->up.rcv_nxt, RN_TH_FIN | RN_TH_ACK, tcp_window_field(p, f), NULL, 0, 0,
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
	tcp_emit(e, f, b, seq, f->up.rcv_nxt, RN_TH_ACK | ((uint32_t)n < max ? RN_TH_PSH : 0), tcp_window_field(p, f), NULL,
		     0, (uint32_t)n, f->down.mss);
	f->down.packets++;
	if (!again)
		f->down.snd_nxt = seq + (uint32_t)n;
	sent(e, i, seq + (uint32_t)n, again);
	acked_now(p);
	return n;
}

/* For whoever watches: what keeps the half from moving. */
static void waits(struct egress *e, struct rn_flow *f, enum rn_wait what)
{
	rn_wait_set(&f->down.wait, &f->down.wait_ns, what, e->s->now);
}

/**
 * tcp_down_pump() - Send what the host socket has and the guest's window takes
 * Return: as tcp_work().
 */
int tcp_down_pump(struct egress *e, uint32_t i)
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
		if (flight && max < f->down.mss && max < x->wnd_max / 2) {
			waits(e, f, f->down.snd_wnd ? RN_WAIT_ACK : RN_WAIT_WINDOW);
			return 0;
		}
		if (!max) {
			waits(e, f, RN_WAIT_WINDOW);
			if (!flight && p->rto_at == UINT64_MAX) { /* closed window: probe it (RFC 9293 3.8.6.1) */
				p->rto_at = tcp_rto_after(e, i);
				tcp_set_timer(e, i);
			}
			return 0;
		}
		if (max > frame)
			max = frame;
		if (x->nsacked && SEQ_LT(f->down.snd_nxt, f->down.snd_max)) {
			/* Gone back after a timeout: what the guest holds by now is not sent again. */
			uint32_t end, seq = tcp_sack_hole(e, i, f->down.snd_nxt, &end, 0);

			if (seq != f->down.snd_nxt) {
				f->down.snd_nxt = seq;
				continue;
			}
			if (SEQ_LT(end, f->down.snd_max) && end - seq < max)
				max = end - seq;
		}
		n = send_data(e, i, f->down.snd_nxt, max, 0);
		waits(e, f, n == -ENOBUFS ? RN_WAIT_ROOM : RN_WAIT_NONE);
		if (n == -ENOBUFS)
			return -1;
		if (n == -EAGAIN) {
			/* At an urgent mark what lies behind it shows when the guest has acknowledged up to it. */
			if (!(p->flags & F_URG) || !flight)
				p->flags &= ~(uint32_t)F_READABLE;
			return 0;
		}
		if (n < 0) {
			tcp_host_reset(e, i);
			return 0;
		}
		if (n == 0 && atomic_load_explicit(&f->acks.broke, memory_order_relaxed)) {
			tcp_host_reset(e, i); /* another stage was told, so that here it looks like the end */
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
		if ((uint32_t)n < max && !(p->flags & (F_HUP | F_URG)))
			p->flags &= ~(uint32_t)F_READABLE;
	}
	return 1;
}

/**
 * tcp_retransmit() - Fast recovery: the next missing frame again
 * Without SACK that is one segment at snd_una (RFC 5681 3.2; after a partial ACK RFC 6582 3.2). With it, each call goes
 * on to the next hole below what the guest holds (RFC 6675 4), each hole once.
 * Return: 1: there may be another hole, 0: no, -1: no room or buffer.
 */
int tcp_retransmit(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	struct tcp_flow *x = &e->tcp->flow[i];
	uint32_t seq = f->down.snd_una, end = f->down.snd_max, max;
	ssize_t n;

	if (seq == end)
		return 0;
	if (x->nsacked) {
		seq = tcp_sack_hole(e, i, SEQ_GT(x->rxt_nxt, seq) ? x->rxt_nxt : seq, &end, 1);
		if (seq == end)
			return 0;
		max = frame_payload(e, f->down.mss);
	} else {
		max = f->down.mss;
	}
	if (end - seq < max)
		max = end - seq;
	if ((p->flags & F_EOF) && seq == x->fin_out) {
		uint32_t keep = f->down.snd_nxt;
		int r;

		f->down.snd_nxt = seq;
		r = send_fin(e, i);
		f->down.snd_nxt = SEQ_GT(keep, f->down.snd_nxt) ? keep : f->down.snd_nxt;
		return r ? -1 : 0;
	}
	n = send_data(e, i, seq, max, 1);
	if (n == -ENOBUFS)
		return -1;
	if (n < 0 && n != -EAGAIN)
		tcp_host_reset(e, i);
	if (n <= 0)
		return 0;
	x->rxt_nxt = seq + (uint32_t)n;
	return x->nsacked != 0;
}
