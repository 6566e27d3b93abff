/* udp_in.c - datagrams from outside: one mapping for each peer of a forward.
 *
 * A mapping is (rule, peer's address and port, our address it wrote to). To the guest it is one source address and
 * port as long as it lives, so that sessions work (QUIC, DTLS, games); what the guest sends there goes back
 * through the listener's socket, from the address the peer wrote to (IP_PKTINFO).
 *
 * Timeouts as for mappings of the guest (udp.c): 30 s until the guest answered, then 180 s of silence (RFC 4787 4.3).
 * cfg.udp_max bounds them, apart from the guest's own, so that a flood from outside costs only other outsiders; then
 * the least recently used goes. A mapping ends with its rule, whose socket it uses. If the same rule comes back, so
 * does the peer's port, since it is the peer's own where that is free.
 */
#include "inbound.h"
#include "policy.h"
#include "udp_internal.h"

#include <errno.h>
#include <stddef.h>
#include <sys/uio.h>

union pktinfo {
	char raw[CMSG_SPACE(sizeof(struct in6_pktinfo))];
	struct cmsghdr align;
};
_Static_assert(sizeof(struct in6_pktinfo) >= sizeof(struct in_pktinfo), "room for either");

struct from { /* of a datagram */
	union in_sockaddr peer;
	uint8_t client[16]; /* the peer's address, IPv4 mapped */
	uint16_t port;
	uint8_t local[16]; /* ours that it was sent to, likewise */
};

static uint32_t bucket(const struct egress *e, uint32_t serial, const struct from *f)
{
	uint8_t key[38];

	memcpy(key, &serial, 4);
	memcpy(key + 4, f->client, 16);
	memcpy(key + 20, f->local, 16);
	memcpy(key + 36, &f->port, 2);
	return (uint32_t)eg_siphash(e, key, sizeof(key)) & e->in->hash_mask;
}

static int evict(struct egress *e)
{
	if (e->in->lru.head == EG_NONE)
		return 0;
	eg_drop(e, e->in->lru.head);
	e->s->c[RN_C_udp_evicted]++;
	return 1;
}

static uint32_t new_mapping(struct egress *e, uint32_t slot, const struct from *from, uint32_t at)
{
	static const uint8_t unknown[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };
	struct inbound *in = e->in;
	struct in_listener *l = &in->l[slot];
	uint8_t g4[4], p4[4], guest[16], peer[16];
	const uint8_t *mac;
	uint16_t port;
	uint32_t i;

	while (in->lru.n >= e->cfg.udp_max)
		evict(e);
	if (eg_full(e) && e->tw_lru.head == EG_NONE && !evict(e))
		return EG_NONE;
	inbound_guest(e, l, g4);
	inbound_peer(e, from->client, p4);
	rn_addr_from4(guest, g4);
	rn_addr_from4(peer, p4);
	port = inbound_port(e, RN_IPPROTO_UDP, guest, l->guest_port, peer, from->port);
	if (!port)
		return EG_NONE;
	mac = inbound_mac(e, g4);
	i = eg_new(e, RN_IPPROTO_UDP, guest, l->guest_port, peer, port, mac ? mac : unknown);
	if (i == EG_NONE)
		return EG_NONE;
	in->flow[i] = (struct in_flow){
		.serial = l->serial,
		.slot = slot,
		.hash_next = in->hash[at],
		.bucket = at,
		.peer = from->peer,
	};
	memcpy(in->flow[i].local, from->local, 16);
	in->hash[at] = i;
	l->nflows++;
	e->s->c[RN_C_udp_inbound_mappings]++;
	return i;
}

/* Does the policy deny this peer? It cannot be told: its own kernel would have to say it. */
static int denied(struct egress *e, const struct in_listener *l, const struct from *from)
{
	uint8_t g4[4], guest[16];

	if (!e->policy)
		return 0;
	inbound_guest(e, l, g4);
	rn_addr_from4(guest, g4);
	return policy_denied_in(e, RN_IPPROTO_UDP, guest, l->guest_port, from->client, from->port);
}

/* The mapping of a peer, made if there is none; EG_NONE, counted, if there can be none. */
static uint32_t mapping(struct egress *e, uint32_t slot, const struct from *from)
{
	struct inbound *in = e->in;
	uint32_t serial = in->l[slot].serial, at = bucket(e, serial, from), i;

	for (i = in->hash[at]; i != EG_NONE; i = in->flow[i].hash_next) {
		const struct in_flow *x = &in->flow[i];
		uint8_t client[16];
		uint16_t port;

		if (x->serial == serial && !inbound_client(&x->peer, client, &port) && port == from->port &&
		    !memcmp(client, from->client, 16) && !memcmp(x->local, from->local, 16))
			return i;
	}
	if (denied(e, &in->l[slot], from))
		return EG_NONE;
	i = new_mapping(e, slot, from, at);
	if (i == EG_NONE)
		e->s->c[RN_C_drop_udp_table]++;
	return i;
}

