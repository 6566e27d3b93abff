/* rn_arena.h - frame buffers in shared memory: written once, passed by descriptor, never copied between stages.
 *
 * The arena is cut into parts, one a stage that allocates. A part has small buffers (2 KiB) and large
 * ones (68 KiB, a 64 KiB super-frame with every header). Only the part's owner allocates from it; its
 * free stacks are private memory, LIFO, so that a buffer is reused while it is still in cache. Any stage
 * may free: the owner pops onto its own stack, another pushes onto the part's return list, which the
 * owner takes whole with one exchange (no ABA, and a pusher killed at any point loses at most the one
 * buffer it held, which its successor's sweep finds).
 *
 *   buffer:  [ 64 B struct rn_buf | room for link headers, frame ... ]
 */
#ifndef RN_ARENA_H
#define RN_ARENA_H

#include "rn_layout.h"
#include "rn_ring.h"

/* CFFI BEGIN */
#define RN_BUF_SMALL 2048
#define RN_BUF_LARGE 69632
#define RN_BUF_HLEN 64
/* CFFI END */
/* Where a frame read from the link is put: behind the virtio-net header, the IP header 16-aligned. */
#define RN_BUF_ETH_OFF (RN_BUF_HLEN + 16u + 2u) /* Ethernet header; IP at +14 = 96 */
#define RN_SMALL_FRAME_MAX (RN_BUF_SMALL - RN_BUF_ETH_OFF)
#define RN_LARGE_FRAME_MAX (RN_BUF_LARGE - RN_BUF_ETH_OFF)

#define RN_HOLDER_RETURNED 0xffffu

/* CFFI BEGIN */
enum rn_buf_class { RN_SMALL = 0, RN_LARGE = 1 };
/* CFFI END */

/* What classify learned of a frame. The reader checks every offset against its own copy of the length. */
struct rn_meta {
	uint8_t ip_version; /* 4 or 6; 0: not IP */
	uint8_t ip_proto;   /* RFC 791 protocol / RFC 8200 last next header */
	uint8_t ttl;
	uint8_t flags;	      /* RN_META_* */
	uint16_t l3_off;      /* bytes from the Ethernet header */
	uint16_t l4_off;
	uint16_t payload_off; /* first byte behind the TCP, UDP or ICMP header */
	uint16_t each;	      /* UDP super-frame: payload bytes of each of its datagrams, the last may have fewer; else 0 */
	uint32_t payload_len; /* by the IP and UDP lengths: link padding is not counted */
};
#define RN_META_REASSEMBLED 1u /* several fragments became this frame (RFC 815) */

struct rn_buf {
	/* Stage that has it now + 1, 0: free, RN_HOLDER_RETURNED: on the return list. For the sweep: written by the
	 * owner at allocation, by who hands it on (the consumer's row), by who frees it. */
	_Atomic uint32_t holder;
	uint32_t gen;		 /* counts allocations; its low half travels in the descriptor */
	uint32_t next;		 /* return list: index + 1 of the next, 0: end */
	uint16_t part;
	uint16_t cls;
	struct rn_meta meta;
	/* A sampled frame's stamps (rn_stage.c), CLOCK_MONOTONIC ns: when it left the stage that wrote it, and the last
	 * one; first_ns 0: not sampled. */
	uint64_t first_ns, last_ns;
	uint8_t first_row, last_row;
	uint8_t reserved[RN_BUF_HLEN - 50];
};
_Static_assert(sizeof(struct rn_meta) == 16, "fits the header line");
_Static_assert(sizeof(struct rn_buf) == RN_BUF_HLEN, "one line in front of each frame");
_Static_assert(RN_BUF_LARGE % RN_CACHE_LINE == 0 && RN_BUF_SMALL % RN_CACHE_LINE == 0, "buffers start on a line");
_Static_assert(RN_LARGE_FRAME_MAX >= RN_FRAME_MAX + 64, "the largest frame fits, with TCP options to spare");

struct rn_part {
	uint64_t small_off, large_off; /* bytes from the start of the arena */
	uint32_t nsmall, nlarge;
	/* A1 release push by any stage, A2 acquire exchange by the owner: buffer contents before the list. Index + 1. */
	alignas(RN_CACHE_LINE) _Atomic uint32_t returned;
	/* A3 store by an owner out of buffers, A4 exchange by the stage that returned one. */
	_Atomic uint32_t starved;
	uint32_t pad[RN_CACHE_LINE / 4 - 2];
};
_Static_assert(sizeof(struct rn_part) == 2 * RN_CACHE_LINE, "the contended word has its own line");

