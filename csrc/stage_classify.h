/* stage_classify.h - loop half of pipeline/classify.py. */
#ifndef RN_STAGE_CLASSIFY_H
#define RN_STAGE_CLASSIFY_H

#include "rn_parse.h"
#include "rn_stage.h"

/* CFFI BEGIN */
/* 0, -EINVAL (configuration; rn_stage_error() says so), -ENOMEM. */
int stage_classify_init(struct rn_stage *s, const struct classify_config *cfg);
/* CFFI END */
#endif
