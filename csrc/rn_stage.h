/* rn_stage.h - what every stage loop shares: granted objects, the poll loop, counters, cancel.
 *
 * A C stage is an rn_stage_ops and one private struct. The loop calls turn() until it says there was
 * nothing to do, arms every input (rings asleep, outputs and pool starved if the stage said it waits),
 * looks once more, and blocks in epoll_wait on the doorbell, the control socket and the stage's own fds.
 * It returns to Python only when control is readable, when a drain is complete, or on an error.
 */
#ifndef RN_STAGE_H
#define RN_STAGE_H

#include "rn_arena.h"
#include "rn_busy_wait.h"
#include "rn_impair.h"
#include "rn_layout.h"
#include "rn_ring.h"
#include "rn_session.h"
#include "rn_tap.h"

/* CFFI BEGIN */
enum rn_role { /* what a producer calls an output ring; inputs have none and are served in turn */
	RN_ROLE_CLASSIFY = 0, /* frames to be parsed */
	RN_ROLE_BRIDGE,	      /* TCP, UDP, ICMP towards host sockets */
	RN_ROLE_SERVICE,      /* DHCP, DNS */
	RN_ROLE_GUEST,	      /* frames to be written to the guest's link */
	RN_ROLE_HOSTNET,      /* whole frames to the host bridge (NIC2) */
	RN_ROLE_OFFER,	      /* notices about flows to the stage that runs them guest to host (rn_promote.h) */
	RN_NROLES
};

enum rn_run { /* why rn_stage_run() returned */
	RN_RUN_CONTROL = 0, /* a control message (or EOF) waits */
	RN_RUN_DRAINED,	    /* rn_stage_drain() was called and nothing is left to move */
	RN_RUN_STOPPED,	    /* the cell's stop word was set */
	RN_RUN_SIGNAL,	    /* EINTR: let Python run its handlers */
	RN_RUN_ERROR,	    /* rn_stage_error() says what */
	RN_RUN_NOTICE	    /* the kind has something to tell: rn_stage.notice was set */
};

struct rn_stage; /* opaque to Python */

/* NULL if out of memory. @row: index in the stage table. */
struct rn_stage *rn_stage_new(uint32_t row, uint32_t generation);
void rn_stage_free(struct rn_stage *s);
/* Text of the last error, "" if none. */
const char *rn_stage_error(const struct rn_stage *s);

/* Map a whole shared object (MAP_SHARED, read-write unless @ro). NULL with errno set. */
void *rn_map(int fd, uint64_t size, int ro);
void rn_unmap(void *mem, uint64_t size);

/* Grants; each 0 or a negative errno with rn_stage_error() set. The memory must outlive the stage. */
int rn_stage_set_session(struct rn_stage *s, void *mem, uint64_t size);
int rn_stage_set_arena(struct rn_stage *s, void *mem, uint64_t size, int has_part);
int rn_stage_set_bell(struct rn_stage *s, uint32_t row, int fd); /* the stage's own row: what it sleeps on */
int rn_stage_add_input(struct rn_stage *s, void *mem, uint64_t size, uint32_t producer_row);
int rn_stage_add_output(struct rn_stage *s, int role, void *mem, uint64_t size, uint32_t consumer_row);
int rn_stage_set_control(struct rn_stage *s, int fd);
/* Readable when a signal came that Python is to handle: rn_stage_run() returns RN_RUN_CONTROL. A signal that comes just
 * before the loop blocks interrupts nothing. */
int rn_stage_set_wake(struct rn_stage *s, int fd);
/* Look on for at most so many us before going to sleep (rn_busy_wait.h), 0: never. -EINVAL: more than 1000. */
int rn_stage_busy_wait(struct rn_stage *s, uint32_t us);
/* For a successor, after the grants: what its dead generation had handed on already leaves the input rings, and what it
 * held in no ring goes back to its owner. */
int rn_stage_recover(struct rn_stage *s);
/* For tests of the network: a bad wire (rn_impair.h) between this stage and output @where (enum rn_role); or,
 * for @where == RN_IMPAIR_LINK and a stage that has one, between it and its link. After the outputs. */
