/* rn_arena.c - frame buffers in shared memory (layout: rn_arena.h).
 *
 * Theory of operation
 *
 * A buffer is known by its part and its index in the part, small ones first. The owner of a part keeps its
 * free buffers in two private stacks. A buffer leaves by rn_buf_alloc() and comes back by rn_buf_free(): in
 * the owner straight to the stack, in any other stage by a push on the part's return list, whose links are
 * indices in the buffers' headers. The owner takes the list whole, so a popper never races a pusher for one
 * node and there is no ABA. A pusher that dies before its compare-and-swap keeps its one buffer out; after
 * it the list is complete.
 *
 * Headers and list are writable by every stage. So the owner bounds its walk of the list, checks each index,
 * and takes back only what its private map says is out: the worst a taken-over stage can do is to lose
 * buffers or to scribble on frames that pass through it anyway.
 *
 * Layout of a part: large and small buffers each in one run that starts on a page, so that an untouched
 * buffer costs no memory; a header is first written when its buffer is first handed out.
 */
#include "rn_arena.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PAGE 4096u
#define PART_BUFS_MAX (1u << 20) /* a class in a part; indices + 1 fit 32 bits with room to spare */

static uint64_t page_up(uint64_t n)
{
	return (n + PAGE - 1) / PAGE * PAGE;
}

/* Walk the layout; @arena may be NULL when only the size is wanted. 0 if the numbers are out of bounds. */
static uint64_t arena_plan(struct rn_arena *arena, const struct rn_part_spec *spec, uint32_t nparts)
{
	uint64_t at = page_up(sizeof(struct rn_arena));

	if (!spec || !nparts || nparts > RN_STAGES_MAX)
		return 0;
	for (uint32_t i = 0; i < nparts; i++) {
		uint64_t small = at, large;

		if (spec[i].nsmall > PART_BUFS_MAX || spec[i].nlarge > PART_BUFS_MAX)
			return 0;
		large = page_up(small + (uint64_t)spec[i].nsmall * RN_BUF_SMALL);
		at = page_up(large + (uint64_t)spec[i].nlarge * RN_BUF_LARGE);
		if (arena) {
			arena->parts[i].small_off = small;
			arena->parts[i].large_off = large;
			arena->parts[i].nsmall = spec[i].nsmall;
			arena->parts[i].nlarge = spec[i].nlarge;
			atomic_store_explicit(&arena->parts[i].returned, 0, memory_order_relaxed);
			atomic_store_explicit(&arena->parts[i].starved, 0, memory_order_relaxed);
		}
	}
	return at;
}

/* Bytes of shared memory for these parts, by stage row; 0 if the numbers are out of bounds. */
uint64_t rn_arena_size(const struct rn_part_spec *spec, uint32_t nparts)
{
	return arena_plan(NULL, spec, nparts);
}

/* Format @size zeroed bytes. 0, or -EINVAL. */
int rn_arena_create(void *mem, uint64_t size, const struct rn_part_spec *spec, uint32_t nparts)
{
	struct rn_arena *arena = mem;
	uint64_t need = rn_arena_size(spec, nparts);

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE || !need || size < need)
		return -EINVAL;
	arena_plan(arena, spec, nparts);
	arena->version = RN_LAYOUT_VERSION;
	arena->size = need;
	arena->nparts = nparts;
	arena->reserved = 0;
	arena->magic = RN_ARENA_MAGIC;
	return 0;
}

