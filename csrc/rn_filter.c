/* rn_filter.c - does a frame match a capture's filter? (contract: rn_filter.h)
 *
 * Reads headers only, each through rn_view_get(); a frame is whatever the guest sent. About 20 ns a frame.
 */
#include "rn_filter.h"

#include <string.h>

#include "rn_proto.h"
#include "rn_view.h"

#define VLAN_TAGS 2u	/* IEEE 802.1ad: at most these are looked behind */
#define EXTENSIONS 8u	/* IPv6 extension headers looked behind */
#define RN_IP6_HLEN 40u /* RFC 8200 3 */
#define RN_IPPROTO_ICMP6 58u

struct ends { /* what a frame says of itself */
	uint8_t src[16], dst[16];
	uint16_t sport, dport;
	uint8_t proto;
	uint8_t has_ports; /* of ICMP echo: both are the identifier */
};

/* Ports, or an echo's identifier, at @off. */
static void read_ports(const struct rn_view *v, uint32_t off, struct ends *e)
{
	const uint8_t *p;

	if (e->proto == RN_IPPROTO_TCP || e->proto == RN_IPPROTO_UDP) {
		p = rn_view_get(v, off, 4); /* RFC 9293 3.1, RFC 768: the first two words */
		if (!p)
			return;
		e->sport = rn_get16(p);
		e->dport = rn_get16(p + 2);
		e->has_ports = 1;
	} else if (e->proto == RN_IPPROTO_ICMP) {
		p = rn_view_get(v, off, RN_ICMP_HLEN);
		if (!p || (p[0] != RN_ICMP_ECHO && p[0] != RN_ICMP_ECHO_REPLY))
			return;
		e->sport = e->dport = rn_get16(p + 4); /* RFC 792: identifier */
		e->has_ports = 1;
	}
}

static int read_ip4(const struct rn_view *v, uint32_t off, struct ends *e)
{
	const uint8_t *ip = rn_view_get(v, off, RN_IP4_HLEN);

	if (!ip || ip[0] >> 4 != 4)
		return 0;
	rn_addr_from4(e->src, ip + RN_IP4_SRC);
	rn_addr_from4(e->dst, ip + RN_IP4_DST);
	e->proto = ip[RN_IP4_PROTO];
	if (!(rn_get16(ip + RN_IP4_FRAG) & RN_IP4_OFFMASK))
		read_ports(v, off + (ip[0] & 15u) * 4, e);
	return 1;
}

static int read_ip6(const struct rn_view *v, uint32_t off, struct ends *e)
{
	const uint8_t *ip = rn_view_get(v, off, RN_IP6_HLEN);
	uint8_t next;

	if (!ip || ip[0] >> 4 != 6)
		return 0;
	memcpy(e->src, ip + 8, 16);
	memcpy(e->dst, ip + 24, 16);
	next = ip[6];
	off += RN_IP6_HLEN;
	for (uint32_t i = 0; i < EXTENSIONS; i++) {
		const uint8_t *x;

		/* RFC 8200 4.1: hop-by-hop, routing, destination options; 4.5: fragment */
		if (next != 0 && next != 43 && next != 60 && next != 44)
			break;
		x = rn_view_get(v, off, 8);
		if (!x)
			return 1;
		if (next == 44 && rn_get16(x + 2) >> 3) { /* not the first fragment: what follows is no header */
			e->proto = x[0];
			return 1;
		}
		off += next == 44 ? 8u : (x[1] + 1u) * 8;
		next = x[0];
	}
	e->proto = next;
	read_ports(v, off, e);
	return 1;
}

static int read_arp(const struct rn_view *v, uint32_t off, struct ends *e)
{
	const uint8_t *arp = rn_view_get(v, off, RN_ARP_LEN);

	if (!arp)
		return 0;
	rn_addr_from4(e->src, arp + RN_ARP_SPA);
	rn_addr_from4(e->dst, arp + RN_ARP_TPA);
	return 1;
}

static int read_ends(const struct rn_view *v, struct ends *e)
{
	uint32_t off = RN_ETH_HLEN;
	const uint8_t *p = rn_view_get(v, off - 2, 2);

	for (uint32_t i = 0; p && i < VLAN_TAGS; i++) {
		uint16_t type = rn_get16(p);

		if (type != RN_ETHERTYPE_VLAN && type != RN_ETHERTYPE_QINQ)
			break;
		off += 4;
		p = rn_view_get(v, off - 2, 2);
	}
	if (!p)
		return 0;
	switch (rn_get16(p)) {
	case RN_ETHERTYPE_IPV4:
		return read_ip4(v, off, e);
	case RN_ETHERTYPE_IPV6:
		return read_ip6(v, off, e);
	case RN_ETHERTYPE_ARP:
		return read_arp(v, off, e);
	}
	return 0;
}

static int is_end(const uint8_t addr[16], uint16_t port, const uint8_t want[16], uint16_t want_port)
{
	return port == want_port && !memcmp(addr, want, 16);
}

/* The flow's frames, whichever way they go. */
static int is_flow(const struct rn_filter *f, const struct ends *e)
{
	int any = !(f->flags & RN_FILTER_FLOW_PEER);

	if (!e->has_ports)
		return 0;
	if (e->proto == RN_IPPROTO_ICMP) /* the peer has no port of its own */
		return e->sport == f->guest_port &&
		       ((!memcmp(e->src, f->guest, 16) && (any || !memcmp(e->dst, f->peer, 16))) ||
			(!memcmp(e->dst, f->guest, 16) && (any || !memcmp(e->src, f->peer, 16))));
	return (is_end(e->src, e->sport, f->guest, f->guest_port) &&
		(any || is_end(e->dst, e->dport, f->peer, f->peer_port))) ||
	       (is_end(e->dst, e->dport, f->guest, f->guest_port) &&
		(any || is_end(e->src, e->sport, f->peer, f->peer_port)));
}

int rn_filter_match(const struct rn_filter *f, const uint8_t *eth, uint32_t len)
{
	const struct rn_view v = { .data = eth, .len = len };
	struct ends e = { .has_ports = 0 };

	if (!f->flags)
		return 1;
	if (!read_ends(&v, &e))
		return 0;
	if ((f->flags & RN_FILTER_PROTO) && e.proto != f->proto &&
	    !(f->proto == RN_IPPROTO_ICMP && e.proto == RN_IPPROTO_ICMP6))
		return 0;
	if ((f->flags & RN_FILTER_HOST) && memcmp(e.src, f->host, 16) && memcmp(e.dst, f->host, 16))
		return 0;
	if ((f->flags & RN_FILTER_PORT) && !(e.has_ports && (e.sport == f->port || e.dport == f->port)))
		return 0;
	return !(f->flags & RN_FILTER_FLOW) || is_flow(f, &e);
}