#define RN_IMPAIR_LINK 6 /* RN_NROLES */
int rn_stage_set_impair(struct rn_stage *s, int where, const struct rn_impair_spec *spec);
/* For a stage whose loop is not in C: frames the bad wires hold, and ms until one wants a look (-1: none). */
uint64_t rn_stage_impair_held(const struct rn_stage *s);
int rn_stage_change_impair(struct rn_stage *s, int where, const struct rn_impair_spec *spec); /* set or not so far */
int rn_stage_impair_wait(const struct rn_stage *s);

/* A capture (rn_tap.h) of the frames at @points (bits of enum rn_tap_point) that match @filter, into the mirror at @mem;
 * @bell: its reader's eventfd. @drops: only those that this stage drops. Memory and descriptor stay the caller's, and
 * must be there until rn_tap_stop(). 0, or a negative errno with rn_stage_error() set (stop: -ENOENT). */
int rn_tap_start(struct rn_stage *s, uint32_t id, void *mem, uint64_t size, int bell, uint32_t points, uint32_t snaplen,
		 int drops, const struct rn_filter *filter);
int rn_tap_stop(struct rn_stage *s, uint32_t id);

void rn_stage_state(struct rn_stage *s, int state); /* publish enum rn_stage_state */
void rn_stage_drain(struct rn_stage *s);	     /* from now on RN_RUN_DRAINED when idle */
/* For debugging: take @frames more, then stand still (RN_ST_PAUSED) but for control, until told otherwise.
 * UINT64_MAX: go on. While it stands, neighbours feel a busy stage. */
void rn_stage_pace(struct rn_stage *s, uint64_t frames);
int rn_stage_paused(struct rn_stage *s); /* 1: it stands */
/* For running a stage on a file: what the stage believes CLOCK_MONOTONIC says, ns; 0: the truth. */
void rn_stage_clock(struct rn_stage *s, uint64_t now_ns);
/* One turn without a loop, after looking at its descriptors. 1: it did something, 0: idle, or negative: error is set. */
int rn_stage_step(struct rn_stage *s);
uint64_t rn_stage_due(struct rn_stage *s); /* when the loop would wake for a timer, ns; UINT64_MAX: never */
int rn_stage_run(struct rn_stage *s);		     /* enum rn_run; needs an init of a kind first */
uint64_t rn_stage_counter(const struct rn_stage *s, uint32_t i);
void rn_stage_fini(struct rn_stage *s); /* the kind's fini, counters published */
/* CFFI END */

#define RN_INPUTS_MAX 6
#define RN_UNTOLD 64 /* slots put at most before an output is published */

/* epoll_event.data.u64 = tag << 32 | index */
enum rn_tag { RN_TAG_BELL = 0, RN_TAG_CONTROL, RN_TAG_LINK, RN_TAG_FLOW, RN_TAG_OTHER, RN_TAG_LISTEN, RN_TAG_PROXY };
#define RN_EV(tag, index) ((uint64_t)(tag) << 32 | (uint32_t)(index))

struct rn_stage_ops {
	/* One bounded batch; never blocks. >0: did something, call again; 0: idle; <0: fatal, error is set. */
	int (*turn)(struct rn_stage *s);
	/* An fd of the stage's own is ready (RN_TAG_LINK and up): note it; the work is done in turn(). */
	void (*event)(struct rn_stage *s, uint32_t tag, uint32_t index, uint32_t events);
	/* CLOCK_MONOTONIC ns of the next timer, or UINT64_MAX. */
	uint64_t (*deadline)(struct rn_stage *s);
	/* draining and idle: 1 if nothing is left to wait for (NULL: always). */
	int (*drained)(struct rn_stage *s);
	void (*fini)(struct rn_stage *s);
};