/* Check identity; fill @view and @nparts with numbers that were read once and lie within @size. */
static int arena_identity(const void *mem, uint64_t size, struct rn_part_view view[RN_STAGES_MAX], uint32_t *nparts)
{
	const volatile struct rn_arena *arena = mem;
	uint64_t total;

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE)
		return -EINVAL;
	if (size < sizeof(struct rn_arena))
		return -EMSGSIZE;
	if (arena->magic != RN_ARENA_MAGIC || arena->version != RN_LAYOUT_VERSION)
		return -EPROTO;
	total = arena->size;
	*nparts = arena->nparts;
	if (!*nparts || *nparts > RN_STAGES_MAX)
		return -EPROTO;
	if (size < total)
		return -EMSGSIZE;
	for (uint32_t i = 0; i < *nparts; i++) {
		struct rn_part_view v = {
			.small_off = arena->parts[i].small_off,
			.large_off = arena->parts[i].large_off,
			.nsmall = arena->parts[i].nsmall,
			.nlarge = arena->parts[i].nlarge,
		};

		if (v.nsmall > PART_BUFS_MAX || v.nlarge > PART_BUFS_MAX || v.small_off % RN_CACHE_LINE ||
		    v.large_off % RN_CACHE_LINE || v.small_off < sizeof(struct rn_arena) || v.small_off > total ||
		    (uint64_t)v.nsmall * RN_BUF_SMALL > total - v.small_off || v.large_off < v.small_off ||
		    (uint64_t)v.nsmall * RN_BUF_SMALL > v.large_off - v.small_off || v.large_off > total ||
		    (uint64_t)v.nlarge * RN_BUF_LARGE > total - v.large_off)
			return -EPROTO;
		view[i] = v;
	}
	return 0;
}

int rn_arena_check(const void *mem, uint64_t size)
{
	struct rn_part_view view[RN_STAGES_MAX];
	uint32_t nparts;

	return arena_identity(mem, size, view, &nparts);
}

/**
 * rn_arena_usage() - Who holds a part's buffers
 * @mem:	The mapped object, read only will do
 * @size:	Bytes mapped
 * @part:	Row of the owner
 * @out:	Filled
 *
 * From the holder words, so for whoever looks on: while frames move, a buffer handed on in between may be counted with
 * its old or its new holder. At rest the numbers are exact.
 *
 * Return: 0; as rn_arena_check(); -ENOENT if there is no such part.
 */
int rn_arena_usage(const void *mem, uint64_t size, uint32_t part, struct rn_part_use *out)
{
	struct rn_part_view view[RN_STAGES_MAX];
	uint32_t nparts;
	int err = arena_identity(mem, size, view, &nparts);

	if (err)
		return err;
	if (part >= nparts)
		return -ENOENT;
	*out = (struct rn_part_use){ .total = { view[part].nsmall, view[part].nlarge } };
	for (int cls = 0; cls < 2; cls++) {
		const uint8_t *at = (const uint8_t *)mem + (cls ? view[part].large_off : view[part].small_off);
		uint32_t step = cls ? RN_BUF_LARGE : RN_BUF_SMALL;

		for (uint32_t n = out->total[cls]; n; n--, at += step) {
			/* relaxed: nothing else of the buffer is looked at */
			uint32_t holder = atomic_load_explicit(&((const struct rn_buf *)at)->holder, memory_order_relaxed);

			if (holder == RN_HOLDER_RETURNED)
				out->returned[cls]++;
			else if (holder > RN_STAGES_MAX)
				out->unknown[cls]++;
			else if (holder)
				out->held[holder - 1][cls]++;
		}
	}
	return 0;
}

/* Header of a buffer of our own part; @index is in range. */
static struct rn_buf *own_buf(const struct rn_pool *p, uint32_t index)
{
	const struct rn_part_view *v = &p->view[p->part];
	uint64_t off = index < p->nsmall ? v->small_off + (uint64_t)index * RN_BUF_SMALL :
					   v->large_off + (uint64_t)(index - p->nsmall) * RN_BUF_LARGE;

	return (struct rn_buf *)(p->base + off);
}

/* Back on the stack, unless it already is. */
static void own_push(struct rn_pool *p, uint32_t index)
{
	enum rn_buf_class cls = index < p->nsmall ? RN_SMALL : RN_LARGE;

	if (RN_UNLIKELY(!p->out[index]))
		return;
	p->out[index] = 0;
	atomic_store_explicit(&own_buf(p, index)->holder, 0, memory_order_relaxed);
	p->stack[cls][p->free[cls]++] = index;
}

/* Take the whole return list. */
static void reclaim(struct rn_pool *p)
{
	struct rn_part *part = &p->arena->parts[p->part];
	uint32_t total = p->nsmall + p->nlarge;
	uint32_t link;

	if (!atomic_load_explicit(&part->returned, memory_order_relaxed))
		return;
	/* A2: acquire exchange, pairs A1: the links, and the last user's accesses, before our reuse. */
	link = atomic_exchange_explicit(&part->returned, 0, memory_order_acquire);
	/* At most @total steps: a forged list may be a circle. Index 0 is no buffer, links are index + 1. */
	for (uint32_t n = 0; link && n < total; n++) {
		uint32_t index = link - 1;

		if (index >= total)
			break;
		link = own_buf(p, index)->next;
		own_push(p, index);
	}
}

