/* rn_tap.c - what a stage does for a capture (contract: rn_tap.h, and rn_stage.h for the calls).
 *
 * system calls: write (the reader's doorbell, once a turn at most, only if it sleeps)
 */
#include "rn_tap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "rn_stage.h"

_Static_assert(RN_TAP_LINK == RN_INPUTS_MAX, "the link's point is behind the inputs'");

/* Which points any tap wants: what the hooks look at. */
static void update_mask(struct rn_stage *s)
{
	s->tapped = 0;
	for (uint32_t i = 0; i < RN_TAPS_MAX; i++)
		if (s->taps->tap[i].id)
			s->tapped |= s->taps->tap[i].points;
}

static struct rn_taps *taps_new(void)
{
	struct rn_taps *t = calloc(1, sizeof(*t));

	for (uint32_t i = 0; t && i < RN_NCOUNTERS; i++)
		if (!strncmp(rn_counter_name(i), "drop_", 5))
			t->drop[t->ndrop++] = (uint16_t)i;
	return t;
}

int rn_tap_start(struct rn_stage *s, uint32_t id, void *mem, uint64_t size, int bell, uint32_t points, uint32_t snaplen,
		 int drops, const struct rn_filter *filter)
{
	struct rn_tap *t = NULL;
	int err;

	if (!id || !points || points >> RN_NTAP_POINTS || bell < 0)
		return rn_fail(s, -EINVAL, "capture: no such point, or no doorbell");
	if (!s->taps)
		s->taps = taps_new();
	if (!s->taps)
		return rn_fail(s, -ENOMEM, "capture: out of memory");
	for (uint32_t i = 0; i < RN_TAPS_MAX && !t; i++)
		if (!s->taps->tap[i].id)
			t = &s->taps->tap[i];
	if (!t)
		return rn_fail(s, -EBUSY, "capture: %u are under way at this stage, which is all it can do", RN_TAPS_MAX);
	*t = (struct rn_tap){ .filter = *filter, .points = points, .snaplen = snaplen, .drops = !!drops };
	err = rn_mirror_tx_attach(&t->tx, mem, size, bell);
	if (err)
		return rn_fail(s, err, "capture: the mirror is %s", err == -EMSGSIZE ? "too short" : "none of this build's");
	t->id = id;
	update_mask(s);
	return 0;
}

int rn_tap_stop(struct rn_stage *s, uint32_t id)
{
	for (uint32_t i = 0; s->taps && i < RN_TAPS_MAX; i++) {
		struct rn_tap *t = &s->taps->tap[i];

		if (t->id == id && id) {
			rn_mirror_publish(&t->tx);
			t->id = 0;
			update_mask(s);
			return 0;
		}
	}
	return -ENOENT;
}

void rn_tap_end(struct rn_stage *s)
{
	free(s->taps);
	s->taps = NULL;
	s->tapped = 0;
}

static uint64_t realtime(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts); /* pcapng counts from 1970 UTC, so not the loop's clock */
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void record(struct rn_stage *s, struct rn_tap *t, uint32_t point, int dir, uint64_t ns, const uint8_t *head,
		   uint32_t head_len, const uint8_t *rest, uint32_t rest_len)
{
	uint32_t len = head_len + rest_len, cap = len < t->snaplen ? len : t->snaplen;
	struct rn_mirror_rec *rec = rn_mirror_reserve(&t->tx, cap);
	uint8_t *to;

	if (!rec) {
		s->c[RN_C_capture_dropped]++;
		return;
	}
	rec->len = len;
	rec->ns = ns;
	rec->point = (uint8_t)point;
	rec->dir = (uint8_t)dir;
	to = (uint8_t *)(rec + 1);
	if (head_len > cap)
		head_len = cap;
	memcpy(to, head, head_len);
	if (cap > head_len)
		memcpy(to + head_len, rest, cap - head_len);
	s->c[RN_C_capture_frames]++;
	if (t->nrec < sizeof(t->rec) / sizeof(t->rec[0]))
		t->rec[t->nrec++] = rec;
}

void rn_tap_frame2(struct rn_stage *s, uint32_t point, int dir, const uint8_t *head, uint32_t head_len,
		   const uint8_t *rest, uint32_t rest_len)
{
	struct rn_taps *taps = s->taps;
	uint64_t ns = 0;

	for (uint32_t i = 0; i < RN_TAPS_MAX; i++) {
		struct rn_tap *t = &taps->tap[i];

		if (!t->id || !(t->points & 1u << point) || !rn_filter_match(&t->filter, head, head_len))
			continue;
		if (!ns)
			ns = realtime();
		if (!taps->open) {
			taps->open = 1;
			for (uint32_t k = 0; k < taps->ndrop; k++)
				taps->before[k] = s->c[taps->drop[k]];
		}
		record(s, t, point, dir, ns, head, head_len, rest, rest_len);
	}
}

/* The counter of drops that moved since the frame came, + 1; 0: none. */
static uint16_t why_dropped(const struct rn_stage *s)
{
	const struct rn_taps *taps = s->taps;

	for (uint32_t k = 0; k < taps->ndrop; k++)
		if (s->c[taps->drop[k]] != taps->before[k])
			return (uint16_t)(taps->drop[k] + 1);
	return 0;
}

void rn_tap_close(struct rn_stage *s, int undo)
{
	uint16_t why = undo ? 0 : why_dropped(s);

	for (uint32_t i = 0; i < RN_TAPS_MAX; i++) {
		struct rn_tap *t = &s->taps->tap[i];

		while (t->nrec) {
			struct rn_mirror_rec *rec = t->rec[--t->nrec];

			if (undo || (t->drops && !why)) {
				rn_mirror_take_back(&t->tx, rec);
				s->c[RN_C_capture_frames]--;
			} else {
				rec->reason = why;
			}
		}
	}
	s->taps->open = 0;
}

void rn_tap_flush(struct rn_stage *s)
{
	if (s->taps->open)
		rn_tap_close(s, 0);
	for (uint32_t i = 0; i < RN_TAPS_MAX; i++)
		if (s->taps->tap[i].id)
			rn_mirror_publish(&s->taps->tap[i].tx);
}
