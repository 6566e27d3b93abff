/* rn_gro.c - segments become a super-frame (contract: rn_gro.h). IPv4 without options or fragments, TCP with data and
 * without SYN, FIN, RST or URG: the middle of a bulk transfer. */
#include "rn_gro.h"

#include <string.h>

#include "rn_csum.h"
#include "rn_proto.h"

#define IP (RN_ETH_HLEN)
#define TCP (RN_ETH_HLEN + RN_IP4_HLEN)

int rn_gro_begin(struct rn_gro *g, const uint8_t *frame, uint32_t len)
{
	uint32_t hlen;

	if (len <= TCP + RN_TCP_HLEN || rn_get16(frame + 12) != RN_ETHERTYPE_IPV4 || frame[IP] != 0x45 ||
	    rn_get16(frame + IP + RN_IP4_FRAG) & (RN_IP4_MF | RN_IP4_OFFMASK) || frame[IP + RN_IP4_PROTO] != RN_IPPROTO_TCP ||
	    rn_get16(frame + IP + RN_IP4_LEN) != len - RN_ETH_HLEN)
		return 0;
	hlen = TCP + (frame[TCP + RN_TCP_OFF] >> 4) * 4u;
	if (hlen < TCP + RN_TCP_HLEN || hlen >= len || (frame[TCP + RN_TCP_FLAGS] & ~RN_TH_PSH) != RN_TH_ACK)
		return 0;
	memcpy(g->head, frame, hlen);
	g->hlen = hlen;
	g->mss = len - hlen;
	g->next_seq = rn_get32(frame + TCP + RN_TCP_SEQ) + g->mss;
	g->len = len;
	g->flags = frame[TCP + RN_TCP_FLAGS];
	g->closed = 0;
	return 1;
}

int rn_gro_intact(const uint8_t *frame, uint32_t len)
{
	uint32_t l4 = len - TCP;
	uint64_t pseudo = rn_csum_pseudo4(frame + IP + RN_IP4_SRC, frame + IP + RN_IP4_DST, RN_IPPROTO_TCP, l4);

	return rn_csum_fold(rn_csum_add(0, frame + IP, RN_IP4_HLEN)) == 0xffff &&
	       rn_csum_fold(rn_csum_add(pseudo, frame + TCP, l4)) == 0xffff;
}

int rn_gro_follows(struct rn_gro *g, const uint8_t *frame, uint32_t len)
{
	const uint8_t *head = g->head;
	uint32_t n;

	if (g->closed || len <= g->hlen || len - g->hlen > g->mss || g->len + (len - g->hlen) > RN_FRAME_MAX)
		return 0;
	n = len - g->hlen;
	if (memcmp(frame, head, IP + RN_IP4_LEN) || rn_get16(frame + IP + RN_IP4_LEN) != len - RN_ETH_HLEN ||
	    memcmp(frame + IP + RN_IP4_FRAG, head + IP + RN_IP4_FRAG, 4) || /* and TTL, protocol */
	    memcmp(frame + IP + RN_IP4_SRC, head + IP + RN_IP4_SRC, 8 + RN_TCP_SEQ) || /* addresses, ports */
	    rn_get32(frame + TCP + RN_TCP_SEQ) != g->next_seq ||
	    memcmp(frame + TCP + RN_TCP_ACK, head + TCP + RN_TCP_ACK, 5) || /* and the header's length */
	    (frame[TCP + RN_TCP_FLAGS] & ~RN_TH_PSH) != RN_TH_ACK || memcmp(frame + TCP + RN_TCP_WND, head + TCP + RN_TCP_WND, 2) ||
	    memcmp(frame + TCP + RN_TCP_URP, head + TCP + RN_TCP_URP, g->hlen - TCP - RN_TCP_URP)) /* and options */
		return 0;
	if (!rn_gro_intact(frame, len))
		return 0;
	g->len += n;
	g->next_seq += n;
	g->flags |= frame[TCP + RN_TCP_FLAGS];
	g->closed = n < g->mss;
	return 1;
}

void rn_gro_finish(const struct rn_gro *g, uint8_t *vnet_then_frame)
{
	struct rn_vnet_hdr v = { .flags = RN_VNET_NEEDS_CSUM, .gso_type = RN_VNET_GSO_TCPV4, .hdr_len = (uint16_t)g->hlen,
				 .gso_size = (uint16_t)g->mss, .csum_start = TCP, .csum_offset = RN_TCP_SUM };
	uint8_t *frame = vnet_then_frame + RN_VNET_HLEN;
	uint16_t partial;

	memcpy(vnet_then_frame, &v, sizeof(v));
	rn_put16(frame + IP + RN_IP4_LEN, (uint16_t)(g->len - RN_ETH_HLEN));
	rn_csum_ip4(frame + IP, RN_IP4_HLEN);
	frame[TCP + RN_TCP_FLAGS] = g->flags;
	partial = rn_csum_fold(rn_csum_pseudo4(frame + IP + RN_IP4_SRC, frame + IP + RN_IP4_DST, RN_IPPROTO_TCP, g->len - TCP));
	memcpy(frame + TCP + RN_TCP_SUM, &partial, 2);
}
