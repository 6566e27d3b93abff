/* rn_mirror.h - a ring of captured frames in shared memory: a stage writes, one reader outside reads.
 *
 *   offset  size       written by   what
 *        0  64         creator      identity, constant once it is handed out
 *       64  64         stage        tail, dropped
 *      128  64         reader       head, asleep (the stage clears it)
 *      192  bytes      stage        records, each 8-aligned and in one piece: struct rn_mirror_rec, then the bytes
 *
 * head and tail count bytes since creation. A record that would cross the end of the ring is put at its start,
 * behind a filler. A full mirror is not waited for: the stage drops its copy and counts it; the frame itself is
 * not touched. So the data path cannot be slowed down by who reads, and the two ends distrust each other: the
 * stage takes nothing from the reader but head, and checks it; the reader checks every length.
 *
 * Records are published together at the end of a turn; until then the stage may amend the last one, or take it
 * back. The wake is that of rn_ring.h: asleep, fence, look again; tail, fence, ring once.
 */
#ifndef RN_MIRROR_H
#define RN_MIRROR_H

#include "rn_layout.h"

#define RN_MIRROR_MAGIC 0x4d416e72u /* "rnAM" */

/* CFFI BEGIN */
#define RN_MIRROR_MIN 262144
#define RN_MIRROR_MAX 1073741824

struct rn_mirror_rec {
	uint32_t size;	 /* bytes to the next record, this header included; multiple of 8 */
	uint32_t caplen; /* bytes kept of the frame; RN_MIRROR_FILLER: none, go on at @size */
	uint32_t len;	 /* bytes the frame had */
	uint32_t lost;	 /* frames that were to be captured before it and found the mirror full */
	uint64_t ns;	 /* CLOCK_REALTIME */
	uint16_t reason; /* why the stage dropped the frame: number of the counter + 1, 0: it did not */
	uint8_t point;	 /* where: enum rn_tap_point */
	uint8_t dir;	 /* enum rn_pcap_dir, 0: none */
	uint32_t reserved;
};
#define RN_MIRROR_FILLER 0xffffffff
/* CFFI END */
_Static_assert(sizeof(struct rn_mirror_rec) == 32, "four records of an ACK in three lines");

struct rn_mirror {
	uint32_t magic, version;
	uint64_t bytes; /* of records: power of two in [RN_MIRROR_MIN, RN_MIRROR_MAX] */
	/* M1 release in rn_mirror_publish(), pairs M2 acquire in rn_mirror_next(): records before count. */
	alignas(RN_CACHE_LINE) _Atomic uint64_t tail;
	_Atomic uint64_t dropped; /* frames that found no room; relaxed, for the reader's report */
	/* M3 release in rn_mirror_consume(), pairs M4 acquire in rn_mirror_reserve(): last read before reuse. */
	alignas(RN_CACHE_LINE) _Atomic uint64_t head;
	/* M5 store by the reader about to block, M6 exchange by the stage that published. */
	_Atomic uint32_t asleep;
	alignas(RN_CACHE_LINE) uint8_t data[];
};
_Static_assert(offsetof(struct rn_mirror, tail) == 1 * RN_CACHE_LINE, "the stage's own line");
_Static_assert(offsetof(struct rn_mirror, head) == 2 * RN_CACHE_LINE, "the reader's own line");
_Static_assert(offsetof(struct rn_mirror, data) == 3 * RN_CACHE_LINE, "records start on a fresh line");

struct rn_mirror_tx { /* the stage's end */
	struct rn_mirror *m;
	uint64_t bytes, tail, published, head_seen;
	uint64_t dropped; /* since the mirror was made */
	uint32_t lost;	  /* of them, those since the last record */
	int bell;	  /* eventfd of the reader */
};

struct rn_mirror_rx { /* the reader's end */
	struct rn_mirror *m;
	uint64_t bytes, head, tail_seen;
};

/* CFFI BEGIN */
uint64_t rn_mirror_size(uint64_t bytes); /* of the shared object; 0: @bytes is no power of two in range */
int rn_mirror_create(void *mem, uint64_t size, uint64_t bytes); /* as rn_ring_create() */
int rn_mirror_check(const void *mem, uint64_t size); /* as rn_ring_check() */
uint64_t rn_mirror_dropped(const void *mem, uint64_t size);
/* CFFI END */

/* Attach an end: 0, as rn_mirror_check(), or -EPROTO if the counters are impossible. A successor of the stage
 * goes on where it stopped. */
int rn_mirror_tx_attach(struct rn_mirror_tx *tx, void *mem, uint64_t size, int bell);
int rn_mirror_rx_attach(struct rn_mirror_rx *rx, void *mem, uint64_t size);

/* Room for a record of @caplen bytes: the header's place, @size and @lost filled in, or NULL: counted as dropped. */
struct rn_mirror_rec *rn_mirror_reserve(struct rn_mirror_tx *tx, uint32_t caplen);
void rn_mirror_take_back(struct rn_mirror_tx *tx, const struct rn_mirror_rec *rec); /* the last one, not published */
void rn_mirror_publish(struct rn_mirror_tx *tx);

/* The oldest record, a checked copy of its header in @out: its bytes, NULL if there is none; *err: -EPROTO if the
 * stage's counters or lengths are impossible. */
const uint8_t *rn_mirror_next(struct rn_mirror_rx *rx, struct rn_mirror_rec *out, int *err);
void rn_mirror_consume(struct rn_mirror_rx *rx, const struct rn_mirror_rec *rec);
/* Announce sleep: 1 if there is something after all (and the announcement is withdrawn). */
int rn_mirror_rx_arm(struct rn_mirror_rx *rx);

#endif