struct rn_stage {
	const struct rn_stage_ops *ops;
	void *priv;
	uint32_t row, generation;
	struct rn_pool pool;
	struct rn_ring_rx in[RN_INPUTS_MAX];
	uint32_t in_row[RN_INPUTS_MAX]; /* producer's stage row */
	uint32_t nin;
	uint32_t next_in; /* round robin start */
	uint8_t notice;	  /* set by a turn: rn_stage_run() returns RN_RUN_NOTICE, once */
	struct rn_ring_tx out[RN_NROLES];
	uint32_t out_row[RN_NROLES]; /* consumer's stage row */
	uint8_t has_out[RN_NROLES];
	struct rn_buf *untold[RN_NROLES][RN_UNTOLD]; /* of slots put and not yet published: ours until then */
	uint32_t nuntold[RN_NROLES];
	uint8_t want_room[RN_NROLES]; /* turn() sets: I stopped for room in this output; RN_WANT_TIME: for its wire */
	uint8_t want_buf;	      /* turn() sets: I stopped for a buffer of my own part */
	uint8_t hold_input;	      /* turn() sets: I will not read inputs until room or buffers appear */
	uint8_t hold_inputs;	      /* the same of single inputs, a bit each */
	uint8_t draining;
	uint8_t broken;		/* a neighbour's counter was impossible: the loop ends, error says which */
	uint32_t turn_free[2];	/* free buffers by class when the turn began */
	int bells[RN_STAGES_MAX];
	int epfd, control, wake;
	struct rn_session *session;
	struct rn_cell *cell;
	struct rn_impair *impair[RN_NROLES + 1]; /* by role; the last is the link's. NULL: none */
	uint8_t impair_stuck[RN_NROLES + 1];	 /* turn() sets: what is due waits for room, a buffer or the link */
	uint8_t impaired;			 /* 1: there is one */
	uint32_t tapped;			 /* points somebody captures: bits of enum rn_tap_point */
	struct rn_taps *taps;			 /* NULL until the first capture */
	uint64_t now; /* CLOCK_MONOTONIC ns, read once a turn */
	uint64_t clock; /* ns, or 0: rn_stage_clock() */
	uint64_t pace;	/* frames_in at which it stands still; UINT64_MAX: never */
	struct rn_busy_wait busy;
	uint64_t c[RN_NCOUNTERS];
	/* The log (rn_event.h): of each counter, what was told of it, and how many more may be in this window. */
	uint64_t told[RN_NCOUNTERS];
	uint8_t may_tell[RN_NCOUNTERS];
	uint16_t notable[RN_NCOUNTERS];
	uint32_t nnotable;
	uint64_t window_ns;
	uint32_t samples; /* counts frames, to stamp one in RN_SAMPLE */
	uint32_t inlined; /* the same of frames that pass no ring */
	uint64_t wakes_before; /* doorbells rung by earlier generations */
	char error[256];
};

#define RN_SAMPLE 64u /* one frame in so many is stamped, for the latency between stages */

/* Whom an event is about. */
struct rn_who {
	uint8_t guest[16], peer[16];
	uint16_t guest_port, peer_port;
	uint8_t proto;
	uint32_t flow, flow_gen; /* RN_NO_FLOW: none */
};
/* Count one, and note it with whom it was about; @who NULL: not known. */
void rn_stage_count(struct rn_stage *s, uint32_t counter, const struct rn_who *who);
/* Would it be noted, or only counted? For a caller to whom finding out @who is work. */
static inline int rn_stage_tells(const struct rn_stage *s, uint32_t counter)
{
	return s->may_tell[counter] != 0;
}
/* Note anything else. */
void rn_stage_note(struct rn_stage *s, enum rn_event_kind kind, const struct rn_who *who, uint64_t value);

/* rn_trace.c, for rn_stage.c. */
void rn_trace_begin(struct rn_stage *s);
void rn_trace_counters(struct rn_stage *s);
void rn_trace_stamp(struct rn_stage *s, struct rn_buf *b);

/* rn_buf_of() for a descriptor of an input: what is sampled has arrived. */
void rn_stage_arrived(struct rn_stage *s, const struct rn_buf *b);
static inline struct rn_buf *rn_stage_buf(struct rn_stage *s, const struct rn_desc *d)
{
	struct rn_buf *b = rn_buf_of(&s->pool, d);

	if (RN_UNLIKELY(b && b->first_ns))
		rn_stage_arrived(s, b);
	return b;
}

#define RN_WANT_TIME 2u /* want_room: not for a slot, for the end of a stall */
_Static_assert(RN_IMPAIR_LINK == RN_NROLES, "one place behind the outputs");

/* Feed a bad wire of this stage, with counters. */
void rn_stage_impair_feed(struct rn_stage *s, struct rn_impair *im, const uint8_t *eth, uint32_t len, uint16_t flags,
			  const void *side);
/* May it be fed? While draining always: what waits is let out at once. */
static inline int rn_stage_impair_open(const struct rn_stage *s, const struct rn_impair *im)
{
	return s->draining || rn_impair_open(im, s->now);
}

/* Captures: rn_tap_frame() when a frame comes, rn_tap_done() when it was handled, rn_tap_undo() if it stays where it
 * was and will come again. @point: enum rn_tap_point; @dir: enum rn_pcap_dir or 0. A frame in two pieces, its headers in
 * the first: rn_tap_frame2(). */
