/* rn_parse.c - the rules a frame from the guest must meet.
 *
 * The guest is hostile: nothing it says of lengths, checksums or addresses is believed. The checks come
 * in the order of the headers, and the first that fails names the drop:
 *
 *   Ethernet  destination is the gateway's MAC, broadcast or multicast; source is a unicast MAC that is
 *             not the gateway's; EtherType is IPv4 or ARP.
 *   IPv4      version, header length, total length, header checksum, TTL, options (RFC 791 3.1; no source
 *             routes, RFC 7126 4.3, 4.4); source in the guest's subnet and not ours (RFC 2827), except
 *             0.0.0.0 of a DHCP client; destination a unicast address somebody can have, except the
 *             broadcasts of DHCP; protocol TCP, UDP or ICMP.
 *   L4        header and lengths fit (RFC 9293 3.1, RFC 768, RFC 792); checksum right, unless the
 *             virtio-net header says it is partial; TCP flags a stack can send.
 *
 * A super-frame (virtio-net header with a GSO type) is TCP over IPv4, or a train of UDP datagrams over IPv4: at most
 * RN_USO_DATAGRAMS_MAX of them, so that no frame makes more work than Linux's own can.
 *
 * Then: UDP to port 67 of the gateway or a broadcast (DHCP) and to port 53 of the gateway (DNS) goes to
 * services, all else to egress. TCP to gateway:53 goes to egress too, which bridges it to services.
 *
 * Limits: no IPv6 and no VLANs yet, both counted. Fragments get the checks up to the protocol here; the
 * rest is done when the datagram is whole and comes through here again.
 */
#include "rn_parse.h"

#include <errno.h>

#include "rn_csum.h"
#include "rn_session.h"
#include "rn_uso.h"

#define IPOPT_END 0u  /* RFC 791 3.1 */
#define IPOPT_NOOP 1u
#define IPOPT_LSRR 131u
#define IPOPT_SSRR 137u

static const int verdict_counter[] = {
	[RN_V_BRIDGE] = RN_C_to_bridge,
	[RN_V_SERVICE] = RN_C_to_services,
	[RN_V_ARP] = RN_C_arp_replies,
	[RN_V_ARP_IGNORED] = RN_C_arp_ignored,
	[RN_V_FRAGMENT] = RN_C_fragments_in,
	[RN_V_RUNT] = RN_C_drop_bad_descriptor, /* guest_tx hands on no runts */
	[RN_V_NOT_FOR_US] = RN_C_drop_not_for_us,
	[RN_V_BAD_SOURCE_MAC] = RN_C_drop_bad_source_mac,
	[RN_V_VLAN] = RN_C_drop_vlan,
	[RN_V_IPV6] = RN_C_drop_ipv6,
	[RN_V_ETHERTYPE] = RN_C_drop_unknown_ethertype,
	[RN_V_BAD_ARP] = RN_C_drop_bad_arp,
	[RN_V_IP_TRUNCATED] = RN_C_drop_ip_truncated,
	[RN_V_IP_HEADER] = RN_C_drop_ip_header,
	[RN_V_IP_CHECKSUM] = RN_C_drop_ip_checksum,
	[RN_V_IP_TTL] = RN_C_drop_ip_ttl,
	[RN_V_IP_OPTIONS] = RN_C_drop_ip_options,
	[RN_V_SPOOFED] = RN_C_drop_spoofed_source,
	[RN_V_BAD_DESTINATION] = RN_C_drop_bad_destination,
	[RN_V_NO_SUCH_HOST] = RN_C_drop_no_such_host,
	[RN_V_IP_PROTOCOL] = RN_C_drop_ip_protocol,
	[RN_V_GSO_MISMATCH] = RN_C_drop_gso_mismatch,
	[RN_V_L4_TRUNCATED] = RN_C_drop_l4_truncated,
	[RN_V_L4_CHECKSUM] = RN_C_drop_l4_checksum,
	[RN_V_TCP_FLAGS] = RN_C_drop_tcp_flags,
};
static const char *const verdict_name[] = {
	[RN_V_BRIDGE] = "to_bridge",
	[RN_V_SERVICE] = "to_services",
	[RN_V_ARP] = "arp_replies",
	[RN_V_ARP_IGNORED] = "arp_ignored",
	[RN_V_FRAGMENT] = "fragments_in",
	[RN_V_RUNT] = "drop_bad_descriptor",
	[RN_V_NOT_FOR_US] = "drop_not_for_us",
	[RN_V_BAD_SOURCE_MAC] = "drop_bad_source_mac",
	[RN_V_VLAN] = "drop_vlan",
	[RN_V_IPV6] = "drop_ipv6",
	[RN_V_ETHERTYPE] = "drop_unknown_ethertype",
	[RN_V_BAD_ARP] = "drop_bad_arp",
	[RN_V_IP_TRUNCATED] = "drop_ip_truncated",
	[RN_V_IP_HEADER] = "drop_ip_header",
	[RN_V_IP_CHECKSUM] = "drop_ip_checksum",
	[RN_V_IP_TTL] = "drop_ip_ttl",
	[RN_V_IP_OPTIONS] = "drop_ip_options",
	[RN_V_SPOOFED] = "drop_spoofed_source",
	[RN_V_BAD_DESTINATION] = "drop_bad_destination",
	[RN_V_NO_SUCH_HOST] = "drop_no_such_host",
	[RN_V_IP_PROTOCOL] = "drop_ip_protocol",
	[RN_V_GSO_MISMATCH] = "drop_gso_mismatch",
	[RN_V_L4_TRUNCATED] = "drop_l4_truncated",
	[RN_V_L4_CHECKSUM] = "drop_l4_checksum",
	[RN_V_TCP_FLAGS] = "drop_tcp_flags",
};
_Static_assert(sizeof(verdict_counter) / sizeof(verdict_counter[0]) == RN_NVERDICTS, "a counter each");
_Static_assert(sizeof(verdict_name) / sizeof(verdict_name[0]) == RN_NVERDICTS, "a name each");

