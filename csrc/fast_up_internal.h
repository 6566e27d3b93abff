/* fast_up_internal.h - what fast_up.c (which flow, TCP) and fast_udp_up.c share. Nobody else includes it. */
#ifndef RN_FAST_UP_INTERNAL_H
#define RN_FAST_UP_INTERNAL_H

#include "fast_up.h"
#include "rn_promote.h"

#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

#define NONE UINT32_MAX

struct udp_batch; /* fast_udp_up.c */

struct fast_flow {
	int fd;		       /* our descriptor of the host socket, -1: not here */
	uint32_t gen;
	uint32_t hash_next;    /* NONE ends */
	uint32_t guest4, peer4; /* as in the packet */
	uint32_t ports;	       /* as in the packet, source first */
	uint8_t proto, scaled;
	uint8_t owed;	       /* in the list of flows with something to tell the guest */
	uint8_t late;	       /* in the list of ACKs that wait for an answer */
	uint8_t in_turn;       /* answers that carried an ACK, running; at most SPEAKS_IN_TURN */
	uint8_t watched;       /* 1: in epoll, 2: and waiting for room */
	uint8_t told_window;   /* of an owed one: the window moved by enough to say so */
	uint32_t owed_next, late_next;
	uint64_t late_due;     /* CLOCK_MONOTONIC ns */
	uint32_t late_seq, late_max; /* rcv_nxt and snd_max when it was put there: what was asked, and sent so far */
	struct sockaddr_in to; /* UDP: where datagrams to the peer go */
	uint8_t again;	       /* of one in the list of late ones: something newer waits */
	uint8_t slow;	       /* UDP: 1: what the host refused is egress's to explain */
	uint8_t df;	       /* UDP: what the socket does about the DF bit; other datagrams are egress's */
	uint32_t misses;       /* early segments in a row */
	uint32_t lacks_next, lacks_gen; /* of one whose socket did not come, while egress is to be told */
	uint8_t lacks;
	uint32_t sndbuf;
};

struct fast_up {
	struct rn_stage *s;
	const struct rn_link *link;
	struct rn_flows *flows;
	uint32_t nflows, n; /* n: flows here */
	struct fast_up_config cfg;
	uint32_t me, egress, rx; /* owner words */
	int way; /* output towards egress: enum rn_role */
	struct fast_flow *flow; /* same index as in the table */
	uint32_t *hash, hash_mask;
	uint64_t key; /* of the hash: the guest chooses ports */
	uint32_t owed, late, late_tail; /* lists; late: oldest first */
	uint32_t lacks;			/* likewise */
	uint32_t barrier; /* flow that asks for one, or NONE */
	uint64_t barrier_until; /* 0: none is out */
	uint16_t ip_id;
	struct udp_batch *udp; /* fast_udp_up.c */
	uint8_t reset; /* 1: egress is still to be told that this is a new process */
	alignas(4) uint8_t ack_buf[RN_VNET_HLEN + 4 + RN_ETH_HLEN + RN_IP4_HLEN + RN_TCP_HLEN];
};

/* fast_udp_up.c */
struct udp_batch *fast_udp_new(void); /* NULL: out of memory; free() ends it */
/* Take a datagram of a flow that is here. 1: done with it; 0: for egress. */
int fast_udp_take(struct fast_up *u, uint32_t i, const uint8_t *eth, const struct rn_parsed *p);
void fast_udp_flush(struct fast_up *u); /* what was gathered goes to the kernel */

#endif
