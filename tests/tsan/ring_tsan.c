/* ring_tsan.c - the ring and the arena under ThreadSanitizer: one mapping, three threads, each a stage.
 *
 *   source (owns part 0) -> ring -> relay -> ring -> sink
 *      ^_______ return list: relay frees every third frame, sink the rest ______|
 *
 * Frame bytes are plain memory: written by the source, read by who frees, written again at the next use. If
 * any of the orders P1/C1, C2/P2, A1/A2 were missing, those plain accesses would race, and that is what the
 * sanitizer reports. Every thread sleeps on its doorbell when it has nothing to do.
 */
#include "rn_arena.h"

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FRAMES 40000u
#define SLOTS 16u
#define BUFFERS 24u
#define LEN 64u
#define DEADLINE_MS 60000

static void *ring_mem[2], *arena_mem;
static uint64_t ring_size, arena_size;
static int bells[3];

static void die(const char *what)
{
	fprintf(stderr, "ring_tsan: %s\n", what);
	exit(2);
}

static void need(int ok, const char *what)
{
	if (!ok)
		die(what);
}

static void sleep_on(int bell)
{
	struct pollfd p = { .fd = bell, .events = POLLIN };

	need(poll(&p, 1, DEADLINE_MS) == 1, "a wake was lost");
}

static void attach_pool(struct rn_pool *p, int part, uint32_t me)
{
	need(!rn_pool_attach(p, arena_mem, arena_size, part, me, 0), "pool");
	for (uint32_t i = 0; i < 3; i++)
		p->bells[i] = i == me ? -1 : bells[i];
}

static void *source(void *arg)
{
	struct rn_ring_tx tx;
	struct rn_pool pool;

	(void)arg;
	need(!rn_ring_tx_attach(&tx, ring_mem[0], ring_size, bells[1]), "tx");
	attach_pool(&pool, 0, 0);
	for (uint32_t n = 0; n < FRAMES;) {
		int room = rn_ring_room(&tx, 1);

		need(room >= 0, "impossible head");
		if (!room) {
			rn_ring_publish(&tx);
			if (!rn_ring_tx_arm(&tx)) {
				sleep_on(bells[0]);
				rn_ring_tx_disarm(&tx);
				rn_bell_quiet(bells[0]);
			}
			continue;
		}
		struct rn_buf *b = rn_buf_alloc(&pool, RN_SMALL);

		if (!b) {
			rn_ring_publish(&tx);
			if (!rn_pool_arm(&pool)) {
				sleep_on(bells[0]);
				rn_pool_disarm(&pool);
				rn_bell_quiet(bells[0]);
			}
			continue;
		}
		uint8_t *eth = (uint8_t *)b + RN_BUF_ETH_OFF;
		struct rn_desc d = { .off = rn_buf_off(&pool, eth), .len = LEN, .gen = (uint16_t)b->gen };

		memset(eth, (int)(n & 0xff), LEN);
		memcpy(eth, &n, sizeof(n));
		rn_ring_put(&tx, &d);
		n++;
		if (n % 5 == 0)
			rn_ring_publish(&tx);
	}
	rn_ring_publish(&tx);
	/* Everything comes back. */
	while (rn_pool_free(&pool, RN_SMALL) < BUFFERS)
		if (!rn_pool_arm(&pool)) {
			sleep_on(bells[0]);
			rn_pool_disarm(&pool);
			rn_bell_quiet(bells[0]);
		}
	rn_pool_detach(&pool);
	return NULL;
}

static void read_frame(const struct rn_pool *p, struct rn_desc d, uint32_t n)
{
	const uint8_t *eth;
	uint32_t number;

	need(rn_buf_of(p, &d) != NULL, "a live descriptor was refused");
	eth = p->base + d.off;
	memcpy(&number, eth, sizeof(number));
	need(number == n && eth[LEN - 1] == (uint8_t)n, "frame is not as it was written");
}

