/* fast_turns.c - when many flows send at once: whose window is opened next.
 *
 * A guest with a thousand senders has a thousand windows to fill, which together are far more than the way to the host
 * holds. What is sent then waits in the guest's own queue: its kernel measures round-trip times of tenths of a second, cuts
 * its super-frames down to what a way that slow is worth (Linux: what the pacing rate sends in about 1 ms), and each of
 * them costs nearly what one of 64 KiB does. Who gets how much is left to chance.
 *
 * So among RN_CROWD senders a window that was used up is opened in turn: who waits longest first, while less than
 * RN_CROWD_OPEN is open in this way. That is what a millisecond or two take, so a sender whose turn it is sees a short way, and
 * all get the same (round robin, bytes of window as quantum). A turn is QUANTA times a window of QUANTUM, each opened by the
 * acknowledgement of what used up the one before: a super-frame and an ACK each, and one ACK more for the first. What came is
 * acknowledged at once all the same, and no edge is taken back (RFC 9293 3.8.6). A turn that is not used within TURN_NS does
 * not keep others waiting; that is far more than what is open takes when it is sent in pieces of 2 KiB, else there would be
 * more and more open, and it never got better.
 *
 * What is a crowd: rn_crowd.h. One that sends beside a hundred that ask and answer has its window for itself once it has
 * sent a QUANTUM; until then it could be one of many that begin at once. Other stages do something because of it too (tcp_up.c).
 */
#include "fast_up_internal.h"

#define QUANTUM (64u << 10)	/* bytes at least: a super-frame */
#define QUANTA 4u		/* a turn */
#define TURN_NS 50000000ull

static void say_crowded(struct fast_up *u)
{
	int on = u->turns.crowd.crowded;

	u->s->c[RN_C_now_tcp_crowded] = (uint64_t)on;
	/* relaxed: egress's tcp_update_window() guesses with it */
	atomic_store_explicit(&u->flows->crowd, on ? u->turns.quantum : 0, memory_order_relaxed);
}

void fast_turns_init(struct fast_up *u)
{
	struct fast_turns *t = &u->turns;
	uint32_t mtu = u->cfg.parse.mtu;

	t->quantum = 2 * mtu < QUANTUM ? QUANTUM : 2 * mtu;
	t->used_up = 2 * mtu < t->quantum / 2 ? 2 * mtu : t->quantum / 2; /* a segment at least: else nobody could send that */
	t->open_first = t->open_last = t->wait_first = t->wait_last = t->now = NONE;
	t->crowd.many = RN_CROWD;
	say_crowded(u); /* as it may be what a predecessor found */
}

void fast_turns_close(struct fast_up *u, uint32_t i)
{
	struct fast_turns *t = &u->turns;
	struct fast_turn *x = &u->flow[i].turn;

	if (!x->open)
		return;
	t->open -= x->left;
	x->open = 0;
	*(x->prev == NONE ? &t->open_first : &u->flow[x->prev].turn.next) = x->next;
	*(x->next == NONE ? &t->open_last : &u->flow[x->next].turn.prev) = x->prev;
}

void fast_turns_start(struct fast_up *u, uint32_t i, uint32_t rcv_nxt)
{
	u->flow[i].turn.rcv_nxt = rcv_nxt;
	rn_crowd_join(&u->turns.crowd, &u->flow[i].turn.crowd);
}

/* Flow @i has sent up to @rcv_nxt: how many share the way, and what is left of its turn. */
static void sent(struct fast_up *u, uint32_t i, uint32_t rcv_nxt, uint32_t wnd)
{
	struct fast_turns *t = &u->turns;
	struct fast_turn *x = &u->flow[i].turn;
	uint32_t len = rcv_nxt - x->rcv_nxt;

	x->rcv_nxt = rcv_nxt;
	if (RN_UNLIKELY(rn_crowd_sent(&t->crowd, &x->crowd, len, u->s->now)))
		say_crowded(u);
	if (x->open && wnd < t->used_up && !x->credit) {
		fast_turns_close(u, i);
	} else if (x->open && wnd < x->left) {
		t->open -= x->left - wnd;
		x->left = wnd;
	}
}

enum fast_turn_may fast_turns_may(struct fast_up *u, uint32_t i, uint32_t rcv_nxt, uint32_t wnd)
{
	struct fast_turns *t = &u->turns;
	struct fast_turn *x = &u->flow[i].turn;

	sent(u, i, rcv_nxt, wnd);
	if (!t->crowd.crowded && (u->n < RN_CROWD || x->crowd.sent >= t->quantum))
		return FAST_TURN_FREE;
	if (u->flow[i].told_window)
		return FAST_TURN_NOW; /* of its room the kernel tells once */
	if (wnd >= t->used_up)
		return FAST_TURN_LATER;
	if (x->open && x->credit)
		return FAST_TURN_NOW;
	if (t->now != i && (t->wait_first != NONE || t->open + t->quantum > RN_CROWD_OPEN)) {
		if (!x->waits) {
			x->waits = 1;
			x->wait_next = NONE;
			*(t->wait_last == NONE ? &t->wait_first : &u->flow[t->wait_last].turn.wait_next) = i;
			t->wait_last = i;
		}
		return FAST_TURN_LATER;
	}
	return FAST_TURN_NOW;
}

void fast_turns_open(struct fast_up *u, uint32_t i, uint32_t wnd, uint32_t by)
{
	struct fast_turns *t = &u->turns;
	struct fast_turn *x = &u->flow[i].turn;

	if (!x->open)
		x->credit = QUANTA * u->turns.quantum;
	x->credit = x->credit > by ? x->credit - by : 0;
	fast_turns_close(u, i);
	x->open = 1;
	x->left = wnd;
	x->until = u->s->now + TURN_NS;
	x->prev = t->open_last;
	x->next = NONE;
	*(t->open_last == NONE ? &t->open_first : &u->flow[t->open_last].turn.next) = i;
	t->open_last = i;
	t->open += wnd;
	u->s->c[RN_C_tcp_turns]++;
}

uint32_t fast_turns_next(struct fast_up *u)
{
	struct fast_turns *t = &u->turns;

	if (RN_UNLIKELY(t->crowd.crowded && rn_crowd_overdue(&t->crowd, u->s->now)) && rn_crowd_next(&t->crowd, u->s->now))
		say_crowded(u);
	if (RN_LIKELY(t->wait_first == NONE))
		return NONE;
	while (t->open_first != NONE && u->s->now >= u->flow[t->open_first].turn.until)
		fast_turns_close(u, t->open_first);
	return (t->crowd.crowded || u->n >= RN_CROWD) && t->open + t->quantum > RN_CROWD_OPEN ? NONE : t->wait_first;
}

void fast_turns_done(struct fast_up *u)
{
	struct fast_turns *t = &u->turns;
	struct fast_turn *x = &u->flow[t->wait_first].turn;

	x->waits = 0;
	t->wait_first = x->wait_next;
	if (t->wait_first == NONE)
		t->wait_last = NONE;
}

uint64_t fast_turns_deadline(const struct fast_up *u)
{
	const struct fast_turns *t = &u->turns;
	uint64_t at = t->crowd.crowded ? t->crowd.began + RN_CROWD_EPOCH_MAX_NS : UINT64_MAX;

	/* The turn that ends next makes room for the next one, unless it is used before. */
	if (t->wait_first != NONE && t->open_first != NONE && u->flow[t->open_first].turn.until < at)
		at = u->flow[t->open_first].turn.until;
	return at;
}
