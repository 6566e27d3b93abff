/* proxy_estate.c - what proxy.c has of a flow, left to a successor and taken over by it (egress_estate.c): a handshake
 * under way, an association and its TCP connection.
 *
 * Datagrams that wait for an association are not: they are few, and may be lost (RFC 768).
 */
#include "proxy_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct kept_flow {
	uint8_t there, udp, server, up, handshake, control; /* the last two: 1: it comes behind this */
	uint8_t reserved[2];
};

void proxy_keep(struct egress *e, uint32_t i, struct rn_estate_out *o)
{
	const struct proxy_flow *x = e->px ? e->px->flow[i] : NULL;
	struct kept_flow k = { .there = x != NULL };

	if (x) {
		k.udp = x->udp;
		k.server = x->server;
		k.up = x->up;
		k.handshake = x->hs != NULL;
		k.control = x->control >= 0;
	}
	rn_estate_put(o, &k, sizeof(k));
	if (k.handshake)
		rn_estate_put(o, x->hs, sizeof(*x->hs));
	if (k.control)
		rn_estate_put_fd(o, x->control);
	for (const struct proxy_wait *w = x ? x->wait : NULL; w; w = w->next)
		e->s->c[RN_C_drop_udp_send] += w->ndatagrams;
}

/* An entry as @k says, with all that comes behind it. NULL: out of memory, or it cannot be one. */
static struct proxy_flow *read_flow(struct egress *e, uint32_t i, struct rn_estate_in *in, const struct kept_flow *k)
{
	const struct flow_priv *p = &e->priv[i];
	struct proxy_flow *x;

	if (!e->px || k->server >= e->px->cfg.nservers || (p->proto == RN_IPPROTO_UDP) != !!k->udp || !!k->control != !!k->udp ||
	    (!k->handshake && (!k->udp || !k->up)) || (k->udp && k->up && p->fd < 0))
		return NULL;
	x = calloc(1, sizeof(*x));
	if (!x)
		return NULL;
	x->udp = k->udp;
	x->server = k->server;
	x->up = k->up;
	x->wait_end = &x->wait;
	x->control = -1;
	if (k->handshake) {
		struct proxy_handshake was;

		if (!rn_estate_get(in, &was, sizeof(was)))
			x->hs = proxy_handshake_again(&e->px->cfg.server[k->server], &was);
		explicit_bzero(&was, sizeof(was));
		if (!x->hs) {
			free(x);
			return NULL;
		}
	}
	return x;
}

int proxy_adopt(struct egress *e, uint32_t i, struct rn_estate_in *in)
{
	struct proxy_flow *x;
	struct kept_flow k;

	if (rn_estate_get(in, &k, sizeof(k)))
		return -EPROTO;
	if (!k.there)
		return 0;
	x = read_flow(e, i, in, &k);
	if (!x)
		return -EPROTO;
	e->px->flow[i] = x;
	if (!k.control)
		return 0;
	x->control = rn_estate_get_fd(in);
	if (x->control < 0)
		return -EPROTO;
	e->nfds++;
	return rn_stage_watch(e->s, x->control, PROXY_CONTROL_EVENTS, RN_EV(RN_TAG_PROXY, i));
}

void proxy_keep_all(const struct egress *e, struct rn_estate_out *o)
{
	static const uint64_t none[PROXY_SERVERS];

	rn_estate_put(o, e->px ? e->px->udp_retry : none, sizeof(none));
}

int proxy_adopt_all(struct egress *e, struct rn_estate_in *in)
{
	uint64_t retry[PROXY_SERVERS];

	if (rn_estate_get(in, retry, sizeof(retry)))
		return -EPROTO;
	if (e->px)
		memcpy(e->px->udp_retry, retry, sizeof(retry));
	return 0;
}