struct rn_arena {
	uint32_t magic, version;
	uint64_t size; /* bytes of the whole object */
	uint32_t nparts;
	uint32_t reserved;
	alignas(RN_CACHE_LINE) struct rn_part parts[RN_STAGES_MAX];
};

/* CFFI BEGIN */
struct rn_part_spec {
	uint32_t nsmall, nlarge; /* 0, 0: this stage never allocates */
};
uint64_t rn_arena_size(const struct rn_part_spec *spec, uint32_t nparts);
int rn_arena_create(void *mem, uint64_t size, const struct rn_part_spec *spec, uint32_t nparts);
int rn_arena_check(const void *mem, uint64_t size); /* as rn_ring_check() */

struct rn_part_use { /* buffers of one part; second index: enum rn_buf_class */
	uint32_t total[2];
	uint32_t returned[2]; /* given back, not yet taken by the owner */
	uint32_t held[8][2];  /* by stage row; a buffer in a ring is its consumer's */
	uint32_t unknown[2];  /* the holder's word names nobody */
};
int rn_arena_usage(const void *mem, uint64_t size, uint32_t part, struct rn_part_use *out);
/* CFFI END */
_Static_assert(sizeof(((struct rn_part_use *)0)->held) == RN_STAGES_MAX * 2 * sizeof(uint32_t), "a row a stage");

/* Handle: private to a process. */
struct rn_pool {
	struct rn_arena *arena;
	uint8_t *base;
	uint64_t size;
	int part;		  /* own part, or -1: this stage only frees */
	uint32_t nparts;
	uint32_t me;		  /* stage row, for rn_buf.holder */
	int bells[RN_STAGES_MAX]; /* doorbells of part owners, -1 where not granted */
	uint32_t nsmall, nlarge;  /* our copies of our own part's numbers, and of every part's layout: */
	struct rn_part_view {
		uint64_t small_off, large_off;
		uint32_t nsmall, nlarge;
	} view[RN_STAGES_MAX];
	uint32_t *stack[2]; /* free stacks by class: indices */
	uint32_t free[2];
	uint8_t *out; /* 1: handed out, by index: a buffer given back twice is taken once */
	uint64_t wakes;
};

/* Attach; @part is the stage's own row or -1. All of the part's buffers are free at first attach; a
 * successor generation passes @recover = 1: buffers whose holder is not this stage stay out. */
int rn_pool_attach(struct rn_pool *p, void *mem, uint64_t size, int part, uint32_t me, int recover);
void rn_pool_detach(struct rn_pool *p);

/* Take a buffer; returns its header or NULL (none free, also after looking at the return list). */
struct rn_buf *rn_buf_alloc(struct rn_pool *p, enum rn_buf_class cls);

/* Give a buffer back, from whichever stage. */
void rn_buf_free(struct rn_pool *p, struct rn_buf *b);

/* For a successor: give back what the dead generation held of other stages' parts. What it still is to serve, its
 * input rings' @n descriptors, stays. Returns how many buffers. -ENOMEM. */
int rn_pool_sweep(struct rn_pool *p, const struct rn_desc *served, uint32_t n);

/* CFFI BEGIN */
struct rn_pool; /* opaque to Python: rn_handle.h makes them */

/* Free buffers of a class, return list included. */
uint32_t rn_pool_free(struct rn_pool *p, enum rn_buf_class cls);

/* Ask to be woken when a buffer comes back; returns 1 if one is already there (then do not block). */
int rn_pool_arm(struct rn_pool *p);
void rn_pool_disarm(struct rn_pool *p);
/* CFFI END */

/* Descriptor -> buffer header and frame, with every check a distrustful reader needs: the offset lies in
 * a buffer, the frame within it, the generation matches. NULL if not. The frame is at base + d->off. */
struct rn_buf *rn_buf_of(const struct rn_pool *p, const struct rn_desc *d);

static inline uint64_t rn_buf_off(const struct rn_pool *p, const void *ptr)
{
	return (uint64_t)((const uint8_t *)ptr - p->base);
}
static inline uint32_t rn_buf_cap(const struct rn_buf *b)
{
	return b->cls == RN_LARGE ? RN_BUF_LARGE : RN_BUF_SMALL;
}
#endif
