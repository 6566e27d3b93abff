/* tcp_out.c - segments to the guest: data frames' headers, ACK, SYN-ACK, RST, and the answer to a failed connect. */
#include "tcp_internal.h"
#include "rn_csum.h"
#include "rn_promote.h"

#include <errno.h>

/* --- frames to the guest --- */

/* Build and send one segment whose @len payload bytes lie at TCP_DATA_OFF + @optlen of @b. */
void tcp_emit(struct egress *e, struct rn_flow *f, struct rn_buf *b, uint32_t seq, uint32_t ack, uint8_t flags,
	      uint16_t wnd, const uint8_t *opt, uint32_t optlen, uint32_t len, uint32_t mss)
{
	uint8_t *eth = (uint8_t *)b + TCP_ETH_OFF;
	const struct rn_tcpseg s = { .seq = seq, .ack = ack, .flags = flags, .wnd = wnd, .ip_id = e->ip_id++, .opt = opt,
				     .optlen = optlen, .len = len, .mss = mss, .gateway_mac = e->cfg.gateway_mac,
				     .offload = e->cfg.offload };
	struct rn_vnet_hdr v;
	uint32_t n = rn_tcpseg_build(f, &s, eth, &v);

	RN_SHOW(f->up.acked, ack);
	eg_emit(e, b, eth, n, e->cfg.offload ? &v : NULL);
}

uint16_t tcp_window_field(const struct flow_priv *p, struct rn_flow *f)
{
	return rn_tcp_window_field(rcv_wnd(f), p->flags & F_GUEST_WS);
}

/* RST that answers a segment of no connection (RFC 9293 3.10.7.1); the frame tells the addresses. */
void tcp_reply_rst(struct egress *e, const struct eg_frame *fr, const struct seg *sg)
{
	struct rn_flow f = { 0 };
	struct rn_buf *b = eg_out_buf(e, RN_SMALL);
	uint32_t len = sg->len + !!(sg->flags & RN_TH_SYN) + !!(sg->flags & RN_TH_FIN);

	if (!b) {
		e->s->c[RN_C_drop_reply_no_room]++;
		return;
	}
	memcpy(f.guest_mac, fr->eth + 6, 6);
	memcpy(f.guest_addr + 12, fr->ip + RN_IP4_SRC, 4);
	memcpy(f.peer_addr + 12, fr->ip + RN_IP4_DST, 4);
	f.guest_port = rn_get16(fr->l4 + RN_TCP_SPORT);
	f.peer_port = rn_get16(fr->l4 + RN_TCP_DPORT);
	e->s->c[RN_C_tcp_rst_sent]++;
	if (sg->flags & RN_TH_ACK)
		tcp_emit(e, &f, b, sg->ack, 0, RN_TH_RST, 0, NULL, 0, 0, e->cfg.mtu);
	else
		tcp_emit(e, &f, b, 0, sg->seq + len, RN_TH_RST | RN_TH_ACK, 0, NULL, 0, 0, e->cfg.mtu);
}

/* --- small segments --- */

int tcp_send_ack(struct egress *e, uint32_t i, uint32_t seq)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	struct rn_buf *b = eg_out_buf(e, RN_SMALL);
	uint8_t opt[40];
	uint32_t n;

	if (!b)
		return -1;
	n = tcp_sack_option(e, i, opt);
	tcp_emit(e, f, b, seq, f->up.rcv_nxt, RN_TH_ACK, tcp_window_field(p, f), opt, n, 0, f->down.mss);
	return 0;
}

