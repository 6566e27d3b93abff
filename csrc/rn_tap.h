/* rn_tap.h - a stage's capture points: its inputs and its links, copied to mirrors outside when somebody looks.
 *
 * A point costs one predictable branch while nobody looks: `if (RN_UNLIKELY(s->tapped))`. A frame is seen before it
 * is handled, rn_tap_frame(), so that what is captured is what came; when it was handled, rn_tap_done() finds out by
 * the counters whether the stage dropped it, and why, and that goes into the record. Nothing is visible to the reader
 * before the turn's end.
 *
 * Belongs into struct rn_stage; rn_stage.h has it.
 */
#ifndef RN_TAP_H
#define RN_TAP_H

#include "rn_filter.h"
#include "rn_mirror.h"
#include "rn_pcap.h"
#include "rn_session.h"

/* CFFI BEGIN */
#define RN_TAPS_MAX 4 /* captures at once, a stage */

enum rn_tap_point { /* bits of a mask: input rings in the order of their grant, then its links */
	RN_TAP_INPUT = 0, /* + number of the input, below RN_INPUTS_MAX */
	RN_TAP_LINK = 6, /* the guest's; of a stage that has none, its link to the host */
	RN_TAP_LINK2,	 /* the guest's second */
	RN_NTAP_POINTS
};
/* CFFI END */

struct rn_tap {
	struct rn_mirror_tx tx;
	struct rn_filter filter;
	uint32_t id;	  /* 0: unused */
	uint32_t points;  /* bits of enum rn_tap_point */
	uint32_t snaplen; /* bytes of a frame kept at most */
	uint8_t drops;	  /* 1: only frames that the stage drops */
	struct rn_mirror_rec *rec[2]; /* of the frame being handled; a frame is at two points at most: ring and link */
	uint32_t nrec;
};

struct rn_taps {
	struct rn_tap tap[RN_TAPS_MAX];
	uint16_t drop[RN_NCOUNTERS]; /* numbers of the counters that say why a frame was dropped */
	uint32_t ndrop;
	uint64_t before[RN_NCOUNTERS]; /* their values when the frame came */
	uint8_t open;		       /* 1: a frame was taken by some tap and is being handled */
};

#endif
