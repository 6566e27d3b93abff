/* rn_handle.c - ring ends and pools on the heap, for Python (rn_handle.h). */
#include "rn_handle.h"
#include "rn_stage.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>

struct rn_ring_tx *rn_ring_tx_new(void *mem, uint64_t size, int consumer_bell, int *err)
{
	/* A line of its own: handles of two threads must not share one. */
	struct rn_ring_tx *tx = aligned_alloc(RN_CACHE_LINE, 2 * RN_CACHE_LINE);

	_Static_assert(sizeof(*tx) <= 2 * RN_CACHE_LINE, "fits");
	*err = tx ? rn_ring_tx_attach(tx, mem, size, consumer_bell) : -ENOMEM;
	if (*err) {
		free(tx);
		return NULL;
	}
	return tx;
}

void rn_ring_tx_delete(struct rn_ring_tx *tx)
{
	free(tx);
}

struct rn_ring_rx *rn_ring_rx_new(void *mem, uint64_t size, int producer_bell, int *err)
{
	struct rn_ring_rx *rx = aligned_alloc(RN_CACHE_LINE, 2 * RN_CACHE_LINE);

	_Static_assert(sizeof(*rx) <= 2 * RN_CACHE_LINE, "fits");
	*err = rx ? rn_ring_rx_attach(rx, mem, size, producer_bell) : -ENOMEM;
	if (*err) {
		free(rx);
		return NULL;
	}
	return rx;
}

void rn_ring_rx_delete(struct rn_ring_rx *rx)
{
	free(rx);
}

uint64_t rn_ring_tx_wakes(const struct rn_ring_tx *tx)
{
	return tx->wakes;
}

uint64_t rn_ring_rx_wakes(const struct rn_ring_rx *rx)
{
	return rx->wakes;
}

void rn_ring_tx_want(struct rn_ring_tx *tx, uint32_t want)
{
	tx->want = want;
}

uint64_t rn_ring_pump_tx(struct rn_ring_tx *tx, uint64_t n, uint32_t burst)
{
	uint64_t start = rn_now_ns(), sent = 0;

	while (sent < n) {
		int room = rn_ring_room(tx, burst);

		if (room < 0)
			break;
		if (!room) {
			sched_yield();
			continue;
		}
		for (int i = 0; i < room && (uint32_t)i < burst && sent < n; i++, sent++)
			rn_ring_put(tx, &(struct rn_desc){ .off = sent, .len = (uint32_t)sent });
		rn_ring_publish(tx);
	}
	return rn_now_ns() - start;
}

uint64_t rn_ring_pump_rx(struct rn_ring_rx *rx, uint64_t n, uint32_t burst)
{
	uint64_t start = rn_now_ns(), seen = 0;

	while (seen < n) {
		int ready = rn_ring_peek(rx, burst);

		if (ready < 0)
			break;
		if (!ready) {
			sched_yield();
			continue;
		}
		for (int i = 0; i < ready; i++, seen++)
			if (rn_ring_at(rx, (uint32_t)i).off != seen)
				return 0; /* out of order: no figure */
		rn_ring_consume(rx, (uint32_t)ready);
	}
	return rn_now_ns() - start;
}

struct rn_pool *rn_pool_new(void *mem, uint64_t size, int part, uint32_t me, int recover, int *err)
{
	struct rn_pool *p = calloc(1, sizeof(*p));

	*err = p ? rn_pool_attach(p, mem, size, part, me, recover) : -ENOMEM;
	if (*err) {
		free(p);
		return NULL;
	}
	return p;
}

void rn_pool_delete(struct rn_pool *p)
{
	if (p)
		rn_pool_detach(p);
	free(p);
}

void rn_pool_bell(struct rn_pool *p, uint32_t row, int fd)
{
	if (row < RN_STAGES_MAX)
		p->bells[row] = fd;
}

uint64_t rn_pool_wakes(const struct rn_pool *p)
{
	return p->wakes;
}

int rn_pool_take(struct rn_pool *p, int cls, uint32_t len, struct rn_desc *d)
{
	struct rn_buf *b;

	if (cls != RN_SMALL && cls != RN_LARGE)
		return -EINVAL;
	if (len > (cls == RN_LARGE ? RN_LARGE_FRAME_MAX : RN_SMALL_FRAME_MAX))
		return -EMSGSIZE;
	b = rn_buf_alloc(p, (enum rn_buf_class)cls);
	if (!b)
		return -ENOBUFS;
	*d = (struct rn_desc){ .off = rn_buf_off(p, b) + RN_BUF_ETH_OFF, .len = len, .gen = (uint16_t)b->gen };
	return 0;
}

int rn_pool_holds(const struct rn_pool *p, const struct rn_desc *d)
{
	struct rn_desc copy = *d;

	return rn_buf_of(p, &copy) != NULL;
}

int rn_pool_give(struct rn_pool *p, const struct rn_desc *d)
{
	struct rn_desc copy = *d;
	struct rn_buf *b = rn_buf_of(p, &copy);

	if (!b)
		return -EINVAL;
	rn_buf_free(p, b);
	return 0;
}

uint32_t rn_pool_give_many(struct rn_pool *p, const struct rn_desc *d, uint32_t n)
{
	uint32_t i;

	for (i = 0; i < n && !rn_pool_give(p, &d[i]); i++)
		;
	return i;
}
