/* rn_handle.h - ring ends and pools for Python: on the heap, by pointer. For tests and tools; the stages'
 * handles are inside struct rn_stage.
 */
#ifndef RN_HANDLE_H
#define RN_HANDLE_H

#include "rn_arena.h"
#include "rn_ring.h"

/* CFFI BEGIN */
/* Attach one end. NULL: *@err is what the attach returned, or -ENOMEM. */
struct rn_ring_tx *rn_ring_tx_new(void *mem, uint64_t size, int consumer_bell, int *err);
void rn_ring_tx_delete(struct rn_ring_tx *tx);
struct rn_ring_rx *rn_ring_rx_new(void *mem, uint64_t size, int producer_bell, int *err);
void rn_ring_rx_delete(struct rn_ring_rx *rx);
uint64_t rn_ring_tx_wakes(const struct rn_ring_tx *tx);
uint64_t rn_ring_rx_wakes(const struct rn_ring_rx *rx);
/* Slots that rn_ring_tx_arm() counts as enough. */
void rn_ring_tx_want(struct rn_ring_tx *tx, uint32_t want);

/* Move @n descriptors in bursts of at most @burst as fast as the peer allows, polling; ns it took. For
 * tools/bench: a descriptor's own cost, without Python's. */
uint64_t rn_ring_pump_tx(struct rn_ring_tx *tx, uint64_t n, uint32_t burst);
uint64_t rn_ring_pump_rx(struct rn_ring_rx *rx, uint64_t n, uint32_t burst);

struct rn_pool *rn_pool_new(void *mem, uint64_t size, int part, uint32_t me, int recover, int *err);
void rn_pool_delete(struct rn_pool *p);
void rn_pool_bell(struct rn_pool *p, uint32_t row, int fd);
uint64_t rn_pool_wakes(const struct rn_pool *p);
/* Take a buffer and describe a frame of @len bytes at the usual place: 0, -ENOBUFS, -EMSGSIZE. */
int rn_pool_take(struct rn_pool *p, int cls, uint32_t len, struct rn_desc *d);
/* 1: the descriptor names a frame in a buffer of this arena, in its present use. */
int rn_pool_holds(const struct rn_pool *p, const struct rn_desc *d);
/* Check as above and give the buffer back: 0, -EINVAL. */
int rn_pool_give(struct rn_pool *p, const struct rn_desc *d);
/* Give back @n descriptors in one call; stops at the first bad one. Returns how many. */
uint32_t rn_pool_give_many(struct rn_pool *p, const struct rn_desc *d, uint32_t n);
/* CFFI END */
#endif
