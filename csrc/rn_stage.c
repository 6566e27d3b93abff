/* rn_stage.c - the loop all C stages share (contract: rn_stage.h).
 *
 * Theory of operation
 *
 * The process has one thread and blocks in one place, epoll_wait. While turn() finds work the loop does not
 * go near the kernel, except that every BUSY_TURNS turns it polls its descriptors without blocking, so that
 * control messages and the stage's own sockets are served under load too. When turn() is idle, everything
 * that could give it work is armed and looked at once more (rn_ring.h explains why that cannot miss a wake),
 * the cell says asleep, and epoll_wait blocks until a neighbour rings the doorbell, a descriptor is ready, or
 * the stage's next timer is due; at first it only looks, where that is likely to pay (rn_busy_wait.h).
 *
 * Why an idle turn may not sleep yet: a turn that stopped for want of a buffer may itself have freed buffers
 * after it stopped. It sees more free ones at its end than at its beginning; another turn is then due, and at
 * most as many follow as there are buffers.
 *
 * system calls: epoll_wait, epoll_ctl, read and write (doorbells), clock_gettime (vDSO)
 */
#include "rn_stage.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BUSY_TURNS 16		  /* turns between two looks at the descriptors */
#define EVENTS_MAX 64		  /* events taken from epoll at once */
#define SIGNAL_NS 100000000ull /* a busy loop returns this often, so that Python can run signal handlers */

uint64_t rn_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

int rn_fail(struct rn_stage *s, int err, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(s->error, sizeof(s->error), fmt, ap);
	va_end(ap);
	return err;
}

