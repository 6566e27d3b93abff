/* rn_filter.h - which frames a capture wants: by host, port, protocol or flow. */
#ifndef RN_FILTER_H
#define RN_FILTER_H

#include "rn_layout.h"

/* CFFI BEGIN */
#define RN_FILTER_PROTO 1 /* flags: what of the struct counts; a frame must match all that does */
#define RN_FILTER_HOST 2
#define RN_FILTER_PORT 4
#define RN_FILTER_FLOW 8
#define RN_FILTER_FLOW_PEER 16 /* with FLOW: the other end too; else any (a UDP mapping serves every peer) */

struct rn_filter {
	uint32_t flags;
	uint16_t port;	/* source or destination */
	uint8_t proto;	/* IP protocol; fragments and IPv6 with extension headers included */
	uint8_t reserved;
	uint8_t host[16]; /* source or destination, v4-mapped; ARP: sender or target */
	uint8_t guest[16], peer[16]; /* of a flow, either way round */
	uint16_t guest_port, peer_port; /* ICMP: guest_port is the echo identifier */
};

/* 1 if the Ethernet frame matches. A frame that is too short for what is asked of it does not; nor does a fragment
 * without ports, if a port is asked for. @len bytes at @eth may be a prefix of a longer frame. */
int rn_filter_match(const struct rn_filter *f, const uint8_t *eth, uint32_t len);
/* CFFI END */

#endif
