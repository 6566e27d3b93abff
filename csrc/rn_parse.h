/* rn_parse.h - what is in a frame of the guest's, and what is to be done with it.
 *
 * Pure functions of the frame, its virtio-net header and the configuration: no rings, no buffers, no
 * state, so that tests and the fuzzer call exactly what classify calls.
 */
#ifndef RN_PARSE_H
#define RN_PARSE_H

#include "rn_arena.h"
#include "rn_proto.h"
#include "rn_view.h"

/* CFFI BEGIN */
struct classify_config {
	uint8_t gateway4[4];	/* our address on the guest's link */
	uint8_t subnet4[4];	/* guest subnet; host bits are ignored */
	uint32_t prefix;	/* its length, 8..30 */
	uint8_t gateway_mac[6]; /* unicast */
	uint32_t mtu;		/* bytes of L3, for ICMP errors */
};

enum rn_verdict { /* each has one counter: rn_verdict_counter() */
	RN_V_BRIDGE = 0,  /* to egress */
	RN_V_SERVICE,	  /* to services */
	RN_V_ARP,	  /* who has the gateway's address: answer */
	RN_V_ARP_IGNORED, /* well-formed ARP that needs no answer */
	RN_V_FRAGMENT,	  /* to reassembly.c, which has verdicts of its own */
	/* dropped: */
	RN_V_RUNT,
	RN_V_NOT_FOR_US,
	RN_V_BAD_SOURCE_MAC,
	RN_V_VLAN,
	RN_V_IPV6,
	RN_V_ETHERTYPE,
	RN_V_BAD_ARP,
	RN_V_IP_TRUNCATED,
	RN_V_IP_HEADER,
	RN_V_IP_CHECKSUM,
	RN_V_IP_TTL,
	RN_V_IP_OPTIONS,
	RN_V_SPOOFED,
	RN_V_BAD_DESTINATION,
	RN_V_NO_SUCH_HOST, /* and answered: ICMP host unreachable */
	RN_V_IP_PROTOCOL,  /* and answered: ICMP protocol unreachable */
	RN_V_GSO_MISMATCH,
	RN_V_L4_TRUNCATED,
	RN_V_L4_CHECKSUM,
	RN_V_TCP_FLAGS,
	RN_NVERDICTS
};

/* What was learned. Offsets are bytes from the Ethernet header and lie in [0, frame_len]. Written as far
 * as the parser came; zero behind that. */
struct rn_parsed {
	uint32_t frame_len; /* link padding behind the IP total length is not counted */
	uint32_t l3_off, l4_off, l4_len;
	uint32_t payload_off, payload_len;
	uint32_t frag_off;  /* bytes; RN_V_FRAGMENT only */
	uint32_t frag_more; /* MF */
	uint32_t ip_proto, ttl;
	uint32_t may_answer; /* 1: an ICMP error about it is allowed (RFC 1122 3.2.2) */
	uint32_t each;	     /* UDP super-frame (rn_uso.h): payload bytes of each datagram, the last may have fewer; else 0 */
};

/* Index of the verdict's counter in rn_metrics.def's table, and its name; RN_NVERDICTS and up: -1, NULL. */
int rn_verdict_counter(int verdict);
const char *rn_verdict_name(int verdict);

/* 0, or -EINVAL: prefix out of range, gateway outside the subnet, MAC that is not unicast. */
int classify_config_check(const struct classify_config *cfg);

/* For tests and tools: rn_parse_frame() over plain bytes. @vnet: 12 bytes or NULL. */
int rn_parse_bytes(const uint8_t *frame, uint32_t len, const uint8_t *vnet, const struct classify_config *cfg,
		   struct rn_parsed *out);
/* 1 if the 12-byte virtio-net header at @vnet fits a frame of @len bytes; 0 if it contradicts it. */
int rn_vnet_ok(const uint8_t *vnet, uint32_t len);
/* CFFI END */

/**
 * rn_parse_frame() - Parse, check and dispatch one frame from the guest
 * @v:		The frame, Ethernet header first
 * @vnet:	Its virtio-net header, a private copy, or NULL: checksums complete, no segmentation
 * @cfg:	Checked configuration
 * @out:	What was learned
 *
 * Reads every byte through @v, so no frame makes it read outside. If another process writes the frame
 * meanwhile, the verdict may be wrong for what lies there later; the offsets still lie in the frame.
 *
 * Return: the verdict.
 */
enum rn_verdict rn_parse_frame(const struct rn_view *v, const struct rn_vnet_hdr *vnet,
			       const struct classify_config *cfg, struct rn_parsed *out);

/* Checks of the virtio-net header that need no parsing (virtio 1.2 5.1.6.2); 1 if they hold. */
int rn_vnet_check(const struct rn_vnet_hdr *h, uint32_t len);

/* Does the header say anything at all? */
static inline int rn_vnet_says(const struct rn_vnet_hdr *h)
{
	return (h->flags & RN_VNET_NEEDS_CSUM) || h->gso_type != RN_VNET_GSO_NONE;
}

/* What the stages behind are told of a frame with verdict RN_V_BRIDGE or RN_V_SERVICE. */
static inline struct rn_meta rn_meta_of(const struct rn_parsed *p, uint8_t flags)
{
	return (struct rn_meta){
		.ip_version = 4,
		.ip_proto = (uint8_t)p->ip_proto,
		.ttl = (uint8_t)p->ttl,
		.flags = flags,
		.l3_off = (uint16_t)p->l3_off,
		.l4_off = (uint16_t)p->l4_off,
		.payload_off = (uint16_t)p->payload_off,
		.each = (uint16_t)p->each,
		.payload_len = p->payload_len,
	};
}

static inline int rn_in_subnet(const struct classify_config *cfg, const uint8_t addr[4])
{
	uint32_t mask = UINT32_MAX << (32 - cfg->prefix);

	return !((rn_get32(addr) ^ rn_get32(cfg->subnet4)) & mask);
}

#endif
