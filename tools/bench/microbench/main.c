/* main.c - runs the parts named on the command line, or all; see micro.h. */
#include "micro.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "rn_csum.h"
#include "rn_proto.h"

const uint8_t micro_gateway[4] = { 10, 0, 2, 1 }, micro_guest[4] = { 10, 0, 2, 2 };
const uint8_t micro_gateway_mac[6] = { 2, 0xab, 0xcd, 0, 0, 1 }, micro_guest_mac[6] = { 0x52, 0x54, 0xab, 0, 0, 2 };

static const struct {
	const char *name;
	void (*run)(void);
} parts[] = {
	{ "machine", micro_machine }, { "ring", micro_ring },	      { "arena", micro_arena },
	{ "classify", micro_classify },
	{ "checksum", micro_checksum }, { "tcp_up", micro_tcp_up },
	{ "fast_up", micro_fast_up },
};

uint64_t micro_now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void micro_need(int ok, const char *what, int line)
{
	if (ok)
		return;
	fprintf(stderr, "micro: not true: %s (line %d): %s\n", what, line, strerror(errno));
	exit(1);
}

void *micro_memory(uint64_t size)
{
	void *p = aligned_alloc(4096, (size + 4095) / 4096 * 4096);

	NEED(p);
	return memset(p, 0, size);
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

void micro_say(const char *part, const char *what, uint32_t bytes, const double ns[ROUNDS])
{
	double sorted[ROUNDS];

	memcpy(sorted, ns, sizeof(sorted));
	qsort(sorted, ROUNDS, sizeof(*sorted), by_value);
	printf("{\"part\": \"%s\", \"case\": \"%s\", \"bytes\": %u, \"ns\": %.3f, \"least\": %.3f, \"most\": %.3f}\n", part, what,
	       bytes, sorted[ROUNDS / 2], sorted[0], sorted[ROUNDS - 1]);
	fflush(stdout);
}

void micro(const char *part, const char *what, uint32_t bytes, uint32_t n, micro_fn round, void *ctx)
{
	double ns[ROUNDS];

	round(ctx, n); /* warm */
	for (int i = 0; i < ROUNDS; i++)
		ns[i] = (double)round(ctx, n) / n;
	micro_say(part, what, bytes, ns);
}

uint32_t micro_frame(uint8_t *f, uint16_t sport, uint16_t dport, uint32_t seq, uint32_t ack, uint8_t flags, uint32_t len, int whole)
{
	uint8_t *ip = f + RN_ETH_HLEN, *th = ip + RN_IP4_HLEN;
	uint16_t sum;

	memcpy(f, micro_gateway_mac, 6);
	memcpy(f + 6, micro_guest_mac, 6);
	rn_put16(f + 12, RN_ETHERTYPE_IPV4);
	memset(ip, 0, RN_IP4_HLEN + RN_TCP_HLEN);
	ip[0] = 0x45;
	rn_put16(ip + RN_IP4_LEN, (uint16_t)(RN_IP4_HLEN + RN_TCP_HLEN + len));
	ip[RN_IP4_TTL] = 64;
	ip[RN_IP4_PROTO] = RN_IPPROTO_TCP;
	memcpy(ip + RN_IP4_SRC, micro_guest, 4);
	memcpy(ip + RN_IP4_DST, micro_gateway, 4);
	rn_csum_ip4(ip, RN_IP4_HLEN);
	rn_put16(th + RN_TCP_SPORT, sport);
	rn_put16(th + RN_TCP_DPORT, dport);
	rn_put32(th + RN_TCP_SEQ, seq);
	rn_put32(th + RN_TCP_ACK, ack);
	th[RN_TCP_OFF] = RN_TCP_HLEN / 4 << 4;
	th[RN_TCP_FLAGS] = flags;
	rn_put16(th + RN_TCP_WND, 65535);
	if (whole) {
		sum = (uint16_t)~rn_csum_fold(rn_csum_add(rn_csum_pseudo4(micro_guest, micro_gateway, RN_IPPROTO_TCP,
									  RN_TCP_HLEN + len), th, RN_TCP_HLEN + len));
		memcpy(th + RN_TCP_SUM, &sum, sizeof(sum));
	}
	return RN_ETH_HLEN + RN_IP4_HLEN + RN_TCP_HLEN + len;
}

int main(int argc, char **argv)
{
	for (size_t i = 0; i < sizeof(parts) / sizeof(*parts); i++) {
		int wanted = argc < 2;

		for (int k = 1; k < argc; k++)
			wanted |= !strcmp(argv[k], parts[i].name);
		if (wanted)
			parts[i].run();
	}
	return 0;
}
