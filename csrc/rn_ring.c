/* rn_ring.c - one-producer, one-consumer ring of frame descriptors (layout and protocol: rn_ring.h).
 *
 * Theory of operation
 *
 * Each end has a private handle with its own counter and a copy of the other end's, so that the other
 * end's cache line is read only when the copy shows nothing to do. The shared counters are written once a
 * burst. What comes from shared memory is copied once, checked against private numbers, then used: a peer
 * that was taken over can stop the session, but not make us read or write outside the ring.
 *
 * Ordering, x86 and arm64 alike (nothing here leans on TSO):
 *   P1 release store of tail   - C1 acquire load of tail    slots are written before they are counted
 *   C2 release store of head   - P2 acquire load of head    slots are read before they are written again
 *   C4 store of asleep, fence, load of tail - P1 store of tail, fence, P4 load and exchange of asleep
 *   P3 store of starved, fence, load of head - C2 store of head, fence, C3 load and exchange of starved
 * In each of the last two, both sides store, fence, then load what the other stored: at least one of the
 * loads sees the other's store (C11 7.17.4, store buffering), so either the sleeper stays awake or it is
 * woken. tests/model removes the fence and the second look and finds the lost wake each time.
 */
#include "rn_ring.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#ifdef __SANITIZE_THREAD__
/* ThreadSanitizer knows no fences (gcc -Wtsan): a locked exchange is as strong on the machine. */
static void full_fence(void)
{
	_Atomic int word = 0;

	atomic_exchange_explicit(&word, 1, memory_order_seq_cst);
}
#else
static inline void full_fence(void)
{
	atomic_thread_fence(memory_order_seq_cst);
}
#endif

uint64_t rn_ring_size(uint32_t nslots)
{
	if (nslots < 2 || nslots > RN_RING_SLOTS_MAX || (nslots & (nslots - 1)))
		return 0;
	return sizeof(struct rn_ring) + (uint64_t)nslots * sizeof(struct rn_desc);
}

int rn_ring_create(void *mem, uint64_t size, uint32_t nslots)
{
	struct rn_ring *ring = mem;
	uint64_t need = rn_ring_size(nslots);

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE || !need || size < need)
		return -EINVAL;
	ring->version = RN_LAYOUT_VERSION;
	ring->nslots = nslots;
	ring->reserved = 0;
	atomic_store_explicit(&ring->tail, 0, memory_order_relaxed);
	atomic_store_explicit(&ring->starved, 0, memory_order_relaxed);
	atomic_store_explicit(&ring->head, 0, memory_order_relaxed);
	atomic_store_explicit(&ring->asleep, 0, memory_order_relaxed);
	ring->magic = RN_RING_MAGIC;
	return 0;
}

/* Check identity and hand out the number of slots, read once. */
static int ring_identity(const void *mem, uint64_t size, uint32_t *nslots)
{
	const volatile struct rn_ring *ring = mem;
	uint64_t need;

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE)
		return -EINVAL;
	if (size < sizeof(struct rn_ring))
		return -EMSGSIZE;
	if (ring->magic != RN_RING_MAGIC || ring->version != RN_LAYOUT_VERSION)
		return -EPROTO;
	*nslots = ring->nslots;
	need = rn_ring_size(*nslots);
	if (!need)
		return -EPROTO;
	return size < need ? -EMSGSIZE : 0;
}

int rn_ring_check(const void *mem, uint64_t size)
{
	uint32_t nslots;

	return ring_identity(mem, size, &nslots);
}

/**
 * rn_ring_tx_attach() - Become the producer of a ring
 * @tx:			Handle to fill
 * @mem:		The mapped object
 * @size:		Bytes mapped
 * @consumer_bell:	eventfd the consumer sleeps on, or -1
 *
 * Return: 0; -EINVAL, -EPROTO, -EMSGSIZE as rn_ring_check(); -EPROTO also if head and tail are not within
 *	   one ring of each other. On error the handle is all zero except ->bell = -1.
 */
