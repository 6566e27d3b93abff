/* rn_gso.h - finish in software what a frame's virtio-net header left to the link: checksum and segmentation.
 *
 * For links whose peer takes no such header. A frame comes out as one or more: of each the headers are written
 * anew into the caller's memory, the payload stays where it is, so that both can be gathered by one system call.
 */
#ifndef RN_GSO_H
#define RN_GSO_H

#include "rn_layout.h"

/* CFFI BEGIN */
#define RN_GSO_HEAD_MAX 192  /* bytes of headers: Ethernet, IPv4 with options, TCP with options: 134 */
#define RN_GSO_SEGS_MAX 2048 /* 64 KiB in segments of 32 bytes */

struct rn_gso {
	const uint8_t *frame;
	uint32_t len;		    /* of the whole frame */
	uint32_t hlen;		    /* bytes of each segment that are written anew */
	uint32_t mss;		    /* payload bytes of each segment but the last */
	uint32_t at;		    /* payload bytes that are done */
	uint32_t done, nsegs;	    /* segments */
	uint16_t l4, csum_at;	    /* bytes from the Ethernet header */
	uint8_t type;		    /* RN_VNET_GSO_*, without ECN */
};

/* Begin with @len bytes of frame behind a virtio-net header. Returns how many frames it makes, or -EINVAL: header
 * and frame do not fit each other, or are of a kind that cannot be finished here; -EMSGSIZE: more than
 * RN_GSO_SEGS_MAX. */
int rn_gso_begin(struct rn_gso *g, const uint8_t *vnet_then_frame, uint32_t len);

/* Do not cut it after all: one frame, with its checksum done. Returns 1 if it is TCP; else nothing changes. */
int rn_gso_whole(struct rn_gso *g);

/* The next frame: g->hlen bytes are written to @head (RN_GSO_HEAD_MAX at most), *@payload and *@n say what follows
 * them. Call it as often as rn_gso_begin() said. */
void rn_gso_next(struct rn_gso *g, uint8_t *head, const uint8_t **payload, uint32_t *n);

/* For tests: all of them, each behind its length as 4 bytes, high byte first. Returns bytes written, -ENOBUFS, or
 * what rn_gso_begin() says. */
int64_t rn_gso_all(const uint8_t *vnet_then_frame, uint32_t len, uint8_t *out, uint32_t cap);
/* CFFI END */

#endif