int tcp_send_synack(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	struct rn_buf *b = eg_out_buf(e, RN_SMALL);
	uint8_t opt[12] = { RN_TCPOPT_MSS, 4 };
	uint32_t n = 4, w;

	if (!b)
		return -1;
	rn_put16(opt + 2, (uint16_t)(e->cfg.mtu - RN_IP4_HLEN - RN_TCP_HLEN));
	if (p->flags & F_SACK) { /* offered only if the guest did (RFC 2018 2, */
		opt[n++] = RN_TCPOPT_NOP;
		opt[n++] = RN_TCPOPT_NOP;
		opt[n++] = RN_TCPOPT_SACKOK;
		opt[n++] = 2;
	}
	if (p->flags & F_GUEST_WS) { /* RFC 7323 2.2) */
		opt[n++] = RN_TCPOPT_NOP;
		opt[n++] = RN_TCPOPT_WSCALE;
		opt[n++] = 3;
		opt[n++] = TCP_WSCALE;
	}
	w = rcv_wnd(f); /* never scaled on a SYN (RFC 7323 2.2) */
	tcp_emit(e, f, b, f->down.iss, f->up.rcv_nxt, RN_TH_SYN | RN_TH_ACK, (uint16_t)(w > 65535 ? 65535 : w), opt, n, 0,
		     f->down.mss);
	if (p->rto_at == UINT64_MAX) {
		p->rtt_ns = e->s->now;
		p->rto_at = tcp_rto_after(e, i);
		tcp_set_timer(e, i);
	}
	return 0;
}

/* The connect failed: RST where somebody refused, ICMP where nobody was reached (RFC 1122 4.2.3.9). */
int tcp_send_failure(struct egress *e, uint32_t i)
{
	struct rn_flow *f = eg_flow(e, i);
	int err = e->tcp->flow[i].error, code = -1;
	struct rn_buf *b;

	switch (err) {
	case ENETUNREACH:
	case ENETDOWN:
		code = RN_ICMP_UNREACH_NET;
		break;
	case EHOSTUNREACH:
	case EHOSTDOWN:
	case ETIMEDOUT:
		code = RN_ICMP_UNREACH_HOST;
		break;
	case EACCES:
	case EPERM:
		code = RN_ICMP_UNREACH_ADMIN;
		break;
	}
	if (code >= 0) {
		/* The guest's SYN as it was, as far as an ICMP error quotes it (RFC 792): only ports and seq count. */
		uint8_t q[RN_IP4_HLEN + RN_TCP_HLEN] = { 0x45 };

		rn_put16(q + RN_IP4_LEN, sizeof(q));
		rn_put16(q + RN_IP4_FRAG, RN_IP4_DF);
		q[RN_IP4_TTL] = 64;
		q[RN_IP4_PROTO] = RN_IPPROTO_TCP;
		memcpy(q + RN_IP4_SRC, f->guest_addr + 12, 4);
		memcpy(q + RN_IP4_DST, f->peer_addr + 12, 4);
		rn_csum_ip4(q, RN_IP4_HLEN);
		rn_put16(q + RN_IP4_HLEN + RN_TCP_SPORT, f->guest_port);
		rn_put16(q + RN_IP4_HLEN + RN_TCP_DPORT, f->peer_port);
		rn_put32(q + RN_IP4_HLEN + RN_TCP_SEQ, f->up.irs);
		q[RN_IP4_HLEN + RN_TCP_OFF] = 5 << 4;
		q[RN_IP4_HLEN + RN_TCP_FLAGS] = RN_TH_SYN;
		int r = eg_icmp_error(e, f->guest_mac, e->cfg.gateway4, q, sizeof(q), RN_ICMP_UNREACH, (uint8_t)code, 0);

		if (r == 0) {
			eg_count(e, i, RN_C_tcp_unreachable);
			return 0;
		}
		if (e->s->want_room[RN_ROLE_GUEST] || e->s->want_buf)
			return -1;
		/* over the ICMP rate limit: a RST is better than silence */
	}
	b = eg_out_buf(e, RN_SMALL);
	if (!b)
		return -1;
	e->s->c[RN_C_tcp_rst_sent]++;
	eg_count(e, i, code >= 0 ? RN_C_tcp_unreachable : RN_C_tcp_refused);
	/* RFC 9293 3.10.7.1: no ACK in the SYN, so seq 0 and ack behind it */
	tcp_emit(e, f, b, 0, f->up.irs + 1, RN_TH_RST | RN_TH_ACK, 0, NULL, 0, 0, e->cfg.mtu);
	return 0;
}
