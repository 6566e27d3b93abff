/* tcp_in.c - a connection from outside: our SYN to the guest, its answer, and whoever loses patience.
 *
 * The host's kernel has accepted the client already; its bytes wait in the socket, from which nothing is taken before
 * the guest's own handshake is complete. Afterwards the flow is like any other.
 *
 *   RN_FL_SYN_SENT  SYN at 0, 1, 3 and 7 s (RFC 6298: 1 s, doubled), given up at 15 s
 *     guest's SYN-ACK                   -> RN_FL_ESTABLISHED
 *     guest's RST, or an ICMP error     -> client reset
 *     client reset its side             -> RST to the guest if a SYN went out
 *     client sent FIN and nothing else  -> it may wait for an answer still (nc -N), or be gone (a probe): the SYN that
 *                                          is out may be answered, but no more are sent
 *     guest's SYN without ACK           -> both reset: a simultaneous open (RFC 9293 3.5) would join the client to a
 *                                          socket with which the guest called somebody else
 */
#include "inbound.h"
#include "policy.h"
#include "tcp_internal.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define TCP_IN_RETRIES 3u

/* Out of the count of handshakes under way; the caller sets the next state, or drops the flow. */
void tcp_in_settled(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	e->in->pending--;
	if (p->flags & F_ASKED) {
		e->in->nasked--;
		p->flags &= ~(uint32_t)F_ASKED;
	}
}

static void refuse_client(int fd)
{
	struct linger lg = { .l_onoff = 1, .l_linger = 0 };

	(void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &lg, sizeof(lg));
	close(fd);
}

/* A connection of a listener. */
void tcp_accepted(struct egress *e, uint32_t slot, int fd, const uint8_t client[16], uint16_t client_port)
{
	const struct in_listener *l = &e->in->l[slot];
	uint8_t g4[4], p4[4], guest[16], peer[16];
	static const uint8_t unknown[6];
	int one = 1, zero = 0;
	const uint8_t *mac;
	uint32_t i = EG_NONE;
	struct flow_priv *p;
	struct rn_flow *f;
	uint16_t port;

	e->s->c[RN_C_tcp_inbound]++;
	inbound_guest(e, l, g4);
	inbound_peer(e, client, p4);
	rn_addr_from4(guest, g4);
	rn_addr_from4(peer, p4);
	if (policy_denied_in(e, RN_IPPROTO_TCP, guest, l->guest_port, client, client_port)) {
		refuse_client(fd);
		return;
	}
	mac = inbound_mac(e, g4);
	port = inbound_port(e, RN_IPPROTO_TCP, guest, l->guest_port, peer, client_port);
	if (port)
		i = eg_new(e, RN_IPPROTO_TCP, guest, l->guest_port, peer, port, mac ? mac : unknown);
	if (i == EG_NONE) {
		e->s->c[RN_C_tcp_over_limit]++;
		refuse_client(fd);
		return;
	}
	f = eg_flow(e, i);
	p = &e->priv[i];
	e->tcp->flow[i] = (struct tcp_flow){ 0 };
	e->in->flow[i].serial = l->serial;
	e->in->flow[i].slot = slot;
	p->parked = NULL;
	p->life_at = UINT64_MAX;
	f->down.iss = tcp_isn(e, f);
	f->down.snd_una = f->down.iss;
	f->down.snd_nxt = f->down.snd_max = f->down.iss + 1;
	f->down.mss = 536; /* until the guest says (RFC 9293 3.7.1) */
	f->down.rto_us = TCP_RTO_INIT_US;
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)); /* as in tcp_open.c */
	(void)setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &one, sizeof(one));
	(void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
	if (e->tcp->peek_off && setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof(zero)) == 0)
		p->flags |= F_PEEK_OFF;
	set_state(f, RN_FL_SYN_SENT);
	e->in->pending++;
	if (eg_watch(e, i, fd, TCP_EVENTS)) {
		e->s->c[RN_C_tcp_over_limit]++;
		refuse_client(fd);
		tcp_gone(e, i);
		return;
	}
	eg_work(e, i, W_SYN);
}