void *rn_map(int fd, uint64_t size, int ro)
{
	struct stat st;
	void *mem;

	if (fstat(fd, &st))
		return NULL;
	/* Pages past the end of the object would be SIGBUS later; an error now names the cause. */
	if (!size || (uint64_t)st.st_size < size) {
		errno = EMSGSIZE;
		return NULL;
	}
	mem = mmap(NULL, size, ro ? PROT_READ : PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	return mem == MAP_FAILED ? NULL : mem;
}

void rn_unmap(void *mem, uint64_t size)
{
	if (mem)
		munmap(mem, size);
}

struct rn_stage *rn_stage_new(uint32_t row, uint32_t generation)
{
	struct rn_stage *s;

	if (row >= RN_STAGES_MAX)
		return NULL;
	s = calloc(1, sizeof(*s));
	if (!s)
		return NULL;
	s->row = row;
	s->generation = generation;
	s->control = s->wake = -1;
	s->pace = UINT64_MAX;
	s->pool.part = -1;
	for (uint32_t i = 0; i < RN_STAGES_MAX; i++)
		s->bells[i] = s->pool.bells[i] = -1;
	s->epfd = epoll_create1(EPOLL_CLOEXEC);
	if (s->epfd < 0) {
		free(s);
		return NULL;
	}
	s->now = rn_now_ns();
	return s;
}

/* The descriptors granted stay the caller's, as does the memory. */
void rn_stage_free(struct rn_stage *s)
{
	if (!s)
		return;
	rn_stage_fini(s);
	rn_pool_detach(&s->pool);
	close(s->epfd);
	free(s);
}

const char *rn_stage_error(const struct rn_stage *s)
{
	return s->error;
}

/* What a negative errno of an attach means, in words. */
static const char *why(int err)
{
	switch (err) {
	case -EINVAL:
		return "not mapped, misaligned or out of range";
	case -EPROTO:
		return "made by another build, or not this kind of object";
	case -EMSGSIZE:
		return "mapping too short";
	}
	return strerror(-err);
}

int rn_stage_set_session(struct rn_stage *s, void *mem, uint64_t size)
{
	struct rn_session *session = mem;
	int err = rn_session_check(mem, size);

	if (err)
		return rn_fail(s, err, "session: %s", why(err));
	if (s->row >= session->nstages)
		return rn_fail(s, -EINVAL, "session: no row %u", s->row);
	s->session = session;
	s->cell = &session->cells[s->row];
	atomic_store_explicit(&s->cell->pid, (uint32_t)getpid(), memory_order_relaxed);
	atomic_store_explicit(&s->cell->generation, s->generation, memory_order_relaxed);
	atomic_store_explicit(&s->cell->heartbeat_ns, rn_now_ns(), memory_order_relaxed);
	atomic_store_explicit(&s->cell->asleep, 0, memory_order_relaxed);
	/* Counters go on where the last generation stopped: rates stay true and nothing is lost to the reader. */
	for (uint32_t i = 0; i < RN_NCOUNTERS; i++)
		s->c[i] = atomic_load_explicit(&s->cell->counters[i], memory_order_relaxed);
	s->wakes_before = s->c[RN_C_wakes_sent];
	rn_trace_begin(s);
	return 0;
}

int rn_stage_set_arena(struct rn_stage *s, void *mem, uint64_t size, int has_part)
{
	int err;

	rn_pool_detach(&s->pool);
	err = rn_pool_attach(&s->pool, mem, size, has_part ? (int)s->row : -1, s->row, s->generation > 1);
	if (err)
		return rn_fail(s, err, "arena: %s", why(err));
	for (uint32_t i = 0; i < RN_STAGES_MAX; i++)
		s->pool.bells[i] = i == s->row ? -1 : s->bells[i];
	return 0;
}

/* In any order with the other grants. */
int rn_stage_set_bell(struct rn_stage *s, uint32_t row, int fd)
{
	int err;

	if (row >= RN_STAGES_MAX || fd < 0)
		return rn_fail(s, -EINVAL, "doorbell: no row %u, or descriptor %d", row, fd);
	if (row == s->row) {
		err = rn_stage_watch(s, fd, EPOLLIN, RN_EV(RN_TAG_BELL, 0));
		if (err)
			return err;
		s->bells[row] = fd;
		return 0;
	}
	s->bells[row] = fd;
	s->pool.bells[row] = fd;
	for (uint32_t i = 0; i < s->nin; i++)
		if (s->in_row[i] == row)
			s->in[i].bell = fd;
	for (uint32_t i = 0; i < RN_NROLES; i++)
		if (s->has_out[i] && s->out_row[i] == row)
			s->out[i].bell = fd;
	return 0;
}

int rn_stage_add_input(struct rn_stage *s, void *mem, uint64_t size, uint32_t producer_row)
{
	int err;

	if (s->nin >= RN_INPUTS_MAX || producer_row >= RN_STAGES_MAX || producer_row == s->row)
		return rn_fail(s, -EINVAL, "input ring from stage row %u: more than %u inputs, or no such row",
			       producer_row, RN_INPUTS_MAX);
	err = rn_ring_rx_attach(&s->in[s->nin], mem, size, s->bells[producer_row]);
	if (err)
		return rn_fail(s, err, "input ring from stage row %u: %s", producer_row, why(err));
	s->in_row[s->nin++] = producer_row;
	return 0;
}

int rn_stage_add_output(struct rn_stage *s, int role, void *mem, uint64_t size, uint32_t consumer_row)
{
	int err;

	if (role < 0 || role >= RN_NROLES || s->has_out[role] || consumer_row >= RN_STAGES_MAX ||
	    consumer_row == s->row)
		return rn_fail(s, -EINVAL, "output ring, role %d, to stage row %u: no such role or row, or given twice",
			       role, consumer_row);
	err = rn_ring_tx_attach(&s->out[role], mem, size, s->bells[consumer_row]);
	if (err)
		return rn_fail(s, err, "output ring, role %d, to stage row %u: %s", role, consumer_row, why(err));
	s->out_row[role] = consumer_row;
	s->has_out[role] = 1;
	return 0;
}

int rn_stage_set_control(struct rn_stage *s, int fd)
{
	int err = rn_stage_watch(s, fd, EPOLLIN | EPOLLRDHUP, RN_EV(RN_TAG_CONTROL, 0));

	if (!err)
		s->control = fd;
	return err;
}

int rn_stage_set_wake(struct rn_stage *s, int fd)
{
	s->wake = fd;
	return rn_stage_watch(s, fd, EPOLLIN, RN_EV(RN_TAG_CONTROL, 1));
}

/* Is a descriptor of ours still to be served? A buffer that was handed on, or freed, is another's or nobody's. */
static int unserved(void *ctx, const struct rn_desc *d)
{
	const struct rn_stage *s = ctx;
	const struct rn_buf *b = rn_buf_of(&s->pool, d);

	if (d->flags & RN_DESC_FLOW)
		return 1; /* a notice may be repeated (rn_promote.h) */
	return b && atomic_load_explicit(&b->holder, memory_order_relaxed) == s->row + 1;
}

/**
 * rn_stage_recover() - Begin where a killed generation stopped
 * @s:		Successor, all granted, nothing served yet
 *
 * The head of an input ring moves only after its burst was handed on, so a kill in between would have the burst
 * served twice, by then from buffers that may be somebody else's.
 *
 * Return: 0, or a negative errno with rn_stage_error() set.
 */
int rn_stage_recover(struct rn_stage *s)
{
	struct rn_desc *served;
	uint32_t n = 0, room = 0;
	int ready, swept;

	for (uint32_t i = 0; i < s->nin; i++) {
		if (rn_ring_rx_keep(&s->in[i], unserved, s) < 0)
			return rn_fail(s, -EPROTO, "input ring from stage row %u: tail is impossible", s->in_row[i]);
		room += s->in[i].nslots;
	}
	served = calloc(room + 1, sizeof(*served));
	if (!served)
		return rn_fail(s, -ENOMEM, "out of memory");
	for (uint32_t i = 0; i < s->nin; i++) {
		ready = rn_ring_peek(&s->in[i], s->in[i].nslots);
		for (int k = 0; k < ready; k++)
			served[n++] = rn_ring_at(&s->in[i], (uint32_t)k);
	}
	swept = rn_pool_sweep(&s->pool, served, n);
	free(served);
	return swept < 0 ? rn_fail(s, swept, "out of memory") : 0;
}

int rn_stage_watch(struct rn_stage *s, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event ev = { .events = events, .data.u64 = data };

	if (epoll_ctl(s->epfd, EPOLL_CTL_ADD, fd, &ev))
		return rn_fail(s, -errno, "cannot watch descriptor %d: %s", fd, strerror(errno));
	return 0;
}

void rn_stage_state(struct rn_stage *s, int state)
{
	if (s->cell)
		atomic_store_explicit(&s->cell->state, (uint32_t)state, memory_order_relaxed);
}

void rn_stage_drain(struct rn_stage *s)
{
	s->draining = 1;
	s->pace = UINT64_MAX;
}

void rn_stage_pace(struct rn_stage *s, uint64_t frames)
{
	uint64_t at = s->c[RN_C_frames_in];

	if (s->draining)
		return;
	s->pace = frames > UINT64_MAX - at ? UINT64_MAX : at + frames;
	rn_stage_state(s, rn_stage_paused(s) ? RN_ST_PAUSED : RN_ST_RUNNING);
}

int rn_stage_paused(struct rn_stage *s)
{
	return RN_UNLIKELY(s->c[RN_C_frames_in] >= s->pace);
}

void rn_stage_clock(struct rn_stage *s, uint64_t now_ns)
{
	s->clock = now_ns;
	s->now = rn_stage_now(s);
}

uint64_t rn_stage_counter(const struct rn_stage *s, uint32_t i)
{
	return i < RN_NCOUNTERS ? s->c[i] : 0;
}

static void publish_counters(struct rn_stage *s)
{
	uint64_t wakes = s->wakes_before + s->pool.wakes;

	for (uint32_t i = 0; i < s->nin; i++)
		wakes += s->in[i].wakes;
	for (uint32_t i = 0; i < RN_NROLES; i++)
		wakes += s->out[i].wakes;
	s->c[RN_C_wakes_sent] = wakes;
	s->c[RN_C_now_small_used] = s->pool.nsmall - s->pool.free[RN_SMALL];
	s->c[RN_C_now_large_used] = s->pool.nlarge - s->pool.free[RN_LARGE];
	if (!s->cell)
		return;
	for (uint32_t i = 0; i < RN_NCOUNTERS; i++)
		atomic_store_explicit(&s->cell->counters[i], s->c[i], memory_order_relaxed);
}

/* The buffers become the consumer's, then their slots visible: a stage that is killed in between had handed nothing on,
 * and its successor finds them with the input they came from, or as its own (rn_stage_recover()). */
static void publish(struct rn_stage *s, uint32_t role)
{
	for (uint32_t n = 0; n < s->nuntold[role]; n++)
		atomic_store_explicit(&s->untold[role][n]->holder, s->out_row[role] + 1, memory_order_relaxed);
	s->nuntold[role] = 0;
	rn_ring_publish(&s->out[role]);
}

/* Into the ring; not visible before it is published. */
static void put(struct rn_stage *s, int role, struct rn_buf *b, const uint8_t *eth, uint32_t len, uint16_t flags)
{
	struct rn_desc d = {
		.off = rn_buf_off(&s->pool, eth),
		.len = len,
		.flags = flags,
		.gen = (uint16_t)b->gen,
	};

	if (RN_UNLIKELY(s->nuntold[role] == RN_UNTOLD))
		publish(s, (uint32_t)role);
	s->untold[role][s->nuntold[role]++] = b;
	rn_trace_stamp(s, b);
	rn_ring_put(&s->out[role], &d);
}

int rn_stage_change_impair(struct rn_stage *s, int where, const struct rn_impair_spec *spec)
{
	if (where < 0 || where > RN_NROLES || !s->impair[where])
		return rn_stage_set_impair(s, where, spec);
	if (rn_impair_change(s->impair[where], spec, rn_stage_now(s)))
		return rn_fail(s, -EINVAL, "impairment of output %d: a number is out of range", where);
	return 0;
}

/* What was told to do nothing, and holds nothing any more, goes. */
static void impair_tidy(struct rn_stage *s)
{
	s->impaired = 0;
	for (uint32_t i = 0; i <= RN_NROLES; i++) {
		if (!s->impair[i])
			continue;
		if (rn_impair_idle(s->impair[i])) {
			rn_impair_free(s->impair[i]);
			s->impair[i] = NULL;
		} else {
			s->impaired = 1;
		}
	}
}

int rn_stage_set_impair(struct rn_stage *s, int where, const struct rn_impair_spec *spec)
{
	if (where < 0 || where > RN_NROLES || (where < RN_NROLES && !s->has_out[where]) || s->impair[where])
		return rn_fail(s, -EINVAL, "impairment of output %d: no such output, or given twice", where);
	if (rn_impair_check(spec))
		return rn_fail(s, -EINVAL, "impairment of output %d: a number is out of range", where);
	s->impair[where] = rn_impair_new(spec, rn_stage_now(s));
	if (!s->impair[where])
		return rn_fail(s, -ENOMEM, "impairment: out of memory");
	s->impaired = 1;
	return 0;
}

uint64_t rn_stage_impair_held(const struct rn_stage *s)
{
	uint64_t held = 0;

	for (uint32_t i = 0; s->impaired && i <= RN_NROLES; i++)
		if (s->impair[i]) {
			struct rn_impair_stat st;

			rn_impair_stat(s->impair[i], &st);
			held += st.held;
		}
	return held;
}

/* When the next bad wire wants a look, ns. By the turn's clock: a stall that this turn saw, and that ended since,
 * is a deadline that has passed, not one that is gone. */
static uint64_t impair_due(const struct rn_stage *s)
{
	uint64_t due = UINT64_MAX;

	for (uint32_t i = 0; s->impaired && i <= RN_NROLES; i++) {
		uint64_t at;

		if (!s->impair[i] || s->impair_stuck[i])
			continue;
		at = rn_impair_due(s->impair[i], s->now);
		if (at < due)
			due = at;
	}
	return due;
}

void rn_stage_impair_feed(struct rn_stage *s, struct rn_impair *im, const uint8_t *eth, uint32_t len, uint16_t flags,
			  const void *side)
{
	int did = rn_impair_feed(im, s->now, eth - RN_VNET_HLEN, len, flags, side);

	s->c[RN_C_impair_dropped] += !!(did & RN_IMPAIRED_DROP);
	s->c[RN_C_impair_duplicated] += !!(did & RN_IMPAIRED_DUP);
	s->c[RN_C_impair_reordered] += !!(did & RN_IMPAIRED_REORDER);
	s->c[RN_C_impair_delayed] += !!(did & RN_IMPAIRED_DELAY);
	s->c[RN_C_impair_corrupted] += !!(did & RN_IMPAIRED_CORRUPT);
	s->c[RN_C_impair_truncated] += !!(did & RN_IMPAIRED_TRUNCATE);
}

/* A buffer of our own part for a frame of @len bytes, or NULL: want_buf is set. */
static struct rn_buf *buf_for(struct rn_stage *s, uint32_t len)
{
	struct rn_buf *b = len <= RN_SMALL_FRAME_MAX ? rn_buf_alloc(&s->pool, RN_SMALL) : NULL;

	if (!b)
		b = rn_buf_alloc(&s->pool, RN_LARGE);
	if (!b)
		s->want_buf = 1;
	return b;
}

/* What is due on a bad wire goes into its ring, as far as there is room, and buffers. */
static void impair_flush(struct rn_stage *s, uint32_t role)
{
	struct rn_impair *im = s->impair[role];
	struct rn_impair_frame f;

	while (rn_impair_peek(im, s->now, s->draining, &f)) {
		struct rn_buf *b;
		uint8_t *eth;

		if (rn_ring_room(&s->out[role], 1) <= 0) { /* an impossible head is found by rn_ring_tx_arm() */
			s->want_room[role] |= 1;
			s->impair_stuck[role] = 1;
			return;
		}
		b = buf_for(s, f.len);
		if (!b) {
			s->impair_stuck[role] = 1;
			return;
		}
		eth = (uint8_t *)b + RN_BUF_ETH_OFF;
		memcpy(eth - RN_VNET_HLEN, f.vnet_then_frame, RN_VNET_HLEN + f.len);
		memcpy(&b->meta, f.side, sizeof(b->meta));
		put(s, (int)role, b, eth, f.len, f.flags);
		rn_impair_pop(im);
	}
}

/* What is still held when the stage ends is lost, and counted. */
static void impair_end(struct rn_stage *s, uint32_t where)
{
	struct rn_impair_stat st;

	if (!s->impair[where])
		return;
	rn_impair_stat(s->impair[where], &st);
	s->c[RN_C_impair_dropped] += st.held;
	rn_impair_free(s->impair[where]);
	s->impair[where] = NULL;
}

void rn_stage_publish_now(struct rn_stage *s, int role)
{
	publish(s, (uint32_t)role);
}

void rn_stage_publish(struct rn_stage *s)
{
	for (uint32_t i = 0; i < RN_NROLES; i++)
		if (s->has_out[i])
			publish(s, i);
}

void rn_stage_fini(struct rn_stage *s)
{
	if (s->ops && s->ops->fini)
		s->ops->fini(s);
	s->ops = NULL;
	for (uint32_t i = 0; i <= RN_NROLES; i++)
		impair_end(s, i);
	rn_stage_publish(s);
	if (s->tapped)
		rn_tap_flush(s);
	rn_tap_end(s);
	publish_counters(s);
}

/**
 * rn_stage_emit() - Put a finished frame on an output
 * @s:		Stage
 * @role:	enum rn_role; the caller has seen rn_stage_room() > 0 for this frame
 * @b:		Buffer, ours until now, the consumer's from here on
 * @eth:	Ethernet header inside @b, at least RN_VNET_HLEN behind the buffer header
 * @len:	Bytes of frame
 * @flags:	RN_DESC_*; without RN_DESC_VNET the virtio-net header is zeroed
 *
 * On a bad wire the frame is copied, and its buffer free at once.
 */
void rn_stage_emit(struct rn_stage *s, int role, struct rn_buf *b, const uint8_t *eth, uint32_t len, uint16_t flags)
{
	if (!(flags & RN_DESC_VNET))
		memset((uint8_t *)b + (eth - (const uint8_t *)b) - RN_VNET_HLEN, 0, RN_VNET_HLEN);
	if (RN_UNLIKELY(s->impair[role])) {
		rn_stage_impair_feed(s, s->impair[role], eth, len, flags, &b->meta);
		rn_buf_free(&s->pool, b);
		return;
	}
	put(s, role, b, eth, len, flags);
}

static int bad_output(struct rn_stage *s, int role)
{
	struct rn_ring_tx *tx = &s->out[role];
	uint64_t head = atomic_load_explicit(&tx->ring->head, memory_order_relaxed);

	s->broken = 1;
	return rn_fail(s, -EPROTO,
		       "output ring, role %d, to stage row %u: head %llu is not within %u slots behind tail %llu", role,
		       s->out_row[role], (unsigned long long)head, tx->nslots, (unsigned long long)tx->published);
}

static int bad_input(struct rn_stage *s, uint32_t i)
{
	struct rn_ring_rx *rx = &s->in[i];
	uint64_t tail = atomic_load_explicit(&rx->ring->tail, memory_order_relaxed);

	s->broken = 1;
	return rn_fail(s, -EPROTO, "input ring from stage row %u: tail %llu is over %u slots past head %llu",
		       s->in_row[i], (unsigned long long)tail, rx->nslots, (unsigned long long)rx->head);
}

int rn_stage_room(struct rn_stage *s, int role, uint32_t want)
{
	struct rn_ring_tx *tx;
	int room;

	if (role < 0 || role >= RN_NROLES || !s->has_out[role])
		return 0;
	if (RN_UNLIKELY(s->impair[role]) && !rn_stage_impair_open(s, s->impair[role])) {
		s->want_room[role] |= RN_WANT_TIME;
		return 0;
	}
	tx = &s->out[role];
	room = rn_ring_room(tx, want);
	if (RN_UNLIKELY(room < 0)) {
		bad_output(s, role);
		room = 0;
	}
	if ((uint32_t)room < want && want > tx->want)
		tx->want = want; /* fewer would not be enough to wake up for */
	if (!room)
		s->want_room[role] |= 1;
	return room;
}

int rn_stage_notice(struct rn_stage *s, int role, uint16_t flags, uint32_t index, uint32_t gen)
{
	struct rn_desc d = { .off = RN_NOTICE_OFF | index, .len = gen, .flags = flags };
	int room = s->has_out[role] ? rn_ring_room(&s->out[role], 1) : 0;

	if (RN_UNLIKELY(room <= 0)) {
		if (room < 0)
			bad_output(s, role);
		s->want_room[role] |= 1;
		return -EAGAIN;
	}
	rn_ring_put(&s->out[role], &d);
	return 0;
}

int rn_stage_peek(struct rn_stage *s, uint32_t i, uint32_t max)
{
	int n;

	if (RN_UNLIKELY(s->pace != UINT64_MAX)) {
		uint64_t left = s->pace > s->c[RN_C_frames_in] ? s->pace - s->c[RN_C_frames_in] : 0;

		if (left < max)
			max = (uint32_t)left;
	}
	n = rn_ring_peek(&s->in[i], max);
	if (RN_UNLIKELY(n < 0)) {
		bad_input(s, i);
		return 0;
	}
	return n;
}

int rn_stage_stopped(const struct rn_stage *s)
{
	/* S2: acquire, pairs S1. */
	return s->cell && atomic_load_explicit(&s->cell->stop, memory_order_acquire);
}

void rn_stage_begin(struct rn_stage *s)
{
	s->now = rn_stage_now(s);
	s->want_buf = 0;
	s->hold_input = 0;
	s->hold_inputs = 0;
	memset(s->want_room, 0, sizeof(s->want_room));
	memset(s->impair_stuck, 0, sizeof(s->impair_stuck));
	for (uint32_t i = 0; i < RN_NROLES; i++)
		s->out[i].want = 0;
	s->turn_free[RN_SMALL] = s->pool.free[RN_SMALL];
	s->turn_free[RN_LARGE] = s->pool.free[RN_LARGE];
}

/* What ends a turn, but for the publishing of counters. */
static void end_turn(struct rn_stage *s)
{
	for (uint32_t i = 0; RN_UNLIKELY(s->impaired) && i < RN_NROLES; i++)
		if (s->impair[i])
			impair_flush(s, i);
	if (RN_UNLIKELY(s->impaired))
		impair_tidy(s);
	rn_stage_publish(s);
	if (RN_UNLIKELY(s->tapped))
		rn_tap_flush(s);
	s->c[RN_C_turns]++;
	rn_trace_counters(s);
	if (s->want_buf)
		s->c[RN_C_stalls_buf]++;
	for (uint32_t i = 0; i < RN_NROLES; i++)
		if (s->want_room[i]) {
			s->c[RN_C_stalls_room]++;
			break;
		}
	if (s->cell)
		atomic_store_explicit(&s->cell->heartbeat_ns, s->now, memory_order_relaxed);
}

void rn_stage_end(struct rn_stage *s)
{
	end_turn(s);
	publish_counters(s);
}

/* Withdraw all requests for a wake-up. */
static void disarm(struct rn_stage *s)
{
	for (uint32_t i = 0; i < s->nin; i++)
		rn_ring_rx_disarm(&s->in[i]);
	for (uint32_t i = 0; i < RN_NROLES; i++)
		if (s->has_out[i] && s->want_room[i] & 1)
			rn_ring_tx_disarm(&s->out[i]);
	if (s->want_buf)
		rn_pool_disarm(&s->pool);
	if (s->cell)
		atomic_store_explicit(&s->cell->asleep, 0, memory_order_relaxed);
}

int rn_stage_arm(struct rn_stage *s)
{
	int r = 0;

	if (s->want_buf && (s->pool.free[RN_SMALL] > s->turn_free[RN_SMALL] ||
			    s->pool.free[RN_LARGE] > s->turn_free[RN_LARGE]))
		return 1;
	if (s->want_buf)
		r = rn_pool_arm(&s->pool);
	for (uint32_t i = 0; !r && i < RN_NROLES; i++)
		if (s->has_out[i] && s->want_room[i] & 1) {
			r = rn_ring_tx_arm(&s->out[i]);
			if (r < 0)
				r = bad_output(s, (int)i);
		}
	for (uint32_t i = 0; !r && !s->hold_input && i < s->nin; i++) {
		if (s->hold_inputs >> i & 1)
			continue;
		r = rn_ring_rx_arm(&s->in[i]);
		if (r < 0)
			r = bad_input(s, i);
	}
	if (r) {
		disarm(s);
		return r < 0 ? r : 1;
	}
	s->c[RN_C_sleeps]++;
	rn_busy_tell(s);
	publish_counters(s);
	if (s->cell)
		atomic_store_explicit(&s->cell->asleep, 1, memory_order_relaxed);
	return 0;
}

void rn_stage_disarm(struct rn_stage *s)
{
	disarm(s);
	/* After the requests are withdrawn; whoever rang before that is served by the turn that follows. */
	if (s->bells[s->row] >= 0)
		rn_bell_quiet(s->bells[s->row]);
}

/* 1: inputs are empty and nothing waits for room or a buffer. */
static int rings_empty(struct rn_stage *s)
{
	if (s->want_buf)
		return 0;
	for (uint32_t i = 0; i < RN_NROLES; i++)
		if (s->want_room[i])
			return 0;
	for (uint32_t i = 0; i < s->nin; i++)
		if (rn_stage_peek(s, i, 1))
			return 0;
	return 1;
}

/* Milliseconds until @deadline for epoll_wait, rounded up: a timer is late, never early. */
static int timeout_ms(uint64_t deadline)
{
	uint64_t now, ms;

	if (deadline == UINT64_MAX)
		return -1;
	now = rn_now_ns();
	if (deadline <= now)
		return 0;
	ms = (deadline - now + 999999) / 1000000;
	return ms > 3600000 ? 3600000 : (int)ms;
}

/* The stage's own next timer, or that of a bad wire of its. */
static uint64_t deadline(struct rn_stage *s)
{
	uint64_t own = s->ops->deadline ? s->ops->deadline(s) : UINT64_MAX;
	uint64_t due = RN_UNLIKELY(s->impaired) ? impair_due(s) : UINT64_MAX;

	return due < own ? due : own;
}

int rn_stage_impair_wait(const struct rn_stage *s)
{
	return timeout_ms(impair_due(s));
}

uint64_t rn_stage_due(struct rn_stage *s)
{
	return s->ops ? deadline(s) : UINT64_MAX;
}

/* Stand still until a control message or a signal comes; edges of other descriptors are kept for later. */
static int stand(struct rn_stage *s)
{
	struct pollfd fds[2] = { { .fd = s->control, .events = POLLIN }, { .fd = s->wake, .events = POLLIN } };

	rn_stage_state(s, RN_ST_PAUSED);
	publish_counters(s);
	if (s->cell)
		atomic_store_explicit(&s->cell->asleep, 1, memory_order_relaxed);
	if (poll(fds, 2, -1) < 0 && errno != EINTR) {
		rn_fail(s, -errno, "poll: %s", strerror(errno));
		return RN_RUN_ERROR;
	}
	if (s->cell)
		atomic_store_explicit(&s->cell->asleep, 0, memory_order_relaxed);
	return fds[0].revents | fds[1].revents ? RN_RUN_CONTROL : RN_RUN_SIGNAL;
}

/* Hand events to the stage, all of them: an edge is told once. 1: control is readable. The doorbell is made quiet only if
 * it rang, and after the requests were withdrawn: who rang before that is served by the turn that follows; who rings in
 * between makes the next wait return at once. */
static int dispatch(struct rn_stage *s, const struct epoll_event *ev, int n)
{
	int control = 0;

	for (int i = 0; i < n; i++) {
		uint32_t tag = (uint32_t)(ev[i].data.u64 >> 32);

		if (tag == RN_TAG_BELL)
			rn_bell_quiet(s->bells[s->row]);
		else if (tag == RN_TAG_CONTROL)
			control = 1;
		else if (s->ops->event)
			s->ops->event(s, tag, (uint32_t)ev[i].data.u64, ev[i].events);
	}
	return control;
}

static int run_loop(struct rn_stage *s)
{
	struct epoll_event ev[EVENTS_MAX];
	uint64_t since = rn_now_ns(), began, due;
	uint32_t busy = 0;

	if (!s->ops || !s->ops->turn) {
		rn_fail(s, -EINVAL, "stage was not initialised");
		return RN_RUN_ERROR;
	}
	for (;;) {
		int work, n, err, again = 1;

		if (RN_UNLIKELY(rn_stage_paused(s)))
			return stand(s);
		rn_stage_begin(s);
		work = s->ops->turn(s);
		end_turn(s);
		if (RN_UNLIKELY(work < 0 || s->broken)) {
			if (!s->error[0])
				rn_fail(s, work, "turn failed: %s", strerror(-work));
			return RN_RUN_ERROR;
		}
		if (RN_UNLIKELY(rn_stage_stopped(s)))
			return RN_RUN_STOPPED;
		if (RN_UNLIKELY(s->notice)) {
			s->notice = 0;
			return RN_RUN_NOTICE;
		}
		if (!work) {
			if (s->draining && rings_empty(s) && !rn_stage_impair_held(s) && (!s->ops->drained || s->ops->drained(s)))
				return RN_RUN_DRAINED;
			again = rn_stage_arm(s);
			if (again < 0 || s->broken)
				return RN_RUN_ERROR;
		}
		if (again) {
			if (++busy < BUSY_TURNS)
				continue;
			busy = 0;
			publish_counters(s); /* a page of stores: not each turn, or each message would pay for two or three */
			n = epoll_wait(s->epfd, ev, EVENTS_MAX, 0);
			if (n > 0 && dispatch(s, ev, n))
				return RN_RUN_CONTROL;
			if (s->now - since > SIGNAL_NS)
				return RN_RUN_SIGNAL;
			continue;
		}
		due = deadline(s);
		began = rn_now_ns();
		n = rn_busy_wait(s, ev, EVENTS_MAX, began, due);
		if (!n)
			n = epoll_wait(s->epfd, ev, EVENTS_MAX, timeout_ms(due));
		err = n < 0 ? errno : 0;
		disarm(s);
		if (RN_UNLIKELY(err == EINTR))
			return RN_RUN_SIGNAL;
		if (RN_UNLIKELY(err)) {
			rn_fail(s, -err, "epoll_wait: %s", strerror(err));
			return RN_RUN_ERROR;
		}
		busy = 0;
		since = rn_now_ns();
		s->busy.last_ns = since - began;
		if (dispatch(s, ev, n))
			return RN_RUN_CONTROL;
		if (RN_UNLIKELY(rn_stage_stopped(s)))
			return RN_RUN_STOPPED;
	}
}

/**
 * rn_stage_run() - Move frames until Python is needed
 * @s:		Stage with everything granted, after its kind's init
 *
 * May be called again after any return but RN_RUN_ERROR, and goes on.
 *
 * Return: enum rn_run. RN_RUN_SIGNAL is also returned every 100 ms of uninterrupted work.
 */
int rn_stage_run(struct rn_stage *s)
{
	int why = run_loop(s);

	publish_counters(s);
	return why;
}

/**
 * rn_stage_step() - One turn without a loop
 * @s:		Stage, after its kind's init
 *
 * For running a stage on a file: it sleeps for nothing, and with rn_stage_clock() time stands still but for the caller.
 *
 * Return: 1 if it did something, 0 if it is idle, a negative errno with rn_stage_error() set.
 */
int rn_stage_step(struct rn_stage *s)
{
	struct epoll_event ev[EVENTS_MAX];
	int n = epoll_wait(s->epfd, ev, EVENTS_MAX, 0), did;

	if (!s->ops || !s->ops->turn)
		return rn_fail(s, -EINVAL, "stage was not initialised");
	if (n > 0)
		dispatch(s, ev, n);
	rn_stage_begin(s);
	did = s->ops->turn(s);
	rn_stage_end(s);
	if (did < 0 || s->broken) {
		if (!s->error[0])
			rn_fail(s, did, "turn failed: %s", strerror(-did));
		return did < 0 ? did : -EPROTO;
	}
	return did > 0;
}
