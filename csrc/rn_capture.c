/* rn_capture.c - frames out of the stages' mirrors, as pcapng blocks (contract: rn_capture.h).
 *
 * Each mirror is in order of time by itself; of several the oldest frame goes first. A frame that a stage publishes
 * later than another stage's younger one comes behind it: by less than a turn, and readers sort.
 */
#include "rn_capture.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rn_pcapng.h"

#define COMMENT_MAX 256u
/* Everything of a block but the frame: head, three options at most, their end, the length again. */
#define BLOCK_REST (28u + 4u + COMMENT_MAX + 8u + 12u + 4u + 4u + 8u)

struct source {
	struct rn_mirror_rx rx;
	uint32_t interface[RN_NTAP_POINTS];
	struct rn_mirror_rec rec; /* the oldest, if @bytes is not NULL */
	const uint8_t *bytes;
};

struct rn_capture {
	struct source source[RN_STAGES_MAX];
	uint32_t n;
	uint64_t frames;
};

struct rn_capture *rn_capture_new(void)
{
	return calloc(1, sizeof(struct rn_capture));
}

void rn_capture_free(struct rn_capture *c)
{
	free(c);
}

int rn_capture_add(struct rn_capture *c, void *mem, uint64_t size, const uint32_t *interfaces)
{
	struct source *s = &c->source[c->n];
	int err;

	if (c->n == RN_STAGES_MAX)
		return -ENOSPC;
	err = rn_mirror_rx_attach(&s->rx, mem, size);
	if (err)
		return err;
	memcpy(s->interface, interfaces, sizeof(s->interface));
	c->n++;
	return 0;
}

uint64_t rn_capture_frames(const struct rn_capture *c)
{
	return c->frames;
}

int rn_capture_arm(struct rn_capture *c)
{
	int some = 0;

	for (uint32_t i = 0; i < c->n; i++)
		some |= rn_mirror_rx_arm(&c->source[i].rx);
	return some;
}

/* "dropped: REASON (HELP)", for the packet's comment. 0: not dropped. */
static uint16_t comment(char *out, const struct rn_mirror_rec *rec)
{
	const char *name = rec->reason ? rn_counter_name(rec->reason - 1u) : NULL;
	int n;

	if (!name)
		return 0;
	n = snprintf(out, COMMENT_MAX, "dropped: %s (%s)", name + (strncmp(name, "drop_", 5) ? 0 : 5),
		     rn_counter_help(rec->reason - 1u));
	return (uint16_t)(n < 0 ? 0 : n < (int)COMMENT_MAX ? n : (int)COMMENT_MAX - 1);
}

static uint8_t *write_block(uint8_t *p, const struct source *s)
{
	const struct rn_mirror_rec *rec = &s->rec;
	uint32_t pad = pcapng_pad4(rec->caplen) - rec->caplen;
	char text[COMMENT_MAX];
	uint16_t n = comment(text, rec);
	uint8_t *start = p;

	p = pcapng_put32(p, PCAPNG_EPB);
	p = pcapng_put32(p, 0);
	p = pcapng_put32(p, s->interface[rec->point < RN_NTAP_POINTS ? rec->point : 0]);
	p = pcapng_put32(p, (uint32_t)(rec->ns >> 32));
	p = pcapng_put32(p, (uint32_t)rec->ns);
	p = pcapng_put32(p, rec->caplen);
	p = pcapng_put32(p, rec->len);
	memcpy(p, s->bytes, rec->caplen);
	memset(p + rec->caplen, 0, pad);
	p += rec->caplen + pad;
	if (n)
		p = pcapng_option(p, PCAPNG_COMMENT, text, n);
	if (rec->dir) {
		uint32_t flags = rec->dir & 3u;

		p = pcapng_option(p, PCAPNG_EPB_FLAGS, &flags, sizeof(flags));
	}
	if (rec->lost) {
		uint64_t lost = rec->lost;

		p = pcapng_option(p, PCAPNG_EPB_DROPCOUNT, &lost, sizeof(lost));
	}
	p = pcapng_option(p, PCAPNG_OPT_END, NULL, 0);
	return pcapng_end(start, p);
}

/* The source whose oldest frame is the oldest of all; NULL: none. */
static struct source *oldest(struct rn_capture *c, int *err)
{
	struct source *best = NULL;

	for (uint32_t i = 0; i < c->n; i++) {
		struct source *s = &c->source[i];

		if (!s->bytes)
			s->bytes = rn_mirror_next(&s->rx, &s->rec, err);
		if (*err)
			return NULL;
		if (s->bytes && (!best || s->rec.ns < best->rec.ns))
			best = s;
	}
	return best;
}

int64_t rn_capture_read(struct rn_capture *c, uint8_t *out, uint64_t cap, uint64_t frames)
{
	uint8_t *p = out;
	int err = 0;

	for (; frames; frames--) {
		struct source *s = oldest(c, &err);

		if (err)
			return err;
		if (!s)
			break;
		if ((uint64_t)s->rec.caplen + BLOCK_REST > cap - (uint64_t)(p - out))
			return p == out ? -EMSGSIZE : p - out;
		p = write_block(p, s);
		rn_mirror_consume(&s->rx, &s->rec);
		s->bytes = NULL;
		c->frames++;
	}
	return p - out;
}