/* Send the SYN, or ask where to. 0, or -1: no room. */
int tcp_send_syn(struct egress *e, uint32_t i)
{
	static const uint8_t unknown[6];
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	const uint8_t *mac = inbound_mac(e, f->guest_addr + 12);
	uint8_t opt[12] = { RN_TCPOPT_MSS, 4, 0, 0, /* RFC 9293 3.7.1, RFC 2018 2, RFC 7323 2.2 */
			    RN_TCPOPT_NOP, RN_TCPOPT_NOP, RN_TCPOPT_SACKOK, 2,
			    RN_TCPOPT_NOP, RN_TCPOPT_WSCALE, 3, TCP_WSCALE };
	struct rn_buf *b;

	if (mac) {
		memcpy(f->guest_mac, mac, 6);
	} else if (!memcmp(f->guest_mac, unknown, 6)) {
		if (inbound_ask(e, f->guest_addr + 12))
			return -1;
		if (!(p->flags & F_ASKED)) {
			p->flags |= F_ASKED;
			e->in->nasked++;
		}
		goto timer;
	}
	b = eg_out_buf(e, RN_SMALL);
	if (!b)
		return -1;
	rn_put16(opt + 2, (uint16_t)(e->cfg.mtu - RN_IP4_HLEN - RN_TCP_HLEN));
	tcp_emit(e, f, b, f->down.iss, 0, RN_TH_SYN, 65535, opt, sizeof(opt), 0, f->down.mss);
	p->flags |= F_SYN_OUT;
timer:
	if (p->rto_at == UINT64_MAX) {
		p->rtt_ns = e->s->now;
		p->rto_at = tcp_rto_after(e, i);
		tcp_set_timer(e, i);
	}
	return 0;
}

void tcp_in_mac(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	if (!(p->flags & F_ASKED))
		return;
	p->flags &= ~(uint32_t)F_ASKED;
	e->in->nasked--;
	p->backoff = 0; /* the waiting so far was not for a SYN */
	p->rto_at = UINT64_MAX;
	eg_work(e, i, W_SYN);
}

/* The client is reset. To the guest a RST, if it may have seen a SYN. */
static void leave(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];

	tcp_abort_host(e, i);
	if (!(p->flags & F_SYN_OUT)) {
		tcp_gone(e, i);
		return;
	}
	p->work = 0;
	eg_work(e, i, W_RST);
}

static void refused(struct egress *e, uint32_t i)
{
	eg_count(e, i, RN_C_tcp_inbound_refused);
	tcp_abort_host(e, i);
	tcp_gone(e, i);
}

int tcp_in_refused(struct egress *e, uint32_t i, uint32_t seq)
{
	struct rn_flow *f = eg_flow(e, i);

	/* Only about a SYN under way (RFC 5927 4.1): later, an error is no reason to end a connection (RFC 1122 4.2.3.9). */
	if (get_state(f) != RN_FL_SYN_SENT || seq != f->down.iss || (e->priv[i].work & W_RST))
		return 0;
	refused(e, i);
	return 1;
}

void tcp_in_close(struct egress *e, uint32_t i)
{
	/* TIME-WAIT is over on both sides; the entry keeps its tuple from being used too soon */
	if (get_state(eg_flow(e, i)) != RN_FL_TIME_WAIT)
		tcp_close_flow(e, i);
}

/* Events of the client's socket before the guest answered. */
void tcp_in_event(struct egress *e, uint32_t i, uint32_t events)
{
	struct flow_priv *p = &e->priv[i];

	if (events & (EPOLLERR | EPOLLHUP)) {
		eg_count(e, i, RN_C_tcp_inbound_gone);
		leave(e, i);
		return;
	}
	if (events & EPOLLRDHUP)
		p->flags |= F_HUP;
	if (events & (EPOLLIN | EPOLLRDHUP))
		p->flags |= F_READABLE;
}

