/* rn_event.c - a stage's log of decisions (layout: rn_event.h).
 *
 * One writer, any number of readers, nobody waits: an entry is marked as being written, written, then marked whole with
 * its number. A reader copies it and looks at the mark again; if the writer came round meanwhile, the entry is gone.
 */
#include "rn_event.h"

#include <errno.h>
#include <string.h>

#include "rn_session.h"

/* Our copy of an entry before the second look at its mark. */
static inline void copy_first(void)
{
#ifdef __SANITIZE_THREAD__
	atomic_signal_fence(memory_order_acquire); /* ThreadSanitizer knows no fences (gcc -Wtsan) */
#else
	atomic_thread_fence(memory_order_acquire);
#endif
}

uint64_t rn_event_put(struct rn_event_log *log, struct rn_event_view *ev)
{
	uint64_t number = atomic_load_explicit(&log->count, memory_order_relaxed) + 1;
	struct rn_event *e = &log->ring[number & (RN_EVENTS - 1)];

	ev->number = number;
	/* Sequentially consistent, so that no byte of the entry is written before the mark is gone. */
	atomic_exchange_explicit(&e->whole, 0, memory_order_seq_cst);
	e->v = *ev;
	/* E1: release, pairs E2: the entry before its mark. */
	atomic_store_explicit(&e->whole, number + 1, memory_order_release);
	/* E3: release, pairs E4. */
	atomic_store_explicit(&log->count, number, memory_order_release);
	return number;
}

uint64_t rn_events_count(const void *mem, uint64_t size, uint32_t row)
{
	const struct rn_session *session = mem;

	if (row >= RN_STAGES_MAX || rn_session_check(mem, size))
		return 0;
	/* E4: acquire, pairs E3. */
	return atomic_load_explicit(&session->log[row].count, memory_order_acquire);
}

int rn_events_read(const void *mem, uint64_t size, uint32_t row, uint64_t number, struct rn_event_view *out)
{
	const struct rn_session *session = mem;
	const struct rn_event *e;

	if (row >= RN_STAGES_MAX || rn_session_check(mem, size))
		return -EINVAL;
	e = &session->log[row].ring[number & (RN_EVENTS - 1)];
	/* E2: acquire, pairs E1. */
	if (!number || atomic_load_explicit(&e->whole, memory_order_acquire) != number + 1)
		return -ENOENT;
	*out = e->v;
	copy_first();
	return atomic_load_explicit(&e->whole, memory_order_relaxed) == number + 1 ? 0 : -ENOENT;
}