int rn_ring_tx_attach(struct rn_ring_tx *tx, void *mem, uint64_t size, int consumer_bell)
{
	struct rn_ring *ring = mem;
	uint64_t head, tail;
	uint32_t nslots;
	int err;

	*tx = (struct rn_ring_tx){ .bell = -1 };
	err = ring_identity(mem, size, &nslots);
	if (err)
		return err;
	/* Our own counter: the last producer left it, and no other process stores it. */
	tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
	/* P2: acquire, pairs C2. */
	head = atomic_load_explicit(&ring->head, memory_order_acquire);
	if (tail - head > nslots)
		return -EPROTO;
	*tx = (struct rn_ring_tx){
		.ring = ring,
		.nslots = nslots,
		.bell = consumer_bell,
		.tail = tail,
		.published = tail,
		.head_seen = head,
	};
	return 0;
}

/**
 * rn_ring_rx_attach() - Become the consumer of a ring
 * @rx:			Handle to fill
 * @mem:		The mapped object
 * @size:		Bytes mapped
 * @producer_bell:	eventfd the producer sleeps on when it waits for room, or -1
 *
 * Return: as rn_ring_tx_attach().
 */
int rn_ring_rx_attach(struct rn_ring_rx *rx, void *mem, uint64_t size, int producer_bell)
{
	struct rn_ring *ring = mem;
	uint64_t head, tail;
	uint32_t nslots;
	int err;

	*rx = (struct rn_ring_rx){ .bell = -1 };
	err = ring_identity(mem, size, &nslots);
	if (err)
		return err;
	head = atomic_load_explicit(&ring->head, memory_order_relaxed); /* our own counter */
	/* C1: acquire, pairs P1. */
	tail = atomic_load_explicit(&ring->tail, memory_order_acquire);
	if (tail - head > nslots)
		return -EPROTO;
	*rx = (struct rn_ring_rx){
		.ring = ring,
		.nslots = nslots,
		.bell = producer_bell,
		.head = head,
		.tail_seen = tail,
	};
	return 0;
}

/* Room by the consumer's counter as it is now; -EPROTO if that is impossible. */
static int room_now(struct rn_ring_tx *tx)
{
	/* P2: acquire, pairs C2: the consumer is done with the slots before we write them again. */
	uint64_t head = atomic_load_explicit(&tx->ring->head, memory_order_acquire);

	/* Against what we published: slots put since then the consumer cannot have taken. Unsigned, so a
	 * head past our tail fails as well. */
	if (RN_UNLIKELY(tx->published - head > tx->nslots))
		return -EPROTO;
	tx->head_seen = head;
	if (RN_UNLIKELY(tx->tail - head > tx->nslots)) /* head went back: a liar, but the slots are ours */
		return -EPROTO;
	return (int)(tx->nslots - (uint32_t)(tx->tail - head));
}

/**
 * rn_ring_room() - How many slots the producer may fill
 * @tx:		Producer handle
 * @want:	Enough for the caller: the consumer's line is read only if our copy shows fewer
 *
 * Return: slots, in [0, nslots]; -EPROTO if the consumer's head is impossible. Then stop the stage.
 */
int rn_ring_room(struct rn_ring_tx *tx, uint32_t want)
{
	uint32_t room = tx->nslots - (uint32_t)(tx->tail - tx->head_seen);

	return room < want ? room_now(tx) : (int)room;
}

void rn_ring_put(struct rn_ring_tx *tx, const struct rn_desc *d)
{
	tx->ring->slots[tx->tail & (tx->nslots - 1)] = *d;
	tx->tail++;
}

/**
 * rn_ring_tx_empty() - Has the consumer handed on everything?
 * @tx:		Producer handle
 *
 * Return: 1 if so. Then what the producer does by another way now comes behind it.
 */
int rn_ring_tx_empty(struct rn_ring_tx *tx)
{
	/* P2: acquire, pairs C2: what the consumer did with the last slot is done. */
	return tx->tail == atomic_load_explicit(&tx->ring->head, memory_order_acquire);
}

/**
 * rn_ring_publish() - Make put slots visible and wake a sleeping consumer
 * @tx:		Producer handle
 *
 * One release store, one fence and at most one system call a burst. Does nothing if nothing was put.
 */
