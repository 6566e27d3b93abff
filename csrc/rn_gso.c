/* rn_gso.c - checksum completion and segmentation in software (contract: rn_gso.h).
 *
 * What a card with these offloads does, by virtio 1.2 5.1.6.2: with NEEDS_CSUM the field at csum_start + csum_offset
 * holds the pseudo-header's sum, and the sum of all from csum_start replaces it; with a GSO type the frame is first
 * cut into segments of gso_size payload bytes. The payload is read once, for its sum.
 */
#include "rn_gso.h"

#include <errno.h>
#include <string.h>

#include "rn_csum.h"
#include "rn_proto.h"

#define TH_CWR 0x80u /* RFC 3168 6.1 */

/* Where the transport header of a frame to be cut must be, by the frame itself; 0: not that kind of frame. */
static uint32_t l4_of(const struct rn_gso *g, uint8_t proto)
{
	const uint8_t *ip = g->frame + RN_ETH_HLEN;
	uint32_t hlen = (ip[0] & 15u) * 4;

	switch (g->type == RN_VNET_GSO_UDP_L4 ? ip[0] >> 4 : g->type == RN_VNET_GSO_TCPV4 ? 4 : 6) {
	case 4:
		if (ip[0] >> 4 != 4 || hlen < RN_IP4_HLEN || ip[RN_IP4_PROTO] != proto ||
		    rn_get16(ip + RN_IP4_FRAG) & (RN_IP4_MF | RN_IP4_OFFMASK))
			return 0;
		return RN_ETH_HLEN + hlen;
	case 6: /* no extension headers: nothing of ours writes them */
		return ip[0] >> 4 == 6 && ip[RN_IP6_NEXT] == proto ? RN_ETH_HLEN + RN_IP6_HLEN : 0;
	}
	return 0;
}

int rn_gso_begin(struct rn_gso *g, const uint8_t *vnet_then_frame, uint32_t len)
{
	struct rn_vnet_hdr v;
	uint32_t payload, need;

	memcpy(&v, vnet_then_frame, sizeof(v));
	*g = (struct rn_gso){ .frame = vnet_then_frame + RN_VNET_HLEN, .len = len, .l4 = v.csum_start,
			      .type = v.gso_type & (uint8_t)~RN_VNET_GSO_ECN, .nsegs = 1 };
	if (!(v.flags & RN_VNET_NEEDS_CSUM)) {
		if (g->type != RN_VNET_GSO_NONE || len < RN_ETH_HLEN)
			return -EINVAL;
		return 1; /* nothing to do: no byte is written anew */
	}
	/* 32-bit sums of 16-bit values do not wrap. An odd offset would shift the sum by a byte. */
	need = (uint32_t)v.csum_start + v.csum_offset + 2;
	if (v.csum_start < RN_ETH_HLEN || v.csum_offset & 1 || need > len || need > RN_GSO_HEAD_MAX)
		return -EINVAL;
	g->csum_at = (uint16_t)(need - 2);
	if (g->type == RN_VNET_GSO_NONE) {
		g->hlen = need;
		g->mss = len;
		return 1;
	}
	if (!v.gso_size || len < RN_ETH_HLEN + RN_IP4_HLEN)
		return -EINVAL;
	if (g->type == RN_VNET_GSO_UDP_L4) {
		if (l4_of(g, RN_IPPROTO_UDP) != g->l4 || v.csum_offset != RN_UDP_SUM)
			return -EINVAL;
		g->hlen = g->l4 + RN_UDP_HLEN;
	} else if (g->type == RN_VNET_GSO_TCPV4 || g->type == RN_VNET_GSO_TCPV6) {
		if (l4_of(g, RN_IPPROTO_TCP) != g->l4 || v.csum_offset != RN_TCP_SUM || (uint32_t)g->l4 + RN_TCP_HLEN > len)
			return -EINVAL;
		g->hlen = g->l4 + (g->frame[g->l4 + RN_TCP_OFF] >> 4) * 4u;
		if (g->hlen < g->l4 + RN_TCP_HLEN)
			return -EINVAL;
	} else {
		return -EINVAL; /* UFO, or what comes later */
	}
	if (g->hlen > len || g->hlen > RN_GSO_HEAD_MAX)
		return -EINVAL;
	payload = len - g->hlen;
	g->mss = v.gso_size;
	if (payload > g->mss)
		g->nsegs = (payload + g->mss - 1) / g->mss;
	return g->nsegs > RN_GSO_SEGS_MAX ? -EMSGSIZE : (int)g->nsegs;
}

