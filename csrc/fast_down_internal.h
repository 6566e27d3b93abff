/* fast_down_internal.h - what fast_down.c (which flow, TCP), fast_bound.c and fast_udp_down.c share. Nobody else includes it. */
#ifndef RN_FAST_DOWN_INTERNAL_H
#define RN_FAST_DOWN_INTERNAL_H

#include "fast_down.h"
#include "rn_crowd.h"
#include "rn_peek.h"
#include "rn_promote.h"
#include "rn_tcpseg.h"

#include <string.h>

#define NONE UINT32_MAX
#define UDP_PAYLOAD_MAX 65507u /* RFC 768, RFC 791 3.1 */
#define HEADERS (RN_ETH_HLEN + RN_IP4_HLEN + RN_TCP_HLEN)
#define BUF_ETH 18u /* Ethernet header in the buffer: virtio-net header in front, IP header 16-aligned */

struct down_flow {
	int fd; /* our descriptor of the host socket */
	uint32_t gen;
	uint32_t at;	  /* SO_PEEK_OFF, as rn_peek.h keeps it */
	uint32_t wnd_max; /* largest window seen (RFC 9293 3.8.6.2.1) */
	uint32_t rtt_seq; /* sequence number timed, */
	uint64_t rtt_ns;  /* and when it was sent; 0: none is */
	uint64_t since;	  /* of the last progress, or of the first byte in flight; CLOCK_MONOTONIC ns */
	uint32_t run_next;
	uint32_t watch_next, watch_prev;
	uint32_t lacks_next, lacks_gen; /* as in fast_up_internal.h */
	uint8_t proto, peek_off, scaled;
	uint8_t readable; /* 1: the socket may have bytes not peeked at */
	uint8_t hup;	  /* 1: its end was told; a peek that finds nothing is that end */
	uint8_t urgent;	  /* 1: urgent data came: egress's */
	uint8_t running, watched, lacks; /* in the lists */
	uint8_t bound;	  /* 1: the kernel does not grow the socket's receive buffer */
	struct rn_crowd_flow crowd;
};

struct fast_down {
	struct rn_stage *s;
	struct rn_flows *flows;
	uint32_t nflows, n;
	struct fast_down_config cfg;
	fast_down_out *out;
	uint32_t me, egress; /* owner words */
	uint32_t frame;	     /* payload bytes of the largest frame */
	struct down_flow *flow; /* same index as in the table */
	uint32_t run, run_tail, watch, lacks;
	uint64_t watch_at;
	struct rn_crowd crowd; /* of those that receive */
	uint16_t ip_id;
	uint8_t reset;	  /* 1: egress is still to be told that this is a new process */
	uint32_t said, said_gen; /* TCP flow that the frame in buf is of, NONE: no matter, */
	uint32_t said_ack, said_adv; /* and what it tells of rcv_nxt and rcv_adv */
	uint32_t waiting; /* bytes of a frame in buf that the link did not take yet; 0: none */
	struct rn_peek_skip *skip; /* made at the first flow that needs it */
	uint8_t buf[BUF_ETH + RN_FRAME_MAX + 64];
};

/* fast_bound.c */
void fast_bound_init(struct fast_down *d);
void fast_bound_taken(struct fast_down *d, struct down_flow *q, uint32_t n); /* @n bytes arrived at the guest */
void fast_bound_lift(struct fast_down *d, struct down_flow *q); /* the socket is no more ours to run */

/* fast_udp_down.c */
void fast_udp_begin(struct fast_down *d, struct down_flow *q); /* the mapping was offered */
int fast_udp_pump(struct fast_down *d, uint32_t i);	       /* as pump() */

#endif
