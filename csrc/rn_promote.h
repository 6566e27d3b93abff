/* rn_promote.h - how the halves of a flow move between stages, and what the stages tell each other about it.
 *
 * egress makes every flow and runs both halves through the handshake. A settled flow is offered: `up` to guest_tx, which
 * then takes in-order segments from the link straight to send(); `down` to guest_rx, which reads the host socket straight
 * to the link. What is not simple takes the slow way through classify to egress, as before; egress takes back the halves
 * it needs, and offers them again later. Nothing depends on who owns a half but speed:
 *
 *   up     Owned by one of egress and guest_tx. Whoever is not egress claims the half for each segment (BUSY), so that
 *          egress can take it at any other moment. Only the segment at rcv_nxt is taken outside egress, so what is still
 *          under way to egress through the rings is old or early when it gets there, and TCP knows what to do with both.
 *   down   Owned by one of egress and guest_rx. The offer comes through egress's ring to guest_rx, behind the frames that
 *          egress sent. It is given back as a whole, with a notice (end of file, error, no progress), or taken by egress.
 *   acks   While down is guest_rx's, an ACK that only acknowledges and opens the window goes into struct rn_acks. Any other
 *          (duplicate, SACK) is egress's, which takes the half back first.
 *
 * Notices are descriptors with RN_DESC_FLOW in the same rings as the frames, so that order is kept; descriptors of
 * sockets come by SCM_RIGHTS over a socket pair from egress (rn_fdpass.h), sent before the notice. So both queues have one
 * order, and the first offer of a flow finds its socket; unless a process was killed between the two. Then what is found is
 * looked at (rn_pass_current()), and what is missing is said (RN_FN_LACKS).
 *
 * A stage without descriptors left says so of each flow. egress offers it none for a while, longer each time.
 */
#ifndef RN_PROMOTE_H
#define RN_PROMOTE_H

#include "rn_fdpass.h"
#include "rn_flow.h"
#include "rn_proto.h"
#include "rn_ring.h"
#include "rn_session.h"

#include <sched.h>

enum rn_flow_notice { /* rn_desc: off RN_NOTICE_OFF | flow's index, len its generation, flags RN_DESC_FLOW | notice << 8 */
	RN_FN_OFFER = 1, /* egress to guest_tx or guest_rx: the half is yours; the socket came before it */
	RN_FN_CLOSE,	 /* egress to both: forget the flow, close its socket */
	RN_FN_BACK,	 /* guest_rx to egress: down is yours */
	RN_FN_ACKS,	 /* guest_tx or egress to guest_rx: what the owner of down waited for is in struct rn_acks */
	RN_FN_BARRIER,	 /* guest_tx through classify to egress: every earlier segment of the flow is ahead of this, */
	RN_FN_BARRIER_OVER, /* egress to guest_tx: and was dealt with */
	RN_FN_LACKS, /* guest_tx (through classify, or beside it) or guest_rx to egress: the socket did not come, or could not be held */
	RN_FN_RESET /* I am a new process. guest_tx (through classify) or guest_rx to egress: I have no sockets. egress to both:
		     * forget all flows */
};
static inline uint16_t rn_fn_flags(enum rn_flow_notice n)
{
	return (uint16_t)(RN_DESC_FLOW | (unsigned)n << 8);
}
static inline uint32_t rn_fn_flow(const struct rn_desc *d)
{
	return (uint32_t)d->off;
}
static inline enum rn_flow_notice rn_fn_of(const struct rn_desc *d)
{
	return (enum rn_flow_notice)(d->flags >> 8);
}

enum rn_acks_want {
	RN_WANT_NOTHING = 0,
	RN_WANT_ACK, /* an ACK of at least want_ack */
	RN_WANT_ANY  /* any news: the window is closed */
};

/* --- many senders (fast_turns.c, tcp_up.c) --- */

#define RN_CROWD 32u		/* flows, from which on their windows together are looked at, not each by itself */
#define RN_CROWD_OPEN (2u << 20) /* bytes of windows open at a time then: what the way to the host takes in a millisecond */

/* --- owner words --- */

#define RN_OWNER_BUSY 0x80000000u /* the owner is at work on the half this moment */

static inline uint32_t rn_owner(uint32_t row)
{
	return row + 1;
}

/* F1: the owner (@me, not egress) begins work on its half. 1: it may; 0: the half is not its own any more. */
static inline int rn_half_claim(_Atomic uint32_t *owner, uint32_t me)
{
	uint32_t mine = me;

	/* acquire pairs the release of whoever owned it before: the half's fields */
	return atomic_compare_exchange_strong_explicit(owner, &mine, me | RN_OWNER_BUSY, memory_order_acquire,
						       memory_order_relaxed);
}

/* F1: end of that work; the half is @to's from here on (often the same). */
static inline void rn_half_leave(_Atomic uint32_t *owner, uint32_t to)
{
	atomic_store_explicit(owner, to, memory_order_release); /* pairs the acquire in claim and seize */
}

/**
 * rn_half_seize() - F1: egress takes a half
 * @owner:	Owner word
 * @me:		egress
 * @stop:	The stage's stop word (S2)
 *
 * Waits while the other stage is at work on it: one segment, or a few frames. If that process was killed just there, until
 * its successor gives the half back (rn_half_heir()), or until this stage is told to stop.
 */