void rn_ring_publish(struct rn_ring_tx *tx)
{
	if (tx->published == tx->tail)
		return;
	/* P1: release, pairs C1: slots before count. */
	atomic_store_explicit(&tx->ring->tail, tx->tail, memory_order_release);
	tx->published = tx->tail;
	if (tx->bell < 0)
		return;
	full_fence(); /* the store of tail before the load of asleep; pairs the fence in rn_ring_rx_arm() */
	/* P4: the plain load keeps the line shared while the consumer is awake; the exchange, pairs C4, makes
	 * us the only one to ring for this sleep. */
	if (!atomic_load_explicit(&tx->ring->asleep, memory_order_relaxed))
		return;
	if (atomic_exchange_explicit(&tx->ring->asleep, 0, memory_order_acq_rel)) {
		tx->wakes++;
		rn_bell_ring(tx->bell);
	}
}

/**
 * rn_ring_tx_arm() - Ask the consumer to ring our doorbell when it makes room
 * @tx:		Producer handle, everything published
 *
 * Return: 0 if the producer may block; slots of room if there are enough after all (@tx->want, at least
 *	   one), with the request withdrawn; -EPROTO if the consumer's head is impossible.
 */
int rn_ring_tx_arm(struct rn_ring_tx *tx)
{
	uint32_t want = tx->want < 1 ? 1 : tx->want > tx->nslots ? tx->nslots : tx->want;
	int room;

	atomic_store_explicit(&tx->ring->starved, 1, memory_order_relaxed); /* P3, pairs C3 */
	full_fence(); /* pairs the fence in rn_ring_consume() */
	room = room_now(tx);
	if (room >= 0 && (uint32_t)room < want)
		return 0;
	rn_ring_tx_disarm(tx);
	return room;
}

void rn_ring_tx_disarm(struct rn_ring_tx *tx)
{
	atomic_store_explicit(&tx->ring->starved, 0, memory_order_relaxed);
}

/* Descriptors ready by the producer's counter as it is now; -EPROTO if that is impossible. */
static int ready_now(struct rn_ring_rx *rx)
{
	/* C1: acquire, pairs P1. */
	uint64_t tail = atomic_load_explicit(&rx->ring->tail, memory_order_acquire);

	/* Against our own copy of nslots: the shared one can be rewritten by the peer. Unsigned, so a tail
	 * behind head fails as well. */
	if (RN_UNLIKELY(tail - rx->head > rx->nslots))
		return -EPROTO;
	rx->tail_seen = tail;
	if (RN_UNLIKELY(tail - rx->head > rx->high)) {
		rx->high = (uint32_t)(tail - rx->head);
		atomic_store_explicit(&rx->ring->high, rx->high, memory_order_relaxed);
	}
	return (int)(tail - rx->head);
}

/**
 * rn_ring_peek() - Find the oldest descriptors the producer has published
 * @rx:		Consumer handle
 * @max:	Most descriptors wanted
 *
 * They stay ours until rn_ring_consume(). Never blocks, makes no system call. The producer's line is read
 * only when our copy has run out: while it writes, each look is a cache miss.
 *
 * Return: descriptors ready, in [0, @max]; -EPROTO if the producer's tail is impossible.
 */
int rn_ring_peek(struct rn_ring_rx *rx, uint32_t max)
{
	int ready = (int)(rx->tail_seen - rx->head);

	if (!ready)
		ready = ready_now(rx);
	return ready > 0 && (uint32_t)ready > max ? (int)max : ready;
}

struct rn_desc rn_ring_at(const struct rn_ring_rx *rx, uint32_t i)
{
	return rx->ring->slots[(rx->head + i) & (rx->nslots - 1)];
}

/**
 * rn_ring_consume() - Give slots back, after their frames were handed on
 * @rx:		Consumer handle
 * @n:		Descriptors, at most what rn_ring_peek() returned
 */
