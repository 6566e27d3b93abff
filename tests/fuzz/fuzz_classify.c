/* fuzz_classify.c - hostile frames against what classify runs on them, under the sanitizers.
 *
 * Two drivers for one target:
 *   gcc     -fsanitize=address,undefined: main() mutates a corpus by a seed; the same arguments give the same
 *           run, bit for bit.  usage: fuzz_classify CORPUS ITERATIONS SEED
 *   clang   -fsanitize=fuzzer,address,undefined -DLIBFUZZER: LLVMFuzzerTestOneInput(), input as below.
 *
 * An input: one byte of flags (1: the 12 bytes are a virtio-net header; 2: time goes on by 5 s; 4: the frame came without
 * the header it had, and gets one by rn_unfinished_mark()), 12 bytes, frame. The corpus file is made from tests/frames: u16 length (little-endian), 12 bytes, frame, repeated.
 *
 * Each frame lies in a heap block of exactly its length, so that a read of one byte too many is seen. What is
 * checked besides: verdict in range, offsets in the frame, a fragment has exactly one fate, and a datagram
 * that comes out of reassembly parses as a whole one.
 *
 * With -DPLANT the target also believes the IP total length: the test of the harness itself.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arp.h"
#include "reassembly.h"
#include "rn_csum.h"
#include "rn_gso.h"
#include "rn_parse.h"
#include "rn_unfinished.h"

#define STEP_NS 5000000000ull
#define INPUT_HEAD 13u
#define FRAME_CAP 70000u
#define CUT_MTU 576u /* of a guest whose frames lost their header: small, so that frames of the corpus are longer */
#define OPEN_CAP 9u /* blocks: fewer than the table has entries, so that both bounds are met */

static const struct classify_config config = {
	.gateway4 = { 10, 0, 2, 1 },
	.subnet4 = { 10, 0, 2, 0 },
	.prefix = 24,
	.gateway_mac = { 0x02, 0xab, 0xcd, 0, 0, 1 },
	.mtu = 4000,
};

/* Reassembly lives across inputs, as in the stage. */
struct target {
	struct reassembly *ra;
	uint64_t now, added, marked, cut;
	uint64_t verdicts[RN_NVERDICTS];
	uint8_t out[RN_FRAME_MAX];
};
static struct target target;

/* abort() is what libFuzzer and the test look for. */
static void must(int ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "fuzz_classify: not true: %s\n", what);
	abort();
}

static void check_parsed(const struct rn_parsed *p, uint32_t len)
{
	must(p->frame_len <= len, "frame_len <= len");
	must(p->l3_off <= p->frame_len, "l3_off in the frame");
	must(p->l4_off <= p->frame_len && p->l4_len <= p->frame_len - p->l4_off, "L4 in the frame");
	must(p->payload_off <= p->frame_len && p->payload_len <= p->frame_len - p->payload_off, "payload in the frame");
}

static void check_fates(void)
{
	struct ra_stat st;

	reassembly_stat(target.ra, &st);
	must(target.added == st.joined + st.held + st.duplicates + st.bad + st.table + st.timeout, "one fate each");
	must(st.open <= RA_DATAGRAMS, "table bound");
}

/* The header that a frame may have lost: what it says must be so. Returns 1 if it says something. */
static int mark(uint8_t *vnet, const uint8_t *frame, uint32_t len)
{
	uint8_t *both = malloc(RN_VNET_HLEN + len);
	struct rn_gso g;
	int marked;

	must(both != NULL, "memory");
	memset(both, 0xee, RN_VNET_HLEN);
	memcpy(both + RN_VNET_HLEN, frame, len);
	marked = rn_unfinished_mark(both, len, CUT_MTU);
	must(!memcmp(both + RN_VNET_HLEN, frame, len), "the frame is as it was");
	must(marked == (both[0] != 0) && rn_vnet_ok(both, len), "a header that fits the frame");
	if (marked) {
		must(rn_gso_begin(&g, both, len) > 0, "it can be finished");
		for (uint32_t k = 0; k < g.nsegs; k++) {
			uint8_t head[RN_GSO_HEAD_MAX];
			const uint8_t *payload;
			uint32_t n;

			rn_gso_next(&g, head, &payload, &n);
			must(payload >= both + RN_VNET_HLEN && payload + n <= both + RN_VNET_HLEN + len, "payload in the frame");
			must(g.nsegs == 1 || g.hlen + n <= RN_ETH_HLEN + CUT_MTU, "cut to the MTU");
		}
		target.marked++;
		target.cut += g.nsegs > 1;
	}
	memcpy(vnet, both, RN_VNET_HLEN);
	free(both);
	return marked;
}

