/* load.h - what the traffic generators share. One program (main.c), a mode a file:
 *
 *   rr.c     request and response, connect-request-close: latency, one at a time
 *   flows.c  many TCP connections that all send, or all wait: throughput and fairness
 *   udp.c    datagrams at a rate: what arrives
 *   ready.c  when does the network begin to work
 *
 * Bound to no measured program: plain sockets, in whatever network namespace the caller starts it in. Orders come as
 * lines on standard input, answers go as lines to standard output, the end of the input ends a server. Times are
 * CLOCK_MONOTONIC, so that they can be compared with the caller's.
 */
#ifndef LOAD_H
#define LOAD_H

#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>

#define LOAD_ORDER_MAX 128

/* One line to stderr, exit 1. With errno's text if @err is not 0. */
void die(int err, const char *fmt, ...) __attribute__((noreturn, format(printf, 2, 3)));
/* One line to stdout, at once. */
void tell(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

uint64_t now_ns(void);
double number(const char *text, double lo, double hi, const char *what);
struct sockaddr_in address(const char *ip, const char *port);

int tcp_socket(int nonblock);
void no_delay(int fd);
int listen_on(const struct sockaddr_in *at);

/* An order without its newline into @line; 0: the input has ended. */
int next_order(char line[LOAD_ORDER_MAX]);

/* Sorts @ns; p50, p90, p99 and more of it as one JSON object, with @lost beside it. */
void tell_latencies(uint64_t *ns, size_t n, size_t lost, double seconds);

/* Modes; argv[0] is the mode's name. */
int mode_serve(int argc, char **argv);
int mode_rr(int argc, char **argv);
int mode_udp_rr(int argc, char **argv);
int mode_crr(int argc, char **argv);
int mode_flows_listen(int argc, char **argv);
int mode_flows_connect(int argc, char **argv);
int mode_udp_listen(int argc, char **argv);
int mode_udp_connect(int argc, char **argv);
int mode_ready(int argc, char **argv);

#endif
