/* rn_view.h - the one way to look at guest bytes: offset and length are checked against the frame. */
#ifndef RN_VIEW_H
#define RN_VIEW_H

#include "rn_layout.h"

struct rn_view {
	const uint8_t *data;
	uint32_t len; /* our own copy; shared memory is not asked again */
};

/* Pointer to @n bytes at @off, or NULL if the frame does not have them. No overflow for any argument. */
static inline const uint8_t *rn_view_get(const struct rn_view *v, uint32_t off, uint32_t n)
{
	if (off > v->len || n > v->len - off)
		return NULL;
	return v->data + off;
}

#endif