void rn_ring_consume(struct rn_ring_rx *rx, uint32_t n)
{
	if (!n)
		return;
	rx->head += n;
	/* C2: release, pairs P2: our reads of the slots before their reuse. */
	atomic_store_explicit(&rx->ring->head, rx->head, memory_order_release);
	if (rx->bell < 0)
		return;
	full_fence(); /* the store of head before the load of starved; pairs the fence in rn_ring_tx_arm() */
	if (!atomic_load_explicit(&rx->ring->starved, memory_order_relaxed))
		return;
	/* C3: exchange, pairs P3: one ring of the doorbell for each time the producer asked. */
	if (atomic_exchange_explicit(&rx->ring->starved, 0, memory_order_acq_rel)) {
		rx->wakes++;
		rn_bell_ring(rx->bell);
	}
}

/**
 * rn_ring_rx_keep() - Take out of a ring what the last consumer had dealt with
 * @rx:		Consumer handle, fresh from rn_ring_rx_attach()
 * @keep:	1: the descriptor is still to be served
 * @ctx:	Passed to it
 *
 * The slots between head and tail are the consumer's until head moves, so they may be moved together: towards the
 * tail, so that head can then pass those that left.
 *
 * Return: how many left; -EPROTO if the producer's tail is impossible.
 */
int rn_ring_rx_keep(struct rn_ring_rx *rx, int (*keep)(void *ctx, const struct rn_desc *d), void *ctx)
{
	int ready = ready_now(rx);
	uint64_t to = rx->tail_seen;

	if (ready < 0)
		return ready;
	for (uint64_t from = to; from-- != rx->head;) {
		struct rn_desc d = rx->ring->slots[from & (rx->nslots - 1)];

		if (keep(ctx, &d))
			rx->ring->slots[--to & (rx->nslots - 1)] = d;
	}
	ready = (int)(to - rx->head);
	rn_ring_consume(rx, (uint32_t)ready);
	return ready;
}

/**
 * rn_ring_rx_arm() - Announce that the consumer is about to block
 * @rx:		Consumer handle
 *
 * Return: 0 if it may block on its doorbell; descriptors ready if some came in between, with the
 *	   announcement withdrawn; -EPROTO if the producer's tail is impossible.
 */
int rn_ring_rx_arm(struct rn_ring_rx *rx)
{
	int ready;

	atomic_store_explicit(&rx->ring->asleep, 1, memory_order_relaxed); /* C4, pairs P4 */
	full_fence(); /* pairs the fence in rn_ring_publish() */
	ready = ready_now(rx);
	if (ready)
		rn_ring_rx_disarm(rx);
	return ready;
}

void rn_ring_rx_disarm(struct rn_ring_rx *rx)
{
	/* A producer that saw the 1 rings once for nothing: harmless, and rare. */
	atomic_store_explicit(&rx->ring->asleep, 0, memory_order_relaxed);
}

int rn_ring_stat(const void *mem, uint64_t size, struct rn_ring_stat *out)
{
	const struct rn_ring *ring = mem;
	uint32_t nslots;
	int err = ring_identity(mem, size, &nslots);

	if (err)
		return err;
	/* head first: it never passes tail, so the fill shown is never negative. */
	out->head = atomic_load_explicit(&ring->head, memory_order_acquire);
	out->tail = atomic_load_explicit(&ring->tail, memory_order_acquire);
	out->nslots = nslots;
	out->asleep = atomic_load_explicit(&ring->asleep, memory_order_relaxed);
	out->starved = atomic_load_explicit(&ring->starved, memory_order_relaxed);
	out->high = atomic_load_explicit(&ring->high, memory_order_relaxed);
	return 0;
}

/* Descriptor, or a negative errno. */
int rn_bell_new(void)
{
	int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

void rn_bell_ring(int fd)
{
	uint64_t one = 1;
	ssize_t n;

	/* EAGAIN: the counter is full, so the sleeper is already being woken. EBADF would be our own fault and
	 * shows as a sleeping neighbour; there is nobody to tell here. */
	do
		n = write(fd, &one, sizeof(one));
	while (n < 0 && errno == EINTR);
}

void rn_bell_quiet(int fd)
{
	uint64_t count;
	ssize_t n;

	do
		n = read(fd, &count, sizeof(count)); /* EAGAIN: it was quiet */
	while (n < 0 && errno == EINTR);
}
