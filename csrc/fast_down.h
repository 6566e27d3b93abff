/* fast_down.h - promoted flows, host to guest: from the host socket to the link without a hop (rn_promote.h). */
#ifndef RN_FAST_DOWN_H
#define RN_FAST_DOWN_H

#include "rn_stage.h"

/* CFFI BEGIN */
struct fast_down_config {
	uint8_t gateway4[4], gateway_mac[6];
	uint32_t mtu;	     /* bytes of L3 towards the guest */
	int offload;	     /* the link completes checksums and cuts super-frames */
	int uso;	     /* it cuts UDP super-frames too */
	int flows_fd;	     /* SOCK_SEQPACKET from egress: sockets of flows (rn_fdpass.h) */
};
/* CFFI END */

struct fast_down; /* fast_down.c */

/* How frames leave: @eth has its virtio-net header in front. 1: done with it; 0: the link is full, call again later. */
typedef int fast_down_out(struct rn_stage *s, const uint8_t *eth, uint32_t len);

/* After the rings are granted: egress is at the other end of output RN_ROLE_BRIDGE. NULL: out of memory, or
 * rn_stage_error() is set. @flows: the flow table, must outlive it. */
struct fast_down *fast_down_new(struct rn_stage *s, void *flows, uint64_t flows_size, const struct fast_down_config *cfg,
				fast_down_out *out);
void fast_down_free(struct fast_down *d);

void fast_down_notice(struct fast_down *d, const struct rn_desc *desc);
void fast_down_event(struct fast_down *d, uint32_t index, uint32_t events); /* RN_TAG_FLOW */

/* A bounded part of what there is to do, the link taking frames. >0: did something; 0: nothing to do now;
 * -EAGAIN: the link is full. */
int fast_down_turn(struct fast_down *d);
uint64_t fast_down_deadline(const struct fast_down *d); /* CLOCK_MONOTONIC ns; UINT64_MAX: none */

#endif
