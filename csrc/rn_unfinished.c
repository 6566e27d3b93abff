/* rn_unfinished.c - write a lost virtio-net header anew (contract: rn_unfinished.h). */
#include "rn_unfinished.h"

#include <string.h>

#include "rn_csum.h"
#include "rn_proto.h"
#include "rn_view.h"

#define VLAN_HLEN 4u /* IEEE 802.1Q 9.3 */

/* What is behind the IP header at @l3 if it is all of a TCP segment or a UDP datagram: its bytes, else 0. */
static uint32_t l4_of(const struct rn_view *v, uint32_t l3, uint16_t ethertype, uint32_t *l4, uint8_t *proto)
{
	const uint8_t *ip = rn_view_get(v, l3, ethertype == RN_ETHERTYPE_IPV4 ? RN_IP4_HLEN : RN_IP6_HLEN);
	uint32_t hlen, total;

	if (!ip)
		return 0;
	if (ethertype == RN_ETHERTYPE_IPV4) {
		hlen = (ip[0] & 15u) * 4;
		total = rn_get16(ip + RN_IP4_LEN);
		/* A fragment's checksum covers what is not here: the guest has to have finished it. */
		if (ip[0] >> 4 != 4 || hlen < RN_IP4_HLEN || rn_get16(ip + RN_IP4_FRAG) & (RN_IP4_MF | RN_IP4_OFFMASK))
			return 0;
		*proto = ip[RN_IP4_PROTO];
	} else {
		hlen = RN_IP6_HLEN;
		total = hlen + rn_get16(ip + RN_IP6_LEN);
		if (ip[0] >> 4 != 6)
			return 0;
		*proto = ip[RN_IP6_NEXT];
	}
	if (total <= hlen || !rn_view_get(v, l3, total))
		return 0;
	*l4 = l3 + hlen;
	return total - hlen;
}

int rn_unfinished_mark(uint8_t *vnet_then_frame, uint32_t len, uint32_t mtu)
{
	struct rn_view v = { .data = vnet_then_frame + RN_VNET_HLEN, .len = len };
	const uint8_t *eth = rn_view_get(&v, 0, RN_ETH_HLEN), *tag;
	struct rn_vnet_hdr h = { .flags = RN_VNET_NEEDS_CSUM };
	uint32_t l3 = RN_ETH_HLEN, l4 = 0, n, hlen;
	uint16_t ethertype, sum;
	uint8_t proto = 0;

	memset(vnet_then_frame, 0, RN_VNET_HLEN);
	if (!eth)
		return 0;
	ethertype = rn_get16(eth + 12);
	if (ethertype == RN_ETHERTYPE_VLAN && (tag = rn_view_get(&v, l3, VLAN_HLEN))) {
		ethertype = rn_get16(tag + 2);
		l3 += VLAN_HLEN;
	}
	if (ethertype != RN_ETHERTYPE_IPV4 && ethertype != RN_ETHERTYPE_IPV6)
		return 0;
	n = l4_of(&v, l3, ethertype, &l4, &proto);
	if (proto == RN_IPPROTO_TCP && n >= RN_TCP_HLEN)
		h.csum_offset = RN_TCP_SUM;
	else if (proto == RN_IPPROTO_UDP && n >= RN_UDP_HLEN && rn_get16(eth + l4 + RN_UDP_LEN) == n)
		h.csum_offset = RN_UDP_SUM;
	else
		return 0;
	h.csum_start = (uint16_t)l4;
	/* Never 0, which in UDP would mean that there is none (RFC 768): the protocol's number alone is in the sum. */
	sum = rn_csum_fold(rn_csum_pseudo(eth + l3, proto, n));
	if (memcmp(&sum, eth + l4 + h.csum_offset, sizeof(sum)))
		return 0;
	if (proto == RN_IPPROTO_TCP && l3 == RN_ETH_HLEN && l4 - l3 + n > mtu && l4 + n == len) {
		hlen = (eth[l4 + RN_TCP_OFF] >> 4) * 4u;
		/* A header that is none is for the parser to find; without a cut the frame is too long, and is dropped. */
		if (hlen >= RN_TCP_HLEN && hlen <= n && l4 - l3 + hlen < mtu) {
			h.gso_type = ethertype == RN_ETHERTYPE_IPV4 ? RN_VNET_GSO_TCPV4 : RN_VNET_GSO_TCPV6;
			h.hdr_len = (uint16_t)(l4 + hlen);
			h.gso_size = (uint16_t)(mtu - (l4 - l3 + hlen));
		}
	}
	memcpy(vnet_then_frame, &h, sizeof(h));
	return 1;
}
