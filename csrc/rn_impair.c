/* rn_impair.c - a bad wire, by seed (contract: rn_impair.h).
 *
 * Theory of operation
 *
 * Every frame fed is copied into private memory and put in a queue; what is due is taken off the queue's head.
 * Private memory, and not the arena's buffers: a delay of a few milliseconds holds thousands of frames, and
 * whoever owns the buffers would run dry. An unimpaired stage never comes here.
 *
 * Decisions. Draw k of frame n is splitmix64's output number n * NDRAWS + k: no state runs from frame to frame
 * but the burst's good or bad, so decision k of frame n is the same whatever else the spec asks for, and
 * changing one probability does not reshuffle the others.
 *
 * Order. The queue is in order of due times, and due times never go back: jitter makes a frame late together
 * with those behind it, as a queue in a real network does. Only a reordered frame is overtaken: it waits on a
 * second queue until `gap` frames that were fed after it went by, or RN_IMPAIR_LATE_NS, so that the last
 * segment of a request is late and not stuck.
 *
 * Who fed a frame keeps nothing of it, and a frame that did not come out is held, or counted as dropped.
 *
 * system calls: none; rn_impair_relay(): ppoll, read, write, clock_gettime (vDSO)
 */
#include "rn_impair.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "rn_arena.h"

_Static_assert(sizeof(struct rn_meta) == RN_IMPAIR_SIDE, "classify's findings travel with the frame");

enum draw { D_DROP = 0, D_BURST, D_DUP, D_REORDER, D_DELAY, D_CORRUPT, D_TRUNCATE, D_CUT, D_BITS,
	    NDRAWS = D_BITS + RN_IMPAIR_BITS_MAX };

struct item {
	struct item *next;
	uint64_t due;	    /* ns; on the second queue: by its own delay */
	uint64_t late_seq;  /* second queue: released when this many frames were queued, */
	uint64_t late_until; /* or at this time, ns */
	uint32_t len;
	uint16_t flags;
	uint8_t side[RN_IMPAIR_SIDE];
	uint8_t bytes[]; /* virtio-net header, frame */
};

struct queue {
	struct item *head, **end;
};

struct rn_impair {
	struct rn_impair_spec spec;
	struct rn_impair_stat stat;
	struct queue due, late;
	uint64_t start_ns;
	uint64_t last_due; /* of the last frame queued */
	uint64_t queued;   /* frames ever put on the due queue in their own turn */
	int bad;	   /* the wire, in a burst */
	uint64_t first;	   /* stat.in when this spec began: its frame 0 */
};