void rn_tap_frame2(struct rn_stage *s, uint32_t point, int dir, const uint8_t *head, uint32_t head_len,
		   const uint8_t *rest, uint32_t rest_len);
void rn_tap_close(struct rn_stage *s, int undo);
void rn_tap_flush(struct rn_stage *s); /* the turn is over */
void rn_tap_end(struct rn_stage *s);   /* the stage is over */
static inline void rn_tap_frame(struct rn_stage *s, uint32_t point, int dir, const uint8_t *eth, uint32_t len)
{
	if (RN_UNLIKELY(s->tapped & 1u << point))
		rn_tap_frame2(s, point, dir, eth, len, NULL, 0);
}
static inline void rn_tap_done(struct rn_stage *s)
{
	if (RN_UNLIKELY(s->tapped) && s->taps->open)
		rn_tap_close(s, 0);
}
static inline void rn_tap_undo(struct rn_stage *s)
{
	if (RN_UNLIKELY(s->tapped) && s->taps->open)
		rn_tap_close(s, 1);
}

/* Set the error text; returns @err, so that `return rn_fail(s, -EPROTO, "...")` reads well. */
int rn_fail(struct rn_stage *s, int err, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

int rn_stage_watch(struct rn_stage *s, int fd, uint32_t events, uint64_t data); /* epoll_ctl ADD */

/* Publish every output ring that has unpublished slots. The loop does it after each turn. */
void rn_stage_publish(struct rn_stage *s);

/* Publish one output now: what its consumer has to do then begins while this turn goes on. */
void rn_stage_publish_now(struct rn_stage *s, int role);

/* Put a finished frame on an output: @eth points at the Ethernet header inside @b. The caller has seen
 * rn_stage_room(). Counts nothing. */
void rn_stage_emit(struct rn_stage *s, int role, struct rn_buf *b, const uint8_t *eth, uint32_t len, uint16_t flags);

/* Put a notice (rn_promote.h) on an output, past its bad wire if it has one. 0, or -EAGAIN: full, want_room is set. */
int rn_stage_notice(struct rn_stage *s, int role, uint16_t flags, uint32_t index, uint32_t gen);

/* Slots free on output @role, 0 if full (want_room is then set) or absent. Never negative: an impossible
 * head makes the stage end with an error after the turn. */
int rn_stage_room(struct rn_stage *s, int role, uint32_t want);

/* rn_ring_peek() on input @i; an impossible tail sets the error and makes the loop end. Never below 0. */
int rn_stage_peek(struct rn_stage *s, uint32_t i, uint32_t max);

uint64_t rn_now_ns(void); /* CLOCK_MONOTONIC */
/* The same, or what rn_stage_clock() said. */
static inline uint64_t rn_stage_now(const struct rn_stage *s)
{
	return RN_UNLIKELY(s->clock) ? s->clock : rn_now_ns();
}

/* Frames of promoted flows, which pass between the guest's link and a host socket and no ring: one in RN_SAMPLE is timed, and
 * its time is the stage's own row in struct rn_latency. When one begins: CLOCK_MONOTONIC ns, or 0: this one is not timed. */
static inline uint64_t rn_stage_inline_begin(struct rn_stage *s)
{
	return RN_UNLIKELY(!(++s->inlined % RN_SAMPLE)) ? rn_now_ns() : 0;
}
void rn_stage_inline_end(struct rn_stage *s, uint64_t began); /* @began not 0 */

/* The pieces of rn_stage_run(), for a stage whose loop is not in C:
 *   begin; work; end; if idle and arm() == 0: block until an fd is readable or the deadline; disarm. */
void rn_stage_begin(struct rn_stage *s); /* reads the clock, clears want_room, want_buf, hold_input(s) */
void rn_stage_end(struct rn_stage *s);	 /* publishes outputs, heartbeat and counters */
/* 0: nothing to do, may block (rings are armed, the cell says asleep). 1: something came: another turn, nothing
 * is armed. -EPROTO: a neighbour's counter is impossible, error is set. */
int rn_stage_arm(struct rn_stage *s);
void rn_stage_disarm(struct rn_stage *s); /* awake again, the doorbell is quiet */
int rn_stage_stopped(const struct rn_stage *s); /* 1: the cell's stop word is set */

#endif
