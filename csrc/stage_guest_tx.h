/* stage_guest_tx.h - loop half of pipeline/guest_tx.py. */
#ifndef RN_STAGE_GUEST_TX_H
#define RN_STAGE_GUEST_TX_H

#include "fast_up.h"
#include "rn_link.h"
#include "rn_stage.h"

/* CFFI BEGIN */
/* @link: copied; its fd, non-blocking (-1: none yet), and @pcap_fd (O_APPEND, or -1: no capture) stay the caller's.
 * 0, -EINVAL, -ENOMEM, or what epoll_ctl says; rn_stage_error() has the text. */
int stage_guest_tx_init(struct rn_stage *s, const struct rn_link *link, int pcap_fd);
/* From now on this link instead; the old one's descriptor may be closed then. On an error the old one stays. */
int stage_guest_tx_link(struct rn_stage *s, const struct rn_link *link);
/* Why the link is of no more use, a negative errno, told once; 0: it is of use. */
int stage_guest_tx_broken(struct rn_stage *s);
/* After it: the guest's second NIC, whose frames go to output HOSTNET; called again: another link of it, or none (-1).
 * 0 or a negative errno. */
int stage_guest_tx_nic2(struct rn_stage *s, const struct rn_link *link);
/* Then, if flows may be promoted: 0, or a negative errno. @flows, mapped read-write, must outlive the stage. */
int stage_guest_tx_promote(struct rn_stage *s, void *flows, uint64_t flows_size, const struct fast_up_config *cfg);
/* CFFI END */
#endif
