/* rn_impair.h - a bad wire, by seed: drops, duplicates, reorders, delays, corrupts, truncates, stalls.
 *
 * One struct rn_impair stands in one direction of one place: behind a link's read, before a link's write, or
 * between a stage and one of its output rings (rn_stage.h). What is fed to it comes out of it changed, late,
 * twice or never. What it does to frame n depends on the seed, n and the frame's length alone, never on the
 * clock: the same frames in the same order meet the same fate, however fast they come.
 */
#ifndef RN_IMPAIR_H
#define RN_IMPAIR_H

#include "rn_layout.h"
#include "rn_link.h"

/* CFFI BEGIN */
#define RN_IMPAIR_ALWAYS 4294967296 /* probabilities are in 2^-32: this is 100 % */
#define RN_IMPAIR_GAP_MAX 1000	    /* frames that may overtake one */
#define RN_IMPAIR_BITS_MAX 64	    /* bits flipped in a corrupted frame */
#define RN_IMPAIR_LATE_NS 10000000  /* a frame to be overtaken waits no longer than this if none comes */
#define RN_IMPAIR_HELD_MAX 65536    /* frames held at most, */
#define RN_IMPAIR_BYTES_MAX 67108864 /* and their bytes: then it is not open, and who feeds it waits */

struct rn_impair_spec { /* all zero: frames pass as they are */
	uint64_t seed;
	/* Probabilities, in [0, RN_IMPAIR_ALWAYS]. Bursts are Gilbert's model: each frame may move the wire from
	 * good to bad (enter) or back (leave); what meets a bad wire is lost. */
	uint64_t drop, burst_enter, burst_leave, dup, reorder, corrupt, truncate;
	uint32_t reorder_gap;  /* frames that overtake a reordered one, in [1, RN_IMPAIR_GAP_MAX] if any is */
	uint32_t corrupt_bits; /* bits flipped, in [1, RN_IMPAIR_BITS_MAX] if any is */
	uint64_t delay_ns, jitter_ns; /* of each frame: delay - jitter .. delay + jitter, order kept */
	uint64_t stall_ns, stall_every_ns; /* no frame goes in or out for the last stall_ns of each stall_every_ns */
};

enum rn_impaired { /* what was decided about a frame: a set */
	RN_IMPAIRED_DROP = 1,
	RN_IMPAIRED_BURST = 2, /* dropped, on a bad wire */
	RN_IMPAIRED_DUP = 4,
	RN_IMPAIRED_REORDER = 8,
	RN_IMPAIRED_DELAY = 16,
	RN_IMPAIRED_CORRUPT = 32,
	RN_IMPAIRED_TRUNCATE = 64
};

struct rn_impair_stat { /* in + duplicated == out + dropped + held, always */
	uint64_t in, out, held;
	uint64_t dropped, duplicated, reordered, delayed, corrupted, truncated;
	uint64_t held_bytes;
	uint64_t refused; /* by rn_impair_relay(): of out, what the other link did not take */
};

struct rn_impair;

/* 0, or -EINVAL: a number is out of its range. */
int rn_impair_check(const struct rn_impair_spec *spec);
/* @now_ns: CLOCK_MONOTONIC, where the stall's period begins. NULL: @spec is wrong, or out of memory. */
struct rn_impair *rn_impair_new(const struct rn_impair_spec *spec, uint64_t now_ns);
void rn_impair_free(struct rn_impair *im); /* with what it holds */
/* From now on another @spec, as if new; what is held keeps its time. 0, or -EINVAL. */
int rn_impair_change(struct rn_impair *im, const struct rn_impair_spec *spec, uint64_t now_ns);
int rn_impair_idle(const struct rn_impair *im); /* 1: it does nothing to frames, and holds none */
void rn_impair_stat(const struct rn_impair *im, struct rn_impair_stat *out);

/* May a frame be fed, may one come out? 0 in a stall, or (feeding only) when it holds its limit. */
int rn_impair_open(const struct rn_impair *im, uint64_t now_ns);

/* Take a copy of a frame and decide about it; returns enum rn_impaired, 0 if nothing befell it. Out of memory
 * is a drop. @vnet_then_frame: RN_VNET_HLEN bytes of virtio-net header, then @len bytes of frame. @side: bytes
 * that go with it, RN_IMPAIR_SIDE of them, or NULL. */
#define RN_IMPAIR_SIDE 16
int rn_impair_feed(struct rn_impair *im, uint64_t now_ns, const uint8_t *vnet_then_frame, uint32_t len,
		   uint16_t flags, const void *side);

struct rn_impair_frame { /* valid until rn_impair_pop() */
	const uint8_t *vnet_then_frame;
	uint32_t len;
	uint16_t flags;
	const uint8_t *side;
};
/* The next frame that is due. @all: also what is not, stall or no (at the end). 1, or 0: none. */
int rn_impair_peek(struct rn_impair *im, uint64_t now_ns, int all, struct rn_impair_frame *out);
void rn_impair_pop(struct rn_impair *im); /* the frame peeked is done with */
/* When to look again, ns: end of a stall, or the next frame. UINT64_MAX: not before something is fed. */
uint64_t rn_impair_due(const struct rn_impair *im, uint64_t now_ns);

/* Carry frames between two links until @stop_fd is readable: the plain wire that tools/bench measures against.
 * @ab, @ba: NULL, or what happens in that direction. 0, or a negative errno of poll. */
int rn_impair_relay(const struct rn_link *a, const struct rn_link *b, struct rn_impair *ab, struct rn_impair *ba,
		    int stop_fd);
/* CFFI END */
#endif
