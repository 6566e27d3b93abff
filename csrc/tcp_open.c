/* tcp_open.c - a SYN of the guest: options, ISN, host connect; what happens when the connect ended. */
#include "tcp_internal.h"
#include "policy.h"
#include "proxy.h"
#include "rn_view.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

void tcp_parse_options(struct seg *sg, const uint8_t *th, uint32_t hlen)
{
	struct rn_view v = { .data = th, .len = hlen };
	uint32_t at = RN_TCP_HLEN;

	sg->mss = 0;
	sg->wscale = -1;
	sg->sack_ok = 0;
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
		else if (o[0] == RN_TCPOPT_SACKOK && len == 2)
			sg->sack_ok = 1;
		at += len;
	}
}

/* ISN = M + F(tuple, secret) (RFC 6528 3); M ticks each 4 us. */
uint32_t tcp_isn(struct egress *e, const struct rn_flow *f)
{
	uint8_t k[36];

	memcpy(k, f->guest_addr, 16);
	memcpy(k + 16, f->peer_addr, 16);
	rn_put16(k + 32, f->guest_port);
	rn_put16(k + 34, f->peer_port);
	return (uint32_t)eg_siphash(e, k, sizeof(k)) + (uint32_t)(e->s->now / 4000u);
}

uint16_t tcp_clamp_mss(const struct egress *e, uint16_t mss)
{
	/* RFC 9293 3.7.1: 536 if the option is absent. A smaller one is honoured down to RN_TCP_MSS_MIN. */
	return (uint16_t)rn_tcp_mss(mss ? mss : 536, e->cfg.mtu);
}

static int start_connect(struct egress *e, uint32_t i, const uint8_t dst[4], uint16_t port)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	int one = 1, via = 0, fd, r;
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
		struct sockaddr_storage to;
		socklen_t len = sizeof(sin);

		if (eg_host_addr(e, dst, host))
			return ECONNREFUSED; /* loopback not offered: nobody listens there */
		memcpy(&sin.sin_addr, host, 4);
		memcpy(&to, &sin, sizeof(sin));
		via = proxy_tcp_route(e, i, &to, &len);
		if (via < 0)
			return -via;
		fd = socket(to.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		if (fd < 0)
			return errno;
		p->is_unix = 0;
		/* The guest's stack has done its own Nagle; a second one only adds delay. */
		(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		(void)setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &one, sizeof(one));
		(void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
		r = connect(fd, (struct sockaddr *)&to, len);
	}
	if (r < 0 && errno != EINPROGRESS) {
		int err = errno;

		close(fd);
		return via ? -proxy_tcp_step(e, i, err) : err;
	}
	p->peeked = 0;
	if (via) {
		p->life_at = e->s->now + PROXY_DEADLINE_NS;
		tcp_set_timer(e, i);
	}
	e->pending++;
	set_state(f, RN_FL_CONNECTING);
	int w = eg_watch(e, i, fd, TCP_EVENTS);

	if (w) {
		e->pending--;
		set_state(f, RN_FL_SYN_RCVD);
		close(fd);
		return -w;
	}
	if (r == 0 && !via)
		tcp_connect_done(e, i, 0);
	return 0;
}

/* The host side said no: the guest is told when there is room. */
static void refuse(struct egress *e, uint32_t i, int err)
{
	const struct rn_flow *f = eg_flow(e, i);

	e->tcp->flow[i].error = err;
	eg_close_fd(e, i);
	eg_work(e, i, W_FAIL);
	eg_refused(e, RN_IPPROTO_TCP, f->guest_addr, f->guest_port, f->peer_addr, f->peer_port, err);
}

/* A SYN of a new connection. */
void tcp_open(struct egress *e, struct eg_frame *fr, struct seg *sg, const uint8_t guest[16], uint16_t gport,
		      const uint8_t peer[16], uint16_t pport)
{
	struct rn_flow *f;
	struct flow_priv *p;
	uint32_t i = EG_NONE;
	int err;

	tcp_parse_options(sg, fr->l4, fr->l4_hlen);
	e->s->c[RN_C_tcp_syn]++;
	if (policy_denied_out(e, RN_IPPROTO_TCP, guest, gport, peer, pport)) {
		tcp_reply_rst(e, fr, sg);
		return;
	}
	if (e->pending < e->cfg.pending_max && eg_fd_room(e))
		i = eg_new(e, RN_IPPROTO_TCP, guest, gport, peer, pport, fr->eth + 6);
	if (i == EG_NONE) {
		eg_count_of(e, RN_C_tcp_over_limit, RN_IPPROTO_TCP, guest, gport, peer, pport);
		eg_refused(e, RN_IPPROTO_TCP, guest, gport, peer, pport, EMFILE);
		tcp_reply_rst(e, fr, sg);
		return;
	}
	f = eg_flow(e, i);
	p = &e->priv[i];
	e->tcp->flow[i] = (struct tcp_flow){ 0 };
	p->parked = NULL;
	p->nparked = 0;
	p->dupacks = p->backoff = p->probes = 0;
	p->flags = 0;
	p->sndbuf = 0;
	p->rto_at = p->ack_at = UINT64_MAX;
	p->life_at = UINT64_MAX;
	f->up.irs = sg->seq;
	f->up.rcv_nxt = e->tcp->flow[i].edge = sg->seq + 1;
	f->up.rcv_adv = f->up.rcv_nxt;
	f->up.fin = f->down.fin = 0;
	f->up.parked = 0;
	f->up.bytes = f->up.packets = f->down.bytes = f->down.packets = 0;
	f->down.iss = tcp_isn(e, f);
	f->down.snd_una = f->down.iss;
	f->down.snd_nxt = f->down.snd_max = f->down.iss + 1;
	f->down.snd_wnd = sg->wnd;
	f->down.snd_wl1 = sg->seq;
	f->down.snd_wl2 = f->down.iss;
	f->down.mss = tcp_clamp_mss(e, sg->mss);
	f->down.wscale = 0;
	if (sg->wscale >= 0) {
		p->flags |= F_GUEST_WS;
		f->down.wscale = (uint8_t)sg->wscale;
	}
	if (sg->sack_ok)
		p->flags |= F_SACK;
	f->up.wscale = p->flags & F_GUEST_WS ? TCP_WSCALE : 0;
	f->down.srtt_us = f->down.rttvar_us = 0;
	f->down.rto_us = TCP_RTO_INIT_US;
	f->down.retransmits = 0;
	set_state(f, RN_FL_SYN_RCVD);
	err = start_connect(e, i, peer + 12, pport);
	if (err)
		refuse(e, i, err);
}

void tcp_connect_done(struct egress *e, uint32_t i, int err)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	int zero = 0;

	e->pending--;
	p->life_at = UINT64_MAX;
	set_state(f, RN_FL_SYN_RCVD); /* out of the pending count whichever way it goes */
	if (err) {
		refuse(e, i, err);
		return;
	}
	/* Not before: a proxy's answer is peeked at from the front. */
	if (e->tcp->peek_off && setsockopt(p->fd, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof(zero)) == 0)
		p->flags |= F_PEEK_OFF;
	tcp_update_window(e, i);
	if (rcv_wnd(f) > 65535)
		f->up.rcv_adv = f->up.rcv_nxt + 65535; /* what the SYN-ACK can say */
	eg_work(e, i, W_SYNACK);
}
