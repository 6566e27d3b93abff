/* classify.c - parse, check and dispatch a frame: what the classify stage does for each, and guest_tx for promoted flows. */
#include "micro.h"

#include <string.h>

#include "rn_parse.h"

static const struct classify_config config = {
	.gateway4 = { 10, 0, 2, 1 }, .subnet4 = { 10, 0, 2, 0 }, .prefix = 24, .gateway_mac = { 2, 0xab, 0xcd, 0, 0, 1 }, .mtu = 1500,
};

struct parse_ctx {
	uint8_t *frame;
	uint32_t len;
	struct rn_vnet_hdr vnet;
};

static uint64_t parses(void *ctx, uint32_t n)
{
	struct parse_ctx *c = ctx;
	struct rn_parsed p;
	uint64_t t = micro_now();

	for (uint32_t i = 0; i < n; i++) {
		struct rn_view v = { c->frame, c->len };

		NEED(rn_parse_frame(&v, &c->vnet, &config, &p) == RN_V_BRIDGE);
		MICRO_USE(p.payload_len);
	}
	return micro_now() - t;
}

void micro_classify(void)
{
	static const struct {
		uint32_t len, n;
		const char *what;
		int offload;
	} cases[] = {
		{ 0, 200000, "ACK, checksum by the link", 1 },
		{ 1460, 200000, "MTU 1500, checksum by the link", 1 },
		{ 65160, 200000, "super-frame, checksum by the link", 1 },
		{ 0, 200000, "ACK, checksum checked here", 0 },
		{ 1460, 100000, "MTU 1500, checksum checked here", 0 },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct parse_ctx c = { .frame = micro_memory(70000) };

		c.len = micro_frame(c.frame, 5000, 80, 1, 1, RN_TH_ACK, cases[i].len, !cases[i].offload);
		if (cases[i].offload) { /* virtio 1.2 5.1.6.2: the device, so the host, completes it */
			c.vnet.flags = RN_VNET_NEEDS_CSUM;
			c.vnet.csum_start = RN_ETH_HLEN + RN_IP4_HLEN;
			c.vnet.csum_offset = RN_TCP_SUM;
			if (cases[i].len > 1460) {
				c.vnet.gso_type = RN_VNET_GSO_TCPV4;
				c.vnet.gso_size = 1460;
				c.vnet.hdr_len = RN_ETH_HLEN + RN_IP4_HLEN + RN_TCP_HLEN;
			}
		}
		micro("classify", cases[i].what, cases[i].offload ? 0 : cases[i].len, cases[i].n, parses, &c);
	}
}
