/* rn_csum.h - Internet checksum (RFC 1071), over any length and alignment. */
#ifndef RN_CSUM_H
#define RN_CSUM_H

#include "rn_layout.h"

/* CFFI BEGIN */
/* Running sum: add bytes, fold at the end. Sums are in memory order (RFC 1071 2(B)): the folded value is
 * stored with memcpy, not rn_put16. @sum carries from an earlier call whose length was even. */
uint64_t rn_csum_add(uint64_t sum, const void *data, uint64_t len);

/* Fold to 16 bits, not inverted. */
uint16_t rn_csum_fold(uint64_t sum);

/* Pseudo-header sum (RFC 9293 3.1, RFC 768): IPv4 addresses as on the wire, @len in host order. */
uint64_t rn_csum_pseudo4(const uint8_t src[4], const uint8_t dst[4], uint8_t proto, uint32_t len);

/* The same of a packet that begins with the IP header @ip, of either version (RFC 8200 8.1): the caller looked that it is
 * there. */
uint64_t rn_csum_pseudo(const uint8_t *ip, uint8_t proto, uint32_t len);

/* Write the IPv4 header checksum of the @hlen-byte header at @ip. */
void rn_csum_ip4(uint8_t *ip, uint32_t hlen);

/* Plain byte-by-byte version, for tests to compare with. */
uint16_t rn_csum_plain(const void *data, uint64_t len);
/* CFFI END */

#endif
