/* promote.c - egress's side of promotion: sockets and notices to guest_tx and guest_rx (rules: rn_promote.h).
 *
 * When a flow is offered and taken back is its protocol's business (tcp_promote.c, udp.c). Here is how it is said: the
 * socket over the socket pair, then the notice through the ring, behind the frames. A notice that finds no room waits in
 * a list, and all later ones behind it, so that their order stays; the list is bounded by what can be said of each flow.
 */
#include "egress.h"

#include <errno.h>
#include <stdlib.h>

#define HOLD_MIN_NS 100000000ull /* after a stage had no descriptor for a socket it is offered no other for so long, */
#define HOLD_MAX_NS 10000000000ull /* doubled each time that it still has none */

struct promote {
	struct egress_promote cfg;
	uint64_t hold_ns[2], held_until[2]; /* guest_rx, guest_tx */
	struct eg_said *late; /* notices for which there was no room, oldest at first */
	uint32_t first, n, cap;
};

int stage_egress_promote(struct rn_stage *s, const struct egress_promote *cfg)
{
	struct egress *e = s->priv;

	if (!s->has_out[RN_ROLE_OFFER] || !s->has_out[RN_ROLE_GUEST])
		return rn_fail(s, -EINVAL, "promotion: no rings to guest_tx and guest_rx");
	e->fast = calloc(1, sizeof(*e->fast));
	if (!e->fast)
		return rn_fail(s, -ENOMEM, "promotion: out of memory");
	e->fast->cfg = *cfg;
	if (s->generation > 1 && !e->cfg.heir)
		promote_begin(e);
	return 0;
}

void promote_begin(struct egress *e)
{
	if (!e->fast)
		return;
	promote_notice(e, 0, RN_FN_RESET, 1, 0); /* what they have is our predecessor's */
	promote_notice(e, 0, RN_FN_RESET, 0, 0);
}

void promote_keep(const struct egress *e, struct rn_estate_out *o)
{
	uint32_t n = e->fast ? e->fast->n : 0;

	rn_estate_put(o, &n, sizeof(n));
	for (uint32_t k = 0; k < n; k++)
		rn_estate_put(o, &e->fast->late[e->fast->first + k], sizeof(*e->fast->late));
}

int promote_adopt(struct egress *e, struct rn_estate_in *in)
{
	struct eg_said d;
	uint32_t n;

	if (rn_estate_get(in, &n, sizeof(n)) || (n && !e->fast))
		return -EPROTO;
	for (; n; n--) {
		if (rn_estate_get(in, &d, sizeof(d)) || d.index >= e->nflows || d.notice < RN_FN_OFFER || d.notice > RN_FN_RESET)
			return -EPROTO;
		promote_notice(e, d.index, (enum rn_flow_notice)d.notice, d.tx, d.gen);
	}
	return e->s->broken ? -ENOMEM : 0;
}

const struct egress_promote *promote_config(const struct egress *e)
{
	return e->fast ? &e->fast->cfg : NULL;
}

void promote_fini(struct egress *e)
{
	if (!e->fast)
		return;
	free(e->fast->late);
	free(e->fast);
	e->fast = NULL;
}

static int say(struct egress *e, const struct eg_said *n)
{
	return rn_stage_notice(e->s, n->tx ? RN_ROLE_OFFER : RN_ROLE_GUEST, rn_fn_flags((enum rn_flow_notice)n->notice),
			       n->index, n->gen);
}

