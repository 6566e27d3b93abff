/* rn_ring.h - one-producer, one-consumer ring of 16-byte frame descriptors in shared memory.
 *
 *   offset  size         written by       what
 *        0  64           creator          identity, constant once the ring is handed out
 *       64  64           producer (and the consumer clears @starved)   tail, starved
 *      128  64           consumer (and the producer clears @asleep)    head, asleep
 *      192  nslots * 16  producer         slots
 *
 * head and tail count descriptors since creation; slot = count & (nslots - 1); tail - head is the
 * fill, in [0, nslots]. Frames themselves lie in the arena and are never copied through a ring.
 *
 * Sleep and wake (DESIGN 2; tests/model walks every interleaving of it):
 *   consumer: asleep = 1; fence; look at tail again; only if still empty: block on its doorbell
 *   producer: publish the whole burst; fence; if asleep: asleep = 0 and ring the doorbell once
 *   and the mirror image for a producer that waits for room: starved, head, the producer's doorbell.
 * The two sequentially consistent fences make it impossible that each side misses the other's store.
 */
#ifndef RN_RING_H
#define RN_RING_H

#include "rn_layout.h"

/* CFFI BEGIN */
#define RN_RING_SLOTS_MAX 32768
#define RN_DESC_HAS_VNET 1 /* RN_DESC_VNET, for Python */
#define RN_VNET_BYTES 12   /* RN_VNET_HLEN */

struct rn_desc {
	uint64_t off;	 /* bytes from the start of the arena to the Ethernet header */
	uint32_t len;	 /* bytes of Ethernet frame, header included */
	uint16_t flags;	 /* RN_DESC_* */
	uint16_t gen;	 /* low half of the buffer's generation when it was published */
};
/* CFFI END */

_Static_assert(RN_VNET_BYTES == RN_VNET_HLEN && RN_DESC_HAS_VNET == 1, "as below");
#define RN_DESC_VNET 1u /* the 12 bytes before @off hold a virtio-net header that means something */
#define RN_DESC_FLOW 2u /* no frame: a notice about a flow (rn_promote.h) */
#define RN_NOTICE_OFF (1ull << 63) /* of such a one: in no arena, so that it is never taken for a frame */

struct rn_ring {
	uint32_t magic;	 /* RN_RING_MAGIC */
	uint32_t version; /* RN_LAYOUT_VERSION */
	uint32_t nslots; /* power of two, in [2, RN_RING_SLOTS_MAX] */
	uint32_t reserved;
	/* P1 release in rn_ring_publish(), pairs C1 acquire in rn_ring_peek(): slots before count. */
	alignas(RN_CACHE_LINE) _Atomic uint64_t tail;
	/* P3 store by the producer that wants room, C3 exchange by the consumer that made some. */
	_Atomic uint32_t starved;
	/* C2 release in rn_ring_consume(), pairs P2 acquire in rn_ring_room(): last read before reuse. */
	alignas(RN_CACHE_LINE) _Atomic uint64_t head;
	/* C4 store by the consumer about to block, P4 exchange by the producer that published. */
	_Atomic uint32_t asleep;
	/* Most descriptors the consumer ever found waiting; relaxed, by the consumer only, for whoever watches. */
	_Atomic uint32_t high;
	alignas(RN_CACHE_LINE) struct rn_desc slots[];
};
_Static_assert(sizeof(struct rn_desc) == 16, "four descriptors a cache line");
_Static_assert(offsetof(struct rn_ring, tail) == 1 * RN_CACHE_LINE, "producer's own line");
_Static_assert(offsetof(struct rn_ring, head) == 2 * RN_CACHE_LINE, "no false sharing with tail");
_Static_assert(offsetof(struct rn_ring, slots) == 3 * RN_CACHE_LINE, "slots start on a fresh line");

/* Handles: private to a process, one thread at a time. */
struct rn_ring_tx {
	struct rn_ring *ring;
	uint32_t nslots;    /* our copy: the shared one can be rewritten by the peer */
	int bell;	    /* consumer's doorbell (eventfd), or -1: never wake */
	uint64_t tail;	    /* next slot to write; ahead of ring->tail by what is not yet published */
	uint64_t published; /* == ring->tail */
	uint64_t head_seen;
	uint64_t wakes; /* doorbells rung */
	uint32_t want;  /* slots that rn_ring_tx_arm() counts as room: 0 and 1 mean one */
};

