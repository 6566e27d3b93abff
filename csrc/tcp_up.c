/* tcp_up.c - guest to host: segments in order to send(), early ones and what the host did not take parked. */
#include "tcp_internal.h"

#include <errno.h>
#include <linux/sockios.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

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

void tcp_park_drop(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	while (p->parked) {
		struct eg_parked *n = p->parked;

		p->parked = n->next;
		node_free(e, p, eg_flow(e, i), n);
	}
}

/* End of what can go to send() without a hole: rcv_nxt, or behind it as far as parked segments touch. */
uint32_t tcp_up_edge(struct egress *e, uint32_t i)
{
	uint32_t nxt = eg_flow(e, i)->up.rcv_nxt, edge = e->tcp->flow[i].edge;

	return SEQ_GT(edge, nxt) ? edge : nxt;
}

/* @n was put in its place: does it, or what lies behind it now, move the edge? */
static void edge_moves(struct egress *e, uint32_t i, const struct eg_parked *n)
{
	uint32_t edge = tcp_up_edge(e, i);

	for (; n && SEQ_LE(n->seq, edge); n = n->next)
		if (SEQ_GT(n->seq + n->len, edge))
			edge = n->seq + n->len;
	e->tcp->flow[i].edge = edge;
}

/**
 * tcp_park_rest() - End of a flush
 *
 * What is left waits for longer than this turn, so it moves out of the arena. What finds no place is dropped: it was not
 * acknowledged, the guest sends it again.
 */
void tcp_park_rest(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct tcp_state *t = e->tcp;
	struct eg_parked **at = &p->parked;

	while (*at) {
		struct eg_parked *n = *at;

		if (n->buf) {
			if (node_own(t, n, TCP_PARK_MAX)) {
				*at = n->next;
				if (SEQ_LT(n->seq, t->flow[i].edge))
					t->flow[i].edge = n->seq; /* a hole again */
				node_free(e, p, eg_flow(e, i), n);
				eg_count(e, i, RN_C_drop_tcp_park_full);
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
 * tcp_park() - Put a segment into the flow's list, by sequence number
 * In-order data of a flow that is not blocked stays in its frame until tcp_up_flush() in this turn; what has to wait is
 * copied. Overlaps are cut when the list is flushed, whole duplicates are refused here.
 * Return: 1 taken (fr->kept tells whether the frame is ours now), 2 also, and nothing it touches was here, 0 not taken.
 */
int tcp_park(struct egress *e, uint32_t i, struct eg_frame *fr, uint32_t seq, const uint8_t *data, uint32_t len)
{
	struct flow_priv *p = &e->priv[i];
	struct tcp_state *t = e->tcp;
	struct rn_flow *f = eg_flow(e, i);
	struct eg_parked **at = &p->parked, *n, *before = NULL;
	int early = SEQ_GT(seq, tcp_up_edge(e, i)), wait = early || (p->flags & F_BLOCKED);

	for (; *at && SEQ_LT((*at)->seq, seq); at = &before->next)
		before = *at;
	if (*at && (*at)->seq == seq && (*at)->len >= len) {
		e->s->c[RN_C_tcp_duplicate_segments]++;
		t->flow[i].dup = (struct tcp_range){ seq, seq + len };
		return 0;
	}
	n = t->free_nodes;
	if (!n || (wait && t->nfree <= TCP_NODES_RESERVE)) {
		eg_count(e, i, RN_C_drop_tcp_park_full);
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
		eg_count(e, i, RN_C_drop_tcp_park_full);
		return 0;
	} else {
		e->s->c[RN_C_tcp_parked]++;
	}
	*at = n;
	f->up.parked += len;
	p->nparked++;
	if (!early) {
		edge_moves(e, i, n);
		return 1;
	}
	t->flow[i].sack_last = seq;
	return (before && SEQ_GE(before->seq + before->len, seq)) || (n->next && SEQ_LE(n->next->seq, seq + len)) ? 1 : 2;
}

/* Will it be promoted when it has had its first segments? */
static int fresh(const struct egress *e, uint32_t i)
{
	const struct egress_promote *cfg = promote_config(e);
	const struct flow_priv *p = &e->priv[i];

	return cfg && !p->is_unix && !(p->fast & FP_TX) && e->flows->flow[i].up.packets < 4 * cfg->after;
}

/**
 * tcp_update_window() - Move the right edge of the window we offer, if the host socket has room
 * Never back (RFC 9293 3.8.6). Not by less than a segment unless the window is small anyway: silly window
 * avoidance (RFC 9293 3.8.6.2.2). Return: 1 if it moved.
 */
int tcp_update_window(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	uint32_t limit = p->flags & F_GUEST_WS ? 65535u << TCP_WSCALE : 65535u, room, edge, crowd;
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
	room = room > (uint32_t)out ? room - (uint32_t)out : 0;
	/* A flow that is soon promoted does without, but for what the SYN-ACK offered, and two segments. Beside many others its
	 * window is no more than its share until then: a thousand that begin at once would overfill the guest's queue. */
	if (!fresh(e, i)) {
		room += e->tcp->parked < TCP_PARK_MAX / 4 ? TCP_SLACK : TCP_SLACK_LOW;
	} else {
		uint32_t share = e->used < RN_CROWD ? 65535u : RN_CROWD_OPEN / e->used;

		if (share < 2u * e->cfg.mtu)
			share = 2u * e->cfg.mtu;
		if (room < share)
			room = share;
		if (limit > share && e->used >= RN_CROWD)
			limit = share;
	}
	/* Among many senders a little at a time, as guest_tx does it by turns with those that it has. relaxed: a guess */
	crowd = atomic_load_explicit(&e->flows->crowd, memory_order_relaxed);
	if (crowd && crowd < limit)
		limit = crowd;
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
	tcp_park_drop(e, i); /* nothing behind a FIN is data */
	eg_work(e, i, W_ACK);
}

/**
 * tcp_up_flush() - Hand parked in-order bytes to the host kernel
 * Return: 0, or -1 if the host side broke (the flow is on its way out).
 */
int tcp_up_flush(struct egress *e, uint32_t i)
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
				if (p->fast & FP_DOWN)
					tcp_blocked(e, i);
				else
					eg_rewatch(e, i, TCP_EVENTS);
				break;
			}
			if (errno == EAGAIN) {
				p->flags |= F_BLOCKED;
				tcp_blocked(e, i);
				break;
			}
			tcp_host_reset(e, i);
			return -1;
		}
		f->up.rcv_nxt += (uint32_t)n; /* I1: what send() returned */
		f->up.bytes += (uint64_t)n;
		e->s->c[RN_C_tcp_up_bytes] += (uint64_t)n;
		if ((uint32_t)n < want) {
			p->flags |= F_BLOCKED;
			tcp_blocked(e, i);
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
	rn_wait_set(&f->up.wait, &f->up.wait_ns, p->flags & F_BLOCKED ? RN_WAIT_HOST : RN_WAIT_NONE, e->s->now);
	tcp_park_rest(e, i);
	check_fin(e, i);
	return 0;
}