void promote_notice(struct egress *e, uint32_t i, enum rn_flow_notice notice, int tx, uint32_t gen)
{
	struct promote *f = e->fast;
	struct eg_said n = { .index = i, .gen = gen, .notice = (uint8_t)notice, .tx = (uint8_t)!!tx };

	if (!f->n && !say(e, &n))
		return;
	if (f->first + f->n == f->cap) {
		struct eg_said *more;

		if (f->first) { /* make room in front */
			for (uint32_t k = 0; k < f->n; k++)
				f->late[k] = f->late[f->first + k];
			f->first = 0;
		}
		if (f->n == f->cap) {
			more = realloc(f->late, (f->cap * 2 + 64) * sizeof(*more));
			if (!more) {
				/* Without it a stage would keep a socket, or an offer open: neither is a state to go on from. */
				e->s->broken = 1;
				rn_fail(e->s, -ENOMEM, "promotion: out of memory");
				return;
			}
			f->late = more;
			f->cap = f->cap * 2 + 64;
		}
	}
	f->late[f->first + f->n++] = n;
}

int promote_turn(struct egress *e)
{
	struct promote *f = e->fast;
	int did = 0;

	for (; f && f->n && !say(e, &f->late[f->first]); did = 1) {
		f->first++;
		if (!--f->n)
			f->first = 0;
	}
	return did;
}

int promote_offer(struct egress *e, uint32_t i, int tx, const struct rn_pass *p)
{
	struct flow_priv *q = &e->priv[i];
	uint8_t has = tx ? FP_TX : FP_RX;

	if (!(q->fast & has)) {
		struct rn_pass mine = *p;
		int r;

		if (e->s->now < e->fast->held_until[!!tx])
			return -EBUSY;
		mine.sender = (uint16_t)e->s->generation;
		r = rn_fdpass_send(tx ? e->fast->cfg.tx_fd : e->fast->cfg.rx_fd, &mine, q->fd);
		if (r)
			return r;
		q->fast |= has;
	}
	promote_notice(e, i, RN_FN_OFFER, tx, eg_flow(e, i)->gen);
	return 0;
}

/* guest_tx or guest_rx is without the flow's socket. It is told to close it all the same: what was offered to a killed
 * process may reach its successor after this. */
static void stop_sharing(struct egress *e, uint32_t i, int tx)
{
	struct flow_priv *q = &e->priv[i];

	promote_notice(e, i, RN_FN_CLOSE, tx, eg_flow(e, i)->gen);
	if (q->proto == RN_IPPROTO_TCP) {
		tcp_take_back(e, i);
		q->fast &= (uint8_t)~(tx ? FP_TX : FP_RX);
		eg_work(e, i, 0); /* and is offered again when it is settled */
	} else {
		udp_unshare(e, i, tx);
	}
}

void promote_reset(struct egress *e, int tx)
{
	for (uint32_t i = 0; i < e->fresh; i++)
		if (e->priv[i].proto && (e->priv[i].fast & (tx ? FP_TX : FP_RX)))
			stop_sharing(e, i, tx);
}

void promote_lacks(struct egress *e, uint32_t i, int tx)
{
	struct promote *f = e->fast;
	int k = !!tx;

	e->s->c[RN_C_promote_lacking]++;
	if (e->s->now >= f->held_until[k]) { /* else it was sent before that */
		uint64_t quiet = e->s->now - f->held_until[k];

		f->hold_ns[k] = quiet > 4 * HOLD_MAX_NS || !f->hold_ns[k] ? HOLD_MIN_NS : f->hold_ns[k] * 2;
		if (f->hold_ns[k] > HOLD_MAX_NS)
			f->hold_ns[k] = HOLD_MAX_NS;
		f->held_until[k] = e->s->now + f->hold_ns[k];
	}
	if (e->priv[i].fast & (tx ? FP_TX : FP_RX))
		stop_sharing(e, i, tx);
}

void promote_close(struct egress *e, uint32_t i)
{
	struct flow_priv *q = &e->priv[i];
	uint32_t gen = eg_flow(e, i)->gen;

	if (q->fast & FP_TX)
		promote_notice(e, i, RN_FN_CLOSE, 1, gen);
	if (q->fast & FP_RX)
		promote_notice(e, i, RN_FN_CLOSE, 0, gen);
	q->fast = 0;
}