/**
 * rn_pool_attach() - Use an arena
 * @p:		Handle to fill; doorbells are -1 until the caller sets them
 * @mem:	The mapped object
 * @size:	Bytes mapped
 * @part:	Part to allocate from, the stage's own row, or -1 for a stage that only frees
 * @me:		The stage's row
 * @recover:	1: an earlier generation used the part, so what others hold stays out
 *
 * Return: 0; -EINVAL, -EPROTO, -EMSGSIZE as rn_arena_check(); -EINVAL if there is no such part; -ENOMEM.
 *	   On error nothing is held.
 */
int rn_pool_attach(struct rn_pool *p, void *mem, uint64_t size, int part, uint32_t me, int recover)
{
	struct rn_arena *arena = mem;
	uint32_t total, link;
	int err;

	*p = (struct rn_pool){ .part = -1, .me = me };
	for (uint32_t i = 0; i < RN_STAGES_MAX; i++)
		p->bells[i] = -1;
	err = arena_identity(mem, size, p->view, &p->nparts);
	if (err)
		return err;
	if (part >= (int)p->nparts || part < -1)
		return -EINVAL;
	p->arena = arena;
	p->base = mem;
	p->size = size;
	if (part < 0)
		return 0;
	p->part = part;
	p->nsmall = p->view[part].nsmall;
	p->nlarge = p->view[part].nlarge;
	total = p->nsmall + p->nlarge;
	p->stack[RN_SMALL] = calloc(p->nsmall + 1, sizeof(uint32_t));
	p->stack[RN_LARGE] = calloc(p->nlarge + 1, sizeof(uint32_t));
	p->out = calloc(total + 1, 1);
	if (!p->stack[RN_SMALL] || !p->stack[RN_LARGE] || !p->out) {
		rn_pool_detach(p);
		return -ENOMEM;
	}
	memset(p->out, 1, total);
	/* What the predecessor had not yet taken back: complete, by A1 and A2. Counted in by its holder word. */
	link = recover ? atomic_exchange_explicit(&arena->parts[part].returned, 0, memory_order_acquire) : 0;
	for (uint32_t n = 0; link && n < total && link - 1 < total; n++) {
		struct rn_buf *b = own_buf(p, link - 1);

		link = b->next;
		atomic_store_explicit(&b->holder, 0, memory_order_relaxed);
	}
	/* From the last to the first, so that the first is handed out first. */
	for (uint32_t index = total; index-- > 0;) {
		if (recover) {
			uint32_t holder = atomic_load_explicit(&own_buf(p, index)->holder, memory_order_relaxed);

			/* RN_HOLDER_RETURNED here: its pusher is between two steps, or died there. */
			if (holder && holder != me + 1)
				continue;
		}
		p->out[index] = 0;
		if (recover)
			atomic_store_explicit(&own_buf(p, index)->holder, 0, memory_order_relaxed);
		if (index < p->nsmall)
			p->stack[RN_SMALL][p->free[RN_SMALL]++] = index;
		else
			p->stack[RN_LARGE][p->free[RN_LARGE]++] = index;
	}
	return 0;
}

/* Buffers that are out stay out: their holders free them to the part, for the next generation. */
void rn_pool_detach(struct rn_pool *p)
{
	free(p->stack[RN_SMALL]);
	free(p->stack[RN_LARGE]);
	free(p->out);
	*p = (struct rn_pool){ .part = -1 };
}

/**
 * rn_buf_alloc() - Take a buffer of the own part
 * @p:		Pool handle
 * @cls:	RN_SMALL or RN_LARGE
 *
 * The most recently freed one, which is likely still in cache. Contents are whatever was there; gen counts
 * up, so that descriptors of its earlier life no longer match.
 *
 * Return: its header, or NULL: none free, or the stage has no part.
 */
struct rn_buf *rn_buf_alloc(struct rn_pool *p, enum rn_buf_class cls)
{
	struct rn_buf *b;
	uint32_t index;

