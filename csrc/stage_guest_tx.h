/* stage_guest_tx.h - loop half of pipeline/guest_tx.py. */
#ifndef RN_STAGE_GUEST_TX_H
#define RN_STAGE_GUEST_TX_H

#include "rn_link.h"
#include "rn_stage.h"

/* CFFI BEGIN */
/* @link: copied; its fd, non-blocking, and @pcap_fd (O_APPEND, or -1: no capture) stay the caller's.
 * 0, -EINVAL, -ENOMEM, or what epoll_ctl says; rn_stage_error() has the text. */
int stage_guest_tx_init(struct rn_stage *s, const struct rn_link *link, int pcap_fd);
/* CFFI END */
#endif
