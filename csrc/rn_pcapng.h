/* rn_pcapng.h - the pieces of a pcapng block, for who writes one (draft-ietf-opsawg-pcapng). */
#ifndef RN_PCAPNG_H
#define RN_PCAPNG_H

#include "rn_layout.h"
#include <string.h>

/* Block types, option codes: draft-ietf-opsawg-pcapng 4.1, 4.2, 4.3. Host byte order; the magic tells. */
#define PCAPNG_SHB 0x0a0d0d0au
#define PCAPNG_IDB 1u
#define PCAPNG_EPB 6u
#define PCAPNG_BYTE_ORDER 0x1a2b3c4du
#define PCAPNG_OPT_END 0u
#define PCAPNG_SHB_USERAPPL 4u
#define PCAPNG_IF_NAME 2u
#define PCAPNG_IF_TSRESOL 9u
#define PCAPNG_COMMENT 1u /* 3.5 */
#define PCAPNG_EPB_FLAGS 2u
#define PCAPNG_EPB_DROPCOUNT 4u
#define PCAPNG_LINKTYPE_ETHERNET 1u

static inline uint32_t pcapng_pad4(uint32_t n)
{
	return (n + 3u) & ~3u;
}

static inline uint8_t *pcapng_put32(uint8_t *p, uint32_t v)
{
	memcpy(p, &v, sizeof(v));
	return p + sizeof(v);
}

static inline uint8_t *pcapng_put16(uint8_t *p, uint16_t v)
{
	memcpy(p, &v, sizeof(v));
	return p + sizeof(v);
}

static inline uint8_t *pcapng_option(uint8_t *p, uint16_t code, const void *value, uint16_t len)
{
	p = pcapng_put16(p, code);
	p = pcapng_put16(p, len);
	memset(p, 0, pcapng_pad4(len));
	if (len)
		memcpy(p, value, len);
	return p + pcapng_pad4(len);
}

/* Close a block that began at @start: its length goes in both ends. */
static inline uint8_t *pcapng_end(uint8_t *start, uint8_t *p)
{
	uint32_t total = (uint32_t)(p - start) + 4;

	pcapng_put32(start + 4, total);
	return pcapng_put32(p, total);
}

#endif
