/* rn_tcpseg.h - the headers of a TCP segment to the guest, whichever stage sends it. */
#ifndef RN_TCPSEG_H
#define RN_TCPSEG_H

#include "rn_flow.h"
#include "rn_proto.h"

#define RN_TCP_MSS_MIN 64u /* below, headers are all */
#define RN_TCP_WSCALE 7u /* our shift: 8 MiB, above the kernel's largest send buffer estimate (RFC 7323 2.2) */

struct rn_tcpseg {
	uint32_t seq, ack;
	uint8_t flags;	/* RN_TH_*; without RN_TH_ACK @ack is not sent */
	uint16_t wnd;	/* as it goes into the header */
	uint16_t ip_id; /* with DF it may be anything (RFC 6864 4.1) */
	const uint8_t *opt;
	uint32_t optlen; /* multiple of 4, at most 40 */
	uint32_t len;	 /* payload bytes, which lie behind the headers */
	uint32_t mss;	 /* more than this is a super-frame */
	const uint8_t *gateway_mac;
	int offload; /* the link completes checksums and cuts super-frames: virtio 1.2 5.1.6.2 */
};

/* Write Ethernet, IPv4 and TCP header at @eth and, if @s->offload, the virtio-net header at @vnet; else @vnet is zeroed.
 * Payload is read only if the checksum must be made here. Returns bytes of frame. */
uint32_t rn_tcpseg_build(const struct rn_flow *f, const struct rn_tcpseg *s, uint8_t *eth, struct rn_vnet_hdr *vnet);

/* Ethernet + IPv4 header (no options, checksum made) for @l4_len bytes behind it. */
void rn_ip4_build(uint8_t *eth, const uint8_t to_mac[6], const uint8_t from_mac[6], const uint8_t src[4],
		  const uint8_t dst[4], uint8_t proto, uint8_t ttl, uint16_t id, uint16_t frag, uint32_t l4_len);

/* UDP header at @udp for @len bytes of payload behind it; @partial: the link completes the checksum. */
void rn_udp_build(uint8_t *udp, uint16_t sport, uint16_t dport, const uint8_t src[4], const uint8_t dst[4], uint32_t len,
		  int partial);

#define RN_SACK_LEN(blocks) (4u + 8u * (blocks)) /* bytes of option, aligned: RFC 2018 3 */

/* The option's head at @opt; the blocks follow it. Returns RN_SACK_LEN(). */
static inline uint32_t rn_sack_head(uint8_t *opt, uint32_t blocks)
{
	opt[0] = opt[1] = RN_TCPOPT_NOP;
	opt[2] = RN_TCPOPT_SACK;
	opt[3] = (uint8_t)(2 + 8 * blocks);
	return RN_SACK_LEN(blocks);
}

/* What of the guest's options is in the flow table, which others write too: held to what a connection can have, so that a
 * torn entry costs its flow and nothing else. */
static inline uint32_t rn_tcp_mss(uint16_t told, uint32_t mtu)
{
	uint32_t own = mtu - RN_IP4_HLEN - RN_TCP_HLEN;

	return told < RN_TCP_MSS_MIN ? RN_TCP_MSS_MIN : told > own ? own : told;
}
static inline uint32_t rn_tcp_shift(uint8_t told) /* RFC 7323 2.3: 14 at most */
{
	return told > 14 ? 14 : told;
}

/* What the window field says of @wnd bytes. */
static inline uint16_t rn_tcp_window_field(uint32_t wnd, int scaled)
{
	if (scaled)
		wnd >>= RN_TCP_WSCALE;
	return (uint16_t)(wnd > 65535u ? 65535u : wnd);
}

#endif
