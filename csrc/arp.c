/* arp.c - answers who has the gateway's IPv4 address; nothing else.
 *
 * There is no ARP cache here that a forged reply, a gratuitous ARP or an announcement could poison, not even one that
 * claims the gateway's address: all are counted as arp_ignored. A guest's MAC is the source of its frames; egress asks
 * for it only when a forward has something for a guest that never sent any, and gets the replies to the gateway
 * (stage_classify.c), of which it believes those it asked for (inbound.c). No other address of the subnet is answered for:
 * nobody is there, and the guest finds out by its own ARP timeout.
 *
 * A probe (RFC 5227 2.1.1: sender address 0.0.0.0) for the gateway's address is answered too: the address
 * is in use, and the reply tells the guest not to take it. Which requests those are, rn_parse.c decides.
 */
#include "arp.h"

void arp_reply(uint8_t *out, const struct rn_view *request, const struct classify_config *cfg)
{
	const uint8_t *arp = rn_view_get(request, RN_ETH_HLEN, RN_ARP_LEN);
	uint8_t *r = out + RN_ETH_HLEN;

	if (!arp) /* rn_parse_frame() saw them */
		return;
	/* RFC 826 "Packet reception": swap, fill in ours, send to the (new) target hardware address. */
	memcpy(out, arp + RN_ARP_SHA, 6);
	memcpy(out + 6, cfg->gateway_mac, 6);
	rn_put16(out + 12, RN_ETHERTYPE_ARP);
	rn_put16(r + RN_ARP_HTYPE, RN_ARP_ETHERNET);
	rn_put16(r + RN_ARP_PTYPE, RN_ETHERTYPE_IPV4);
	r[RN_ARP_HLEN] = 6;
	r[RN_ARP_PLEN] = 4;
	rn_put16(r + RN_ARP_OP, RN_ARP_REPLY);
	memcpy(r + RN_ARP_SHA, cfg->gateway_mac, 6);
	memcpy(r + RN_ARP_SPA, cfg->gateway4, 4);
	memcpy(r + RN_ARP_THA, arp + RN_ARP_SHA, 6);
	memcpy(r + RN_ARP_TPA, arp + RN_ARP_SPA, 4);
}

uint32_t arp_answer_bytes(const uint8_t *frame, uint32_t len, const struct classify_config *cfg, uint8_t *out)
{
	struct rn_view v = { .data = frame, .len = len };
	struct rn_parsed p;

	if (rn_parse_frame(&v, NULL, cfg, &p) != RN_V_ARP)
		return 0;
	arp_reply(out, &v, cfg);
	return ARP_FRAME_LEN;
}
