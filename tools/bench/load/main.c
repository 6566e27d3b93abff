/* main.c - picks the mode; the helpers of load.h. */
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static const struct {
	const char *name;
	int args;
	int (*run)(int argc, char **argv);
	const char *usage;
} modes[] = {
	{ "serve", 3, mode_serve, "ADDR PORT SIZE: answer each SIZE bytes (TCP) and each datagram (UDP) with as much" },
	{ "rr", 4, mode_rr, "ADDR PORT SECONDS SIZE: TCP requests of SIZE bytes, one at a time" },
	{ "udp-rr", 4, mode_udp_rr, "ADDR PORT SECONDS SIZE: the same in UDP" },
	{ "crr", 3, mode_crr, "ADDR PORT SECONDS: connect, one byte each way, close" },
	{ "flows-listen", 2, mode_flows_listen, "ADDR PORT: orders send, stop, mark, report" },
	{ "flows-connect", 3, mode_flows_connect, "ADDR PORT N: N connections, then the same orders" },
	{ "udp-listen", 2, mode_udp_listen, "ADDR PORT: orders send SECONDS BITS_PER_S SIZE, mark, report" },
	{ "udp-connect", 2, mode_udp_connect, "ADDR PORT: say hello until it comes back, then the same orders" },
	{ "ready", 3, mode_ready, "ADDR PORT SECONDS: when a connection first succeeds" },
};

void die(int err, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	fputs("load: ", stderr);
	vfprintf(stderr, fmt, args);
	va_end(args);
	fprintf(stderr, "%s%s\n", err ? ": " : "", err ? strerror(err) : "");
	exit(1);
}

void tell(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	vprintf(fmt, args);
	va_end(args);
	putchar('\n');
	if (fflush(stdout))
		exit(1); /* nobody listens any more */
}

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

double number(const char *text, double lo, double hi, const char *what)
{
	char *end;
	double v = strtod(text, &end);

	if (end == text || *end || !(v >= lo && v <= hi))
		die(0, "%s: '%s' is no number in %g..%g", what, text, lo, hi);
	return v;
}

struct sockaddr_in address(const char *ip, const char *port)
{
	struct sockaddr_in a = { .sin_family = AF_INET,
				 .sin_port = htons((uint16_t)number(port, 1, 65535, "port")) };

	if (inet_pton(AF_INET, ip, &a.sin_addr) != 1)
		die(0, "'%s' is no IPv4 address", ip);
	return a;
}

int tcp_socket(int nonblock)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | (nonblock ? SOCK_NONBLOCK : 0), 0);

	if (fd < 0)
		die(errno, "socket");
	return fd;
}

void no_delay(int fd)
{
	int on = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

int listen_on(const struct sockaddr_in *at)
{
	int fd = tcp_socket(1), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(fd, (const struct sockaddr *)at, sizeof(*at)) || listen(fd, 4096))
		die(errno, "listen on port %u", ntohs(at->sin_port));
	return fd;
}

int next_order(char line[LOAD_ORDER_MAX])
{
	static char buf[LOAD_ORDER_MAX];
	static size_t have;

	for (;;) {
		char *end = memchr(buf, '\n', have);
		ssize_t n;

		if (end) {
			size_t len = (size_t)(end - buf);

			memcpy(line, buf, len);
			line[len] = 0;
			have -= len + 1;
			memmove(buf, end + 1, have);
			return 1;
		}
		if (have == sizeof(buf))
			die(0, "an order of over %zu bytes", sizeof(buf));
		n = read(STDIN_FILENO, buf + have, sizeof(buf) - have);
		if (n <= 0)
			return 0;
		have += (size_t)n;
	}
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

/* Nearest rank: the smallest value that at least @percent of all do not exceed. */
static double rank_us(const uint64_t *ns, size_t n, double percent)
{
	size_t i = (size_t)(percent / 100 * (double)n + 0.999999);

	return (double)ns[i ? (i > n ? n : i) - 1 : 0] / 1000;
}

void tell_latencies(uint64_t *ns, size_t n, size_t lost, double seconds)
{
	double sum = 0;

	if (!n)
		die(0, "no request was answered");
	qsort(ns, n, sizeof(*ns), by_value);
	for (size_t i = 0; i < n; i++)
		sum += (double)ns[i];
	tell("{\"n\": %zu, \"lost\": %zu, \"seconds\": %.6f, \"per_s\": %.1f, \"mean_us\": %.3f, \"min_us\": %.3f, "
	     "\"p50_us\": %.3f, \"p90_us\": %.3f, \"p99_us\": %.3f, \"max_us\": %.3f}",
	     n, lost, seconds, (double)n / seconds, sum / (double)n / 1000, rank_us(ns, n, 0), rank_us(ns, n, 50),
	     rank_us(ns, n, 90), rank_us(ns, n, 99), rank_us(ns, n, 100));
}

int main(int argc, char **argv)
{
	struct rlimit files;

	signal(SIGPIPE, SIG_IGN);
	prctl(PR_SET_PDEATHSIG, SIGKILL);	     /* nothing is left when the caller is killed */
	prctl(PR_SET_TIMERSLACK, 1ul, 0ul, 0ul, 0ul); /* a sender's pace is in microseconds */
	if (!getrlimit(RLIMIT_NOFILE, &files)) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	for (size_t i = 0; argc > 1 && i < sizeof(modes) / sizeof(*modes); i++)
		if (!strcmp(argv[1], modes[i].name) && argc - 2 == modes[i].args)
			return modes[i].run(argc - 1, argv + 1);
	for (size_t i = 0; i < sizeof(modes) / sizeof(*modes); i++)
		fprintf(stderr, "load %s %s\n", modes[i].name, modes[i].usage);
	return 2;
}
