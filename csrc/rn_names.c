/* rn_names.c - the table of names (layout, order of memory and rules: rn_names.h). */
#include "rn_names.h"

#include <errno.h>
#include <string.h>

#define READ_TRIES 8u /* of one entry; the writer needs nanoseconds, so more means that it died in the middle */

uint64_t rn_names_size(void)
{
	return sizeof(struct rn_names);
}

int rn_names_create(void *mem, uint64_t size)
{
	struct rn_names *t = mem;

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE || size < sizeof(*t))
		return -EINVAL;
	t->version = RN_LAYOUT_VERSION;
	t->entries = RN_NAMES_ENTRIES;
	t->reserved = 0;
	t->magic = RN_NAMES_MAGIC;
	return 0;
}

int rn_names_check(const void *mem, uint64_t size)
{
	const volatile struct rn_names *t = mem;

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE)
		return -EINVAL;
	if (size < RN_CACHE_LINE)
		return -EMSGSIZE;
	if (t->magic != RN_NAMES_MAGIC || t->version != RN_LAYOUT_VERSION || t->entries != RN_NAMES_ENTRIES)
		return -EPROTO;
	return size < sizeof(struct rn_names) ? -EMSGSIZE : 0;
}

/**
 * rn_name_ok() - Is this text a host name that may be written into other protocols?
 * @name:	Text, no NUL needed
 * @len:	Bytes
 *
 * Stricter than DNS, where a label is any bytes (RFC 2181 11): letters, digits, '-' and '_' in labels of 1..63.
 *
 * Return: 1 or 0.
 */
int rn_name_ok(const char *name, uint32_t len)
{
	uint32_t label = 0;

	if (!len || len > RN_NAME_MAX)
		return 0;
	for (uint32_t k = 0; k < len; k++) {
		char c = name[k];

		if (c == '.') {
			if (!label)
				return 0;
			label = 0;
			continue;
		}
		if (!((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_'))
			return 0;
		if (++label > 63)
			return 0;
	}
	return label != 0;
}

static uint32_t set_of(const uint64_t addr[2])
{
	/* A mixing step (splitmix64's), no keyed hash: who fills a set on purpose only loses names of its own. */
	uint64_t z = addr[0] ^ addr[1];

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return (uint32_t)(z ^ z >> 31) & (RN_NAMES_SETS - 1);
}

int rn_names_set(void *mem, const uint8_t addr[16], const char *name, uint32_t len, uint32_t flags, uint64_t now_ns,
		 uint64_t expires_ns)
{
	struct rn_names *t = mem;
	struct rn_name *set, *at = NULL;
	uint64_t key[2], words[RN_NAME_WORDS] = { 0 }, soonest = UINT64_MAX;
	uint32_t seq;

	if (!rn_name_ok(name, len) || expires_ns <= now_ns || flags > 0xffff)
		return -EINVAL;
	memcpy(key, addr, 16);
	memcpy(words, name, len);
	set = &t->entry[set_of(key) * RN_NAMES_WAYS];
	for (uint32_t k = 0; k < RN_NAMES_WAYS; k++) { /* relaxed: we alone write them */
		uint64_t ends = atomic_load_explicit(&set[k].expires_ns, memory_order_relaxed);

		if (atomic_load_explicit(&set[k].addr[0], memory_order_relaxed) == key[0] &&
		    atomic_load_explicit(&set[k].addr[1], memory_order_relaxed) == key[1]) {
			at = &set[k];
			break;
		}
		if (ends <= now_ns)
			ends = 0; /* all that ended are alike */
		if (ends < soonest) {
			soonest = ends;
			at = &set[k];
		}
	}
	/* Made even first: a writer that was killed in the middle left it odd, and its successor is us. */
	seq = (atomic_load_explicit(&at->seq, memory_order_relaxed) + 1) & ~1u;
	atomic_store_explicit(&at->seq, seq + 1, memory_order_relaxed);
	atomic_thread_fence(memory_order_release); /* N3, pairs N4: no store below is seen without the odd number */
	atomic_store_explicit(&at->addr[0], key[0], memory_order_relaxed);
	atomic_store_explicit(&at->addr[1], key[1], memory_order_relaxed);
	atomic_store_explicit(&at->expires_ns, expires_ns, memory_order_relaxed);
	atomic_store_explicit(&at->info, len | flags << 16, memory_order_relaxed);
	for (uint32_t k = 0; k <= len / 8; k++)
		atomic_store_explicit(&at->name[k], words[k], memory_order_relaxed);
	atomic_store_explicit(&at->seq, seq + 2, memory_order_release); /* N1, pairs N2 */
	return 0;
}

/* One entry, if it is the address's. Length of the name; 0: not here, ended, or not to be had. */
static uint32_t read_entry(const struct rn_name *n, const uint64_t key[2], uint64_t now_ns, char name[RN_NAME_MAX + 1],
			   uint32_t *flags)
{
	for (uint32_t k = 0; k < READ_TRIES; k++) {
		uint32_t seq = atomic_load_explicit(&n->seq, memory_order_acquire); /* N2, pairs N1 */
		uint64_t a = atomic_load_explicit(&n->addr[0], memory_order_relaxed);
		uint64_t b = atomic_load_explicit(&n->addr[1], memory_order_relaxed);
		uint64_t ends = atomic_load_explicit(&n->expires_ns, memory_order_relaxed);
		uint32_t info = atomic_load_explicit(&n->info, memory_order_relaxed);
		uint32_t len = info & 0xffff;
		uint64_t words[RN_NAME_WORDS];
		int ours = a == key[0] && b == key[1] && ends > now_ns && len <= RN_NAME_MAX;

		if (ours)
			for (uint32_t w = 0; w <= len / 8; w++)
				words[w] = atomic_load_explicit(&n->name[w], memory_order_relaxed);
		atomic_thread_fence(memory_order_acquire); /* N4, pairs N3 */
		if ((seq & 1) || atomic_load_explicit(&n->seq, memory_order_relaxed) != seq)
			continue;
		if (!ours)
			return 0;
		memcpy(name, words, len);
		name[len] = 0;
		if (!rn_name_ok(name, len)) /* the writer is another process: its word is not enough */
			return 0;
		if (flags)
			*flags = info >> 16;
		return len;
	}
	return 0;
}

uint32_t rn_names_find(const void *mem, const uint8_t addr[16], uint64_t now_ns, char name[RN_NAME_MAX + 1],
		       uint32_t *flags)
{
	const struct rn_names *t = mem;
	const struct rn_name *set;
	uint64_t key[2];

	memcpy(key, addr, 16);
	set = &t->entry[set_of(key) * RN_NAMES_WAYS];
	for (uint32_t k = 0; k < RN_NAMES_WAYS; k++) {
		uint32_t len = read_entry(&set[k], key, now_ns, name, flags);

		if (len)
			return len;
	}
	return 0;
}
