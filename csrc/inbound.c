/* inbound.c - forwards: host sockets that listen for the guest.
 *
 * The supervisor binds the sockets, because it has the user's rights and the caller to tell of an error; they come
 * here ready for use. A listener whose socket may have something stands in one of two lists, TCP and UDP, and
 * stays there until a read says it is empty (the sockets are watched edge-triggered). A list is left alone
 * while what all of it needs is missing, so nothing spins and what waits, waits in the kernel:
 *   TCP  a place among the handshakes with the guest under way (cfg.pending_max), a flow, a descriptor. The clients
 *        wait in the listener's backlog.
 *   UDP  room in the guest's ring. The datagrams wait in the socket's buffer; when it is full, they are lost.
 *
 * What the guest sees. The client's own address and port, if its answer will come back here: a client on the host's
 * loopback, with an address of the guest's own subnet (which the guest would look for on its link), or by IPv6, appears as
 * the gateway; so does everybody with cfg.as_gateway, for a guest with routes of its own. The port is another one where
 * the tuple is taken by a live flow.
 *
 * Whom it is for. A rule names an address of the guest, or means "the guest": cfg.guest4, the first lease. If that
 * address never sent anything but another did, the guest has another lease, and is served there.
 *
 * The guest's MAC address is that of the last frame from the address. A guest that has only listened so far is asked
 * by ARP (RFC 826); classify hands on ARP replies to the gateway. A SYN waits for the answer, because Linux ignores a
 * TCP segment that came as an Ethernet broadcast; a datagram is broadcast meanwhile.
 */
#include "inbound.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define IN_GROW 64u /* slots more at once */
#define IN_PORT_MIN 1024u
#define IN_PORT_TRIES 64u /* with a table of 16384 flows the last of these fails with probability 4^-64 */

int inbound_init(struct egress *e)
{
	struct inbound *in = calloc(1, sizeof(*in));
	uint32_t nhash = 1;

	if (!in)
		return -ENOMEM;
	while (nhash < e->nflows)
		nhash *= 2;
	e->in = in;
	in->hash_mask = nhash - 1;
	in->flow = calloc(e->nflows, sizeof(*in->flow));
	in->hash = malloc(nhash * sizeof(*in->hash));
	if (!in->flow || !in->hash) {
		inbound_fini(e);
		return -ENOMEM;
	}
	memset(in->hash, 0xff, nhash * sizeof(*in->hash)); /* EG_NONE */
	for (int k = 0; k < 2; k++)
		in->ready[k] = (struct in_ready){ EG_NONE, EG_NONE };
	in->lru = (struct eg_lru){ .head = EG_NONE, .tail = EG_NONE };
	in->free_slot = EG_NONE;
	in->retry_at = UINT64_MAX;
	return 0;
}

void inbound_fini(struct egress *e)
{
	struct inbound *in = e->in;

	if (!in)
		return;
	for (uint32_t k = 0; k < in->nl; k++)
		if (in->l[k].fd >= 0)
			close(in->l[k].fd);
	free(in->l);
	free(in->flow);
	free(in->hash);
	free(in);
	e->in = NULL;
}

/* --- listeners --- */

static struct in_ready *ready_of(struct inbound *in, const struct in_listener *l)
{
	return &in->ready[l->proto == RN_IPPROTO_UDP];
}

static void ready_push(struct inbound *in, uint32_t slot, int front)
{
	struct in_listener *l = &in->l[slot];
	struct in_ready *r = ready_of(in, l);

	l->ready = 1;
	l->next = front ? r->head : EG_NONE;
	if (r->head == EG_NONE)
		r->tail = slot;
	if (front || r->head == EG_NONE) {
		r->head = slot;
	} else {
		in->l[r->tail].next = slot;
		r->tail = slot;
	}
}

