/* reassembly.h - IPv4 fragments from the guest become whole datagrams again. */
#ifndef RN_REASSEMBLY_H
#define RN_REASSEMBLY_H

#include "rn_parse.h"

/* CFFI BEGIN */
#define RA_DATAGRAMS 16		  /* under way at once; then the oldest goes */
#define RA_TIMEOUT_NS 15000000000 /* RFC 791 3.2: "recommended initial timer setting is 15 seconds" */

enum ra_result { RA_HELD = 0, RA_DONE, RA_DROPPED };

/* Fates of fragments, in frames: fragments added == joined + held + duplicates + bad + table + timeout. */
struct ra_stat {
	uint64_t datagrams;  /* put together */
	uint64_t joined;     /* fragments in them */
	uint64_t duplicates; /* said nothing new */
	uint64_t bad, table, timeout;
	uint32_t held;	     /* now */
	uint32_t open;	     /* datagrams under way, those being refused included, in [0, RA_DATAGRAMS] */
};

struct reassembly;
void reassembly_free(struct reassembly *r); /* NULL is allowed */
void reassembly_stat(const struct reassembly *r, struct ra_stat *out);
/* When the oldest datagram under way expires, ns; UINT64_MAX if there is none. */
uint64_t reassembly_deadline(const struct reassembly *r);

/* For tests and tools: memory from the heap, frames as plain bytes. @blocks: datagrams that have memory at
 * once. reassembly_add_bytes(): @frame is of verdict RN_V_FRAGMENT, else RA_DROPPED; on RA_DONE the frame is
 * in @out (65549 bytes) and @out_len. reassembly_expire_bytes(): datagrams expired, at most one a call; @out
 * (1500 bytes) and @out_len have the start of its first fragment, 0 if that never came. */
struct reassembly *reassembly_new_heap(uint32_t blocks);
int reassembly_add_bytes(struct reassembly *r, uint64_t now, const uint8_t *frame, uint32_t len,
			 const struct classify_config *cfg, uint8_t *out, uint32_t *out_len);
int reassembly_expire_bytes(struct reassembly *r, uint64_t now, uint8_t *out, uint32_t *out_len);
/* CFFI END */

/* A datagram is put together in one block of RA_BLOCK bytes. The first RA_FRONT are the owner's (buffer header,
 * virtio-net header, alignment); then room for Ethernet and the longest IP header, then the payload. */
#define RA_FRONT 82u
#define RA_DATA_OFF (RA_FRONT + RN_ETH_HLEN + 60u)
#define RA_BLOCK (RA_DATA_OFF + 65535u)

struct ra_memory {
	void *(*get)(void *ctx); /* RA_BLOCK bytes, or NULL */
	void (*put)(void *ctx, void *block);
	void *ctx;
};

struct ra_done {
	void *block;  /* the caller's from now on */
	uint8_t *eth; /* whole frame in it, IP header made new */
	uint32_t len;
};

/* Bytes of a first fragment kept for an ICMP error: RFC 1812 4.3.2.3, 576 bytes with its own headers. */
#define RA_QUOTE_MAX (RN_ETH_HLEN + 548u)

struct reassembly *reassembly_new(const struct ra_memory *mem);

/* Take one fragment of verdict RN_V_FRAGMENT; @p is what rn_parse_frame() said of it. */
enum ra_result reassembly_add(struct reassembly *r, uint64_t now, const struct rn_view *frame,
			      const struct rn_parsed *p, struct ra_done *done);

/* Drop the oldest datagram if its time is over: 1, and the start of its first fragment (Ethernet header first) in
 * @quote, RA_QUOTE_MAX bytes, with @quote_len 0 if that never came. 0 if none is due. */
int reassembly_expire(struct reassembly *r, uint64_t now, uint8_t *quote, uint32_t *quote_len);

#endif