/* Passes frames on, but for every third, which it frees. Does not read those it passes on. */
static void *relay(void *arg)
{
	struct rn_ring_rx rx;
	struct rn_ring_tx tx;
	struct rn_pool pool;

	(void)arg;
	need(!rn_ring_rx_attach(&rx, ring_mem[0], ring_size, bells[0]), "rx");
	need(!rn_ring_tx_attach(&tx, ring_mem[1], ring_size, bells[2]), "tx");
	attach_pool(&pool, -1, 1);
	for (uint32_t n = 0; n < FRAMES;) {
		int ready = rn_ring_peek(&rx, 4), i;

		need(ready >= 0, "impossible tail");
		if (!ready) {
			if (!rn_ring_rx_arm(&rx)) {
				sleep_on(bells[1]);
				rn_ring_rx_disarm(&rx);
				rn_bell_quiet(bells[1]);
			}
			continue;
		}
		if (rn_ring_room(&tx, (uint32_t)ready) < ready) {
			tx.want = (uint32_t)ready;
			if (!rn_ring_tx_arm(&tx)) {
				sleep_on(bells[1]);
				rn_ring_tx_disarm(&tx);
				rn_bell_quiet(bells[1]);
			}
			continue;
		}
		for (i = 0; i < ready; i++, n++) {
			struct rn_desc d = rn_ring_at(&rx, (uint32_t)i);

			if (n % 3) {
				rn_ring_put(&tx, &d);
				continue;
			}
			read_frame(&pool, d, n);
			rn_buf_free(&pool, rn_buf_of(&pool, &d));
		}
		rn_ring_publish(&tx);
		rn_ring_consume(&rx, (uint32_t)ready);
	}
	rn_pool_detach(&pool);
	return NULL;
}

static void *sink(void *arg)
{
	struct rn_ring_rx rx;
	struct rn_pool pool;

	(void)arg;
	need(!rn_ring_rx_attach(&rx, ring_mem[1], ring_size, bells[1]), "rx");
	attach_pool(&pool, -1, 2);
	for (uint32_t n = 1; n < FRAMES;) {
		int ready = rn_ring_peek(&rx, 8), i;

		need(ready >= 0, "impossible tail");
		if (!ready) {
			if (!rn_ring_rx_arm(&rx)) {
				sleep_on(bells[2]);
				rn_ring_rx_disarm(&rx);
				rn_bell_quiet(bells[2]);
			}
			continue;
		}
		for (i = 0; i < ready; i++) {
			struct rn_desc d = rn_ring_at(&rx, (uint32_t)i);

			read_frame(&pool, d, n);
			rn_buf_free(&pool, rn_buf_of(&pool, &d));
			n += n % 3 == 2 ? 2 : 1;
		}
		rn_ring_consume(&rx, (uint32_t)ready);
	}
	rn_pool_detach(&pool);
	return NULL;
}

static void *memory(uint64_t size)
{
	void *mem = aligned_alloc(RN_CACHE_LINE, (size + RN_CACHE_LINE - 1) / RN_CACHE_LINE * RN_CACHE_LINE);

	need(mem != NULL, "memory");
	return memset(mem, 0, size);
}

int main(void)
{
	const struct rn_part_spec spec[3] = { { .nsmall = BUFFERS } };
	void *(*const stages[3])(void *) = { source, relay, sink };
	pthread_t threads[3];

	ring_size = rn_ring_size(SLOTS);
	arena_size = rn_arena_size(spec, 3);
	for (int i = 0; i < 2; i++) {
		ring_mem[i] = memory(ring_size);
		need(!rn_ring_create(ring_mem[i], ring_size, SLOTS), "ring");
	}
	arena_mem = memory(arena_size);
	need(!rn_arena_create(arena_mem, arena_size, spec, 3), "arena");
	for (int i = 0; i < 3; i++)
		need((bells[i] = rn_bell_new()) >= 0, "bell");
	for (int i = 0; i < 3; i++)
		need(!pthread_create(&threads[i], NULL, stages[i], NULL), "thread");
	for (int i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	printf("%u frames\n", FRAMES);
	return 0;
}
