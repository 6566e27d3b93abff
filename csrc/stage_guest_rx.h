/* stage_guest_rx.h - loop half of pipeline/guest_rx.py. */
#ifndef RN_STAGE_GUEST_RX_H
#define RN_STAGE_GUEST_RX_H

#include "fast_down.h"
#include "rn_link.h"
#include "rn_stage.h"

/* CFFI BEGIN */
/* As stage_guest_tx_init(). */
int stage_guest_rx_init(struct rn_stage *s, const struct rn_link *link, int pcap_fd);
int stage_guest_rx_link(struct rn_stage *s, const struct rn_link *link);
/* As stage_guest_tx_broken(): the peer of a socket has left. */
int stage_guest_rx_broken(struct rn_stage *s);
/* After it: the guest's second NIC, which takes what the stage of row @producer_row sends, and nothing else; called
 * again as stage_guest_tx_nic2(). */
int stage_guest_rx_nic2(struct rn_stage *s, const struct rn_link *link, uint32_t producer_row);
/* As stage_guest_tx_promote(). */
int stage_guest_rx_promote(struct rn_stage *s, void *flows, uint64_t flows_size, const struct fast_down_config *cfg);
/* CFFI END */
#endif
