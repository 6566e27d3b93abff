/* arena.c - take a buffer and give it back: by its owner, and by another stage through the return list. */
#include "micro.h"

#include "rn_arena.h"

#define OWNER 0
#define OTHER 1
#define BURST 32u

struct arena_ctx {
	struct rn_pool owner, other;
	enum rn_buf_class cls;
	int remote;
};

static uint64_t uses(void *ctx, uint32_t n)
{
	struct arena_ctx *c = ctx;
	struct rn_buf *b[BURST];
	uint64_t t = micro_now();

	for (uint32_t i = 0; i < n; i += BURST) {
		for (uint32_t k = 0; k < BURST; k++) {
			b[k] = rn_buf_alloc(&c->owner, c->cls);
			NEED(b[k]);
		}
		for (uint32_t k = 0; k < BURST; k++)
			rn_buf_free(c->remote ? &c->other : &c->owner, b[k]);
	}
	return micro_now() - t;
}

void micro_arena(void)
{
	static const struct rn_part_spec spec[2] = { { 512, 64 }, { 0, 0 } };
	uint64_t size = rn_arena_size(spec, 2);
	void *mem = micro_memory(size);
	struct arena_ctx c;

	NEED(!rn_arena_create(mem, size, spec, 2));
	NEED(!rn_pool_attach(&c.owner, mem, size, OWNER, OWNER, 0));
	NEED(!rn_pool_attach(&c.other, mem, size, -1, OTHER, 0));
	for (c.remote = 0; c.remote < 2; c.remote++) {
		c.cls = RN_SMALL;
		micro("arena", c.remote ? "small, freed by another stage" : "small, freed by its owner", 0, 32 * 4000, uses, &c);
		c.cls = RN_LARGE;
		micro("arena", c.remote ? "large, freed by another stage" : "large, freed by its owner", 0, 32 * 4000, uses, &c);
	}
	rn_pool_detach(&c.owner);
	rn_pool_detach(&c.other);
}
