/* fast_up.h - promoted flows, guest to host: from the link to the host socket without a hop (rn_promote.h). */
#ifndef RN_FAST_UP_H
#define RN_FAST_UP_H

#include "rn_link.h"
#include "rn_parse.h"
#include "rn_stage.h"

/* CFFI BEGIN */
struct fast_up_config {
	struct classify_config parse; /* frames are held to the same rules as by classify */
	int offload;	      /* the link completes checksums */
	int bypass;	      /* TCP segments go to egress without classify: they are parsed here anyway */
	int direct;	      /* ACKs are written to the link from here; else guest_rx writes them (capture, bad wire, streams) */
	int flows_fd;	      /* SOCK_SEQPACKET from egress: sockets of flows (rn_fdpass.h) */
};
/* CFFI END */

struct fast_up; /* fast_up.c */

/* After the rings are granted: egress is at the other end of the first input, guest_rx of output RN_ROLE_GUEST. NULL: out of
 * memory, or rn_stage_error() is set. @flows: the flow table, must outlive it; @link: the caller's. */
struct fast_up *fast_up_new(struct rn_stage *s, const struct rn_link *link, void *flows, uint64_t flows_size,
			    const struct fast_up_config *cfg);
void fast_up_free(struct fast_up *u);

/* A notice that came by a ring. */
void fast_up_notice(struct fast_up *u, const struct rn_desc *d);

/* May frames be read, as far as this is concerned? 0: no room for a notice (asked for), or a barrier is out. */
int fast_up_open(struct fast_up *u);

/* Take a frame that passed the link's checks. It goes where this says, and then fast_up_sent(). */
enum fast_up_way { FAST_UP_CLASSIFY, /* the usual way */
		   FAST_UP_DONE,     /* nowhere: done with it */
		   FAST_UP_BRIDGE,   /* to egress; *@p is what there is to know of it */
		   FAST_UP_HELD,     /* nowhere yet: its buffer is kept until fast_up_settle() */
		   FAST_UP_BEHIND }; /* behind what is held: fast_up_settle(), and ask again */
enum fast_up_way fast_up_take(struct fast_up *u, uint8_t *eth, uint32_t len, uint16_t flags, uint64_t began, struct rn_parsed *p);
void fast_up_sent(struct fast_up *u);

struct fast_frame {
	uint8_t *eth;
	uint32_t len;
	uint16_t flags;
	uint8_t done; /* 1: nothing is left to do with it; 0: it goes to egress */
	uint32_t flow;
	uint64_t began; /* as given to fast_up_take() */
	struct rn_parsed p;
};
int fast_up_full(const struct fast_up *u); /* 1: no more can be held */
/* Send what is held: how many frames, *@frames in the order in which they came. At the end of a turn at the latest. */
uint32_t fast_up_settle(struct fast_up *u, const struct fast_frame **frames);

/* End of a turn: acknowledgements owed go out. 1: some are left for want of room or a buffer (asked for). */
int fast_up_flush(struct fast_up *u);

void fast_up_event(struct fast_up *u, uint32_t index, uint32_t events); /* RN_TAG_FLOW */
uint64_t fast_up_deadline(const struct fast_up *u); /* CLOCK_MONOTONIC ns; UINT64_MAX: none */

#endif