struct rn_ring_rx {
	struct rn_ring *ring;
	uint32_t nslots;
	int bell; /* producer's doorbell, rung only when it is starved, or -1 */
	uint64_t head;
	uint64_t tail_seen;
	uint64_t wakes;
	uint32_t high; /* == ring->high */
};

/* For the consumer's successor, before its first peek: of what waits only what @keep says 1 to stays, in order.
 * Returns how many left. -EPROTO as rn_ring_peek(). */
int rn_ring_rx_keep(struct rn_ring_rx *rx, int (*keep)(void *ctx, const struct rn_desc *d), void *ctx);

/* CFFI BEGIN */
/* Bytes of shared memory that a ring of @nslots needs; 0 if @nslots is not a power of two in range. */
uint64_t rn_ring_size(uint32_t nslots);

/* Format @size zeroed bytes at @mem. 0, or -EINVAL (nslots, alignment, size too small). */
int rn_ring_create(void *mem, uint64_t size, uint32_t nslots);

/* Identity check: 0, -EINVAL (NULL, misaligned), -EPROTO (magic, version), -EMSGSIZE (mapping too short). */
int rn_ring_check(const void *mem, uint64_t size);

struct rn_ring_tx; /* opaque to Python: rn_handle.h makes them */
struct rn_ring_rx;

/* Attach one end. Returns as rn_ring_check(), or -EPROTO if the counters are impossible. A new
 * generation of a stage attaches to the same ring and goes on where the last one stopped. */
int rn_ring_tx_attach(struct rn_ring_tx *tx, void *mem, uint64_t size, int consumer_bell);
int rn_ring_rx_attach(struct rn_ring_rx *rx, void *mem, uint64_t size, int producer_bell);

/* Slots the producer may fill, in [0, nslots]; looks at the consumer's line only if our copy shows
 * fewer than @want. -EPROTO if the consumer's head is impossible. */
int rn_ring_room(struct rn_ring_tx *tx, uint32_t want);

/* Write one slot, not visible before rn_ring_publish(). The caller has room. */
void rn_ring_put(struct rn_ring_tx *tx, const struct rn_desc *d);

/* Make all put slots visible and wake a sleeping consumer, once. */
void rn_ring_publish(struct rn_ring_tx *tx);

/* 1: the consumer has handed on all that was put, published or not. Reads its line: a cache miss while it works. */
int rn_ring_tx_empty(struct rn_ring_tx *tx);

/* Ask to be woken when room appears. Returns slots of room seen after arming (0 if fewer than
 * @tx->want): if positive, do not block (and the request is withdrawn). */
int rn_ring_tx_arm(struct rn_ring_tx *tx);
void rn_ring_tx_disarm(struct rn_ring_tx *tx);

/* Descriptors ready, in [0, @max], oldest first, read with rn_ring_at(rx, i); -EPROTO if the producer's
 * tail is impossible: then stop the stage, a resync would hide lost frames. They stay ours until
 * rn_ring_consume(): head moves only after the burst is handed on (DESIGN 6). */
int rn_ring_peek(struct rn_ring_rx *rx, uint32_t max);
struct rn_desc rn_ring_at(const struct rn_ring_rx *rx, uint32_t i); /* a copy: check it, then use it */
void rn_ring_consume(struct rn_ring_rx *rx, uint32_t n);

/* Announce sleep. Returns descriptors ready after announcing: if positive, do not block (and the
 * announcement is withdrawn). */
int rn_ring_rx_arm(struct rn_ring_rx *rx);
void rn_ring_rx_disarm(struct rn_ring_rx *rx);

/* Read-only look for the monitor: fill now, and counts since creation. */
struct rn_ring_stat {
	uint64_t head, tail;
	uint32_t nslots, asleep, starved, high;
};
int rn_ring_stat(const void *mem, uint64_t size, struct rn_ring_stat *out);

/* Doorbell: an eventfd, non-blocking. Ring it (adds 1) and quiet it (reads it). */
int rn_bell_new(void);
void rn_bell_ring(int fd);
void rn_bell_quiet(int fd);
/* CFFI END */
#endif
