/* rn_tcpseg.c - RFC 9293 3.1 and RFC 791 3.1 headers, and the virtio-net header that leaves work to the link. */
#include "rn_tcpseg.h"

#include "rn_csum.h"

void rn_ip4_build(uint8_t *eth, const uint8_t to_mac[6], const uint8_t from_mac[6], const uint8_t src[4],
		  const uint8_t dst[4], uint8_t proto, uint8_t ttl, uint16_t id, uint16_t frag, uint32_t l4_len)
{
	uint8_t *ip = eth + RN_ETH_HLEN;

	memcpy(eth, to_mac, 6);
	memcpy(eth + 6, from_mac, 6);
	rn_put16(eth + 12, RN_ETHERTYPE_IPV4);
	ip[0] = 0x45; /* RFC 791 3.1: version 4, five words */
	ip[RN_IP4_TOS] = 0;
	rn_put16(ip + RN_IP4_LEN, (uint16_t)(RN_IP4_HLEN + l4_len));
	rn_put16(ip + RN_IP4_ID, id);
	rn_put16(ip + RN_IP4_FRAG, frag);
	ip[RN_IP4_TTL] = ttl;
	ip[RN_IP4_PROTO] = proto;
	memcpy(ip + RN_IP4_SRC, src, 4);
	memcpy(ip + RN_IP4_DST, dst, 4);
	rn_csum_ip4(ip, RN_IP4_HLEN);
}

uint32_t rn_tcpseg_build(const struct rn_flow *f, const struct rn_tcpseg *s, uint8_t *eth, struct rn_vnet_hdr *vnet)
{
	uint8_t *th = eth + RN_ETH_HLEN + RN_IP4_HLEN;
	uint32_t l4 = RN_TCP_HLEN + s->optlen + s->len;
	uint64_t sum;
	uint16_t c;

	rn_ip4_build(eth, f->guest_mac, s->gateway_mac, f->peer_addr + 12, f->guest_addr + 12, RN_IPPROTO_TCP, 64, s->ip_id,
		     RN_IP4_DF, l4);
	rn_put16(th + RN_TCP_SPORT, f->peer_port);
	rn_put16(th + RN_TCP_DPORT, f->guest_port);
	rn_put32(th + RN_TCP_SEQ, s->seq);
	rn_put32(th + RN_TCP_ACK, s->flags & RN_TH_ACK ? s->ack : 0);
	th[RN_TCP_OFF] = (uint8_t)((RN_TCP_HLEN + s->optlen) / 4 << 4);
	th[RN_TCP_FLAGS] = s->flags;
	rn_put16(th + RN_TCP_WND, s->wnd);
	memset(th + RN_TCP_SUM, 0, 4); /* checksum and urgent pointer */
	if (s->optlen)
		memcpy(th + RN_TCP_HLEN, s->opt, s->optlen);

	memset(vnet, 0, sizeof(*vnet));
	sum = rn_csum_pseudo4(f->peer_addr + 12, f->guest_addr + 12, RN_IPPROTO_TCP, l4);
	if (s->offload) { /* the pseudo-header's sum, the guest's kernel or card does the rest */
		c = rn_csum_fold(sum);
		vnet->flags = RN_VNET_NEEDS_CSUM;
		vnet->csum_start = RN_ETH_HLEN + RN_IP4_HLEN;
		vnet->csum_offset = RN_TCP_SUM;
		if (s->len > s->mss) {
			vnet->gso_type = RN_VNET_GSO_TCPV4;
			vnet->gso_size = (uint16_t)s->mss;
			vnet->hdr_len = (uint16_t)(RN_ETH_HLEN + RN_IP4_HLEN + RN_TCP_HLEN + s->optlen);
		}
	} else {
		c = (uint16_t)~rn_csum_fold(rn_csum_add(sum, th, l4));
	}
	memcpy(th + RN_TCP_SUM, &c, 2);
	return RN_ETH_HLEN + RN_IP4_HLEN + l4;
}

void rn_udp_build(uint8_t *udp, uint16_t sport, uint16_t dport, const uint8_t src[4], const uint8_t dst[4], uint32_t len,
		    int partial)
{
	uint32_t l4 = RN_UDP_HLEN + len;
	uint64_t sum = rn_csum_pseudo4(src, dst, RN_IPPROTO_UDP, l4);
	uint16_t c;

	rn_put16(udp + RN_UDP_SPORT, sport);
	rn_put16(udp + RN_UDP_DPORT, dport);
	rn_put16(udp + RN_UDP_LEN, (uint16_t)l4);
	memset(udp + RN_UDP_SUM, 0, 2);
	if (partial) {
		c = rn_csum_fold(sum);
	} else {
		c = (uint16_t)~rn_csum_fold(rn_csum_add(sum, udp, l4));
		if (!c)
			c = 0xffff; /* RFC 768: zero means none */
	}
	memcpy(udp + RN_UDP_SUM, &c, 2);
}
