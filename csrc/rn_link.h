/* rn_link.h - the guest side: read a frame, write a frame, and what the link can do for us.
 *
 * Kinds now: tap (virtio-net header and offloads), datagram socket (one frame a datagram; a virtio-net
 * header only if the config says so). More kinds come with their own issue; the contract stays.
 */
#ifndef RN_LINK_H
#define RN_LINK_H

#include "rn_layout.h"

/* CFFI BEGIN */
enum rn_link_kind { RN_LINK_TAP = 0, RN_LINK_DGRAM };

struct rn_link {
	int fd;		 /* non-blocking */
	int kind;	 /* enum rn_link_kind */
	int vnet;	 /* 1: 12-byte virtio-net header on every frame */
	uint32_t frame_max; /* largest Ethernet frame either way, bytes */
};
/* CFFI END */

/* Read one frame into @buf, whose first RN_VNET_HLEN bytes take the header (zeroed if the link has none).
 * @cap: bytes at @buf, more than header + limit; the limit is frame_max, on a link with headers at least
 * RN_FRAME_MAX (super-frames; the caller holds the others to frame_max).
 * Returns frame bytes (header not counted), 0 on EOF (socket closed by the peer), -EAGAIN, -EMSGSIZE
 * (longer than the limit; it is gone), -EBADMSG (empty, or shorter than its virtio-net header; gone), or
 * another negative errno. */
int64_t rn_link_read(const struct rn_link *l, uint8_t *vnet_then_frame, uint32_t cap);

/* Write one frame; @vnet_then_frame as above. 0, -EAGAIN (try later), or a negative errno. */
int rn_link_write(const struct rn_link *l, const uint8_t *vnet_then_frame, uint32_t len);

#endif