	if (RN_UNLIKELY(!p->free[cls])) {
		if (p->part < 0)
			return NULL;
		reclaim(p);
		if (!p->free[cls])
			return NULL;
	}
	index = p->stack[cls][--p->free[cls]];
	p->out[index] = 1;
	b = own_buf(p, index);
	b->part = (uint16_t)p->part;
	b->cls = (uint16_t)cls;
	b->gen++;
	b->first_ns = 0;
	atomic_store_explicit(&b->holder, p->me + 1, memory_order_relaxed);
	return b;
}

/* Which buffer holds arena offset @off: part, index, its start and class. 0 if none does. */
static int locate(const struct rn_pool *p, uint64_t off, uint32_t *part, uint32_t *index, uint64_t *start,
		  enum rn_buf_class *cls)
{
	for (uint32_t i = 0; i < p->nparts; i++) {
		const struct rn_part_view *v = &p->view[i];
		/* Unsigned: an offset before the run is far behind it. */
		uint64_t small = off - v->small_off, large = off - v->large_off;

		if (small < (uint64_t)v->nsmall * RN_BUF_SMALL) {
			*part = i;
			*index = (uint32_t)(small / RN_BUF_SMALL);
			*start = v->small_off + (uint64_t)*index * RN_BUF_SMALL;
			*cls = RN_SMALL;
			return 1;
		}
		if (large < (uint64_t)v->nlarge * RN_BUF_LARGE) {
			uint32_t n = (uint32_t)(large / RN_BUF_LARGE);

			*part = i;
			*index = v->nsmall + n;
			*start = v->large_off + (uint64_t)n * RN_BUF_LARGE;
			*cls = RN_LARGE;
			return 1;
		}
	}
	return 0;
}

/**
 * rn_buf_free() - Give a buffer back to its part
 * @p:		Pool handle of any stage
 * @b:		Header, as rn_buf_alloc() or rn_buf_of() returned it; NULL is ignored, as is a pointer to no buffer
 *
 * A buffer that is free already is left alone. Wakes the owner if it waits for a buffer.
 */
void rn_buf_free(struct rn_pool *p, struct rn_buf *b)
{
	struct rn_part *part;
	enum rn_buf_class cls;
	uint32_t row, index, head, holder;
	uint64_t start;

	/* By the address, which is ours; the header can be rewritten by others. */
	if (!b || !locate(p, rn_buf_off(p, b), &row, &index, &start, &cls))
		return;
	b = (struct rn_buf *)(p->base + start);
	if ((int)row == p->part) {
		own_push(p, index);
		return;
	}
	part = &p->arena->parts[row];
	/* A second free of one buffer would tie the list into a knot and lose what hangs behind it. */
	holder = atomic_load_explicit(&b->holder, memory_order_relaxed);
	if (RN_UNLIKELY(!holder || holder == RN_HOLDER_RETURNED))
		return;
	/* Before the push: once it is on the list it is the owner's. */
	atomic_store_explicit(&b->holder, RN_HOLDER_RETURNED, memory_order_relaxed);
	head = atomic_load_explicit(&part->returned, memory_order_relaxed);
	/* A1: release, pairs A2; and sequentially consistent, so that with A3 either we see that the owner is
	 * starved or it sees the buffer (store, then load, on both sides). */
	do
		b->next = head;
	while (!atomic_compare_exchange_weak_explicit(&part->returned, &head, index + 1, memory_order_seq_cst,
						      memory_order_relaxed));
	if (p->bells[row] < 0 || !atomic_load_explicit(&part->starved, memory_order_seq_cst))
		return;
	/* A4: exchange, pairs A3: one ring of the doorbell for each time the owner asked. */
	if (atomic_exchange_explicit(&part->starved, 0, memory_order_acq_rel)) {
		p->wakes++;
		rn_bell_ring(p->bells[row]);
	}
}

/**
 * rn_pool_sweep() - Give back what the dead generation of this stage held of other stages' parts
 * @p:		Pool handle of its successor
 * @served:	Descriptors in its input rings: theirs stay
 * @n:		How many
 *
 * A buffer is known by its holder word, which a producer sets just before it publishes (rn_stage_publish()): at
 * worst one that is being published in this moment is taken too, and its descriptor is then refused by
 * rn_buf_of() once the buffer has been used anew. (The own part is rn_pool_attach()'s.)
 *
 * Return: buffers given back, or -ENOMEM.
 */
