/* rn_names.h - which name an address was asked for: a table in shared memory, one writer, any readers.
 *
 *   offset        size          written by  what
 *        0          64          creator     identity, constant once the table is handed out
 *       64  4096 * 320          services    entries: a set-associative cache of 512 sets of 8
 *
 * services writes an entry before it lets the DNS answer go to the guest; egress looks an address up when the guest's
 * SYN arrives. So the name is there in time without a message: the answer's way through the ring to the guest and the
 * SYN's way back order the two.
 *
 * An entry is guarded by a sequence lock: odd while the writer is at it; a reader that saw it odd, or changed, looks
 * again, a few times, and then does without a name. A writer never waits. An entry ends by its own time; a full set
 * loses the entry that would end first. All that a guest can do by asking for many names is to lose its own.
 *
 * Keys have the size of IPv6 addresses (IPv4: mapped, RFC 4291 2.5.5.2). A name is text without the final dot, lower
 * case, of letters, digits, '-', '_' and '.' only: the reader checks it too, because it puts it into other protocols.
 */
#ifndef RN_NAMES_H
#define RN_NAMES_H

#include "rn_layout.h"

/* CFFI BEGIN */
#define RN_NAMES_ENTRIES 4096
#define RN_NAMES_WAYS 8
#define RN_NAME_MAX 253 /* bytes of a host name as text (RFC 1035 2.3.4: 255 on the wire) */
#define RN_NAME_LOCAL 1 /* flag: from the session's hosts table, so only we know what it means */
/* CFFI END */

#define RN_NAME_WORDS 32u /* 64-bit words that hold a name */
#define RN_NAMES_SETS (RN_NAMES_ENTRIES / RN_NAMES_WAYS)

struct rn_name {
	/* N1 release by the writer (even: done), pairs N2 acquire by a reader before it reads;
	 * N3 the writer's release fence behind the odd store, pairs N4 the reader's acquire fence before it looks again. */
	_Atomic uint32_t seq;
	_Atomic uint32_t info;	     /* length of the name, flags << 16; relaxed, as all below: the fences order them */
	_Atomic uint64_t addr[2];
	_Atomic uint64_t expires_ns; /* CLOCK_MONOTONIC; 0: never used */
	_Atomic uint64_t name[RN_NAME_WORDS];
	uint64_t pad[4];
};
_Static_assert(sizeof(struct rn_name) == 5 * RN_CACHE_LINE, "whole lines");
_Static_assert(RN_NAME_MAX < RN_NAME_WORDS * 8, "a name fits");
_Static_assert((RN_NAMES_SETS & (RN_NAMES_SETS - 1)) == 0, "set by mask");

struct rn_names {
	uint32_t magic, version;
	uint32_t entries, reserved;
	alignas(RN_CACHE_LINE) struct rn_name entry[RN_NAMES_ENTRIES];
};
_Static_assert(offsetof(struct rn_names, entry) == RN_CACHE_LINE, "identity line, then entries");

/* CFFI BEGIN */
uint64_t rn_names_size(void);
int rn_names_create(void *mem, uint64_t size); /* zeroed bytes: 0 or -EINVAL */
int rn_names_check(const void *mem, uint64_t size); /* as rn_ring_check() */

/* The one writer: from now on @addr has this name, until @expires_ns. 0, or -EINVAL: not a name that we keep. */
int rn_names_set(void *mem, const uint8_t addr[16], const char *name, uint32_t len, uint32_t flags, uint64_t now_ns,
		 uint64_t expires_ns);
/* Length of @addr's name in @name, with a NUL behind it; 0: none known at this time. @flags may be NULL. */
uint32_t rn_names_find(const void *mem, const uint8_t addr[16], uint64_t now_ns, char name[RN_NAME_MAX + 1],
		       uint32_t *flags);
/* CFFI END */

int rn_name_ok(const char *name, uint32_t len); /* 1: text of a host name as above */

#endif
