/* tcp_estate.c - what the TCP files have of a flow, left to a successor and taken over by it (egress_estate.c).
 *
 * Sequence numbers, windows and the round-trip time are in the flow table already, the data for the guest in the host
 * socket (I2). Here are the rest of struct tcp_flow, the ranges the guest holds, and the guest's segments that are parked.
 */
#include "inbound.h"
#include "tcp_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct kept_segment {
	uint32_t seq, len; /* then the bytes */
};

void tcp_keep(struct egress *e, uint32_t i, struct rn_estate_out *o)
{
	const struct flow_priv *p = &e->priv[i];
	const struct tcp_flow *x = &e->tcp->flow[i];

	tcp_park_rest(e, i); /* nothing lies in frames of the arena then */
	rn_estate_put(o, &p->nparked, sizeof(p->nparked));
	rn_estate_put(o, x, sizeof(*x));
	if (x->nsacked)
		rn_estate_put(o, x->sacked, x->nsacked * sizeof(*x->sacked));
	for (const struct eg_parked *n = p->parked; n; n = n->next) {
		struct kept_segment k = { .seq = n->seq, .len = n->len };

		rn_estate_put(o, &k, sizeof(k));
		rn_estate_put(o, n->data, n->len);
	}
}

/* One parked segment, behind @last (NULL: the first). 0 or -errno. */
static int adopt_segment(struct egress *e, uint32_t i, struct rn_estate_in *in, struct eg_parked **last)
{
	struct tcp_state *t = e->tcp;
	struct eg_parked *n = t->free_nodes;
	struct kept_segment k;
	const void *data;

	if (rn_estate_get(in, &k, sizeof(k)) || !k.len || k.len > RN_FRAME_MAX || (*last && SEQ_LT(k.seq, (*last)->seq)))
		return -EPROTO;
	data = rn_estate_view(in, k.len);
	if (!data || !n || t->parked + k.len > TCP_PARK_MAX)
		return -EPROTO;
	t->free_nodes = n->next;
	t->nfree--;
	*n = (struct eg_parked){ .seq = k.seq, .len = k.len };
	/* In the list first, so that whoever drops the flow finds it. */
	if (*last)
		(*last)->next = n;
	else
		e->priv[i].parked = n;
	*last = n;
	e->priv[i].nparked++;
	eg_flow(e, i)->up.parked += k.len;
	n->own = malloc(k.len);
	if (!n->own)
		return -ENOMEM;
	t->parked += k.len;
	memcpy(n->own, data, k.len);
	n->data = n->own;
	return 0;
}

int tcp_plausible(const struct egress *e, uint32_t i, const struct flow_priv *p, int has_fd)
{
	if (((p->work & W_BARRIER) && !e->fast) || p->fast_backoff > TCP_FAST_BACKOFF_MAX || p->backoff > TCP_BACKOFF_MAX)
		return 0;
	switch (atomic_load_explicit(&e->flows->flow[i].state, memory_order_relaxed)) {
	case RN_FL_TIME_WAIT:
		return !has_fd && !p->fast;
	case RN_FL_CONNECTING:
	case RN_FL_SYN_RCVD:
	case RN_FL_ESTABLISHED:
	case RN_FL_SYN_SENT:
		return has_fd || (!p->fast && (p->work & (W_RST | W_FAIL)));
	}
	return 0;
}

int tcp_adopt(struct egress *e, uint32_t i, struct rn_estate_in *in, uint64_t gap)
{
	struct flow_priv *p = &e->priv[i];
	struct tcp_flow *x = &e->tcp->flow[i], was;
	struct rn_flow *f = eg_flow(e, i);
	struct eg_parked *last = NULL;
	uint32_t parked;

	/* First what tcp_gone() relies on. */
	if (get_state(f) == RN_FL_CONNECTING)
		e->pending++;
	if (get_state(f) == RN_FL_SYN_SENT) {
		e->in->pending++;
		e->in->nasked += !!(p->flags & F_ASKED);
	}
	if (f->up.parked) /* counted anew; where it is 0 the half may be guest_tx's */
		f->up.parked = 0;

	if (rn_estate_get(in, &parked, sizeof(parked)) || rn_estate_get(in, &was, sizeof(was)) ||
	    was.nsacked > TCP_SACK_RANGES || was.rounds > TCP_ROUNDS)
		return -EPROTO;
	*x = was;
	x->sacked = NULL; /* that was the predecessor's */
	if (x->nsacked) {
		x->sacked = malloc(TCP_SACK_RANGES * sizeof(*x->sacked));
		if (!x->sacked)
			return -ENOMEM;
		if (rn_estate_get(in, x->sacked, x->nsacked * sizeof(*x->sacked)))
			return -EPROTO;
	}
	for (uint32_t k = 0; k < parked; k++) {
		int r = adopt_segment(e, i, in, &last);

		if (r)
			return r;
	}
	if (eg_later(e, &p->rto_at, gap) || eg_later(e, &p->ack_at, gap) || eg_later(e, &p->life_at, gap))
		return -EPROTO;
	p->flags &= ~(uint32_t)F_TIMED;
	return 0;
}