/* The SYN was not answered in time. */
void tcp_in_timer(struct egress *e, uint32_t i)
{
	struct flow_priv *p = &e->priv[i];
	int bytes = 0;

	if ((p->flags & F_HUP) && ioctl(p->fd, FIONREAD, &bytes) == 0 && !bytes) {
		eg_count(e, i, RN_C_tcp_inbound_gone);
		leave(e, i);
		return;
	}
	if (p->backoff++ >= TCP_IN_RETRIES) {
		eg_count(e, i, RN_C_tcp_inbound_unanswered);
		leave(e, i);
		return;
	}
	eg_work(e, i, W_SYN);
}

/* A segment of the guest in SYN-SENT: RFC 9293 3.10.7.3 in its order. */
void tcp_in_segment(struct egress *e, uint32_t i, struct eg_frame *fr, struct seg *sg)
{
	struct flow_priv *p = &e->priv[i];
	struct rn_flow *f = eg_flow(e, i);
	int ours = (sg->flags & RN_TH_ACK) && sg->ack == f->down.snd_max;

	if ((sg->flags & RN_TH_ACK) && !ours) {
		if (sg->flags & RN_TH_RST)
			return;
		/* The guest holds an earlier connection of this tuple (TIME-WAIT, or it missed the end). Our RST ends it; the
		 * next SYN is a new one to the guest: at once, but only once. */
		tcp_reply_rst(e, fr, sg);
		if (!(p->flags & F_SYN_AGAIN)) {
			p->flags |= F_SYN_AGAIN;
			eg_work(e, i, W_SYN);
		}
		return;
	}
	if (sg->flags & RN_TH_RST) {
		if (ours)
			refused(e, i);
		return;
	}
	if (!(sg->flags & RN_TH_SYN))
		return;
	if (!ours) {
		eg_count(e, i, RN_C_tcp_inbound_refused);
		tcp_in_settled(e, i);
		set_state(f, RN_FL_SYN_RCVD); /* the RST acknowledges its SYN, and so ends it whatever it made of ours */
		f->up.rcv_nxt = sg->seq + 1;
		tcp_abort_host(e, i);
		p->work = 0;
		eg_work(e, i, W_RST);
		return;
	}
	tcp_parse_options(sg, fr->l4, fr->l4_hlen);
	memcpy(f->guest_mac, fr->eth + 6, 6);
	tcp_in_settled(e, i);
	set_state(f, RN_FL_ESTABLISHED);
	e->s->c[RN_C_tcp_established]++;
	f->up.irs = sg->seq;
	f->up.rcv_nxt = e->tcp->flow[i].edge = sg->seq + 1;
	f->up.rcv_adv = f->up.rcv_nxt + 65535; /* what the SYN said */
	f->down.mss = tcp_clamp_mss(e, sg->mss);
	if (sg->wscale >= 0) { /* both must have sent it (RFC 7323 2.2) */
		p->flags |= F_GUEST_WS;
		f->down.wscale = (uint8_t)sg->wscale;
		f->up.wscale = TCP_WSCALE;
	}
	if (sg->sack_ok)
		p->flags |= F_SACK;
	f->down.snd_una = sg->ack;
	f->down.snd_wnd = sg->wnd; /* never scaled on a SYN */
	f->down.snd_wl1 = sg->seq;
	f->down.snd_wl2 = sg->ack;
	e->tcp->flow[i].wnd_max = sg->wnd;
	if (!p->backoff && !(p->flags & F_SYN_AGAIN)) /* Karn: RFC 6298 3 */
		tcp_rtt_sample(f, e->s->now - p->rtt_ns);
	p->backoff = 0;
	p->rto_at = UINT64_MAX;
	p->life_at = e->s->now + TCP_KEEPALIVE_NS;
	tcp_set_timer(e, i);
	tcp_update_window(e, i);
	p->work &= ~(uint32_t)W_SYN;
	/* Data on the SYN-ACK is not acknowledged, so the guest sends it again. */
	eg_work(e, i, p->flags & F_READABLE ? W_DOWN | W_ACK : W_ACK);
}
