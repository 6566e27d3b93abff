/* fuzz_input.h - what targets share: the input byte by byte, what must be true, memory. FUZZ_NAME: the target's, in messages. */
#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* abort() is what libFuzzer and the test look for. */
#define must(ok, what)                                                                                   \
	do {                                                                                             \
		if (!(ok)) {                                                                             \
			fprintf(stderr, "fuzz_" FUZZ_NAME ": not true: %s (line %d)\n", what, __LINE__); \
			abort();                                                                         \
		}                                                                                        \
	} while (0)

struct input {
	const uint8_t *at;
	size_t left;
};

/* 0 behind the end: a short input is an input, too. */
static inline uint32_t u8(struct input *in)
{
	if (!in->left)
		return 0;
	in->left--;
	return *in->at++;
}

static inline uint32_t u16(struct input *in)
{
	uint32_t hi = u8(in);

	return hi << 8 | u8(in);
}

/* Whole pages of zeros, as shared memory is. */
static inline void *memory(uint64_t size)
{
	void *p = aligned_alloc(4096, (size + 4095) / 4096 * 4096);

	must(p != NULL, "memory");
	return memset(p, 0, (size + 4095) / 4096 * 4096);
}

#endif