static void one(const uint8_t *data, uint32_t size)
{
	uint32_t len = size - INPUT_HEAD, out_len = 0;
	uint8_t *frame = malloc(len ? len : 1);
	struct rn_parsed p;
	uint8_t vnet[RN_VNET_HLEN], reply[ARP_FRAME_LEN], quote[RA_QUOTE_MAX];
	int has_vnet = data[0] & 1, verdict;

	must(frame != NULL, "memory");
	memcpy(vnet, data + 1, sizeof(vnet));
	memcpy(frame, data + INPUT_HEAD, len);
	/* As guest_tx: what contradicts the frame does not get to classify. */
	if (data[0] & 4)
		has_vnet = mark(vnet, frame, len);
	else if (has_vnet && !rn_vnet_ok(vnet, len))
		has_vnet = 0;
	verdict = rn_parse_bytes(frame, len, has_vnet ? vnet : NULL, &config, &p);
	must(verdict >= 0 && verdict < RN_NVERDICTS && rn_verdict_name(verdict), "verdict in range");
	check_parsed(&p, len);
	target.verdicts[verdict]++;
#ifdef PLANT
	if (len >= RN_ETH_HLEN + RN_IP4_HLEN) { /* the oldest mistake there is */
		volatile uint8_t sum = 0;

		for (uint32_t i = 0; i < rn_get16(frame + RN_ETH_HLEN + RN_IP4_LEN); i++)
			sum = (uint8_t)(sum + frame[RN_ETH_HLEN + i]);
	}
#endif
	if (verdict == RN_V_ARP)
		must(arp_answer_bytes(frame, len, &config, reply) == ARP_FRAME_LEN || has_vnet, "ARP is answered");
	if (verdict == RN_V_FRAGMENT) {
		int result = reassembly_add_bytes(target.ra, target.now, frame, len, &config, target.out, &out_len);

		target.added++;
		if (result == RA_DONE) {
			struct rn_parsed q;

			verdict = rn_parse_bytes(target.out, out_len, NULL, &config, &q);
			must(verdict != RN_V_FRAGMENT, "a whole datagram is no fragment");
			must(verdict != RN_V_IP_CHECKSUM && verdict != RN_V_IP_HEADER && verdict != RN_V_IP_TRUNCATED,
			     "the header made is right");
			check_parsed(&q, out_len);
			target.verdicts[verdict]++;
		}
		check_fates();
	}
	if (data[0] & 2)
		target.now += STEP_NS;
	while (reassembly_expire(target.ra, target.now, quote, &out_len))
		must(out_len <= RA_QUOTE_MAX, "quote bound");
	free(frame);
}

static void begin(void)
{
	target.ra = reassembly_new_heap(OPEN_CAP);
	must(target.ra != NULL, "memory");
	must(!classify_config_check(&config), "configuration");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (!target.ra)
		begin();
	if (size >= INPUT_HEAD && size <= FRAME_CAP)
		one(data, (uint32_t)size);
	return 0;
}

#ifndef LIBFUZZER
static uint64_t state;

static uint32_t rnd(uint32_t below) /* xorshift64* */
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return (uint32_t)((state * 0x2545f4914f6cdd1dull) >> 33) % below;
}

/* Make checksums right where the frame has the bytes, so that the checks behind them are reached. */
static void repair(uint8_t *f, uint32_t len, int l4)
{
	uint8_t *ip = f + RN_ETH_HLEN;
	uint32_t hlen, total, field;
	uint16_t sum;

	if (len < RN_ETH_HLEN + RN_IP4_HLEN || rn_get16(f + 12) != RN_ETHERTYPE_IPV4)
		return;
	hlen = (ip[0] & 15) * 4u;
	if (hlen < RN_IP4_HLEN || hlen > len - RN_ETH_HLEN)
		return;
	rn_csum_ip4(ip, hlen);
	total = rn_get16(ip + RN_IP4_LEN);
	if (!l4 || total > len - RN_ETH_HLEN || total < hlen + 20 || ip[RN_IP4_PROTO] == RN_IPPROTO_ICMP)
		return;
	field = ip[RN_IP4_PROTO] == RN_IPPROTO_UDP ? RN_UDP_SUM : RN_TCP_SUM;
	memset(ip + hlen + field, 0, 2);
	if (l4 == 1) /* unfinished */
		sum = rn_csum_fold(rn_csum_pseudo(ip, ip[RN_IP4_PROTO], total - hlen));
	else
		sum = (uint16_t)~rn_csum_fold(rn_csum_add(
			rn_csum_pseudo4(ip + RN_IP4_SRC, ip + RN_IP4_DST, ip[RN_IP4_PROTO], total - hlen), ip + hlen, total - hlen));
	memcpy(ip + hlen + field, &sum, 2);
}

