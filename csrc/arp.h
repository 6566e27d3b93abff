/* arp.h - ARP for the gateway's address (RFC 826, RFC 5227). */
#ifndef RN_ARP_H
#define RN_ARP_H

#include "rn_parse.h"

#define ARP_FRAME_LEN (RN_ETH_HLEN + RN_ARP_LEN)

/* Write the ARP_FRAME_LEN bytes of the answer to @request, whose verdict was RN_V_ARP. */
void arp_reply(uint8_t *out, const struct rn_view *request, const struct classify_config *cfg);

/* CFFI BEGIN */
/* For tests: the 42-byte answer to @frame in @out, or 0 if it gets none. Returns bytes. */
uint32_t arp_answer_bytes(const uint8_t *frame, uint32_t len, const struct classify_config *cfg, uint8_t *out);
/* CFFI END */
#endif