static inline void rn_half_seize(_Atomic uint32_t *owner, uint32_t me, const _Atomic uint32_t *stop)
{
	for (uint32_t spins = 0;; spins++) {
		uint32_t now = atomic_load_explicit(owner, memory_order_relaxed);

		if ((now & RN_OWNER_BUSY) && spins > 64 && stop && atomic_load_explicit(stop, memory_order_acquire))
			now &= ~RN_OWNER_BUSY, atomic_store_explicit(owner, now, memory_order_relaxed);

		if (!(now & RN_OWNER_BUSY) &&
		    atomic_compare_exchange_weak_explicit(owner, &now, me, memory_order_acq_rel, memory_order_relaxed))
			return;
		if (spins > 64)
			sched_yield();
	}
}

/* F1: a new process of stage @dead gives what its predecessor had to @to. 1: that one was killed at work on it. */
static inline int rn_half_heir(_Atomic uint32_t *owner, uint32_t dead, uint32_t to)
{
	uint32_t now = atomic_load_explicit(owner, memory_order_acquire);

	if ((now & ~RN_OWNER_BUSY) != dead)
		return 0;
	/* Nobody else changes it while BUSY is set; without it, egress may, and then it has it. */
	return atomic_compare_exchange_strong_explicit(owner, &now, to, memory_order_acq_rel, memory_order_relaxed) &&
	       (now & RN_OWNER_BUSY);
}

/* --- sockets --- */

/* Does the packet @p name a flow that is there, and come from the egress that is? Else it is left over: of a flow that ended,
 * or of a process that was killed, and nobody will say when to close what came with it. */
static inline int rn_pass_current(const struct rn_pass *p, const struct rn_flows *flows, uint32_t nflows,
				  const struct rn_session *session, uint32_t egress_row)
{
	const struct rn_flow *f;

	if (p->index >= nflows || (p->proto != RN_IPPROTO_TCP && p->proto != RN_IPPROTO_UDP))
		return 0;
	f = &flows->flow[p->index];
	if (f->gen != p->gen || atomic_load_explicit(&f->state, memory_order_relaxed) == RN_FL_FREE)
		return 0; /* egress made the flow before it sent this: the system calls order the two */
	return !session ||
	       (uint16_t)atomic_load_explicit(&session->cells[egress_row].generation, memory_order_relaxed) == p->sender;
}

/* --- fields another stage reads while the owner writes them: whole words, any of them true a moment ago --- */

#define RN_LOOK(field) __atomic_load_n(&(field), __ATOMIC_RELAXED)
#define RN_SHOW(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELAXED)

/* --- acknowledgements --- */

static inline uint32_t rn_acks_ack(uint64_t w)
{
	return (uint32_t)(w >> 32);
}
static inline uint32_t rn_acks_wnd(uint64_t w)
{
	return (uint32_t)w;
}

/* Sequence number of a segment without data, from whoever: what was sent, but not outside a window that the guest took back
 * (RFC 9293 3.10.7.4, first). Acquire: after what is shown before a frame goes to the link. */
static inline uint32_t rn_acks_seq(const struct rn_flow *f)
{
	uint64_t w = atomic_load_explicit(&f->acks.ack_wnd, memory_order_relaxed);
	uint32_t max = __atomic_load_n(&f->down.snd_max, __ATOMIC_ACQUIRE), edge = rn_acks_ack(w) + rn_acks_wnd(w);

	return (int32_t)(edge - max) < 0 ? edge : max;
}

/* K1: tell the owner of down. Never back: of two that tell, the newer acknowledgment stays. @same: 1: the window of the
 * same acknowledgment number may change too (guest_tx, which sees the guest's segments in order). 1: it was news. */
static inline int rn_acks_post(struct rn_acks *k, uint32_t ack, uint32_t wnd, uint64_t now_ns, int same)
{
	uint64_t old = atomic_load_explicit(&k->ack_wnd, memory_order_relaxed), new = (uint64_t)ack << 32 | wnd;

	do {
		int32_t ahead = (int32_t)(ack - rn_acks_ack(old));

		if (ahead < 0 || (ahead == 0 && (!same || old == new)))
			return 0;
	} while (!atomic_compare_exchange_weak_explicit(&k->ack_wnd, &old, new, memory_order_release, memory_order_relaxed));
	atomic_store_explicit(&k->at_ns, now_ns, memory_order_relaxed);
	return 1;
}

/* K4, after rn_acks_post(): 1: the owner of down waits for this: send it RN_FN_ACKS. */
static inline int rn_acks_wake(struct rn_acks *k)
{
	uint32_t want;

	/* The store of ack_wnd before this load, for everybody: else both could miss the other's (pairs K3). */
	atomic_thread_fence(memory_order_seq_cst);
	want = atomic_load_explicit(&k->want, memory_order_acquire); /* pairs K3: want_ack was written before it */
	if (want == RN_WANT_NOTHING)
		return 0;
	if (want == RN_WANT_ACK) {
		uint32_t ack = rn_acks_ack(atomic_load_explicit(&k->ack_wnd, memory_order_relaxed));

		if ((int32_t)(ack - atomic_load_explicit(&k->want_ack, memory_order_relaxed)) < 0)
			return 0;
	}
	return atomic_exchange_explicit(&k->want, RN_WANT_NOTHING, memory_order_seq_cst) != RN_WANT_NOTHING;
}

#endif
