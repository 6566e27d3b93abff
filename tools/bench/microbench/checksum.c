/* checksum.c - the Internet checksum, as fast as a link without offloads would need it. */
#include "micro.h"

#include "rn_csum.h"

struct sum_ctx {
	uint8_t *data;
	uint32_t len;
};

static uint64_t sums(void *ctx, uint32_t n)
{
	struct sum_ctx *c = ctx;
	uint64_t t = micro_now();

	for (uint32_t i = 0; i < n; i++)
		MICRO_USE(rn_csum_fold(rn_csum_add(0, c->data, c->len)));
	return micro_now() - t;
}

void micro_checksum(void)
{
	static const struct {
		uint32_t len, n;
		const char *what;
	} sizes[] = { { 20, 400000, "IP header" }, { 1460, 100000, "MTU 1500" }, { 65160, 4000, "super-frame" } };

	for (int i = 0; i < 3; i++) {
		struct sum_ctx c = { micro_memory(sizes[i].len), sizes[i].len };

		micro("checksum", sizes[i].what, sizes[i].len, sizes[i].n, sums, &c);
	}
}