int rn_pool_sweep(struct rn_pool *p, const struct rn_desc *served, uint32_t n)
{
	uint32_t base[RN_STAGES_MAX + 1] = { 0 };
	uint8_t *stays;
	int swept = 0;

	for (uint32_t i = 0; i < p->nparts; i++)
		base[i + 1] = base[i] + p->view[i].nsmall + p->view[i].nlarge;
	stays = calloc(base[p->nparts] + 1, 1);
	if (!stays)
		return -ENOMEM;
	for (uint32_t k = 0; k < n; k++) {
		enum rn_buf_class cls;
		uint32_t part, index;
		uint64_t start;

		if (locate(p, served[k].off, &part, &index, &start, &cls))
			stays[base[part] + index] = 1;
	}
	for (uint32_t i = 0; i < p->nparts; i++) {
		const struct rn_part_view *v = &p->view[i];

		for (uint32_t k = 0; (int)i != p->part && k < v->nsmall + v->nlarge; k++) {
			uint64_t off = k < v->nsmall ? v->small_off + (uint64_t)k * RN_BUF_SMALL :
						       v->large_off + (uint64_t)(k - v->nsmall) * RN_BUF_LARGE;
			struct rn_buf *b = (struct rn_buf *)(p->base + off);

			if (stays[base[i] + k] || atomic_load_explicit(&b->holder, memory_order_relaxed) != p->me + 1)
				continue;
			rn_buf_free(p, b);
			swept++;
		}
	}
	free(stays);
	return swept;
}

uint32_t rn_pool_free(struct rn_pool *p, enum rn_buf_class cls)
{
	if (p->part < 0)
		return 0;
	reclaim(p);
	return p->free[cls];
}

/**
 * rn_pool_arm() - Ask to be woken when a buffer comes back
 * @p:		Pool handle of the part's owner
 *
 * Return: 0 if the owner may block; 1 if buffers came back in between: they are taken, the request is withdrawn. What the
 *	   owner itself freed since it last looked does not count: it knows of that (rn_stage_arm() does).
 */
int rn_pool_arm(struct rn_pool *p)
{
	struct rn_part *part;

	if (p->part < 0)
		return 0;
	part = &p->arena->parts[p->part];
	/* A3: sequentially consistent store, then load; pairs A1 and A4. */
	atomic_store_explicit(&part->starved, 1, memory_order_seq_cst);
	if (!atomic_load_explicit(&part->returned, memory_order_seq_cst))
		return 0;
	rn_pool_disarm(p);
	reclaim(p);
	return 1;
}

void rn_pool_disarm(struct rn_pool *p)
{
	if (p->part >= 0)
		atomic_store_explicit(&p->arena->parts[p->part].starved, 0, memory_order_relaxed);
}

/**
 * rn_buf_of() - From a descriptor to its buffer
 * @p:		Pool handle of any stage
 * @d:		Our copy of the descriptor
 *
 * Return: header of the buffer that holds the whole frame and a virtio-net header in front of it; NULL if the
 *	   descriptor points elsewhere, or to an earlier use of the buffer.
 */
struct rn_buf *rn_buf_of(const struct rn_pool *p, const struct rn_desc *d)
{
	enum rn_buf_class cls;
	uint32_t part, index;
	uint64_t start, inside;
	struct rn_buf *b;

	if (RN_UNLIKELY(!locate(p, d->off, &part, &index, &start, &cls)))
		return NULL;
	inside = d->off - start;
	if (RN_UNLIKELY(inside < RN_BUF_HLEN + RN_VNET_HLEN ||
			d->len > (cls == RN_LARGE ? RN_BUF_LARGE : RN_BUF_SMALL) - inside))
		return NULL;
	b = (struct rn_buf *)(p->base + start);
	/* part and cls too: rn_buf_cap() believes the header. */
	if (RN_UNLIKELY((uint16_t)b->gen != d->gen || b->part != part || b->cls != cls))
		return NULL;
	return b;
}