int rn_verdict_counter(int verdict)
{
	return verdict >= 0 && verdict < RN_NVERDICTS ? verdict_counter[verdict] : -1;
}

const char *rn_verdict_name(int verdict)
{
	return verdict >= 0 && verdict < RN_NVERDICTS ? verdict_name[verdict] : NULL;
}

int classify_config_check(const struct classify_config *cfg)
{
	if (cfg->prefix < 8 || cfg->prefix > 30 || !rn_in_subnet(cfg, cfg->gateway4))
		return -EINVAL;
	if ((cfg->gateway_mac[0] & 1) || !memcmp(cfg->gateway_mac, "\0\0\0\0\0\0", 6))
		return -EINVAL;
	return 0;
}

int rn_vnet_check(const struct rn_vnet_hdr *h, uint32_t len)
{
	uint8_t type = h->gso_type & (uint8_t)~RN_VNET_GSO_ECN;

	/* RSC_INFO and whatever comes later were not negotiated. */
	if (h->flags & ~(RN_VNET_NEEDS_CSUM | RN_VNET_DATA_VALID))
		return 0;
	if (h->flags & RN_VNET_NEEDS_CSUM) {
		/* Both fields are the guest's: 32-bit sums of 16-bit values do not wrap. */
		if (h->csum_start < RN_ETH_HLEN || (uint32_t)h->csum_start + h->csum_offset + 2u > len)
			return 0;
	}
	if (h->gso_type == RN_VNET_GSO_NONE)
		return 1;
	/* UFO was not negotiated; ECN is a modifier of a TCP type (virtio 1.2 5.1.6.2). */
	if (type != RN_VNET_GSO_TCPV4 && type != RN_VNET_GSO_TCPV6 && h->gso_type != RN_VNET_GSO_UDP_L4)
		return 0;
	return (h->flags & RN_VNET_NEEDS_CSUM) && h->gso_size && h->hdr_len <= len;
}

