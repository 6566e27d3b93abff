/* rn_proto.h - header layouts and numbers, with the RFC on the line. All multi-byte fields are in network
 * order; read and write them with rn_get16() and friends on bytes that rn_view_get() has checked.
 */
#ifndef RN_PROTO_H
#define RN_PROTO_H

#include "rn_layout.h"
#include <string.h>

static inline uint16_t rn_get16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}
static inline uint32_t rn_get32(const uint8_t *p)
{
	return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}
static inline void rn_put16(uint8_t *p, uint16_t v)
{
	p[0] = (uint8_t)(v >> 8);
	p[1] = (uint8_t)v;
}
static inline void rn_put32(uint8_t *p, uint32_t v)
{
	p[0] = (uint8_t)(v >> 24);
	p[1] = (uint8_t)(v >> 16);
	p[2] = (uint8_t)(v >> 8);
	p[3] = (uint8_t)v;
}

/* Ethernet II (IEEE 802.3 3.2): dst 0, src 6, type 12 */
#define RN_ETHERTYPE_IPV4 0x0800u
#define RN_ETHERTYPE_ARP 0x0806u
#define RN_ETHERTYPE_VLAN 0x8100u
#define RN_ETHERTYPE_QINQ 0x88a8u
#define RN_ETHERTYPE_IPV6 0x86ddu

/* IPv4 (RFC 791 3.1) */
#define RN_IP4_HLEN 20u
#define RN_IP4_TOS 1
#define RN_IP4_LEN 2
#define RN_IP4_ID 4
#define RN_IP4_FRAG 6 /* flags and fragment offset */
#define RN_IP4_TTL 8
#define RN_IP4_PROTO 9
#define RN_IP4_SUM 10
#define RN_IP4_SRC 12
#define RN_IP4_DST 16
#define RN_IP4_DF 0x4000u
#define RN_IP4_MF 0x2000u
#define RN_IP4_OFFMASK 0x1fffu /* in units of 8 bytes */
#define RN_IPPROTO_ICMP 1u
#define RN_IPPROTO_TCP 6u
#define RN_IPPROTO_UDP 17u

/* IPv6 (RFC 8200 3) */
#define RN_IP6_HLEN 40u
#define RN_IP6_LEN 4 /* of what is behind the header */
#define RN_IP6_NEXT 6
#define RN_IP6_SRC 8 /* and the destination behind it */

/* TCP (RFC 9293 3.1) */
#define RN_TCP_HLEN 20u
#define RN_TCP_SPORT 0
#define RN_TCP_DPORT 2
#define RN_TCP_SEQ 4
#define RN_TCP_ACK 8
#define RN_TCP_OFF 12 /* data offset in the high nibble, 32-bit words */
#define RN_TCP_FLAGS 13
#define RN_TCP_WND 14
#define RN_TCP_SUM 16
#define RN_TCP_URP 18
#define RN_TH_FIN 0x01u
#define RN_TH_SYN 0x02u
#define RN_TH_RST 0x04u
#define RN_TH_PSH 0x08u
#define RN_TH_ACK 0x10u
#define RN_TH_URG 0x20u
#define RN_TCPOPT_EOL 0u    /* RFC 9293 3.2 */
#define RN_TCPOPT_NOP 1u    /* RFC 9293 3.2 */
#define RN_TCPOPT_MSS 2u    /* RFC 9293 3.7.1 */
#define RN_TCPOPT_WSCALE 3u /* RFC 7323 2.2 */
#define RN_TCPOPT_SACKOK 4u /* RFC 2018 2 */
#define RN_TCPOPT_SACK 5u   /* RFC 2018 3 */

/* UDP (RFC 768) */
#define RN_UDP_HLEN 8u
#define RN_UDP_SPORT 0
#define RN_UDP_DPORT 2
#define RN_UDP_LEN 4
#define RN_UDP_SUM 6
#define RN_PORT_DNS 53u	  /* RFC 1035 4.2 */
#define RN_PORT_DHCPS 67u /* RFC 2131 4.1 */
#define RN_PORT_DHCPC 68u

/* ICMP (RFC 792) */
#define RN_ICMP_HLEN 8u
#define RN_ICMP_ECHO_REPLY 0u
#define RN_ICMP_UNREACH 3u
#define RN_ICMP_UNREACH_NET 0u
#define RN_ICMP_UNREACH_HOST 1u
#define RN_ICMP_UNREACH_PROTO 2u
#define RN_ICMP_UNREACH_PORT 3u
#define RN_ICMP_UNREACH_NEEDFRAG 4u /* RFC 1191 4 */
#define RN_ICMP_UNREACH_ADMIN 13u   /* RFC 1812 5.2.7.1 */
#define RN_ICMP_ECHO 8u
#define RN_ICMP_TIMEXCEED 11u

/* ARP (RFC 826), Ethernet/IPv4: 28 bytes */
#define RN_ARP_LEN 28u
#define RN_ARP_HTYPE 0
#define RN_ARP_PTYPE 2
#define RN_ARP_HLEN 4
#define RN_ARP_PLEN 5
#define RN_ARP_OP 6
#define RN_ARP_SHA 8
#define RN_ARP_SPA 14
#define RN_ARP_THA 18
#define RN_ARP_TPA 24
#define RN_ARP_ETHERNET 1u /* IANA ARP parameters: hardware type */
#define RN_ARP_REQUEST 1u
#define RN_ARP_REPLY 2u

/* virtio-net header (virtio 1.2 5.1.6): flags 0, gso_type 1, hdr_len 2, gso_size 4, csum_start 6,
 * csum_offset 8, num_buffers 10; little-endian as the link is told to use (TUNSETVNETLE). */
struct rn_vnet_hdr {
	uint8_t flags, gso_type;
	uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};
_Static_assert(sizeof(struct rn_vnet_hdr) == RN_VNET_HLEN, "virtio 1.2 5.1.6 with num_buffers");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the virtio-net header is little-endian");
#define RN_VNET_NEEDS_CSUM 1u
#define RN_VNET_DATA_VALID 2u
#define RN_VNET_GSO_NONE 0u
#define RN_VNET_GSO_TCPV4 1u
#define RN_VNET_GSO_UDP 3u
#define RN_VNET_GSO_TCPV6 4u
#define RN_VNET_GSO_UDP_L4 5u
#define RN_VNET_GSO_ECN 0x80u

/* Addresses are kept in 16 bytes everywhere; IPv4 as v4-mapped ::ffff:a.b.c.d (RFC 4291 2.5.5.2). */
static inline int rn_addr_is4(const uint8_t addr[16])
{
	static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };

	return !memcmp(addr, mapped, 12);
}

static inline void rn_addr_from4(uint8_t out[16], const uint8_t v4[4])
{
	memset(out, 0, 10);
	out[10] = out[11] = 0xff;
	memcpy(out + 12, v4, 4);
}

#endif
