/* arp.c - answers who has the gateway's IPv4 address; nothing else.
 *
 * There is one guest and we never need to ask: its MAC is the source of its frames. So there is no ARP
 * cache that a forged reply, a gratuitous ARP or an announcement could poison, not even one that claims
 * the gateway's address: all are counted as arp_ignored. No other address of the subnet is answered for:
 * nobody is there, and the guest finds out by its own ARP timeout.
 *
 * A probe (RFC 5227 2.1.1: sender address 0.0.0.0) for the gateway's address is answered too: the address
 * is in use, and the reply tells the guest not to take it.
 */
#include "arp.h"

/* Offsets in the ARP packet, Ethernet/IPv4 (RFC 826 "Packet format") */
#define ARP_HTYPE 0
#define ARP_PTYPE 2
#define ARP_HLEN 4
#define ARP_PLEN 5
#define ARP_OP 6
#define ARP_SHA 8
#define ARP_SPA 14
#define ARP_THA 18
#define ARP_TPA 24
#define ARP_REQUEST 1u
#define ARP_REPLY 2u

enum rn_verdict arp_parse(const struct rn_view *v, const struct classify_config *cfg)
{
	const uint8_t *arp = rn_view_get(v, RN_ETH_HLEN, RN_ARP_LEN);

	if (!arp || rn_get16(arp + ARP_HTYPE) != 1 || rn_get16(arp + ARP_PTYPE) != RN_ETHERTYPE_IPV4 ||
	    arp[ARP_HLEN] != 6 || arp[ARP_PLEN] != 4)
		return RN_V_BAD_ARP;
	if (arp[ARP_SHA] & 1) /* the reply would go to a group */
		return RN_V_BAD_ARP;
	if (rn_get16(arp + ARP_OP) != ARP_REQUEST || memcmp(arp + ARP_TPA, cfg->gateway4, 4))
		return RN_V_ARP_IGNORED;
	/* Sender and target both the gateway: an announcement (RFC 5227 2.3) of what is not the guest's. */
	if (!memcmp(arp + ARP_SPA, cfg->gateway4, 4))
		return RN_V_ARP_IGNORED;
	return RN_V_ARP;
}

void arp_reply(uint8_t *out, const struct rn_view *request, const struct classify_config *cfg)
{
	const uint8_t *arp = rn_view_get(request, RN_ETH_HLEN, RN_ARP_LEN);
	uint8_t *r = out + RN_ETH_HLEN;

	if (!arp) /* arp_parse() saw them */
		return;
	/* RFC 826 "Packet reception": swap, fill in ours, send to the (new) target hardware address. */
	memcpy(out, arp + ARP_SHA, 6);
	memcpy(out + 6, cfg->gateway_mac, 6);
	rn_put16(out + 12, RN_ETHERTYPE_ARP);
	rn_put16(r + ARP_HTYPE, 1);
	rn_put16(r + ARP_PTYPE, RN_ETHERTYPE_IPV4);
	r[ARP_HLEN] = 6;
	r[ARP_PLEN] = 4;
	rn_put16(r + ARP_OP, ARP_REPLY);
	memcpy(r + ARP_SHA, cfg->gateway_mac, 6);
	memcpy(r + ARP_SPA, cfg->gateway4, 4);
	memcpy(r + ARP_THA, arp + ARP_SHA, 6);
	memcpy(r + ARP_TPA, arp + ARP_SPA, 4);
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