int rn_vnet_ok(const uint8_t *vnet, uint32_t len)
{
	struct rn_vnet_hdr h;

	memcpy(&h, vnet, sizeof(h));
	return rn_vnet_check(&h, len);
}

/* RFC 791 3.1: a list of one-byte options and of type-length-value ones, in the header's last bytes. */
static int options_ok(const uint8_t *opt, uint32_t len)
{
	uint32_t i = 0;

	while (i < len && opt[i] != IPOPT_END) {
		uint32_t n;

		if (opt[i] == IPOPT_NOOP) {
			i++;
			continue;
		}
		if (opt[i] == IPOPT_LSRR || opt[i] == IPOPT_SSRR)
			return 0; /* RFC 7126 4.3.5, 4.4.5: drop */
		if (len - i < 2)
			return 0;
		n = opt[i + 1];
		if (n < 2 || n > len - i)
			return 0;
		i += n;
	}
	return 1;
}

/* Is the sum of @len bytes, with @start, right? A correct one folds to all ones (RFC 1071 1). */
static int csum_ok(uint64_t start, const uint8_t *p, uint32_t len)
{
	return rn_csum_fold(rn_csum_add(start, p, len)) == 0xffff;
}

/* The virtio-net header vouches for just one checksum, the one at start + offset. */
static int csum_partial(const struct rn_vnet_hdr *vnet, uint32_t l4_off, uint32_t field)
{
	return vnet && (vnet->flags & RN_VNET_NEEDS_CSUM) && vnet->csum_start == l4_off && vnet->csum_offset == field;
}

static enum rn_verdict parse_tcp(const struct rn_view *v, const struct rn_vnet_hdr *vnet, const uint8_t *ip,
				 struct rn_parsed *out)
{
	const uint8_t *tcp = rn_view_get(v, out->l4_off, RN_TCP_HLEN);
	uint32_t hlen;
	uint8_t flags;

	if (!tcp || out->l4_len < RN_TCP_HLEN)
		return RN_V_L4_TRUNCATED;
	hlen = (tcp[RN_TCP_OFF] >> 4) * 4u; /* RFC 9293 3.1: data offset */
	if (hlen < RN_TCP_HLEN || hlen > out->l4_len)
		return RN_V_L4_TRUNCATED;
	out->payload_off = out->l4_off + hlen;
	out->payload_len = out->l4_len - hlen;
	if (!csum_partial(vnet, out->l4_off, RN_TCP_SUM) &&
	    !csum_ok(rn_csum_pseudo4(ip + RN_IP4_SRC, ip + RN_IP4_DST, RN_IPPROTO_TCP, out->l4_len), tcp, out->l4_len))
		return RN_V_L4_CHECKSUM;
	flags = tcp[RN_TCP_FLAGS];
	/* RFC 9293 3.5 has no segment with none of these, nor one that opens and ends at once. */
	if (!(flags & (RN_TH_SYN | RN_TH_ACK | RN_TH_RST | RN_TH_FIN)) ||
	    ((flags & RN_TH_SYN) && (flags & (RN_TH_FIN | RN_TH_RST))))
		return RN_V_TCP_FLAGS;
	return RN_V_BRIDGE;
}

static enum rn_verdict parse_udp(const struct rn_view *v, const struct rn_vnet_hdr *vnet, const uint8_t *ip,
				 struct rn_parsed *out)
{
	const uint8_t *udp = rn_view_get(v, out->l4_off, RN_UDP_HLEN);
	uint32_t len;

