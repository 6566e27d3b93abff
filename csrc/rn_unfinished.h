/* rn_unfinished.h - frames whose virtio-net header was taken off on the way, although it said something.
 *
 * libkrun, with its offloads on (krunkit: offloading=on), tells the guest that checksums and segmentation are done behind
 * its device, and then sends the frames without the header that says of which: TCP and UDP with a checksum field that
 * holds the sum of the pseudo-header only, and TCP of up to 64 KiB in one segment. Here the header is written anew from the
 * frame, so that everything behind the link sees what a tap would have given it.
 *
 * How such a frame is told from a damaged one. The field of an unfinished frame is known to the bit: the folded sum of
 * addresses, protocol and length, not inverted (virtio 1.2 5.1.6.2). Equal to that: it is marked, and nobody verifies its
 * checksum. Anything else is left alone, and verified as on any link. So a whole frame that was damaged, or one made up,
 * passes unseen if its field happens to be one of two values and not of one: 2 in 65536. A damaged unfinished frame is seen if
 * what the field covers was hit, and not otherwise; that is what the offload means, and there is no wire between the
 * guest's kernel and us, only memory.
 */
#ifndef RN_UNFINISHED_H
#define RN_UNFINISHED_H

#include "rn_layout.h"

/* CFFI BEGIN */
/* Write the virtio-net header of the @len-byte frame behind it: of zeros, or that its checksum is left to do and, for TCP
 * that is longer than @mtu (bytes of IP), where to cut it. IPv4 with options, IPv6 without extension headers, one VLAN tag (not
 * cut). Any bytes may come; none but the header's are written. Returns 1 if it says something. */
int rn_unfinished_mark(uint8_t *vnet_then_frame, uint32_t len, uint32_t mtu);
/* CFFI END */

#endif
