/* rn_mirror.c - captured frames on their way to a reader outside (layout and contract: rn_mirror.h). */
#include "rn_mirror.h"

#include <errno.h>
#include <string.h>

#include "rn_ring.h"

uint64_t rn_mirror_size(uint64_t bytes)
{
	if (bytes & (bytes - 1) || bytes < RN_MIRROR_MIN || bytes > RN_MIRROR_MAX)
		return 0;
	return sizeof(struct rn_mirror) + bytes;
}

int rn_mirror_create(void *mem, uint64_t size, uint64_t bytes)
{
	struct rn_mirror *m = mem;
	uint64_t need = rn_mirror_size(bytes);

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE || !need || size < need)
		return -EINVAL;
	m->version = RN_LAYOUT_VERSION;
	m->bytes = bytes;
	m->magic = RN_MIRROR_MAGIC;
	return 0;
}

/* Check identity and hand out the number of bytes, read once. */
static int identity(const void *mem, uint64_t size, uint64_t *bytes)
{
	const volatile struct rn_mirror *m = mem;
	uint64_t need;

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE)
		return -EINVAL;
	if (size < sizeof(struct rn_mirror))
		return -EMSGSIZE;
	if (m->magic != RN_MIRROR_MAGIC || m->version != RN_LAYOUT_VERSION)
		return -EPROTO;
	*bytes = m->bytes;
	need = rn_mirror_size(*bytes);
	if (!need)
		return -EPROTO;
	return size < need ? -EMSGSIZE : 0;
}

int rn_mirror_check(const void *mem, uint64_t size)
{
	uint64_t bytes;

	return identity(mem, size, &bytes);
}

uint64_t rn_mirror_dropped(const void *mem, uint64_t size)
{
	const struct rn_mirror *m = mem;

	return rn_mirror_check(mem, size) ? 0 : atomic_load_explicit(&m->dropped, memory_order_relaxed);
}

int rn_mirror_tx_attach(struct rn_mirror_tx *tx, void *mem, uint64_t size, int bell)
{
	struct rn_mirror *m = mem;
	uint64_t bytes;
	int err = identity(mem, size, &bytes);

	if (err)
		return err;
	*tx = (struct rn_mirror_tx){ .m = m, .bytes = bytes, .bell = bell };
	tx->tail = tx->published = atomic_load_explicit(&m->tail, memory_order_relaxed);
	tx->head_seen = atomic_load_explicit(&m->head, memory_order_acquire); /* M4 */
	tx->dropped = atomic_load_explicit(&m->dropped, memory_order_relaxed);
	return tx->tail % 8 || tx->tail - tx->head_seen > bytes ? -EPROTO : 0;
}

int rn_mirror_rx_attach(struct rn_mirror_rx *rx, void *mem, uint64_t size)
{
	struct rn_mirror *m = mem;
	uint64_t bytes;
	int err = identity(mem, size, &bytes);

	if (err)
		return err;
	*rx = (struct rn_mirror_rx){ .m = m, .bytes = bytes };
	rx->head = rx->tail_seen = atomic_load_explicit(&m->head, memory_order_relaxed);
	return rx->head % 8 ? -EPROTO : 0;
}

static int has_room(struct rn_mirror_tx *tx, uint64_t need)
{
	uint64_t head;

	if (need <= tx->bytes - (tx->tail - tx->head_seen))
		return 1;
	head = atomic_load_explicit(&tx->m->head, memory_order_acquire); /* M4, pairs M3 */
	/* A reader that writes nonsense loses its capture, nothing else: an impossible head counts as full. */
	if (tx->tail - head > tx->bytes)
		return 0;
	tx->head_seen = head;
	return need <= tx->bytes - (tx->tail - head);
}

/**
 * rn_mirror_reserve() - Room for a record
 * @tx:		The stage's end
 * @caplen:	Bytes that will follow the header
 *
 * Not visible before rn_mirror_publish().
 *
 * Return: the header's place, with @size, @caplen and @lost set; NULL if the mirror is full: counted.
 */
struct rn_mirror_rec *rn_mirror_reserve(struct rn_mirror_tx *tx, uint32_t caplen)
{
	uint64_t size = (sizeof(struct rn_mirror_rec) + caplen + 7) & ~7ull;
	uint64_t at = tx->tail & (tx->bytes - 1), end = tx->bytes - at;
	struct rn_mirror_rec *rec = (struct rn_mirror_rec *)(void *)(tx->m->data + at);