	if (!udp || out->l4_len < RN_UDP_HLEN)
		return RN_V_L4_TRUNCATED;
	len = rn_get16(udp + RN_UDP_LEN);
	if (len < RN_UDP_HLEN || len > out->l4_len)
		return RN_V_L4_TRUNCATED;
	out->payload_off = out->l4_off + RN_UDP_HLEN;
	out->payload_len = len - RN_UDP_HLEN;
	if (vnet && vnet->gso_type == RN_VNET_GSO_UDP_L4) {
		/* The lengths are those of the whole train, as Linux has them; and no more of it than Linux sends. */
		if (len != out->l4_len || rn_uso_count(out->payload_len, vnet->gso_size) > RN_USO_DATAGRAMS_MAX)
			return RN_V_GSO_MISMATCH;
		out->each = out->payload_len > vnet->gso_size ? vnet->gso_size : 0;
	}
	/* RFC 768: a checksum field of zero means that none was made. */
	if ((udp[RN_UDP_SUM] | udp[RN_UDP_SUM + 1]) && !csum_partial(vnet, out->l4_off, RN_UDP_SUM) &&
	    !csum_ok(rn_csum_pseudo4(ip + RN_IP4_SRC, ip + RN_IP4_DST, RN_IPPROTO_UDP, len), udp, len))
		return RN_V_L4_CHECKSUM;
	return RN_V_BRIDGE;
}

static enum rn_verdict parse_icmp(const struct rn_view *v, struct rn_parsed *out)
{
	const uint8_t *icmp = rn_view_get(v, out->l4_off, out->l4_len);

	if (!icmp || out->l4_len < RN_ICMP_HLEN)
		return RN_V_L4_TRUNCATED;
	out->payload_off = out->l4_off + RN_ICMP_HLEN;
	out->payload_len = out->l4_len - RN_ICMP_HLEN;
	return csum_ok(0, icmp, out->l4_len) ? RN_V_BRIDGE : RN_V_L4_CHECKSUM;
}

/* RFC 1122 3.2.2: no ICMP error about an ICMP error. Of the types, only these ask for something. */
static int icmp_is_query(uint8_t type)
{
	return type == RN_ICMP_ECHO || type == 13 || type == 15 || type == 17;
}

enum where { TO_GATEWAY, TO_BROADCAST, TO_SUBNET, TO_WORLD, TO_NOBODY };

/* Who has this destination? RFC 6890 2.2.2 lists the addresses nobody has. */
static enum where destination(const struct classify_config *cfg, const uint8_t src[4], const uint8_t dst[4])
{
	uint32_t mask = UINT32_MAX << (32 - cfg->prefix);
	uint32_t d = rn_get32(dst);

	if (!memcmp(dst, cfg->gateway4, 4))
		return TO_GATEWAY;
	if (d == UINT32_MAX)
		return TO_BROADCAST;
	if (rn_in_subnet(cfg, dst)) {
		if ((d & ~mask) == ~mask)
			return TO_BROADCAST;
		/* The network's own address (RFC 1812 5.3.5.1), or the sender's, which never leaves it. */
		if (!(d & ~mask) || !memcmp(src, dst, 4))
			return TO_NOBODY;
		return TO_SUBNET;
	}
	if (dst[0] == 0 || dst[0] == 127 || dst[0] >= 224)
		return TO_NOBODY;
	return TO_WORLD;
}

static int source_ok(const struct classify_config *cfg, const uint8_t src[4])
{
	uint32_t host = ~(UINT32_MAX << (32 - cfg->prefix));
	uint32_t h = rn_get32(src) & host;

	return rn_in_subnet(cfg, src) && h != 0 && h != host && memcmp(src, cfg->gateway4, 4);
}