/* Our address that the datagram was sent to. */
static void local_of(struct msghdr *m, uint8_t local[16])
{
	memset(local, 0, 16);
	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
		if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO &&
		    c->cmsg_len >= CMSG_LEN(sizeof(struct in_pktinfo))) {
			uint8_t v4[4];

			memcpy(v4, CMSG_DATA(c) + offsetof(struct in_pktinfo, ipi_spec_dst), 4);
			rn_addr_from4(local, v4);
		} else if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_PKTINFO &&
			   c->cmsg_len >= CMSG_LEN(sizeof(struct in6_pktinfo))) {
			memcpy(local, CMSG_DATA(c) + offsetof(struct in6_pktinfo, ipi6_addr), 16);
		}
	}
}

int udp_listen_work(struct egress *e, uint32_t slot)
{
	struct in_listener *l = &e->in->l[slot];
	struct udp_state *u = e->udp;
	union pktinfo control[UDP_BURST];
	struct from from[UDP_BURST];
	uint32_t n, room, seen_big = 0;
	int got;

	room = (uint32_t)rn_stage_room(e->s, RN_ROLE_GUEST, UDP_BURST);
	if (!room || eg_backlog(e))
		return -1;
	n = udp_prepare(e, l->big, room < UDP_BURST ? room : UDP_BURST);
	if (!n) {
		e->s->want_buf = 1;
		return -1;
	}
	for (uint32_t k = 0; k < n; k++) {
		u->msg[k].msg_hdr.msg_name = &from[k].peer;
		u->msg[k].msg_hdr.msg_namelen = sizeof(from[k].peer);
		u->msg[k].msg_hdr.msg_control = &control[k];
		u->msg[k].msg_hdr.msg_controllen = sizeof(control[k]);
	}
	got = recvmmsg(l->fd, u->msg, n, MSG_DONTWAIT, NULL);
	for (uint32_t k = got < 0 ? 0 : (uint32_t)got; k < n; k++)
		rn_buf_free(&e->s->pool, u->buf[k]);
	if (got < 0)
		return errno == EAGAIN ? 0 : 1; /* reading an error off cleared it */
	for (uint32_t k = 0; k < (uint32_t)got; k++) {
		uint32_t len = u->msg[k].msg_len, i = EG_NONE;
		struct rn_flow *f;

		if (!inbound_client(&from[k].peer, from[k].client, &from[k].port)) { /* it is of either family */
			local_of(&u->msg[k].msg_hdr, from[k].local);
			i = mapping(e, slot, &from[k]);
		}
		if (i == EG_NONE) {
			rn_buf_free(&e->s->pool, u->buf[k]);
			continue;
		}
		f = eg_flow(e, i);
		if (f->guest_mac[0] & 1) { /* still broadcast: which Linux takes, unlike TCP */
			const uint8_t *mac = inbound_mac(e, f->guest_addr + 12);

			if (mac)
				memcpy(f->guest_mac, mac, 6);
			else
				(void)inbound_ask(e, f->guest_addr + 12); /* no room: the next datagram asks */
		}
		if (len > UDP_SMALL_MAX && RN_IP4_HLEN + RN_UDP_HLEN + len <= e->cfg.mtu)
			seen_big = 1;
		udp_refresh(e, i, 0);
		e->s->c[RN_C_udp_inbound]++;
		udp_deliver(e, i, k, len, f->peer_addr + 12, f->peer_port);
	}
	l->big = (uint8_t)seen_big;
	return (uint32_t)got == n;
}

/* A datagram of the guest to the peer of a mapping. */
void udp_in_reply(struct egress *e, uint32_t i, const struct eg_frame *f)
{
	struct in_flow *x = &e->in->flow[i];
	struct rn_flow *fl = eg_flow(e, i);
	struct rn_uso what;
	union pktinfo control = { 0 };
	struct msghdr m = { .msg_name = &x->peer, .msg_control = &control,
			    .msg_controllen = sizeof(control) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);

	if (x->peer.any.sa_family == AF_INET6) { /* of a mapped address too: the kernel knows (ipv6(7)) */
		struct in6_pktinfo info = { 0 };

		memcpy(&info.ipi6_addr, x->local, 16);
		m.msg_namelen = sizeof(x->peer.v6);
		c->cmsg_level = IPPROTO_IPV6;
		c->cmsg_type = IPV6_PKTINFO;
		c->cmsg_len = CMSG_LEN(sizeof(info));
		memcpy(CMSG_DATA(c), &info, sizeof(info));
		m.msg_controllen = CMSG_SPACE(sizeof(info));
	} else {
		struct in_pktinfo info = { 0 };

		memcpy(&info.ipi_spec_dst, x->local + 12, 4);
		m.msg_namelen = sizeof(x->peer.v4);
		c->cmsg_level = IPPROTO_IP;
		c->cmsg_type = IP_PKTINFO;
		c->cmsg_len = CMSG_LEN(sizeof(info));
		memcpy(CMSG_DATA(c), &info, sizeof(info));
		m.msg_controllen = CMSG_SPACE(sizeof(info));
	}
	memcpy(fl->guest_mac, f->eth + 6, 6);
	udp_refresh(e, i, 1);
	rn_uso_send(e->in->l[x->slot].fd, &m, f->payload, f->payload_len, f->each, &what);
	(void)udp_sent(e, i, f, &what);
}