static uint32_t mutate(uint8_t *f, uint32_t len)
{
	static const uint16_t edges[] = { 0, 1, 7, 8, 19, 20, 27, 28, 60, 0x1fff, 0x2000, 0x3fff, 0x4000, 0x7fff, 0x8000, 0xffff };
	uint32_t times = rnd(5);

	while (times--) {
		uint32_t at = len ? rnd(rnd(4) ? (len < 64 ? len : 64) : len) : 0;

		switch (rnd(8)) {
		case 0:
			if (len)
				f[at] ^= (uint8_t)(1u << rnd(8));
			break;
		case 1:
			if (len)
				f[at] = (uint8_t)rnd(256);
			break;
		case 2: /* a 16-bit field with a value that bounds something */
			if (len >= 2)
				rn_put16(f + (at & ~1u) - (at + 2 > len ? 2 : 0), edges[rnd(sizeof(edges) / sizeof(edges[0]))]);
			break;
		case 3: /* IP total length near the truth */
			if (len >= 34)
				rn_put16(f + 16, (uint16_t)(len - RN_ETH_HLEN + rnd(5) - 2));
			break;
		case 4:
			len = len ? rnd(len + 1) : 0;
			break;
		case 5: { /* grow */
			uint32_t n = 1 + rnd(rnd(8) ? 16 : 3000);

			if (len + n <= FRAME_CAP - INPUT_HEAD) {
				memmove(f + at + n, f + at, len - at);
				len += n;
			}
			break;
		}
		case 6: /* fragment field: few offsets and ids, so that fragments meet */
			if (len >= 34) {
				rn_put16(f + 18, (uint16_t)rnd(6));
				rn_put16(f + 20, (uint16_t)(rnd(5) | (rnd(2) ? RN_IP4_MF : 0)));
			}
			break;
		default: /* header length, protocol */
			if (len >= 34)
				f[rnd(2) ? 14 : 23] = (uint8_t)(rnd(2) ? 0x40 | rnd(16) : (uint32_t[]){ 1, 6, 17, 132 }[rnd(4)]);
		}
	}
	return len;
}

int main(int argc, char **argv)
{
	static uint8_t corpus[1 << 22], input[FRAME_CAP];
	uint32_t starts[4096], n = 0;
	unsigned long iterations;
	struct ra_stat st;
	size_t size;
	FILE *file;

	if (argc != 4 || !(file = fopen(argv[1], "rb"))) {
		fprintf(stderr, "usage: fuzz_classify CORPUS ITERATIONS SEED\n");
		return 2;
	}
	size = fread(corpus, 1, sizeof(corpus), file);
	fclose(file);
	for (size_t at = 0; at + 2 + RN_VNET_HLEN <= size && n < 4096;) {
		starts[n++] = (uint32_t)at;
		at += 2 + RN_VNET_HLEN + (size_t)(corpus[at] | corpus[at + 1] << 8);
		must(at <= size, "corpus is whole");
	}
	must(n > 0, "corpus has frames");
	iterations = strtoul(argv[2], NULL, 10);
	state = strtoul(argv[3], NULL, 10) * 2 + 1;
	begin();
	for (unsigned long i = 0; i < iterations; i++) {
		const uint8_t *c = corpus + starts[i < n ? i : rnd(n)];
		uint32_t len = (uint32_t)(c[0] | c[1] << 8);

		input[0] = (uint8_t)(rnd(2) | (rnd(64) ? 0 : 2) | (rnd(4) ? 0 : 4));
		memcpy(input + 1, c + 2, RN_VNET_HLEN + len);
		if (i >= n) { /* first the corpus as it is */
			len = mutate(input + INPUT_HEAD, len);
			if (!rnd(16))
				input[1 + rnd(RN_VNET_HLEN)] = (uint8_t)rnd(256);
			if (rnd(8))
				repair(input + INPUT_HEAD, len, (int)rnd(4));
		}
		one(input, INPUT_HEAD + len);
	}
	for (int v = 0; v < RN_NVERDICTS; v++)
		printf("%s %llu\n", rn_verdict_name(v), (unsigned long long)target.verdicts[v]);
	printf("marked %llu cut %llu\n", (unsigned long long)target.marked, (unsigned long long)target.cut);
	reassembly_stat(target.ra, &st);
	printf("reassembled %llu duplicates %llu bad %llu table %llu timeout %llu\n", (unsigned long long)st.datagrams,
	       (unsigned long long)st.duplicates, (unsigned long long)st.bad, (unsigned long long)st.table,
	       (unsigned long long)st.timeout);
	reassembly_free(target.ra);
	return 0;
}
#endif