static enum rn_verdict parse_ip4(const struct rn_view *frame, const struct rn_vnet_hdr *vnet,
				 const struct classify_config *cfg, struct rn_parsed *out)
{
	const uint8_t *eth = frame->data;
	const uint8_t *ip = rn_view_get(frame, RN_ETH_HLEN, RN_IP4_HLEN);
	uint32_t hlen, total, frag;
	int dhcp = 0, dns = 0;
	enum rn_verdict verdict;
	struct rn_view v = *frame;
	const uint8_t *ports;
	enum where where;

	if (!ip)
		return RN_V_IP_TRUNCATED;
	hlen = (ip[0] & 0x0f) * 4u;
	total = rn_get16(ip + RN_IP4_LEN);
	if (ip[0] >> 4 != 4 || hlen < RN_IP4_HLEN || total < hlen)
		return RN_V_IP_HEADER;
	if (!rn_view_get(frame, RN_ETH_HLEN, total))
		return RN_V_IP_TRUNCATED;
	/* From here the frame ends where the packet ends: Ethernet pads to 60 bytes (IEEE 802.3 3.2.8). */
	v.len = RN_ETH_HLEN + total;
	out->frame_len = v.len;
	out->l3_off = RN_ETH_HLEN;
	out->l4_off = RN_ETH_HLEN + hlen;
	out->l4_len = total - hlen;
	out->ip_proto = ip[RN_IP4_PROTO];
	out->ttl = ip[RN_IP4_TTL];

	if (!csum_ok(0, ip, hlen))
		return RN_V_IP_CHECKSUM; /* RFC 1122 3.2.1.2 */
	if (!out->ttl)
		return RN_V_IP_TTL; /* RFC 1122 3.2.1.7 */
	if (!options_ok(ip + RN_IP4_HLEN, hlen - RN_IP4_HLEN))
		return RN_V_IP_OPTIONS;

	frag = rn_get16(ip + RN_IP4_FRAG);
	out->frag_off = (frag & RN_IP4_OFFMASK) * 8u;
	out->frag_more = !!(frag & RN_IP4_MF);
	/* Ports are read only of a whole packet; a DHCP broadcast in fragments is not served. */
	ports = out->frag_off || out->frag_more ? NULL : rn_view_get(&v, out->l4_off, 4);
	if (ports && out->ip_proto == RN_IPPROTO_UDP) {
		dhcp = rn_get16(ports + RN_UDP_DPORT) == RN_PORT_DHCPS;
		dns = rn_get16(ports + RN_UDP_DPORT) == RN_PORT_DNS;
	}

	where = destination(cfg, ip + RN_IP4_SRC, ip + RN_IP4_DST);
	if (!rn_get32(ip + RN_IP4_SRC)) {
		/* RFC 2131 4.1: a client without an address, and nobody else. */
		if (!dhcp || rn_get16(ports + RN_UDP_SPORT) != RN_PORT_DHCPC)
			return RN_V_SPOOFED;
		if (where != TO_BROADCAST && where != TO_GATEWAY)
			return RN_V_BAD_DESTINATION;
	} else if (!source_ok(cfg, ip + RN_IP4_SRC)) {
		return RN_V_SPOOFED;
	}

	if (where == TO_NOBODY || (where == TO_BROADCAST && !dhcp))
		return RN_V_BAD_DESTINATION;
	/* RFC 1122 3.3.6: a unicast address in a link-layer broadcast is not for anybody. */
	if ((eth[0] & 1) && where != TO_BROADCAST && !(dhcp && where == TO_GATEWAY))
		return RN_V_BAD_DESTINATION;

	/* RFC 1122 3.2.2: about a first fragment at most, sent by a host, to a host. */
	out->may_answer = where != TO_BROADCAST && !out->frag_off && rn_get32(ip + RN_IP4_SRC) != 0;
	if (out->ip_proto == RN_IPPROTO_ICMP) {
		const uint8_t *type = rn_view_get(&v, out->l4_off, 1);

		out->may_answer = out->may_answer && type && icmp_is_query(*type);
	}
	if (where == TO_SUBNET)
		return RN_V_NO_SUCH_HOST;
	if (out->ip_proto != RN_IPPROTO_TCP && out->ip_proto != RN_IPPROTO_UDP && out->ip_proto != RN_IPPROTO_ICMP)
		return RN_V_IP_PROTOCOL;

	if (vnet && vnet->gso_type != RN_VNET_GSO_NONE) {
		/* A super-frame is whole TCP or UDP over IPv4 whose checksum is left to us, or a lie. */
		int udp = vnet->gso_type == RN_VNET_GSO_UDP_L4;

		if ((!udp && (vnet->gso_type & (uint8_t)~RN_VNET_GSO_ECN) != RN_VNET_GSO_TCPV4) ||
		    out->ip_proto != (udp ? RN_IPPROTO_UDP : RN_IPPROTO_TCP) || out->frag_off || out->frag_more ||
		    !csum_partial(vnet, out->l4_off, udp ? RN_UDP_SUM : RN_TCP_SUM))
			return RN_V_GSO_MISMATCH;
	}
	if (out->frag_off || out->frag_more) {
		/* A checksum over the whole datagram cannot be left open in a part of it. */
		return vnet && (vnet->flags & RN_VNET_NEEDS_CSUM) ? RN_V_GSO_MISMATCH : RN_V_FRAGMENT;
	}

	switch (out->ip_proto) {
	case RN_IPPROTO_TCP:
		return parse_tcp(&v, vnet, ip, out);
	case RN_IPPROTO_UDP:
		verdict = parse_udp(&v, vnet, ip, out);
		if (verdict == RN_V_BRIDGE && ((dhcp && where != TO_WORLD) || (dns && where == TO_GATEWAY)))
			return RN_V_SERVICE;
		return verdict;
	default:
		return parse_icmp(&v, out);
	}
}

