/* stage_vmnet.h - loop half of pipeline/vmnet.py. */
#ifndef RN_STAGE_VMNET_H
#define RN_STAGE_VMNET_H

#include "rn_link.h"
#include "rn_stage.h"

/* CFFI BEGIN */
/* @link: the host side, copied; its fd, non-blocking, stays the caller's. @storm: broadcast and multicast frames a
 * second each way, 0: no limit. 0, -EINVAL, -ENOMEM, or what epoll_ctl says; rn_stage_error() has the text. */
int stage_vmnet_init(struct rn_stage *s, const struct rn_link *link, uint64_t storm);
/* CFFI END */
#endif