	if (!has_room(tx, size <= end ? size : end + size)) {
		tx->dropped++;
		tx->lost++;
		return NULL;
	}
	if (size > end) {
		/* A gap below a header's size has no filler in it: the reader knows as well. */
		if (end >= sizeof(*rec))
			*rec = (struct rn_mirror_rec){ .size = (uint32_t)end, .caplen = RN_MIRROR_FILLER };
		tx->tail += end;
		rec = (struct rn_mirror_rec *)(void *)tx->m->data;
	}
	*rec = (struct rn_mirror_rec){ .size = (uint32_t)size, .caplen = caplen, .lost = tx->lost };
	tx->lost = 0;
	tx->tail += size;
	return rec;
}

void rn_mirror_take_back(struct rn_mirror_tx *tx, const struct rn_mirror_rec *rec)
{
	/* From our own counter: @rec lies in memory that the reader maps too. */
	tx->tail -= (tx->tail - (uint64_t)((const uint8_t *)rec - tx->m->data)) & (tx->bytes - 1);
	tx->lost += rec->lost;
}

/* Make what was reserved visible, and wake a reader that sleeps: one system call at most. */
void rn_mirror_publish(struct rn_mirror_tx *tx)
{
	atomic_store_explicit(&tx->m->dropped, tx->dropped, memory_order_relaxed);
	if (tx->published == tx->tail)
		return;
	atomic_store_explicit(&tx->m->tail, tx->tail, memory_order_release); /* M1, pairs M2 */
	tx->published = tx->tail;
	atomic_thread_fence(memory_order_seq_cst); /* tail before the load of asleep; pairs rn_mirror_rx_arm() */
	if (!atomic_load_explicit(&tx->m->asleep, memory_order_relaxed))
		return;
	if (atomic_exchange_explicit(&tx->m->asleep, 0, memory_order_acq_rel)) /* M6, pairs M5 */
		rn_bell_ring(tx->bell);
}

/**
 * rn_mirror_next() - The oldest record
 * @rx:		The reader's end
 * @out:	Copy of its header, checked against the mirror
 * @err:	-EPROTO if the stage wrote what cannot be; else 0
 *
 * Return: its bytes, valid until rn_mirror_consume(); NULL: none.
 */
const uint8_t *rn_mirror_next(struct rn_mirror_rx *rx, struct rn_mirror_rec *out, int *err)
{
	*err = 0;
	for (;;) {
		uint64_t at = rx->head & (rx->bytes - 1), end = rx->bytes - at, ready = rx->tail_seen - rx->head;

		if (!ready) {
			rx->tail_seen = atomic_load_explicit(&rx->m->tail, memory_order_acquire); /* M2, pairs M1 */
			ready = rx->tail_seen - rx->head;
			if (!ready)
				return NULL;
		}
		if (ready > rx->bytes || ready % 8)
			break;
		if (end < sizeof(*out)) { /* too short for a filler */
			if (ready < end)
				break;
			rx->head += end;
			continue;
		}
		if (ready < sizeof(*out))
			break;
		memcpy(out, rx->m->data + at, sizeof(*out));
		if (out->size > ready || out->size > end || out->size < sizeof(*out) || out->size % 8)
			break;
		if (out->caplen == RN_MIRROR_FILLER) {
			rx->head += out->size;
			continue;
		}
		if (out->caplen > out->size - sizeof(*out) || out->caplen > out->len)
			break;
		return rx->m->data + at + sizeof(*out);
	}
	*err = -EPROTO;
	return NULL;
}

void rn_mirror_consume(struct rn_mirror_rx *rx, const struct rn_mirror_rec *rec)
{
	rx->head += rec->size;
	atomic_store_explicit(&rx->m->head, rx->head, memory_order_release); /* M3, pairs M4 */
}

int rn_mirror_rx_arm(struct rn_mirror_rx *rx)
{
	atomic_store_explicit(&rx->m->asleep, 1, memory_order_relaxed); /* M5, pairs M6 */
	atomic_thread_fence(memory_order_seq_cst); /* pairs rn_mirror_publish() */
	if (atomic_load_explicit(&rx->m->tail, memory_order_acquire) == rx->head)
		return 0;
	atomic_store_explicit(&rx->m->asleep, 0, memory_order_relaxed);
	return 1;
}
