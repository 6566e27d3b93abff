/* rn_capture.h - the reader's side of `ringnet capture`: mirrors in, pcapng blocks out. */
#ifndef RN_CAPTURE_H
#define RN_CAPTURE_H

#include "rn_mirror.h"
#include "rn_tap.h"

/* CFFI BEGIN */
struct rn_capture; /* private to the reader's process */

struct rn_capture *rn_capture_new(void); /* NULL if out of memory */
void rn_capture_free(struct rn_capture *c);
/* Read this mirror too. @interfaces: RN_NTAP_POINTS numbers of pcapng interfaces, by enum rn_tap_point. 0, as
 * rn_mirror_check(), or -ENOSPC. The memory must outlive @c. */
int rn_capture_add(struct rn_capture *c, void *mem, uint64_t size, const uint32_t *interfaces);
/* Enhanced packet blocks of at most @frames frames into @out, whole ones, by time as far as it is there: bytes; 0:
 * there is none; -EPROTO: a mirror holds what no stage writes; -EMSGSIZE: @cap is too small for a frame. */
int64_t rn_capture_read(struct rn_capture *c, uint8_t *out, uint64_t cap, uint64_t frames);
uint64_t rn_capture_frames(const struct rn_capture *c); /* read so far */
/* About to sleep: 1 if there is something to read after all. */
int rn_capture_arm(struct rn_capture *c);
/* CFFI END */

#endif
