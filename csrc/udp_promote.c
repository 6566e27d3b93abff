/* udp_promote.c - which UDP mappings are promoted (rules: rn_promote.h).
 *
 * A mapping that sent cfg.after datagrams in a row to one peer, or was sent as many, is settled. guest_rx then reads the
 * socket, whoever sends to it; guest_tx sends what goes to that peer, if the guest does send. To other peers datagrams go the usual way, through the same socket. So both
 * stages may send at any time, and no order is lost that UDP had.
 *
 * down stays with guest_rx to the end: it may have the kernel join datagrams (UDP_GRO), which egress could not take apart.
 */
#include "inbound.h"
#include "udp_internal.h"

#include <netinet/udp.h>
#include <sys/epoll.h>

#define TTL_PLAIN 64u /* as in udp.c */

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

static void pass_of(const struct egress *e, uint32_t i, struct rn_pass *p)
{
	const struct flow_priv *q = &e->priv[i];

	*p = (struct rn_pass){ .index = i, .gen = e->flows->flow[i].gen, .proto = RN_IPPROTO_UDP, .df = q->df,
			       .peer_port = q->to_port };
	memcpy(p->peer4, q->to4, 4);
	(void)eg_host_addr(e, q->to4, p->host4);
}

/* guest_rx reads from now on. 0 or -errno. */
static int lend_down(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_pass pass;
	int r;

	pass_of(e, i, &pass);
	r = promote_offer(e, i, 0, &pass);
	if (r)
		return r;
	p->fast |= FP_DOWN;
	p->work &= ~UDP_W_READ;
	(void)eg_rewatch(e, i, EPOLLET); /* errors are always told */
	e->s->c[RN_C_promoted_down]++;
	rn_half_leave(&eg_flow(e, i)->down.owner, rn_owner(e->s->out_row[RN_ROLE_GUEST]));
	return 0;
}

/* Read here again. */
static void take_down(struct egress *e, uint32_t i)
{
	static const int off = 0;
	struct flow_priv *p = &e->priv[i];

	p->fast &= (uint8_t)~FP_DOWN;
	p->got = 0;
	rn_half_leave(&eg_flow(e, i)->down.owner, rn_owner(e->s->row));
	(void)setsockopt(p->fd, IPPROTO_UDP, UDP_GRO, &off, sizeof(off)); /* a datagram a read from the next one on */
	(void)eg_rewatch(e, i, EPOLLIN | EPOLLET);
	e->s->c[RN_C_recalled_down]++;
	eg_work(e, i, UDP_W_READ);
}

void udp_promote_down(struct egress *e, uint32_t i, uint32_t got)
{
	struct flow_priv *p = &e->priv[i];
	const struct egress_promote *cfg = promote_config(e);

	p->got += got;
	if (cfg && p->got >= cfg->after && !(p->fast & FP_DOWN))
		(void)lend_down(e, i);
}

void udp_promote_end_up(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	if (!(p->fast & FP_TX))
		return;
	promote_notice(e, i, RN_FN_CLOSE, 1, eg_flow(e, i)->gen);
	p->fast &= (uint8_t)~(FP_TX | FP_LENT);
	p->run = 0;
	rn_half_leave(&eg_flow(e, i)->up.owner, rn_owner(e->s->row));
}

void udp_promote(struct egress *e, uint32_t i, const struct eg_frame *f, const uint8_t host4[4])
{
	struct flow_priv *p = &e->priv[i];
	const struct egress_promote *cfg = promote_config(e);
	const uint8_t *to = f->ip + RN_IP4_DST;
	uint16_t port = rn_get16(f->l4 + RN_UDP_DPORT);
	struct rn_pass pass;

	if (!cfg)
		return;
	if (p->to_port != port || memcmp(p->to4, to, 4)) {
		p->run = 0;
		p->to_port = port;
		memcpy(p->to4, to, 4);
	}
	p->run += f->ndatagrams;
	if (p->run < cfg->after || (f->ttl < TTL_PLAIN && memcmp(to, e->cfg.gateway4, 4)))
		return;
	if (!(p->fast & FP_DOWN) && lend_down(e, i))
		return;
	if (p->fast & FP_TX) /* with another peer */
		udp_promote_end_up(e, i);
	pass_of(e, i, &pass);
	memcpy(pass.host4, host4, 4);
	if (promote_offer(e, i, 1, &pass))
		return;
	p->fast |= FP_LENT;
	p->run = 0;
	e->s->c[RN_C_promoted_up]++;
	rn_half_leave(&eg_flow(e, i)->up.owner, rn_owner(e->s->out_row[RN_ROLE_OFFER]));
}

void udp_notice(struct egress *e, uint32_t i, enum rn_flow_notice n)
{
	if (n == RN_FN_BACK && (e->priv[i].fast & FP_DOWN))
		take_down(e, i);
}

void udp_policy_changed(struct egress *e)
{
	for (uint32_t i = 0; e->fast && i < e->fresh; i++)
		if (e->priv[i].proto == RN_IPPROTO_UDP)
			udp_promote_end_up(e, i);
}

void udp_unshare(struct egress *e, uint32_t i, int tx)
{
	struct flow_priv *p = &e->priv[i];

	if (tx) {
		p->fast &= (uint8_t)~(FP_TX | FP_LENT);
		p->run = 0;
		rn_half_leave(&eg_flow(e, i)->up.owner, rn_owner(e->s->row));
		return;
	}
	p->fast &= (uint8_t)~FP_RX;
	if (lend_down(e, i)) /* at once: nobody reads meanwhile */
		take_down(e, i);
}
