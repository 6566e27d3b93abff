/* micro.h - what a part of the data plane costs by itself, in ns a frame: the sources of csrc/, compiled as the product's
 * are, driven in one process (two threads for the ring) without sockets where there need be none.
 *
 * A case is measured ROUNDS times; a line of JSON says the median, the least and the most. What counts is the least: the
 * rest is what else the machine did.
 */
#ifndef MICRO_H
#define MICRO_H

#include <stddef.h>
#include <stdint.h>

#define ROUNDS 11

/* One round of @n operations; returns the ns they took together. */
typedef uint64_t (*micro_fn)(void *ctx, uint32_t n);

/* Measure and print. @bytes: payload an operation moves, 0: not a matter of bytes. */
void micro(const char *part, const char *what, uint32_t bytes, uint32_t n, micro_fn round, void *ctx);
/* Print figures, ns an operation. */
void micro_say(const char *part, const char *what, uint32_t bytes, const double ns[ROUNDS]);

/* The same, with the time in system calls (while micro_timed is 1) and the rest as cases of their own. */
void micro_split(const char *part, const char *what, uint32_t bytes, uint32_t n, micro_fn round);
extern int micro_timed;
extern uint64_t micro_kernel_ns; /* the round sets it to 0 */

/* Two ends of a TCP connection on loopback; the server's buffer is large. */
void micro_tcp_pair(int *client, int *server);

uint64_t micro_now(void);
void *micro_memory(uint64_t size); /* zeroed, page-aligned; never NULL */
void micro_need(int ok, const char *what, int line);
#define NEED(ok) micro_need(!!(ok), #ok, __LINE__)

/* Keep the compiler from leaving out what nobody reads. */
#define MICRO_USE(x) __asm__ volatile("" : : "r"(x) : "memory")

/* An Ethernet + IPv4 + TCP frame of the guest's to the gateway with @len bytes of payload; returns its length. Checksums
 * are right, the TCP one only with @whole. */
uint32_t micro_frame(uint8_t *f, uint16_t sport, uint16_t dport, uint32_t seq, uint32_t ack, uint8_t flags, uint32_t len, int whole);
extern const uint8_t micro_gateway[4], micro_guest[4], micro_gateway_mac[6], micro_guest_mac[6];

void micro_machine(void);
void micro_ring(void);
void micro_arena(void);
void micro_classify(void);
void micro_checksum(void);
void micro_tcp_up(void);
void micro_fast_up(void);

#endif