/* RFC 826, Ethernet/IPv4. Only a request for the gateway's address gets an answer (arp.c says why). */
static enum rn_verdict parse_arp(const struct rn_view *v, const struct classify_config *cfg)
{
	const uint8_t *arp = rn_view_get(v, RN_ETH_HLEN, RN_ARP_LEN);

	if (!arp || rn_get16(arp + RN_ARP_HTYPE) != RN_ARP_ETHERNET ||
	    rn_get16(arp + RN_ARP_PTYPE) != RN_ETHERTYPE_IPV4 || arp[RN_ARP_HLEN] != 6 || arp[RN_ARP_PLEN] != 4)
		return RN_V_BAD_ARP;
	if (arp[RN_ARP_SHA] & 1) /* the reply would go to a group */
		return RN_V_BAD_ARP;
	if (rn_get16(arp + RN_ARP_OP) != RN_ARP_REQUEST || memcmp(arp + RN_ARP_TPA, cfg->gateway4, 4))
		return RN_V_ARP_IGNORED;
	/* Sender and target both the gateway: an announcement (RFC 5227 2.3) of what is not the guest's. */
	if (!memcmp(arp + RN_ARP_SPA, cfg->gateway4, 4))
		return RN_V_ARP_IGNORED;
	return RN_V_ARP;
}

enum rn_verdict rn_parse_frame(const struct rn_view *v, const struct rn_vnet_hdr *vnet,
			       const struct classify_config *cfg, struct rn_parsed *out)
{
	const uint8_t *eth = rn_view_get(v, 0, RN_ETH_HLEN);

	memset(out, 0, sizeof(*out));
	out->frame_len = v->len;
	if (!eth)
		return RN_V_RUNT;
	/* A group address cannot send, and a guest that sends as the gateway would get its own answers. */
	if ((eth[6] & 1) || !memcmp(eth + 6, cfg->gateway_mac, 6))
		return RN_V_BAD_SOURCE_MAC;
	if (!(eth[0] & 1) && memcmp(eth, cfg->gateway_mac, 6))
		return RN_V_NOT_FOR_US;
	switch (rn_get16(eth + 12)) {
	case RN_ETHERTYPE_IPV4:
		return parse_ip4(v, vnet, cfg, out);
	case RN_ETHERTYPE_ARP:
		return parse_arp(v, cfg);
	case RN_ETHERTYPE_VLAN:
	case RN_ETHERTYPE_QINQ:
		return RN_V_VLAN;
	case RN_ETHERTYPE_IPV6:
		return RN_V_IPV6;
	default:
		return RN_V_ETHERTYPE;
	}
}

int rn_parse_bytes(const uint8_t *frame, uint32_t len, const uint8_t *vnet, const struct classify_config *cfg,
		   struct rn_parsed *out)
{
	struct rn_view v = { .data = frame, .len = len };
	struct rn_vnet_hdr h;

	if (vnet)
		memcpy(&h, vnet, sizeof(h));
	return (int)rn_parse_frame(&v, vnet ? &h : NULL, cfg, out);
}
