/* relay.h - one way of the second NIC: a link's frames onto a ring, or a ring's onto a link, whole and unchanged.
 *
 * guest_tx, guest_rx and vmnet each have a side of it; nothing parses a frame here but its length, its
 * virtio-net header and the group bit of its destination.
 */
#ifndef RN_RELAY_H
#define RN_RELAY_H

#include "rn_link.h"
#include "rn_stage.h"

/* Most broadcast and multicast frames a second that pass one way, as a token bucket one second deep. */
struct rn_storm {
	uint64_t rate;	 /* frames a second; 0: no limit */
	uint64_t credit; /* ns; a frame costs 1 s / rate, and it holds at most 1 s */
	uint64_t at;	 /* CLOCK_MONOTONIC ns of the last look */
};

/* Which counters are meant: enum rn_counter, RN_NCOUNTERS: none. */
struct rn_relay_counts {
	uint32_t frames, bytes; /* moved, besides the stage's own frames_in and so on */
	uint32_t down;		/* relay_out: the link's interface is down or gone */
	uint32_t failed;	/* reads or writes that failed */
	uint32_t runt, oversize, vnet_header; /* relay_in */
	uint32_t storm;
	uint32_t full; /* relay_out: writes the link refused for now */
};

/* From a link into buffers of the stage's own part, onto output @role. */
struct relay_in {
	struct rn_link link;
	int role;		/* enum rn_role */
	uint32_t spare_large;	/* large buffers left to others of this stage; 0: none */
	uint32_t index;		/* of its event: RN_EV(RN_TAG_LINK, index) */
	uint32_t tap;		/* enum rn_tap_point of the link, */
	int dir;		/* and enum rn_pcap_dir of its frames */
	struct rn_storm storm;
	struct rn_relay_counts c;
	int readable;		/* 1: the link has not said EAGAIN since its last event */
	int gone;		/* 1: end of file, or the device is no more */
	struct rn_buf *next;	/* large, the next frame is read into it; NULL: to be allocated */
};

/* From input @in onto a link. */
struct relay_out {
	struct rn_link link;
	uint32_t in;
	uint32_t index;
	uint32_t tap; /* as of relay_in */
	int dir;
	struct rn_storm storm;
	struct rn_relay_counts c;
	int blocked;		/* 1: the link said EAGAIN and no event came since */
};

/* Is it one that frames can pass? 0, or -EINVAL with rn_stage_error(). */
int relay_link_check(struct rn_stage *s, const struct rn_link *link);

/* Each: 0 or a negative errno, rn_stage_error() has the text. Opens the link and watches it: one way alone, or, for
 * a link that is read and written by one stage, relay_watch_both() for the two. */
int relay_in_watch(struct rn_stage *s, struct relay_in *r);
int relay_out_watch(struct rn_stage *s, struct relay_out *r);
/* From now on this link instead, its descriptor -1: none. On an error the old one stays. */
int relay_in_set(struct rn_stage *s, struct relay_in *r, const struct rn_link *link);
int relay_out_set(struct rn_stage *s, struct relay_out *r, const struct rn_link *link);
int relay_watch_both(struct rn_stage *s, struct relay_in *in, struct relay_out *out);

/* A bounded batch. Returns frames moved, or a negative errno: fatal. */
int relay_in_turn(struct rn_stage *s, struct relay_in *r);
int relay_out_turn(struct rn_stage *s, struct relay_out *r);

void relay_in_fini(struct rn_stage *s, struct relay_in *r);
void relay_out_fini(struct relay_out *r);

/* May one more group frame pass now? */
int rn_storm_pass(struct rn_storm *st, uint64_t now);

#endif