int rn_gso_whole(struct rn_gso *g)
{
	if (g->type != RN_VNET_GSO_TCPV4 && g->type != RN_VNET_GSO_TCPV6)
		return 0;
	g->mss = g->len - g->hlen;
	g->nsegs = 1;
	return 1;
}

/* Lengths, identification, sequence number and flags of the segment that begins at g->at; returns the sum of its
 * pseudo-header. */
static uint64_t cut(const struct rn_gso *g, uint8_t *head, uint32_t n, int last)
{
	uint8_t *ip = head + RN_ETH_HLEN, *l4 = head + g->l4;
	uint32_t l4len = g->hlen - g->l4 + n;

	if (ip[0] >> 4 == 4) {
		rn_put16(ip + RN_IP4_LEN, (uint16_t)(g->l4 - RN_ETH_HLEN + l4len));
		rn_put16(ip + RN_IP4_ID, (uint16_t)(rn_get16(ip + RN_IP4_ID) + g->done));
		rn_csum_ip4(ip, g->l4 - RN_ETH_HLEN);
	} else {
		rn_put16(ip + RN_IP6_LEN, (uint16_t)l4len);
	}
	if (g->type == RN_VNET_GSO_UDP_L4) {
		rn_put16(l4 + RN_UDP_LEN, (uint16_t)l4len);
		return rn_csum_pseudo(ip, RN_IPPROTO_UDP, l4len);
	}
	rn_put32(l4 + RN_TCP_SEQ, rn_get32(l4 + RN_TCP_SEQ) + g->at);
	if (!last)
		l4[RN_TCP_FLAGS] &= (uint8_t)~(RN_TH_FIN | RN_TH_PSH);
	if (g->done)
		l4[RN_TCP_FLAGS] &= (uint8_t)~TH_CWR; /* RFC 3168 6.1.2: the first new segment says it */
	return rn_csum_pseudo(ip, RN_IPPROTO_TCP, l4len);
}

void rn_gso_next(struct rn_gso *g, uint8_t *head, const uint8_t **payload, uint32_t *n)
{
	uint32_t left = g->len - g->hlen - g->at;
	uint64_t sum = 0;
	uint16_t c;

	*payload = g->frame + g->hlen + g->at;
	*n = g->done + 1 < g->nsegs ? g->mss : left;
	if (!g->hlen)
		return;
	memcpy(head, g->frame, g->hlen);
	if (g->type != RN_VNET_GSO_NONE) {
		sum = cut(g, head, *n, g->done + 1 == g->nsegs);
		memset(head + g->csum_at, 0, 2);
	}
	/* Of even length from csum_start: TCP's header is of 32-bit words, UDP's is 8 bytes, csum_offset is even. */
	sum = rn_csum_add(sum, head + g->l4, g->hlen - g->l4);
	c = (uint16_t)~rn_csum_fold(rn_csum_add(sum, *payload, *n));
	if (!c)
		c = 0xffff; /* the same number; to UDP 0 would mean: no checksum (RFC 768) */
	memcpy(head + g->csum_at, &c, 2);
	g->at += *n;
	g->done++;
}

int64_t rn_gso_all(const uint8_t *vnet_then_frame, uint32_t len, uint8_t *out, uint32_t cap)
{
	struct rn_gso g;
	int segs = rn_gso_begin(&g, vnet_then_frame, len);
	uint32_t at = 0;

	for (int i = 0; i < segs; i++) {
		uint8_t head[RN_GSO_HEAD_MAX];
		const uint8_t *payload;
		uint32_t n;

		rn_gso_next(&g, head, &payload, &n);
		if (cap - at < 4 + g.hlen + n)
			return -ENOBUFS;
		rn_put32(out + at, g.hlen + n);
		memcpy(out + at + 4, head, g.hlen);
		memcpy(out + at + 4 + g.hlen, payload, n);
		at += 4 + g.hlen + n;
	}
	return segs < 0 ? segs : (int64_t)at;
}