/* splitmix64 (Steele, Lea, Flood 2014), output number @i of seed @seed. */
static uint64_t splitmix(uint64_t seed, uint64_t i)
{
	uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

static uint64_t draw(const struct rn_impair *im, uint64_t n, uint32_t k)
{
	return splitmix(im->spec.seed, n * NDRAWS + k);
}

static int happens(const struct rn_impair *im, uint64_t n, uint32_t k, uint64_t probability)
{
	return probability && (draw(im, n, k) >> 32) < probability;
}

static void append(struct queue *q, struct item *it)
{
	it->next = NULL;
	*q->end = it;
	q->end = &it->next;
}

static struct item *take(struct queue *q)
{
	struct item *it = q->head;

	q->head = it->next;
	if (!q->head)
		q->end = &q->head;
	return it;
}

int rn_impair_check(const struct rn_impair_spec *s)
{
	const uint64_t p[] = { s->drop, s->burst_enter, s->burst_leave, s->dup, s->reorder, s->corrupt, s->truncate };

	for (size_t i = 0; i < sizeof(p) / sizeof(p[0]); i++)
		if (p[i] > (uint64_t)RN_IMPAIR_ALWAYS)
			return -EINVAL;
	if (s->reorder && (!s->reorder_gap || s->reorder_gap > RN_IMPAIR_GAP_MAX))
		return -EINVAL;
	if (s->corrupt && (!s->corrupt_bits || s->corrupt_bits > RN_IMPAIR_BITS_MAX))
		return -EINVAL;
	if (s->burst_enter && !s->burst_leave) /* never good again: a cut wire, and a spec that says so by drop */
		return -EINVAL;
	if (s->jitter_ns > s->delay_ns || s->delay_ns > UINT64_MAX / 8)
		return -EINVAL;
	if (s->stall_ns && s->stall_every_ns <= s->stall_ns)
		return -EINVAL;
	return 0;
}

struct rn_impair *rn_impair_new(const struct rn_impair_spec *spec, uint64_t now_ns)
{
	struct rn_impair *im;

	if (rn_impair_check(spec))
		return NULL;
	im = calloc(1, sizeof(*im));
	if (!im)
		return NULL;
	im->spec = *spec;
	im->start_ns = now_ns;
	im->due.end = &im->due.head;
	im->late.end = &im->late.head;
	return im;
}

int rn_impair_change(struct rn_impair *im, const struct rn_impair_spec *spec, uint64_t now_ns)
{
	if (rn_impair_check(spec))
		return -EINVAL;
	im->spec = *spec;
	im->start_ns = now_ns;
	im->first = im->stat.in;
	im->bad = 0;
	return 0;
}

int rn_impair_idle(const struct rn_impair *im)
{
	const struct rn_impair_spec *s = &im->spec;

	return !im->stat.held && !(s->drop | s->burst_enter | s->dup | s->reorder | s->corrupt | s->truncate | s->delay_ns |
				   s->stall_ns);
}

static void empty(struct queue *q)
{
	while (q->head)
		free(take(q));
}

void rn_impair_free(struct rn_impair *im)
{
	if (!im)
		return;
	empty(&im->due);
	empty(&im->late);
	free(im);
}

void rn_impair_stat(const struct rn_impair *im, struct rn_impair_stat *out)
{
	*out = im->stat;
}

/* Ns until the present stall ends, 0 if there is none. */
static uint64_t stalled_for(const struct rn_impair *im, uint64_t now)
{
	uint64_t at;

	if (!im->spec.stall_ns || now < im->start_ns)
		return 0;
	at = (now - im->start_ns) % im->spec.stall_every_ns;
	return at < im->spec.stall_every_ns - im->spec.stall_ns ? 0 : im->spec.stall_every_ns - at;
}

int rn_impair_open(const struct rn_impair *im, uint64_t now_ns)
{
	return im->stat.held < RN_IMPAIR_HELD_MAX && im->stat.held_bytes < RN_IMPAIR_BYTES_MAX &&
	       !stalled_for(im, now_ns);
}

static void queue_due(struct rn_impair *im, struct item *it)
{
	if (it->due < im->last_due)
		it->due = im->last_due;
	im->last_due = it->due;
	append(&im->due, it);
}

/* Overtaken often enough, or long enough? Gaps and times are the same for all, so the first is first in both. */
static void release_late(struct rn_impair *im, uint64_t now, int all)
{
	struct item *it;

	while ((it = im->late.head) && (all || it->late_seq <= im->queued || it->late_until <= now))
		queue_due(im, take(&im->late));
}

static struct item *copy_of(const uint8_t *vnet_then_frame, uint32_t len, uint16_t flags, const void *side)
{
	struct item *it = malloc(sizeof(*it) + RN_VNET_HLEN + len);

	if (!it)
		return NULL;
	it->len = len;
	it->flags = flags;
	if (side)
		memcpy(it->side, side, RN_IMPAIR_SIDE);
	else
		memset(it->side, 0, RN_IMPAIR_SIDE);
	memcpy(it->bytes, vnet_then_frame, RN_VNET_HLEN + len);
	return it;
}

static void hold(struct rn_impair *im, const struct item *it)
{
	im->stat.held++;
	im->stat.held_bytes += it->len;
}

static int among(const uint64_t *at, uint32_t n, uint64_t bit)
{
	while (n)
		if (at[--n] == bit)
			return 1;
	return 0;
}

/* Different bits: two flips of one bit would be none. */
static void corrupt(const struct rn_impair *im, uint64_t n, struct item *it)
{
	uint64_t bits = (uint64_t)it->len * 8, at[RN_IMPAIR_BITS_MAX];

	for (uint32_t k = 0; k < im->spec.corrupt_bits && k < bits; k++) {
		at[k] = draw(im, n, D_BITS + k) % bits;
		while (among(at, k, at[k]))
			at[k] = (at[k] + 1) % bits;
		it->bytes[RN_VNET_HLEN + at[k] / 8] ^= (uint8_t)(1u << at[k] % 8);
	}
}

/* To between an Ethernet header and one byte less than it was. 1: it could be. */
static int truncated(const struct rn_impair *im, uint64_t n, struct item *it)
{
	if (it->len <= RN_ETH_HLEN)
		return 0;
	it->len = RN_ETH_HLEN + (uint32_t)(draw(im, n, D_CUT) % (it->len - RN_ETH_HLEN));
	return 1;
}

/* When frame @n leaves the wire if nothing is in front of it. */
static uint64_t arrival(const struct rn_impair *im, uint64_t n, uint64_t now)
{
	uint64_t jitter = im->spec.jitter_ns;

	return now + im->spec.delay_ns - jitter + (jitter ? draw(im, n, D_DELAY) % (2 * jitter + 1) : 0);
}

static int lost(struct rn_impair *im, uint64_t n)
{
	const struct rn_impair_spec *s = &im->spec;

	if (s->burst_enter) {
		im->bad ^= happens(im, n, D_BURST, im->bad ? s->burst_leave : s->burst_enter);
		if (im->bad)
			return RN_IMPAIRED_DROP | RN_IMPAIRED_BURST;
	}
	return happens(im, n, D_DROP, s->drop) ? RN_IMPAIRED_DROP : 0;
}

int rn_impair_feed(struct rn_impair *im, uint64_t now_ns, const uint8_t *vnet_then_frame, uint32_t len,
		   uint16_t flags, const void *side)
{
	const struct rn_impair_spec *s = &im->spec;
	uint64_t n = im->stat.in++ - im->first;
	struct item *it, *twin = NULL;
	int did = lost(im, n);

	it = did ? NULL : copy_of(vnet_then_frame, len, flags, side);
	if (!it) {
		im->stat.dropped++;
		return did | RN_IMPAIRED_DROP;
	}
	it->due = arrival(im, n, now_ns);
	if (s->delay_ns) {
		did |= RN_IMPAIRED_DELAY;
		im->stat.delayed++;
	}
	/* The twin is made before the damage, and goes in its turn also if the first is held back. */
	if (happens(im, n, D_DUP, s->dup) && (twin = copy_of(vnet_then_frame, len, flags, side))) {
		twin->due = it->due;
		did |= RN_IMPAIRED_DUP;
		im->stat.duplicated++;
	}
	if (len && happens(im, n, D_CORRUPT, s->corrupt)) {
		corrupt(im, n, it);
		did |= RN_IMPAIRED_CORRUPT;
		im->stat.corrupted++;
	}
	if (happens(im, n, D_TRUNCATE, s->truncate) && truncated(im, n, it)) {
		did |= RN_IMPAIRED_TRUNCATE;
		im->stat.truncated++;
	}
	hold(im, it);
	if (happens(im, n, D_REORDER, s->reorder)) {
		it->late_seq = im->queued + s->reorder_gap;
		it->late_until = now_ns + RN_IMPAIR_LATE_NS;
		append(&im->late, it);
		did |= RN_IMPAIRED_REORDER;
		im->stat.reordered++;
	} else {
		queue_due(im, it);
		im->queued++;
	}
	if (twin) {
		hold(im, twin);
		queue_due(im, twin);
		im->queued++;
	}
	/* Here and not when the next one is taken off: it has to stand behind this frame, and before the next. */
	release_late(im, now_ns, 0);
	return did;
}

int rn_impair_peek(struct rn_impair *im, uint64_t now_ns, int all, struct rn_impair_frame *out)
{
	struct item *it;

	if (!all && stalled_for(im, now_ns))
		return 0;
	release_late(im, now_ns, all);
	it = im->due.head;
	if (!it || (!all && it->due > now_ns))
		return 0;
	*out = (struct rn_impair_frame){ it->bytes, it->len, it->flags, it->side };
	return 1;
}

void rn_impair_pop(struct rn_impair *im)
{
	struct item *it = take(&im->due);

	im->stat.held--;
	im->stat.held_bytes -= it->len;
	im->stat.out++;
	free(it);
}

uint64_t rn_impair_due(const struct rn_impair *im, uint64_t now_ns)
{
	uint64_t stall = stalled_for(im, now_ns), at = UINT64_MAX;

	if (stall)
		return now_ns + stall;
	if (im->due.head)
		at = im->due.head->due;
	if (im->late.head && im->late.head->late_until < at)
		at = im->late.head->late_until;
	return at;
}

/* --- a wire of its own --- */

#define RELAY_BURST 32u

struct side_of_relay {
	const struct rn_link *from, *to;
	struct rn_impair *im;
	int blocked; /* the other link is full */
};

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Read a burst, write what is due; 1 if anything moved. */
static int relay_turn(struct side_of_relay *r, uint8_t *buf, uint32_t cap)
{
	struct rn_impair_frame f;
	uint64_t now = now_ns();
	int did = 0;

	/* While the other end is full its sender waits too, instead of filling our memory. */
	for (uint32_t i = 0; i < RELAY_BURST && !r->blocked && rn_impair_open(r->im, now); i++) {
		int64_t len = rn_link_read(r->from, buf, cap);

		if (len == -EMSGSIZE || len == -EBADMSG)
			continue;
		if (len <= 0)
			break;
		rn_impair_feed(r->im, now, buf, (uint32_t)len, 0, NULL);
		did = 1;
	}
	while (!r->blocked && rn_impair_peek(r->im, now, 0, &f)) {
		int err = rn_link_write(r->to, f.vnet_then_frame, f.len);

		if (err == -EAGAIN) {
			r->blocked = 1;
			break;
		}
		r->im->stat.refused += err != 0;
		rn_impair_pop(r->im);
		did = 1;
	}
	return did;
}

static int relay_loop(struct side_of_relay *sides, uint8_t *buf, uint32_t cap, int stop_fd)
{
	for (;;) {
		struct pollfd p[3] = { { .fd = sides[0].from->fd }, { .fd = sides[1].from->fd },
				       { .fd = stop_fd, .events = POLLIN } };
		struct timespec wait = { 0 };
		uint64_t due = UINT64_MAX, now;
		int did = 0;

		for (int i = 0; i < 2; i++)
			did |= relay_turn(&sides[i], buf, cap);
		now = now_ns();
		for (int i = 0; i < 2; i++) {
			uint64_t at = rn_impair_due(sides[i].im, now);

			if (!sides[i].blocked && rn_impair_open(sides[i].im, now))
				p[i].events |= POLLIN;
			if (sides[i].blocked)
				p[1 - i].events |= POLLOUT; /* its frames wait for the event, not for their time */
			else if (at < due)
				due = at;
		}
		if (!did && due > now) {
			wait.tv_sec = (time_t)((due - now) / 1000000000u);
			wait.tv_nsec = (long)((due - now) % 1000000000u);
		}
		if (ppoll(p, 3, !did && due == UINT64_MAX ? NULL : &wait, NULL) < 0 && errno != EINTR)
			return -errno;
		if (p[2].revents)
			return 0;
		for (int i = 0; i < 2; i++)
			if (p[1 - i].revents & (POLLOUT | POLLERR | POLLHUP))
				sides[i].blocked = 0;
	}
}

int rn_impair_relay(const struct rn_link *a, const struct rn_link *b, struct rn_impair *ab, struct rn_impair *ba,
		    int stop_fd)
{
	const struct rn_impair_spec plain = { 0 };
	struct rn_impair *own[2] = { ab ? NULL : rn_impair_new(&plain, 0), ba ? NULL : rn_impair_new(&plain, 0) };
	struct side_of_relay sides[2] = { { a, b, ab ? ab : own[0], 0 }, { b, a, ba ? ba : own[1], 0 } };
	uint32_t cap = RN_VNET_HLEN + RN_FRAME_MAX + 1;
	uint8_t *buf = malloc(cap);
	int err = buf && sides[0].im && sides[1].im ? relay_loop(sides, buf, cap, stop_fd) : -ENOMEM;

	free(buf);
	rn_impair_free(own[0]);
	rn_impair_free(own[1]);
	return err;
}
