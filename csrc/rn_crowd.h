/* rn_crowd.h - do many flows send at once? Counted by what they send, (sum x)^2 / sum x^2: one that sends beside a hundred that
 * ask and answer is no crowd.
 *
 * That there are many is seen at once, that there are not only over an epoch: with windows of megabytes, one after another,
 * few are seen at a time however many there are. An epoch ends with time as well: what is done because of a crowd must not
 * last when nothing more is sent, and many that send a little, for hours, are none.
 */
#ifndef RN_CROWD_H
#define RN_CROWD_H

#include <stdint.h>

#define RN_CROWD_ONSET (1u << 20) /* bytes that show a crowd */
#define RN_CROWD_EPOCH (8u << 20) /* bytes, and */
#define RN_CROWD_EPOCH_NS 500000000ull /* ns at least, that show that there is none */
#define RN_CROWD_EPOCH_MAX_NS 2000000000ull /* less than ONSET in that time is no crowd */

struct rn_crowd {
	double sum, squares; /* of what the flows sent in this epoch, bytes */
	uint64_t began;	     /* that one, CLOCK_MONOTONIC ns */
	uint32_t epoch;
	uint32_t many; /* flows from which on it is a crowd */
	int crowded;
};

struct rn_crowd_flow {
	uint32_t epoch, sent; /* bytes in that epoch */
};

static inline void rn_crowd_join(const struct rn_crowd *c, struct rn_crowd_flow *x)
{
	x->epoch = c->epoch - 1; /* nothing in this one: the entry may have been another flow's */
}

static inline int rn_crowd_many(const struct rn_crowd *c)
{
	return c->sum >= RN_CROWD_ONSET && c->sum * c->sum >= c->many * c->squares;
}

/* Begin a new epoch. 1: there is no crowd any more. */
static inline int rn_crowd_next(struct rn_crowd *c, uint64_t now)
{
	int over = c->crowded && !rn_crowd_many(c);

	if (over)
		c->crowded = 0;
	c->sum = c->squares = 0;
	c->began = now;
	c->epoch++;
	return over;
}

static inline int rn_crowd_overdue(const struct rn_crowd *c, uint64_t now)
{
	return now - c->began >= RN_CROWD_EPOCH_MAX_NS;
}

/* A flow has sent @len bytes more. 1: ->crowded changed. */
static inline int rn_crowd_sent(struct rn_crowd *c, struct rn_crowd_flow *x, uint32_t len, uint64_t now)
{
	int changed = 0;

	if (rn_crowd_overdue(c, now))
		changed = rn_crowd_next(c, now);
	if (x->epoch != c->epoch) {
		x->epoch = c->epoch;
		x->sent = 0;
	}
	c->squares += (double)len * (2.0 * x->sent + len); /* (sent + len)^2 - sent^2 */
	c->sum += len;
	x->sent += len;
	if (!c->crowded && rn_crowd_many(c)) {
		c->crowded = 1;
		changed = 1;
	}
	if (c->sum >= RN_CROWD_EPOCH && now - c->began >= RN_CROWD_EPOCH_NS)
		changed |= rn_crowd_next(c, now);
	return changed;
}

#endif
