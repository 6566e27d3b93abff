/* ring.c - a descriptor from one process's hands to another's: both ends on one core (the instructions), and between two
 * threads (the cache lines too). A wake is not in it: that is the kernel's, and is paid once a burst. */
#include "micro.h"

#include <pthread.h>

#include "rn_handle.h"

#define SLOTS 1024u

struct ring_ctx {
	struct rn_ring_tx *tx;
	struct rn_ring_rx *rx;
	uint32_t burst, n;
};

static uint64_t one_core(void *ctx, uint32_t n)
{
	struct ring_ctx *c = ctx;
	uint64_t t = micro_now();

	for (uint32_t i = 0; i < n; i += c->burst) {
		NEED(rn_ring_room(c->tx, c->burst) >= (int)c->burst);
		for (uint32_t k = 0; k < c->burst; k++)
			rn_ring_put(c->tx, &(struct rn_desc){ .off = i + k, .len = 64 });
		rn_ring_publish(c->tx);
		NEED(rn_ring_peek(c->rx, c->burst) == (int)c->burst);
		for (uint32_t k = 0; k < c->burst; k++) {
			struct rn_desc d = rn_ring_at(c->rx, k);

			MICRO_USE(d.off);
		}
		rn_ring_consume(c->rx, c->burst);
	}
	return micro_now() - t;
}

static void *producer(void *ctx)
{
	struct ring_ctx *c = ctx;

	rn_ring_pump_tx(c->tx, c->n, c->burst);
	return NULL;
}

static uint64_t two_threads(void *ctx, uint32_t n)
{
	struct ring_ctx *c = ctx;
	pthread_t thread;
	uint64_t ns;

	c->n = n;
	NEED(!pthread_create(&thread, NULL, producer, c));
	ns = rn_ring_pump_rx(c->rx, n, c->burst);
	pthread_join(thread, NULL);
	NEED(ns);
	return ns;
}

void micro_ring(void)
{
	uint64_t size = rn_ring_size(SLOTS);
	void *mem = micro_memory(size);
	struct ring_ctx c;
	int err;

	NEED(!rn_ring_create(mem, size, SLOTS));
	c.tx = rn_ring_tx_new(mem, size, -1, &err);
	c.rx = rn_ring_rx_new(mem, size, -1, &err);
	NEED(c.tx && c.rx);
	c.burst = 1;
	micro("ring", "one core, burst 1", 0, 1 << 17, one_core, &c);
	c.burst = 32;
	micro("ring", "one core, burst 32", 0, 1 << 17, one_core, &c);
	c.burst = 1;
	micro("ring", "two cores, burst 1", 0, 1 << 17, two_threads, &c);
	c.burst = 32;
	micro("ring", "two cores, burst 32", 0, 1 << 17, two_threads, &c);
	rn_ring_tx_delete(c.tx);
	rn_ring_rx_delete(c.rx);
}