static uint32_t ready_pop(struct inbound *in, struct in_ready *r)
{
	uint32_t slot = r->head;

	if (slot == EG_NONE)
		return slot;
	r->head = in->l[slot].next;
	if (r->head == EG_NONE)
		r->tail = EG_NONE;
	in->l[slot].ready = 0;
	return slot;
}

static void ready_remove(struct inbound *in, uint32_t slot)
{
	struct in_ready *r = ready_of(in, &in->l[slot]);
	uint32_t *at = &r->head, prev = EG_NONE;

	if (!in->l[slot].ready)
		return;
	while (*at != slot) {
		prev = *at;
		at = &in->l[prev].next;
	}
	*at = in->l[slot].next;
	if (r->tail == slot)
		r->tail = prev;
	in->l[slot].ready = 0;
}

static int grow(struct inbound *in)
{
	struct in_listener *l = realloc(in->l, (in->nl + IN_GROW) * sizeof(*l));

	if (!l)
		return -ENOMEM;
	in->l = l;
	for (uint32_t k = in->nl + IN_GROW; k-- > in->nl;) {
		l[k] = (struct in_listener){ .fd = -1, .next = in->free_slot };
		in->free_slot = k;
	}
	in->nl += IN_GROW;
	return 0;
}

int stage_egress_listen(struct rn_stage *s, const struct egress_listener *cfg)
{
	struct egress *e = s->priv;
	struct inbound *in = e->in;
	int flags = fcntl(cfg->fd, F_GETFL), on = 1, domain = 0, r;
	socklen_t len = sizeof(domain);
	struct in_listener *l;
	uint32_t slot;

	if (flags < 0)
		return -errno;
	if ((cfg->proto != RN_IPPROTO_TCP && cfg->proto != RN_IPPROTO_UDP) || !cfg->guest_port)
		return -EINVAL;
	/* A quarter of the descriptors is for what comes through the listeners, and for the guest. */
	if (e->nfds + EG_FD_RESERVE + e->cfg.nfile / 4 >= e->cfg.nfile)
		return -EMFILE;
	if (fcntl(cfg->fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return -errno;
	if (getsockopt(cfg->fd, SOL_SOCKET, SO_DOMAIN, &domain, &len) < 0)
		return -errno;
	if (domain != AF_INET && domain != AF_INET6)
		return -EINVAL;
	if (cfg->proto == RN_IPPROTO_UDP) { /* of IPv4 datagrams the latter tells too, as mapped addresses */
		r = domain == AF_INET ? setsockopt(cfg->fd, IPPROTO_IP, IP_PKTINFO, &on, sizeof(on))
				      : setsockopt(cfg->fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof(on));
		if (r < 0)
			return -errno;
	}
	if (in->free_slot == EG_NONE && (r = grow(in)))
		return r;
	slot = in->free_slot;
	/* Edge-triggered: while its list has to wait, a level would wake us for nothing. */
	r = rn_stage_watch(s, cfg->fd, EPOLLIN | EPOLLET, RN_EV(RN_TAG_LISTEN, slot));
	if (r < 0)
		return r;
	l = &in->l[slot];
	in->free_slot = l->next;
	*l = (struct in_listener){
		.fd = cfg->fd,
		.next = EG_NONE,
		.proto = cfg->proto,
		.guest_port = cfg->guest_port,
		.rule = cfg->rule,
	};
	memcpy(l->guest4, cfg->guest4, 4);
	if (!++in->serial)
		in->serial = 1;
	l->serial = in->serial;
	in->n++;
	e->nfds++;
	return (int)slot;
}

int stage_egress_unlisten(struct rn_stage *s, uint32_t slot, int close_flows)
{
	struct egress *e = s->priv;
	struct inbound *in = e->in;
	struct in_listener *l;
	int ended = 0;

	if (slot >= in->nl || in->l[slot].fd < 0)
		return -ENOENT;
	l = &in->l[slot];
	if (l->nflows || (close_flows && l->proto == RN_IPPROTO_TCP)) {
		for (uint32_t i = 0; i < e->fresh; i++) {
			if (!e->priv[i].proto || in->flow[i].serial != l->serial)
				continue;
			if (l->proto == RN_IPPROTO_TCP)
				tcp_in_close(e, i);
			else
				eg_drop(e, i);
			ended++;
		}
	}
	ready_remove(in, slot);
	/* The supervisor has the same socket open, so closing ours would leave it in the epoll set. */
	(void)epoll_ctl(s->epfd, EPOLL_CTL_DEL, l->fd, NULL);
	close(l->fd);
	*l = (struct in_listener){ .fd = -1, .next = in->free_slot };
	in->free_slot = slot;
	in->n--;
	e->nfds--;
	return ended;
}

int stage_egress_listener(struct rn_stage *s, uint32_t k, uint32_t *rule)
{
	const struct inbound *in = ((struct egress *)s->priv)->in;

	for (uint32_t slot = 0; slot < in->nl; slot++) {
		if (in->l[slot].fd < 0 || k--)
			continue;
		*rule = in->l[slot].rule;
		return (int)slot;
	}
	return -ENOENT;
}

/* --- what a predecessor had --- */

int inbound_adopt_slots(struct egress *e, uint32_t slots)
{
	int r = 0;

	while (!r && e->in->nl < slots)
		r = grow(e->in);
	return r;
}

int inbound_adopt(struct egress *e, uint32_t slot, const struct in_listener *was, int fd)
{
	struct inbound *in = e->in;
	int r;

	if (in->l[slot].fd >= 0)
		return -EPROTO;
	r = rn_stage_watch(e->s, fd, EPOLLIN | EPOLLET, RN_EV(RN_TAG_LISTEN, slot)); /* tells what waits, too */
	if (r < 0)
		return r;
	in->l[slot] = *was;
	in->l[slot].fd = fd;
	in->l[slot].next = EG_NONE;
	in->l[slot].nflows = 0; /* counted as they come */
	in->l[slot].ready = 0;
	in->n++;
	e->nfds++;
	return 0;
}

void inbound_adopted(struct egress *e)
{
	struct inbound *in = e->in;

	in->free_slot = EG_NONE;
	for (uint32_t k = in->nl; k-- > 0;) {
		if (in->l[k].fd >= 0)
			continue;
		in->l[k].next = in->free_slot;
		in->free_slot = k;
	}
}

int inbound_adopt_flow(struct egress *e, uint32_t i, const struct in_flow *was)
{
	struct inbound *in = e->in;

	if (e->priv[i].proto == RN_IPPROTO_UDP) { /* it lives by its listener's socket */
		if (was->slot >= in->nl || in->l[was->slot].fd < 0 || in->l[was->slot].serial != was->serial ||
		    in->l[was->slot].proto != RN_IPPROTO_UDP || was->bucket > in->hash_mask)
			return -EPROTO;
		in->l[was->slot].nflows++;
	}
	in->flow[i] = *was;
	if (e->priv[i].proto == RN_IPPROTO_UDP) {
		in->flow[i].hash_next = in->hash[was->bucket];
		in->hash[was->bucket] = i;
	}
	return 0;
}

void inbound_forget(struct egress *e)
{
	for (uint32_t k = 0; k < e->in->nl; k++)
		if (e->in->l[k].fd >= 0)
			(void)stage_egress_unlisten(e->s, k, 0);
	inbound_adopted(e);
}

void inbound_event(struct egress *e, uint32_t slot)
{
	struct inbound *in = e->in;

	/* A slot may have been given away since: then its new owner is looked at once for nothing. */
	if (slot < in->nl && in->l[slot].fd >= 0 && !in->l[slot].ready)
		ready_push(in, slot, 0);
}

/* Take connections of one listener: 1 there may be more, 0 empty, -1 something that all of them need is missing. */
static int accept_some(struct egress *e, uint32_t slot)
{
	struct inbound *in = e->in;

	for (uint32_t k = 0; k < IN_ACCEPTS; k++) {
		union in_sockaddr from = { 0 };
		socklen_t len = sizeof(from);
		uint8_t client[16];
		uint16_t port;
		int fd;

		/* A sixteenth of the table is for the guest's own connections. */
		if (in->pending >= e->cfg.pending_max || !eg_fd_room(e) ||
		    e->used - e->tw_lru.n + e->nflows / 16 >= e->nflows)
			return -1;
		fd = accept4(in->l[slot].fd, &from.any, &len, SOCK_NONBLOCK | SOCK_CLOEXEC);
		if (fd >= 0) {
			if (inbound_client(&from, client, &port))
				close(fd); /* no address: it is gone already */
			else
				tcp_accepted(e, slot, fd, client, port);
			continue;
		}
		switch (errno) {
		case EAGAIN:
		case EINVAL: /* shut down by somebody who has the socket too */
		case EBADF:
			return 0;
		case EMFILE:
		case ENFILE:
		case ENOBUFS:
		case ENOMEM:
			in->retry_at = e->s->now + IN_RETRY_NS;
			return -1;
		}
		/* accept(2): errors of the new connection, the next one may be fine */
	}
	return 1;
}

static int serve(struct egress *e, int which)
{
	struct inbound *in = e->in;
	int did = 0;

	for (uint32_t n = 0; n < IN_TURN; n++) {
		uint32_t slot = ready_pop(in, &in->ready[which]);
		int r;

		if (slot == EG_NONE)
			break;
		r = which ? udp_listen_work(e, slot) : accept_some(e, slot);
		if (r < 0) {
			ready_push(in, slot, 1);
			break;
		}
		did = 1;
		if (r > 0)
			ready_push(in, slot, 0);
	}
	return did;
}

int inbound_turn(struct egress *e)
{
	struct inbound *in = e->in;
	int did = 0;

	if (in->ready[0].head == EG_NONE && in->ready[1].head == EG_NONE)
		return 0;
	if (e->s->draining) /* no new work */
		return 0;
	if (in->retry_at <= e->s->now)
		in->retry_at = UINT64_MAX;
	if (in->retry_at == UINT64_MAX)
		did |= serve(e, 0);
	if (!eg_backlog(e))
		did |= serve(e, 1);
	return did;
}

uint64_t inbound_deadline(const struct egress *e)
{
	return e->in->ready[0].head != EG_NONE ? e->in->retry_at : UINT64_MAX;
}

void inbound_dropped(struct egress *e, uint32_t i)
{
	struct inbound *in = e->in;
	struct in_flow *x = &in->flow[i];

	if (!x->serial)
		return;
	if (e->priv[i].proto == RN_IPPROTO_UDP) {
		uint32_t *link = &in->hash[x->bucket];

		while (*link != EG_NONE && *link != i)
			link = &in->flow[*link].hash_next;
		if (*link == i) {
			*link = x->hash_next;
			in->l[x->slot].nflows--;
		}
	}
	x->serial = 0;
}

/* --- the guest's addresses --- */

static struct in_guest *known(struct egress *e, const uint8_t ip[4])
{
	struct inbound *in = e->in;

	for (uint32_t k = 0; k < IN_GUESTS; k++)
		if (in->guest[k].used && !memcmp(in->guest[k].ip, ip, 4))
			return &in->guest[k];
	return NULL;
}

/* Connections whose SYN waits for this address. */
static void answered(struct egress *e, const uint8_t ip[4])
{
	for (uint32_t i = 0; e->in->nasked && i < e->fresh; i++)
		if (e->priv[i].proto == RN_IPPROTO_TCP && e->in->flow[i].serial && !memcmp(eg_flow(e, i)->guest_addr + 12, ip, 4))
			tcp_in_mac(e, i);
}

void inbound_learn(struct egress *e, const uint8_t ip[4], const uint8_t mac[6])
{
	struct inbound *in = e->in;
	struct in_guest *g = &in->guest[in->last];

	if (RN_LIKELY(g->used && !memcmp(g->ip, ip, 4) && !memcmp(g->mac, mac, 6)))
		return;
	g = known(e, ip);
	if (!g) { /* in turn: a guest that makes addresses up loses its real one until it is asked again */
		g = &in->guest[in->next_guest];
		in->next_guest = (in->next_guest + 1) % IN_GUESTS;
		g->used = 1;
		memcpy(g->ip, ip, 4);
	}
	memcpy(g->mac, mac, 6);
	in->last = (uint32_t)(g - in->guest);
	if (in->nasked)
		answered(e, ip);
}

const uint8_t *inbound_mac(struct egress *e, const uint8_t ip[4])
{
	const struct in_guest *g = known(e, ip);

	return g ? g->mac : NULL;
}

void inbound_arp(struct egress *e, const uint8_t *eth, uint32_t len)
{
	const uint8_t *arp = eth + RN_ETH_HLEN, *spa = arp + RN_ARP_SPA;

	/* classify has seen that it is Ethernet and IPv4 and a reply to the gateway; what is used is checked again. */
	if (len < RN_ETH_HLEN + RN_ARP_LEN || rn_get16(arp + RN_ARP_OP) != RN_ARP_REPLY || (arp[RN_ARP_SHA] & 1) ||
	    !e->in->asked_ns || memcmp(spa, e->in->asked4, 4))
		return; /* not what was asked last */
	inbound_learn(e, spa, arp + RN_ARP_SHA);
}

int inbound_ask(struct egress *e, const uint8_t ip[4])
{
	struct inbound *in = e->in;
	struct rn_buf *b;
	uint8_t *eth, *arp;

	if (in->asked_ns && e->s->now - in->asked_ns < IN_ASK_NS && !memcmp(in->asked4, ip, 4))
		return 0;
	b = eg_out_buf(e, RN_SMALL);
	if (!b)
		return -1;
	in->asked_ns = e->s->now;
	memcpy(in->asked4, ip, 4);
	eth = eg_eth(b);
	arp = eth + RN_ETH_HLEN;
	memset(eth, 0xff, 6);
	memcpy(eth + 6, e->cfg.gateway_mac, 6);
	rn_put16(eth + 12, RN_ETHERTYPE_ARP);
	memset(arp, 0, RN_ARP_LEN);
	rn_put16(arp + RN_ARP_HTYPE, RN_ARP_ETHERNET);
	rn_put16(arp + RN_ARP_PTYPE, RN_ETHERTYPE_IPV4);
	arp[RN_ARP_HLEN] = 6;
	arp[RN_ARP_PLEN] = 4;
	rn_put16(arp + RN_ARP_OP, RN_ARP_REQUEST);
	memcpy(arp + RN_ARP_SHA, e->cfg.gateway_mac, 6);
	memcpy(arp + RN_ARP_SPA, e->cfg.gateway4, 4);
	memcpy(arp + RN_ARP_TPA, ip, 4);
	e->s->c[RN_C_arp_requests]++;
	eg_emit(e, b, eth, RN_ETH_HLEN + RN_ARP_LEN, NULL);
	return 0;
}

/* --- tuples --- */

void inbound_guest(const struct egress *e, const struct in_listener *l, uint8_t ip[4])
{
	static const uint8_t any[4];
	const struct inbound *in = e->in;

	if (memcmp(l->guest4, any, 4)) {
		memcpy(ip, l->guest4, 4);
		return;
	}
	memcpy(ip, e->cfg.guest4, 4);
	if (!in->guest[in->last].used || known((struct egress *)e, ip))
		return;
	memcpy(ip, in->guest[in->last].ip, 4);
}

int inbound_client(const union in_sockaddr *from, uint8_t client[16], uint16_t *port)
{
	switch (from->any.sa_family) {
	case AF_INET: {
		uint8_t v4[4];

		memcpy(v4, &from->v4.sin_addr, 4);
		rn_addr_from4(client, v4);
		*port = ntohs(from->v4.sin_port);
		return 0;
	}
	case AF_INET6:
		memcpy(client, &from->v6.sin6_addr, 16);
		*port = ntohs(from->v6.sin6_port);
		return 0;
	}
	return -EAFNOSUPPORT;
}

void inbound_peer(const struct egress *e, const uint8_t client16[16], uint8_t peer[4])
{
	const uint8_t *client = rn_addr_is4(client16) ? client16 + 12 : e->cfg.gateway4;
	uint32_t mask = e->cfg.prefix ? 0xffffffffu << (32 - e->cfg.prefix) : 0xffffffffu;
	int local = !((rn_get32(client) ^ rn_get32(e->cfg.gateway4)) & mask);

	/* 0, loopback, multicast and reserved: no packet may have them for a destination (RFC 1122 3.2.1.3) */
	if (e->cfg.as_gateway || local || client[0] == 0 || client[0] == 127 || client[0] >= 224)
		client = e->cfg.gateway4;
	memcpy(peer, client, 4);
}

static int usable(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport, const uint8_t peer[16],
		  uint16_t port)
{
	/* The guest's datagrams to these go to services (rn_parse.c). */
	if (proto == RN_IPPROTO_UDP &&
	    (port == RN_PORT_DHCPS || (port == RN_PORT_DNS && !memcmp(peer + 12, e->cfg.gateway4, 4))))
		return 0;
	return port && eg_find(e, proto, guest, gport, peer, port) == EG_NONE;
}

uint16_t inbound_port(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport, const uint8_t peer[16],
		      uint16_t want)
{
	if (usable(e, proto, guest, gport, peer, want))
		return want;
	for (uint32_t k = 0; k < IN_PORT_TRIES; k++) {
		uint16_t port = (uint16_t)(IN_PORT_MIN + eg_random(e) % (65536u - IN_PORT_MIN));

		if (usable(e, proto, guest, gport, peer, port))
			return port;
	}
	return 0;
}

int inbound_icmp(struct egress *e, const struct eg_frame *f)
{
	const uint8_t *ip = f->payload, *l4;
	uint8_t guest[16], peer[16], proto;
	uint32_t hlen, i;

	/* RFC 792: the header and 8 bytes, which are the ports and TCP's sequence number */
	if (f->l4[0] != RN_ICMP_UNREACH || f->payload_len < RN_IP4_HLEN + 8u || ip[0] >> 4 != 4)
		return 0;
	hlen = (ip[0] & 0x0fu) * 4u;
	if (hlen < RN_IP4_HLEN || f->payload_len < hlen + 8u || (rn_get16(ip + RN_IP4_FRAG) & RN_IP4_OFFMASK))
		return 0;
	l4 = ip + hlen;
	proto = ip[RN_IP4_PROTO];
	if (proto != RN_IPPROTO_TCP && proto != RN_IPPROTO_UDP)
		return 0;
	rn_addr_from4(guest, ip + RN_IP4_DST);
	rn_addr_from4(peer, ip + RN_IP4_SRC);
	i = eg_find(e, proto, guest, rn_get16(l4 + RN_TCP_DPORT), peer, rn_get16(l4 + RN_TCP_SPORT));
	if (i == EG_NONE || !e->in->flow[i].serial)
		return 0;
	if (proto == RN_IPPROTO_TCP)
		return tcp_in_refused(e, i, rn_get32(l4 + RN_TCP_SEQ));
	e->s->c[RN_C_udp_inbound_refused]++; /* the peer cannot be told: its own kernel would have to say it */
	return 1;
}
