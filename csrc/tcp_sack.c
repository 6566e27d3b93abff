/* tcp_sack.c - selective acknowledgement (RFC 2018), both ways.
 *
 * As receiver we tell the guest which early segments are parked; nothing that was told is dropped again (no reneging:
 * the bound of parked bytes refuses segments before they are told).
 *
 * As sender we keep the ranges the guest holds, sorted and apart, and resend the holes below the highest, each once (a
 * simple form of RFC 6675's NextSeg(); there is no pipe to fill: the guest's window is the only limit). That is a
 * round. If the guest then holds something sent after the round began, and the first hole is still open, what was resent
 * is lost too: a new round (the order of sending tells, as in RFC 8985). If nothing comes at all, two round-trip times
 * begin one, TCP_ROUNDS times at most. A timeout forgets the ranges (RFC 2018 8), later ACKs tell them again.
 */
#include "rn_view.h"
#include "tcp_internal.h"

#include <stdlib.h>

/**
 * tcp_sack_option() - Blocks for an ACK
 * @opt:	at least 36 bytes
 *
 * What came once more goes first (RFC 2883 4.1: the guest learns that it sent that for nothing, and takes its slowing
 * down back). Then the block of the segment that came last, then those that were told most recently (RFC 2018 4): of data
 * that comes in order but for losses they are the next ones below. Return: bytes written, a multiple of 4; 0: none.
 */
uint32_t tcp_sack_option(struct egress *e, uint32_t i, uint8_t *opt)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	struct tcp_flow *x = &e->tcp->flow[i];
	uint32_t last = x->sack_last, edge = f->up.rcv_nxt, n = 0, first = 0, found = 0, at = 4;
	uint32_t most = TCP_SACK_BLOCKS - (x->dup.lo != x->dup.hi);
	struct tcp_range r[TCP_SACK_BLOCKS]; /* a ring of @most; the newest at n - 1 */

	if (!(p->flags & F_SACK))
		return 0;
	for (struct eg_parked *k = p->parked; k;) {
		struct tcp_range b = { k->seq, k->seq + k->len };

		for (k = k->next; k && SEQ_LE(k->seq, b.hi); k = k->next)
			if (SEQ_GT(k->seq + k->len, b.hi))
				b.hi = k->seq + k->len;
		if (SEQ_LE(b.lo, edge)) /* in order, only not taken yet: no hole before it */
			continue;
		if (found && n - first == most)
			break;
		r[n++ % most] = b;
		if (!found && n - first > most)
			first++;
		if (SEQ_LE(b.lo, last) && SEQ_LT(last, b.hi))
			found = n;
	}
	if (!found)
		found = n;
	if (most < TCP_SACK_BLOCKS) {
		rn_put32(opt + 4, x->dup.lo);
		rn_put32(opt + 8, x->dup.hi);
		x->dup.lo = x->dup.hi;
		at = 12;
	}
	for (uint32_t k = 0; k < n - first; k++, at += 8) {
		/* from found down to first, then from behind it up */
		const struct tcp_range *b = &r[(k < found - first ? found - 1 - k : first + k) % most];

		rn_put32(opt + at, b->lo);
		rn_put32(opt + at + 4, b->hi);
	}
	if (at == 4)
		return 0;
	return rn_sack_head(opt, (at - 4) / 8);
}

/* Add a range: merge with what it touches; with all places taken the last one (farthest away) goes. */
static void add_range(struct tcp_flow *x, struct tcp_range b)
{
	struct tcp_range out[TCP_SACK_RANGES + 1];
	uint32_t n = 0;
	int put = 0;

	if (!x->sacked && !(x->sacked = malloc(TCP_SACK_RANGES * sizeof(*x->sacked))))
		return; /* without them recovery is as without SACK */
	if (!x->nsacked || SEQ_GT(b.hi, x->sack_high))
		x->sack_high = b.hi;

	for (uint32_t k = 0; k < x->nsacked; k++) {
		struct tcp_range a = x->sacked[k];

		if (SEQ_LT(a.hi, b.lo)) {
			out[n++] = a;
		} else if (SEQ_LT(b.hi, a.lo)) {
			if (!put)
				out[n++] = b;
			put = 1;
			out[n++] = a;
		} else { /* they touch */
			if (SEQ_LT(a.lo, b.lo))
				b.lo = a.lo;
			if (SEQ_GT(a.hi, b.hi))
				b.hi = a.hi;
		}
	}
	if (!put)
		out[n++] = b;
	x->nsacked = (uint8_t)(n > TCP_SACK_RANGES ? TCP_SACK_RANGES : n); /* 64 fit */
	memcpy(x->sacked, out, x->nsacked * sizeof(out[0]));
}

