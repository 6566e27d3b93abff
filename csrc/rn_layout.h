/* rn_layout.h - constants every shared object and every stage agrees on.
 *
 * Shared memory is read by processes of one build on one host, so integers are in host order;
 * attach checks magic, version and size, and refuses anything else. Nothing in shared memory is
 * a pointer: objects are mapped at another address in each process.
 */
#ifndef RN_LAYOUT_H
#define RN_LAYOUT_H

#include <stdalign.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define RN_CACHE_LINE 64u
#define RN_LAYOUT_VERSION 1u /* one number for all objects: they are made and dropped together */

#define RN_RING_MAGIC 0x52476e72u    /* "rnGR" */
#define RN_ARENA_MAGIC 0x52416e72u   /* "rnAR" */
#define RN_SESSION_MAGIC 0x53536e72u /* "rnSS" */
#define RN_FLOWS_MAGIC 0x464c6e72u   /* "rnLF" */
#define RN_NAMES_MAGIC 0x4d4e6e72u   /* "rnNM" */

#define RN_STAGES_MAX 8u /* rows in the stage table; topology.py uses the first ones, in its order */

/* Ethernet frames: what the largest link hands us. 65535 is the IPv4 total length limit (RFC 791 3.1). */
#define RN_ETH_HLEN 14u
#define RN_VNET_HLEN 12u /* struct virtio_net_hdr_mrg_rxbuf, always present in front of a frame */
#define RN_FRAME_MAX (65535u + RN_ETH_HLEN)

_Static_assert(sizeof(_Atomic uint64_t) == 8 && ATOMIC_LLONG_LOCK_FREE == 2, "a lock would be per process");
_Static_assert(sizeof(_Atomic uint32_t) == 4 && ATOMIC_INT_LOCK_FREE == 2, "a lock would be per process");

#define RN_LIKELY(x) __builtin_expect(!!(x), 1)
#define RN_UNLIKELY(x) __builtin_expect(!!(x), 0)

#endif
