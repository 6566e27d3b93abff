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
#include <sys/uio.h>

union pktinfo {
	char raw[CMSG_SPACE(sizeof(struct in_pktinfo))];
	struct cmsghdr align;
};

static uint32_t bucket(const struct egress *e, uint32_t serial, const struct sockaddr_in *peer, struct in_addr local)
{
	uint8_t key[14];

	memcpy(key, &serial, 4);
	memcpy(key + 4, &peer->sin_addr, 4);
	memcpy(key + 8, &local, 4);
	memcpy(key + 12, &peer->sin_port, 2);
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

static uint32_t new_mapping(struct egress *e, uint32_t slot, const struct sockaddr_in *from, struct in_addr local,
			    uint32_t at)
{
	static const uint8_t unknown[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };
	struct inbound *in = e->in;
	struct in_listener *l = &in->l[slot];
	uint8_t g4[4], c4[4], p4[4], guest[16], peer[16];
	const uint8_t *mac;
	uint16_t port;
	uint32_t i;

	while (in->lru.n >= e->cfg.udp_max)
		evict(e);
	if (e->free_head == EG_NONE && e->tw_lru.head == EG_NONE && !evict(e))
		return EG_NONE;
	inbound_guest(e, l, g4);
	memcpy(c4, &from->sin_addr, 4);
	inbound_peer(e, c4, p4);
	rn_addr_from4(guest, g4);
	rn_addr_from4(peer, p4);
	port = inbound_port(e, RN_IPPROTO_UDP, guest, l->guest_port, peer, ntohs(from->sin_port));
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
		.peer = *from,
		.local = local,
	};
	in->hash[at] = i;
	l->nflows++;
	e->s->c[RN_C_udp_inbound_mappings]++;
	return i;
}

/* Does the policy deny this peer? It cannot be told: its own kernel would have to say it. */
static int denied(struct egress *e, const struct in_listener *l, const struct sockaddr_in *from)
{
	uint8_t g4[4], c4[4], guest[16], client[16];

	if (!e->policy)
		return 0;
	inbound_guest(e, l, g4);
	memcpy(c4, &from->sin_addr, 4);
	rn_addr_from4(guest, g4);
	rn_addr_from4(client, c4);
	return policy_denied_in(e, RN_IPPROTO_UDP, guest, l->guest_port, client, ntohs(from->sin_port));
}

/* The mapping of a peer, made if there is none; EG_NONE, counted, if there can be none. */
static uint32_t mapping(struct egress *e, uint32_t slot, const struct sockaddr_in *from, struct in_addr local)
{
	struct inbound *in = e->in;
	uint32_t serial = in->l[slot].serial, at = bucket(e, serial, from, local), i;

	for (i = in->hash[at]; i != EG_NONE; i = in->flow[i].hash_next) {
		const struct in_flow *x = &in->flow[i];

		if (x->serial == serial && x->peer.sin_port == from->sin_port &&
		    x->peer.sin_addr.s_addr == from->sin_addr.s_addr && x->local.s_addr == local.s_addr)
			return i;
	}
	if (denied(e, &in->l[slot], from))
		return EG_NONE;
	i = new_mapping(e, slot, from, local, at);
	if (i == EG_NONE)
		e->s->c[RN_C_drop_udp_table]++;
	return i;
}

/* Our address that the datagram was sent to. */
static struct in_addr local_of(struct msghdr *m)
{
	struct in_addr any = { INADDR_ANY };

	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
		struct in_pktinfo info;

		if (c->cmsg_level != IPPROTO_IP || c->cmsg_type != IP_PKTINFO || c->cmsg_len < CMSG_LEN(sizeof(info)))
			continue;
		memcpy(&info, CMSG_DATA(c), sizeof(info));
		return info.ipi_spec_dst;
	}
	return any;
}

int udp_listen_work(struct egress *e, uint32_t slot)
{
	struct in_listener *l = &e->in->l[slot];
	struct udp_state *u = e->udp;
	union pktinfo control[UDP_BURST];
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

		if (u->msg[k].msg_hdr.msg_namelen >= sizeof(u->from[k]) && u->from[k].sin_family == AF_INET) /* it is */
			i = mapping(e, slot, &u->from[k], local_of(&u->msg[k].msg_hdr));
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
	struct iovec iov = { (void *)(uintptr_t)f->payload, f->payload_len };
	union pktinfo control = { 0 };
	struct msghdr m = { .msg_name = &x->peer, .msg_namelen = sizeof(x->peer), .msg_iov = &iov, .msg_iovlen = 1,
			    .msg_control = &control, .msg_controllen = sizeof(control) };
	struct in_pktinfo info = { .ipi_spec_dst = x->local };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);

	c->cmsg_level = IPPROTO_IP;
	c->cmsg_type = IP_PKTINFO;
	c->cmsg_len = CMSG_LEN(sizeof(info));
	memcpy(CMSG_DATA(c), &info, sizeof(info));
	memcpy(fl->guest_mac, f->eth + 6, 6);
	udp_refresh(e, i, 1);
	if (sendmsg(e->in->l[x->slot].fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
		e->s->c[RN_C_drop_udp_send]++;
		return;
	}
	fl->up.bytes += f->payload_len;
	fl->up.packets++;
	e->s->c[RN_C_udp_up]++;
}