/**
 * tcp_sack_input() - Take the blocks of an acceptable ACK, after snd_una was moved
 * Return: bytes the guest holds above snd_una.
 */
uint32_t tcp_sack_input(struct egress *e, uint32_t i, const uint8_t *th, uint32_t hlen)
{
	struct rn_flow *f = eg_flow(e, i);
	struct tcp_flow *x = &e->tcp->flow[i];
	struct rn_view v = { .data = th, .len = hlen };
	uint32_t at = RN_TCP_HLEN, una = f->down.snd_una, k, n, sum = 0;

	for (k = n = 0; k < x->nsacked; k++) { /* what snd_una has passed is no range any more */
		struct tcp_range r = x->sacked[k];

		if (SEQ_LE(r.hi, una))
			continue;
		if (SEQ_LT(r.lo, una))
			r.lo = una;
		x->sacked[n++] = r;
	}
	x->nsacked = (uint8_t)n;
	while (at < hlen) {
		const uint8_t *o = rn_view_get(&v, at, 1), *l;

		if (!o || o[0] == RN_TCPOPT_EOL)
			break;
		if (o[0] == RN_TCPOPT_NOP) {
			at++;
			continue;
		}
		l = rn_view_get(&v, at + 1, 1);
		if (!l || l[0] < 2)
			break;
		o = rn_view_get(&v, at, l[0]);
		if (!o)
			break;
		if (o[0] == RN_TCPOPT_SACK)
			for (k = 2; k + 8 <= o[1]; k += 8) {
				struct tcp_range r = { rn_get32(o + k), rn_get32(o + k + 4) };

				/* Only what is in flight: also keeps D-SACK (RFC 2883) and nonsense out. */
				if (SEQ_LT(una, r.lo) && SEQ_LT(r.lo, r.hi) && SEQ_LE(r.hi, f->down.snd_max))
					add_range(x, r);
			}
		at += o[1];
	}
	for (k = 0; k < x->nsacked; k++)
		sum += x->sacked[k].hi - x->sacked[k].lo;
	return sum;
}

/* Begin a round: every hole may be sent again. */
void tcp_sack_round(struct egress *e, uint32_t i)
{
	struct rn_flow *f = eg_flow(e, i);
	struct tcp_flow *x = &e->tcp->flow[i];

	x->rxt_nxt = f->down.snd_una;
	x->round_end = f->down.snd_max;
	eg_work(e, i, W_REXMIT);
}

/**
 * tcp_sack_hole() - First range at or behind @seq that the guest does not hold
 * @end:	written: its end, at most snd_max
 * @below:	1: only holes below the highest range the guest holds
 * Return: its start; == *end if there is none.
 */
uint32_t tcp_sack_hole(struct egress *e, uint32_t i, uint32_t seq, uint32_t *end, int below)
{
	struct tcp_flow *x = &e->tcp->flow[i];

	*end = eg_flow(e, i)->down.snd_max;
	for (uint32_t k = 0; k < x->nsacked; k++) {
		if (SEQ_LT(seq, x->sacked[k].lo)) {
			*end = x->sacked[k].lo;
			return seq;
		}
		if (SEQ_LT(seq, x->sacked[k].hi))
			seq = x->sacked[k].hi;
	}
	if (below || SEQ_GT(seq, *end))
		*end = seq;
	return seq;
}
